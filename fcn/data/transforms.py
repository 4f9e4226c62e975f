"""From a decoded pair to arrays of the training size, and from uint8 batches to the network's input.

Joint transforms choose all their numbers from one generator keyed by (seed, epoch, index), so a sample looks the same
whichever process or worker makes it.
"""

from __future__ import annotations

import functools
import random
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import functional

from fcn.config import IMAGENET_MEAN, IMAGENET_STD

SHORT_SIDE = 520
"""Of the preset short520, in pixels."""


class Plan(NamedTuple):
    """What a training transform does to one sample, decided from its size alone."""

    height: int
    """Size of the result, at most the crop's."""
    width: int
    box: tuple[float, float, float, float]
    """The part of the source that becomes the result: left, top, right, bottom in source pixels."""
    flip: bool


class TrainTransform:
    """Random resize, random crop, random horizontal flip, random colours.

    An image smaller than the crop stays as it is; the collate pads it.

    Args:
        crop: height and width.
        scale: range of the resize factor.
        hflip: probability of a flip.
        jitter: largest change of brightness, contrast, saturation and hue, as torchvision's ColorJitter takes them.
    """

    def __init__(
        self,
        crop: tuple[int, int] | None,
        scale: tuple[float, float] | None,
        hflip: float,
        jitter: tuple[float, float, float, float] | None = None,
    ) -> None:
        self.crop, self.scale, self.hflip, self.jitter = crop, scale, hflip, jitter

    def plan(self, size: tuple[int, int], rng: random.Random) -> Plan:
        """Choose everything for an image of `size` (height, width)."""
        low, high = self.scale or (1.0, 1.0)
        scale = low + (high - low) * rng.random()
        full_height, full_width = (max(1, round(side * scale)) for side in size)
        height, width = full_height, full_width
        if self.crop:
            height, width = min(full_height, self.crop[0]), min(full_width, self.crop[1])
        top = int(rng.random() * (full_height - height + 1))
        left = int(rng.random() * (full_width - width + 1))
        per_row, per_column = size[0] / full_height, size[1] / full_width
        box = (left * per_column, top * per_row, (left + width) * per_column, (top + height) * per_row)
        # The last crop position must not reach past the source by a rounding error: Pillow refuses such a box.
        box = (box[0], box[1], min(box[2], size[1]), min(box[3], size[0]))
        return Plan(height, width, box, rng.random() < self.hflip)

    def __call__(self, image: Image.Image, labels: Image.Image, rng: random.Random) -> tuple[np.ndarray, np.ndarray]:
        """Returns image (h, w, 3) uint8 and labels (h, w) uint8."""
        plan = self.plan((image.height, image.width), rng)
        resampled = resample(image, plan, Image.Resampling.BILINEAR)
        pixels = np.asarray(self._recolour(resampled, rng) if self.jitter else resampled)
        classes = np.asarray(resample(labels, plan, Image.Resampling.NEAREST))
        return (pixels[:, ::-1], classes[:, ::-1]) if plan.flip else (pixels, classes)

    def _recolour(self, image: Image.Image, rng: random.Random) -> Image.Image:
        """In random order, as torchvision does; every number is drawn, so that none depends on which are used."""
        order = sorted(range(4), key=[rng.random() for _ in range(4)].__getitem__)
        draws = [2 * rng.random() - 1 for _ in range(4)]
        for place in order:
            change = self.jitter[place] * draws[place]
            if change:
                image = _ADJUST[place](image, change if place == 3 else 1 + change)
        return image


_ADJUST = (
    functional.adjust_brightness, functional.adjust_contrast, functional.adjust_saturation, functional.adjust_hue,
)  # fmt: skip


def resample(image: Image.Image, plan: Plan, how: Image.Resampling) -> Image.Image:
    """Only the pixels that the crop keeps are computed."""
    size = (plan.width, plan.height)
    if plan.box == (0, 0, *image.size) and size == image.size:
        return image
    if (plan.box[2] - plan.box[0], plan.box[3] - plan.box[1]) == size:
        return image.crop(tuple(map(round, plan.box)))
    return image.resize(size, how, box=plan.box)


class EvalTransform:
    """What of a sample is scored.

    Args:
        preset: native (all of it), short520 (all of it, resized to a short side of 520 pixels), or center_crop.
        crop: height and width for center_crop.

    Reference for short520: torchvision's references/segmentation/presets.py, `SegmentationPresetEval` on Pillow images.
    """

    def __init__(self, preset: str = "native", crop: tuple[int, int] | None = None) -> None:
        self.preset, self.crop = preset, crop

    def __call__(self, image: Image.Image, labels: Image.Image) -> tuple[Image.Image, Image.Image]:
        """Image and labels of one size again."""
        if self.preset == "short520":
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
    """Mean and deviation in grey levels 0..255; made once, because the copy to a GPU waits for it."""
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
