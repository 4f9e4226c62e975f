"""Classes: names, palettes, and the ignore index."""

from __future__ import annotations

from dataclasses import dataclass

RGB = tuple[int, int, int]

IGNORE_INDEX = 255
"""Label that means "no class here" in every data set once it is read."""


@dataclass(frozen=True, slots=True)
class Classes:
    """The classes of a data set: `names[i]` is drawn in `palette[i]` (RGB, 0 to 255)."""

    names: tuple[str, ...]
    palette: tuple[RGB, ...]

    def __post_init__(self) -> None:
        assert len(self.names) == len(self.palette)

    def __len__(self) -> int:
        return len(self.names)


def voc_palette(n: int) -> tuple[RGB, ...]:
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

# Order and colours of the 19 classes that are scored; keys are the ids in *_labelIds.png, all others are ignored.
# Reference: cityscapesScripts, helpers/labels.py.
_CITYSCAPES: dict[int, tuple[str, RGB]] = {
    7: ("road", (128, 64, 128)),
    8: ("sidewalk", (244, 35, 232)),
    11: ("building", (70, 70, 70)),
    12: ("wall", (102, 102, 156)),
    13: ("fence", (190, 153, 153)),
    17: ("pole", (153, 153, 153)),
    19: ("traffic light", (250, 170, 30)),
    20: ("traffic sign", (220, 220, 0)),
    21: ("vegetation", (107, 142, 35)),
    22: ("terrain", (152, 251, 152)),
    23: ("sky", (70, 130, 180)),
    24: ("person", (220, 20, 60)),
    25: ("rider", (255, 0, 0)),
    26: ("car", (0, 0, 142)),
    27: ("truck", (0, 0, 70)),
    28: ("bus", (0, 60, 100)),
    31: ("train", (0, 80, 100)),
    32: ("motorcycle", (0, 0, 230)),
    33: ("bicycle", (119, 11, 32)),
}
CITYSCAPES = Classes(*zip(*_CITYSCAPES.values(), strict=True))
CITYSCAPES_IDS = {label_id: label for label, label_id in enumerate(_CITYSCAPES)}
"""Label id → class; the ids from 0 to 33 that are missing here are ignored."""

KITTI_ROAD = Classes(("not road", "road"), ((255, 0, 0), (255, 0, 255)))
KITTI_ROAD_IGNORED = (0, 0, 0)

PORTRAIT = Classes(("background", "person"), ((0, 0, 0), (192, 128, 128)))
