"""What the files of a split hold is counted as numpy counts it, and damage that decoders pass over is found."""

import functools
import io
import os

import numpy as np
import pytest
from PIL import Image

from fcn.config import Data
from fcn.data import SplitReport, inspect_split, median_frequency_weights, repeated_images
from fcn.data.inspection import Inspector, hidden_damage


def encoded(kind, seed=0, **options):
    """An image of 96x64 noisy pixels as the bytes of a file."""
    noise = np.random.default_rng(seed).integers(0, 256, (64, 96, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, kind, **options)
    return file.getvalue()


def with_zeros(content, length=64):
    """Damaged in the middle."""
    middle = len(content) // 2
    return content[:middle] + bytes(length) + content[middle + length :]


def cut(content):
    return content[: len(content) // 2]


@pytest.fixture
def voc(tmp_path):
    """A VOC folder with one training pair, a, of 96x64 pixels; returns a function that inspects it."""
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "JPEGImages/a.jpg").write_bytes(encoded("jpeg"))
    Image.fromarray(np.eye(64, 96, dtype=np.uint8)).save(tmp_path / "SegmentationClass/a.png")
    (tmp_path / "ImageSets/Segmentation/train.txt").write_text("a\n")
    return functools.partial(inspect_split, Data(name="voc", root=str(tmp_path)), "train"), tmp_path


# --- counts --------------------------------------------------------------------------------------------------------


def numpy_counts(masks, ignored=()):
    """Of the pixels of mask files; (256,)."""
    counts = np.zeros(256, np.int64)
    for path in masks:
        values, found = np.unique(np.asarray(Image.open(path)), return_counts=True)
        counts[[255 if value in ignored else value for value in values]] += found
    return counts


def test_shapes_are_counted_as_numpy_counts_them(shapes_root):
    report = inspect_split(Data(name="shapes", root=str(shapes_root)), "val")
    names = (shapes_root / "ImageSets/Segmentation/val.txt").read_text().split()
    masks = [shapes_root / f"SegmentationClass/{name}.png" for name in names]
    assert np.array_equal(report.pixels, numpy_counts(masks))
    assert list(report.sizes.values()) == [Image.open(path).size[::-1] for path in masks]
    assert (report.entries, report.faults, report.warnings) == (10, [], [])
    for label in range(7):
        labelled = (counts for path in masks if (counts := numpy_counts([path]))[label])
        assert report.surroundings[label] == sum(counts[:255].sum() for counts in labelled)


def test_real_camvid_by_worker_processes(camvid_root):
    report = inspect_split(Data(name="camvid", root=str(camvid_root), workers=2), "train")
    assert (report.entries, len(report.sizes), set(report.sizes.values())) == (367, 367, {(360, 480)})
    expected = numpy_counts(camvid_root.glob("trainannot/*.png"), ignored=(11,))
    assert np.array_equal(report.pixels, expected)
    assert (report.faults, report.warnings) == ([], [])


def test_real_voc(voc_root):
    report = inspect_split(Data(name="voc", root=str(voc_root), workers=1), "val")
    names = (voc_root / "ImageSets/Segmentation/val.txt").read_text().split()
    assert (report.entries, len(report.sizes)) == (61, 61)
    assert np.array_equal(report.pixels, numpy_counts(voc_root / f"SegmentationClass/{name}.png" for name in names))
    assert (report.faults, report.warnings) == ([], [])


def test_weights_by_median_frequency_worked_out_by_hand():
    # Three images of 100 labelled pixels. Class 0 in all: 210 of 300; class 1 in two: 60 of 200; class 2 in one:
    # 30 of 100; class 3 nowhere. Frequencies 0.7, 0.3, 0.3, median 0.3.
    weights = median_frequency_weights(np.array([210, 60, 30, 0]), np.array([300, 200, 100, 0]))
    assert weights == pytest.approx([3 / 7, 1, 1, 1], rel=1e-15)


def test_weights_of_a_split_without_labels_are_1():
    assert list(median_frequency_weights(np.zeros(3), np.zeros(3))) == [1, 1, 1]


# --- damage that decoders pass over --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["jpeg", "png", "tiff", "bmp"])
def test_sound_files_are_not_complained_about(tmp_path, kind):
    (tmp_path / "file").write_bytes(encoded(kind))
    assert hidden_damage(tmp_path / "file") is None


def test_progressive_cmyk_and_appended_bytes_are_sound(tmp_path):
    file = io.BytesIO()
    Image.new("CMYK", (40, 30), (9, 8, 7, 6)).save(file, "jpeg")
    for content in (encoded("jpeg", progressive=True), file.getvalue(), encoded("jpeg") + bytes(3000)):
        (tmp_path / "file").write_bytes(content)
        assert hidden_damage(tmp_path / "file") is None


@pytest.mark.parametrize(
    ("damaged", "complaint"),
    [
        (with_zeros(encoded("jpeg")), "Corrupt JPEG data: "),
        (cut(encoded("jpeg")) + b"\xff\xd9", "Corrupt JPEG data: premature end"),
        (cut(encoded("jpeg")) + bytes(100_000), "Image is incomplete"),  # a download that stopped, at its full size
    ],
)
def test_damaged_jpeg_that_opens_is_found(tmp_path, damaged, complaint):
    path = tmp_path / "file"
    path.write_bytes(damaged)
    Image.open(path).load()  # Pillow has nothing to say
    assert hidden_damage(path).startswith(complaint)


def test_png_whose_pixels_changed_is_found(tmp_path):
    """Of the ways to damage a byte there are some that give other pixels and no complaint."""
    path, file = tmp_path / "file", io.BytesIO()
    coarse = np.random.default_rng(0).integers(0, 5, (60, 90), np.uint8)
    Image.fromarray(coarse.repeat(7, 0).repeat(7, 1)).save(file, "png")
    sound = file.getvalue()
    silent = 0
    for place in range(len(sound) // 2, len(sound) - 30, 20):
        damaged = bytearray(sound)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        try:
            silent += np.asarray(Image.open(path)).tobytes() != np.asarray(Image.open(io.BytesIO(sound))).tobytes()
        except OSError:
            continue
        assert "checksum" in hidden_damage(path)
    assert silent


def test_stderr_is_whole_again(tmp_path, capfd):
    path = tmp_path / "file"
    path.write_bytes(with_zeros(encoded("jpeg")))
    hidden_damage(path)
    os.write(2, b"heard")
    assert capfd.readouterr().err == "heard"


def test_a_few_stray_bytes_before_the_end_are_a_warning(voc):
    inspect, root = voc
    content = encoded("jpeg")
    (root / "JPEGImages/a.jpg").write_bytes(content[:-2] + bytes(20) + content[-2:])
    report = inspect()
    assert report.faults == []
    assert ["extraneous bytes" in warning for warning in report.warnings] == [True]
    assert len(report.sizes) == 1


# --- headers only --------------------------------------------------------------------------------------------------


def sideways(content):
    """The same JPEG with an EXIF orientation of 90 degrees."""
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    Image.open(io.BytesIO(content)).save(file, "jpeg", exif=exif)
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (encoded("jpeg"), None),
        (encoded("jpeg") + bytes(3000), None),  # the end is not where it is looked for, so all is decoded
        (encoded("png"), None),
        (encoded("tiff"), None),
        (with_zeros(encoded("jpeg")), None),  # needs the pixels
        (cut(encoded("jpeg")), "a.jpg: broken image (image file is truncated"),
        (cut(encoded("png")), "a.jpg: broken image ("),
        (cut(encoded("tiff")), "a.jpg: "),
        (
            sideways(encoded("jpeg")),
            "a.png: found a mask of 96x64 pixels for the image a.jpg of 64x96 after it was turned by",
        ),
        (b"", "a.jpg: cannot be read (not an image)"),
        (b"\xff\xd9", "a.jpg: cannot be read (not an image)"),
    ],
)
def test_headers_only(voc, content, found):
    inspect, root = voc
    (root / "JPEGImages/a.jpg").write_bytes(content)
    faults = inspect(headers_only=True).faults
    assert len(faults) == (found is not None)
    assert found is None or found in faults[0]


def test_masks_are_decoded_whatever_is_believed_of_images(voc):
    inspect, root = voc
    (root / "SegmentationClass/a.png").write_bytes(cut((root / "SegmentationClass/a.png").read_bytes()))
    assert "a.png: broken image (" in inspect(headers_only=True).faults[0]


# --- what else is in a sample --------------------------------------------------------------------------------------


def test_image_and_mask_have_a_line_each(voc):
    inspect, root = voc
    (root / "JPEGImages/a.jpg").write_bytes(b"text")
    Image.fromarray(np.full((4, 4), 99, np.uint8)).save(root / "SegmentationClass/a.png")
    image, mask = inspect().faults
    assert "a.jpg: cannot be read" in image
    assert "a.png: found label 99" in mask


class Own:
    """A data set of the user's own: three images of 4x2 pixels, one of them not there and one unlabelled."""

    def __init__(self, root, split):
        pass

    classes = ("ground", "road")

    def __len__(self):
        return 3

    def __getitem__(self, index):
        if index == 1:
            raise FileNotFoundError("no such tile")
        return np.zeros((2, 4, 3), np.uint8), np.full((2, 4), 1 if index == 0 else 255, np.uint8)


def test_data_set_of_the_users_own():
    report = inspect_split(Data(name=f"{__name__}:Own", root="."), "all")
    assert (report.entries, report.sizes) == (3, {0: (2, 4)})
    assert report.pixels[1] == 8
    place = f"split 'all': sample {{}} of {__name__}:Own: "
    assert [fault.startswith(place.format(index)) for index, fault in zip((1, 2), report.faults)] == [True, True]
    assert "no such tile" in report.faults[0]
    assert "ignored" in report.faults[1]


def test_equal_content_is_a_leak_between_splits_and_a_warning_within_one():
    train = SplitReport("train", digests={"a": b"1", "b": b"1", "c": None, "d": None})
    val = SplitReport("val", digests={"x": b"1", "c": None, "y": b"2"})
    faults, warnings = repeated_images([train, val])
    assert [fault.partition(":")[0] for fault in faults] == ["c", "x"]
    assert [warning.partition(":")[0] for warning in warnings] == ["b"]


def test_an_inspector_does_not_raise_for_the_user(voc):
    inspect, root = voc
    dataset = inspect().dataset
    (root / "JPEGImages/a.jpg").unlink()
    assert "a.jpg: cannot be read (No such file or directory)" in Inspector(dataset, "train", False)[0].faults[0]
