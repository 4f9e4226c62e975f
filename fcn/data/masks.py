"""The meaning of a mask's pixels: class indices, other numbers, colours, or a matte."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image

from fcn.data.images import DEEP, fits_memory
from fcn.data.labels import IGNORE_INDEX, RGB, Classes
from fcn.errors import InputError

NO_CLASS = 254
"""Marks a pixel that its format does not list, while a mask is decoded. So there are at most 254 classes."""


@dataclass(frozen=True, slots=True)
class MaskFormat:
    """Turns the pixels of a mask into labels.

    `values` reads masks with one channel or a palette, `colours` reads masks with colours. If that is empty, or a
    colour is not listed, it tries the other: a palette's colours, or the value of three equal channels. With
    `threshold` every mask is a matte: class 1 where its grey is above the threshold, else class 0.
    """

    values: tuple[tuple[int, int], ...] = ()
    """(pixel value from 0 to 65535, label) pairs."""
    colours: tuple[tuple[RGB, int], ...] = ()
    """(pixel colour, label) pairs."""
    threshold: int | None = None
    """Grey from 0 to 254; of a 16-bit matte, that times 257."""
    other: int = NO_CLASS
    """Label of a value or colour that is not listed."""
    ignored: int = IGNORE_INDEX
    """A further label to ignore."""

    def decode(self, mask: Image.Image, source: object) -> np.ndarray:
        """Labels (H, W) uint8, 255 = ignore.

        Raises:
            InputError: this format does not list a pixel's value; messages call the mask `source`.
        """
        try:
            with fits_memory(source):
                return self._decode(mask, source)
        except InputError as error:
            if mask.format == "JPEG":
                raise InputError(f"{error}; JPEG does not keep labels, export masks as PNG") from None
            raise

    def _decode(self, mask: Image.Image, source: object) -> np.ndarray:
        if self.threshold is not None:
            deep = mask.mode in DEEP
            labels = (np.asarray(mask if deep else mask.convert("L")) > self.threshold * (257 if deep else 1)) * 1
            return self._without_ignored(labels.astype(np.uint8))
        numbers = _numbers(mask) if self.values or mask.mode in DEEP else None
        if numbers is not None and self.values:
            wide = numbers.dtype.itemsize > 2
            places = np.where((numbers < 0) | (numbers > 65535), 65536, numbers) if wide else numbers
            if mask.mode == "1" and 1 not in dict(self.values):  # one bit where the other masks say 0 and 255
                numbers = places = numbers * np.uint8(255)
            ready = _are_labels(places, self.values)
            labels = places if ready else _look_up(_value_table(self.values, self.other), places)
            if mask.mode == "P" and self._palette_disagrees(mask):
                return self._checked(_colour_table(self.colours, NO_CLASS)[_colours(mask)], numbers, source)
            return self._without_ignored(labels) if ready else self._checked(labels, numbers, source)
        if numbers is not None or mask.mode == "F":
            raise self._wrong_mode(mask, source)
        colours = _colours(mask)
        labels = _colour_table(self.colours, NO_CLASS)[colours]
        if self.values and (labels == NO_CLASS).any():
            grey = colours & 255
            if (colours == grey * 0x010101).all():
                return self._checked(_value_table(self.values, self.other)[grey], grey, source)
        if not self.colours:
            raise self._wrong_mode(mask, source)
        return self._checked(np.where(labels == NO_CLASS, np.uint8(self.other), labels), colours, source, True)

    def _palette_disagrees(self, mask: Image.Image) -> bool:
        """Whether every colour in use belongs to a class, but not to the one of its index: a program has reordered
        the palette."""
        palette = bytes(mask.getpalette("RGB") or [])
        if not self.colours or not _may_disagree(palette, self.values, self.colours, self.other):
            return False
        used = np.flatnonzero(mask.histogram())
        meant, indexed = _meanings(palette, self.values, self.colours, self.other)
        if used[-1] >= len(meant):
            return False
        meant, indexed = [meant[i] for i in used], [indexed[i] for i in used]
        return None not in meant and meant != indexed

    def ignoring(self, label: int, classes: int) -> MaskFormat:
        """Also ignore one class, or one pixel value that is no class."""
        if label < classes:
            return replace(self, ignored=label)
        if label == IGNORE_INDEX and self.other != NO_CLASS:
            return self  # what is not listed has a class
        named = {value for value, _ in self.values}
        return (
            replace(self, values=(*self.values, (label, IGNORE_INDEX))) if self.values and label not in named else self
        )

    def _without_ignored(self, labels: np.ndarray) -> np.ndarray:
        return labels if self.ignored == IGNORE_INDEX else np.where(labels == self.ignored, np.uint8(255), labels)

    def _checked(self, labels: np.ndarray, pixels: np.ndarray, source: object, hexadecimal: bool = False) -> np.ndarray:
        wrong = labels == NO_CLASS
        if not wrong.any():
            return self._without_ignored(labels)
        found = [f"#{value:06x}" if hexadecimal else str(value) for value in np.unique(pixels[wrong])]
        shown = ", ".join(found[:8]) + (f" and {len(found) - 8} more" if len(found) > 8 else "")
        what, accepted = (
            ("colour", self._accepted(self.colours)) if hexadecimal else ("label", self._accepted(self.values))
        )
        raise InputError(
            f"{source}: found {what} {shown}; accepted: {accepted}; correct the mask, or data.name or data.values"
        )

    def _wrong_mode(self, mask: Image.Image, source: object) -> InputError:
        accepted = self._accepted(self.values or self.colours)
        return InputError(f"{source}: found a mask in mode {mask.mode}; accepted: {accepted}; export it again as such")

    def _accepted(self, pairs: Iterable[tuple[int | RGB, int]]) -> str:
        classes = [pixel for pixel, label in pairs if label != IGNORE_INDEX]
        ignored = [pixel for pixel, label in pairs if label == IGNORE_INDEX]
        count = len({label for _, label in pairs} - {IGNORE_INDEX})
        return f"{_ranges(classes)} ({count} classes)" + (f" and {_ranges(ignored)} for ignore" if ignored else "")


def index_format(classes: Classes, ignored: Iterable[int] = ()) -> MaskFormat:
    """Class indices, or the classes' colours. 255, the values in `ignored` and VOC's border colour are ignored."""
    ignore = [(value, IGNORE_INDEX) for value in (IGNORE_INDEX, *ignored)]
    colours = {VOC_BORDER: IGNORE_INDEX} | {colour: label for label, colour in enumerate(classes.palette)}
    return MaskFormat((*((label, label) for label in range(len(classes))), *ignore), tuple(colours.items()))


VOC_BORDER = (224, 224, 192)


def mapping(values: Mapping[int, int], colours: Mapping[RGB, int], other: int = NO_CLASS) -> MaskFormat:
    """Numbers and colours as listed; the number 255 is ignored, unless it is listed or `other` covers it."""
    if values and other == NO_CLASS:
        values = {IGNORE_INDEX: IGNORE_INDEX, **values}
    return MaskFormat(tuple(values.items()), tuple(colours.items()), other=other)


@functools.lru_cache(maxsize=4)
def _meanings(
    palette: bytes, values: tuple[tuple[int, int], ...], colours: tuple[tuple[RGB, int], ...], other: int
) -> tuple[list[int | None], list[int]]:
    """For each entry of a palette, the label of its colour (None if no class has it) and the label of its index."""
    table, entries = dict(colours), np.frombuffer(palette, np.uint8).reshape(-1, 3).tolist()
    return [table.get(tuple(colour)) for colour in entries], _value_table(values, other)[: len(entries)].tolist()


@functools.lru_cache(maxsize=4)
def _may_disagree(palette: bytes, *lists: Any) -> bool:
    """Whether the labels of colours and indices can differ."""
    return any(colour not in (None, index) for colour, index in zip(*_meanings(palette, *lists), strict=True))


def _are_labels(places: np.ndarray, values: tuple[tuple[int, int], ...]) -> bool:
    """Whether bytes are already class indices or 255; four times as fast as a lookup."""
    count = _indices_only(values)
    return bool(count and places.dtype == np.uint8 and (places + np.uint8(1)).max() <= count)  # 255 + 1 is 0 in bytes


@functools.lru_cache(maxsize=4)
def _indices_only(values: tuple[tuple[int, int], ...]) -> int:
    """The number of classes if the values are class indices and 255 for ignore; else 0."""
    table = dict(values)
    count = len(table) - 1
    return count if table == {**{label: label for label in range(count)}, IGNORE_INDEX: IGNORE_INDEX} else 0


def _look_up(table: np.ndarray, places: np.ndarray) -> np.ndarray:
    """`table[places]`; for bytes with `bytes.translate`, which is twice as fast."""
    if places.dtype != np.uint8:
        return table[places]
    return np.frombuffer(places.tobytes().translate(table[:256].tobytes()), np.uint8).reshape(places.shape)


def _numbers(mask: Image.Image) -> np.ndarray | None:
    """The numbers (H, W) of a mask with one channel; None if the mask has colours."""
    if mask.mode == "1":
        return np.asarray(mask).astype(np.uint8)
    if mask.mode in ("L", "P"):
        return np.asarray(mask)
    if mask.mode in ("LA", "PA"):
        return np.asarray(mask)[..., 0]
    return np.asarray(mask) if mask.mode in DEEP else None


def _colours(mask: Image.Image) -> np.ndarray:
    """Colours (H, W) as 0xRRGGBB."""
    pixels = np.asarray(mask.convert("RGB"))
    colours = pixels[..., 0].astype(np.uint32)
    for channel in (1, 2):
        colours <<= 8
        colours |= pixels[..., channel]
    return colours


@functools.lru_cache(maxsize=4)
def _value_table(values: tuple[tuple[int, int], ...], other: int) -> np.ndarray:
    """(65537,) uint8; the last entry stands for every number that 16 bits do not hold."""
    table = np.full(65537, other, np.uint8)
    for value, label in values:
        table[value] = label
    return table


@functools.lru_cache(maxsize=2)
def _colour_table(colours: tuple[tuple[RGB, int], ...], other: int) -> np.ndarray:
    """(2^24,) uint8."""
    table = np.full(1 << 24, other, np.uint8)
    for (red, green, blue), label in colours:
        table[red << 16 | green << 8 | blue] = label
    return table


def _ranges(pixels: Iterable[int | RGB]) -> str:
    """0, 1, 2, 7 → "0 to 2, 7"; colours as #rrggbb, at most 32 of them."""
    pixels = list(pixels)
    if pixels and isinstance(pixels[0], tuple):
        shown = ", ".join("#" + bytes(colour).hex() for colour in pixels[:32])
        return shown + (f" and {len(pixels) - 32} more" if len(pixels) > 32 else "")
    runs: list[list[int]] = []
    for value in sorted(set(pixels)):
        if runs and runs[-1][1] == value - 1:
            runs[-1][1] = value
        else:
            runs.append([value, value])
    return ", ".join(str(low) if low == high else f"{low} to {high}" for low, high in runs)
