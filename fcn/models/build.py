"""The networks. `images (N, 3, H, W) float → logits (N, C, H, W)`, for any H and W from 1 up."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from fcn.models.custom import build_custom
from fcn.models.fcn_resnet import fcn_resnet18, fcn_resnet50, fcn_resnet101
from fcn.models.fcn_vgg import fcn8_kitti, fcn8s, fcn16s, fcn32s
from fcn.models.linknet import linknet
from fcn.models.unet import unet

MODELS = {
    "fcn32s": fcn32s,
    "fcn16s": fcn16s,
    "fcn8s": fcn8s,
    "fcn8_kitti": fcn8_kitti,
    "fcn_resnet18": fcn_resnet18,
    "fcn_resnet50": fcn_resnet50,
    "fcn_resnet101": fcn_resnet101,
    "unet": unet,
    "linknet": linknet,
}


def build_model(name: str, num_classes: int, **options: Any) -> nn.Module:
    """Build a network with fresh weights, drawn from PyTorch's global generator.

    In eval mode it returns logits. In training it may return {"out": logits, "aux": logits} instead.

    Args:
        name: a key of `MODELS`, or `package.module:function` for a network of your own (see `fcn.models.custom`).
        num_classes: channels of the logits.
        options: keyword arguments of that network's function.

    Raises:
        ValueError: unknown name.
        InputError: `package.module:function` cannot be imported or called, or returns no network.
    """
    if ":" in name:
        return build_custom(name, num_classes, options)
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}; known: {', '.join(MODELS)}, or package.module:function")
    return MODELS[name](num_classes, **options)


def shapes_of(name: str, num_classes: int, **options: Any) -> dict[str, torch.Size]:
    """Name → shape of each tensor in the state dict of a network of `MODELS`, without the memory for it.

    Raises:
        ValueError: a tensor is larger than any memory.
    """
    try:
        with torch.device("meta"), _NoValues():
            model = build_model(name, num_classes, **options)
    except (RuntimeError, TypeError) as error:  # how PyTorch reports a size that it cannot count
        raise ValueError(str(error)) from None
    return {key: tensor.shape for key, tensor in model.state_dict().items()}


class _NoValues(TorchFunctionMode):
    """Leave out what fills a tensor in place. On the meta device it has no effect, but its first use takes seconds."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if re.fullmatch(r"\w*[^_]_", getattr(function, "__name__", "")):
            return (*args, *(kwargs or {}).values())[0]
        return function(*args, **(kwargs or {}))
