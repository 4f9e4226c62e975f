"""Runs side by side: where their configs differ, how far they are and what they score, read from their directories."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fcn.config import read_saved_config
from fcn.errors import InputError
from fcn.metrics import CLASS_METRICS, METRICS, best_metric, shown
from fcn.text import duration, table
from fcn.tracking import Record, read_foreign


def compare_runs(folders: Sequence[Path]) -> str:
    """A table with a column for each run: the config keys that differ, then progress and scores.

    Raises:
        InputError: a directory is not one of a run.
    """
    configs = [_config(folder) for folder in folders]
    keys = sorted({key for config in configs for key in config} - {"run_dir"})
    differing = [key for key in keys if len({json.dumps(config.get(key)) for config in configs}) > 1]
    rows = [[key, *(_value(config.get(key)) for config in configs)] for key in differing]
    rows = rows or [["no key of the config differs", *[""] * len(folders)]]
    results = [_results(*read_foreign(folder)) for folder in folders]
    rows += [[], *([name, *(result.get(name, "-") for result in results)] for name in _names(results))]
    return table([["", *_titles(folders)], *rows])


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.yaml"
    try:
        return read_saved_config(path)
    except FileNotFoundError:
        raise InputError(f"{folder}: no run is there (no {path.name}); give directories that training wrote") from None


def _results(records: Sequence[Record], summary: Record) -> dict[str, str]:
    """The rows of one run: name → value."""
    trained = [record for record in records if record["event"] == "train"]
    scored = [record for record in records if record["event"] == "eval"]
    found = {"status": summary.get("status", "running or dead"), "step": "0"}
    if trained:
        last = trained[-1]
        found["step"] = f"{last['step']}/{last['steps']}"
        found["loss"] = "not finite" if last["loss"] is None else f"{last['loss']:.4f}"
        found["images/s, median"] = f"{statistics.median(record['images_per_s'] for record in trained):.1f}"
        seconds = [record["step_s"] for record in trained if "step_s" in record]
        found |= {"training time": duration(statistics.median(seconds) * last["step"])} if seconds else {}
    if scored:
        last = scored[-1]
        found["scored"] = f"{last['split']} at {last['step']}, {last['images']} images, {last['protocol']}"
        found |= {metric.title: shown(last[key]) for key, metric in METRICS.items() if key in last}
        for key, metric in CLASS_METRICS.items():
            found |= {f"{metric.title} {name}": shown(value) for name, value in last.get(key, {}).items()}
    best = summary.get("best")
    if best:
        key = best_metric(best)
        found["best"] = f"{METRICS[key].title} {shown(best[key])} at {best['step']}"
    return found


def _names(results: Sequence[dict[str, str]]) -> list[str]:
    """The names of the rows of all runs, in order."""
    return list(dict.fromkeys(name for result in results for name in result))


def _value(value: Any) -> str:
    return "null" if value is None else str(value)


def _titles(folders: Sequence[Path]) -> list[str]:
    """The last parts of their paths, as many as it takes to tell them apart."""
    for parts in range(1, max(len(folder.parts) for folder in folders) + 1):
        titles = [str(Path(*folder.parts[-parts:])) for folder in folders]
        if len(set(titles)) == len(titles):
            return titles
    return [str(folder) for folder in folders]
