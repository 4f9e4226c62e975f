"""Each public layout is read as it is downloaded: every image with its own labels, in the right split."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fcn.config import Data
from fcn.data import build_dataset
from fcn.data.datasets import PairDataset, list_split
from fcn.data.layouts import KITTI_FIRST_HELD_OUT
from fcn.errors import InputError
from tests import miniatures

FOLDER = {"classes": ("background", "road", "car"), "values": {"background": 0, "road": [1, "#804080"], "car": 2}}
SPLITS = {
    "voc": {"train": 4, "val": 2, "trainaug": 8},
    "camvid": {"train": 4, "val": 2, "test": 2},
    "cityscapes": {"train": 4, "val": 2},
    "kitti_road": {"train": 4, "val": 3, "trainval": 7},
    "portrait": {"training": 4, "testing": 2},
    "folder": {"train": 4, "val": 1},
}


def data(name: str, root: Path, **keys) -> Data:
    if name == "folder":
        keys = {**FOLDER, "val_fraction": 0.2, **keys}
    return Data(name=name, root=str(root), **keys)


def opened(config: Data, split: str) -> PairDataset:
    dataset = build_dataset(config, split)
    assert isinstance(dataset, PairDataset)
    return dataset


def stems(config: Data, split: str) -> list[str]:
    return [pair[0].stem for pair in list_split(config, split).pairs]


@pytest.mark.parametrize("name", miniatures.MAKERS)
def test_every_image_has_its_own_labels(tmp_path, name):
    expected = miniatures.MAKERS[name](tmp_path)
    seen = {}
    for split, count in SPLITS[name].items():
        dataset = opened(data(name, tmp_path), split)
        assert len(dataset) == count
        for index, (path, _) in enumerate(dataset.pairs):
            image, labels = dataset.read(index)
            where = path.relative_to(tmp_path).as_posix()
            assert image.mode == "RGB"
            assert np.array_equal(labels, expected[where]), where
            assert dataset.size(index) == expected[where].shape
            seen.setdefault(where, set()).add(split)
    assert seen.keys() == expected.keys()


def test_voc_masks_may_be_colours(tmp_path):
    expected = miniatures.voc(tmp_path, colours=True)
    dataset = opened(data("voc", tmp_path), "train")
    with Image.open(dataset.pairs[0][1]) as mask:
        assert mask.mode == "RGB"
    for index, (path, _) in enumerate(dataset.pairs):
        assert np.array_equal(dataset.read(index)[1], expected[path.relative_to(tmp_path).as_posix()])


def test_trainaug_is_its_list_or_everything_but_val(tmp_path):
    miniatures.voc(tmp_path)
    config = data("voc", tmp_path)
    assert stems(config, "trainaug") == [f"2007_{n:06d}" for n in (0, 1, 2, 3, 6, 7, 8, 9)]
    assert {pair[1].parent.name for pair in list_split(config, "trainaug").pairs} == {"SegmentationClassAug"}
    (tmp_path / "ImageSets/Segmentation/trainaug.txt").write_text(
        "/JPEGImages/2007_000006.jpg /SegmentationClassAug/2007_000006.png\n2007_000001\n"
    )
    assert stems(config, "trainaug") == ["2007_000006", "2007_000001"]


def test_train_aug_is_trainaug(tmp_path):
    miniatures.voc(tmp_path)
    (tmp_path / "ImageSets/Segmentation/train_aug.txt").write_text("2007_000006\n")
    ((_, mask),) = list_split(data("voc", tmp_path), "train_aug").pairs
    assert mask.parent.name == "SegmentationClassAug"


def test_kitti_is_split_by_the_frames(tmp_path):
    """289 images as published: 95 um, 96 umm, 98 uu; the last fifth of each is held out."""
    for category, count in (("um", 95), ("umm", 96), ("uu", 98)):
        for frame in range(count):
            path = tmp_path / f"image_2/{category}_{frame:06d}.png"
            path.parent.mkdir(exist_ok=True)
            path.touch()
    train, val = (stems(data("kitti_road", tmp_path), split) for split in ("train", "val"))
    assert (len(train), len(val), len({*train, *val})) == (232, 57, 289)
    assert all(int(name.split("_")[1]) >= KITTI_FIRST_HELD_OUT[name.split("_")[0]] for name in val)


# --- folders -------------------------------------------------------------------------------------------------------


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def pairs(root: Path, split: str = "train", **keys) -> list[tuple[str, str]]:
    config = data("folder", root, val_fraction=keys.pop("val_fraction", None), **keys)
    return [tuple(path.relative_to(root).as_posix() for path in pair) for pair in list_split(config, split).pairs]


def test_splits_may_be_subfolders_of_images_and_masks(tmp_path):
    touch(tmp_path, "images/train/b.jpg", "images/train/a/1.png", "images/val/c.jpg")
    touch(tmp_path, "masks/train/b.png", "masks/train/a/1.tif", "masks/val/c.png")
    assert pairs(tmp_path) == [
        ("images/train/a/1.png", "masks/train/a/1.tif"),
        ("images/train/b.jpg", "masks/train/b.png"),
    ]
    assert pairs(tmp_path, "val") == [("images/val/c.jpg", "masks/val/c.png")]


def test_splits_may_be_folders_that_hold_images_and_masks(tmp_path):
    touch(tmp_path, "train/img/a.jpg", "train/seg/a_L.png", "val/img/b.jpg", "val/seg/b_L.png")
    keys = {"images": "{split}/img", "masks": "{split}/seg", "mask_suffix": "_L"}
    assert pairs(tmp_path, **keys) == [("train/img/a.jpg", "train/seg/a_L.png")]
    assert pairs(tmp_path, "val", **keys) == [("val/img/b.jpg", "val/seg/b_L.png")]


def test_images_and_masks_may_share_a_folder(tmp_path):
    touch(tmp_path, "all/a.png", "all/a_mask.png", "all/b.jpg", "all/b_mask.png", "train.txt")
    (tmp_path / "train.txt").write_text("a\nb\n")
    keys = {"images": "all", "masks": "all", "mask_suffix": "_mask"}
    assert pairs(tmp_path, **keys) == [("all/a.png", "all/a_mask.png"), ("all/b.jpg", "all/b_mask.png")]


@pytest.mark.parametrize("where", ["train.txt", "splits/train.txt"])
@pytest.mark.parametrize(
    "line", ["my photo", "my photo.jpg", "images/my photo.jpg", "/far/away/my photo.jpg", "\ufeffmy photo\r\n\r\n"]
)
def test_splits_may_be_lists(tmp_path, where, line):
    touch(tmp_path, "images/my photo.jpg", "images/other.jpg", "masks/my photo.png", "masks/other.png", where)
    (tmp_path / where).write_text(line, encoding="utf-8")
    assert pairs(tmp_path) == [("images/my photo.jpg", "masks/my photo.png")]


def test_a_list_may_name_the_image_and_the_mask(tmp_path):
    touch(tmp_path, "images/a.jpg", "masks/a.png")
    (tmp_path / "train.txt").write_text("images/a.jpg masks/a.png\n")
    assert pairs(tmp_path) == [("images/a.jpg", "masks/a.png")]


def test_lists_find_images_in_subfolders(tmp_path):
    touch(tmp_path, *(f"{kind}/{name}.png" for kind in ("images", "masks") for name in ("a/1", "b/1", "b/2")))
    (tmp_path / "train.txt").write_text("/home/author/images/b/1.jpg\na/1\n2\n")
    assert [image for image, _ in pairs(tmp_path)] == ["images/b/1.png", "images/a/1.png", "images/b/2.png"]
    (tmp_path / "train.txt").write_text("1\n")
    assert pairs(tmp_path) == [("images/1.png", "masks/1.png")], "which of the two is not said, so it is missing"


def test_an_image_may_end_like_a_mask(tmp_path):
    touch(tmp_path, "images/train/x_L.png", "masks/train/x_L_L.png")
    assert pairs(tmp_path, mask_suffix="_L") == [("images/train/x_L.png", "masks/train/x_L_L.png")]


def test_an_image_is_not_its_own_mask(tmp_path):
    touch(tmp_path, "all/train/a.png")
    with pytest.raises(InputError, match=r"data\.masks: found .*all/train, as in data\.images; set data\.mask_suffix"):
        pairs(tmp_path, images="all", masks="all")


def test_a_fraction_is_exact_and_a_new_image_moves_hardly_any(tmp_path):
    touch(tmp_path, *(f"{folder}/{n}.png" for n in range(50) for folder in ("images", "masks")))
    train, val = (set(pairs(tmp_path, split, val_fraction=0.2)) for split in ("train", "val"))
    assert (len(train), len(val), len(train & val)) == (40, 10, 0)
    touch(tmp_path, "images/new.png", "masks/new.png")
    assert len(val - set(pairs(tmp_path, "val", val_fraction=0.2))) <= 1
    with pytest.raises(
        InputError, match=r"found the split 'test' with data\.val_fraction; accepted: those of data\.train"
    ):
        pairs(tmp_path, "test", val_fraction=0.2)


def test_an_image_without_a_mask_is_named(tmp_path):
    touch(tmp_path, "images/train/a.jpg", "images/train/b.jpg", "masks/train/b.png")
    with pytest.raises(InputError) as caught:
        build_dataset(data("folder", tmp_path, val_fraction=None), "train")
    assert str(caught.value).startswith(f"{tmp_path}/masks/train/a.png: no such file, but the split 'train' needs it")


def test_split_folders_of_images_alone_are_named(tmp_path):
    touch(tmp_path, "images/train/a.jpg", "masks/a.png")
    with pytest.raises(
        InputError, match=r"masks/train: no such folder, but .*images/train is one; give masks the same"
    ):
        pairs(tmp_path)
    assert pairs(tmp_path, images="images/{split}") == [("images/train/a.jpg", "masks/a.png")]


def test_what_is_odd_is_listed_and_does_not_stop(tmp_path):
    touch(tmp_path, "images/a.jpg", "images/a.png", "masks/a.png", "masks/b.png", "images/.hidden.png", "images/c.txt")
    (tmp_path / "train.txt").write_text("a\n")
    listing = list_split(data("folder", tmp_path, val_fraction=None), "train")
    assert [pair[0].name for pair in listing.pairs] == ["a.jpg"]
    assert [line.split(":")[0] for line in listing.oddities] == [f"{tmp_path}/images/a.png", f"{tmp_path}/masks/b.png"]


def test_what_other_programs_leave_is_no_data(tmp_path):
    touch(tmp_path, "images/a.jpg", "masks/a.png", "images/@eaDir/a.jpg", "images/__MACOSX/b.jpg", "images/._a.jpg")
    touch(tmp_path, "images/.AppleDouble/a.jpg", "images/sub/b.jpg", "masks/sub/b.png")
    (tmp_path / "images" / "sub" / "again").symlink_to(tmp_path / "images")  # leads back
    config = data("folder", tmp_path, classes=("a", "b"), val_fraction=0.5)
    names = {name for split in ("train", "val") for name in stems(config, split)}
    assert names == {"a", "b"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("../secret", "{root}/train.txt: found '../secret', which leaves the data set's folder"),
        ("images/../../secret", "{root}/train.txt: found 'images/../../secret', which leaves the data set's folder"),
        ("secret ../secret.png", "{root}/train.txt: found 'secret ../secret.png', which leaves the data set's folder"),
        ("/etc/secret", "{root}/images/etc/secret.png: no such file"),
    ],
)
def test_a_list_leads_nowhere_else(tmp_path, line, message):
    root = tmp_path / "root"
    touch(root, "images/a.png", "masks/a.png")
    touch(tmp_path, "secret.png", "images/secret.png")
    (root / "train.txt").write_text(f"a\n{line}\n")
    with pytest.raises(InputError) as refused:
        opened(data("folder", root, val_fraction=None), "train")
    assert str(refused.value).startswith(message.format(root=root))


def test_a_folder_draws_its_classes_in_the_colours_of_its_masks(tmp_path):
    miniatures.folder(tmp_path)
    classes = opened(data("folder", tmp_path), "train").classes
    assert classes.names == ("background", "road", "car")
    assert classes.palette == ((0, 0, 0), (0x80, 0x40, 0x80), (0, 128, 0))


@pytest.mark.parametrize(
    ("name", "split", "made", "message"),
    [
        ("cityscapes", "train", ["x"], "leftImg8bit: no such folder; is data.root the right one"),
        ("cityscapes", "trian", ["leftImg8bit/train/a"], "no such folder, so there is no split 'trian'; found train"),
        ("cityscapes", "train", ["leftImg8bit/train/a"], "leftImg8bit/train: found no CITY/*_leftImg8bit.png; unpack"),
        ("kitti_road", "test", ["image_2/um_000000.png"], "accepted: train, val or trainval"),
        ("kitti_road", "val", ["image_2/um_000000.png"], "image_2: found no image of the split 'val'"),
        ("kitti_road", "train", ["x"], "image_2: no such folder"),
        ("portrait", "train", ["1.png", "1_matte.png"], "found no split 'train' in"),
        ("portrait", "train", ["train/x.txt"], "train: found no images; accepted: any type that Pillow reads"),
        ("folder", "train", ["images/a.png"], "masks: no such folder"),
        ("folder", "train", ["images/a.png", "masks/a.png"], "or set data.val_fraction=0.2"),
    ],
)  # fmt: skip
def test_a_layout_that_is_not_there_says_what_was_expected(tmp_path, name, split, made, message):
    touch(tmp_path, *made)
    with pytest.raises(InputError) as caught:
        list_split(data(name, tmp_path, **({"val_fraction": None} if name == "folder" else {})), split)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
