"""What a run records: metrics.jsonl, one plain dict per line, and summary.json.

Every record has "event" and "step" (finished steps). "train", "eval" and "replaced" are about a step. "start",
"resume", "stop", "finish", "warning", "note" and "failure" say what happened to the run, at "time".
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from fcn.files import write_atomically

Record = dict[str, Any]
STEP_EVENTS = ("train", "eval", "replaced")
TIME_FORMAT = "%Y-%m-%d %H:%M:%S"


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
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            record = json.loads(line)
            fields = record if isinstance(record, dict) else {}
            if isinstance(fields.get("event"), str) and isinstance(fields.get("step"), int):
                yield line, fields


def resumed_steps(records: Iterable[Record]) -> list[int]:
    """The steps at which a run was resumed."""
    return [record["step"] for record in records if record["event"] == "resume"]


def read_summary(folder: Path) -> Record:
    """Read summary.json from a run directory; empty if it does not exist yet."""
    try:
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8", errors="replace"))
    except (OSError, json.JSONDecodeError):
        return {}
    return summary if isinstance(summary, dict) else {}


def scores_name(split: str) -> str:
    """The name of the file with the details of a split's last evaluation."""
    return f"scores_{split}.json"
