"""LinkNet.

Chaurasia, Culurciello 2017, "LinkNet: Exploiting Encoder Representations for Efficient Semantic Segmentation", with
the ResNet-18 encoder of the paper.

Shapes, sizes rounded up: stem (N, 64, H/4, W/4), encoders (N, 64·2^k, H/(4·2^k), W/(4·2^k)), k = 0..3; each decoder
returns the shape that its encoder took in, and the skip is added there.
"""

from __future__ import annotations

import torch
from torch import nn
from torchvision.models import resnet18

from fcn.models.layers import init_he


def linknet(num_classes: int) -> nn.Module:
    """LinkNet with a ResNet-18 encoder."""
    return LinkNet(num_classes)


class LinkNet(nn.Module):
    """ResNet-18 down, four decoders with added skips up, and the paper's head; see `linknet`."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        trunk = resnet18(weights=None)
        self.stem = nn.Sequential(trunk.conv1, trunk.bn1, trunk.relu, trunk.maxpool)
        self.encoders = nn.ModuleList([trunk.layer1, trunk.layer2, trunk.layer3, trunk.layer4])
        self.decoders = nn.ModuleList(
            [Decoder(512, 256, 2), Decoder(256, 128, 2), Decoder(128, 64, 2), Decoder(64, 64, 1)]
        )
        self.head_up = nn.ConvTranspose2d(64, 32, 3, stride=2, padding=1, bias=False)
        self.head_bn1 = nn.BatchNorm2d(32)
        self.head_conv = nn.Conv2d(32, 32, 3, padding=1, bias=False)
        self.head_bn2 = nn.BatchNorm2d(32)
        self.classifier = nn.ConvTranspose2d(32, num_classes, 2, stride=2)
        self.relu = nn.ReLU(inplace=True)
        init_he(self)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """images (N, 3, H, W) float → logits (N, C, H, W)."""
        height, width = images.shape[-2:]
        inputs = [self.stem(images)]  # (N, 64, ⌈H/4⌉, ⌈W/4⌉)
        for encoder in self.encoders:
            inputs.append(encoder(inputs[-1]))
        x = inputs.pop()  # (N, 512, ⌈H/32⌉, ⌈W/32⌉)
        for level, decoder in enumerate(self.decoders):
            skip = inputs.pop()
            x = decoder(x, skip.shape[-2:])
            if (
                level < 3
            ):  # the paper links encoder outputs; the stem's is the input of the first encoder and has no link
                x = x + skip
        x = self.relu(self.head_bn1(self.head_up(x, output_size=((height + 1) // 2, (width + 1) // 2))))
        x = self.relu(self.head_bn2(self.head_conv(x)))
        return self.classifier(x)[..., :height, :width]  # 2·⌈H/2⌉ is H or H + 1


class Decoder(nn.Module):
    """1×1 to a quarter of the channels, 3×3 transposed with `stride`, 1×1 to the channels of the encoder's input."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        middle = before // 4
        self.squeeze = nn.Sequential(
            nn.Conv2d(before, middle, 1, bias=False), nn.BatchNorm2d(middle), nn.ReLU(inplace=True)
        )
        self.up = nn.ConvTranspose2d(middle, middle, 3, stride=stride, padding=1, bias=False)
        self.up_bn = nn.Sequential(nn.BatchNorm2d(middle), nn.ReLU(inplace=True))
        self.expand = nn.Sequential(
            nn.Conv2d(middle, after, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU(inplace=True)
        )

    def forward(self, x: torch.Tensor, size: torch.Size) -> torch.Tensor:
        """x (N, before, h, w) → (N, after, *size)."""
        return self.expand(self.up_bn(self.up(self.squeeze(x), output_size=size)))
