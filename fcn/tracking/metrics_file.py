"""Files that grow by whole lines: metrics.jsonl and log.txt."""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path

from fcn.tracking.records import TIME_FORMAT, Record, event, read_records
from fcn.tracking.tracker import Tracker


class LineFile:
    """A text file that grows by whole lines. Lines that a full disk does not take are kept until there is room."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("ab", buffering=0)
        self._kept = b""

    @property
    def kept(self) -> int:
        """Number of lines that are not in the file yet."""
        return self._kept.count(b"\n")

    def append(self, line: str) -> str | None:
        """Append a line; returns why it is not in the file yet, or None."""
        self._kept += line.encode(errors="backslashreplace") + b"\n"
        return self.flush()

    def flush(self) -> str | None:
        """Write the kept lines; returns why they cannot be written, or None."""
        text, done = self._kept, 0
        try:
            while done < len(text):
                done += self._file.write(text[done:])
        except OSError as error:
            whole = text.rfind(b"\n", 0, done) + 1
            with contextlib.suppress(OSError):  # do not leave half a line to a reader
                os.ftruncate(self._file.fileno(), os.fstat(self._file.fileno()).st_size - (done - whole))
                done = whole
            return error.strerror or str(error)
        finally:
            self._kept = text[done:]
        return None


class MetricsFile(Tracker):
    """metrics.jsonl: one record per line. JSON has no infinity (for example of an fp16 gradient): it becomes null.

    If lines cannot be written, it warns once through `warn` and writes them as soon as possible, so no step is missing.
    """

    def __init__(self, path: Path, warn: Callable[[str], None] = lambda text: None) -> None:
        records = read_records(path)
        self.file, self.warn = LineFile(path), warn
        self._step = records[-1]["step"] if records else 0
        self._behind = False

    def log(self, record: Record) -> None:
        self._step = record.get("step", self._step)
        finite = {"event": record["event"], "step": self._step} | {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in record.items()
        }
        reason = self.file.append(json.dumps(finite, allow_nan=False))
        was_behind, self._behind = self._behind, reason is not None  # before the warning, which is a record, too
        if reason and not was_behind:
            self.warn(f"{self._problem(reason)}; it is kept and written when there is room; free space there")

    def flush(self) -> str | None:
        reason = self.file.flush()
        return self._problem(reason) if reason else None

    def _problem(self, reason: str) -> str:
        return f"{self.file.path}: {self.file.kept} line(s) cannot be written ({reason})"

    def close(self, summary: Record) -> None:
        self.flush()  # the file stays open for warnings of trackers that close later


def record_failure(folder: Path, text: str) -> None:
    """Write why a run has failed into its log.txt and metrics.jsonl, from whichever process knows."""
    now = time.strftime(TIME_FORMAT)
    with contextlib.suppress(OSError):  # the disk may be the cause
        log = LineFile(folder / "log.txt")
        for line in text.splitlines():
            log.append(f"{now} error: {line}")
        MetricsFile(folder / "metrics.jsonl").log(event("failure", text=text))
