"""Losses as sums over pixels or images, and their mean over the global batch.

A loss takes logits (N, C, H, W) finite float and labels (N, H, W) int64, from 0 to C-1 or 255 = ignore. It returns the
sum over its units, pixels or images, as a scalar in float32 or the logits' wider type. Without a valid pixel the sum is
0, with zero gradients. No loss waits for the device, and on a GPU each sums in a fixed order.

`build_loss` divides by the units of the global batch, which are counted when the batch is loaded.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from functools import partial

import torch
from torch.nn import functional as F

from fcn.config import Loss
from fcn.data import IGNORE_INDEX, LabelCounts
from fcn.errors import InputError

GAMMA, KEEP = 2.0, 0.25

Criterion = Callable[[torch.Tensor, torch.Tensor, LabelCounts], torch.Tensor]
"""(logits, labels, label counts of the global batch) → what these images add to the loss of the step."""


# --- sums over pixels ----------------------------------------------------------------------------------------------


def cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, *, weights: torch.Tensor | None = None, label_smoothing: float = 0.0
) -> torch.Tensor:
    """Sum over the valid pixels of w[label] · -log p[label], with p the softmax of the logits.

    `weights` (C,) and `label_smoothing` are those of `torch.nn.CrossEntropyLoss`: with smoothing ε the above counts
    1 - ε, and every class c, the label too, adds ε/C · w[c] · -log p[c].
    """
    return _pixel_cross_entropy(logits, labels, weights, label_smoothing).sum()


def focal(
    logits: torch.Tensor, labels: torch.Tensor, *, weights: torch.Tensor | None = None, gamma: float = GAMMA
) -> torch.Tensor:
    """Sum over the valid pixels of (1 - p)^gamma · w · -log p, p the probability of the label (Lin et al. 2017, eq. 5).

    Over the softmax of the classes, where the paper has a sigmoid for each; `weights` (C,) are its α.
    """
    log_p = _wide(logits).log_softmax(1)
    nll = F.nll_loss(log_p, labels, ignore_index=IGNORE_INDEX, reduction="none")
    weighted = nll
    if weights is not None:
        weighted = F.nll_loss(log_p, labels, weights.to(log_p.dtype), ignore_index=IGNORE_INDEX, reduction="none")
    # 1 - p without cancellation; never exactly 0, where a gamma below 1 has no finite gradient.
    wrong = (-torch.expm1(-nll)).clamp_min(torch.finfo(nll.dtype).tiny)
    return (wrong**gamma * weighted).sum()


def ohem(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    weights: torch.Tensor | None = None,
    label_smoothing: float = 0.0,
    keep: float = KEEP,
) -> torch.Tensor:
    """Sum of `cross_entropy` over the hardest ⌈keep·n⌉ of each image's n valid pixels (online hard example mining).

    The hardest pixels are those with the largest loss, including weights. This is the top-k form (Wu, Shen, van den
    Hengel 2016, "Bridging category-level and instance-level semantic image segmentation"; `top_k_percent_pixels` of
    DeepLab). In the form with a probability threshold, the number of pixels would depend on the logits of all ranks.
    """
    losses = _pixel_cross_entropy(logits, labels, weights, label_smoothing).flatten(1)
    hardest_first = losses.sort(dim=1, descending=True, stable=True).values
    kept = (keep * (labels != IGNORE_INDEX).flatten(1).sum(1, keepdim=True).double()).ceil()
    ranks = torch.arange(losses.shape[1], device=losses.device)
    return torch.where(ranks < kept, hardest_first, 0).sum()


def _wide(logits: torch.Tensor) -> torch.Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _pixel_cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor | None, label_smoothing: float
) -> torch.Tensor:
    """(N, H, W), 0 where ignored. Not summed here, because the fused sum of a GPU has no fixed order."""
    wide = _wide(logits)
    return F.cross_entropy(
        wide,
        labels,
        None if weights is None else weights.to(wide.dtype),
        ignore_index=IGNORE_INDEX,
        reduction="none",
        label_smoothing=label_smoothing,
    )


# --- sums over images: no sum over pixels, so each image is a unit ------------------------------------------------


def dice(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sum over the images of 1 - 2·Σpg / (Σp + Σg), the mean over the classes that occur in the image's labels.

    p is the softmax, g the labels as 0 or 1, and Σ runs over the image's valid pixels. It is the soft Dice coefficient
    of Milletari et al. 2016 with p and g instead of their squares in the denominator, as in Sudre et al. 2017 but
    without their class weights. It needs no smoothing term, because Σg ≥ 1 for every class that counts.
    """
    p, g = _classwise(logits, labels)
    overlap = torch.where(g, p, 0).sum(2)
    return _sum_of_class_means(1 - 2 * overlap / (p.sum(2) + g.sum(2)).clamp_min(1), g)


def lovasz(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sum over the images of the Lovász-Softmax loss, the mean over the classes that occur in the image's labels.

    Berman, Triki, Blaschko 2018, with `per_image=True, classes="present"` in their code. Only valid pixels count: an
    ignored one has error 0, so it comes last and adds nothing. It sorts N·C·H·W numbers.
    """
    p, g = _classwise(logits, labels)
    errors = (g.to(p.dtype) - p).abs()
    with torch.no_grad():
        order = errors.argsort(dim=2, descending=True, stable=True)
        hit = g.gather(2, order)
        missed = g.sum(2, keepdim=True) - hit.cumsum(
            2
        )  # of integers, because a cumulative sum of floats has no fixed order on a GPU
        union = (missed + torch.arange(1, g.shape[2] + 1, device=g.device)).to(p.dtype)
        # What each error adds to the Jaccard loss of those before it: the differences of algorithm 1 in closed form.
        steps = torch.where(hit, 1 / union, missed / (union * (union - 1).clamp_min(1)))
        slopes = torch.empty_like(p).scatter_(2, order, steps)
    return _sum_of_class_means((errors * slopes).sum(2), g)


def _classwise(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(probabilities, labels as bool), both (N, C, H·W); ignored pixels are 0 and False for every class."""
    labels = labels.flatten(1)[:, None]
    probabilities = _wide(logits).softmax(1).flatten(2)
    classes = torch.arange(logits.shape[1], device=logits.device)[:, None]
    return torch.where(labels == IGNORE_INDEX, 0, probabilities), labels == classes


def _sum_of_class_means(values: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    """Sum over the images of the mean of `values` (N, C) over the classes in the labels `g` (N, C, H·W)."""
    present = g.any(2)
    return (torch.where(present, values, 0).sum(1) / present.sum(1).clamp_min(1)).sum()


# --- the loss of a step --------------------------------------------------------------------------------------------

LOSSES = {"cross_entropy": cross_entropy, "dice": dice, "focal": focal, "lovasz": lovasz, "ohem": ohem}


def build_loss(config: Loss, num_classes: int, device: torch.device | str = "cpu") -> Criterion:
    """The loss that a config describes: `name`, plus the losses in `add` times their weights.

    Each is its sum divided by the units of the global batch: for cross_entropy and focal the valid pixels, each counted
    with its class's weight; for ohem `keep` times that; for dice and lovasz the images with a valid pixel. A batch
    without units has loss 0.

    Raises:
        InputError: the number of class weights is not the number of classes.
    """
    weights = config.weights
    if weights is not None and len(weights) != num_classes:
        raise InputError(
            f"loss.weights: found {len(weights)} numbers for a data set of {num_classes} classes; "
            f"accepted: one number per class, in the order of the classes, or null"
        )

    def pixels(label_counts: LabelCounts) -> float:
        # The labels of a data set are below num_classes, or 255.
        return label_counts.valid if weights is None else sum(w * n for w, n in zip(weights, label_counts.pixels))

    def hardest_pixels(label_counts: LabelCounts) -> float:
        return (KEEP if config.keep is None else config.keep) * pixels(label_counts)

    def images(label_counts: LabelCounts) -> float:
        return label_counts.images

    units = {"cross_entropy": pixels, "focal": pixels, "ohem": hardest_pixels, "dice": images, "lovasz": images}
    options = {
        "weights": None if weights is None else torch.tensor(weights, dtype=torch.float64, device=device),
        "label_smoothing": config.label_smoothing,
        "gamma": config.gamma,
        "keep": config.keep,
    }
    terms = []
    for name, loss in LOSSES.items():
        factor = 1.0 if name == config.name else getattr(config.add, name)
        if factor is not None:
            takes = inspect.signature(loss).parameters
            own = {key: value for key, value in options.items() if key in takes and value is not None}
            terms.append((factor, partial(loss, **own), units[name]))

    def criterion(logits: torch.Tensor, labels: torch.Tensor, label_counts: LabelCounts) -> torch.Tensor:
        return sum(
            factor * loss(logits, labels) / (divisor(label_counts) or math.inf) for factor, loss, divisor in terms
        )

    return criterion
