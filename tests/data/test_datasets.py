"""Data sets on disk are read as they are, and each fault in them is named with its file and remedy."""

import shutil

import numpy as np
import pytest
from PIL import Image

from fcn.config import Data
from fcn.data import build_dataset
from fcn.errors import InputError


def picture(height=6, width=8, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def mask(*rows):
    return Image.fromarray(np.array(rows, np.uint8))


@pytest.fixture
def voc(tmp_path):
    """A VOC folder with images a and b of 6x8 pixels, and a function that opens its split."""
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("a", "b"):
        picture().save(tmp_path / f"JPEGImages/{name}.jpg")
        mask(*[[0, 1, 2, 3, 20, 255, 7, 7]] * 6).save(tmp_path / f"SegmentationClass/{name}.png")
    for split in ("train", "val"):
        (tmp_path / f"ImageSets/Segmentation/{split}.txt").write_text("a\nb\n")
    return tmp_path


@pytest.fixture
def camvid(tmp_path):
    """A CamVid folder in the public layout, with one image of 2x3 pixels; its list is for the test to write."""
    for folder in ("train", "trainannot"):
        (tmp_path / folder).mkdir()
    picture(2, 3).save(tmp_path / "train/0001.png")
    mask([0, 5, 10], [11, 255, 11]).save(tmp_path / "trainannot/0001.png")
    return tmp_path


def fault(root, split="train", name="voc", index=0):
    """The message about a data set that cannot be opened, or whose sample cannot be read."""
    with pytest.raises(InputError) as caught:
        build_dataset(Data(name=name, root=str(root)), split).read(index)
    return str(caught.value)


def pixels(path):
    with Image.open(path) as image:
        return np.array(image)


def exif(number):
    found = Image.Exif()
    found[0x0112] = number
    return found


# --- what is right is read -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("split", "count"), [("train", 24), ("val", 10)])
def test_shapes_are_read_as_they_lie_on_disk(shapes_root, split, count):
    dataset = build_dataset(Data(name="shapes", root=str(shapes_root)), split)
    names = (shapes_root / f"ImageSets/Segmentation/{split}.txt").read_text().split()
    assert len(dataset) == count
    assert [dataset.name(index) for index in range(count)] == names
    for index, name in enumerate(names):
        image, labels = dataset.read(index)
        assert image.mode == "RGB"
        assert np.array_equal(image, pixels(shapes_root / f"JPEGImages/{name}.jpg"))
        assert np.array_equal(labels, pixels(shapes_root / f"SegmentationClass/{name}.png"))
        assert dataset.size(index) == np.asarray(labels).shape == (image.height, image.width)


@pytest.mark.parametrize("split", ["train", "val"])
def test_real_voc_is_read_as_it_lies_on_disk(voc_root, split):
    dataset = build_dataset(Data(name="voc", root=str(voc_root)), split)
    names = (voc_root / f"ImageSets/Segmentation/{split}.txt").read_text().split()
    assert len(dataset) == len(names)
    for index in range(0, len(dataset), 8):
        image, labels = dataset.read(index)
        assert np.array_equal(image, pixels(voc_root / f"JPEGImages/{names[index]}.jpg"))
        assert np.array_equal(labels, pixels(voc_root / f"SegmentationClass/{names[index]}.png"))
    for index, name in enumerate(names):
        assert dataset.size(index) == pixels(voc_root / f"SegmentationClass/{name}.png").shape


@pytest.mark.parametrize(("split", "count"), [("train", 367), ("val", 101), ("test", 233)])
def test_real_camvid_is_read_with_label_11_ignored(camvid_root, split, count):
    dataset = build_dataset(Data(name="camvid", root=str(camvid_root)), split)
    assert len(dataset) == count
    ignored = 0
    for index in range(0, count, 20):
        image, labels = dataset.read(index)
        stored = pixels(camvid_root / f"{split}annot" / f"{dataset.name(index)}.png")
        ignored += np.count_nonzero(stored == 11)
        assert np.array_equal(labels, np.where(stored == 11, 255, stored))
        assert dataset.size(index) == stored.shape == (image.height, image.width) == (360, 480)
    assert ignored > 0


@pytest.mark.parametrize(
    "line",
    [
        "/SegNet/CamVid/train/0001.png /SegNet/CamVid/trainannot/0001.png",
        "0001.png",
        "0001",
        "train/0001.png trainannot/0001.png",
        "\n0001\n\n",
        "0001\r\n",
    ],
)
def test_public_camvid_lists_are_understood(camvid, line):
    (camvid / "train.txt").write_text(line)
    dataset = build_dataset(Data(name="camvid", root=str(camvid)), "train")
    image, labels = dataset.read(0)
    assert (len(dataset), dataset.name(0), dataset.size(0)) == (1, "0001", (2, 3))
    assert np.array_equal(image, pixels(camvid / "train/0001.png"))
    assert np.array_equal(labels, [[0, 5, 10], [255, 255, 255]])


def test_camvid_mask_may_have_a_name_of_its_own(camvid):
    (camvid / "trainannot/0001.png").rename(camvid / "trainannot/0001_L.png")
    (camvid / "train.txt").write_text("/x/train/0001.png /x/trainannot/0001_L.png\n")
    assert np.array_equal(
        build_dataset(Data(name="camvid", root=str(camvid)), "train").read(0)[1], [[0, 5, 10], [255, 255, 255]]
    )


def test_camvid_id_may_hold_a_dot(camvid):
    for folder in ("train", "trainannot"):
        (camvid / folder / "0001.png").rename(camvid / folder / "seq.0001.png")
    (camvid / "train.txt").write_text("seq.0001\n")
    assert build_dataset(Data(name="camvid", root=str(camvid)), "train").name(0) == "seq.0001"


# Mirrored, a half turn, lying: the labels say where the image's pixels are.
@pytest.mark.parametrize("number", [2, 3, 4, 6])
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_a_mask_lies_on_its_image_whoever_turned_it(voc, number, suffix):
    """Drawn upright, without EXIF; drawn on the stored pixels, with the image's EXIF or without."""
    labels = np.random.default_rng(1).integers(0, 21, (6, 8), np.uint8)
    image = Image.fromarray(np.repeat(labels[..., None] * 10, 3, 2))
    dataset = build_dataset(Data(name="voc", root=str(voc)), "train")
    upright = dataset.pairs[0][1].with_name(f"upright.{suffix}")
    pairs = [(image_path.with_suffix(f".{suffix}"), upright) for image_path, _ in dataset.pairs]
    image.save(pairs[0][0], exif=exif(number))
    turn = {2: np.fliplr, 3: lambda p: np.rot90(p, 2), 4: np.flipud, 6: lambda p: np.rot90(p, -1)}[number]
    Image.fromarray(np.ascontiguousarray(turn(labels))).save(upright)
    Image.fromarray(labels).save(upright.with_stem("copied"), exif=exif(number))
    Image.fromarray(labels).save(upright.with_stem("stored"))
    for name, keys in (("upright", (True,)), ("copied", (True, False)), ("stored", (False,))):
        for key in keys:
            data = Data(name="voc", root=str(voc), exif_orientation=key)
            one = build_dataset(data, "train", pairs=[(pairs[0][0], upright.with_stem(name))])
            pixels, found = one.read_arrays(0)
            assert np.array_equal(pixels[..., 0], found * 10)
            assert one.size(0) == found.shape


@pytest.mark.parametrize("key", [True, False])
def test_pillow_images_of_an_own_data_set_are_turned_by_the_same_key(tmp_path, monkeypatch, key):
    (tmp_path / "oriented.py").write_text(
        "from PIL import Image\n"
        "def build(root, split):\n"
        "    return [[Image.open(f'{root}/{name}.png') for name in ('image', 'mask')]]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    labels = np.arange(6, dtype=np.uint8).reshape(2, 3)
    Image.fromarray(labels).save(tmp_path / "image.png", exif=exif(6))
    Image.fromarray(labels).save(tmp_path / "mask.png", exif=exif(6))
    data = Data(name="oriented:build", root=str(tmp_path), classes=tuple("abcdef"), exif_orientation=key)
    image, found = map(np.asarray, build_dataset(data, "train").read(0))
    assert np.array_equal(found, np.rot90(labels, -1) if key else labels)
    assert np.array_equal(image[..., 0], found)


@pytest.mark.parametrize(
    ("key", "words"),
    [
        (True, "8x6 pixels for the image a.jpg of 6x8 after it was turned by its EXIF orientation; accepted: equal "
               "sizes; if masks were drawn on the pixels as stored, set data.exif_orientation=false"),
        (False, "6x8 pixels for the image a.jpg of 8x6 without its EXIF orientation; accepted: equal sizes; if masks "
                "were drawn on the upright image, set data.exif_orientation=true"),
    ],
)  # fmt: skip
def test_sizes_that_differ_by_exif_name_the_key(voc, key, words):
    picture().save(voc / "JPEGImages/a.jpg", exif=exif(6))
    mask(*[[0] * (8 if key else 6)] * (6 if key else 8)).save(voc / "SegmentationClass/a.png")
    with pytest.raises(InputError) as caught:
        build_dataset(Data(name="voc", root=str(voc), exif_orientation=key), "train").read(0)
    assert str(caught.value) == f"{voc}/SegmentationClass/a.png: found a mask of {words}"


def test_ignore_index_becomes_255_and_255_stays(voc):
    labels = np.asarray(build_dataset(Data(name="voc", root=str(voc)), "train", ignore_index=0).read(0)[1])
    assert np.array_equal(labels, [[255, 1, 2, 3, 20, 255, 7, 7]] * 6)


def test_ignore_index_may_lie_above_the_classes(voc):
    mask(*[[0, 99]] * 2).save(voc / "SegmentationClass/a.png")
    picture(2, 2).save(voc / "JPEGImages/a.jpg")
    assert "found label 99" in fault(voc)
    labels = build_dataset(Data(name="voc", root=str(voc)), "train", ignore_index=99).read(0)[1]
    assert np.array_equal(labels, [[0, 255]] * 2)


@pytest.mark.parametrize("mode", ["L", "P"])
def test_grey_and_palette_masks_are_class_indices(voc, mode):
    grey = mask(*[[0, 1, 2, 3, 20, 255, 7, 7]] * 6)
    if mode == "P":
        grey.putpalette(list(range(255, -1, -1)) * 3)
    assert grey.mode == mode
    grey.save(voc / "SegmentationClass/a.png")
    assert np.array_equal(
        build_dataset(Data(name="voc", root=str(voc)), "train").read(0)[1], [[0, 1, 2, 3, 20, 255, 7, 7]] * 6
    )


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_image_of_another_mode_becomes_rgb(voc, mode):
    picture().convert(mode).save(voc / "JPEGImages/a.jpg")
    assert build_dataset(Data(name="voc", root=str(voc)), "train").read(0)[0].mode == "RGB"


# --- what is wrong is named ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "remedy"),
    [("voc", "set data.root to"), ("camvid", "set data.root to"), ("shapes", "python -m fcn.data.shapes")],
)
def test_missing_root(tmp_path, name, remedy):
    message = fault(tmp_path / "nowhere", name=name)
    assert message.startswith(f"data.root: {tmp_path / 'nowhere'}: no such folder")
    assert remedy in message


def test_missing_list_names_the_splits_that_are_there(voc):
    message = fault(voc, split="trainaug")
    assert message.startswith(f"{voc}/ImageSets/Segmentation/trainaug.txt: no such list")
    assert "no split 'trainaug'; found the splits train, val" in message


def test_missing_lists_ask_for_the_root(tmp_path):
    assert "is data.root the right folder?" in fault(tmp_path)


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_empty_list(voc, content):
    path = voc / "ImageSets/Segmentation/train.txt"
    path.write_text(content)
    assert fault(voc).startswith(f"{path}: the list is empty; accepted: ")


def test_list_that_is_no_text(voc):
    path = voc / "ImageSets/Segmentation/train.txt"
    path.write_bytes(b"\xff\xfe")
    assert fault(voc).startswith(f"{path}: cannot be read ")


def test_missing_camvid_folder(camvid):
    (camvid / "train.txt").write_text("0001\n")
    shutil.rmtree(camvid / "trainannot")
    message = fault(camvid, name="camvid")
    assert message.startswith(f"{camvid}/trainannot: no such folder")
    assert "data.root" in message


@pytest.mark.parametrize(
    ("removed", "more"),
    [
        (["SegmentationClass/a.png"], "no such file, but"),
        (["JPEGImages/b.jpg"], "no such file, but"),
        (["SegmentationClass/a.png", "JPEGImages/b.jpg"], "no such file (and 1 more files of this split), but"),
    ],
)
def test_missing_files_are_found_on_opening(voc, removed, more):
    for path in removed:
        (voc / path).unlink()
    with pytest.raises(InputError) as caught:
        build_dataset(Data(name="voc", root=str(voc)), "train")
    assert str(caught.value).startswith(f"{voc / removed[0]}: {more}")
    assert "add it, or take the image out" in str(caught.value)


def test_missing_camvid_mask(camvid):
    (camvid / "train.txt").write_text("0001\n")
    (camvid / "trainannot/0001.png").unlink()
    assert fault(camvid, name="camvid").startswith(f"{camvid}/trainannot/0001.png: no such file")


def test_mask_of_another_size(voc):
    mask([0, 1], [0, 1], [0, 1]).save(voc / "SegmentationClass/a.png")
    message = fault(voc)
    assert message.startswith(f"{voc}/SegmentationClass/a.png: found a mask of 2x3 pixels for the image a.jpg of 8x6")
    assert "export the mask again" in message


@pytest.mark.parametrize(("values", "named"), [((21,), "21"), ((21, 254), "21, 254")])
def test_label_above_the_classes(voc, values, named):
    row = [0, 20, 255, *values]
    mask(row, row).save(voc / "SegmentationClass/a.png")
    picture(2, len(row)).save(voc / "JPEGImages/a.jpg")
    assert fault(voc).startswith(f"{voc}/SegmentationClass/a.png: found label {named}; accepted: 0 to 20 (21 classes)")


def test_camvid_label_12_is_no_class(camvid):
    (camvid / "train.txt").write_text("0001\n")
    mask([0, 5, 10], [11, 12, 11]).save(camvid / "trainannot/0001.png")
    assert "found label 12; accepted: 0 to 10 (11 classes)" in fault(camvid, name="camvid")


@pytest.mark.parametrize("path", ["JPEGImages/a.jpg", "SegmentationClass/a.png"])
@pytest.mark.parametrize("content", [b"", b"this is a text, not an image\n"])
def test_file_that_is_no_image(voc, path, content):
    (voc / path).write_bytes(content)
    message = fault(voc)
    assert message.startswith(f"{voc / path}: cannot be read (not an image)")
    assert "copy it again or leave it out" in message


@pytest.mark.parametrize("path", ["JPEGImages/a.jpg", "SegmentationClass/a.png"])
def test_truncated_file(voc, path):
    noise = picture(64, 64)
    (noise if path.endswith("jpg") else noise.convert("L")).save(voc / path)
    whole = (voc / path).read_bytes()
    (voc / path).write_bytes(whole[: len(whole) // 2])
    message = fault(voc)
    assert message.startswith(f"{voc / path}: broken image (")
    assert "copy it again" in message


def test_size_of_a_file_that_is_no_image(voc):
    (voc / "SegmentationClass/b.png").write_bytes(b"text")
    dataset = build_dataset(Data(name="voc", root=str(voc)), "train")
    assert dataset.size(0) == (6, 8)
    with pytest.raises(InputError, match=r"b\.png: cannot be read"):
        dataset.size(1)


def test_folder_in_place_of_an_image(voc):
    (voc / "JPEGImages/a.jpg").unlink()
    (voc / "JPEGImages/a.jpg").mkdir()
    assert fault(voc).startswith(f"{voc}/JPEGImages/a.jpg: cannot be read (Is a directory)")
