"""What a training step takes in memory, measured or estimated before a run."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from fcn.data import (
    Batch,
    LabelCounts,
    RankBatch,
    RankBatches,
    SampleRef,
    SplitReport,
    TrainingBatch,
    TrainTransform,
)
from fcn.errors import InputError
from fcn.training.run import Run
from fcn.training.step import train_step

MB, GB = 2**20, 2**30
HEADROOM = 0.1
"""Fraction of a GPU's memory that estimates leave free, for fragmentation and libraries."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Memory of a training step in one process, in bytes: a straight line through two measured steps."""

    fixed: float
    """Independent of the number of images."""
    per_image: float

    def of(self, images: int) -> float:
        return self.fixed + self.per_image * images

    def images(self, capacity: float) -> int:
        """The number of images whose step is likely to fit a device of `capacity` bytes."""
        return max(0, math.floor(((1 - HEADROOM) * capacity - self.fixed) / max(1.0, self.per_image)))


@contextlib.contextmanager
def saved_for_backward(apart: Iterable[torch.Tensor]) -> Iterator[dict[int, int]]:
    """Collect the storages that autograd saves for the backward pass of what is computed inside.

    Args:
        apart: tensors whose storages do not count, such as parameters.

    Returns:
        Bytes of each storage by its address.
    """
    known = {tensor.untyped_storage().data_ptr() for tensor in apart}
    saved: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        yield saved


def states(run: Run) -> dict[str, int]:
    """Bytes that a run holds between steps, after its first one."""
    parameters = list(run.state.model.parameters())
    moments = [value for state in run.state.optimizer.state.values() for value in state.values()]
    found = {
        "parameters and buffers": [*parameters, *run.state.model.buffers()],
        "gradients": [parameter.grad for parameter in parameters if parameter.grad is not None],
        "optimizer": [value for value in moments if isinstance(value, torch.Tensor)],
        "average of the weights": list(run.state.ema.model.state_dict().values()) if run.state.ema else [],
    }
    return {name: sum(tensor.nbytes for tensor in tensors) for name, tensors in found.items() if tensors}


class Trial:
    """Tries training steps of a run on real images; without a crop on the largest ones, padded to the worst size.

    Args:
        run: the steps change it.
        train: the report of its training split, which has at least one readable image.
    """

    def __init__(self, run: Run, train: SplitReport) -> None:
        data = run.config.data
        scale = data.scale if data.crop or not data.scale else (data.scale[1], data.scale[1])
        transform = TrainTransform(data.crop, scale, data.hflip, data.jitter)
        self.run, self.batches = run, RankBatches(train.dataset, transform, run.config.seed)
        self.indices = sorted(train.sizes, key=lambda index: math.prod(train.sizes[index]), reverse=True)
        # A batch of images of mixed size is as high as the highest and as wide as the widest.
        self.extremes = [max(train.sizes, key=lambda index: train.sizes[index][side]) for side in (0, 1)]
        self.state = run.state
        self.state.micro_batch, self.state.offload, self.state.shards = None, False, None

    def batch(self, images: int) -> Batch:
        mine = [SampleRef(0, self.indices[place % len(self.indices)]) for place in range(images)]
        loaded = self.batches[RankBatch(0, mine, [*mine, *(SampleRef(0, index) for index in self.extremes)])]
        if isinstance(loaded, InputError):
            raise loaded
        return loaded.batch

    def step(self, images: int) -> float:
        """One real training step; returns its loss."""
        batch = self.batch(images)
        device = self.run.context.device
        on_device = Batch(*(tensor.to(device) for tensor in batch))
        step = TrainingBatch(on_device, batch.padded, LabelCounts.of(batch.counts), False, 0.0)
        self.state.network.train()
        return float(train_step(self.state, step).losses.sum())

    def bytes_of_step(self, images: int) -> int:
        """Peak memory of a step on a GPU; on the CPU the run's own tensors plus those saved for the backward pass."""
        device = self.run.context.device
        if device.type == "cuda":
            self.step(images)  # cuDNN tries its algorithms
            torch.cuda.reset_peak_memory_stats(device)
            self.step(images)
            return torch.cuda.max_memory_allocated(device)
        with saved_for_backward([*self.state.model.parameters(), *self.state.model.buffers()]) as saved:
            self.step(images)
        return sum(saved.values()) + sum(states(self.run).values())

    def memory(self) -> Memory:
        """Measured by steps of one and of two images, or of two and three if a BatchNorm refuses a single image."""
        few = 1
        try:
            least = self.bytes_of_step(few)
        except (ValueError, InputError) as error:
            if "more than 1 value per channel" not in str(error):
                raise
            few = 2
            least = self.bytes_of_step(few)
        per_image = self.bytes_of_step(few + 1) - least
        return Memory(least - few * per_image, per_image)
