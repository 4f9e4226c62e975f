"""Data sets: they read image and labels of one sample at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image

from fcn.config import Data, call_by_path
from fcn.data import masks
from fcn.data.images import ON_ITS_SIDE, decode, open_image, orientation, read_pixels, size_of, to_rgb, upright
from fcn.data.labels import IGNORE_INDEX, Classes, voc_palette
from fcn.data.layouts import LAYOUTS, Listing, missing_files
from fcn.data.masks import MaskFormat
from fcn.errors import InputError


class SegmentationDataset(Protocol):
    """A split of a data set."""

    classes: Classes

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """The name of a sample in messages and pictures."""
        ...

    def size(self, index: int) -> tuple[int, int]:
        """(height, width) of a sample, from the header of its file if possible."""
        ...

    def read(self, index: int) -> tuple[Image.Image, Image.Image]:
        """The image as 8-bit RGB, and the labels as an 8-bit image of class indices, 255 = ignore, of equal size.

        Raises:
            InputError: a file is unreadable, the sizes differ, or a label is no class.
        """
        ...


@dataclass(slots=True)
class PairDataset:
    """Images and the masks that label them, as files.

    Args:
        pairs: (image file, mask file) of every sample, in the order of the split's list.
        classes: names and palette.
        format: the meaning of the masks' pixels.
        exif: turn images and masks as their EXIF orientations say.
    """

    pairs: Sequence[tuple[Path, Path]]
    classes: Classes
    format: MaskFormat
    exif: bool = True
    _sizes: dict[int, tuple[int, int]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.pairs)

    def name(self, index: int) -> str:
        return self.pairs[index][0].stem

    def size(self, index: int) -> tuple[int, int]:
        """From the mask's header."""
        if index not in self._sizes:
            with open_image(self.pairs[index][1]) as mask:
                self._sizes[index] = size_of(mask, self.exif)[::-1]
        return self._sizes[index]

    def read(self, index: int) -> tuple[Image.Image, Image.Image]:
        pixels, labels = self.read_arrays(index)
        return Image.fromarray(pixels), Image.fromarray(labels)

    def read_arrays(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Like `read`, but as arrays (H, W, 3) and (H, W) uint8, with fewer copies."""
        image_path, mask_path = self.pairs[index]
        pixels = read_pixels(image_path, self.exif)
        mask = decode(mask_path, self.exif)
        check_sizes(image_path, (pixels.shape[1], pixels.shape[0]), mask_path, mask.size, self.exif)
        return pixels, self.format.decode(mask, mask_path)


def check_sizes(
    image_path: Path, image: tuple[int, int], mask_path: Path, mask: tuple[int, int], exif: bool = True
) -> None:
    """Raise InputError if an image and its mask differ in (width, height); `exif` says how they were read."""
    if image == mask:
        return
    cause, remedy = "", "export the mask again at the image's size"
    if image == mask[::-1]:
        with open_image(image_path) as opened:
            sideways = orientation(opened) in ON_ITS_SIDE
        if sideways and exif:
            cause = " after it was turned by its EXIF orientation"
            remedy = "if masks were drawn on the pixels as stored, set data.exif_orientation=false"
        elif sideways:
            cause = " without its EXIF orientation"
            remedy = "if masks were drawn on the upright image, set data.exif_orientation=true"
    raise InputError(
        f"{mask_path}: found a mask of {mask[0]}x{mask[1]} pixels for the image {image_path.name} of "
        f"{image[0]}x{image[1]}{cause}; accepted: equal sizes; {remedy}"
    )


class OwnDataset:
    """A user's own data set: anything with a length whose items are (image, mask).

    Images may be Pillow images, arrays (H, W, 3) or (H, W), or tensors (3, H, W), of uint8. Masks may be Pillow images,
    arrays or tensors (H, W) of class indices, 255 = ignore. Pillow images are turned by EXIF as files are. Optional are
    the attributes `classes`, a list of names, and `palette`, a list of (red, green, blue), and the methods
    `size(index)` and `name(index)`. Without `size` every sample is read once to learn it.
    """

    def __init__(self, samples: Any, data: Data) -> None:
        self.samples, self.path, self.exif = samples, data.name, data.exif_orientation
        names = data.classes or getattr(samples, "classes", None)
        if not (isinstance(names, list | tuple) and names and all(isinstance(name, str) for name in names)):
            raise InputError(
                f"data.classes: missing, and {data.name} has no attribute `classes`, a list of names; add either"
            )
        palette = getattr(samples, "palette", None)
        palette = voc_palette(len(names)) if palette is None else palette
        if len(palette) < len(names):
            raise InputError(f"data.name: {data.name} has {len(palette)} colours in `palette` for {len(names)} classes")
        self.classes = Classes(tuple(names), tuple(tuple(int(x) for x in colour) for colour in palette[: len(names)]))
        self.format = masks.index_format(self.classes)
        self._sizes: dict[int, tuple[int, int]] = {}

    def __len__(self) -> int:
        return len(self.samples)

    def name(self, index: int) -> str:
        own = getattr(self.samples, "name", None)
        return str(own(index)) if callable(own) else f"{index:06d}"

    def size(self, index: int) -> tuple[int, int]:
        if index not in self._sizes:
            own = getattr(self.samples, "size", None)
            height, width = own(index) if callable(own) else self.read(index)[0].size[::-1]
            self._sizes[index] = int(height), int(width)
        return self._sizes[index]

    def read(self, index: int) -> tuple[Image.Image, Image.Image]:
        source = f"sample {index} of {self.path}"
        try:
            item = self.samples[index]
            for part in item if isinstance(item, tuple | list) else ():
                if isinstance(part, Image.Image):  # Pillow reads the pixels lazily
                    part.load()
        except OSError as error:  # Pillow, too, raises OSError for a broken file
            raise InputError(f"{source}: cannot be read ({error}); copy its file again or remove it") from None
        if not isinstance(item, tuple | list) or len(item) != 2:
            raise InputError(f"{source}: found {type(item).__name__}; accepted: a pair (image, mask)")
        image, mask = (
            _as_image(part, f"the {what} of {source}", self.exif) for what, part in zip(("image", "mask"), item)
        )
        image = to_rgb(image, f"the image of {source}")
        if image.size != mask.size:
            raise InputError(
                f"{source}: found a mask of {mask.width}x{mask.height} pixels for an image of "
                f"{image.width}x{image.height}; accepted: equal sizes"
            )
        known = self._sizes.get(index, (image.height, image.width))
        if known != (image.height, image.width):
            raise InputError(
                f"{source}: size({index}) said {known}, and the image is {(image.height, image.width)}; "
                f"accepted: its (height, width)"
            )
        return image, Image.fromarray(self.format.decode(mask, f"the mask of {source}"))


def _as_image(value: Any, source: str, exif: bool) -> Image.Image:
    if isinstance(value, Image.Image):
        return upright(value) if exif else value
    array = value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
    if isinstance(value, torch.Tensor) and array.ndim == 3:
        array = array.transpose(1, 2, 0)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if array.ndim == 2 and array.dtype.kind in "iub" and array.dtype != np.uint8:
        small = array.astype(np.int64)
        if small.min(initial=0) >= 0 and small.max(initial=0) <= 255:
            array = small.astype(np.uint8)
        else:
            array = small.astype(np.int32)
    good = array.dtype in (np.uint8, np.int32) and (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4)))
    if not good or array.size == 0:
        raise InputError(
            f"{source}: found {array.dtype} of shape {tuple(array.shape)}; accepted: a Pillow image, an array "
            f"(H, W, 3) or (H, W), or a tensor (3, H, W) or (H, W), of whole numbers from 0 to 255"
        )
    return Image.fromarray(np.ascontiguousarray(array))


def classes_and_format(data: Data) -> tuple[Classes, MaskFormat]:
    """The classes of a data set in files and the meaning of its masks, without reading a file."""
    return LAYOUTS[data.name][1](data)


def list_split(data: Data, split: str) -> Listing:
    """The files of a split, whether they exist or not.

    Raises:
        InputError: the folder or the split's list is missing or unreadable.
    """
    if not Path(data.root).is_dir():
        hint = (
            f"; write it with: python -m fcn.data.shapes {data.root}"
            if data.name == "shapes"
            else "; set data.root to the data set's folder"
        )
        raise InputError(f"data.root: {data.root}: no such folder{hint}")
    return LAYOUTS[data.name][0](data, split)


def build_dataset(
    data: Data, split: str, ignore_index: int = IGNORE_INDEX, pairs: Sequence[tuple[Path, Path]] | None = None
) -> SegmentationDataset:
    """Open a split of a data set.

    Args:
        ignore_index: a further label value to ignore; it is read as 255.
        pairs: the wanted files of the split, if not all of them; these are not checked for existence.

    Raises:
        InputError: the folder, the split's list or its files are missing, or `data.num_classes` is not the number of
            classes.
    """
    dataset: PairDataset | OwnDataset
    if data.name in LAYOUTS:
        if pairs is None:
            pairs = list_split(data, split).pairs
            missing = missing_files(pairs)
            if missing:
                more = f" (and {len(missing) - 1} more files of this split)" if len(missing) > 1 else ""
                raise InputError(
                    f"{missing[0]}: no such file{more}, but the split '{split}' needs it; add it, or take the image out"
                )
        dataset = PairDataset(pairs, *classes_and_format(data), data.exif_orientation)
    else:
        arguments = {"root": data.root, "split": split}
        try:
            own = call_by_path("data", data.name, "a data set of (image, mask)", arguments, data.options or {})
        except OSError as error:
            raise InputError(f"data.root: {data.name} could not open {data.root}, split '{split}' ({error})") from None
        if not (hasattr(own, "__getitem__") and hasattr(own, "__len__")):
            raise InputError(
                f"data.name: {data.name} returned {type(own).__name__}; accepted: a map-style data set, which has a "
                f"length and items (image, mask)"
            )
        dataset = OwnDataset(own, data)
    if not len(dataset):
        raise InputError(f"data: the split '{split}' of {data.name} is empty; accepted: one image or more")
    check_num_classes(data, dataset.classes)
    dataset.format = dataset.format.ignoring(ignore_index, len(dataset.classes))
    return dataset


def check_num_classes(data: Data, classes: Classes) -> None:
    """Raise InputError if `data.num_classes` is not the data set's number of classes."""
    found = len(classes)
    if data.num_classes not in (None, found):
        raise InputError(
            f"data.num_classes: found {data.num_classes}, but {data.name} has {found} classes "
            f"({', '.join(classes.names)}); set data.num_classes={found} or null"
        )
