"""What every benchmark shares: the machine in words, timing, and where results are written down."""

from __future__ import annotations

import datetime
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

CHECKOUT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).with_name("RESULTS.md")


def hardware() -> str:
    """Processor or GPU, and versions."""
    if torch.cuda.is_available():
        machine = torch.cuda.get_device_name()
    else:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.split(":", 1)[1].strip() for line in lines if "model name" in line]
        machine = f"{os.cpu_count()} cores of {names[0] if names else platform.machine()}"
    return f"{machine}, PyTorch {torch.__version__}, Python {platform.python_version()}"


def seconds(action: Callable[[], object], device: torch.device, at_least: float = 1.0) -> float:
    """Mean duration, over as many calls as fill `at_least` seconds, after one (on a GPU five) to warm up."""
    wait = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    for _ in range(5 if device.type == "cuda" else 1):
        action()
    wait()
    began, calls = time.perf_counter(), 0
    while time.perf_counter() - began < at_least:
        action()
        calls += 1
        if calls % 10 == 0:
            wait()
    wait()
    return (time.perf_counter() - began) / calls


def spread(values: Sequence[float]) -> str:
    """Median, lowest and highest."""
    return f"{statistics.median(values):.3g} ({min(values):.3g}–{max(values):.3g})"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def publish(title: str, command: str, text: str) -> None:
    """Print a result and put it on top of RESULTS.md, with date, hardware and versions."""
    section = f"## {datetime.date.today()} · {title}\n\n`{command}`: {hardware()}.\n\n{text.strip()}\n"
    print(section)
    head, mark, rest = RESULTS.read_text(encoding="utf-8").partition("\n## ")
    RESULTS.write_text(f"{head}\n{section}{mark}{rest}", encoding="utf-8")
