"""Worker processes that read batches: start, transfer, and what to do about one that died, hangs or has no room."""

from __future__ import annotations

import contextlib
import functools
import math
import multiprocessing.context
import multiprocessing.forkserver
import os
import signal
import socket
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from fcn import distributed
from fcn.distributed import SIGNALS, end_with_creator
from fcn.errors import InputError

POLL_S = 0.5
"""How often a loader that waits for its workers looks whether they are alive."""
PREFETCHED = 2
"""Batches that each worker reads ahead."""
SHARED_MEMORY = Path("/dev/shm")
"""Where workers put batches for their process, on Linux."""
MORE_SHARED_MEMORY = (
    "give the container more shared memory (docker run --shm-size=8g, or --ipc=host), or set data.workers to fewer, or "
    "to 0"
)


class Patience(NamedTuple):
    """How long to wait for a batch."""

    timeout_s: float = math.inf
    """How long other ranks wait for this one; 0.8 of that is how long it waits itself before it tells them why."""
    stop_asked: Callable[[], bool] = lambda: False
    """When this is true, a batch that is not there yet is given up."""


ENDLESS = Patience()


class BatchLoader(DataLoader):
    """A DataLoader that gives up on workers that died, hang, or cannot deliver: then its last item is an InputError.

    The last item is None if the process is asked to stop while it waits for a batch.
    """

    patience = ENDLESS

    def __iter__(self) -> Iterator[Any]:
        with _without_advice():
            items = super().__iter__()
        gave_up = False
        try:
            for _ in range(len(self)):
                item = self._next(items)
                gave_up = item is None or isinstance(item, _GaveUp)
                yield item.fault if isinstance(item, _GaveUp) else item
                if gave_up:
                    return
        finally:
            if gave_up or self.patience.stop_asked():  # PyTorch would wait for each of them
                for worker in getattr(items, "_workers", ()):
                    worker.kill()

    def _next(self, items: Iterator[Any]) -> Any:
        began = time.monotonic()
        while True:
            try:
                return next(items)
            except (RuntimeError, OSError, EOFError) as error:
                timed_out = str(error).startswith("DataLoader timed out")
                if timed_out and self.patience.stop_asked():
                    return None
                pinning = getattr(items, "_pin_memory_thread", None)
                if timed_out and pinning and not pinning.is_alive():
                    raise RuntimeError("the thread that pins memory has ended") from None
                if timed_out and time.monotonic() - began < 0.8 * self.patience.timeout_s:
                    continue
                codes = [worker.exitcode for worker in getattr(items, "_workers", ()) if worker.exitcode]
                fault = _fault_of_workers(error, time.monotonic() - began, codes) if self.num_workers else None
                if fault is None:
                    raise
                return _GaveUp(fault)


class _GaveUp(NamedTuple):
    """No further item will come."""

    fault: InputError


@contextlib.contextmanager
def _without_advice() -> Iterator[None]:
    """About more workers than cores, by each process; the start screen says how many there are."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="This DataLoader will create")
        yield


def _fault_of_workers(
    error: RuntimeError | OSError | EOFError, waited_s: float, codes: Sequence[int]
) -> InputError | None:
    """What is wrong with the workers; None if the error comes from the data set's own code.

    Args:
        codes: exit statuses of those that have ended, negative for signals.
    """
    text = str(error)
    if text.startswith("DataLoader timed out"):
        return InputError(
            f"data.workers: no batch came for {waited_s:.0f} s, because a worker waits for a file or hangs; look at "
            f"the storage of data.root, or find the place with data.workers=0"
        )
    if text.startswith("Too many open files"):
        return InputError(
            "data.workers: too many open files; raise the limit (ulimit -n), or set data.workers to fewer"
        )
    if text.startswith("Caught ") or (isinstance(error, RuntimeError) and not text.startswith("DataLoader worker (")):
        return None
    # Or an OSError: the worker had batches that were still to be fetched from it.
    if codes and codes[0] > 0:
        return InputError(
            f"data.workers: a worker exited with status {codes[0]}, which the code that reads the data must not do; "
            f"find the place with data.workers=0"
        )
    how = f"killed by {signal.Signals(-codes[0]).name}" if codes else text or type(error).__name__
    return InputError(
        f"data.workers: a worker died ({how}), most often for want of memory; look for it in the system's log, and set "
        f"data.workers to fewer, or to 0"
    )


def batch_loader(
    batches: Dataset, sampler: Iterable, workers: int, device: torch.device, patience: Patience = ENDLESS
) -> BatchLoader:
    """`batches[key]` for each key that the sampler yields, in order."""
    with _without_advice():
        loader = BatchLoader(
            _Shared(batches) if workers else batches,
            batch_size=None,  # the sampler yields whole batches
            sampler=sampler,
            num_workers=workers,
            pin_memory=device.type == "cuda",
            multiprocessing_context=_worker_context() if workers else None,
            worker_init_fn=_start_worker,
            timeout=POLL_S if workers else 0,
            prefetch_factor=PREFETCHED if workers else None,
        )
    loader.patience = patience
    return loader


def item_loader(dataset: Dataset, count: int, workers: int) -> BatchLoader:
    """The items 0, 1, … of any map-style data set, in order, each as it is."""
    return batch_loader(dataset, range(count), workers, torch.device("cpu"))


class _Shared(Dataset):
    """Moves a worker's tensors to shared memory where they are read.

    PyTorch would do so later, in a thread whose errors reach nobody: the batch would never come.
    """

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __getitem__(self, index: Any) -> Any:
        item = self.dataset[index]
        try:
            if get_worker_info() is not None:
                _share(item)
        except RuntimeError as error:
            return InputError(f"data.workers: a batch does not fit {SHARED_MEMORY} ({error}); {MORE_SHARED_MEMORY}")
        return item


def _share(item: Any) -> None:
    if isinstance(item, torch.Tensor):
        item.share_memory_()
    elif isinstance(item, tuple | list):
        for part in item:
            _share(part)


@functools.cache
def _worker_context() -> multiprocessing.context.BaseContext:
    """Workers come from a fork server, which has one thread.

    The training process has several (gloo's, the loaders'), and a fork next to threads can inherit a lock that nobody
    will ever release: an evaluation once waited forever for its first batch. The server ignores signals from its start,
    because a launcher sends them to the whole process group and only the training process may react.
    """
    context = multiprocessing.get_context("forkserver")
    handlers = {number: signal.signal(number, signal.SIG_IGN) for number in SIGNALS}
    multiprocessing.forkserver.ensure_running()
    for number, handler in handlers.items():
        signal.signal(number, handler)
    return context


def _start_worker(_: int) -> None:
    for number in SIGNALS:  # PyTorch and the fork server have set handlers
        signal.signal(number, signal.SIG_IGN)
    end_with_creator()


def require_shared_memory(workers: int, need: float) -> None:
    """Compare what the workers of all processes on this machine hold at a time with what is free; all ranks call it.

    Args:
        workers: of this process.
        need: of this process's workers, in bytes.

    Raises:
        InputError: on every rank, if it is not enough on any machine.
    """
    me = socket.gethostname()
    needs = [theirs for host, theirs in distributed.all_gather_object((me, need)) if host == me]

    def compare() -> None:
        if not (workers and SHARED_MEMORY.is_dir()):
            return
        state = os.statvfs(SHARED_MEMORY)
        total, free = sum(needs) / 1e6, state.f_bavail * state.f_frsize / 1e6
        if total > free:
            raise InputError(
                f"data.workers: found {workers}, and what this run's workers hold on {me} takes {total:,.1f} MB of "
                f"{SHARED_MEMORY}, where {free:,.1f} MB are free; {MORE_SHARED_MEMORY}"
            )

    distributed.run_on_all_ranks(compare)
