"""A trained network at work: from a checkpoint, and from uint8 images to classes.

Shapes: images (N, H, W, 3) uint8; inputs (N, 3, H, W); logits and scores (N, C, H, W).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fcn.checkpoints import load_checkpoint
from fcn.config import Config, Eval, config_from_dict, refuse_foreign_code
from fcn.data import IGNORE_INDEX, Classes
from fcn.errors import InputError
from fcn.models import MODELS, Precision, build_model, shapes_of


@dataclass(frozen=True, slots=True)
class TTA:
    """Test-time augmentation: the network sees an image in several ways, and its scores are averaged."""

    scales: tuple[float, ...] = (1.0,)
    """Factors by which the image is resized."""
    flip: bool = False
    """Add the mirror image."""
    window: tuple[int, int] | None = None
    """Height and width of the window of a resized image that goes through the network at a time; None: all of it."""

    @classmethod
    def of(cls, settings: Eval) -> TTA:
        return cls(settings.scales, settings.flip, settings.window)


WHOLE = TTA()
"""No augmentation: the image as it is."""


def predict(
    model: nn.Module, images: torch.Tensor, size: tuple[int, int], precision: Precision, tta: TTA = WHOLE
) -> torch.Tensor:
    """images (N, H, W, 3) uint8 on the device → classes (N, *size) int64."""
    return infer(model, images, size, precision, tta).argmax(dim=1)


def infer(
    model: nn.Module, images: torch.Tensor, size: tuple[int, int], precision: Precision, tta: TTA = WHOLE
) -> torch.Tensor:
    """Scores of the classes: the logits, or under augmentation the mean of the softmaxes, in float32 or wider.

    On the CPU the images go through one at a time. Kernels there choose their algorithm, and with it the last bits, by
    the batch size, and a batch is no faster than its images. So no score depends on `eval.batch_size`. On a GPU that
    holds with `precision.one_by_one`.

    Args:
        model: in evaluation mode.
        images: (N, H, W, 3) uint8 on the device.
        size: height and width of the result.

    Returns:
        (N, C, *size).
    """
    inputs = precision.to_input(images)
    if inputs.device.type != "cpu" and not precision.one_by_one:
        return _scores(model, inputs, size, precision, tta)
    return torch.cat([_scores(model, one, size, precision, tta) for one in inputs.split(1)])


def _scores(
    model: nn.Module, inputs: torch.Tensor, size: tuple[int, int], precision: Precision, tta: TTA
) -> torch.Tensor:
    seen = [(scale, mirrored) for scale in tta.scales for mirrored in ((False, True) if tta.flip else (False,))]
    mean = None
    for scale, mirrored in seen:
        height, width = (max(1, round(side * scale)) for side in inputs.shape[-2:])
        view = _resize(inputs, (height, width), antialias=True)
        logits = _in_windows(model, view.flip(-1) if mirrored else view, precision, tta.window)
        logits = _resize(logits.flip(-1) if mirrored else logits, size)
        if len(seen) == 1:
            return logits
        part = _wide(logits).softmax(dim=1) / len(seen)
        mean = part if mean is None else mean + part
    return mean


def _resize(images: torch.Tensor, size: tuple[int, int], antialias: bool = False) -> torch.Tensor:
    """Bilinear, with pixels as areas, so that edges stay in place."""
    if images.shape[-2:] == size:
        return images
    return nn.functional.interpolate(
        _wide(images), size=size, mode="bilinear", align_corners=False, antialias=antialias
    )


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _in_windows(
    model: nn.Module, inputs: torch.Tensor, precision: Precision, window: tuple[int, int] | None
) -> torch.Tensor:
    """Logits of inputs that may be larger than the window; overlapping windows are averaged."""
    sides = tuple(inputs.shape[-2:])
    height, width = (min(pair) for pair in zip(window or sides, sides, strict=True))
    if (height, width) == sides:
        return _forward(model, inputs, precision)
    total, count = None, inputs.new_zeros(sides)
    for top in _starts(sides[0], height):
        for left in _starts(sides[1], width):
            place = (..., slice(top, top + height), slice(left, left + width))
            logits = _wide(_forward(model, inputs[place].contiguous(memory_format=precision.layout), precision))
            total = logits.new_zeros(*logits.shape[:2], *sides) if total is None else total
            total[place] += logits
            count[place] += 1
    return total / count


def _starts(side: int, window: int) -> list[int]:
    """Where windows begin: every two thirds of their length, and the last one at the end."""
    last = side - window
    return [*range(0, last, max(1, window * 2 // 3)), last]


def _forward(model: nn.Module, inputs: torch.Tensor, precision: Precision) -> torch.Tensor:
    with precision.autocast():
        return model(inputs)


@dataclass(frozen=True, slots=True)
class Trained:
    """A network from a checkpoint, on the device and in evaluation mode, with what was saved about it."""

    model: nn.Module
    precision: Precision
    config: Config
    classes: Classes
    step: int
    """Finished steps."""


def load_trained(
    path: str | Path, overrides: list[str], device: torch.device, trusted: Sequence[str] = (), with_data: bool = False
) -> Trained:
    """Build the network of a checkpoint file, or of a run directory's newest one, with its averaged weights if any.

    Needs neither the data set nor any module except the one that defines a user's own network.

    Args:
        overrides: KEY=VALUE, from the person at the keyboard.
        trusted: import paths of code that the checkpoint may run; so may what `overrides` name.
        with_data: the data set of the config will be opened, too.

    Raises:
        InputError: the checkpoint cannot be used, asks for other code, or `overrides` describe another network.
    """
    state = load_checkpoint(path)
    if not _holds_a_network(state):
        raise InputError(f"{path}: holds no network with its config and classes; give a file that fcn wrote")
    # Nothing is trained, so the batch size of the training run fits any number of processes.
    config = config_from_dict(state["config"], str(path), overrides)
    named = {"model.name": config.model.name} | ({"data.name": config.data.name} if with_data else {})
    typed = [override.partition("=")[2].strip() for override in overrides]
    refuse_foreign_code(named, str(path), [*trusted, *typed])
    classes = Classes(tuple(state["classes"]), tuple(tuple(colour) for colour in state["palette"]))
    weights = state.get("ema", state["model"])
    name, options = config.model.name, config.model.arguments()
    precision = Precision.of(config, device)
    try:
        if name in MODELS and shapes_of(name, len(classes), **options) != {key: x.shape for key, x in weights.items()}:
            raise ValueError  # before the network takes more memory than the file
        model = precision.place(build_model(name, len(classes), **options))
        model.load_state_dict(weights)
    except (ValueError, RuntimeError):
        raise InputError(f"{path}: holds another network than model.* describes; leave those keys as trained") from None
    return Trained(model.eval(), precision, config, classes, state["step"])


def _holds_a_network(state: Mapping[str, Any]) -> bool:
    """Whether a checkpoint has what `load_trained` needs; only the config is checked elsewhere."""
    weights, names, palette = state.get("ema", state.get("model")), state.get("classes"), state.get("palette")
    return (
        isinstance(state.get("config"), dict)
        and isinstance(weights, dict)
        and all(isinstance(tensor, torch.Tensor) for tensor in weights.values())
        and isinstance(names, list)
        and isinstance(palette, list)
        and 1 <= len(names) == len(palette) <= IGNORE_INDEX
        and all(isinstance(name, str) for name in names)
        and all(isinstance(colour, list) and len(colour) == 3 for colour in palette)
        and all(isinstance(x, int) and 0 <= x <= 255 for colour in palette for x in colour)
        and isinstance(state.get("step"), int)
    )
