"""Batches: worker processes that read, the padding collate, and the hand-over to the device."""

from __future__ import annotations

import contextlib
import functools
import multiprocessing.context
import multiprocessing.forkserver
import random
import signal
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from fcn import distributed, seeding
from fcn.data.datasets import SegmentationDataset
from fcn.data.labels import IGNORE_INDEX
from fcn.data.samplers import Draw, EvalSampler, GlobalBatchSampler, Share
from fcn.data.transforms import EvalTransform, TrainTransform, resize_windows
from fcn.errors import InputError
from fcn.preempt import SIGNALS


class Batch(NamedTuple):
    images: torch.Tensor
    """(N, H, W, 3) uint8, each image at the top left."""
    labels: torch.Tensor
    """(N, H, W) uint8, 255 = ignore."""
    sizes: torch.Tensor
    """(N, 2) int64: height and width of each image before padding."""
    indices: torch.Tensor
    """(N,) int64: places in the split."""
    keys: torch.Tensor
    """(N,) int64 from 0 to 2³¹ - 1: what dropout draws for each image follows from it."""
    counts: torch.Tensor
    """(N, 256) int64: pixels of each label value in each image."""

    @property
    def padded(self) -> bool:
        """Whether any image is smaller than the batch (reads host memory; ask before moving to the device)."""
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
    """Stack samples of mixed sizes, perhaps none: images padded at the bottom and right, labels there 255.

    What stands in the padding of the images does not matter: `transforms.to_input` makes it 0 after normalisation.

    Args:
        images: (h, w, 3) uint8 each.
        labels: (h, w) uint8 each.
        size: height and width of the batch; by default the largest of each.
        keys: keys of the samples, for dropout; by default 0.
        canvas: height and width of the images where they are not yet of their labels' size; by default `size`.
    """
    size = size or largest(labels)
    stacked = _stack(images, (*(canvas or size), 3), 0)
    targets = _stack(labels, size, IGNORE_INDEX)
    sizes = torch.tensor([target.shape for target in labels], dtype=torch.int64).reshape(-1, 2)
    numbers = [torch.tensor(column, dtype=torch.int64) for column in (indices, keys or [0] * len(images))]
    counts = count_labels([row[:height, :width] for row, (height, width) in zip(targets, sizes.tolist(), strict=True)])
    counts[:, IGNORE_INDEX] += size[0] * size[1] - sizes.prod(1)
    return Batch(torch.from_numpy(stacked), torch.from_numpy(targets), sizes, *numbers, counts)


def _stack(arrays: Sequence[np.ndarray], shape: tuple[int, ...], beside: int) -> np.ndarray:
    """(N, *shape) uint8: each array at the top left, and a number beside it."""
    stacked = np.empty((len(arrays), *shape), np.uint8)
    for row, array in zip(stacked, arrays, strict=True):
        height, width = array.shape[:2]
        row[:height, :width], row[:height, width:], row[height:] = array, beside, beside
    return stacked


def largest(arrays: Sequence[np.ndarray]) -> tuple[int, int]:
    """The height and the width that all of them fit into."""
    return max(array.shape[0] for array in arrays), max(array.shape[1] for array in arrays)


class LoadedShare(NamedTuple):
    """A rank's share of a step as its loader hands it over."""

    batch: Batch
    replaced: Sequence[str] = ()
    """What was wrong with each image that another one stands in for."""
    grids: torch.Tensor | None = None
    """Where the device resizes: (N, 2, 5) float64, see `TrainTransform.window`; `batch.images` are the windows."""


def read_arrays(dataset: SegmentationDataset, index: int) -> tuple[np.ndarray, np.ndarray]:
    """Image (H, W, 3) and labels (H, W) of a sample, without copying those of a data set that has them as arrays."""
    own = getattr(dataset, "read_arrays", None)
    if own:
        return own(index)
    image, labels = dataset.read(index)
    return np.asarray(image), np.asarray(labels)


class TrainShares(Dataset):
    """Loads a rank's share of a step: `shares[share]` is a LoadedShare, or the InputError that a file caused.

    An error is a value here: raised in a worker, it would reach the user as that worker's traceback.

    Args:
        skip: let another image stand in for a broken one. Which one, and how it is cut, follows from the seed, the
            epoch and the place of the broken image, so every number of processes trains on the same.
        resize_later: leave the resize of images to `device_steps`.
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

    def __getitem__(self, share: Share) -> LoadedShare | InputError:
        try:
            size = self._size(share)
            samples, replaced = [], []
            for draw in share.mine:
                try:
                    samples.append(self._load(self.transform, draw.index, draw))
                except InputError as error:
                    if not self.skip:
                        raise
                    samples.append(self._stand_in(draw, size, error))
                    replaced.append(str(error))
            keys = [seeding.derive(self.seed, "dropout", draw.epoch, draw.index) >> 33 for draw in share.mine]
            images, labels, grids = ([sample[part] for sample in samples] for part in range(3))
            canvas = largest(images) if self.resize_later and images else None
            batch = pad_collate(images, labels, [draw.index for draw in share.mine], size, keys, canvas)
            return LoadedShare(batch, replaced, torch.from_numpy(np.stack(grids)) if canvas else None)
        except InputError as error:
            return error

    def _load(
        self, transform: TrainTransform, index: int, draw: Draw
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """(pixels, labels, where a later resize puts the pixels) of an image in the place of a draw."""
        pair = read_arrays(self.dataset, index)
        if self.resize_later:
            return transform.window(*pair, self._rng(draw))
        return *transform(*pair, self._rng(draw)), None

    def shape(self, draw: Draw) -> tuple[int, int]:
        """Height and width of a sample as it will be loaded, from the size in its file's header."""
        plan = self.transform.plan(self.dataset.size(draw.index), self._rng(draw))
        return plan.height, plan.width

    def _rng(self, draw: Draw) -> random.Random:
        return seeding.generator(self.seed, "augment", draw.epoch, draw.index)

    def _size(self, share: Share) -> tuple[int, int]:
        """Height and width of the whole step's batch, equal on every rank: padding must not depend on who shares it.

        It is made of the sizes in the files' headers. Whether the rest of a file is broken only its reader knows, so a
        stand-in has to fit into the batch as it is.
        """
        if self.transform.crop:
            return self.transform.crop
        sizes = []
        for draw in share.all:
            try:
                sizes.append(self.shape(draw))
            except InputError as error:
                if not self.skip:
                    raise
                fault = error
        for index in [] if sizes else self._substitutes(share.all[0]):
            with contextlib.suppress(InputError):
                sizes = [self.dataset.size(index)]
                break
        if not sizes:
            raise InputError(f"{fault}; and {MOST_STAND_INS} images that could replace it are broken, too")
        return max(height for height, _ in sizes), max(width for _, width in sizes)

    def _stand_in(
        self, draw: Draw, size: tuple[int, int], fault: InputError
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        transform = TrainTransform(size, self.transform.scale, self.transform.hflip, self.transform.jitter)
        for index in self._substitutes(draw):
            with contextlib.suppress(InputError):
                return self._load(transform, index, draw)
        raise InputError(f"{fault}; and {MOST_STAND_INS} images that could replace it are broken, too")

    def _substitutes(self, draw: Draw) -> list[int]:
        """Images that may stand in for a broken one, in the order in which they are tried."""
        order = seeding.permutation(len(self.dataset), self.seed, "stand-in", draw.epoch, draw.index)
        return order[:MOST_STAND_INS].tolist()


MOST_STAND_INS = 16
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


def train_loader(shares: TrainShares, sampler: GlobalBatchSampler, workers: int, device: torch.device) -> DataLoader:
    return _loader(shares, sampler, workers, device)


def eval_loader(batches: Dataset, sampler: EvalSampler, workers: int, device: torch.device) -> DataLoader:
    """What `batches[indices]` gives for each list of indices of the sampler, in order."""
    return _loader(batches, sampler, workers, device)


def item_loader(dataset: Dataset, count: int, workers: int) -> DataLoader:
    """The items 0, 1, … of any map-style data set, in order, each as it is."""
    return _loader(dataset, range(count), workers, torch.device("cpu"))


def _loader(dataset: Dataset, sampler: Iterable, workers: int, device: torch.device) -> DataLoader:
    with warnings.catch_warnings():
        # About more workers than cores, by each process; the start screen says how many there are.
        warnings.filterwarnings("ignore", message="This DataLoader will create")
        return DataLoader(
            dataset,
            batch_size=None,  # the sampler yields whole batches
            sampler=sampler,
            num_workers=workers,
            pin_memory=device.type == "cuda",
            multiprocessing_context=_worker_context() if workers else None,
            worker_init_fn=_start_worker,
        )


@functools.cache
def _worker_context() -> multiprocessing.context.BaseContext:
    """Workers come from a fork server, which has one thread.

    The training process has several (gloo's, the loaders'), and a fork beside threads can inherit a lock that nobody
    will ever release: seen as an evaluation that waited for ever for its first batch. Signals that a launcher sends to
    the whole process group are ignored by the server from birth: what to do is the training process's decision.
    """
    context = multiprocessing.get_context("forkserver")
    handlers = {number: signal.signal(number, signal.SIG_IGN) for number in SIGNALS}
    multiprocessing.forkserver.ensure_running()
    for number, handler in handlers.items():
        signal.signal(number, handler)
    return context


def _start_worker(_: int) -> None:
    for number in SIGNALS:  # PyTorch and the fork server have set their own
        signal.signal(number, signal.SIG_IGN)


class Totals(NamedTuple):
    """What the labels of a step's global batch hold, as integers, so equal however many ranks counted them."""

    pixels: list[int]
    """256 numbers: pixels of each label value."""
    images: int
    """Images with a valid pixel."""

    @property
    def valid(self) -> int:
        """Pixels that are not ignored."""
        return sum(self.pixels[:IGNORE_INDEX])

    @classmethod
    def of(cls, counts: torch.Tensor) -> Totals:
        """The totals of some images alone; `counts` is (N, 256) int64 on the CPU, as in a Batch."""
        return cls(counts.sum(0).tolist(), int(counts[:, :IGNORE_INDEX].any(1).sum()))


class Step(NamedTuple):
    """A step's data on this rank's device, and what all ranks know about the step."""

    batch: Batch
    padded: bool
    totals: Totals
    """Counts over the global batch, which the loss divides by."""
    stop: bool
    """Whether any rank was asked to save and leave by the time that this step was loaded, one step ahead of its use."""
    waited_s: float
    """Seconds this rank waited for its loader."""
    replaced: tuple[str, ...] = ()
    """What was wrong with each image of the global batch that another one stands in for, in order."""


def device_steps(
    loader: DataLoader, device: torch.device, stop_asked: Callable[[], bool] = lambda: False
) -> Iterator[Step]:
    """Move batches to the device one step ahead of their use, while the ranks agree on what is in them.

    The agreement is one small sum on the CPU, started a step early: the pixels of each label value and the images
    with a valid one, whether any rank found a broken file (then all ranks raise the same InputError), how many broken
    ones were replaced, and whether any rank was asked to stop.
    """
    pending = None
    batches = iter(loader)
    # Copies to a GPU, and the resize there, run beside the step before, in a stream of their own.
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    for _ in range(len(loader)):
        began = time.perf_counter()
        loaded: LoadedShare | InputError = next(batches)
        waited_s = time.perf_counter() - began
        fault = isinstance(loaded, InputError)
        replaced = () if fault else loaded.replaced
        mine = Totals([0] * 256, 0) if fault else Totals.of(loaded.batch.counts)
        flags = (int(fault), len(replaced), int(stop_asked()))
        agreement = distributed.all_reduce_sum_later(torch.tensor([*mine.pixels, mine.images, *flags]))
        padded = not fault and loaded.batch.padded
        with torch.cuda.stream(stream) if stream else contextlib.nullcontext():
            batch = loaded if fault else _to_device(loaded, device)
            there = stream.record_event() if stream else None
        if pending:
            yield _agreed(*pending)
        pending = batch, there, replaced, padded, agreement, waited_s
    if pending:
        yield _agreed(*pending)


def _to_device(loaded: LoadedShare, device: torch.device) -> Batch:
    batch = Batch(*(tensor.to(device, non_blocking=True) for tensor in loaded.batch))
    if loaded.grids is None:
        return batch
    size = tuple(batch.labels.shape[1:])
    return batch._replace(images=resize_windows(batch.images, loaded.grids.to(device, non_blocking=True), size))


def _agreed(
    batch: Batch | InputError,
    there: torch.cuda.Event | None,
    replaced: Sequence[str],
    padded: bool,
    agreement: Callable[[], torch.Tensor],
    waited_s: float,
) -> Step:
    *pixels, images, faults, replacements, stops = agreement().tolist()
    if faults:
        distributed.raise_together(str(batch) if isinstance(batch, InputError) else None)
    everywhere = distributed.gather(replaced) if replacements else []
    if there is not None:
        stream = torch.cuda.current_stream()
        stream.wait_event(there)
        for tensor in batch:  # whose memory the other stream may not take back before this one has used it
            tensor.record_stream(stream)
    return Step(
        batch,
        padded,
        Totals(pixels, images),
        bool(stops),
        waited_s,
        tuple(fault for rank in everywhere for fault in rank),
    )
