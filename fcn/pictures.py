"""Pictures of a run: panels of image, label, prediction and errors, a heat map of the confusion matrix, curves."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from fcn.data.labels import IGNORE_INDEX, Classes
from fcn.tracking import Record, Sample, replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

IGNORE_COLOUR = (224, 224, 192)
ERROR_COLOUR = (230, 0, 30)
COLUMNS = ("image", "label", "prediction", "errors")
CELL = 360
"""Widest side of an image in a panel, in pixels."""
GAP = 8
CURVES = {
    "loss": "training loss (global mean)",
    "lr": "learning rate",
    "miou": "mIoU",
    "images_per_s": "images/s, all processes",
}
"""What `curves` draws, by the record's key."""


def save(picture: Image.Image, path: Path) -> None:
    """Write a PNG, and its folder, so that a crash leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        picture.save(file, "PNG")


def colourise(labels: np.ndarray, classes: Classes) -> Image.Image:
    """Labels (H, W) integer as an RGB image in the palette's colours; 255 in `IGNORE_COLOUR`."""
    return Image.fromarray(_colour_table(classes)[labels])


def palette_image(labels: np.ndarray, classes: Classes) -> Image.Image:
    """Labels (H, W) uint8 as a palette image, whose pixels are the labels and which looks like `colourise`'s.

    The palette has 256 entries, so that a PNG of it has 8 bits a pixel, as VOC's masks.
    """
    image = Image.fromarray(labels)
    image.putpalette(_colour_table(classes).tobytes())
    return image


def overlay(image: Image.Image, labels: np.ndarray, classes: Classes) -> Image.Image:
    """An RGB image under its labels (H, W) integer, half each."""
    return Image.blend(image, colourise(labels, classes), 0.5)


def errors(image: Image.Image, labels: np.ndarray, predictions: np.ndarray) -> Image.Image:
    """An RGB image, pale and grey, with `ERROR_COLOUR` where labels and predictions, (H, W) integer, differ.

    Labels and predictions have the size of the image. Ignored pixels are no errors.
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
    """One row a sample: image, label, prediction, errors; the legend names every class that occurs."""
    font = _font(13)
    width = len(COLUMNS) * (CELL + GAP) + GAP
    cells, captions, used = [], [], set()
    for image, labels, predictions, caption in rows:
        scale = CELL / max(image.shape[:2])
        size = max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale))
        photo = Image.fromarray(image).resize(size, Image.Resampling.BILINEAR)
        label, prediction = (_nearest(part, size) for part in (labels, predictions))
        drawn = [photo, colourise(label, classes), colourise(prediction, classes), errors(photo, label, prediction)]
        cells.append(drawn)
        valid = labels != IGNORE_INDEX
        wrong = (labels != predictions)[valid].mean() if valid.any() else 0
        captions.append(_shortened(caption, width - 2 * GAP - 150, font) + f"   {wrong:.1%} of pixels wrong")
        used |= set(np.unique(labels)) | set(np.unique(predictions))
    entries = [(classes.names[i], classes.palette[i]) for i in range(len(classes)) if i in used]
    if IGNORE_INDEX in used:
        entries.append(("ignored", IGNORE_COLOUR))
    legend = _legend(entries, width, font)
    height = 28 + sum(row[0].height + 28 for row in cells) + legend.height + GAP
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(COLUMNS):
        draw.text((GAP + column * (CELL + GAP), 6), title, fill="black", font=font)
    y = 28
    for row, caption in zip(cells, captions, strict=True):
        for column, cell in enumerate(row):
            sheet.paste(cell, (GAP + column * (CELL + GAP), y))
        y += row[0].height
        draw.text((GAP, y + 3), caption, fill="dimgray", font=font)
        y += 28
    sheet.paste(legend, (0, y))
    return sheet


def _nearest(labels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Labels (H, W), integers up to 255, at another (width, height); no values are mixed."""
    return np.asarray(Image.fromarray(labels.astype(np.uint8)).resize(size, Image.Resampling.NEAREST))


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    """The font of the figures. Pillow's own one has no accents, and no Greek or Cyrillic."""
    from matplotlib import get_data_path

    return ImageFont.truetype(f"{get_data_path()}/fonts/ttf/DejaVuSans.ttf", size)


def _shortened(text: str, width: float, font: ImageFont.FreeTypeFont) -> str:
    """A text without so much of its middle that it is at most `width` pixels wide."""
    short, kept = text, len(text)
    while kept and font.getlength(short) > width:
        kept = kept * 9 // 10
        short = f"{text[: kept // 2]}…{text[len(text) - (kept + 1) // 2 :]}"
    return short


def _legend(
    entries: Sequence[tuple[str, tuple[int, int, int]]], width: int, font: ImageFont.FreeTypeFont
) -> Image.Image:
    line, box = 24, 14
    names = [_shortened(name, width / 4, font) for name, _ in entries]
    places, x, y = [], GAP, 0
    for name in names:
        needed = box + 6 + int(font.getlength(name)) + 18
        if x + needed > width and x > GAP:
            x, y = GAP, y + line
        places.append((x, y))
        x += needed
    image = Image.new("RGB", (width, y + line), "white")
    draw = ImageDraw.Draw(image)
    for name, (_, colour), (x, y) in zip(names, entries, places, strict=True):
        draw.rectangle((x, y + 4, x + box, y + 4 + box), fill=colour, outline="gray")
        draw.text((x + box + 6, y + 3), name, fill="black", font=font)
    return image


def confusion(counts: np.ndarray, classes: Classes) -> Image.Image:
    """Heat map of a confusion matrix (C, C) integer: of the pixels of each label, how many percent became what.

    The row of a class that no pixel is labelled with is hatched. Cells of 0.5 % and more have their number, up to
    40 classes.
    """
    labelled = counts.sum(1)
    shares = np.full(counts.shape, np.nan)
    np.divide(100 * counts, labelled[:, None], out=shares, where=labelled[:, None] > 0)
    names = [name if len(name) <= 32 else f"{name[:20]}…{name[-11:]}" for name in classes.names]
    side = min(18.0, 0.8 + 0.42 * len(classes))
    margin = 0.9 + 0.085 * max(map(len, names))
    figure = _figure(side + margin + 1.2, side + margin)
    axis = figure.add_subplot()
    axis.set_facecolor("0.93")
    heat = axis.imshow(shares, cmap="Blues", vmin=0, vmax=100)
    fontsize = max(6, min(10, 72 * 0.9 * side / len(classes)))
    style = {"fontsize": fontsize, "parse_math": False}
    axis.set_xticks(range(len(classes)), names, rotation=90, **style)
    absent = labelled == 0
    axis.set_yticks(
        range(len(classes)), [f"{name} (absent)" if gone else name for name, gone in zip(names, absent)], **style
    )
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
    """Records of metrics.jsonl as curves over the steps: one of `CURVES` in each quarter of the picture.

    Args:
        resumed: the steps that the run was resumed at; a dotted line each.
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
    """A value of the training steps, a gap where it is none; many of them also as their running mean."""
    from matplotlib.ticker import LogLocator

    steps = np.array([record["step"] for record in records])
    values = np.array([record[key] for record in records], float)
    finite = np.isfinite(values)
    width = len(values) // 100
    few = len(values) <= 50
    smooth = key != "lr" and width >= 5
    axis.plot(
        steps, values, "o-" if few else "-", markersize=3, linewidth=1, alpha=0.35 if smooth else 1, color="tab:blue"
    )
    if smooth:
        axis.plot(
            *_running_mean(steps, values, width), linewidth=1.5, color="tab:blue", label=f"mean of {width} records"
        )
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
    """Of the finite ones among `width` neighbours, at the middle of their steps; NaN where there is none."""
    finite = np.isfinite(values)
    kernel = np.ones(width)
    count = np.convolve(finite, kernel, "valid")
    total = np.convolve(np.where(finite, values, 0), kernel, "valid")
    middle = np.convolve(steps, kernel / width, "valid")
    return middle, np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _draw_scores(axis: Axes, records: Sequence[Record]) -> None:
    """mIoU of each split, its best score marked."""
    splits: dict[str, list[tuple[int, float]]] = {}
    for record in records:
        if record["miou"] is not None:
            splits.setdefault(record["split"], []).append((record["step"], record["miou"]))
    for split, points in splits.items():
        step, best = max(points, key=lambda point: point[1])
        style = "o-" if len(points) <= 50 else "-"
        label = f"{split}, best {best:.4f} at {step}"
        (line,) = axis.plot(*zip(*points, strict=True), style, markersize=4, linewidth=1, label=label)
        axis.plot(step, best, "*", markersize=11, color=line.get_color(), markeredgecolor="black", zorder=3)
    highest = max((score for points in splits.values() for _, score in points), default=0)
    axis.set_ylim(0, min(1.02, 1.2 * highest) or 1)


def _figure(width: float, height: float) -> Figure:
    """Inches, of 110 pixels. No part of matplotlib that knows about windows is imported."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _drawn(figure: Figure) -> Image.Image:
    """RGB."""
    figure.canvas.draw()
    return Image.fromarray(np.asarray(figure.canvas.buffer_rgba())[..., :3].copy())
