"""Plots of a run: panels with image, label, prediction and errors, a heat map of the confusion matrix, curves."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from fcn.data import IGNORE_INDEX, Classes
from fcn.files import replacing
from fcn.text import printable
from fcn.tracking.records import Record
from fcn.tracking.tracker import Sample

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


IGNORE_COLOUR = (224, 224, 192)
ERROR_COLOUR = (230, 0, 30)
COLUMNS = ("image", "label", "prediction", "errors")
CELL = 360
"""Longer side of an image in a panel, in pixels."""
GAP = 8
WIDTH = len(COLUMNS) * (CELL + GAP) + GAP
CURVES = {
    "loss": "training loss (global mean)",
    "lr": "learning rate",
    "miou": "mIoU",
    "images_per_s": "images/s, all processes",
}
"""What `curves` draws: key of the record → title."""


def save(picture: Image.Image, path: Path) -> None:
    """Write a PNG atomically, and create its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        picture.save(file, "PNG")


def colourise(labels: np.ndarray, classes: Classes) -> Image.Image:
    """Draw labels (H, W) integer in the palette's colours as an RGB image; 255 in `IGNORE_COLOUR`."""
    return Image.fromarray(_colour_table(classes)[labels])


def palette_image(labels: np.ndarray, classes: Classes) -> Image.Image:
    """Turn labels (H, W) uint8 into a palette image, whose pixels are the labels and which looks like `colourise`.

    The palette has 256 entries, so that its PNG has 8 bits per pixel, like VOC's masks.
    """
    image = Image.fromarray(labels)
    image.putpalette(_colour_table(classes).tobytes())
    return image


def overlay(image: Image.Image, labels: np.ndarray, classes: Classes) -> Image.Image:
    """Blend an RGB image half and half with its labels (H, W) integer, drawn in the palette's colours."""
    return Image.blend(image, colourise(labels, classes), 0.5)


def errors(image: Image.Image, labels: np.ndarray, predictions: np.ndarray) -> Image.Image:
    """Draw an RGB image in pale grey, with `ERROR_COLOUR` where labels and predictions (H, W) integer differ.

    Labels and predictions have the size of the image. Ignored pixels are not errors.
    """
    pale = np.asarray(Image.blend(image.convert("L"), Image.new("L", image.size, 255), 0.5))
    wrong = (labels != predictions) & (labels != IGNORE_INDEX)
    return Image.fromarray(np.where(wrong[..., None], np.uint8(ERROR_COLOUR), pale[..., None]))


def _colour_table(classes: Classes) -> np.ndarray:
    """(256, 3) uint8."""
    table = np.zeros((256, 3), np.uint8)
    table[: len(classes)] = classes.palette
    table[IGNORE_INDEX] = IGNORE_COLOUR
    return table


def panels(rows: Sequence[Sample], classes: Classes) -> Image.Image:
    """One row per sample: image, label, prediction, errors. The legend names every class that occurs."""
    font, offsets = _font(13), range(GAP, WIDTH, CELL + GAP)
    heading, draw = _strip(28)
    for x, title in zip(offsets, COLUMNS):
        draw.text((x, 6), title, fill="black", font=font)
    strips, used = [heading], set()
    for sample in rows:
        small = resized(sample, sample.image.shape, CELL / max(sample.image.shape[:2]))
        photo = Image.fromarray(small.image)
        coloured = [colourise(part, classes) for part in (small.labels, small.predictions)]
        cells = [photo, *coloured, errors(photo, small.labels, small.predictions)]
        valid = sample.labels != IGNORE_INDEX
        wrong = (sample.labels != sample.predictions)[valid].mean() if valid.any() else 0
        caption = f"{_shortened(sample.caption, WIDTH - 2 * GAP - 150, font)}   {wrong:.1%} of pixels wrong"
        row, draw = _strip(photo.height + 28)
        for x, cell in zip(offsets, cells):
            row.paste(cell, (x, 0))
        draw.text((GAP, photo.height + 3), caption, fill="dimgray", font=font)
        strips.append(row)
        used |= {*np.unique(sample.labels), *np.unique(sample.predictions)}
    entries = [(classes.names[i], classes.palette[i]) for i in range(len(classes)) if i in used]
    if IGNORE_INDEX in used:
        entries.append(("ignored", IGNORE_COLOUR))
    strips += [*_legend(entries, font), _strip(GAP)[0]]
    return Image.fromarray(np.vstack(strips))


def resized(sample: Sample, shape: Sequence[int], scale: float) -> Sample:
    """Resize image, labels and predictions of a sample to `scale` times `shape` (H, W, ...), at least one pixel.

    Labels and predictions, integers up to 255, become uint8; resizing mixes none of them.
    """
    size = max(1, round(shape[1] * scale)), max(1, round(shape[0] * scale))
    image = Image.fromarray(sample.image).resize(size, Image.Resampling.BILINEAR)
    labels, predictions = (
        np.asarray(Image.fromarray(part.astype(np.uint8)).resize(size, Image.Resampling.NEAREST))
        for part in (sample.labels, sample.predictions)
    )
    return Sample(np.asarray(image), labels, predictions, sample.caption)


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    """Load matplotlib's font. Pillow's own font lacks accents, Greek and Cyrillic."""
    from matplotlib import get_data_path

    return ImageFont.truetype(f"{get_data_path()}/fonts/ttf/DejaVuSans.ttf", size)


def _in_a_line(text: str) -> str:
    """A name as it is drawn: fonts have no control characters."""
    return printable(text).replace("\n", " ")


def _shortened(text: str, width: float, font: ImageFont.FreeTypeFont) -> str:
    """A name, without its middle if it is wider than `width` pixels."""
    text = _in_a_line(text)
    short, kept = text, len(text)
    while kept and font.getlength(short) > width:
        kept = kept * 9 // 10
        short = f"{text[: kept // 2]}…{text[len(text) - (kept + 1) // 2 :]}"
    return short


def _legend(entries: Sequence[tuple[str, tuple[int, int, int]]], font: ImageFont.FreeTypeFont) -> list[Image.Image]:
    """Lines of boxes in the (name, colour) of each entry."""
    lines, x, box = [], WIDTH, 14
    for name, colour in entries:
        short = _shortened(name, WIDTH / 4, font)
        needed = box + 6 + int(font.getlength(short)) + 18
        if x + needed > WIDTH:
            line, draw = _strip(24)
            lines.append(line)
            x = GAP
        draw.rectangle((x, 4, x + box, 4 + box), fill=colour, outline="gray")
        draw.text((x + box + 6, 3), short, fill="black", font=font)
        x += needed
    return lines


def _strip(height: int) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    """A white image of the panels' width, and the pen to draw on it."""
    image = Image.new("RGB", (WIDTH, height), "white")
    return image, ImageDraw.Draw(image)


def confusion(counts: np.ndarray, classes: Classes) -> Image.Image:
    """Draw a confusion matrix (C, C) integer as a heat map: for each label, the percentage predicted as each class.

    The row of a class without labelled pixels is hatched. With up to 40 classes, cells of 0.5 % and more show their
    number.
    """
    labelled = counts.sum(1)
    shares = np.full(counts.shape, np.nan)
    np.divide(100 * counts, labelled[:, None], out=shares, where=labelled[:, None] > 0)
    names = [_in_a_line(name) for name in classes.names]
    names = [name if len(name) <= 32 else f"{name[:20]}…{name[-11:]}" for name in names]
    side = min(18.0, 0.8 + 0.42 * len(classes))
    margin = 0.9 + 0.085 * max(map(len, names))
    figure = _figure(side + margin + 1.2, side + margin)
    axis = figure.add_subplot()
    axis.set_facecolor("0.93")
    heat = axis.imshow(shares, cmap="Blues", vmin=0, vmax=100)
    fontsize = max(6, min(10, 72 * 0.9 * side / len(classes)))
    style = {"fontsize": fontsize, "parse_math": False}
    absent = labelled == 0
    rows = [f"{name} (absent)" if gone else name for name, gone in zip(names, absent)]
    axis.set_xticks(range(len(classes)), names, rotation=90, **style)
    axis.set_yticks(range(len(classes)), rows, **style)
    axis.set_xlabel("predicted")
    axis.set_ylabel("labelled")
    for row in np.flatnonzero(absent):
        axis.axhspan(row - 0.5, row + 0.5, facecolor="none", edgecolor="0.75", hatch="////", linewidth=0)
    if len(classes) <= 40:
        for row, column in np.argwhere(shares >= 0.5):
            colour = "white" if shares[row, column] > 60 else "black"
            axis.text(column, row, f"{shares[row, column]:.0f}", ha="center", va="center", color=colour, fontsize=8)
    figure.colorbar(heat, ax=axis, label="% of the label's pixels", shrink=0.8, fraction=0.04, pad=0.02, aspect=30)
    return _drawn(figure)


def curves(records: Sequence[Record], resumed: Sequence[int] = ()) -> Image.Image:
    """Plot records of metrics.jsonl over the steps, one of `CURVES` in each quarter of the picture.

    Args:
        resumed: steps at which the run was resumed, drawn as dotted lines.
    """
    figure = _figure(11, 7)
    last = max((record["step"] for record in records), default=1)
    for quarter, (key, title) in zip(figure.subfigures(2, 2).ravel(), CURVES.items(), strict=True):
        axis = quarter.add_subplot()
        if key == "miou":
            _draw_scores(axis, [record for record in records if record["event"] == "eval"])
        else:
            _draw_training(axis, [record for record in records if record["event"] == "train"], key)
        for number, step in enumerate(sorted(set(resumed))):
            axis.axvline(step, color="gray", linestyle=":", linewidth=1, label=None if number else "resumed")
        axis.set_title(title, fontsize=11)
        axis.set_xlim(0, last * 1.03)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[1]:
            axis.legend(fontsize=8, loc="lower right" if key == "miou" else "best")
    return _drawn(figure)


def _draw_training(axis: Axes, records: Sequence[Record], key: str) -> None:
    """Plot a value of the training steps, with gaps where it is not finite, and of many also their running mean."""
    from matplotlib.ticker import LogLocator

    steps = np.array([record["step"] for record in records])
    values = np.array([record[key] for record in records], float)
    finite = np.isfinite(values)
    width = len(values) // 100
    style = "o-" if len(values) <= 50 else "-"
    smooth = key != "lr" and width >= 5
    axis.plot(steps, values, style, markersize=3, linewidth=1, alpha=0.35 if smooth else 1, color="tab:blue")
    if smooth:
        mean = _running_mean(steps, values, width)
        axis.plot(*mean, linewidth=1.5, color="tab:blue", label=f"mean of {width} records")
    if not finite.all():
        lost = steps[~finite]
        edge = axis.get_xaxis_transform()
        axis.plot(lost, np.zeros(len(lost)), "|", color="red", transform=edge, clip_on=False, label="not finite")
    lowest, highest = values[finite].min(initial=np.inf), values[finite].max(initial=0)
    if key == "loss" and 0 < 10 * lowest < highest:
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=12))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("")
    elif lowest >= 0:
        axis.set_ylim(0, 1.08 * highest or 1)


def _running_mean(steps: np.ndarray, values: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """The mean of the finite values among `width` neighbours, at the middle of their steps; NaN if there is none."""
    finite = np.isfinite(values)
    kernel = np.ones(width)
    count = np.convolve(finite, kernel, "valid")
    total = np.convolve(np.where(finite, values, 0), kernel, "valid")
    middle = np.convolve(steps, kernel / width, "valid")
    return middle, np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _draw_scores(axis: Axes, records: Sequence[Record]) -> None:
    """Plot the mIoU of each split and mark its best score."""
    splits: dict[str, list[tuple[int, float]]] = {}
    for record in records:
        if record["miou"] is not None:
            splits.setdefault(record["split"], []).append((record["step"], record["miou"]))
    for split, points in splits.items():
        step, best = max(points, key=lambda point: point[1])
        style = "o-" if len(points) <= 50 else "-"
        label = f"{_in_a_line(split)}, best {best:.4f} at {step}"
        (line,) = axis.plot(*zip(*points, strict=True), style, markersize=4, linewidth=1, label=label)
        axis.plot(step, best, "*", markersize=11, color=line.get_color(), markeredgecolor="black", zorder=3)
    highest = max((score for points in splits.values() for _, score in points), default=0)
    axis.set_ylim(0, min(1.02, 1.2 * highest) or 1)


def _figure(width: float, height: float) -> Figure:
    """Create a figure of this size in inches, 110 pixels each, without importing matplotlib's GUI."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _drawn(figure: Figure) -> Image.Image:
    """Render a figure as an RGB image."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # the font draws a box
        figure.canvas.draw()
    return Image.fromarray(np.asarray(figure.canvas.buffer_rgba())[..., :3].copy())
