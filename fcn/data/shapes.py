"""The procedural data set `shapes`, written to disk once in the VOC layout.

    python -m fcn.data.shapes data/shapes

Each hue belongs to two forms, and lines and specks of every hue are background: colour narrows a pixel's class down,
and the surroundings decide. A ring's hole is background, too.
"""

from __future__ import annotations

import colorsys
import math
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from fcn.arguments import Parser
from fcn.data.labels import IGNORE_INDEX, SHAPES, SHAPES_NAMES, voc_palette
from fcn.errors import InputError
from fcn.seeding import derive

OVERSAMPLE = 2
HUES = {"disc": 0.0, "ring": 0.0, "triangle": 0.33, "leaf": 0.33, "square": 0.63, "cross": 0.63}
"""Middle of each form's range of hues, 0..1, as in HSV."""
HUE_SPREAD = 0.09


def write_shapes(root: Path, train: int = 400, val: int = 100, seed: int = 0) -> bool:
    """Write the data set, or do nothing if it is there. It appears complete or not at all.

    Returns:
        Whether it was written.

    Raises:
        InputError: `root` exists and is something else.
    """
    lists = root / "ImageSets" / "Segmentation"
    if root.exists():
        if (lists / "val.txt").exists():
            return False
        raise InputError(f"{root}: exists, but is no shapes data set; give a new folder")
    root.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=root.parent, prefix=f".{root.name}."))
    work.chmod(0o755)
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (work / folder).mkdir(parents=True)
    palette = np.array(voc_palette(256), np.uint8).ravel().tolist()
    number = 0
    for split, count in (("train", train), ("val", val)):
        names = []
        for _ in range(count):
            name = f"{number:06d}"
            image, labels = draw_sample(np.random.default_rng(derive(seed, "shapes", number)))
            image.save(work / "JPEGImages" / f"{name}.jpg", quality=85)
            mask = Image.fromarray(labels).convert("P")
            mask.putpalette(palette)
            mask.save(work / "SegmentationClass" / f"{name}.png")
            names.append(name)
            number += 1
        (work / "ImageSets" / "Segmentation" / f"{split}.txt").write_text("\n".join(names) + "\n")
    try:
        work.rename(root)
    except OSError:
        shutil.rmtree(work)
        if (lists / "val.txt").exists():  # another process was faster
            return False
        raise
    return True


def draw_sample(rng: np.random.Generator) -> tuple[Image.Image, np.ndarray]:
    """One image (RGB) and its labels (H, W) uint8, with a border of 255 around each object."""
    width, height = (int(side) for side in rng.integers(96, 161, 2))
    image = _ground(rng, width, height)
    labels = np.zeros((height, width), np.uint8)
    _clutter(rng, image)
    for _ in range(rng.integers(3, 7)):
        label = int(rng.integers(1, len(SHAPES)))
        form = _form(rng, SHAPES_NAMES[label], width, height)
        image.paste(_paint(rng, SHAPES_NAMES[label], image.size), mask=form)
        inside = form.reduce(OVERSAMPLE)
        near, within = (
            np.asarray(inside.filter(f)) > 127 for f in (ImageFilter.MaxFilter(3), ImageFilter.MinFilter(3))
        )
        labels[near] = IGNORE_INDEX
        labels[within] = label
    small = np.asarray(image.reduce(OVERSAMPLE), np.float32)
    noisy = small + rng.normal(0, rng.uniform(3, 12), small.shape)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8)), labels


def _colour(rng: np.random.Generator, hue: float | None = None) -> tuple[int, int, int]:
    hue = float(rng.random()) if hue is None else hue
    return tuple(int(255 * c) for c in colorsys.hsv_to_rgb(hue % 1, rng.uniform(0.45, 1), rng.uniform(0.45, 1)))  # type: ignore[return-value]


def _ground(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """Smooth, dull colours: a few random pixels, enlarged."""
    seeds = rng.integers(40, 180, (4, 5, 1)) + rng.integers(-30, 31, (4, 5, 3))
    return Image.fromarray(seeds.astype(np.uint8)).resize(
        (width * OVERSAMPLE, height * OVERSAMPLE), Image.Resampling.BICUBIC
    )


def _clutter(rng: np.random.Generator, image: Image.Image) -> None:
    draw = ImageDraw.Draw(image)
    for _ in range(rng.integers(4, 10)):
        ends = [tuple(int(v) for v in rng.random(2) * image.size) for _ in range(2)]
        draw.line(ends, fill=_colour(rng), width=int(rng.integers(1, 3)) * OVERSAMPLE)
    for _ in range(rng.integers(5, 20)):
        x, y = rng.random(2) * image.size
        r = rng.uniform(1, 3) * OVERSAMPLE
        draw.ellipse((x - r, y - r, x + r, y + r), fill=_colour(rng))


def _paint(rng: np.random.Generator, name: str, size: tuple[int, int]) -> Image.Image:
    """A plain or striped fill."""
    hue = HUES[name] + rng.uniform(-HUE_SPREAD, HUE_SPREAD)
    paint = Image.new("RGB", size, _colour(rng, hue))
    if rng.random() < 0.4:
        draw, stripe = ImageDraw.Draw(paint), _colour(rng, hue + rng.uniform(-0.02, 0.02))
        for x in range(0, size[0], 8 * OVERSAMPLE):
            draw.line((x, 0, x, size[1]), fill=stripe, width=3 * OVERSAMPLE)
    return paint


def _form(rng: np.random.Generator, name: str, width: int, height: int) -> Image.Image:
    """Coverage of one object, 0 or 255, oversampled."""
    radius = rng.uniform(12, 26) * OVERSAMPLE
    x, y = (rng.uniform(0.12, 0.88) * side * OVERSAMPLE for side in (width, height))
    turn = rng.uniform(0, 2 * math.pi)

    def polygon(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
        """(distance, angle) around the centre → pixels."""
        return [(x + radius * r * math.cos(a + turn), y + radius * r * math.sin(a + turn)) for r, a in points]

    form = Image.new("L", (width * OVERSAMPLE, height * OVERSAMPLE))
    draw = ImageDraw.Draw(form)
    angles = [2 * math.pi * i / 48 for i in range(48)]
    if name == "leaf":  # an ellipse, three times as long as wide
        draw.polygon(polygon([(0.4 / math.hypot(math.cos(a) / 3, math.sin(a)), a) for a in angles]), fill=255)
    elif name in ("disc", "ring"):
        draw.polygon(polygon([(1.0, a) for a in angles]), fill=255)
        if name == "ring":
            draw.polygon(polygon([(0.55, a) for a in angles]), fill=0)
    elif name in ("square", "triangle"):
        corners = 4 if name == "square" else 3
        draw.polygon(polygon([(1.15, 2 * math.pi * i / corners) for i in range(corners)]), fill=255)
    else:
        for quarter in (0, math.pi / 2):
            half = math.atan2(0.2, 1.15)
            draw.polygon(polygon([(1.2, quarter + s * half + t) for t in (0, math.pi) for s in (-1, 1)]), fill=255)
    return form


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m fcn.data.shapes`; returns the exit status."""
    parser = Parser(prog="python -m fcn.data.shapes", description=__doc__)
    parser.add_argument("root", type=Path, help="folder to write, such as data/shapes")
    parser.add_argument("--train", type=int, default=400, help="training images (400)")
    parser.add_argument("--val", type=int, default=100, help="validation images (100)")
    parser.add_argument("--seed", type=int, default=0, help="another seed gives another data set (0)")
    try:
        args = parser.parse_args(argv)
        if min(args.train, args.val) < 1:
            parser.error(f"found --train {args.train} --val {args.val}; accepted: one image or more of each")
        written = write_shapes(args.root, args.train, args.val, args.seed)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{args.root}: written, {args.train} + {args.val} images" if written else f"{args.root}: exists already")
    return 0


if __name__ == "__main__":
    sys.exit(main())
