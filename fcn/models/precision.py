"""Numeric precision: types, autocast, memory format, and the way of images into the network."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fcn.config import IMAGENET_MEAN, IMAGENET_STD, Config
from fcn.data import to_input

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


@dataclass(frozen=True, slots=True)
class Precision:
    """How the forward pass computes: type, memory format, normalisation."""

    name: str
    """fp32, bf16, fp16 or fp64."""
    channels_last: bool
    device: torch.device
    mean: tuple[float, float, float] = IMAGENET_MEAN
    """Mean of red, green and blue, 0 to 1, for normalisation."""
    std: tuple[float, float, float] = IMAGENET_STD
    one_by_one: bool = False
    """Whether images to be scored go through the network one at a time on a GPU, too; see `evaluation.infer`."""

    @classmethod
    def of(cls, config: Config, device: torch.device) -> Precision:
        train, data = config.train, config.data
        return cls(train.precision, train.channels_last, device, data.mean, data.std, train.shards is not None)

    @property
    def input_dtype(self) -> torch.dtype:
        return torch.float64 if self.name == "fp64" else torch.float32

    def to_input(self, images: torch.Tensor, sizes: torch.Tensor | None = None) -> torch.Tensor:
        """images (N, H, W, 3) uint8 on the device → the network's input (N, 3, H, W); `sizes` as in `to_input`."""
        return to_input(images, sizes, self.input_dtype, self.channels_last, self.mean, self.std)

    @property
    def layout(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def autocast(self) -> Any:
        if self.name in ("bf16", "fp16"):
            return torch.autocast(self.device.type, DTYPES[self.name])
        return nullcontext()

    def scaler(self) -> torch.amp.GradScaler:
        """A gradient scaler, because fp16 gradients underflow. With other precisions it does nothing."""
        return torch.amp.GradScaler(self.device.type, enabled=self.name == "fp16")

    def place(self, model: nn.Module) -> nn.Module:
        """Move a model to the device, type and memory format, in place."""
        model.to(self.device, self.input_dtype, memory_format=self.layout)
        for parameter in model.parameters():
            if parameter.ndim == 4:  # `to` keeps the strides of 1×1 kernels, but DistributedDataParallel compares them
                parameter.data = torch.empty_like(parameter, memory_format=self.layout).copy_(parameter.data)
        return model
