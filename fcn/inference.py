"""A trained network at work: uint8 images → classes, and how the network comes out of a checkpoint.

Shapes: images (N, H, W, 3) uint8; inputs (N, 3, H, W); logits and scores (N, C, H, W).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from fcn.checkpoint import load_checkpoint
from fcn.config import Config, Eval, config_from_dict
from fcn.data.labels import Classes
from fcn.errors import InputError
from fcn.models import build_model
from fcn.run import Numerics


@dataclass(frozen=True, slots=True)
class Views:
    """What the network sees of an image. Several views are averaged."""

    scales: tuple[float, ...] = (1.0,)
    """Factors by which the image is resized."""
    flip: bool = False
    """The mirror image, too."""
    window: tuple[int, int] | None = None
    """Height and width of the part of a resized image that goes through the network at a time; None: all of it."""

    @classmethod
    def of(cls, settings: Eval) -> Views:
        return cls(settings.scales, settings.flip, settings.window)


WHOLE = Views()
"""The image as it is, once."""


def predict(
    model: nn.Module, images: torch.Tensor, size: tuple[int, int], numerics: Numerics, views: Views = WHOLE
) -> torch.Tensor:
    """images (N, H, W, 3) uint8 on the device → classes (N, *size) int64."""
    return infer(model, images, size, numerics, views).argmax(dim=1)


def infer(
    model: nn.Module, images: torch.Tensor, size: tuple[int, int], numerics: Numerics, views: Views = WHOLE
) -> torch.Tensor:
    """Scores of the classes: the logits, or with several views the mean of their softmax, in float32 or wider.

    On the CPU the images go through one at a time: kernels there choose their algorithm, and so the last bits, by the
    size of the batch, and a batch is no faster than its images. So no score depends on `eval.batch_size`.

    Args:
        model: in evaluation mode.
        images: (N, H, W, 3) uint8 on the device.
        size: height and width of the result.

    Returns:
        (N, C, *size).
    """
    inputs = numerics.to_input(images)
    if inputs.device.type != "cpu":
        return _scores(model, inputs, size, numerics, views)
    return torch.cat([_scores(model, one, size, numerics, views) for one in inputs.split(1)])


def _scores(
    model: nn.Module, inputs: torch.Tensor, size: tuple[int, int], numerics: Numerics, views: Views
) -> torch.Tensor:
    seen = [(scale, mirrored) for scale in views.scales for mirrored in ((False, True) if views.flip else (False,))]
    mean = None
    for scale, mirrored in seen:
        height, width = (max(1, round(side * scale)) for side in inputs.shape[-2:])
        view = _resize(inputs, (height, width), antialias=True)
        logits = _in_windows(model, view.flip(-1) if mirrored else view, numerics, views.window)
        logits = _resize(logits.flip(-1) if mirrored else logits, size)
        if len(seen) == 1:
            return logits
        part = _wide(logits).softmax(dim=1) / len(seen)
        mean = part if mean is None else mean + part
    return mean


def _resize(images: torch.Tensor, size: tuple[int, int], antialias: bool = False) -> torch.Tensor:
    """Bilinear; pixels are areas, so edges stay where they are."""
    if images.shape[-2:] == size:
        return images
    return nn.functional.interpolate(
        _wide(images), size=size, mode="bilinear", align_corners=False, antialias=antialias
    )


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _in_windows(
    model: nn.Module, inputs: torch.Tensor, numerics: Numerics, window: tuple[int, int] | None
) -> torch.Tensor:
    """Logits of inputs that may be larger than the window, averaged where windows overlap."""
    sides = tuple(inputs.shape[-2:])
    height, width = (min(pair) for pair in zip(window or sides, sides, strict=True))
    if (height, width) == sides:
        return _forward(model, inputs, numerics)
    total, count = None, inputs.new_zeros(sides)
    for top in _starts(sides[0], height):
        for left in _starts(sides[1], width):
            place = (..., slice(top, top + height), slice(left, left + width))
            logits = _wide(_forward(model, inputs[place].contiguous(memory_format=numerics.layout), numerics))
            total = logits.new_zeros(*logits.shape[:2], *sides) if total is None else total
            total[place] += logits
            count[place] += 1
    return total / count


def _starts(side: int, window: int) -> list[int]:
    """Where windows begin: every two thirds of their length, the last one as far as it goes."""
    last = side - window
    return [*range(0, last, max(1, window * 2 // 3)), last]


def _forward(model: nn.Module, inputs: torch.Tensor, numerics: Numerics) -> torch.Tensor:
    with numerics.autocast():
        return model(inputs)


@dataclass(frozen=True, slots=True)
class Trained:
    """A network from a checkpoint, on the device and in evaluation mode, and what was saved with it."""

    model: nn.Module
    numerics: Numerics
    config: Config
    classes: Classes
    step: int
    """Finished steps."""


def load_trained(path: str | Path, overrides: list[str], device: torch.device) -> Trained:
    """Build the network of a checkpoint file, or of the newest one of a run directory; the average, if it has one.

    Nothing else is needed: no data set, and no module but that of a network of the user's own.

    Raises:
        InputError: the checkpoint cannot be used, or `overrides` describe another network.
    """
    state = load_checkpoint(path)
    # Nothing is trained, so any number of processes fits the batch size of the training run.
    config = config_from_dict(state["config"], str(path), overrides)
    classes = Classes(tuple(state["classes"]), tuple(tuple(colour) for colour in state["palette"]))
    numerics = Numerics.of(config, device)
    model = numerics.place(build_model(config.model.name, len(classes), **config.model.arguments()))
    try:
        model.load_state_dict(state.get("ema", state["model"]))
    except RuntimeError:
        raise InputError(f"{path}: holds another network than model.* describes; leave those keys as trained") from None
    return Trained(model.eval(), numerics, config, classes, state["step"])
