"""Fully convolutional networks on VGG16.

Shelhamer, Long, Darrell 2017, "Fully Convolutional Networks for Semantic Segmentation" (FCN-32s, -16s, -8s), after the
layers of the reference code's `voc-fcn*` networks; Simonyan, Zisserman 2015 for VGG16. `fcn8_kitti` is the variant that
many road-segmentation projects use on KITTI.

Shapes, with w = `width` (64 in VGG16) and, in layout `same`, sizes rounded up: pool k (N, w·min(2^(k-1), 8), H/2^k,
W/2^k), k = 1..5; fc6 and fc7 (N, 64·w, H/32, W/32). In layout `classic` the padding adds about 6 to the sides of fc7.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import nn

from fcn.models.layers import HalvingMaxPool, bilinear_upsampling, crop, init_he

STAGES = ((1, 2), (2, 2), (4, 3), (8, 3), (8, 3))
"""Per stage of VGG16: channels in units of the width, and the number of 3×3 convolutions before the pool."""


def fcn32s(num_classes: int, layout: str = "classic", dropout: float = 0.5, width: int = 64) -> nn.Module:
    """FCN-32s: the scores of fc7, upsampled 32× at once. Arguments as in `fcn8s`."""
    return FCNVGG(num_classes, 32, layout, dropout, width)


def fcn16s(num_classes: int, layout: str = "classic", dropout: float = 0.5, width: int = 64) -> nn.Module:
    """FCN-16s: the scores of fc7 and pool4 added, upsampled 16×. Arguments as in `fcn8s`."""
    return FCNVGG(num_classes, 16, layout, dropout, width)


def fcn8s(num_classes: int, layout: str = "classic", dropout: float = 0.5, width: int = 64) -> nn.Module:
    """FCN-8s: the scores of fc7, pool4 and pool3 added, upsampled 8×. 134 489 759 parameters for 21 classes.

    Args:
        num_classes: channels of the logits.
        layout: "classic" pads the image by 100 and crops by 5, 9 and 31, as the reference code does; "same" pads
            fc6 by 3 instead, which keeps every layer's receptive field and aligns all strides at the top left. At
            512×512 and 21 classes they cost 190.4 and 111.3 billion multiply-adds. The weights fit both.
        dropout: rate of channel dropout after fc6 and fc7. In training it is keyed by sample, so that it does not
            depend on the number of processes.
        width: channels of the first stage; 64 is VGG16, and what pretrained weights need.

    Raises:
        ValueError: another layout.
    """
    return FCNVGG(num_classes, 8, layout, dropout, width)


def fcn8_kitti(num_classes: int, dropout: float = 0.5, width: int = 64) -> nn.Module:
    """FCN-8 whose decoder has the depth of the skips: 136 514 116 parameters for 2 classes.

    fc7 is scored, upsampled to pool4's 512 channels, added, to pool3's 256, added, and 8× up to the classes.

    Args:
        num_classes: channels of the logits.
        dropout: rate of dropout, of single elements, after fc6 and fc7; keyed as in `fcn8s`.
        width: as in `fcn8s`.
    """
    return FCN8KITTI(num_classes, dropout, width)


class VGGTrunk(nn.Module):
    """VGG16 with ceil-mode pools, and its first two fully connected layers as convolutions."""

    def __init__(self, width: int, dropout: nn.Module, image_padding: int, fc6_padding: int) -> None:
        super().__init__()
        channels, stages = 3, []
        for number, (multiple, convolutions) in enumerate(STAGES, start=1):
            layers: OrderedDict[str, nn.Module] = OrderedDict()
            for place in range(1, convolutions + 1):
                padding = image_padding if (number, place) == (1, 1) else 1
                layers[f"conv{number}_{place}"] = nn.Conv2d(channels, multiple * width, 3, padding=padding)
                layers[f"relu{number}_{place}"] = nn.ReLU(inplace=True)
                channels = multiple * width
            layers[f"pool{number}"] = HalvingMaxPool()
            stages.append(nn.Sequential(layers))
        self.stages = nn.ModuleList(stages)
        self.fc6 = nn.Conv2d(channels, 64 * width, 7, padding=fc6_padding)
        self.fc7 = nn.Conv2d(64 * width, 64 * width, 1)
        self.relu = nn.ReLU(inplace=True)
        self.dropout6, self.dropout7 = dropout, type(dropout)(dropout.p)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """images (N, 3, H, W) → (pool3, pool4, fc7)."""
        x, pools = images, []
        for stage in self.stages:
            x = stage(x)
            pools.append(x)
        x = self.dropout6(self.relu(self.fc6(x)))
        x = self.dropout7(self.relu(self.fc7(x)))
        return pools[2], pools[3], x


class FCNVGG(nn.Module):
    """FCN-32s, -16s and -8s, told apart by `stride`; see `fcn8s`."""

    def __init__(self, num_classes: int, stride: int, layout: str, dropout: float, width: int) -> None:
        super().__init__()
        if layout not in ("classic", "same"):
            raise ValueError(f"unknown layout {layout!r}; known: classic, same")
        self.classic = layout == "classic"
        image_padding, fc6_padding = (100, 0) if self.classic else (1, 3)
        self.trunk = VGGTrunk(width, nn.Dropout2d(dropout), image_padding, fc6_padding)
        init_he(self.trunk)
        self.score_fr = _score(64 * width, num_classes)
        self.score_pool4 = _score(8 * width, num_classes) if stride <= 16 else None
        self.score_pool3 = _score(4 * width, num_classes) if stride == 8 else None
        self.upscore_fr = self._upscore(num_classes, 2) if stride <= 16 else None
        self.upscore_pool4 = self._upscore(num_classes, 2) if stride == 8 else None
        self.upscore = self._upscore(num_classes, stride)
        self.crop = {32: 19, 16: 27, 8: 31}[stride] if self.classic else 0

    def _upscore(self, num_classes: int, factor: int) -> nn.ConvTranspose2d:
        return bilinear_upsampling(num_classes, factor, padding=0 if self.classic else factor // 2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """images (N, 3, H, W) float → logits (N, C, H, W)."""
        pool3, pool4, fc7 = self.trunk(images)
        x = self.score_fr(fc7)
        if self.score_pool4 is not None:
            x = self._fuse(self.upscore_fr(x), self.score_pool4(pool4), 5)
        if self.score_pool3 is not None:
            x = self._fuse(self.upscore_pool4(x), self.score_pool3(pool3), 9)
        return crop(self.upscore(x), images.shape[-2:], self.crop)

    def _fuse(self, scores: torch.Tensor, skip: torch.Tensor, offset: int) -> torch.Tensor:
        """The padding of 100 makes the skip the larger one, rounding up in `same` the upsampled scores."""
        if self.classic:
            return scores + crop(skip, scores.shape[-2:], offset)
        return crop(scores, skip.shape[-2:]) + skip


class FCN8KITTI(nn.Module):
    """See `fcn8_kitti`."""

    def __init__(self, num_classes: int, dropout: float, width: int) -> None:
        super().__init__()
        self.trunk = VGGTrunk(width, nn.Dropout(dropout), image_padding=1, fc6_padding=3)
        init_he(self.trunk)
        self.score_fr = nn.Conv2d(64 * width, num_classes, 1)
        self.up_pool4 = nn.ConvTranspose2d(num_classes, 8 * width, 4, stride=2, padding=1)
        self.up_pool3 = nn.ConvTranspose2d(8 * width, 4 * width, 4, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(4 * width, num_classes, 16, stride=8, padding=4)
        for layer in (self.score_fr, self.up_pool4, self.up_pool3, self.up):
            nn.init.trunc_normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """images (N, 3, H, W) float → logits (N, C, H, W)."""
        pool3, pool4, fc7 = self.trunk(images)
        x = crop(self.up_pool4(self.score_fr(fc7)), pool4.shape[-2:]) + pool4
        x = crop(self.up_pool3(x), pool3.shape[-2:]) + pool3
        return crop(self.up(x), images.shape[-2:])


def _score(channels: int, num_classes: int) -> nn.Conv2d:
    """A 1×1 convolution to the classes that starts at zero, so that the skips add nothing at first."""
    layer = nn.Conv2d(channels, num_classes, 1)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
