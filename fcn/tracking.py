"""What is recorded and shown: console, log file, metrics.jsonl, Weights & Biases. Rank 0 only, and no collective.

A record is a plain dict with "event" ("train", "eval" or "replaced") and "step" (finished steps). A tracker that fails
is named once and dropped: it never stops training. What a full disk does not take of metrics.jsonl and log.txt is kept.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol, TextIO

import numpy as np

from fcn.data.labels import Classes

Record = dict[str, Any]


class Sample(NamedTuple):
    """An image of a split, and what the network made of it."""

    image: np.ndarray
    """(H, W, 3) uint8."""
    labels: np.ndarray
    """(h, w) uint8, 255 = ignore."""
    predictions: np.ndarray
    """(h, w) integer."""
    caption: str


class Scores(NamedTuple):
    """What an evaluation found beside its record, to be shown."""

    record: Record
    classes: Classes
    confusion_matrix: np.ndarray
    """(C, C) int64, labels down, predictions across."""
    samples: Sequence[Sample]
    """The same images of the split every time."""


class Tracker(Protocol):
    """Receives every record once, in order, and the summary at the end."""

    def log(self, record: Record) -> None: ...

    def show(self, scores: Scores) -> None:
        """After the record of an evaluation."""

    def alert(self, title: str, text: str) -> None:
        """Something that who started the run may want to know at once."""

    def flush(self) -> str | None:
        """Write what is still to be written; returns what cannot be, and why."""

    def close(self, summary: Record) -> None: ...


class LineFile:
    """A text file that grows by whole lines. Those that a full disk does not take are kept until it does."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("ab", buffering=0)
        self._kept = b""

    @property
    def kept(self) -> int:
        """How many lines are not in the file."""
        return self._kept.count(b"\n")

    def append(self, line: str) -> str | None:
        """Returns why the line is not in the file yet."""
        self._kept += line.encode(errors="backslashreplace") + b"\n"
        return self.flush()

    def flush(self) -> str | None:
        """Write the lines that are kept; returns why they cannot be written."""
        text, done = self._kept, 0
        try:
            while done < len(text):
                done += self._file.write(text[done:])
        except OSError as error:
            whole = text.rfind(b"\n", 0, done) + 1
            with contextlib.suppress(OSError):  # half a line is no good to a reader; else go on in its middle
                os.ftruncate(self._file.fileno(), os.fstat(self._file.fileno()).st_size - (done - whole))
                done = whole
            return error.strerror or str(error)
        finally:
            self._kept = text[done:]
        return None

    def close(self) -> None:
        self._file.close()


class Console:
    """Lines for people: on a terminal a progress line that is rewritten in place, elsewhere plain lines with the time.

    Everything also goes to `log_file`, as plain lines. A full disk or a closed pipe hinders that output alone, and
    lines that a disk does not take are written when it does.
    """

    def __init__(self, stream: TextIO | None = None, log_file: Path | None = None) -> None:
        self.stream: TextIO | None = sys.stdout if stream is None else stream
        self.file = LineFile(log_file) if log_file else None
        self.live = bool(self.stream and self.stream.isatty())
        self._width = 0
        self._failed = False
        self._lock = threading.Lock()
        """A save that fails says so from its own thread."""

    @classmethod
    def silent(cls) -> Console:
        """For the ranks that do not speak."""
        return cls(stream=open(os.devnull, "w"))

    def line(self, text: str) -> None:
        for one in text.splitlines():
            self._write(one, end="\n")

    def progress(self, text: str) -> None:
        self._write(text, end="" if self.live else "\n")

    def _write(self, text: str, end: str) -> None:
        with self._lock:
            self._write_locked(text, end)

    def _write_locked(self, text: str, end: str) -> None:
        stamped = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}"
        if self.file:
            self.file.append(stamped)
        try:
            if self.live:
                # A progress line that wraps could not be rewritten.
                shown = text if end else _fitting(text, os.get_terminal_size(self.stream.fileno()).columns - 1)
                padding = " " * (self._width - len(shown))
                self._width = 0 if end else len(shown)
                print(f"\r{shown}{padding}", end=end, file=self.stream, flush=True)
            elif self.stream:
                print(stamped, file=self.stream, flush=True)
        except OSError as error:
            if not self._failed:
                self._failed = True
                atexit.register(_abandon_unless_written, self.stream)
            if self.live or isinstance(error, BrokenPipeError):  # a file takes the rest when there is room again
                self.live, self.stream = False, None

    def flush(self) -> None:
        pass  # every line has been tried

    def show(self, scores: Scores) -> None:
        pass  # it has no pictures

    def alert(self, title: str, text: str) -> None:
        pass  # what happened has its own line

    def log(self, record: Record) -> None:
        if record["event"] == "train":
            # What matters most comes first: a terminal of 80 columns shows no more than a progress line has room for.
            parts = (
                f"step {record['step']}/{record['steps']}",
                "loss not finite" if record["loss"] is None else f"loss {record['loss']:.4f}",
                f"{record['images_per_s']:.1f} images/s",
                f"ETA {duration(record['eta_s'])}",
                f"data wait {record['data_wait']:.0%}",
                *([f"save wait {record['save_wait']:.0%}"] if record.get("save_wait", 0) >= 0.005 else []),
                f"lr {record['lr']:.2e}",
                f"epoch {record['epoch']:.2f}",
                *([f"{record['of_peak']:.0%} of peak"] if "of_peak" in record else []),
            )
            self.progress("  ".join(parts))
        elif record["event"] == "replaced":
            for fault in dict.fromkeys(record["faults"]):
                self.line(f"warning: {fault}")
            self.line(f"epoch {record['epoch']}: {len(record['faults'])} broken images were replaced by others")
        else:
            self.line(score_line(record))

    def close(self, summary: Record) -> None:
        pass  # there is still something to say


def _fitting(text: str, width: int) -> str:
    """As many whole fields of a progress line as fit."""
    if len(text) <= width:
        return text
    return text[: width + 1].rpartition("  ")[0].rstrip() or text[:width]


class JsonLines:
    """metrics.jsonl: one record a line. JSON knows no infinity (of an fp16 gradient, say): it becomes null.

    Lines that cannot be written are said through `warn` once, and written as soon as they can be: no step is missing.
    """

    def __init__(self, path: Path, warn: Callable[[str], None] = lambda text: None) -> None:
        self.file, self.warn = LineFile(path), warn
        self._behind = False

    def log(self, record: Record) -> None:
        finite = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in record.items()
        }
        reason = self.file.append(json.dumps(finite, allow_nan=False))
        if reason and not self._behind:
            self.warn(f"warning: {self._problem(reason)}; it is kept and written when there is room; free space there")
        self._behind = reason is not None

    def show(self, scores: Scores) -> None:
        pass  # what it needs is in the record

    def alert(self, title: str, text: str) -> None:
        pass  # nobody reads along

    def flush(self) -> str | None:
        reason = self.file.flush()
        return self._problem(reason) if reason else None

    def _problem(self, reason: str) -> str:
        return f"{self.file.path}: {self.file.kept} line(s) cannot be written ({reason})"

    def close(self, summary: Record) -> None:
        self.flush()
        self.file.close()


class Trackers:
    """Several trackers as one. One that raises is reported through `warn` and dropped."""

    def __init__(self, warn: Callable[[str], None]) -> None:
        self.warn = warn
        self.trackers: list[Tracker] = []

    def add(self, build: Callable[[], Tracker]) -> None:
        self.attempt(lambda: self.trackers.append(build()), "starting a tracker")

    def log(self, record: Record) -> None:
        self._each(lambda tracker: tracker.log(record))

    def show(self, scores: Scores) -> None:
        self._each(lambda tracker: tracker.show(scores))

    def alert(self, title: str, text: str) -> None:
        self._each(lambda tracker: tracker.alert(title, text))

    def _each(self, action: Callable[[Tracker], None]) -> None:
        for tracker in list(self.trackers):
            if not self.attempt(lambda tracker=tracker: action(tracker), type(tracker).__name__):
                self.trackers.remove(tracker)

    def flush(self) -> list[str]:
        """Write what is still to be written; returns what cannot be."""
        return [problem for tracker in self.trackers if (problem := tracker.flush())]

    def close(self, summary: Record) -> None:
        for tracker in self.trackers:
            self.attempt(lambda tracker=tracker: tracker.close(summary), type(tracker).__name__)

    def attempt(self, action: Callable[[], Any], what: str) -> bool:
        """Do what no training run should die of; returns whether it worked."""
        try:
            action()
        except Exception as error:
            self.warn(f"warning: {what} failed; training goes on without ({type(error).__name__}: {error})")
            return False
        return True


def rewind_metrics(path: Path, step: int, final_split: str | None) -> None:
    """Drop the records of steps that a resumed run will do again, and a line that a crash cut in half.

    The score of `final_split` is taken after the last checkpoint, so it is done again too.
    """
    if path.exists():
        kept = [
            line + "\n"
            for line, record in _whole_lines(path)
            if record["step"] <= step and not (final_split and record.get("split") == final_split)
        ]
        write_atomically(path, "".join(kept))


def read_records(path: Path) -> list[Record]:
    """metrics.jsonl, without a line that a crash cut in half; empty if there is no such file yet."""
    return [record for _, record in _whole_lines(path)] if path.exists() else []


def _whole_lines(path: Path) -> Iterator[tuple[str, Record]]:
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            yield line, json.loads(line)


def read_summary(folder: Path) -> Record:
    """summary.json of a run directory; empty if there is none yet."""
    try:
        return json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return {}


def write_atomically(path: Path, text: str) -> None:
    """Replace a text file so that a crash leaves the old one or the new one."""
    with replacing(path) as file:
        file.write(text.encode())


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of `path` when all of it is on the disk.

    After an error what was there before still is, and nothing half-written takes room.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def _abandon_unless_written(stream: TextIO) -> None:
    """Python turns the exit status of a process whose standard output cannot be written at its end into 120."""
    try:
        stream.flush()
    except OSError:
        with open(os.devnull, "w") as nothing:
            os.dup2(nothing.fileno(), stream.fileno())


def duration(seconds: float) -> str:
    """Hours, minutes, seconds: 3:05:07, 12:30, 0:09."""
    minutes, s = divmod(int(seconds + 0.5), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"


def score_line(record: Record) -> str:
    parts = (
        f"{record['split']} at step {record['step']} ({record['protocol']}): "
        f"mIoU {_score(record['miou'])} over {record['classes']} classes",
        f"pixel accuracy {_score(record['pixel_acc'])}",
        f"mean accuracy {_score(record['mean_acc'])}",
        f"fw IoU {_score(record['fw_iou'])}",
        f"{record['images']} images",
    )
    return ", ".join(parts)


def score_table(record: Record) -> str:
    """Per-class IoU and the means, as text."""
    width = max(len(name) for name in [*record["iou"], "pixel accuracy"])
    rows = [f"  {name:<{width}}  {_score(value)}" for name, value in record["iou"].items()]
    means = {"mIoU": "miou", "pixel accuracy": "pixel_acc", "mean accuracy": "mean_acc", "fw IoU": "fw_iou"}
    rows += [
        f"  {'-' * width}  ------",
        *(f"  {title:<{width}}  {_score(record[key])}" for title, key in means.items()),
    ]
    return "\n".join(rows)


def _score(value: float | None) -> str:
    return "absent" if value is None else f"{value:.4f}"
