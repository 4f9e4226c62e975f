"""LinkNet.

Chaurasia, Culurciello 2017, "LinkNet: Exploiting Encoder Representations for Efficient Semantic Segmentation".

Shapes, sizes rounded up: stem (N, 64, H/4, W/4), encoders (N, 64·2^k, …), k = 0..3, each at half the size of the one
before (except that ResNet-18's first keeps the stem's); each decoder returns the shape that its encoder took in, and
the skip is added there.
"""

from __future__ import annotations

import itertools

import torch
from torch import nn

from fcn.models.layers import DoublingConv2d, ResNetTrunk, crop, init_he

CHANNELS = (64, 64, 128, 256, 512)
"""Of the stem and the four encoders."""


def linknet(num_classes: int, encoder: str = "resnet18") -> nn.Module:
    """LinkNet with one of two encoders.

    Args:
        num_classes: channels of the logits.
        encoder: "resnet18" is the one of the paper's results, and takes ImageNet weights. "plain" is the paper's
            figure 2 to the letter: every encoder halves the size, by a strided 3×3 convolution with a strided 3×3
            shortcut beside the first pair, and every convolution has a bias; 12 952 610 parameters for 2 classes.

    Raises:
        ValueError: another encoder.
    """
    if encoder not in ("resnet18", "plain"):
        raise ValueError(f"unknown encoder {encoder!r}; known: resnet18, plain")
    return LinkNet(num_classes, encoder == "plain")


class LinkNet(nn.Module):
    """An encoder down, four decoders with added skips up, and the paper's head; see `linknet`."""

    def __init__(self, num_classes: int, plain: bool) -> None:
        super().__init__()
        self.encoder = PlainEncoder() if plain else ResNetTrunk.of("resnet18")
        first_stride = 2 if plain else 1
        self.decoders = nn.ModuleList(
            Decoder(before, after, stride, bias=plain)
            for before, after, stride in zip(CHANNELS[:0:-1], CHANNELS[-2::-1], (2, 2, 2, first_stride), strict=True)
        )
        self.head_up = DoublingConv2d(64, 32, bias=plain)
        self.head_bn1 = nn.BatchNorm2d(32)
        self.head_conv = nn.Conv2d(32, 32, 3, padding=1, bias=plain)
        self.head_bn2 = nn.BatchNorm2d(32)
        self.classifier = nn.ConvTranspose2d(32, num_classes, 2, stride=2)
        self.relu = nn.ReLU(inplace=True)
        init_he(self)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """images (N, 3, H, W) float → logits (N, C, H, W)."""
        height, width = images.shape[-2:]
        stem, *skips, x = self.encoder(images)
        *linked, last = self.decoders
        for decoder, skip in zip(linked, reversed(skips), strict=True):
            x = decoder(x, skip.shape[-2:]) + skip
        x = last(x, stem.shape[-2:])  # the paper links encoders' outputs, but not the stem's
        x = self.relu(self.head_bn1(self.head_up(x, ((height + 1) // 2, (width + 1) // 2))))
        x = self.relu(self.head_bn2(self.head_conv(x)))
        return crop(self.classifier(x), (height, width))  # 2·⌈H/2⌉ is H or H + 1


class PlainEncoder(nn.Module):
    """The paper's stem and four encoders without ResNet's details; the same interface as `ResNetTrunk`."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            *_conv_bn(nn.Conv2d(3, 64, 7, stride=2, padding=3)), nn.MaxPool2d(3, stride=2, padding=1)
        )
        self.encoders = nn.ModuleList(
            nn.Sequential(ResidualBlock(before, after, 2), ResidualBlock(after, after, 1))
            for before, after in itertools.pairwise(CHANNELS)
        )

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        """images (N, 3, H, W) → [stem, encoder 1, …, encoder 4], at 1/4 … 1/64 of the size, rounded up."""
        features = [self.stem(images)]
        for encoder in self.encoders:
            features.append(encoder(features[-1]))
        return features


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions beside a shortcut, which is a 3×3 convolution where the block has a stride."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *_conv_bn(nn.Conv2d(before, after, 3, stride=stride, padding=1)),
            nn.Conv2d(after, after, 3, padding=1),
            nn.BatchNorm2d(after),
        )
        self.shortcut = nn.Sequential()
        if stride > 1:
            self.shortcut = nn.Sequential(nn.Conv2d(before, after, 3, stride=stride, padding=1), nn.BatchNorm2d(after))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.relu(self.body(x) + self.shortcut(x))


class Decoder(nn.Module):
    """1×1 to a quarter of the channels, 3×3 transposed with `stride`, 1×1 to the channels of the encoder's input."""

    def __init__(self, before: int, after: int, stride: int, bias: bool) -> None:
        super().__init__()
        middle = before // 4
        self.squeeze = nn.Sequential(*_conv_bn(nn.Conv2d(before, middle, 1, bias=bias)))
        if stride == 2:
            self.up = DoublingConv2d(middle, middle, bias=bias)
        else:
            self.up = nn.ConvTranspose2d(middle, middle, 3, padding=1, bias=bias)
        self.up_bn = nn.Sequential(nn.BatchNorm2d(middle), nn.ReLU(inplace=True))
        self.expand = nn.Sequential(*_conv_bn(nn.Conv2d(middle, after, 1, bias=bias)))

    def forward(self, x: torch.Tensor, size: torch.Size) -> torch.Tensor:
        """x (N, before, h, w) → (N, after, *size)."""
        return self.expand(self.up_bn(self.up(self.squeeze(x), size)))


def _conv_bn(convolution: nn.Conv2d) -> tuple[nn.Module, ...]:
    return convolution, nn.BatchNorm2d(convolution.out_channels), nn.ReLU(inplace=True)
