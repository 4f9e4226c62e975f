"""Read image files as RGB pixels; a broken file gets one line."""

from __future__ import annotations

import contextlib
import functools
import os
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from fcn.errors import InputError, OutOfMemory

DEEP = {"I", "I;16", "I;16B", "I;16L", "I;16N"}
"""Pillow's modes of one channel with more than 8 bits."""


@functools.cache
def formats() -> tuple[str, ...]:
    """Pillow's names of the formats that are read: all but EPS, for which it would start Ghostscript."""
    Image.init()
    return tuple(name for name in Image.ID if name != "EPS")


@functools.cache
def suffixes() -> frozenset[str]:
    """Suffixes, such as ".png", of every image type that is read."""
    return frozenset(suffix for suffix, kind in Image.registered_extensions().items() if kind in formats())


def is_image(name: str) -> bool:
    return Path(name).suffix.lower() in suffixes() and not Path(name).name.startswith(".")


CLUTTER = ("@eaDir", "__MACOSX")
"""Folders of copies or thumbnails that file servers and archive programs leave, beside those with a dot in front."""


def walk_images(folder: Path, visited: Iterable[str] = (), left_out: list[Path] | None = None) -> Iterator[Path]:
    """Every image below a folder, a folder's images sorted by name; without hidden files, hidden folders and clutter.

    Args:
        visited: real paths of folders to stay out of. A link back to a folder above it is not followed, either.
        left_out: gets the folders that are clutter.
    """
    seen = set(visited)
    for parent, below, names in os.walk(folder, followlinks=True):
        seen.add(os.path.realpath(parent))
        clutter = [Path(parent, name) for name in below if name in CLUTTER]
        if left_out is not None:
            left_out += clutter
        below[:] = sorted(
            name
            for name in below
            if not (name.startswith(".") or name in CLUTTER or os.path.realpath(Path(parent, name)) in seen)
        )
        yield from (Path(parent, name) for name in sorted(filter(is_image, names)))


def read_pixels(path: Path, exif: bool = True) -> np.ndarray:
    """Read the first frame of an image file as RGB (H, W, 3) uint8.

    Grey becomes three equal channels, 16 bits become 8 (v · 255 / 65535, rounded), and an alpha channel is dropped.

    Args:
        exif: turn the image as its EXIF orientation says.

    Raises:
        InputError: the file is unreadable or broken, or its pixels have no fixed range.
    """
    with fits_memory(path), open_image(path) as image:
        pixels = _decode_jpeg(image, exif)
        return np.asarray(to_rgb(_load(image, path, exif), path)) if pixels is None else pixels


def _decode_jpeg(image: Image.Image, exif: bool = True) -> np.ndarray | None:
    """Decode a colour JPEG that was just opened and is not to be turned; None for anything else, or if anything is
    wrong.

    The bits are Pillow's: simplejpeg uses the same library more directly.
    """
    if image.format != "JPEG" or image.mode != "RGB" or (exif and orientation(image) != 1):
        return None
    try:
        import simplejpeg
    except ImportError:  # Pillow gives the same bits, more slowly
        return None
    image.fp.seek(0)
    try:
        return simplejpeg.decode_jpeg(image.fp.read(), "RGB")
    except ValueError:
        return None


def to_rgb(image: Image.Image, source: object) -> Image.Image:
    """See `read_pixels`; `source` names the image in messages."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about transparency in palettes, which is dropped
        try:
            if image.mode in DEEP:
                return Image.fromarray(_to_8_bits(np.asarray(image), source)).convert("RGB")
            if image.mode == "F":
                raise ValueError("floating-point pixels have no fixed range")
            return image if image.mode == "RGB" else image.convert("RGB")
        except ValueError as error:
            raise InputError(
                f"{source}: found an image in mode {image.mode} ({error}); accepted: 8 or 16 bits a channel; convert it"
            ) from None


TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
"""EXIF orientation → the transposition that shows the image upright."""
TILE_WIDTH, TILE_LENGTH = 0x0142, 0x0143
"""Tags of a TIFF."""
ON_ITS_SIDE = (5, 6, 7, 8)
"""EXIF orientations that swap height and width."""


def orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8, or 1 if it is missing or damaged, or if Pillow has turned the image already.

    Decodes no pixels, except those of a PNG with metadata behind them.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            exif = image.getexif() if _has_late_metadata(image) else Image.Image.getexif(image)
            found = int(exif.get(0x0112, 1))
        except Exception:  # what Pillow raises depends on the damage
            return 1
    return found if found in TURNS else 1


def _has_late_metadata(image: Image.Image) -> bool:
    """Whether a PNG that was just opened may have its EXIF or XMP behind its pixels."""
    file = getattr(image, "fp", None)
    if image.format != "PNG" or file is None:
        return False
    place = file.tell()
    file.seek(-min(file.seek(0, os.SEEK_END), 1 << 16), os.SEEK_END)
    end = file.read()
    file.seek(place)
    return any(mark in end for mark in (b"eXIf", b"Raw profile type", b"XML:com.adobe.xmp"))


def upright(image: Image.Image) -> Image.Image:
    """Turn an image as its EXIF orientation says. Pillow has already turned a TIFF that it has loaded."""
    return _transposed(image, TURNS.get(orientation(image)))


def _transposed(image: Image.Image, turn: Image.Transpose | None) -> Image.Image:
    if turn is None:
        return image
    turned = image.transpose(turn)
    turned.format = image.format
    return turned


def size_of(image: Image.Image, exif: bool = True) -> tuple[int, int]:
    """(width, height) that an image file which was just opened will have; see `decode`."""
    turns = exif if image.format != "TIFF" else not exif  # Pillow turns TIFFs itself
    return image.size[::-1] if turns and orientation(image) in ON_ITS_SIDE else image.size


def _to_8_bits(deep: np.ndarray, source: object) -> np.ndarray:
    if deep.min() < 0 or deep.max() > 65535:
        raise InputError(
            f"{source}: found pixel values from {deep.min()} to {deep.max()}; accepted: 8 or 16 bits; convert it"
        )
    return ((deep.astype(np.uint32) + 128) // 257).astype(np.uint8)


MOST_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 0)
"""Of an image: where Pillow refuses to open it."""
MOST_BYTES = 8 * MOST_PIXELS
"""Of a file: those of four channels of 16 bits, the most that Pillow reads, without compression."""


@contextlib.contextmanager
def fits_memory(source: object) -> Iterator[None]:
    """Turn a lack of memory into an OutOfMemory."""
    try:
        yield
    except MemoryError:
        raise OutOfMemory(f"{source}: does not fit into memory; cut it into tiles, or lower data.workers") from None


def open_image(path: Path) -> Image.Image:
    """Open a file and read its header: format, mode, size.

    Raises:
        InputError: the file is missing, unreadable, or no image; or its header claims more than may be decoded.
    """
    try:
        with fits_memory(path), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the size of satellite images, and about damaged EXIF
            size = path.stat().st_size
            if size > MOST_BYTES:  # decoders read as much of it as its headers ask for
                raise InputError(f"{path}: found {size:,} bytes; accepted: up to {MOST_BYTES:,}; cut it into tiles")
            image = Image.open(path, formats=formats())
            tags = image.tag_v2 if image.format == "TIFF" else {}
            if tags.get(TILE_WIDTH, 0) * tags.get(TILE_LENGTH, 0) > MOST_PIXELS:  # Pillow knows the image's size alone
                raise InputError(f"{path}: has tiles of more pixels than {MOST_PIXELS:,}; save it with smaller ones")
            return image
    except InputError:
        raise
    except Exception as error:  # what Pillow raises depends on the damage
        if isinstance(error, Image.DecompressionBombError):
            raise InputError(f"{path}: has more pixels than {MOST_PIXELS:,}; cut it into tiles") from None
        reason = "not an image"
        if not isinstance(error, UnidentifiedImageError):
            reason = getattr(error, "strerror", None) or str(error)
        raise InputError(
            f"{path}: cannot be read ({reason}); accepted: an image file that Pillow reads, such as JPEG, PNG or TIFF; "
            f"copy it again or leave it out"
        ) from None


def decode(path: Path, exif: bool = True) -> Image.Image:
    """Decode the first frame of an image file in the file's own mode.

    Args:
        exif: turn the image as its EXIF orientation says.

    Raises:
        InputError: the file is unreadable or broken.
    """
    with fits_memory(path), open_image(path) as image:
        return _load(image, path, exif)


def _load(image: Image.Image, path: Path, exif: bool) -> Image.Image:
    found = orientation(image)
    if image.format == "TIFF" and found in ON_ITS_SIDE:
        image.filename = ""  # else Pillow maps the file into memory with height and width confused
    try:
        image.load()
    except MemoryError:
        raise
    except Exception as error:  # what a decoder raises on broken data depends on the format and on the damage
        raise InputError(f"{path}: broken image ({error}); copy it again or leave it out") from None
    if image.format == "TIFF":  # Pillow has turned it
        return image if exif else _transposed(image, TURNS.get({6: 8, 8: 6}.get(found, found)))
    return _transposed(image, TURNS.get(found)) if exif else image
