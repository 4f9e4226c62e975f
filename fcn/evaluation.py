"""Scoring a split: the exact matrix, a score of each image, and what is shown of them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

from fcn import distributed, pictures
from fcn.config import Config, protocol
from fcn.data.datasets import SegmentationDataset
from fcn.data.loaders import Batch, EvalBatches, eval_loader
from fcn.data.samplers import EvalSampler
from fcn.data.transforms import EvalTransform
from fcn.distributed import World
from fcn.errors import InputError
from fcn.inference import Views, predict
from fcn.metrics import ConfusionMatrix, image_miou
from fcn.run import Numerics
from fcn.tracking import Record, Sample, Scores, write_atomically


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What became of a split."""

    matrix: ConfusionMatrix
    """Over all ranks."""
    images: int
    """How many were counted: all of the split."""
    image_miou: torch.Tensor
    """Of each image, (images,) float64 on the CPU; see `metrics.image_miou`."""

    def record(self, split: str, names: Sequence[str], config: Config) -> Record:
        """The scores as plain numbers, and by which protocol."""
        scores = self.matrix.scores(names)
        return {"split": split, **scores, "images": self.images, "protocol": protocol(config.eval, config.data.crop)}

    def worst(self, count: int) -> list[int]:
        """Indices of the images with the lowest scores, the lowest first; those without a valid pixel have none."""
        order = self.image_miou.argsort(stable=True)
        return [int(index) for index in order if not self.image_miou[index].isnan()][:count]


class Stopped(Exception):  # noqa: N818 - no error
    """All ranks agreed to leave an evaluation, because one was asked to save and leave."""


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    dataset: SegmentationDataset,
    config: Config,
    world: World,
    numerics: Numerics,
    stop: Callable[[], bool] = lambda: False,
) -> Evaluation:
    """Score every image of a split exactly once, as `eval` says: by default whole, at the native size of its labels.

    Every rank returns the same.

    Raises:
        InputError: on every rank, if any rank met a broken file.
        Stopped: on every rank, if `stop()` was true on any.
        RuntimeError: an image was counted twice or not at all.
    """
    sizes = distributed.together(lambda: [dataset.size(index) for index in range(len(dataset))])
    sampler = EvalSampler(sizes, batch_size=config.eval.batch_size, rank=world.rank, world_size=world.size)
    batches = EvalBatches(dataset, _eval_transform(config))
    loader: DataLoader[Batch] = eval_loader(batches, sampler, config.data.workers, world.device)
    views = Views.of(config.eval)
    matrix = ConfusionMatrix(len(dataset.classes), device=world.device)
    seen = torch.zeros(len(dataset), dtype=torch.int64)
    image_scores = torch.zeros(len(dataset), dtype=torch.float64, device=world.device)
    fault = None
    was_training = model.training
    model.eval()
    for batch in loader:
        if isinstance(batch, InputError):
            fault = str(batch)
            break
        if stop():
            break
        seen[batch.indices] += 1
        images, labels, indices = (
            tensor.to(world.device, non_blocking=True) for tensor in (batch.images, batch.labels, batch.indices)
        )
        counts = matrix.update(labels, predict(model, images, tuple(labels.shape[-2:]), numerics, views))
        image_scores[indices] = image_miou(counts)
    model.train(was_training)
    distributed.raise_together(fault)
    if any(distributed.gather(stop())):
        raise Stopped
    matrix.all_reduce()
    distributed.all_reduce_sum(seen)
    distributed.all_reduce_sum(image_scores)  # of each image one rank has more than 0
    if not bool((seen == 1).all()):
        raise RuntimeError(
            f"evaluation must count each image once; counts of some are {sorted(set(seen[seen != 1].tolist()))}"
        )
    return Evaluation(matrix, int(seen.sum()), image_scores.cpu())


def show_scores(
    found: Evaluation,
    record: Record,
    model: nn.Module,
    dataset: SegmentationDataset,
    config: Config,
    numerics: Numerics,
    folder: Path,
    worst: bool,
) -> Scores:
    """Write an evaluation's matrix and scores of images, and its pictures, into a run's folder; on one rank alone."""
    split, classes, matrix = record["split"], dataset.classes, found.matrix.counts.numpy()
    names = [dataset.name(index) for index in range(len(dataset))]
    images = [[name, None if math.isnan(score) else score] for name, score in zip(names, found.image_miou.tolist())]
    details = {"classes": classes.names, "palette": classes.palette, "confusion_matrix": matrix.tolist()}
    kept = {**record, **details, "image_miou": images}
    write_atomically(folder / scores_name(split), json.dumps(kept) + "\n")
    samples = []
    if config.eval.pictures:
        drawn = folder / "pictures"
        samples = draw_scores(found, split, record["step"], model, dataset, config, numerics, drawn, worst)
    return Scores(record, classes, matrix, samples)


def draw_scores(
    found: Evaluation,
    split: str,
    step: int,
    model: nn.Module,
    dataset: SegmentationDataset,
    config: Config,
    numerics: Numerics,
    folder: Path,
    worst: bool = True,
) -> list[Sample]:
    """Write the pictures of an evaluation into a folder, on one rank alone; returns the images that are always shown.

    They are SPLIT_confusion.png and, of `eval.pictures` images each, SPLIT_STEP.png and SPLIT_worst.png.
    """
    classes, shown = dataset.classes, min(config.eval.pictures, len(dataset))
    pictures.save(pictures.confusion(found.matrix.counts.numpy(), classes), folder / f"{split}_confusion.png")
    if not shown:
        return []
    # Spread over the split: neighbours are often frames of one video.
    spread = [i * len(dataset) // shown for i in range(shown)]
    samples = label_images(model, dataset, spread, config, numerics, found.image_miou)
    pictures.save(pictures.panels(samples, classes), folder / f"{split}_{step:08d}.png")
    if worst:
        rows = label_images(model, dataset, found.worst(shown), config, numerics, found.image_miou)
        pictures.save(pictures.panels(rows, classes), folder / f"{split}_worst.png")
    return samples


def scores_name(split: str) -> str:
    """The file in a run's folder that has the details of the split's last evaluation."""
    return f"scores_{split}.json"


@torch.inference_mode()
def label_images(
    model: nn.Module,
    dataset: SegmentationDataset,
    indices: Iterable[int],
    config: Config,
    numerics: Numerics,
    scores: torch.Tensor,
) -> list[Sample]:
    """Images of a split with the network's classes, captioned with their names and `scores`, a mIoU for each index."""
    samples = []
    was_training = model.training
    model.eval()
    try:
        for index in indices:
            image, mask = _eval_transform(config)(*dataset.read(index))
            batch = torch.from_numpy(np.array(image))[None].to(numerics.device)
            classes = predict(model, batch, (mask.height, mask.width), numerics, Views.of(config.eval))[0]
            score = "" if scores[index].isnan() else f"   mIoU {scores[index]:.4f}"
            caption = dataset.name(index) + score
            samples.append(Sample(np.asarray(image), np.asarray(mask), classes.cpu().numpy(), caption))
    finally:  # rank 0 alone in evaluation mode would leave the other ranks waiting for its statistics
        model.train(was_training)
    return samples


def _eval_transform(config: Config) -> EvalTransform:
    return EvalTransform(config.eval.preset, config.eval.crop or config.data.crop)
