"""Which rank computes what, as pure functions of (seed, step, rank, world size)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Sized
from typing import NamedTuple

import numpy as np
from torch.utils.data import DistributedSampler

from fcn.distributed import block_of
from fcn.errors import InputError
from fcn.seeding import permutation


class SampleRef(NamedTuple):
    """A sample in an epoch; its augmentation follows from both."""

    epoch: int
    index: int


class RankBatch(NamedTuple):
    """The samples of one rank for one step."""

    step: int
    local: Sequence[SampleRef]
    """This rank's samples."""
    global_batch: Sequence[SampleRef]
    """The samples of the global batch, from which every rank derives the padded size."""


class GlobalBatchSampler(DistributedSampler):
    """Yields this rank's part of every global batch, starting at `start_step`.

    The data of a run is one endless stream: the split in a random order, then in another, and so on. Step s takes the
    positions [s·B, (s+1)·B) of the stream, for any number of processes, and rank r of W takes those from ⌊r·B/W⌋ to
    ⌊(r+1)·B/W⌋ of the batch. These parts differ by at most one image and may be empty. So every image occurs once per
    epoch, no batch is short, and a resumed run starts at its step without reading what came before.

    With `shards`, which divides B, a rank takes whole ones of that many equal parts; see `distributed.Shards`.

    With `shape`, steps exchange images so that a batch has images of similar shape and little padding. Only the steps
    of one window exchange images, and a window lies within an epoch. So all of the above still holds, and a step needs
    only the shapes of its window. A step that begins in one epoch and ends in the next keeps its images.

    Args:
        dataset: anything with a length.
        batch_size: global batch size B.
        steps: the run's length; the last step is `steps - 1`.
        start_step: the first step to yield.
        window: largest number of steps that exchange images.
        shape: (height, width) of a sample as it will be loaded. If it raises InputError, loading the file will, too.
    """

    def __init__(
        self,
        dataset: Sized,
        *,
        batch_size: int,
        steps: int,
        start_step: int,
        seed: int,
        rank: int,
        world_size: int,
        shards: int | None = None,
        window: int = 1,
        shape: Callable[[SampleRef], tuple[int, int]] | None = None,
    ) -> None:
        super().__init__(dataset, num_replicas=world_size, rank=rank, shuffle=True, seed=seed)  # type: ignore[arg-type]
        self.batch_size, self.steps, self.start_step = batch_size, steps, start_step
        self.shards, self.window, self.shape = shards, window, shape
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0))
        self._exchanged: tuple[range, list[list[SampleRef]]] = (range(0), [])

    def global_batch(self, step: int) -> list[SampleRef]:
        """The samples of a step, in order."""
        steps = self._window(step)
        if len(steps) == 1:
            return self._in_random_order(step)
        if self._exchanged[0] != steps:
            self._exchanged = steps, self._exchange(steps)
        return self._exchanged[1][step - steps.start]

    def _window(self, step: int) -> range:
        """The steps that exchange images with this one: the epoch's complete batches, in windows of equal length."""
        size = len(self.dataset)  # type: ignore[arg-type]
        epoch = step * self.batch_size // size
        first, end = -(-epoch * size // self.batch_size), (epoch + 1) * size // self.batch_size
        if self.shape is None or self.window == 1 or step >= end:
            return range(step, step + 1)
        windows = -(-(end - first) // self.window)
        length = -(-(end - first) // windows)
        begin = first + (step - first) // length * length
        return range(begin, min(begin + length, end))

    def _exchange(self, steps: range) -> list[list[SampleRef]]:
        """The batches of a window in random order, which must not depend on shape."""
        refs = [ref for step in steps for ref in self._in_random_order(step)]
        batches = group_by_shape([self._known_shape(ref) for ref in refs], self.batch_size)
        order = permutation(len(batches), self.seed, "exchange", steps.start)
        return [[refs[place] for place in batches[number]] for number in order]

    def _known_shape(self, ref: SampleRef) -> tuple[int, int]:
        try:
            return self.shape(ref)
        except InputError:
            return 0, 0

    def _in_random_order(self, step: int) -> list[SampleRef]:
        size = len(self.dataset)  # type: ignore[arg-type]
        return [
            self._ref(position // size, position % size)
            for position in range(step * self.batch_size, (step + 1) * self.batch_size)
        ]

    def _ref(self, epoch: int, place: int) -> SampleRef:
        if self._order[0] != epoch:
            self._order = epoch, permutation(len(self.dataset), self.seed, "order", epoch)  # type: ignore[arg-type]
        return SampleRef(epoch, int(self._order[1][place]))

    def __iter__(self) -> Iterator[RankBatch]:  # type: ignore[override]
        shards = self.shards or self.batch_size
        block, size = block_of(self.rank, self.num_replicas, shards), self.batch_size // shards
        for step in range(self.start_step, self.steps):
            batch = self.global_batch(step)
            yield RankBatch(step, batch[block.start * size : block.stop * size], batch)

    def __len__(self) -> int:
        return max(0, self.steps - self.start_step)

    def set_epoch(self, epoch: int) -> None:
        raise TypeError("the epoch follows from the step; construct the sampler with start_step instead")


def group_by_shape(shapes: Sequence[tuple[int, int]], batch_size: int) -> list[list[int]]:
    """Group the positions of shapes (height, width), which fill whole batches, into batches of similar shape.

    Splits them in half by height or by width, whichever needs less padding, down to single batches. Equal shapes keep
    their order.
    """

    def padded(places: Sequence[int]) -> int:
        return len(places) * max(shapes[place][0] for place in places) * max(shapes[place][1] for place in places)

    def split(places: list[int]) -> list[list[int]]:
        if len(places) <= batch_size:
            return [places]
        middle = len(places) // batch_size // 2 * batch_size
        orders = (
            sorted(places, key=lambda place: shapes[place]),
            sorted(places, key=lambda place: shapes[place][::-1]),
        )
        best = min(orders, key=lambda order: padded(order[:middle]) + padded(order[middle:]))
        return split(best[:middle]) + split(best[middle:])

    return split(list(range(len(shapes))))


class EvalSampler:
    """Batches of equally sized images in which every image of a split occurs on exactly one rank.

    Images are sorted by size and dealt to the ranks in turn, so that each rank gets images of every size. No image is
    repeated to even out the ranks: some have one image fewer, and evaluation needs no collective per batch.
    """

    def __init__(self, sizes: Sequence[tuple[int, int]], *, batch_size: int, rank: int, world_size: int) -> None:
        order = sorted(range(len(sizes)), key=lambda index: (sizes[index], index))
        self.batches: list[list[int]] = []
        for index in order[rank::world_size]:
            last = self.batches[-1] if self.batches else None
            if last and len(last) < batch_size and sizes[last[0]] == sizes[index]:
                last.append(index)
            else:
                self.batches.append([index])

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)
