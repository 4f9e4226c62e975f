"""Miniatures of public data sets, in the layout in which each is downloaded.

Every maker writes images of 40x48 pixels, or turned, under a new root, and returns the labels (H, W) uint8, 255 =
ignore, that each image should have once it is read, by the image's path under the root.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from fcn.data import voc_palette
from fcn.data.labels import CITYSCAPES_IDS

Expected = dict[str, np.ndarray]
PALETTE = np.array(voc_palette(256), np.uint8)


def sample(number: int, classes: int, ignored: bool = True) -> tuple[Image.Image, np.ndarray]:
    """An image and labels: stripes of classes whose grey says which, and a border that is ignored."""
    height, width = (48, 40) if number % 3 == 2 else (40, 48)
    labels = ((np.arange(width) // 8 + number) % classes).astype(np.uint8)[None].repeat(height, axis=0)
    noise = np.random.default_rng(number).integers(0, 40, (height, width, 3))
    image = Image.fromarray((labels[..., None] * (200 // classes) + noise).astype(np.uint8))
    if ignored:
        labels[:, -2:] = 255
    return image, labels


def write(path: Path, image: Image.Image | np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(path)


def with_palette(labels: np.ndarray) -> Image.Image:
    mask = Image.fromarray(labels).convert("P")
    mask.putpalette(PALETTE.ravel().tolist())
    return mask


def voc(root: Path, *, colours: bool = False) -> Expected:
    """Four training and two validation images; SegmentationClassAug has them all and four more."""
    expected = {}
    lists: dict[str, list[str]] = {"train": [], "val": [], "trainaug": []}
    for number in range(10):
        split = "train" if number < 4 else "val" if number < 6 else "trainaug"
        name = f"2007_{number:06d}"
        image, labels = sample(number, 21)
        write(root / f"JPEGImages/{name}.jpg", image)
        write(root / f"SegmentationClassAug/{name}.png", labels)
        if split != "trainaug":
            write(root / f"SegmentationClass/{name}.png", PALETTE[labels] if colours else with_palette(labels))
        lists[split].append(name)
        expected[f"JPEGImages/{name}.jpg"] = labels
    folder = root / "ImageSets/Segmentation"
    folder.mkdir(parents=True)
    for split in ("train", "val"):
        (folder / f"{split}.txt").write_text("\n".join(lists[split]) + "\n")
    return expected


def camvid(root: Path) -> Expected:
    """The public lists name two absolute paths a line; 11 is unlabelled."""
    expected = {}
    for split, count in (("train", 4), ("val", 2), ("test", 2)):
        lines = []
        for number in range(count):
            name = f"0001TP_{number:06d}.png"
            image, labels = sample(number, 11)
            write(root / split / name, image)
            write(root / f"{split}annot" / name, np.where(labels == 255, 11, labels).astype(np.uint8))
            lines.append(f"/SegNet/CamVid/{split}/{name} /SegNet/CamVid/{split}annot/{name}")
            expected[f"{split}/{name}"] = labels
        (root / f"{split}.txt").write_text("\n".join(lines) + "\n")
    return expected


def cityscapes(root: Path) -> Expected:
    expected = {}
    ids = np.zeros(256, np.uint8)
    ids[list(CITYSCAPES_IDS.values())] = list(CITYSCAPES_IDS)
    for split, cities in (("train", ("aachen", "bremen")), ("val", ("lindau",))):
        for city in cities:
            for number in range(2):
                stem = f"{city}_{number:06d}_000019"
                image, labels = sample(number, 19)
                write(root / f"leftImg8bit/{split}/{city}/{stem}_leftImg8bit.png", image)
                write(root / f"gtFine/{split}/{city}/{stem}_gtFine_labelIds.png", ids[labels])
                write(root / f"gtFine/{split}/{city}/{stem}_gtFine_color.png", PALETTE[labels])
                expected[f"leftImg8bit/{split}/{city}/{stem}_leftImg8bit.png"] = labels
    return expected


def kitti_road(root: Path) -> Expected:
    colours = np.zeros((256, 3), np.uint8)
    colours[:2] = (255, 0, 0), (255, 0, 255)
    expected = {}
    for name in ("um_000000", "um_000001", "umm_000076", "uu_000078", "um_000076", "umm_000077", "uu_000097"):
        category, frame = name.split("_")
        image, labels = sample(int(frame), 2)
        write(root / f"training/image_2/{name}.png", image)
        write(root / f"training/gt_image_2/{category}_road_{frame}.png", colours[labels])
        if category == "um":
            write(root / f"training/gt_image_2/um_lane_{frame}.png", colours[labels])
        expected[f"training/image_2/{name}.png"] = labels
    return expected


def portrait(root: Path) -> Expected:
    expected = {}
    for split, count in (("training", 4), ("testing", 2)):
        for number in range(count):
            image, labels = sample(number, 2, ignored=False)
            write(root / f"{split}/{number:05d}.png", image)
            write(root / f"{split}/{number:05d}_matte.png", np.where(labels == 1, 1 + 50 * number, 0).astype(np.uint8))
            expected[f"{split}/{number:05d}.png"] = labels
    return expected


def folder(root: Path) -> Expected:
    """Five images of as many types; masks as `configs/linknet_folder.yaml` describes them, one of them as colours."""
    expected = {}
    for number, kind in enumerate(("png", "jpg", "tif", "bmp", "gif")):
        image, labels = sample(number, 2 if number == 3 else 3)
        write(root / f"images/day {number}.{kind}", image)
        if number == 3:
            labels[labels != 1] = 1
            write(
                root / f"masks/day {number}.png",
                np.array([0x80, 0x40, 0x80], np.uint8)[None, None] * np.ones((*labels.shape, 1), np.uint8),
            )
        else:
            write(root / f"masks/day {number}.png", labels)
        expected[f"images/day {number}.{kind}"] = labels
    return expected


MAKERS = {
    "voc": voc, "camvid": camvid, "cityscapes": cityscapes, "kitti_road": kitti_road, "portrait": portrait,
    "folder": folder,
}  # fmt: skip
