"""U-Net.

Ronneberger, Fischer, Brox 2015, "U-Net: Convolutional Networks for Biomedical Image Segmentation", with padded
convolutions, so that logits have the size of the image.

Shapes, with w = `width` and sizes rounded up: level k of the encoder (N, w·2^k, H/2^k, W/2^k), k = 0..4.
"""

from __future__ import annotations

import torch
from torch import nn

from fcn.models.layers import DoublingConv2d, HalvingMaxPool, init_he

LEVELS = 5


def unet(num_classes: int, width: int = 64, norm: str = "batch") -> nn.Module:
    """The paper's network at `width=64`: 34 513 410 parameters for 2 classes without normalisation.

    Args:
        num_classes: channels of the logits.
        width: channels of the first level; each level doubles them.
        norm: "batch" puts BatchNorm between convolution and ReLU; "none" is the paper's.

    Raises:
        ValueError: another norm.
    """
    if norm not in ("batch", "none"):
        raise ValueError(f"unknown norm {norm!r}; known: batch, none")
    return UNet(num_classes, width, norm)


class UNet(nn.Module):
    """Way down, way up, and a 1×1 classifier; see `unet`."""

    def __init__(self, num_classes: int, width: int, norm: str) -> None:
        super().__init__()
        widths = [width * 2**level for level in range(LEVELS)]
        self.down = nn.ModuleList(
            _double_conv(before, after, norm) for before, after in zip([3, *widths], widths, strict=False)
        )
        self.pool = HalvingMaxPool()
        self.up = nn.ModuleList(
            DoublingConv2d(below, here) for here, below in zip(widths[-2::-1], widths[:0:-1], strict=True)
        )
        self.merge = nn.ModuleList(_double_conv(2 * here, here, norm) for here in widths[-2::-1])
        self.classifier = nn.Conv2d(width, num_classes, 1)
        init_he(self)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """images (N, 3, H, W) float → logits (N, C, H, W)."""
        skips: list[torch.Tensor] = []
        x = images
        for level, block in enumerate(self.down):
            # Rounding up keeps the last row and column of odd sizes, which the way up can then reproduce.
            x = block(self.pool(x) if level else x)  # (N, w·2^k, ⌈H/2^k⌉, ⌈W/2^k⌉)
            skips.append(x)
        skips.pop()
        for up, merge in zip(self.up, self.merge, strict=True):
            skip = skips.pop()
            x = up(x, skip.shape[-2:])
            x = merge(torch.cat([skip, x], dim=1))
        return self.classifier(x)


def _double_conv(before: int, after: int, norm: str) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels in (before, after):
        layers.append(nn.Conv2d(channels, after, 3, padding=1, bias=norm == "none"))
        if norm == "batch":
            layers.append(nn.BatchNorm2d(after))
        layers.append(nn.ReLU(inplace=True))
    return nn.Sequential(*layers)
