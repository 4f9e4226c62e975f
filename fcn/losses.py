"""Losses as sums over pixels. The division by the valid pixels of the global batch is the engine's."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from fcn.data.labels import IGNORE_INDEX


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sum of the cross-entropy over all valid pixels; 0, with zero gradients, if there is none.

    Args:
        logits: (N, C, H, W) float.
        labels: (N, H, W) int64 from 0 to C-1, 255 = ignore.

    Returns:
        scalar, float32 or the logits' wider type.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    # Summed apart: the fused sum of a GPU adds in no fixed order.
    return F.cross_entropy(wide, labels, ignore_index=IGNORE_INDEX, reduction="none").sum()


LOSSES = {"cross_entropy": cross_entropy}
