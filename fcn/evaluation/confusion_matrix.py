"""One exact integer confusion matrix, over any number of processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fcn import distributed, metrics
from fcn.data import IGNORE_INDEX


def count_values(values: torch.Tensor, length: int) -> torch.Tensor:
    """How often 0 to length - 1 occur in `values` (N,) int64, as (length,) int64, without a host sync."""
    if not values.is_cuda:
        return torch.bincount(values, minlength=length)
    # bincount would first ask the device for the largest value. Integers add up the same in any order.
    ones = torch.ones((), dtype=torch.int64, device=values.device).expand_as(values)
    return torch.zeros(length, dtype=torch.int64, device=values.device).scatter_add_(0, values, ones)


class ConfusionMatrix:
    """Pixel counts: `counts[label, prediction]`, (C, C) int64.

    The counts are integers, so the order of images, batches and ranks does not matter, and nothing is lost past 2^24 as
    in float32.

    Args:
        ignore_index: a further label that is not counted, beside 255. If it is a class, that has no score.
    """

    def __init__(self, num_classes: int, ignore_index: int = IGNORE_INDEX, device: torch.device | str = "cpu") -> None:
        self.num_classes, self.ignore_index = num_classes, ignore_index
        # Two more bins than pairs of classes: for ignored pixels, and for values that are no class.
        self._bins = torch.zeros(num_classes * num_classes + 2, dtype=torch.int64, device=device)

    def update(self, labels: torch.Tensor, predictions: torch.Tensor) -> torch.Tensor:
        """Count labels (0 to C-1, 255 or `ignore_index`) and predictions (0 to C-1) of one shape and any integer type.

        Returns:
            The counts of each image, (N, C, C) int64 on this matrix's device. Tensors with fewer than three dimensions
            count as one image.

        Raises:
            ValueError: the shapes differ.
        """
        if labels.shape != predictions.shape:
            raise ValueError(
                f"labels {tuple(labels.shape)} and predictions {tuple(predictions.shape)} must have one shape"
            )
        c, length = self.num_classes, len(self._bins)
        images = len(labels) if labels.ndim > 2 else 1
        labels, predictions = (
            t.detach().to(self._bins.device, torch.int64).reshape(images, -1) for t in (labels, predictions)
        )
        no_class = (labels < 0) | (labels >= c) | (predictions < 0) | (predictions >= c)
        bins = torch.where(no_class, c * c + 1, labels * c + predictions)
        bins = torch.where((labels == IGNORE_INDEX) | (labels == self.ignore_index), c * c, bins)
        bins += torch.arange(0, images * length, length, device=bins.device)[:, None]
        counts = count_values(bins.reshape(-1), images * length).reshape(images, length)
        self._bins += counts.sum(0)
        return counts[:, : c * c].reshape(images, c, c)

    def all_reduce(self) -> None:
        """Add the counts of all ranks. Every rank must call it once, after its last batch."""
        distributed.all_reduce_sum(self._bins)

    @property
    def counts(self) -> torch.Tensor:
        """(C, C) int64 on the CPU, labels down, predictions across.

        Raises:
            ValueError: a label or prediction was no class.
        """
        bins = self._bins.cpu()
        if bins[-1]:
            raise ValueError(f"{int(bins[-1])} pixels have a label or prediction outside 0 to {self.num_classes - 1}")
        return bins[:-2].reshape(self.num_classes, self.num_classes)

    def scores(self, names: Sequence[str]) -> dict[str, Any]:
        """Every metric of `fcn.metrics`, for classes of these names."""
        return metrics.scores(self.counts.tolist(), names, self.ignore_index)


def image_miou(counts: torch.Tensor, ignore_index: int = IGNORE_INDEX) -> torch.Tensor:
    """Mean IoU of each image over the classes in its labels or predictions; NaN if no pixel is valid.

    Args:
        counts: (N, C, C) int64, as `ConfusionMatrix.update` returns them.
        ignore_index: a class that does not count, if it is one.

    Returns:
        (N,) float64 on the same device.
    """
    correct = counts.diagonal(dim1=1, dim2=2).double()
    union = counts.sum(1) + counts.sum(2) - correct
    union[:, ignore_index : ignore_index + 1] = 0
    return (correct / union.clamp_min(1)).sum(1) / (union > 0).sum(1)
