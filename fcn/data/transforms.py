"""From a decoded pair to arrays of the training size, and from uint8 batches to the network's input.

Joint transforms draw all their numbers from one generator keyed by (seed, epoch, index), so a sample is the same in any
process or worker.
"""

from __future__ import annotations

import functools
import math
import random
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import nn

from fcn.config import IMAGENET_MEAN, IMAGENET_STD

SHORT_SIDE = 520
"""Short side of the preset short520, in pixels."""


class Plan(NamedTuple):
    """What a training transform does to a sample: resize, crop, flip. It depends only on the sample's size."""

    height: int
    """Size of the result, at most the crop's."""
    width: int
    top: int
    """Position of the result in the resized image."""
    left: int
    step: Fraction
    """Pixels of the source per pixel of the resized image."""
    flip: bool


class TrainTransform:
    """Random resize, random crop, random horizontal flip, random colours.

    An image that is smaller than the crop keeps its size; the collate pads it.

    Args:
        crop: height and width.
        scale: range of the resize factor; see `resize_factors`.
        hflip: probability of a flip.
        jitter: largest change of brightness, contrast, saturation and hue, as in torchvision's ColorJitter.
    """

    def __init__(
        self,
        crop: tuple[int, int] | None,
        scale: tuple[float, float] | None,
        hflip: float,
        jitter: tuple[float, float, float, float] | None = None,
    ) -> None:
        self.crop, self.scale, self.hflip, self.jitter = crop, scale, hflip, jitter
        self._factors = resize_factors(*scale) if scale else [Fraction(1)]

    def plan(self, size: tuple[int, int], rng: random.Random) -> Plan:
        """Draw the plan for an image of `size` (height, width)."""
        factor = self._factors[int(rng.random() * len(self._factors))]
        up, down = factor.numerator, factor.denominator
        if min(size) * up < down:  # a side must not vanish
            up, down = 1, min(size)
        full_height, full_width = (side * up // down for side in size)
        height, width = full_height, full_width
        if self.crop:
            height, width = min(full_height, self.crop[0]), min(full_width, self.crop[1])
        top = int(rng.random() * (full_height - height + 1))
        left = int(rng.random() * (full_width - width + 1))
        return Plan(height, width, top, left, Fraction(down, up), rng.random() < self.hflip)

    def window(
        self, image: Image.Image | np.ndarray, labels: Image.Image | np.ndarray, rng: random.Random
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The same sample without the resize of its image, which `resize_windows` does for a batch on the device.

        Returns:
            the pixels that the resize needs (H, W, 3) uint8, labels (h, w) uint8, and where they go: (2, 5) float64, of
            rows and of columns (begin, step, pixels of the source, pixels of the result, 1 if they are flipped), where
            pixel i of the result is centred `begin` + (i + 1/2) · `step` into the source.
        """
        pixels = np.asarray(image)
        plan = self.plan(pixels.shape[:2], rng)
        spans, grid = [], []
        for axis, (start, length) in enumerate(((plan.top, plan.height), (plan.left, plan.width))):
            first, end, _ = source_span(start, length, pixels.shape[axis], plan.step)
            spans.append(slice(first, end))
            begin, flipped = start * plan.step - first, axis == 1 and plan.flip
            grid.append([float(begin), float(plan.step), end - first, length, flipped])
        return pixels[tuple(spans)], resize_labels(np.asarray(labels), plan), np.array(grid, np.float64)

    def __call__(
        self, image: Image.Image | np.ndarray, labels: Image.Image | np.ndarray, rng: random.Random
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns image (h, w, 3) uint8 and labels (h, w) uint8."""
        pixels = np.asarray(image)
        plan = self.plan(pixels.shape[:2], rng)
        pixels = resize(pixels, plan)
        if self.jitter:
            pixels = np.asarray(self._recolour(Image.fromarray(pixels), rng))
        if plan.flip:  # PyTorch's flip is ten times as fast as NumPy's copy
            pixels = torch.from_numpy(pixels if pixels.flags.writeable else pixels.copy()).flip(1).numpy()
        return pixels, resize_labels(np.asarray(labels), plan)

    def _recolour(self, image: Image.Image, rng: random.Random) -> Image.Image:
        """Apply colour changes in random order, as torchvision does. All numbers are always drawn, so that none
        depends on which are used."""
        from torchvision.transforms import functional  # it takes as long to import as PyTorch

        order = sorted(range(4), key=[rng.random() for _ in range(4)].__getitem__)
        draws = [2 * rng.random() - 1 for _ in range(4)]
        for place in order:
            change = self.jitter[place] * draws[place]
            if change:
                adjust = getattr(functional, f"adjust_{JITTERED[place]}")
                image = adjust(image, change if place == 3 else 1 + change)
        return image


JITTERED = ("brightness", "contrast", "saturation", "hue")


@functools.cache
def resize_factors(low: float, high: float) -> list[Fraction]:
    """The factors of a random resize: multiples of 1/32 from `low` to `high`, or else the simplest fraction near their
    middle.

    With a small denominator, every few pixels of the resized image begin where a pixel of the source does. So a part of
    it can be computed from a part of the source.
    """
    multiples = range(math.ceil(low * 32), math.floor(high * 32) + 1)
    return [Fraction(m, 32) for m in multiples] or [Fraction((low + high) / 2).limit_denominator(32)]


def resize(pixels: np.ndarray, plan: Plan) -> np.ndarray:
    """Compute the part of the resized image that the plan keeps, and little else.

    Args:
        pixels: (H, W, 3) uint8.

    Returns:
        (height, width, 3) uint8, equal to that part of an antialiased bilinear resize of the whole image.
    """
    if plan.step == 1:
        return pixels[plan.top : plan.top + plan.height, plan.left : plan.left + plan.width]
    top, bottom, above = source_span(plan.top, plan.height, pixels.shape[0], plan.step)
    left, right, before = source_span(plan.left, plan.width, pixels.shape[1], plan.step)
    window = np.require(pixels[top:bottom, left:right], requirements=["C", "W"])
    planes = torch.from_numpy(window)[None].permute(0, 3, 1, 2)  # seen as channels-last
    # The size of the result is rounded down. A slightly larger factor keeps its last pixel.
    factor = float(1 / plan.step) * (1 + 1e-12)
    resized = nn.functional.interpolate(planes, scale_factor=factor, mode="bilinear", antialias=True)
    rows, columns = slice(above, above + plan.height), slice(before, before + plan.width)
    return resized[0, :, rows, columns].permute(1, 2, 0).numpy()


def source_span(start: int, length: int, size: int, step: Fraction) -> tuple[int, int, int]:
    """Along one side: the pixels [first, end) of the source that the pixels [start, start + length) of the result need.

    Returns:
        (first, end, how many pixels of a result that begins at `first` come before `start`).
    """
    up, down = step.numerator, step.denominator  # integers, because fractions are slow
    reach = max(up, down)  # of the filter to both sides, in parts of 1 / down of a pixel
    begin = max(0, start - -(-reach // up)) // down * down
    end = min(size, -(-((start + length) * up + reach) // down))
    return begin * up // down, end, start - begin


def resize_labels(labels: np.ndarray, plan: Plan) -> np.ndarray:
    """(H, W) uint8 → (height, width) uint8: the nearest label of the source, flipped if planned."""
    rows, columns = label_places(plan, labels.shape[:2])
    window = labels[
        rows[0] : rows[-1] + 1
    ]  # rows are copied whole, so the fewer of them have columns picked the better
    if len(window) > len(rows):
        return labels.take(rows, 0).take(columns, 1)
    return window.take(columns, 1).take(rows - rows[0], 0)


def label_places(plan: Plan, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """The rows and columns of a source of `size` (height, width) from which labels are taken."""
    up, down = plan.step.numerator, 2 * plan.step.denominator
    rows = np.minimum((2 * np.arange(plan.top, plan.top + plan.height) + 1) * up // down, size[0] - 1)
    columns = np.minimum((2 * np.arange(plan.left, plan.left + plan.width) + 1) * up // down, size[1] - 1)
    return rows, columns[::-1] if plan.flip else columns


WEIGHT_BITS = 14
"""Weights of the resize on the device are multiples of 2^-14. Then every sum of weighted pixels is an integer below
2^22, which float32 represents exactly, so a result does not depend on the order of the sum, the batch or the device."""


def resize_windows(windows: torch.Tensor, grids: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Resize, flip and pad a batch on its device, each image by its own factor: an antialiased bilinear filter.

    Equal to `resize` to one grey level; columns first, then rows, rounded to 8 bits after each.

    Args:
        windows: (N, H, W, 3) uint8, each image at the top left, with any values around it.
        grids: (N, 2, 5) float64, see `TrainTransform.window`.
        size: height and width of the result.

    Returns:
        (N, height, width, 3) uint8, 0 around each image.
    """
    planes = windows.permute(0, 3, 1, 2).float()
    rows, columns = (_weights(grids[:, side], size[side], windows.shape[1 + side])[:, None].float() for side in (0, 1))
    planes = _round_off(planes @ columns.transpose(2, 3))
    return _round_off(rows @ planes).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def _weights(sides: torch.Tensor, length: int, size: int) -> torch.Tensor:
    """(N, length, size) float64: the weight, times 2^14, of each pixel of the source in each pixel of the result."""
    begin, step, pixels, results, flipped = (column[:, None] for column in sides.unbind(1))
    places = torch.arange(length, device=sides.device, dtype=torch.float64)[None]
    inside = places < results
    places = torch.where(flipped > 0, results - 1 - places, places)
    centres = begin + (places + 0.5) * step
    source = torch.arange(size, device=sides.device, dtype=torch.float64)
    reach = step.clamp(min=1)[..., None]
    weights = (1 - (source + 0.5 - centres[..., None]).abs() / reach).clamp(min=0)
    weights = weights * (source < pixels[..., None]) * inside[..., None]
    return (weights / weights.sum(2, keepdim=True).clamp(min=1e-9) * (1 << WEIGHT_BITS)).round()


def _round_off(sums: torch.Tensor) -> torch.Tensor:
    return ((sums + (1 << (WEIGHT_BITS - 1))) / (1 << WEIGHT_BITS)).floor().clamp(max=255)


class EvalTransform:
    """Chooses what of a sample is scored.

    Args:
        preset: native (all of it), short520 (all of it, resized to a short side of 520 pixels), or center_crop.
        crop: height and width for center_crop.

    Reference for short520: torchvision's references/segmentation/presets.py, `SegmentationPresetEval` on Pillow images.
    """

    def __init__(self, preset: str = "native", crop: tuple[int, int] | None = None) -> None:
        self.preset, self.crop = preset, crop

    def __call__(self, image: Image.Image, labels: Image.Image) -> tuple[Image.Image, Image.Image]:
        """Returns image and labels of equal size."""
        if self.preset == "short520":
            from torchvision.transforms import functional

            image = functional.resize(image, [SHORT_SIDE], functional.InterpolationMode.BILINEAR)
            labels = functional.resize(labels, [SHORT_SIDE], functional.InterpolationMode.NEAREST)
        elif self.preset == "center_crop":
            height, width = (min(sides) for sides in zip(self.crop, (image.height, image.width), strict=True))
            left, top = (image.width - width) // 2, (image.height - height) // 2
            box = (left, top, left + width, top + height)
            image, labels = image.crop(box), labels.crop(box)
        return image, labels


@functools.cache
def _statistics(
    mean: tuple[float, float, float], std: tuple[float, float, float], dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation in grey levels 0..255; cached, because the copy to a GPU makes the host wait."""
    average, deviation = (torch.tensor(value, dtype=dtype, device=device) * 255 for value in (mean, std))
    return average, deviation


def to_input(
    images: torch.Tensor,
    sizes: torch.Tensor | None,
    dtype: torch.dtype,
    channels_last: bool,
    mean: tuple[float, float, float] = IMAGENET_MEAN,
    std: tuple[float, float, float] = IMAGENET_STD,
) -> torch.Tensor:
    """Normalise a batch on its device, (image / 255 - mean) / std; padding becomes exactly 0.

    Args:
        images: (N, H, W, 3) uint8, the valid part of each at its top left.
        sizes: (N, 2) int64 height and width of the valid parts; None if nothing is padded.
        dtype: of the result.
        channels_last: memory format of the result.
        mean: of red, green and blue, 0 to 1.
        std: likewise, the standard deviation.

    Returns:
        (N, 3, H, W) of `dtype`.
    """
    average, deviation = _statistics(mean, std, dtype, images.device)
    result = (images.to(dtype) - average) / deviation
    if sizes is not None:
        rows = torch.arange(images.shape[1], device=images.device)
        columns = torch.arange(images.shape[2], device=images.device)
        inside = (rows < sizes[:, :1])[:, :, None] & (columns < sizes[:, 1:])[:, None, :]
        result = result * inside[..., None]
    # NHWC data seen as NCHW is the channels-last format already.
    result = result.permute(0, 3, 1, 2)
    return result if channels_last else result.contiguous()
