"""Throughput, waiting, FLOP/s and memory of a run, measured by the host's clock without waiting for the device."""

from __future__ import annotations

import contextlib
import copy
import re
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

if TYPE_CHECKING:
    from fcn.training.run import Run

PEAK_TFLOPS = {
    "B200": (2250, 1100, 80, 40), "H200": (989, 494, 67, 34), "H100 PCIe": (756, 378, 51, 26),
    "H100": (989, 494, 67, 34), "A100": (312, 156, 19.5, 9.7), "L40S": (362, 183, 92, 1.4), "L4": (121, 60, 30, 0.5),
    "A10": (125, 62, 31, 1.0), "V100": (125, 15.7, 15.7, 7.8), "T4": (65, 8.1, 8.1, 0.25),
}  # fmt: skip
"""Dense peak, 10^12 FLOP/s in 16 bits, TF32, float32, float64, by words of the GPU's name (NVIDIA's data sheets)."""


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Peak FLOP/s of a device for `train.precision`, by its data sheet; None for a CPU or a GPU that is not listed.

    For fp32 it is the peak of TF32, which cuDNN's convolutions use unless PyTorch is told otherwise.
    """
    if device.type != "cuda":
        return None
    words = re.findall(r"\w+", torch.cuda.get_device_name(device))  # "NVIDIA A100-SXM4-80GB"
    rows = [row for part, row in PEAK_TFLOPS.items() if all(word in words for word in part.split())]
    if not rows:
        return None
    convolutions = torch.backends.cudnn.allow_tf32
    column = {"fp32": 1 if convolutions else 2, "fp64": 3}.get(precision, 0)
    return rows[0][column] * 1e12


def step_flops(model: nn.Module, size: tuple[int, int] | None, images: int) -> float | None:
    """FLOPs of a training step of `images` images of `size` (height, width): three times the forward pass's.

    The forward pass is counted on the meta device in evaluation mode, so without an auxiliary head. The backward pass
    counts twice as much. None for images of mixed size, or for a network that does not run on the meta device.
    """
    if size is None:
        return None
    try:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            weightless = copy.deepcopy(model).to("meta").eval()
            weightless(torch.empty(1, 3, *size, device="meta", dtype=next(weightless.parameters()).dtype))
    except Exception:  # a user's own network may do anything with its input
        return None
    return 3.0 * counter.get_total_flops() * images


def memory_gb(device: torch.device) -> float:
    """Peak memory of this process so far, in 10^9 bytes: on the GPU, or of the process itself on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


class ThroughputMeter:
    """Measures throughput, waiting and remaining time.

    Args:
        batch_size: images of a step, over all processes.
        step: finished steps.
        steps: the run's length.
        flops: FLOPs of a step over all processes, or None.
        peak: FLOP/s of all devices together, or None.
    """

    def __init__(
        self, batch_size: int, step: int, steps: int, flops: float | None = None, peak: float | None = None
    ) -> None:
        self.batch_size, self.remaining, self.flops, self.peak = batch_size, steps - step, flops, peak
        self.began = time.perf_counter()
        self.count, self.waited_s, self.paused_s, self.saving_s = 0, 0.0, 0.0, 0.0
        self.total_s, self.total_count = 0.0, 0

    @property
    def first(self) -> bool:
        """Whether no step has been counted yet."""
        return self.count == 0 and self.total_count == 0

    def step(self, waited_s: float) -> None:
        self.count += 1
        self.waited_s += waited_s

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time inside does not count as training."""
        began = time.perf_counter()
        yield
        self.paused_s += time.perf_counter() - began

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """Time inside counts as waiting for a checkpoint."""
        began = time.perf_counter()
        yield
        self.saving_s += time.perf_counter() - began

    def read(self) -> dict[str, Any]:
        """Figures since the last reading: seconds per step, fractions of the time spent waiting, FLOP/s if known."""
        now = time.perf_counter()
        elapsed = max(1e-9, now - self.began - self.paused_s)
        self.total_s, self.total_count = self.total_s + now - self.began, self.total_count + self.count
        self.remaining -= self.count
        record = {
            "images_per_s": self.count * self.batch_size / elapsed,
            "step_s": elapsed / max(1, self.count),
            "data_wait": min(1.0, self.waited_s / elapsed),
            "save_wait": min(1.0, self.saving_s / elapsed),
            "eta_s": self.remaining * self.total_s / self.total_count,
        }
        if self.flops:
            record["tflops"] = self.count * self.flops / elapsed / 1e12
        if self.flops and self.peak:
            record["of_peak"] = self.count * self.flops / elapsed / self.peak
        self.began, self.count, self.waited_s, self.paused_s, self.saving_s = now, 0, 0.0, 0.0, 0.0
        return record


def meter_for(run: Run) -> ThroughputMeter:
    """A meter that starts at the run's step; rank 0's also knows the FLOPs of a step."""
    train, context = run.config.train, run.context
    flops = step_flops(run.state.model, run.config.data.crop, train.batch_size) if context.rank == 0 else None
    peak = peak_flops(context.device, train.precision)
    return ThroughputMeter(train.batch_size, run.step, run.steps, flops, peak and peak * context.size)


def profiler(steps: int | None, path: Path, said: Callable[[str], None]) -> Any:
    """A context that writes a trace of `steps` training steps; call its `step()` after each of them.

    The first five steps are not traced: they choose kernels and fill the loader's queue. None traces nothing.
    """
    if not steps:
        return _NoProfiler()

    def write(found: torch.profiler.profile) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        found.export_chrome_trace(str(path))
        said(f"trace of {steps} steps in {path}; open it at https://ui.perfetto.dev")

    schedule = torch.profiler.schedule(wait=3, warmup=2, active=steps, repeat=1)
    return torch.profiler.profile(schedule=schedule, on_trace_ready=write)


class _NoProfiler(contextlib.AbstractContextManager):
    def __exit__(self, *_: object) -> None:
        pass

    def step(self) -> None:
        pass
