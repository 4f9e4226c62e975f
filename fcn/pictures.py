"""Pictures of a run: image | label | prediction panels with a legend, and training curves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from fcn.data.labels import IGNORE_INDEX, Classes
from fcn.tracking import Sample, read_records

IGNORE_COLOUR = (224, 224, 192)
CELL = 360
"""Widest side of an image in a panel, in pixels."""
GAP = 8


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


def _colour_table(classes: Classes) -> np.ndarray:
    """(256, 3) uint8."""
    table = np.zeros((256, 3), np.uint8)
    table[: len(classes)] = classes.palette
    table[IGNORE_INDEX] = IGNORE_COLOUR
    return table


def panels(rows: Sequence[Sample], classes: Classes) -> Image.Image:
    """One row a sample: image, label, prediction; the legend names every class that occurs."""
    font = ImageFont.load_default(14)
    cells, captions, used = [], [], set()
    for image, labels, predictions, caption in rows:
        scale = CELL / max(image.shape[:2])
        size = max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale))
        colours = [colourise(part, classes).resize(size, Image.Resampling.NEAREST) for part in (labels, predictions)]
        cells.append([Image.fromarray(image).resize(size, Image.Resampling.BILINEAR), *colours])
        captions.append(caption)
        used |= set(np.unique(labels)) | set(np.unique(predictions))
    entries = [(classes.names[i], classes.palette[i]) for i in range(len(classes)) if i in used]
    if IGNORE_INDEX in used:
        entries.append(("ignored", IGNORE_COLOUR))
    width = 3 * CELL + 4 * GAP
    legend = _legend(entries, width, font)
    height = 28 + sum(row[0].height + 24 for row in cells) + legend.height + GAP
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(("image", "label", "prediction")):
        draw.text((GAP + column * (CELL + GAP), 6), title, fill="black", font=font)
    y = 28
    for row, caption in zip(cells, captions, strict=True):
        for column, cell in enumerate(row):
            sheet.paste(cell, (GAP + column * (CELL + GAP), y))
        y += row[0].height
        draw.text((GAP, y + 2), caption, fill="dimgray", font=font)
        y += 24
    sheet.paste(legend, (0, y))
    return sheet


def _legend(
    entries: Sequence[tuple[str, tuple[int, int, int]]], width: int, font: ImageFont.FreeTypeFont
) -> Image.Image:
    line, box = 24, 14
    places, x, y = [], GAP, 0
    for name, _ in entries:
        needed = box + 6 + int(font.getlength(name)) + 18
        if x + needed > width and x > GAP:
            x, y = GAP, y + line
        places.append((x, y))
        x += needed
    image = Image.new("RGB", (width, y + line), "white")
    draw = ImageDraw.Draw(image)
    for (name, colour), (x, y) in zip(entries, places, strict=True):
        draw.rectangle((x, y + 4, x + box, y + 4 + box), fill=colour, outline="gray")
        draw.text((x + box + 6, y + 2), name, fill="black", font=font)
    return image


def confusion(counts: np.ndarray, classes: Classes) -> Image.Image:
    """Heat map of a confusion matrix (C, C) integer: of the pixels of each label, how many percent became what."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shares = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = min(24.0, 3.0 + 0.42 * len(classes))
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axis = figure.add_subplot()
    heat = axis.imshow(shares, cmap="Blues", vmin=0, vmax=100)
    axis.set_xticks(range(len(classes)), classes.names, rotation=90)
    axis.set_yticks(range(len(classes)), classes.names)
    axis.set_xlabel("predicted")
    axis.set_ylabel("labelled")
    if len(classes) <= 40:
        for row, column in np.argwhere(shares >= 0.5):
            colour = "white" if shares[row, column] > 60 else "black"
            axis.text(column, row, f"{shares[row, column]:.0f}", ha="center", va="center", color=colour, fontsize=8)
    figure.colorbar(heat, ax=axis, label="% of the label's pixels", shrink=0.8)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())


def curves(metrics: Path, output: Path) -> None:
    """Draw metrics.jsonl: loss, learning rate, mIoU and throughput over the steps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    records = read_records(metrics)
    train = [record for record in records if record["event"] == "train"]
    evals = [record for record in records if record["event"] == "eval"]
    figure = Figure(figsize=(11, 7))
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2).ravel()
    titles = {"loss": "training loss (global mean)", "lr": "learning rate", "images_per_s": "images / s, all processes"}
    for axis, (key, title) in zip(axes, titles.items(), strict=False):
        axis.plot([record["step"] for record in train], [record[key] for record in train], linewidth=1)
        axis.set_title(title)
    axes[0].set_yscale("log")
    for split in sorted({record["split"] for record in evals}):
        points = [
            (record["step"], record["miou"])
            for record in evals
            if record["split"] == split and record["miou"] is not None
        ]
        axes[3].plot(*zip(*points, strict=True) if points else ([], []), marker="o", label=split)
    axes[3].set_title("mIoU")
    axes[3].set_ylim(0, 1)
    if evals:
        axes[3].legend()
    for axis in axes:
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    figure.tight_layout()
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=110)
