"""What a run shows people: lines on the terminal and in log.txt, a progress line, scores as text."""

from __future__ import annotations

import atexit
import os
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from fcn.metrics import CLASS_METRICS, METRICS, shown
from fcn.text import duration, plural, printable, table
from fcn.tracking.metrics_file import LineFile
from fcn.tracking.records import TIME_FORMAT, Record, event
from fcn.tracking.tracker import Tracker


class Console(Tracker):
    """Lines for people, with the time, or on a terminal with a progress line that is rewritten in place.

    Everything also goes to `log_file`, as plain lines. A full disk or a closed pipe stops only that output, and lines
    that do not fit the disk are written when there is room.
    """

    def __init__(self, stream: TextIO | None = None, log_file: Path | None = None) -> None:
        self.stream: TextIO | None = sys.stdout if stream is None else stream
        self.file = LineFile(log_file) if log_file else None
        self.live = bool(self.stream and self.stream.isatty())
        self._width = 0
        self._failed = False
        self._unlabelled: set[str] = set()
        """Splits without a labelled pixel that were warned of."""
        self._lock = threading.Lock()
        """Other threads write, too: the saver its warnings, and the signals' thread."""
        self._pending: list[Record] = []
        self._log: Callable[[Record], None] = self._pending.append

    @classmethod
    def silent(cls) -> Console:
        """A console without output, for ranks other than 0."""
        return cls(stream=open(os.devnull, "w"))

    def line(self, text: str) -> None:
        for one in text.splitlines():
            self._write(one, end="\n")

    def warning(self, text: str) -> None:
        """Show and record that something is wrong, although the run goes on."""
        self.line(f"warning: {text}")
        self.record(event("warning", text=text))

    def note(self, text: str) -> None:
        """Show and record something that the user should know."""
        self.line(f"note: {text}")
        self.record(event("note", text=text))

    def record(self, record: Record) -> None:
        """Pass a record to the trackers; `attach` delivers those from before there are any."""
        self._log(record)

    def attach(self, log: Callable[[Record], None]) -> None:
        """Deliver the records so far, and all later ones, to `log`."""
        self._log, pending, self._pending = log, self._pending, []
        for record in pending:
            log(record)

    def progress(self, text: str) -> None:
        self._write(text, end="" if self.live else "\n")

    def _write(self, text: str, end: str) -> None:
        text = printable(text)
        stamped = f"{time.strftime(TIME_FORMAT)} {text}"
        with self._lock:
            if self.file:
                self.file.append(stamped)
            try:
                if self.live:
                    # A progress line that wraps cannot be rewritten.
                    visible = text if end else _fitting(text, os.get_terminal_size(self.stream.fileno()).columns - 1)
                    padding = " " * (self._width - len(visible))
                    self._width = 0 if end else len(visible)
                    print(f"\r{visible}{padding}", end=end, file=self.stream, flush=True)
                elif self.stream:
                    print(stamped, file=self.stream, flush=True)
            except OSError as error:
                if not self._failed:
                    self._failed = True
                    atexit.register(_abandon_unless_written, self.stream)
                if self.live or isinstance(error, BrokenPipeError):  # a file takes the rest when there is room again
                    self.live, self.stream = False, None

    def log(self, record: Record) -> None:
        if record["event"] == "train":
            # The most important fields come first, because a narrow terminal cuts the line off.
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
        elif record["event"] == "eval":
            self.line(score_line(record))
            split, problem = record["split"], nothing_to_score(record)
            if problem and split not in self._unlabelled:
                self._unlabelled.add(split)
                self.warning(problem)


def _fitting(text: str, width: int) -> str:
    """As many complete fields of a progress line as fit."""
    if len(text) <= width:
        return text
    return text[: width + 1].rpartition("  ")[0].rstrip() or text[:width]


def _abandon_unless_written(stream: TextIO) -> None:
    """Avoid exit status 120, which Python uses if standard output cannot be written at the end."""
    try:
        stream.flush()
    except OSError:
        with open(os.devnull, "w") as nothing:
            os.dup2(nothing.fileno(), stream.fileno())


def score_line(record: Record) -> str:
    """All metrics of an evaluation in one line."""
    parts = [f"{title} {score}" for title, score in _scores(record)]
    parts[0] += f" over {record['classes']} classes"
    head = f"{record['split']} at step {record['step']} ({record['protocol']}): "
    return head + ", ".join([*parts, f"{record['images']} images"])


def nothing_to_score(record: Record) -> str | None:
    """Why an evaluation has no score, and what to do; None if it has one."""
    if record["miou"] is not None:
        return None
    return (
        f"split '{record['split']}': no pixel of its {plural(record['images'], 'image')} is labelled, so there is "
        f"nothing to score; correct its masks, data.values or loss.ignore_index, or choose another split"
    )


def score_table(record: Record) -> str:
    """The scores of each class, and below them those of the split."""
    columns = {key: metric.title for key, metric in CLASS_METRICS.items() if key in record}
    classes = [["", *columns.values()]]
    classes += [[name, *(shown(record[key][name]) for key in columns)] for name in record["iou"]]
    split = _scores(record)
    line = "-" * max(len(row[0]) for row in [*classes, *split])
    rows = [*classes, [line], *split]
    return textwrap.indent(table([row + [""] * (1 + len(columns) - len(row)) for row in rows]), "  ")


def _scores(record: Record) -> list[list[str]]:
    """Title and score of each metric in a record; records of older versions lack some."""
    return [[metric.title, shown(record[key])] for key, metric in METRICS.items() if key in record]
