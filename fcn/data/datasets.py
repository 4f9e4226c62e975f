"""Data sets on disk: pairs of an image and a mask, found by layout and read one at a time."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from fcn.data.labels import CAMVID, CAMVID_UNLABELLED, IGNORE_INDEX, SHAPES, VOC, Classes
from fcn.errors import InputError


@dataclass(slots=True)
class PairDataset:
    """A split: images and the masks that label them.

    Args:
        pairs: (image file, mask file) of every sample, in the order of the split's list.
        classes: names and palette.
        ignored: mask values that become `IGNORE_INDEX`, beside 255 itself.
    """

    pairs: Sequence[tuple[Path, Path]]
    classes: Classes
    ignored: Iterable[int] = ()
    _sizes: dict[int, tuple[int, int]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.pairs)

    def name(self, index: int) -> str:
        return self.pairs[index][0].stem

    def size(self, index: int) -> tuple[int, int]:
        """(height, width) of a sample, from the mask's header alone."""
        if index not in self._sizes:
            with _open(self.pairs[index][1]) as mask:
                self._sizes[index] = (mask.height, mask.width)
        return self._sizes[index]

    def read(self, index: int) -> tuple[Image.Image, Image.Image]:
        """The image as RGB and the labels as an 8-bit Pillow image of class indices, 255 = ignore, of equal size.

        Raises:
            InputError: a file is unreadable, the sizes differ, or a label is no class.
        """
        image_path, mask_path = self.pairs[index]
        image = _decode(image_path, "RGB")
        mask = _decode(mask_path, None)
        if mask.mode not in ("P", "L"):
            raise InputError(
                f"{mask_path}: found a mask in mode {mask.mode}; accepted: class indices in 8 bits, palette or grey"
            )
        if image.size != mask.size:
            raise InputError(
                f"{mask_path}: found a mask of {mask.width}x{mask.height} pixels for the image {image_path.name} of "
                f"{image.width}x{image.height}; accepted: equal sizes; export the mask again at the image's size"
            )
        labels = np.asarray(mask)
        for value in self.ignored:
            labels = np.where(labels == value, np.uint8(IGNORE_INDEX), labels)
        wrong = [
            v
            for v in np.flatnonzero(np.bincount(labels.ravel(), minlength=256))
            if len(self.classes) <= v != IGNORE_INDEX
        ]
        if wrong:
            raise InputError(
                f"{mask_path}: found label {', '.join(map(str, wrong))}; accepted: 0 to {len(self.classes) - 1} "
                f"({len(self.classes)} classes) and {IGNORE_INDEX} for ignore; correct the mask or data.name"
            )
        return image, Image.fromarray(labels)


def build_dataset(name: str, root: str, split: str, ignore_index: int = IGNORE_INDEX) -> PairDataset:
    """Open one split of a data set. `ignore_index` is one more label value to ignore; read labels say 255 for it.

    Raises:
        InputError: the folder, the split's list, or files named there are missing.
    """
    folder = Path(root)
    if not folder.is_dir():
        hint = (
            f"; write it with: python -m fcn.data.shapes {root}"
            if name == "shapes"
            else "; set data.root to the data set's folder"
        )
        raise InputError(f"data.root: {root}: no such folder{hint}")
    dataset = DATASETS[name](folder, split)
    dataset.ignored = {*dataset.ignored, ignore_index}
    return dataset


def voc(root: Path, split: str, classes: Classes = VOC) -> PairDataset:
    """PASCAL VOC layout: ImageSets/Segmentation/SPLIT.txt, JPEGImages/ID.jpg, SegmentationClass/ID.png."""
    entries = _read_list(root / "ImageSets" / "Segmentation", split)
    images, masks = root / "JPEGImages", root / "SegmentationClass"
    return _checked([(images / f"{entry}.jpg", masks / f"{entry}.png") for entry, *_ in entries], classes)


def shapes(root: Path, split: str) -> PairDataset:
    """The procedural data set that `python -m fcn.data.shapes` writes, in the VOC layout."""
    return voc(root, split, SHAPES)


def camvid(root: Path, split: str) -> PairDataset:
    """CamVid in the layout of the SegNet tutorial: SPLIT.txt, SPLIT/ID.png and SPLITannot/ID.png; 11 is unlabelled.

    A line of the list is an ID, a file name, or two paths, of the image and of the mask. Only the names count, because
    the public lists hold absolute paths of their authors' machine. Images may be PNG or JPEG.
    """
    entries = _read_list(root, split)
    images, masks = _files_by_stem(root / split), _files_by_stem(root / f"{split}annot")
    pairs = []
    for image, *mask in entries:
        stem = _stem(image)
        mask_stem = _stem(mask[0]) if mask else stem
        missing = Path(f"{stem}.png")
        pairs.append((images.get(stem, root / split / missing), masks.get(mask_stem, root / f"{split}annot" / missing)))
    return _checked(pairs, CAMVID, ignored=(CAMVID_UNLABELLED,))


SUFFIXES = (".jpeg", ".jpg", ".png")
DATASETS = {"shapes": shapes, "camvid": camvid, "voc": voc}


def _read_list(folder: Path, split: str) -> list[list[str]]:
    path = folder / f"{split}.txt"
    try:
        entries = [line.split() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except FileNotFoundError:
        found = sorted(file.stem for file in folder.glob("*.txt")) if folder.is_dir() else []
        known = (
            f"found the splits {', '.join(found)}"
            if found
            else "found no split lists there; is data.root the right folder?"
        )
        raise InputError(f"{path}: no such list, so there is no split '{split}'; {known}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{path}: cannot be read ({error}); a split's list is a text file with one ID a line"
        ) from None
    if not entries:
        raise InputError(f"{path}: the list is empty; accepted: one ID a line")
    return entries


def _files_by_stem(folder: Path) -> Mapping[str, Path]:
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; is data.root the right one, and the archive unpacked completely?")
    # Where one image is there in two formats, the later suffix wins, whatever the file system's order.
    names = sorted(
        os.listdir(folder), key=lambda name: SUFFIXES.index(Path(name).suffix.lower()) if _is_image(name) else -1
    )
    return {_stem(name): folder / name for name in names if _is_image(name)}


def _is_image(name: str) -> bool:
    return Path(name).suffix.lower() in SUFFIXES


def _stem(name: str) -> str:
    """The file name without its folder and image suffix; a dot elsewhere in the name is part of it."""
    return Path(name).stem if _is_image(name) else Path(name).name


def _checked(pairs: list[tuple[Path, Path]], classes: Classes, ignored: Iterable[int] = ()) -> PairDataset:
    """Missing files are found from one listing a folder: a stat per file takes minutes on a slow file server."""
    present = {
        folder: set(os.listdir(folder)) if folder.is_dir() else set()
        for pair in pairs
        for folder in {p.parent for p in pair}
    }
    missing = [path for pair in pairs for path in pair if path.name not in present[path.parent]]
    if missing:
        more = f" (and {len(missing) - 1} more files of this split)" if len(missing) > 1 else ""
        raise InputError(
            f"{missing[0]}: no such file{more}, but the split's list names it; add the file or remove the entry"
        )
    return PairDataset(pairs, classes, ignored)


def _open(path: Path) -> Image.Image:
    try:
        return Image.open(path)
    except (UnidentifiedImageError, OSError) as error:
        reason = "not an image" if isinstance(error, UnidentifiedImageError) else error.strerror or error
        raise InputError(
            f"{path}: cannot be read ({reason}); accepted: JPEG or PNG; copy it again or remove it from the split"
        ) from None


def _decode(path: Path, mode: str | None) -> Image.Image:
    with _open(path) as image, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about transparency in palettes, which labels do not use
        try:
            image.load()
            return image.convert(mode) if mode and image.mode != mode else image
        except (OSError, SyntaxError, ValueError) as error:
            raise InputError(f"{path}: broken image ({error}); copy it again or remove it from the split") from None
