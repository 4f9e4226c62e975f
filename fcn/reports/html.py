"""RUN_DIR/report.html: a run on one page that needs no network, no script and no other file.

Everything on it comes from the run's directory. This module gathers the data, report.html.j2 shows them.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np
from PIL import Image

from fcn.config import read_saved_config
from fcn.data import Classes, voc_palette
from fcn.errors import InputError
from fcn.files import read_text, write_atomically
from fcn.metrics import CLASS_METRICS, METRICS, Counts, best_metric, shown
from fcn.reports.status import run_status
from fcn.text import duration
from fcn.tracking import Record, is_sound, plots, read_foreign, resumed_steps, scores_name, versions

MOST_TEXT = 50_000_000
"""Bytes of a config or of the details of a split's scores, which have a line for each image."""
PICTURE_BYTES = 600_000
"""Most bytes of one picture, before base64 makes it a third larger."""
SHOWN_EVENTS = 200
WORST = 20
"""Images in the table of the lowest scores."""


class Picture(NamedTuple):
    """An image inside the page."""

    source: str
    """A data URL."""
    width: int
    height: int
    alt: str
    caption: str = ""


@dataclass(frozen=True, slots=True)
class RunFiles:
    """What the directory of a run contains. What is missing or broken is empty."""

    path: Path
    config: str
    """As it is written."""
    keys: dict[str, Any]
    """The config by dotted names."""
    records: list[Record]
    summary: Record
    scores: dict[str, Record]
    """The last evaluation of each split, with the details of scores_SPLIT.json if they belong to it."""

    def of(self, *events: str) -> list[Record]:
        """The records of these events."""
        return [record for record in self.records if record["event"] in events]


def write_report(folder: Path) -> Path:
    """Write report.html into the directory of a run, whether it is running, finished or dead; returns its path.

    Raises:
        InputError: the directory is not one of a run.
        OSError: the page cannot be written.
    """
    output = folder / "report.html"
    write_atomically(output, render(_read(folder)))
    return output


def render(run: RunFiles) -> str:
    """The page. Every text in it is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["score"] = shown
    state, step, steps = _state(run)
    known = {"model.name", "data.name"} <= run.keys.keys()
    return environment.get_template("report.html.j2").render(
        name=run.path.resolve().name,
        subtitle=f"{run.keys['model.name']} on {run.keys['data.name']}, in {run.path.resolve()}" if known else "",
        state=state,
        progress="; ".join([f"step {step}" + (f" of {steps}" if steps else ""), *_dates(run)]),
        unsaved=run.summary.get("unsaved", ()),
        metrics=METRICS,
        scores=run.scores,
        best=_best(run),
        curves=_curves(run),
        splits=[_split(run, name, record) for name, record in run.scores.items()],
        facts=_facts(run),
        events=_events(run),
        config=run.config,
        written=_written(run),
    )


# --- what the directory says ---------------------------------------------------------------------------------------


def _read(folder: Path) -> RunFiles:
    if not any((folder / name).is_file() for name in ("config.yaml", "metrics.jsonl", "log.txt")):
        raise InputError(
            f"{folder}: no run is there (no config.yaml, metrics.jsonl or log.txt); "
            f"give a directory that training wrote"
        )
    config = _text(folder / "config.yaml")
    keys = {}
    with contextlib.suppress(InputError, FileNotFoundError):
        keys = read_saved_config(folder / "config.yaml")
    records, summary = read_foreign(folder)
    scores = {record["split"]: record for record in records if record["event"] == "eval"}
    for split, record in scores.items():
        with contextlib.suppress(ValueError, RecursionError):
            details = json.loads(_text(folder / scores_name(split)))
            if is_sound(details, "step") and details["step"] == record["step"] and _fit(details, len(record["iou"])):
                scores[split] = {**record, **details}
    return RunFiles(folder, config, keys, records, summary, scores)


def _fit(details: Record, classes: int) -> bool:
    return all(len(details.get(key, range(classes))) == classes for key in ("confusion_matrix", "palette"))


def _text(path: Path) -> str:
    """The content of a file; empty if it is missing or too large."""
    try:
        return read_text(path, MOST_TEXT, errors="replace")
    except (OSError, ValueError):
        return ""


def _state(run: RunFiles) -> tuple[str, int, int | None]:
    """(what the run is doing in words, finished steps, all steps)."""
    last = (run.of("train") or [{}])[-1]
    step, steps = last.get("step", 0), last.get("steps", run.summary.get("steps"))
    life = run.of("start", "stop", "finish", "failure")
    outdated = step > run.summary.get("step", 0) or (life and life[-1]["event"] in ("start", "failure"))
    if "status" in run.summary and not outdated:
        return run.summary["status"], run.summary["step"], run.summary["steps"]
    with contextlib.suppress(InputError, KeyError):  # no config, or records of an older program
        text, _ = run_status(run.path)
        verdict = text.splitlines()[0].removeprefix(f"{run.path}: ")
        if (run.path / "heartbeat").is_dir():
            return verdict, step, steps
    return "running, killed or crashed", step, steps


def _dates(run: RunFiles) -> list[str]:
    times = [record["time"] for record in run.records if "time" in record]
    return [f"started {times[0]}", f"last event {times[-1]}"] if times else []


def _best(run: RunFiles) -> str:
    """The best score in words; empty if there is none."""
    best = run.summary.get("best")
    if not best:
        scored = [record for record in run.of("eval") if record["miou"] is not None]
        best = max(scored, key=lambda record: record["miou"], default=None)
        best = best and {"miou": best["miou"], "step": best["step"]}
    if not best:
        return ""
    key = best_metric(best)
    return f"Best {METRICS[key].title}: {shown(best[key])} at step {best['step']}."


def _facts(run: RunFiles) -> dict[str, str]:
    """What ran where, and how fast."""
    starts, trained, resumed = run.of("start"), run.of("train"), resumed_steps(run.records)
    facts = dict(starts[-1].get("facts", {})) if starts else {}
    if resumed:
        facts["resumed at step"] = ", ".join(map(str, resumed))
    if trained:
        last = trained[-1]
        facts["images/s, median"] = f"{statistics.median(record['images_per_s'] for record in trained):.1f}"
        if seconds := [record["step_s"] for record in trained if "step_s" in record]:
            facts["training time"] = duration(statistics.median(seconds) * last["step"])
        if waits := [record["data_wait"] for record in trained if "data_wait" in record]:
            facts["waiting for data, mean"] = f"{statistics.fmean(waits):.1%}"
        if last.get("memory_gb"):
            facts["peak memory"] = f"{last['memory_gb']:.2f} GB"
        facts["last loss"] = "not finite" if last["loss"] is None else f"{last['loss']:.4f}"
        skipped = last.get("skipped", 0)
        facts["skipped steps"] = f"{skipped} (loss or gradient not finite)" if skipped else "0"
    if replaced := sum(len(record["faults"]) for record in run.of("replaced")):
        facts["broken images that were replaced"] = str(replaced)
    return facts


def _events(run: RunFiles) -> list[Record]:
    """What happened to the run; the middle is left out if it is long."""
    texts = {
        "start": lambda record: f"{record.get('steps')} steps, {record.get('facts', {}).get('on', '')}",
        "resume": lambda record: "; ".join([f"from {record.get('checkpoint')}", *record.get("changes", ())]),
        "finish": lambda record: "",
        "stop": lambda record: "by a signal, after saving",
        **dict.fromkeys(("warning", "note", "failure"), lambda record: record.get("text", "")),
    }
    events = [{"time": "", "step": "", **record, "text": texts[record["event"]](record)} for record in run.of(*texts)]
    left_out = len(events) - SHOWN_EVENTS
    if left_out > 0:
        half = SHOWN_EVENTS // 2
        gap = {"time": "…", "step": "", "event": "", "text": f"{left_out} events are left out; see metrics.jsonl"}
        events[half:-half] = [gap]
    return events


def _written(run: RunFiles) -> list[str]:
    def named(known: dict[str, str]) -> str:
        return ", ".join(f"{name} {version}" for name, version in known.items())

    ran, now = run.summary.get("versions"), versions()
    lines = [f"Run with {named(ran)}"] if ran else []
    return [*lines, f"Written {time.strftime('%Y-%m-%d %H:%M:%S')}" + ("" if ran == now else f" with {named(now)}")]


# --- classes and pictures of a split -------------------------------------------------------------------------------


def _split(run: RunFiles, name: str, record: Record) -> dict[str, Any]:
    """The scores of a split's classes, its heat map, its images."""
    names = tuple(record["iou"])
    columns = {key: list(record[key].values()) for key in CLASS_METRICS if key in record}
    matrix = record.get("confusion_matrix", [])
    shares = [0.0] * len(names)
    if matrix:
        counts = Counts(matrix, record.get("ignore_index"))
        columns = {key: metric.formula(counts) for key, metric in CLASS_METRICS.items()}
        shares = [labelled / max(1, counts.total) for labelled in counts.labelled]
    palette = record.get("palette")
    colours = ["#{:02x}{:02x}{:02x}".format(*colour) for colour in palette] if palette else [""] * len(names)
    scored = sorted((pair for pair in record.get("image_miou", []) if pair[1] is not None), key=lambda pair: pair[1])
    photos, unreadable = _photos(run, name)
    return {
        "name": name,
        "titles": [CLASS_METRICS[key].title for key in columns],
        "has_counts": bool(matrix),
        "rows": [
            {"name": name, "colour": colour, "share": share, "scores": [column[place] for column in columns.values()]}
            for place, (name, colour, share) in enumerate(zip(names, colours, shares, strict=True))
        ],
        "heat_map": _heat_map(run, record, matrix, names) if matrix else None,
        "photos": photos,
        "unreadable": unreadable,
        "worst": scored[:WORST],
        "worst_title": _worst_title(scored, record["step"]) if scored else "",
    }


def _worst_title(scored: Sequence[tuple[str, float]], step: int) -> str:
    median = statistics.median(score for _, score in scored)
    lowest = min(WORST, len(scored))
    return (
        f"the lowest {lowest} of {len(scored)} images at step {step}; half of the images score more than {median:.4f}"
    )


def _heat_map(run: RunFiles, record: Record, matrix: list[list[int]], names: tuple[str, ...]) -> Picture:
    palette = record.get("palette", voc_palette(len(names)))
    classes = Classes(names, tuple(tuple(colour) for colour in palette))
    drawn = run.path / "pictures" / f"{record['split']}_confusion.png"
    image = _newer(drawn, run.path / scores_name(record["split"]), lambda: plots.confusion(np.array(matrix), classes))
    return _picture(image, "Of the pixels of each label (row), the percentage predicted as each class (column).")


def _curves(run: RunFiles) -> list[Picture]:
    """The four quarters of curves.png, so that a narrow page shows them below each other."""
    if not run.of("train", "eval"):
        return []
    drawn = run.path / "pictures" / "curves.png"
    sheet = _newer(drawn, run.path / "metrics.jsonl", lambda: plots.curves(run.records, resumed_steps(run.records)))
    width, height = sheet.width // 2, sheet.height // 2
    corners = [(left, top) for top in (0, height) for left in (0, width)]
    parts = [sheet.crop((left, top, left + width, top + height)) for left, top in corners]
    return [_picture(part, alt=title) for part, title in zip(parts, plots.CURVES.values(), strict=True)]


def _photos(run: RunFiles, split: str) -> tuple[list[Picture], list[str]]:
    """(the newest panels of a split and those of its worst images, a line for each that cannot be read)."""
    panels = {}
    for path in (run.path / "pictures").glob("*.png"):
        step = path.stem.removeprefix(f"{split}_")
        if path.stem.startswith(f"{split}_") and step.isdecimal():
            panels[int(step)] = path
    wanted = []
    if panels:
        step = max(panels)
        wanted.append((panels[step], f"At step {step}. Red: label and prediction differ."))
    worst = run.path / "pictures" / f"{split}_worst.png"
    if worst.exists():
        wanted.append((worst, "The images with the lowest mIoU after the last step."))
    photos, unreadable = [], []
    for path, caption in wanted:
        try:
            with Image.open(path, formats=["PNG"]) as image:
                photos.append(_picture(image.convert("RGB"), caption, photo=True))
        except OSError as error:
            unreadable.append(f"{path.name}: cannot be read ({error})")
    return photos, unreadable


def _newer(path: Path, source: Path, draw: Callable[[], Image.Image]) -> Image.Image:
    """The picture drawn from `source`; drawn again if it is older than that, missing or broken."""
    with contextlib.suppress(OSError):
        if path.stat().st_mtime >= source.stat().st_mtime:
            with Image.open(path, formats=["PNG"]) as image:
                return image.convert("RGB")
    return draw()


def _picture(image: Image.Image, caption: str = "", alt: str = "", photo: bool = False) -> Picture:
    """PNG, or JPEG for photographs; an image that is too large becomes a smaller JPEG until it fits."""
    kind = "jpeg" if photo else "png"
    while True:
        file = io.BytesIO()
        image.save(file, kind, **({"quality": 85, "subsampling": 0} if kind == "jpeg" else {}))
        if file.tell() <= PICTURE_BYTES:
            break
        if kind == "jpeg":
            size = max(1, image.width * 4 // 5), max(1, image.height * 4 // 5)
            image = image.resize(size, Image.Resampling.BOX)
        kind = "jpeg"
    source = f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
    return Picture(source, image.width, image.height, alt or caption, caption)
