"""Which rank the others wait for: what each rank's steps take by themselves, without waiting in exchanges.

Exchanges make every rank's step as long as the slowest one's. Only what is left without them tells which one that is.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch


class CommTimer:
    """How long this rank waits for others in the exchanges of a step; see `DistributedContext.comm_timer`.

    On a CPU it reads the host's clock. On a GPU the host waits for nothing, so it records events in the stream that
    waits, which cost some microseconds each: counted only while `active`.
    """

    def __init__(self) -> None:
        self.active = False
        self._host_s = 0.0
        self._spans: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._ready: float | torch.cuda.Event | None = None
        """When the last bucket of gradients was ready."""

    @contextlib.contextmanager
    def counting(self, tensor: torch.Tensor) -> Iterator[None]:
        """Inside is an exchange of `tensor` that waits for other ranks."""
        if not self.active:
            yield
            return
        began = _now(tensor)
        yield
        self._add(began, _now(tensor))

    def gradients_are_ready(self, gradients: torch.Tensor) -> None:
        """The last bucket begins to travel; the backward pass ends when it has arrived."""
        if self.active:
            self._ready = _now(gradients)

    def backward_ended(self, loss: torch.Tensor) -> None:
        if self._ready is not None:
            self._add(self._ready, _now(loss))
            self._ready = None

    def _add(self, began: float | torch.cuda.Event, ended: float | torch.cuda.Event) -> None:
        if isinstance(began, float):
            self._host_s += ended - began
        else:
            self._spans.append((began, ended))

    def take(self) -> float:
        """Seconds since the last call; with events, wait for the device first."""
        seconds = self._host_s + sum(began.elapsed_time(ended) for began, ended in self._spans) / 1000
        self._host_s, self._spans = 0.0, []
        return seconds


def _now(tensor: torch.Tensor) -> float | torch.cuda.Event:
    if not tensor.is_cuda:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


class ComputeTimer:
    """What a rank's steps take without waiting for other ranks: equal on all ranks unless one is slow.

    On a CPU it measures every step; on a GPU, where it takes events, the steps that are `sampled`.
    """

    def __init__(self, device: torch.device, comm_timer: CommTimer) -> None:
        self.device, self.comm_timer = device, comm_timer
        self._steps = 0
        self._own_s, self._data_s = 0.0, 0.0
        self._span: tuple[torch.cuda.Event, torch.cuda.Event] | None = None

    @contextlib.contextmanager
    def step(self, data_wait_s: float, sampled: bool) -> Iterator[None]:
        """Inside is a step without the loading of its data, which the rank has waited `data_wait_s` for."""
        if self.device.type == "cuda":
            if not sampled:
                yield
                return
            self._span = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            self._span[0].record()
        began = time.perf_counter()
        self.comm_timer.active = True
        try:
            yield
        finally:
            self.comm_timer.active = False
        if self._span:
            self._span[1].record()
        else:
            self._own_s += time.perf_counter() - began
        self._steps, self._data_s = self._steps + 1, self._data_s + data_wait_s

    def take(self) -> tuple[float, float]:
        """(own seconds, seconds waiting for the loader) of a step, averaged since the last call.

        Wait for the device first.
        """
        if self._span:
            self._own_s = self._span[0].elapsed_time(self._span[1]) / 1000
        steps = max(1, self._steps)
        found = max(0.0, self._own_s - self.comm_timer.take()) / steps, self._data_s / steps
        self._steps, self._own_s, self._data_s, self._span = 0, 0.0, 0.0, None
        return found


def slowest(times: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """From `ComputeTimer.take()` of two or more ranks: the rank that the others wait for, its seconds, their median."""
    sums = [own + data for own, data in times]
    rank = max(range(len(times)), key=sums.__getitem__)
    others = statistics.median(sums[:rank] + sums[rank + 1 :])
    return {"rank": rank, "own_s": times[rank][0], "data_s": times[rank][1], "others_s": others}


SLOW, PATIENCE = 1.25, 3
"""A rank is a straggler if its steps take this many times the others', in this many records in a row."""


class StragglerDetector:
    """Tells a rank that stays slow from one that was slow once; `hosts` are the ranks' machines."""

    def __init__(self, hosts: Sequence[str]) -> None:
        self.hosts = hosts
        self._rank, self._times = -1, 0

    def notice(self, found: dict[str, Any]) -> str | None:
        """A warning from what `slowest` returns, once for as long as a rank stays slow."""
        rank, seconds = found["rank"], found["own_s"] + found["data_s"]
        slow = seconds > SLOW * found["others_s"]
        self._times = (self._times + 1 if rank == self._rank else 1) if slow else 0
        self._rank = rank
        if self._times != PATIENCE:
            return None
        waits = found["data_s"] > seconds - found["others_s"] - found["data_s"]
        why = f"it waits {found['data_s']:.3g} s for its data" if waits else "its processor or GPU is slow or shared"
        return (
            f"rank {rank} on {self.hosts[rank]} is slow: {seconds:.3g} s a step, the others "
            f"{found['others_s']:.3g} s; {why}"
        )
