"""Where images and masks of each data set are on disk, and what the masks mean.

A layout is a function (data, split) → `Listing`. It reads lists and folders, but no images.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from fcn.config import Data, pixel_classes
from fcn.data import masks
from fcn.data.images import is_image, walk_images
from fcn.data.labels import (
    CAMVID,
    CAMVID_UNLABELLED,
    CITYSCAPES,
    CITYSCAPES_IDS,
    IGNORE_INDEX,
    KITTI_ROAD,
    KITTI_ROAD_IGNORED,
    PORTRAIT,
    SHAPES,
    VOC,
    Classes,
    voc_palette,
)
from fcn.data.masks import MaskFormat
from fcn.errors import InputError


@dataclass(frozen=True, slots=True)
class Listing:
    """The files of a split, whether they exist or not."""

    pairs: list[tuple[Path, Path]]
    """(image, mask) of every sample, in order."""
    oddities: tuple[str, ...] = ()
    """Oddities of the listing that do not stop a run, one line each."""


# --- layouts of their own ------------------------------------------------------------------------------------------


def voc(data: Data, split: str) -> Listing:
    """ImageSets/Segmentation/SPLIT.txt, JPEGImages/ID.jpg, SegmentationClass/ID.png.

    The masks of `trainaug` are in SegmentationClassAug; without a list it is all of them except `val`.
    """
    root = Path(data.root)
    lists = root / "ImageSets" / "Segmentation"
    augmented = split.replace("_", "") == "trainaug"  # train_aug in some public lists
    folder = root / ("SegmentationClassAug" if augmented else "SegmentationClass")
    if split == "trainaug" and not (lists / "trainaug.txt").exists() and folder.is_dir():
        held_out = {_stem(entry) for entry, *_ in _read_list(lists, "val")}
        stems = sorted(set(_by_stem(folder)) - held_out)
    else:
        stems = [_stem(entry) for entry, *_ in _read_list(lists, split)]
    return Listing([(root / "JPEGImages" / f"{stem}.jpg", folder / f"{stem}.png") for stem in stems])


def camvid(data: Data, split: str) -> Listing:
    """The SegNet tutorial's: SPLIT.txt, SPLIT/ID.png and SPLITannot/ID.png.

    A line of the list is an ID, a file name, or the two paths of image and mask. Only the names count, because the
    public lists contain absolute paths of their authors' machine. Images may have any type.
    """
    root = Path(data.root)
    entries = _read_list(root, split)
    images, annotated = _by_stem(root / split), _by_stem(root / f"{split}annot")
    pairs = []
    for image, *mask in entries:
        stem, mask_stem = _stem(image), _stem(mask[0] if mask else image)
        missing = f"{stem}.png"
        pairs.append(
            (images.get(stem, root / split / missing), annotated.get(mask_stem, root / f"{split}annot" / missing))
        )
    return Listing(pairs)


def cityscapes(data: Data, split: str) -> Listing:
    """leftImg8bit/SPLIT/CITY/ID_leftImg8bit.png with gtFine/SPLIT/CITY/ID_gtFine_labelIds.png."""
    root = Path(data.root)
    images = _folder(root / "leftImg8bit") / split
    if not images.is_dir():
        raise InputError(
            f"data.root: {images}: no such folder, so there is no split '{split}'; {_subfolders(images.parent)}"
        )
    ending = "_leftImg8bit.png"
    found = sorted(path for path in images.glob(f"*/*{ending}") if not path.name.startswith("."))
    if not found:
        raise InputError(f"{images}: found no CITY/*{ending}; unpack leftImg8bit_trainvaltest.zip there")
    masks_root = root / "gtFine" / split
    names = ((path, path.name.removesuffix(ending) + "_gtFine_labelIds.png") for path in found)
    return Listing([(path, masks_root / path.parent.name / name) for path, name in names])


KITTI_FIRST_HELD_OUT = {"um": 76, "umm": 77, "uu": 79}
"""The last fifth of the frames of each KITTI Road category is `val`, because neighbouring frames look alike."""


def kitti_road(data: Data, split: str) -> Listing:
    """image_2/um_000000.png with gt_image_2/um_road_000000.png, in `root` or its folder `training`.

    KITTI has no public validation set, so the split is ours and fixed; see `KITTI_FIRST_HELD_OUT`. `trainval` is both.
    """
    if split not in ("train", "val", "trainval"):
        raise InputError(f"data: found the split '{split}' of kitti_road; accepted: train, val or trainval")
    root = Path(data.root)
    root = root / "training" if (root / "training").is_dir() else root
    chosen = []
    for stem, path in sorted(_by_stem(root / "image_2").items()):
        category, _, frame = stem.partition("_")
        if category not in KITTI_FIRST_HELD_OUT or not frame.isdecimal():
            continue
        held_out = int(frame) >= KITTI_FIRST_HELD_OUT[category]
        if split == "trainval" or held_out == (split == "val"):
            chosen.append((path, root / "gt_image_2" / f"{category}_road_{frame}.png"))
    if not chosen:
        raise InputError(
            f"{root / 'image_2'}: found no image of the split '{split}'; accepted: um_000000.png and so on"
        )
    return Listing(chosen)


# --- images and masks paired by their names ------------------------------------------------------------------------


def portrait(data: Data, split: str) -> Listing:
    """00001.png with 00001_matte.png, in one folder a split, or in `root` with lists or `data.val_fraction`."""
    return _paired(data, split, images="", masks="", suffix=mask_suffix(data))


def folder(data: Data, split: str) -> Listing:
    """Images in one folder and masks in another, paired by their names; see `_paired`."""
    return _paired(data, split, data.images or "images", data.masks or "masks", mask_suffix(data))


def mask_suffix(data: Data) -> str:
    """What a mask's name has after its image's, before its type, where they are paired by their names."""
    return "_matte" if data.name == "portrait" else data.mask_suffix or ""


def _paired(data: Data, split: str, images: str, masks: str, suffix: str) -> Listing:
    """Images and masks of any type, in folders and perhaps subfolders of equal names.

    The split is the share that `data.val_fraction` says, the subfolder of its name in both folders, or the list
    SPLIT.txt in `root` or in `root`/splits, whose lines are names or paths with or without their type.
    """
    root = Path(data.root)
    keys = "data.root, data.images and data.masks" if data.name == "folder" else "data.root"
    places = [_folder(root / name.replace("{split}", split), f"check {keys}") for name in (images, masks)]
    per_split = "{split}" in images
    if data.val_fraction is None and not per_split:
        below = [(place / split).is_dir() for place in places]
        if below == [True, False]:
            raise InputError(
                f"{places[1] / split}: no such folder, but {places[0] / split} is one; give masks the same subfolders, "
                f'or set data.images="{images}/{{split}}" if they need none'
            )
        if all(below):
            places, per_split = [place / split for place in places], True
    oddities: list[str] = []
    found, labels = (_tree(place, oddities) for place in places)
    if places[0] == places[1]:
        if not suffix:
            raise InputError(f"data.masks: found {places[1]}, as in data.images; set data.mask_suffix, such as _mask")
        found = {stem: path for stem, path in found.items() if not stem.endswith(suffix)}
    labels = {stem.removesuffix(suffix): path for stem, path in labels.items() if stem.endswith(suffix)}
    oddities += [
        f"{labels[stem]}: no image has this mask's name; add the image or remove the mask"
        for stem in sorted(labels.keys() - found.keys())
    ]
    if not found:
        raise InputError(f"{places[0]}: found no images; accepted: any type that Pillow reads; check {keys}")
    stems = sorted(found)
    if data.val_fraction is not None:
        stems = _share(stems, data, split)
    elif not per_split:
        stems = _listed(root, split, found)
    ending = f"{suffix}.png"
    return Listing(
        [
            (found.get(stem, places[0] / f"{stem}.png"), labels.get(stem, places[1] / f"{stem}{ending}"))
            for stem in stems
        ],
        tuple(dict.fromkeys(oddities)),
    )


def _share(stems: list[str], data: Data, split: str) -> list[str]:
    """Chosen by a hash of the name: a new image moves no other one from one split to the other, or very few."""
    if split not in (data.train, data.val):
        raise InputError(
            f"data: found the split '{split}' with data.val_fraction; accepted: those of data.train and data.val"
        )
    order = sorted(stems, key=lambda stem: hashlib.blake2b(stem.encode()).digest())
    count = min(max(1, round(data.val_fraction * len(stems))), len(stems) - 1)
    return sorted(order[:count] if split == data.val else order[count:])


def _listed(root: Path, split: str, found: dict[str, Path]) -> list[str]:
    lists = root / "splits" if (root / "splits").is_dir() else root
    if not (lists / f"{split}.txt").exists():
        raise InputError(
            f"data: found no split '{split}' in {root}: no subfolder of that name, and no list "
            f"{lists / f'{split}.txt'}; add one of them, or set data.val_fraction=0.2"
        )
    by_name: dict[str, list[str]] = {}
    for stem in found:
        by_name.setdefault(Path(stem).name, []).append(stem)

    def candidates(entry: str) -> Iterator[str]:
        """The entry, what is left of it without its first folders, and the only image of its name."""
        parts = _without_suffix(entry).strip("/").split("/")
        yield from (stem for first in range(len(parts)) if (stem := "/".join(parts[first:])) in found)
        yield from by_name.get(parts[-1], []) if len(by_name.get(parts[-1], [])) == 1 else ()

    stems = []
    for line in _read_lines(lists / f"{split}.txt"):
        # A name may hold spaces; a line may also hold two paths, of the image and of the mask.
        known = (stem for entry in (line, line.split()[0]) for stem in candidates(entry))
        stems.append(next(known, _without_suffix(line).lstrip("/")))
    return stems


def _tree(place: Path, oddities: list[str]) -> dict[str, Path]:
    """Every image below a folder, by its path there without the type."""
    files: dict[str, Path] = {}
    clutter: list[Path] = []
    for path in walk_images(place, left_out=clutter):
        stem = _without_suffix(path.relative_to(place).as_posix())
        if stem in files:
            oddities.append(f"{path}: has the name of {files[stem].name}, which is used; remove or rename one of them")
        files.setdefault(stem, path)
    oddities += [f"{path}: left out with all that is in it, because another program made it" for path in clutter]
    return files


# --- files and lists -----------------------------------------------------------------------------------------------


def _read_list(folder: Path, split: str) -> list[list[str]]:
    path = folder / f"{split}.txt"
    if not path.exists():
        found = sorted(file.stem for file in folder.glob("*.txt")) if folder.is_dir() else []
        known = (
            f"found the splits {', '.join(found)}"
            if found
            else "found no split lists there; is data.root the right folder?"
        )
        raise InputError(f"{path}: no such list, so there is no split '{split}'; {known}")
    return [line.split() for line in _read_lines(path)]


def _read_lines(path: Path) -> list[str]:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{path}: cannot be read ({error}); a split's list is a text file with one ID a line"
        ) from None
    if not lines:
        raise InputError(f"{path}: the list is empty; accepted: one ID a line")
    outside = next((line for line in lines if ".." in re.split(r"[/\\\s]", line)), None)
    if outside:
        raise InputError(f"{path}: found '{outside}', which leaves the data set's folder; accepted: names inside it")
    return lines


def _folder(path: Path, remedy: str = "is data.root the right one, and the archive unpacked completely?") -> Path:
    if not path.is_dir():
        raise InputError(f"{path}: no such folder; {remedy}")
    return path


def _subfolders(path: Path) -> str:
    return f"found {', '.join(sorted(name for name in os.listdir(path) if (path / name).is_dir())) or 'none'}"


def _by_stem(folder: Path) -> dict[str, Path]:
    # Where one image is there in two formats, the later type wins, whatever the file system's order.
    names = sorted(filter(is_image, os.listdir(_folder(folder))), key=lambda name: (Path(name).suffix.lower(), name))
    return {_stem(name): folder / name for name in names}


def _stem(name: str) -> str:
    return _without_suffix(Path(name).name)


def _without_suffix(name: str) -> str:
    """A name without its image type; a dot elsewhere in it is part of it."""
    return name[: -len(Path(name).suffix)] if is_image(name) else name


# --- what the masks mean -------------------------------------------------------------------------------------------


def _folder_format(data: Data) -> tuple[Classes, MaskFormat]:
    assert data.classes is not None
    names = data.classes
    if data.values is None:
        classes = Classes(names, voc_palette(len(names)))
        return classes, masks.index_format(classes)
    meaning = pixel_classes(names, data.values)
    numbers, colours = meaning.numbers, meaning.colours
    # A class is drawn in its first colour in the masks.
    first = {label: colour for colour, label in reversed(colours.items())}
    palette = tuple(first.get(label, colour) for label, colour in enumerate(voc_palette(len(names))))
    other = masks.NO_CLASS if meaning.rest is None else meaning.rest
    return Classes(names, palette), masks.mapping(numbers, colours, other)


def _fixed(classes: Classes, mask_format: MaskFormat) -> Callable[[Data], tuple[Classes, MaskFormat]]:
    return lambda data: (classes, mask_format)


_CITYSCAPES_VALUES = dict.fromkeys(range(34), IGNORE_INDEX) | CITYSCAPES_IDS
_KITTI_COLOURS = {KITTI_ROAD_IGNORED: IGNORE_INDEX} | {colour: i for i, colour in enumerate(KITTI_ROAD.palette)}

LAYOUTS: dict[str, tuple[Callable[[Data, str], Listing], Callable[[Data], tuple[Classes, MaskFormat]]]] = {
    "voc": (voc, _fixed(VOC, masks.index_format(VOC))),
    "shapes": (voc, _fixed(SHAPES, masks.index_format(SHAPES))),
    "camvid": (camvid, _fixed(CAMVID, masks.index_format(CAMVID, ignored=(CAMVID_UNLABELLED,)))),
    "cityscapes": (cityscapes, _fixed(CITYSCAPES, masks.mapping(_CITYSCAPES_VALUES, {}))),
    "kitti_road": (kitti_road, _fixed(KITTI_ROAD, masks.mapping({}, _KITTI_COLOURS))),
    "portrait": (portrait, lambda data: (PORTRAIT, MaskFormat(threshold=data.threshold or 0))),
    "folder": (folder, _folder_format),
}
"""`data.name` → (function that lists a split, function that returns classes and mask format)."""


def missing_files(pairs: Iterable[tuple[Path, Path]]) -> list[Path]:
    """From one listing a folder: a stat per file takes minutes on a slow file server."""
    present: dict[Path, set[str]] = {}
    missing = []
    for path in (path for pair in pairs for path in pair):
        if path.parent not in present:
            present[path.parent] = set(os.listdir(path.parent)) if path.parent.is_dir() else set()
        if path.name not in present[path.parent]:
            missing.append(path)
    return missing
