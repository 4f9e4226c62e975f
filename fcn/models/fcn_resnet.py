"""Fully convolutional networks on ResNets (He et al. 2016).

`fcn_resnet18` is the network of Zhang et al., "Dive into Deep Learning", section 14.11. `fcn_resnet50` and
`fcn_resnet101` are torchvision's: dilated so that layer 4 keeps 1/8 of the size, with a 3×3 head there and an auxiliary
one on layer 3.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from fcn.models.layers import ResNetTrunk, bilinear_upsampling, crop


def fcn_resnet18(num_classes: int) -> nn.Module:
    """ResNet-18, a 1×1 convolution to the classes, and one 64×64 transposed convolution: 12 993 621 for 21 classes."""
    return FCNResNet18(num_classes)


def fcn_resnet50(num_classes: int, aux: bool = True) -> nn.Module:
    """torchvision's `fcn_resnet50`, with its names: 35 322 218 parameters for 21 classes with the auxiliary head.

    Dropout of 0.1 in each head; in training it is keyed by sample, so that it does not depend on the number of
    processes.

    Args:
        num_classes: channels of the logits.
        aux: whether training has a second head, on layer 3; its loss is weighed by `loss.aux_weight`.
    """
    return _dilated("fcn_resnet50", num_classes, aux)


def fcn_resnet101(num_classes: int, aux: bool = True) -> nn.Module:
    """torchvision's `fcn_resnet101`. Arguments and dropout as in `fcn_resnet50`."""
    return _dilated("fcn_resnet101", num_classes, aux)


def _dilated(name: str, num_classes: int, aux: bool) -> nn.Module:
    from torchvision.models import segmentation

    parts = getattr(segmentation, name)(weights=None, weights_backbone=None, num_classes=num_classes, aux_loss=aux)
    return FCNResNet(parts.backbone, parts.classifier, parts.aux_classifier)


class FCNResNet(nn.Module):
    """torchvision's parts under torchvision's names; evaluation leaves out the auxiliary head."""

    def __init__(self, backbone: nn.Module, classifier: nn.Module, aux_classifier: nn.Module | None) -> None:
        super().__init__()
        self.backbone, self.classifier, self.aux_classifier = backbone, classifier, aux_classifier

    def forward(self, images: torch.Tensor) -> torch.Tensor | dict[str, torch.Tensor]:
        """images (N, 3, H, W) float → logits (N, C, H, W), in training with an auxiliary head two as {"out", "aux"}."""
        size = images.shape[-2:]
        features = self.backbone(images)  # "out" (N, 2048, ⌈H/8⌉, ⌈W/8⌉), "aux" (N, 1024, ⌈H/8⌉, ⌈W/8⌉)
        out = _resize(self.classifier(features["out"]), size)
        if self.aux_classifier is None or not self.training:
            return out
        return {"out": out, "aux": _resize(self.aux_classifier(features["aux"]), size)}


class FCNResNet18(nn.Module):
    """See `fcn_resnet18`."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.backbone = ResNetTrunk.of("resnet18")
        self.score = nn.Conv2d(512, num_classes, 1)
        nn.init.xavier_uniform_(self.score.weight)
        nn.init.zeros_(self.score.bias)
        self.upscore = bilinear_upsampling(num_classes, 32, padding=16)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """images (N, 3, H, W) float → logits (N, C, H, W)."""
        x = self.score(self.backbone(images)[-1])  # (N, C, ⌈H/32⌉, ⌈W/32⌉)
        return crop(self.upscore(x), images.shape[-2:])


def _resize(scores: torch.Tensor, size: torch.Size) -> torch.Tensor:
    return F.interpolate(scores, size=size, mode="bilinear", align_corners=False)
