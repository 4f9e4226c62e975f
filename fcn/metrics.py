"""The metrics: key, title, formula. Scores, console, report, W&B, `compare` and `checkpoint.best` read this table.

To add a metric, add a line to `METRICS` or `CLASS_METRICS`. This module needs no NumPy, so that commands that only
show scores start fast.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple


class Counts:
    """What formulas need of a confusion matrix (C, C) of integers, with labels down and predictions across.

    Sums are exact integers. Scores of a class are from 0 to 1, or None: `iou` and `dice` if the class is neither in the
    labels nor in the predictions, `recall` if it is not in the labels, `precision` if it is never predicted, and all
    of them for the class `ignore_index`, if that is one. Where it is predicted, the labelled class is missed.
    """

    def __init__(self, matrix: Sequence[Sequence[int]], ignore_index: int | None = None) -> None:
        self.correct = [row[place] for place, row in enumerate(matrix)]
        self.labelled = [sum(row) for row in matrix]
        self.predicted = [sum(column) for column in zip(*matrix, strict=True)]
        self.total = sum(self.labelled)
        self._classes = list(zip(self.correct, self.labelled, self.predicted, strict=True))
        if ignore_index in range(len(matrix)):
            self._classes[ignore_index] = (0, 0, 0)

    @property
    def iou(self) -> list[float | None]:
        return [_ratio(hit, label + found - hit) for hit, label, found in self._classes]

    @property
    def dice(self) -> list[float | None]:
        return [_ratio(2 * hit, label + found) for hit, label, found in self._classes]

    @property
    def recall(self) -> list[float | None]:
        return [_ratio(hit, label) for hit, label, _ in self._classes]

    @property
    def precision(self) -> list[float | None]:
        return [_ratio(hit, found) for hit, _, found in self._classes]

    @property
    def weighted_iou(self) -> float | None:
        """The classes' IoU, weighted by their share of the labelled pixels."""
        parts = [label * iou for label, iou in zip(self.labelled, self.iou) if iou is not None]
        return _ratio(sum(parts), self.total)


class Metric(NamedTuple):
    """A score from 0 to 1, or None if there is nothing to score."""

    title: str
    """How it is shown."""
    formula: Callable[[Counts], Any]
    """One number, or for a metric of classes one for each class."""
    detail: bool = False
    """Shown only where there is room: in the report's table of classes."""


METRICS = {
    "miou": Metric("mIoU", lambda counts: mean(counts.iou)),
    "mdice": Metric("mDice", lambda counts: mean(counts.dice)),
    "pixel_acc": Metric("pixel accuracy", lambda counts: _ratio(sum(counts.correct), counts.total)),
    "mean_acc": Metric("mean accuracy", lambda counts: mean(counts.recall)),
    "fw_iou": Metric("fw IoU", lambda counts: counts.weighted_iou),
}
"""Scores of a split, in the order in which they are shown. IoU and accuracies follow Long, Shelhamer, Darrell 2015,
section 5. Dice (1945) is F1."""

CLASS_METRICS = {
    "iou": Metric("IoU", lambda counts: counts.iou),
    "dice": Metric("Dice", lambda counts: counts.dice),
    "precision": Metric("precision", lambda counts: counts.precision, detail=True),
    "recall": Metric("recall", lambda counts: counts.recall, detail=True),
}
"""Scores of each class."""


def scores(matrix: Sequence[Sequence[int]], names: Sequence[str], ignore_index: int | None = None) -> dict[str, Any]:
    """All metrics of a confusion matrix (C, C), except details.

    Returns:
        The metrics of the split by their keys; those of classes as a dict from class names to scores. "classes" is the
        number of classes in the labels or the predictions, which are the ones that count in "miou".
    """
    counts = Counts(matrix, ignore_index)
    found: dict[str, Any] = {key: metric.formula(counts) for key, metric in METRICS.items()}
    for key, metric in CLASS_METRICS.items():
        if not metric.detail:
            found[key] = dict(zip(names, metric.formula(counts), strict=True))
    found["classes"] = sum(iou is not None for iou in counts.iou)
    return found


def mean(values: Iterable[float | None]) -> float | None:
    """The mean of the values that are not None; None if there is none."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def shown(value: float | None) -> str:
    """A score as it is shown."""
    return "absent" if value is None else f"{value:.4f}"


def best_metric(best: dict[str, Any]) -> str:
    """The key of the metric in a record {metric: score, "step": step} of the best score."""
    return next(key for key in best if key != "step")


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None
