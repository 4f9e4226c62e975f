"""Batches: what is in them, the padding collate, and the transfer to the device."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from fcn import distributed, seeding
from fcn.data.datasets import SegmentationDataset
from fcn.data.labels import IGNORE_INDEX
from fcn.data.samplers import RankBatch, SampleRef
from fcn.data.transforms import EvalTransform, TrainTransform, resize_windows
from fcn.data.workers import BatchLoader
from fcn.errors import InputError, OutOfMemory


class Batch(NamedTuple):
    images: torch.Tensor
    """(N, H, W, 3) uint8, each image at the top left."""
    labels: torch.Tensor
    """(N, H, W) uint8, 255 = ignore."""
    sizes: torch.Tensor
    """(N, 2) int64: height and width of each image before padding."""
    indices: torch.Tensor
    """(N,) int64: indices in the split."""
    keys: torch.Tensor
    """(N,) int64 from 0 to 2³¹ - 1: the dropout mask of each image follows from it."""
    counts: torch.Tensor
    """(N, 256) int64: pixels of each label value in each image, without padding."""

    @property
    def padded(self) -> bool:
        """Whether any image is smaller than the batch. Reads host memory, so ask before moving it to the device."""
        return bool((self.sizes != torch.tensor(self.labels.shape[1:3])).any())


def count_labels(labels: Sequence[np.ndarray]) -> torch.Tensor:
    """(H, W) uint8 each → (N, 256) int64: pixels of each value in each image."""
    rows = [torch.bincount(torch.from_numpy(image).flatten(), minlength=256) for image in labels]
    return torch.stack(rows) if rows else torch.zeros(0, 256, dtype=torch.int64)


def pad_collate(
    images: Sequence[np.ndarray],
    labels: Sequence[np.ndarray],
    indices: Sequence[int],
    size: tuple[int, int] | None = None,
    keys: Sequence[int] | None = None,
    canvas: tuple[int, int] | None = None,
) -> Batch:
    """Stack samples of mixed sizes, or none, padded at the bottom and right; labels are 255 there.

    The padding of images may have any value: `transforms.to_input` makes it 0 after normalisation.

    Args:
        images: (h, w, 3) uint8 each.
        labels: (h, w) uint8 each.
        size: height and width of the batch; by default the largest of each.
        keys: keys of the samples, for dropout; by default 0.
        canvas: height and width of the images if they do not have their labels' size yet; by default `size`.
    """
    size = size or largest(labels)
    stacked = _stack(images, (*(canvas or size), 3), 0)
    targets = _stack(labels, size, IGNORE_INDEX)
    sizes = torch.tensor([target.shape for target in labels], dtype=torch.int64).reshape(-1, 2)
    numbers = [torch.tensor(column, dtype=torch.int64) for column in (indices, keys or [0] * len(images))]
    counts = count_labels([row[:height, :width] for row, (height, width) in zip(targets, sizes.tolist(), strict=True)])
    return Batch(torch.from_numpy(stacked), torch.from_numpy(targets), sizes, *numbers, counts)


def _stack(arrays: Sequence[np.ndarray], shape: tuple[int, ...], fill: int) -> np.ndarray:
    """(N, *shape) uint8: each array at the top left, and a number around it."""
    stacked = np.empty((len(arrays), *shape), np.uint8)
    for row, array in zip(stacked, arrays, strict=True):
        height, width = array.shape[:2]
        row[:height, :width], row[:height, width:], row[height:] = array, fill, fill
    return stacked


def largest(arrays: Sequence[np.ndarray]) -> tuple[int, int]:
    """The smallest height and width that all arrays fit into."""
    return max(array.shape[0] for array in arrays), max(array.shape[1] for array in arrays)


class LoadedBatch(NamedTuple):
    """A rank's part of a step, as its loader delivers it."""

    batch: Batch
    replaced: Sequence[str] = ()
    """What was wrong with each image that was replaced by another one."""
    grids: torch.Tensor | None = None
    """If the device resizes: (N, 2, 5) float64, see `TrainTransform.window`; `batch.images` are the windows."""


def read_arrays(dataset: SegmentationDataset, index: int) -> tuple[np.ndarray, np.ndarray]:
    """Image (H, W, 3) and labels (H, W) of a sample, without a copy if the data set has arrays."""
    own = getattr(dataset, "read_arrays", None)
    if own:
        return own(index)
    image, labels = dataset.read(index)
    return np.asarray(image), np.asarray(labels)


class RankBatches(Dataset):
    """Loads a rank's part of a step: `batches[rank_batch]` is a LoadedBatch, or the InputError that a file caused.

    The error is returned, because raised in a worker it would reach the user as the worker's traceback.

    Args:
        skip: replace a broken image by another one. Which one, and how it is cropped, follows from the seed, the epoch
            and the index of the broken image, so it is the same on any number of processes.
        resize_later: leave the resize of images to `device_batches`.
    """

    def __init__(
        self,
        dataset: SegmentationDataset,
        transform: TrainTransform,
        seed: int,
        *,
        skip: bool = False,
        resize_later: bool = False,
    ) -> None:
        self.dataset, self.transform, self.seed = dataset, transform, seed
        self.skip, self.resize_later = skip, resize_later

    def __getitem__(self, rank_batch: RankBatch) -> LoadedBatch | InputError:
        try:
            size = self._size(rank_batch)
            samples, replaced = [], []
            for ref in rank_batch.local:
                try:
                    samples.append(self._load(self.transform, ref.index, ref))
                except InputError as error:
                    if not self.skip or isinstance(error, OutOfMemory):
                        raise
                    samples.append(self._replacement(ref, size, error))
                    replaced.append(str(error))
            keys = [seeding.derive(self.seed, "dropout", ref.epoch, ref.index) >> 33 for ref in rank_batch.local]
            images, labels, grids = ([sample[part] for sample in samples] for part in range(3))
            canvas = largest(images) if self.resize_later and images else None
            batch = pad_collate(images, labels, [ref.index for ref in rank_batch.local], size, keys, canvas)
            return LoadedBatch(batch, replaced, torch.from_numpy(np.stack(grids)) if canvas else None)
        except InputError as error:
            return error

    def _load(
        self, transform: TrainTransform, index: int, ref: SampleRef
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """(pixels, labels, grid for a later resize or None) of an image, augmented as the sample `ref`."""
        pair = read_arrays(self.dataset, index)
        if self.resize_later:
            return transform.window(*pair, self._rng(ref))
        return *transform(*pair, self._rng(ref)), None

    def shape(self, ref: SampleRef) -> tuple[int, int]:
        """Height and width of a sample as it will be loaded, from the size in its file's header."""
        plan = self.transform.plan(self.dataset.size(ref.index), self._rng(ref))
        return plan.height, plan.width

    def _rng(self, ref: SampleRef) -> random.Random:
        return seeding.generator(self.seed, "augment", ref.epoch, ref.index)

    def _size(self, rank_batch: RankBatch) -> tuple[int, int]:
        """Height and width of the global batch, equal on every rank, so that padding does not depend on their number.

        They come from the files' headers. Whether the rest of a file is broken shows only when it is read, so its
        replacement has to fit into the batch as it is.
        """
        if self.transform.crop:
            return self.transform.crop
        sizes = []
        for ref in rank_batch.global_batch:
            try:
                sizes.append(self.shape(ref))
            except InputError as error:
                if not self.skip:
                    raise
                fault = error
        for index in [] if sizes else self._substitutes(rank_batch.global_batch[0]):
            with contextlib.suppress(InputError):
                sizes = [self.dataset.size(index)]
                break
        if not sizes:
            raise InputError(f"{fault}; and {MOST_REPLACEMENTS} images that could replace it are broken, too")
        return max(height for height, _ in sizes), max(width for _, width in sizes)

    def _replacement(
        self, ref: SampleRef, size: tuple[int, int], fault: InputError
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        transform = TrainTransform(size, self.transform.scale, self.transform.hflip, self.transform.jitter)
        for index in self._substitutes(ref):
            with contextlib.suppress(InputError):
                return self._load(transform, index, ref)
        raise InputError(f"{fault}; and {MOST_REPLACEMENTS} images that could replace it are broken, too")

    def _substitutes(self, ref: SampleRef) -> list[int]:
        """Images that may replace a broken one, in the order in which they are tried."""
        order = seeding.permutation(len(self.dataset), self.seed, "stand-in", ref.epoch, ref.index)
        return order[:MOST_REPLACEMENTS].tolist()


MOST_REPLACEMENTS = 16
"""More broken images in a row are no accident."""


class EvalBatches(Dataset):
    """Loads batches of images of equal size; `transform` decides what of them is scored."""

    def __init__(self, dataset: SegmentationDataset, transform: EvalTransform | None = None) -> None:
        self.dataset, self.transform = dataset, transform or EvalTransform()

    def __getitem__(self, indices: Sequence[int]) -> Batch | InputError:
        try:
            pairs = [self.transform(*self.dataset.read(index)) for index in indices]
        except InputError as error:
            return error
        images = np.stack([np.asarray(image) for image, _ in pairs])
        labels = np.stack([np.asarray(mask) for _, mask in pairs])
        sizes = torch.tensor([image.shape[:2] for image in images])
        keys = torch.zeros(len(indices), dtype=torch.int64)
        counts = count_labels(labels)
        return Batch(torch.from_numpy(images), torch.from_numpy(labels), sizes, torch.tensor(indices), keys, counts)


class LabelCounts(NamedTuple):
    """Counts of the labels in a global batch; as integers they do not depend on the number of ranks."""

    pixels: list[int]
    """256 numbers: pixels with each label value."""
    images: int
    """Images with a valid pixel."""

    @property
    def valid(self) -> int:
        """Pixels that are not ignored."""
        return sum(self.pixels[:IGNORE_INDEX])

    @classmethod
    def of(cls, counts: torch.Tensor) -> LabelCounts:
        """The counts of a few images; `counts` is (N, 256) int64 on the CPU, as in a Batch."""
        return cls(counts.sum(0).tolist(), int(counts[:, :IGNORE_INDEX].any(1).sum()))


class TrainingBatch(NamedTuple):
    """The data of a step on this rank's device, and what all ranks know about the step."""

    local: Batch
    """This rank's part of the global batch. None if `stop` is true and it did not come."""
    padded: bool
    """Whether any image of this rank is smaller than the batch."""
    label_counts: LabelCounts
    """Counts over the global batch; the loss divides by them."""
    stop: bool
    """Whether any rank had been asked to save and leave when this step was loaded, one step ahead of its use."""
    data_wait_s: float
    """Seconds this rank waited for its loader."""
    replaced: tuple[str, ...] = ()
    """What was wrong with each replaced image of the global batch, in order."""


def device_batches(loader: BatchLoader, device: torch.device) -> Iterator[TrainingBatch]:
    """Move batches to the device one step ahead of their use, while the ranks agree on what is in them.

    The agreement is one small sum on the CPU, started a step early: the pixels of each label value and the images
    with a valid one, whether any rank found a broken file (then all ranks raise the same InputError), how many broken
    ones were replaced, and whether any rank was asked to stop.
    """
    pending = None
    # Copies to a GPU, and the resize there, run in parallel with the step before, in a separate stream.
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    batches = iter(loader)
    loaded: LoadedBatch | InputError | None = None
    arrived = True
    for _ in range(len(loader)):
        began = time.perf_counter()
        # After the last item of a loader that gave up, its rank still takes part in the agreement on the next step.
        loaded = next(batches) if arrived else loaded
        data_wait_s = time.perf_counter() - began
        fault, arrived = isinstance(loaded, InputError), isinstance(loaded, LoadedBatch)
        replaced = loaded.replaced if arrived else ()
        mine = LabelCounts.of(loaded.batch.counts) if arrived else LabelCounts([0] * 256, 0)
        flags = (int(fault), len(replaced), int(loader.patience.stop_asked()))
        agreement = distributed.all_reduce_sum_async(torch.tensor([*mine.pixels, mine.images, *flags]))
        padded = arrived and loaded.batch.padded
        with torch.cuda.stream(stream) if stream else contextlib.nullcontext():
            batch = _to_device(loaded, device) if arrived else loaded
            there = stream.record_event() if stream else None
        if pending:
            yield _agreed(*pending)
        pending = batch, there, replaced, padded, agreement, data_wait_s
    if pending:
        yield _agreed(*pending)


def _to_device(loaded: LoadedBatch, device: torch.device) -> Batch:
    batch = Batch(*(tensor.to(device, non_blocking=True) for tensor in loaded.batch))
    if loaded.grids is None:
        return batch
    size = tuple(batch.labels.shape[1:])
    return batch._replace(images=resize_windows(batch.images, loaded.grids.to(device, non_blocking=True), size))


def _agreed(
    batch: Batch | InputError | None,
    there: torch.cuda.Event | None,
    replaced: Sequence[str],
    padded: bool,
    agreement: Callable[[], torch.Tensor],
    data_wait_s: float,
) -> TrainingBatch:
    *pixels, images, faults, replacements, stops = agreement().tolist()
    if faults:
        distributed.raise_on_all_ranks(str(batch) if isinstance(batch, InputError) else None)
    everywhere = distributed.all_gather_object(replaced) if replacements else []
    if there is not None:
        stream = torch.cuda.current_stream()
        stream.wait_event(there)
        for tensor in batch or ():  # whose memory the other stream may not take back before this one has used it
            tensor.record_stream(stream)
    return TrainingBatch(
        batch,
        padded,
        LabelCounts(pixels, images),
        bool(stops),
        data_wait_s,
        tuple(fault for rank in everywhere for fault in rank),
    )
