"""RUN_DIR/report.html: a run on one page that needs no network, no script and no other file; from its folder alone."""

from __future__ import annotations

import base64
import contextlib
import html
import io
import json
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image

from fcn import pictures
from fcn.config import flatten
from fcn.data.labels import Classes, voc_palette
from fcn.errors import InputError
from fcn.evaluation import scores_name
from fcn.pulse import read_signs
from fcn.status import status
from fcn.tracking import Record, duration, read_records, read_summary, write_atomically

PICTURE_BYTES = 600_000
"""Most that one picture takes, before base64 makes it a third larger."""
SHOWN_LINES = 200
"""Most lines of the log."""
WORST = 20
"""Images in the table of the lowest scores."""
SCORES = {"miou": "mIoU", "pixel_acc": "pixel accuracy", "mean_acc": "mean accuracy", "fw_iou": "fw IoU"}
STAMP = "%Y-%m-%d %H:%M:%S"
"""How a line of log.txt begins."""
DESCRIBED = re.compile(r"(model|on|data|images|batch|optim|steps) {2,}(\S.*)")
"""Lines of the log that say what ran where, at every start."""
ROUTINE = re.compile(r"step \d+/\d+  |\S+ at step \d+ \(|(?:model|data|images|batch|optim|steps) {2,}|\s|$")
"""Lines of the log that are in the tables and curves: progress, scores, what ran."""

STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --soft: #5a6675; --paper: #fff; --line: #d8dee6; --bar: #3b78c3;
  --good: #1d7a46; --warn: #a15c00 }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ee; --soft: #a3aebb; --paper: #14181e; --line: #343c47;
  --bar: #4f8fdc; --good: #5cc48a; --warn: #e0a352 } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1rem; max-width: 76rem; font: 15px/1.5 system-ui, sans-serif; color: var(--ink);
  background: var(--paper); overflow-wrap: anywhere }
h1 { margin: 0; font-size: 1.6rem }
h2 { margin: 2.2rem 0 .6rem; font-size: 1.2rem; border-bottom: 1px solid var(--line) }
h3 { margin: 1.2rem 0 .4rem; font-size: 1rem }
p { margin: .4rem 0 } .soft, figcaption { color: var(--soft) }
.status { font-weight: 600; color: var(--warn) } .finished { color: var(--good) }
.scroll { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .2rem .7rem .2rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line);
  overflow-wrap: normal }
th { font-weight: 600 }
.number { text-align: right } .number, .bars { white-space: nowrap } td.text { min-width: 6.5rem;
  overflow-wrap: anywhere }
.swatch { display: inline-block; width: .8em; height: .8em; margin-right: .5em; border: 1px solid gray }
.bar { display: inline-block; width: 8rem; height: .7em; margin-right: .6em; background: var(--line) }
.bar > span { display: block; height: 100%; background: var(--bar) }
.swatch, .bar, .bar > span { print-color-adjust: exact; -webkit-print-color-adjust: exact }
figure { margin: .6rem 0 } figure img { display: block; max-width: 100%; height: auto; background: #fff }
.beside { display: flex; flex-wrap: wrap; gap: 0 2rem; align-items: flex-start }
.beside > * { min-width: 0; max-width: 100% }
.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: .6rem }
.curves figure { margin: 0 } .curves img { width: 100% }
pre { margin: .4rem 0; overflow-x: auto; font-size: .85rem; line-height: 1.4; white-space: pre-wrap }
pre.log { max-height: 28rem; overflow-y: auto }
summary { cursor: pointer }
@media (max-width: 46rem) { .wide img { max-width: none; width: 60rem } .bar { width: 3rem } }
@media print { body { max-width: none; padding: 0; color: #000; background: #fff } figure, tr { break-inside: avoid }
  .curves { grid-template-columns: 1fr 1fr }
  h2, h3 { break-after: avoid } .scroll, pre.log { max-height: none; overflow: visible }
  .wide img { max-width: 100%; width: auto } }
"""


class Markup(str):
    """Text that is HTML already. Any other text is escaped where it is put into a page."""


def tag(name: str, /, *children: object, **attributes: object) -> Markup:
    """An element; `class_` is the attribute class. Children and attributes that are not Markup are escaped."""
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"' for key, value in attributes.items()
    )
    if name in ("img", "meta"):
        return Markup(f"<{name}{given}>")
    inside = "".join(child if isinstance(child, Markup) else html.escape(str(child)) for child in children)
    return Markup(f"<{name}{given}>{inside}</{name}>")


@dataclass(frozen=True, slots=True)
class _Folder:
    """What is there of a run; what is missing or broken is empty."""

    path: Path
    config: str
    """As it is written."""
    keys: dict[str, Any]
    """The config by dotted names."""
    records: list[Record]
    summary: Record
    scores: dict[str, Record]
    """Of each split, in the order of their first evaluation: its last evaluation, with the details if there are any."""
    log: list[tuple[str, str]]
    """(when, text) of each line."""

    @property
    def trained(self) -> list[Record]:
        return [record for record in self.records if record["event"] == "train"]


def write_report(folder: Path) -> Path:
    """Write report.html into the folder of a run, whether it is running, finished or dead; returns its path.

    Raises:
        InputError: no run is there.
        OSError: it cannot be written.
    """
    run = _read(folder)
    output = folder / "report.html"
    write_atomically(output, _page(run))
    return output


def resumes(log: Path) -> list[int]:
    """The steps that a run was resumed at, from its log.txt."""
    texts = [text for _, text in _log_lines(log)]
    return [int(found[1]) for text in texts if (found := re.match(r"resuming at step (\d+)/", text))]


def versions() -> dict[str, str]:
    """Of Python and of the packages that a run's numbers come from."""
    cuda = f", CUDA {torch.version.cuda}" if torch.cuda.is_available() else ""
    return {
        "python": platform.python_version(),
        "torch": f"{torch.__version__}{cuda}",
        "numpy": np.__version__,
        "pillow": metadata.version("pillow"),
        "matplotlib": metadata.version("matplotlib"),
        "system": f"{platform.system()} {platform.machine()}",
    }


def _read(folder: Path) -> _Folder:
    if not any((folder / name).is_file() for name in ("config.yaml", "metrics.jsonl", "log.txt")):
        raise InputError(
            f"{folder}: no run is there (no config.yaml, metrics.jsonl or log.txt); give a folder that training made"
        )
    config = _text(folder / "config.yaml")
    keys = {}
    with contextlib.suppress(yaml.YAMLError, AttributeError):
        keys = flatten(yaml.safe_load(config) or {})
    records = read_records(folder / "metrics.jsonl")
    scores = {record["split"]: record for record in records if record["event"] == "eval"}
    for split, record in scores.items():
        with contextlib.suppress(ValueError, TypeError):
            details = json.loads(_text(folder / scores_name(split)))
            if details["step"] == record["step"]:
                scores[split] = {**record, **details}
    return _Folder(folder, config, keys, records, read_summary(folder), scores, _log_lines(folder / "log.txt"))


def _text(path: Path) -> str:
    """Of a file that may be missing."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _log_lines(path: Path) -> list[tuple[str, str]]:
    """(when, text) of the lines of log.txt; a line without a time has that of the line before it."""
    lines, when = [], ""
    for line in _text(path).splitlines():
        if stamped := re.match(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d) ", line):
            when, line = stamped[1], line[stamped.end() :]
        lines.append((when, line))
    return lines


def _page(run: _Folder) -> str:
    name = run.path.resolve().name
    resumed = resumes(run.path / "log.txt")
    parts = [
        *_head(run, name),
        *_results(run),
        *_curves(run, resumed),
        *_class_scores(run),
        *(part for split in run.scores for part in _images(run, split)),
        *_facts(run, resumed),
        *_notes(run),
        *_settings(run),
    ]
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", name),
        tag("style", Markup(STYLE)),
    )
    return f"<!DOCTYPE html>\n{tag('html', head, tag('body', *parts), lang='en')}\n"


def _head(run: _Folder, name: str) -> Iterable[Markup]:
    """Title, status, how far it is."""
    last = run.trained[-1] if run.trained else {}
    step, steps = last.get("step", 0), last.get("steps", run.summary.get("steps"))
    state = run.summary.get("status")
    if state and not _goes_on(run, step):
        step, steps = run.summary["step"], run.summary["steps"]
        shown = state
    else:
        shown = _verdict(run.path)
    said = [f"step {step}" + (f" of {steps}" if steps else "")]
    if run.log:
        said += [f"started {run.log[0][0]}", f"last line of its log {run.log[-1][0]}"]
    yield tag("h1", name)
    if {"model.name", "data.name"} <= run.keys.keys():
        yield tag("p", f"{run.keys['model.name']} on {run.keys['data.name']}, in {run.path.resolve()}", class_="soft")
    yield tag("p", tag("span", shown, class_=f"status {shown}" if shown == "finished" else "status"))
    yield tag("p", "; ".join(said))
    for problem in run.summary.get("unsaved", ()):
        yield tag("p", f"not saved: {problem}", class_="status")


def _verdict(folder: Path) -> str:
    """What a run without a summary is doing while this is written."""
    with contextlib.suppress(InputError, KeyError):  # no config, or records of an older program
        if read_signs(folder):
            text, _ = status(folder)
            return text.splitlines()[0].removeprefix(f"{folder}: ")
    return "running, killed or crashed"


def _goes_on(run: _Folder, step: int) -> bool:
    """Whether the run was started again since it left its summary."""
    if step > run.summary.get("step", 0):
        return True
    left = time.strftime(STAMP, time.localtime((run.path / "summary.json").stat().st_mtime))
    return any(text.startswith("resuming at step") and when > left for when, text in run.log)


def _results(run: _Folder) -> Iterable[Markup]:
    """Scores of all splits."""
    yield tag("h2", "Scores")
    if not run.scores:
        yield tag("p", "No split has been scored yet.")
        return
    rows = []
    for split, record in run.scores.items():
        scores = [_number(_score(record[key])) for key in SCORES]
        rows.append([split, *scores, _number(record["images"]), _number(record["step"]), record["protocol"]])
    head = ["split", *(_number(name, "th") for name in (*SCORES.values(), "images", "step")), "protocol"]
    yield _table(head, rows)
    if best := _best(run):
        yield tag("p", best)


def _class_scores(run: _Folder) -> Iterable[Markup]:
    """Of each split: its classes, and the heat map."""
    for split, record in run.scores.items():
        yield tag("h2", f"Classes, {split}")
        shown = [_class_table(record), *([_heat_map(run, record)] if "confusion_matrix" in record else [])]
        yield tag("div", *shown, class_="beside")


def _heat_map(run: _Folder, record: Record) -> Markup:
    drawn = run.path / "pictures" / f"{record['split']}_confusion.png"
    matrix, classes = np.array(record["confusion_matrix"], np.int64), _classes(record)
    picture = _newer(drawn, run.path / scores_name(record["split"]), lambda: pictures.confusion(matrix, classes))
    caption = "Of the pixels of each label (row), how many percent became what (column)."
    return _figure(picture, caption, wide=len(classes) > 12)


def _best(run: _Folder) -> str:
    """In words; empty if nothing is known."""
    best = run.summary.get("best")
    if not best:
        scored = [record for record in run.records if record["event"] == "eval" and record["miou"] is not None]
        found = max(scored, key=lambda record: record["miou"], default=None)
        best = {"miou": found["miou"], "step": found["step"]} if found else None
    if not best:
        return ""
    key = next(key for key in best if key != "step")
    return f"Best {SCORES[key]}: {_score(best[key])} at step {best['step']}."


def _classes(record: Record) -> Classes:
    names = tuple(record["iou"])
    return Classes(names, tuple(tuple(colour) for colour in record.get("palette", voc_palette(len(names)))))


def _class_table(record: Record) -> Markup:
    """IoU of each class with a bar, and what the matrix adds: precision, recall, share of the labelled pixels."""
    classes, matrix = _classes(record), np.array(record.get("confusion_matrix", []), np.float64)
    head: list[object] = ["class", "IoU"]
    if len(matrix):
        head += [_number(name, "th") for name in ("precision", "recall", "share of labels")]
        with np.errstate(invalid="ignore", divide="ignore"):
            columns = matrix.diagonal() / matrix.sum(0), matrix.diagonal() / matrix.sum(1), matrix.sum(1) / matrix.sum()
    rows = []
    for index, (name, iou) in enumerate(record["iou"].items()):
        colour = "#{:02x}{:02x}{:02x}".format(*classes.palette[index])
        swatch = tag("span", class_="swatch", style=f"background:{colour}") if "palette" in record else ""
        row: list[object] = [tag("td", swatch, name, class_="text"), tag("td", _bar(iou), _score(iou), class_="bars")]
        if len(matrix):
            precision, recall, share = (float(column[index]) for column in columns)
            row += [_number("-" if np.isnan(value) else f"{value:.4f}") for value in (precision, recall)]
            row += [_number("-" if np.isnan(share) else f"{share:.2%}")]
        rows.append(row)
    return _table(head, rows)


def _bar(share: float | None) -> Markup:
    return tag("span", tag("span", style=f"width:{100 * (share or 0):.1f}%"), class_="bar")


def _curves(run: _Folder, resumed: Sequence[int]) -> Iterable[Markup]:
    if not run.records:
        return
    yield tag("h2", "Curves")
    drawn = run.path / "pictures" / "curves.png"
    sheet = _newer(drawn, run.path / "metrics.jsonl", lambda: pictures.curves(run.records, resumed))
    width, height = sheet.width // 2, sheet.height // 2
    corners = [(left, top) for top in (0, height) for left in (0, width)]
    parts = [sheet.crop((left, top, left + width, top + height)) for left, top in corners]
    figures = [_figure(part, "", alt=title) for part, title in zip(parts, pictures.CURVES.values(), strict=True)]
    yield tag("div", *figures, class_="curves")


def _images(run: _Folder, split: str) -> Iterable[Markup]:
    """The newest panels of a split, and the images with the lowest scores."""
    found = {}
    for path in (run.path / "pictures").glob("*.png"):
        if path.stem.startswith(f"{split}_") and path.stem.removeprefix(f"{split}_").isdecimal():
            found[int(path.stem.removeprefix(f"{split}_"))] = path
    scored = [(name, score) for name, score in run.scores[split].get("image_miou", []) if score is not None]
    worst = run.path / "pictures" / f"{split}_worst.png"
    if not (found or scored or worst.exists()):
        return
    yield tag("h2", f"Images, {split}")
    if found:
        step = max(found)
        yield _photo(found[step], f"At step {step}. Red: label and prediction differ.")
    if worst.exists():
        yield _photo(worst, "The images with the lowest mIoU after the last step.")
    if scored:
        scored.sort(key=lambda pair: pair[1])
        rows = [
            [tag("td", name, class_="text"), tag("td", _bar(score), _score(score), class_="bars")]
            for name, score in scored[:WORST]
        ]
        of = f"the lowest {len(rows)} of {len(scored)} images at step {run.scores[split]['step']}"
        median = f"half of the images score more than {statistics.median(score for _, score in scored):.4f}"
        yield tag("details", tag("summary", f"mIoU of single images: {of}; {median}"), _table(["image", "mIoU"], rows))


def _facts(run: _Folder, resumed: Sequence[int]) -> Iterable[Markup]:
    """What ran where, and how fast."""
    described = {found[1]: found[2] for _, text in run.log if (found := DESCRIBED.fullmatch(text))}
    rows = [[name, text] for name, text in described.items()]
    if resumed:
        rows.append(["resumed at step", ", ".join(map(str, resumed))])
    if trained := run.trained:
        last = trained[-1]
        rows.append(["images/s, median", f"{statistics.median(record['images_per_s'] for record in trained):.1f}"])
        if seconds := [record["step_s"] for record in trained if "step_s" in record]:
            rows.append(["time of its steps", duration(statistics.median(seconds) * last["step"])])
        if waits := [record["data_wait"] for record in trained if "data_wait" in record]:
            rows.append(["waiting for data, mean", f"{statistics.fmean(waits):.1%}"])
        if last.get("memory_gb"):
            rows.append(["most memory", f"{last['memory_gb']:.2f} GB"])
        rows.append(["last loss", "not finite" if last["loss"] is None else f"{last['loss']:.4f}"])
        rows.append(
            [
                "skipped steps",
                f"{last.get('skipped', 0)}" + " (loss or gradient not finite)" * bool(last.get("skipped")),
            ]
        )
    replaced = sum(len(record["faults"]) for record in run.records if record["event"] == "replaced")
    if replaced:
        rows.append(["broken images that others stood in for", str(replaced)])
    if rows:
        yield tag("h2", "Run")
        yield _table([], [[tag("th", name, scope="row"), tag("td", value, class_="text")] for name, value in rows])


def _notes(run: _Folder) -> Iterable[Markup]:
    """What the log says beside progress and scores."""
    lines = [f"{when} {text}" for when, text in run.log if not ROUTINE.match(text)]
    if not lines:
        return
    yield tag("h2", "Log")
    half = SHOWN_LINES // 2
    if len(lines) > SHOWN_LINES:
        lines = [*lines[:half], f"… {len(lines) - SHOWN_LINES} lines are left out …", *lines[-half:]]
    yield tag("p", "Without progress and scores; all of it is in log.txt.", class_="soft")
    yield tag("pre", "\n".join(lines), class_="log")


def _settings(run: _Folder) -> Iterable[Markup]:
    if run.config:
        yield tag("h2", "Config")
        yield tag("details", tag("summary", "config.yaml"), tag("pre", run.config))
    known = run.summary.get("versions")
    if known:
        yield tag("p", "Run with " + _versions(known), class_="soft")
    yield tag(
        "p",
        f"Written {time.strftime(STAMP)}" + ("" if known == versions() else f" with {_versions(versions())}"),
        class_="soft",
    )


def _versions(known: dict[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in known.items())


def _score(value: float | None) -> str:
    return "absent" if value is None else f"{value:.4f}"


def _number(value: object, name: str = "td") -> Markup:
    return tag(name, value, class_="number")


def _table(head: Sequence[object], rows: Sequence[Sequence[object]]) -> Markup:
    """Cells are text, or whole <td> or <th> elements. A table that is too wide scrolls by itself."""

    def row(cells: Sequence[object], name: str) -> Markup:
        return tag("tr", *(cell if isinstance(cell, Markup) else tag(name, cell) for cell in cells))

    body = tag("tbody", *(row(cells, "td") for cells in rows))
    table = tag("table", *([tag("thead", row(head, "th"))] if head else []), body)
    return tag("div", table, class_="scroll")


def _newer(path: Path, source: Path, draw: Callable[[], Image.Image]) -> Image.Image:
    """The picture that was drawn from `source`, unless it is older, missing or broken: then it is drawn again."""
    with contextlib.suppress(OSError):
        if path.stat().st_mtime >= source.stat().st_mtime:
            with Image.open(path) as picture:
                return picture.convert("RGB")
    return draw()


def _photo(path: Path, caption: str) -> Markup:
    try:
        with Image.open(path) as picture:
            return _figure(picture.convert("RGB"), caption, wide=True, photo=True)
    except OSError as error:
        return tag("p", f"{path.name}: cannot be read ({error})", class_="soft")


def _figure(picture: Image.Image, caption: str, alt: str = "", wide: bool = False, photo: bool = False) -> Markup:
    kind, content = _encoded(picture, photo)
    source = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
    image = tag("img", src=source, alt=alt or caption, width=picture.width, height=picture.height)
    inside = [tag("div", image, class_="scroll wide") if wide else image]
    return tag("figure", *inside, *([tag("figcaption", caption)] if caption else []))


def _encoded(picture: Image.Image, photo: bool) -> tuple[str, bytes]:
    """(type, bytes): PNG, or JPEG for photographs; what is too large becomes a smaller JPEG until it is not."""
    kind = "jpeg" if photo else "png"
    while True:
        file = io.BytesIO()
        picture.save(file, kind, **({"quality": 85, "subsampling": 0} if kind == "jpeg" else {}))
        if file.tell() <= PICTURE_BYTES:
            return kind, file.getvalue()
        if kind == "jpeg":
            picture = picture.resize(
                (max(1, picture.width * 4 // 5), max(1, picture.height * 4 // 5)), Image.Resampling.BOX
            )
        kind = "jpeg"
