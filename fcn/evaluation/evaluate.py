"""Scoring a split: one exact confusion matrix, and a score for each image."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from fcn import distributed
from fcn.config import Config, protocol
from fcn.data import EvalBatches, EvalSampler, EvalTransform, Patience, SegmentationDataset, batch_loader
from fcn.distributed import DistributedContext
from fcn.errors import InputError
from fcn.evaluation.confusion_matrix import ConfusionMatrix, image_miou
from fcn.evaluation.inference import TTA, predict
from fcn.models import Precision
from fcn.tracking import Record


@dataclass(frozen=True, slots=True)
class Evaluator:
    """A network, the split to score it on, and how."""

    model: nn.Module
    split: str
    """Name of the split."""
    dataset: SegmentationDataset
    config: Config
    """Its `eval` section says how."""
    precision: Precision
    context: DistributedContext

    @property
    def transform(self) -> EvalTransform:
        """What of an image is scored."""
        return EvalTransform(self.config.eval.preset, self.config.eval.crop or self.config.data.crop)

    def predict(self, images: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """images (N, H, W, 3) uint8 → classes (N, *size) int64, with the model in evaluation mode."""
        return predict(self.model, images.to(self.precision.device), size, self.precision, TTA.of(self.config.eval))


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The result for a split, the same on every rank."""

    evaluator: Evaluator
    matrix: ConfusionMatrix
    """Over all ranks."""
    images: int
    """Images counted: all of the split."""
    image_miou: torch.Tensor
    """(images,) float64 on the CPU; see `confusion_matrix.image_miou`."""

    def record(self) -> Record:
        """The scores as plain numbers, and how they were computed."""
        evaluator, config = self.evaluator, self.evaluator.config
        return {
            "split": evaluator.split,
            **self.matrix.scores(evaluator.dataset.classes.names),
            "images": self.images,
            "protocol": protocol(config.eval, config.data.crop),
        }

    def counts(self) -> Record:
        """The exact counts as plain numbers, from which all scores follow."""
        return {"confusion_matrix": self.matrix.counts.tolist(), "ignore_index": self.matrix.ignore_index}

    def worst(self, count: int) -> list[int]:
        """Indices of the images with the lowest scores, lowest first, without images that have no valid pixel."""
        order = self.image_miou.argsort(stable=True)
        return [int(index) for index in order if not self.image_miou[index].isnan()][:count]


class Stopped(Exception):  # noqa: N818 - no error
    """All ranks agreed to stop early, because one was asked to save and leave."""


@torch.inference_mode()
def evaluate_split(evaluator: Evaluator, stop: Callable[[], bool] = lambda: False) -> Evaluation:
    """Score every image of a split exactly once, by default whole and at the size of its labels.

    Raises:
        InputError: on every rank, if any rank met a broken file.
        Stopped: on every rank, if `stop()` was true on any.
        RuntimeError: an image was counted twice or not at all.
    """
    model, dataset, context = evaluator.model, evaluator.dataset, evaluator.context
    settings = evaluator.config.eval
    sizes = distributed.run_on_all_ranks(lambda: [dataset.size(index) for index in range(len(dataset)) if not stop()])
    _leave_together(stop)
    sampler = EvalSampler(sizes, batch_size=settings.batch_size, rank=context.rank, world_size=context.size)
    batches = EvalBatches(dataset, evaluator.transform)
    patience = Patience(evaluator.config.train.timeout, stop)
    loader = batch_loader(batches, sampler, evaluator.config.data.workers, context.device, patience)
    ignore_index = evaluator.config.loss.ignore_index
    matrix = ConfusionMatrix(len(dataset.classes), ignore_index, context.device)
    seen = torch.zeros(len(dataset), dtype=torch.int64)
    image_scores = torch.zeros(len(dataset), dtype=torch.float64, device=context.device)
    fault = None
    was_training = model.training
    model.eval()
    for batch in loader:
        if isinstance(batch, InputError):
            fault = str(batch)
            break
        if batch is None or stop():
            break
        seen[batch.indices] += 1
        images, labels, indices = (
            tensor.to(context.device, non_blocking=True) for tensor in (batch.images, batch.labels, batch.indices)
        )
        counts = matrix.update(labels, evaluator.predict(images, tuple(labels.shape[-2:])))
        image_scores[indices] = image_miou(counts, ignore_index)
    model.train(was_training)
    distributed.raise_on_all_ranks(fault)
    _leave_together(stop)
    matrix.all_reduce()
    distributed.all_reduce_sum(seen)
    distributed.all_reduce_sum(image_scores)  # for each image one rank alone has more than 0
    if not bool((seen == 1).all()):
        raise RuntimeError(
            f"evaluation must count each image once; some counts are {sorted(set(seen[seen != 1].tolist()))}"
        )
    return Evaluation(evaluator, matrix, int(seen.sum()), image_scores.cpu())


def _leave_together(stop: Callable[[], bool]) -> None:
    if any(distributed.all_gather_object(stop())):
        raise Stopped
