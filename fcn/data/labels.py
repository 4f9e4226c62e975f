"""Classes: names, palettes, and the ignore index."""

from __future__ import annotations

from dataclasses import dataclass

IGNORE_INDEX = 255
"""Label that means "no class here" in every data set once it is read."""


@dataclass(frozen=True, slots=True)
class Classes:
    """The classes of a data set: `names[i]` is drawn in `palette[i]` (RGB, 0 to 255)."""

    names: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]

    def __post_init__(self) -> None:
        assert len(self.names) == len(self.palette)

    def __len__(self) -> int:
        return len(self.names)


def voc_palette(n: int) -> tuple[tuple[int, int, int], ...]:
    """The first `n` colours of PASCAL VOC: the bits of the index, spread over the high bits of red, green and blue.

    Reference: `VOClabelcolormap.m` in the VOC development kit.
    """
    colours = []
    for index in range(n):
        red = green = blue = 0
        for bit in range(8):
            red |= (index >> (3 * bit) & 1) << (7 - bit)
            green |= (index >> (3 * bit + 1) & 1) << (7 - bit)
            blue |= (index >> (3 * bit + 2) & 1) << (7 - bit)
        colours.append((red, green, blue))
    return tuple(colours)


VOC_NAMES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
VOC = Classes(VOC_NAMES, voc_palette(len(VOC_NAMES)))

SHAPES_NAMES = ("background", "disc", "ring", "square", "triangle", "cross", "leaf")
SHAPES = Classes(SHAPES_NAMES, voc_palette(len(SHAPES_NAMES)))

# Order and colours of the 11-class version by the SegNet authors.
CAMVID = Classes(
    ("sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "bicyclist"),
    (
        (128, 128, 128),
        (128, 0, 0),
        (192, 192, 128),
        (128, 64, 128),
        (60, 40, 222),
        (128, 128, 0),
        (192, 128, 128),
        (64, 64, 128),
        (64, 0, 128),
        (64, 64, 0),
        (0, 128, 192),
    ),
)
CAMVID_UNLABELLED = 11
