"""Trackers receive the records of a run, on rank 0 only and without any collective."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from fcn.tracking.records import Record

if TYPE_CHECKING:
    import numpy as np

    from fcn.data import Classes


class Sample(NamedTuple):
    """An image of a split and the network's prediction."""

    image: np.ndarray
    """(H, W, 3) uint8."""
    labels: np.ndarray
    """(h, w) uint8, 255 = ignore."""
    predictions: np.ndarray
    """(h, w) integer."""
    caption: str


class Scores(NamedTuple):
    """The result of an evaluation, to be shown."""

    record: Record
    classes: Classes
    confusion_matrix: np.ndarray
    """(C, C) int64, labels down, predictions across."""
    samples: Sequence[Sample]
    """The same images of the split in every evaluation."""


class Tracker:
    """Receives every record once, in order, and the summary at the end."""

    def log(self, record: Record) -> None:
        """Receive a record of the run, see `fcn.tracking.records`."""

    def show(self, scores: Scores) -> None:
        """Show an evaluation, after its record."""

    def alert(self, title: str, text: str) -> None:
        """Tell the owner of the run something immediately."""

    def flush(self) -> str | None:
        """Write what is pending; returns what cannot be written and why, or None."""

    def close(self, summary: Record) -> None:
        """End the run."""


class Trackers:
    """Several trackers as one. A tracker that raises is dropped with a warning: it never stops training.

    Threads may warn, and warnings are records: calls from several threads take turns.
    """

    def __init__(self, warn: Callable[[str], None]) -> None:
        self.warn = warn
        self.trackers: list[Tracker] = []
        self._lock = threading.RLock()
        """Reentrant because a tracker may warn while it logs."""

    def add(self, build: Callable[[], Tracker]) -> None:
        self.attempt(lambda: self.trackers.append(build()), "starting a tracker")

    def log(self, record: Record) -> None:
        self._each(lambda tracker: tracker.log(record))

    def show(self, scores: Scores) -> None:
        self._each(lambda tracker: tracker.show(scores))

    def alert(self, title: str, text: str) -> None:
        self._each(lambda tracker: tracker.alert(title, text))

    def _each(self, action: Callable[[Tracker], None]) -> None:
        with self._lock:
            failed = []
            for tracker in list(self.trackers):
                try:
                    action(tracker)
                except Exception as error:
                    failed.append((tracker, error))
            # Only now, so that every tracker gets the record before the warning.
            for tracker, error in failed:
                if tracker in self.trackers:
                    self.trackers.remove(tracker)
                    self._warn_of(type(tracker).__name__, error)

    def flush(self) -> list[str]:
        """Write what is pending; returns what cannot be written."""
        with self._lock:
            return [problem for tracker in self.trackers if (problem := tracker.flush())]

    def close(self, summary: Record) -> None:
        for tracker in list(self.trackers):  # without the lock: other threads may warn meanwhile
            self.attempt(lambda tracker=tracker: tracker.close(summary), type(tracker).__name__)

    def attempt(self, action: Callable[[], Any], what: str) -> bool:
        """Do something whose failure must not end a training run; returns whether it worked."""
        try:
            action()
        except Exception as error:
            self._warn_of(what, error)
            return False
        return True

    def _warn_of(self, what: str, error: Exception) -> None:
        self.warn(f"{what} failed; training goes on without ({type(error).__name__}: {error})")
