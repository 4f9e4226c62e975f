"""What a run records: metrics.jsonl, one plain dict per line, and summary.json.

Every record has "event" and "step" (finished steps). "train", "eval" and "replaced" are about a step. "start",
"resume", "stop", "finish", "warning", "note" and "failure" say what happened to the run, at "time".
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from fcn.errors import InputError
from fcn.files import read_text, write_atomically
from fcn.metrics import CLASS_METRICS, METRICS

Record = dict[str, Any]
STEP_EVENTS = ("train", "eval", "replaced")
MOST_SUMMARY, MOST_METRICS = 10_000_000, 200_000_000
"""Bytes that are read from a run directory of anybody's; 200 MB are five million steps with a record for each ten."""
TIME_FORMAT = "%Y-%m-%d %H:%M:%S"


LARGEST = 1e300
"""Of the numbers in a file; larger ones could not be shown."""


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and abs(value) < LARGEST  # false for NaN


def _is_score(value: object) -> bool:
    return value is None or _is_number(value)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and 0 <= value < LARGEST


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _are_texts(value: object) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


def _are_texts_by_name(value: object) -> bool:
    return isinstance(value, dict) and all(map(_is_text, value.values()))


def _are_scores_by_name(value: object) -> bool:
    return isinstance(value, dict) and all(map(_is_score, value.values()))


def _is_best(value: object) -> bool:
    return value is None or (
        isinstance(value, dict)
        and _is_count(value.get("step"))
        and all(map(_is_score, value.values()))
        and any(key in METRICS for key in value)
    )


def _is_matrix(value: object) -> bool:
    return isinstance(value, list) and all(
        isinstance(row, list) and len(row) == len(value) and all(map(_is_count, row)) for row in value
    )


def _are_scored_images(value: object) -> bool:
    return isinstance(value, list) and all(
        isinstance(pair, list) and len(pair) == 2 and _is_text(pair[0]) and _is_score(pair[1]) for pair in value
    )


def _is_palette(value: object) -> bool:
    return isinstance(value, list) and all(
        isinstance(colour, list) and len(colour) == 3 and all(_is_count(x) and x < 256 for x in colour)
        for colour in value
    )


FIELDS: dict[str, Callable[[object], bool]] = {
    **dict.fromkeys(("event", "time", "text", "split", "protocol", "status", "checkpoint"), _is_text),
    **dict.fromkeys(("step", "steps", "skipped", "ignore_index"), _is_count),
    **dict.fromkeys(("images_per_s", "lr", "epoch", "step_s", "data_wait", "save_wait", "eta_s"), _is_number),
    **dict.fromkeys(("loss", "grad_norm", "memory_gb", "of_peak", *METRICS), _is_score),
    **dict.fromkeys(CLASS_METRICS, _are_scores_by_name),
    **dict.fromkeys(("faults", "changes", "unsaved"), _are_texts),
    **dict.fromkeys(("facts", "versions"), _are_texts_by_name),
    "images": lambda value: value is None or _is_count(value),
    "classes": lambda value: _is_count(value) or _are_texts(value),
    "best": _is_best,
    "confusion_matrix": _is_matrix,
    "image_miou": _are_scored_images,
    "palette": _is_palette,
}
"""What a field contains, wherever it occurs. A report relies on it, and the file that it reads may be foreign."""
NEEDED = {
    "train": ("steps", "loss", "images_per_s", "lr"),
    "eval": ("split", "miou", "iou", "images", "protocol"),
    "replaced": ("epoch", "faults"),
}
"""By event, the fields that a record must have beside `event` and `step`."""


def is_sound(record: object, *needed: str) -> bool:
    """Whether a record from a file has the needed fields and those of its event, and each contains what it should."""
    if not isinstance(record, dict):
        return False
    wanted = (*needed, *NEEDED.get(str(record.get("event")), ()))
    return all(key in record for key in wanted) and all(
        FIELDS[key](value) for key, value in record.items() if key in FIELDS
    )


def event(kind: str, **fields: Any) -> Record:
    """A record of something that happens to a run now; without a step it gets that of the record before it."""
    return {"event": kind, "time": time.strftime(TIME_FORMAT), **fields}


def rewind_metrics(path: Path, step: int, final_split: str | None) -> None:
    """Drop the records of steps that a resumed run will repeat, and a line that a crash cut in half.

    Events of the run stay: its starts, warnings and failures. The score of `final_split` is computed after the last
    checkpoint, so it will be repeated, too.
    """
    if path.exists():
        kept = [
            line + "\n"
            for line, record in _whole_lines(path)
            if record["event"] not in STEP_EVENTS
            or (record["step"] <= step and not (final_split and record.get("split") == final_split))
        ]
        write_atomically(path, "".join(kept))


def read_records(path: Path) -> list[Record]:
    """Read metrics.jsonl, empty if it is missing, without lines that are no record, as one that a crash cut in half."""
    return [record for _, record in _whole_lines(path)] if path.exists() else []


def _whole_lines(path: Path) -> Iterator[tuple[str, Record]]:
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            with contextlib.suppress(ValueError, RecursionError):
                record = json.loads(line)
                fields = record if isinstance(record, dict) else {}
                if isinstance(fields.get("event"), str) and isinstance(fields.get("step"), int):
                    yield line.rstrip("\n"), fields


def resumed_steps(records: Iterable[Record]) -> list[int]:
    """The steps at which a run was resumed."""
    return [record["step"] for record in records if record["event"] == "resume"]


def read_summary(folder: Path) -> Record:
    """Read summary.json from a run directory; empty if it does not exist yet."""
    try:
        summary = json.loads(read_text(folder / "summary.json", MOST_SUMMARY, errors="replace"))
    except (OSError, ValueError, RecursionError):
        return {}
    return summary if isinstance(summary, dict) else {}


def read_foreign(folder: Path) -> tuple[list[Record], Record]:
    """(records, summary) of a run directory of anybody's: what a reader cannot rely on is left out.

    Raises:
        InputError: there are more records than a reader has memory for.
    """
    summary, path = read_summary(folder), folder / "metrics.jsonl"
    if path.exists() and not (path.is_file() and path.stat().st_size <= MOST_METRICS):
        raise InputError(f"{path}: not a file of at most {MOST_METRICS / 1e6:g} MB; give a run with fewer records")
    records = [record for record in read_records(path) if is_sound(record)]
    return records, summary if is_sound(summary, "status", "step", "steps") else {}


def scores_name(split: str) -> str:
    """The name of the file with the details of a split's last evaluation."""
    return f"scores_{split}.json"
