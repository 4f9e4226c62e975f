"""The networks. `images (N, 3, H, W) float → logits (N, C, H, W)`, for any H and W from 1 up."""

from __future__ import annotations

from typing import Any

from torch import nn

from fcn.models.linknet import linknet
from fcn.models.unet import unet

MODELS = {"unet": unet, "linknet": linknet}


def build_model(name: str, num_classes: int, **options: Any) -> nn.Module:
    """Build a network with fresh weights, drawn from PyTorch's global generator.

    Args:
        name: a key of `MODELS`.
        num_classes: channels of the logits.
        options: keyword arguments of that network's function.

    Raises:
        ValueError: unknown name.
    """
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}; known: {', '.join(MODELS)}")
    return MODELS[name](num_classes, **options)
