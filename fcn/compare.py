"""Runs side by side: how their configs differ, and what came of them. Read from their folders; nothing is computed."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from fcn.config import flatten
from fcn.errors import InputError
from fcn.tracking import Record, duration, read_records, read_summary

SCORES = {"miou": "mIoU", "pixel_acc": "pixel accuracy", "mean_acc": "mean accuracy", "fw_iou": "fw IoU"}


def compare(folders: Sequence[Path]) -> str:
    """A table with a column a run: keys of the config that are not equal in all of them, then progress and scores.

    Raises:
        InputError: a folder is none of a run.
    """
    configs = [_config(folder) for folder in folders]
    records = [read_records(folder / "metrics.jsonl") for folder in folders]
    keys = sorted({key for config in configs for key in config} - {"run_dir"})
    differing = [key for key in keys if len({json.dumps(config.get(key)) for config in configs}) > 1]
    rows = [[key, *(_value(config.get(key)) for config in configs)] for key in differing]
    rows = rows or [["no key of the config differs", *[""] * len(folders)]]
    results = [_results(read_summary(folder), lines) for folder, lines in zip(folders, records, strict=True)]
    rows += [[], *([name, *(result.get(name, "-") for result in results)] for name in _names(results))]
    return _table([["", *_titles(folders)], *rows])


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.yaml"
    try:
        return flatten(yaml.safe_load(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise InputError(f"{folder}: no run is there (no {path.name}); give folders that training made") from None
    except (OSError, yaml.YAMLError, AttributeError) as error:
        raise InputError(f"{path}: cannot be read ({error}); give folders that training made") from None


def _results(summary: Record, records: Sequence[Record]) -> dict[str, str]:
    """Rows of one run, by their names."""
    trained = [record for record in records if record["event"] == "train"]
    scored = [record for record in records if record["event"] == "eval"]
    found = {"status": summary.get("status", "running or dead"), "step": "0"}
    if trained:
        last = trained[-1]
        found["step"] = f"{last['step']}/{last['steps']}"
        found["loss"] = "not finite" if last["loss"] is None else f"{last['loss']:.4f}"
        found["images/s, median"] = f"{statistics.median(record['images_per_s'] for record in trained):.1f}"
        seconds = [record["step_s"] for record in trained if "step_s" in record]
        found |= {"time of its steps": duration(statistics.median(seconds) * last["step"])} if seconds else {}
    if scored:
        last = scored[-1]
        found["scored"] = f"{last['split']} at {last['step']}, {last['images']} images, {last['protocol']}"
        found |= {title: _score(last[key]) for key, title in SCORES.items()}
        found |= {f"IoU {name}": _score(value) for name, value in last["iou"].items()}
    best = summary.get("best")
    if best:
        key = next(key for key in best if key != "step")
        found["best"] = f"{SCORES[key]} {_score(best[key])} at {best['step']}"
    return found


def _names(results: Sequence[dict[str, str]]) -> list[str]:
    """Of the rows of all runs, in their order."""
    return list(dict.fromkeys(name for result in results for name in result))


def _score(value: float | None) -> str:
    return "absent" if value is None else f"{value:.4f}"


def _value(value: Any) -> str:
    return "null" if value is None else str(value)


def _titles(folders: Sequence[Path]) -> list[str]:
    """The last parts of their paths, as many as tell them apart."""
    for parts in range(1, max(len(folder.parts) for folder in folders) + 1):
        titles = [str(Path(*folder.parts[-parts:])) for folder in folders]
        if len(set(titles)) == len(titles):
            return titles
    return [str(folder) for folder in folders]


def _table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in rows if row) for column in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)
