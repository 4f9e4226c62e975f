"""What every benchmark shares: the machine in words, timing, rivals that take turns, and where results are written."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import multiprocessing
import os
import platform
import socket
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fcn import distributed
from fcn.config import Config, config_from_dict
from fcn.distributed import DistributedContext, StopFlag
from fcn.tracking import Console, MetricsFile, Record, Tracker, Trackers
from fcn.training import build_run, fit, open_splits

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


def ratios(values: Sequence[float], base: Sequence[float]) -> list[float]:
    """One ratio per round."""
    return [value / other for value, other in zip(values, base, strict=True)]


def take_turns(rivals: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[Any]]:
    """Results of every rival: A B C, A B C, … after a round that does not count. What slows the machine slows all."""
    results = [{name: rival() for name, rival in rivals.items()} for _ in range(rounds + 1)][1:]
    return {name: [result[name] for result in results] for name in rivals}


def parser(text: str | None, rounds: int) -> argparse.ArgumentParser:
    """With what every benchmark takes: --rounds and --dry-run."""
    made = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--rounds", type=int, default=rounds, help="turns of each rival; default: %(default)s")
    made.add_argument("--dry-run", action="store_true", help="print the result, and leave RESULTS.md as it is")
    return made


def command() -> str:
    """The command line under way; of paths the last part alone."""
    words = [Path(word).name if "/" in word and "=" not in word else word for word in sys.argv[1:]]
    return " ".join(["python -m", f"benchmarks.{Path(sys.argv[0]).stem}", *words])


def publish(title: str, command: str, text: str, dry_run: bool = False) -> None:
    """Print a result and put it on top of RESULTS.md, with date, hardware and versions."""
    section = f"## {datetime.date.today()} · {title}\n\n`{command}`: {hardware()}.\n\n{text.strip()}\n"
    print(section)
    if dry_run:
        return
    head, mark, rest = RESULTS.read_text(encoding="utf-8").partition("\n## ")
    RESULTS.write_text(f"{head}\n{section}{mark}{rest}", encoding="utf-8")


class InMemory:
    """A data set by import path: random images and labels of one size, decoded already."""

    def __init__(self, root: str, split: str, size: tuple[int, int], count: int = 64, classes: int = 21) -> None:
        rng, count = np.random.default_rng(0), count if split == "train" else 1
        self.classes = [f"class {number}" for number in range(classes)]
        self.images = rng.integers(0, 256, (count, *size, 3), np.uint8)
        self.labels = rng.integers(0, classes, (count, *size), np.uint8)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        return self.images[index], self.labels[index]

    def size(self, index: int) -> tuple[int, int]:
        return self.labels.shape[1:]


def settings(
    folder: str | Path, model: str, size: Sequence[int], batch: int, window: int, overrides: Sequence[str] = ()
) -> Config:
    """Of a run that trains on, logs every `window` steps, and neither scores nor saves before its end; in memory."""
    values = {
        "run_dir": str(folder),
        "data": {
            "name": "benchmarks.common:InMemory",
            "root": ".",
            "crop": list(size),
            "hflip": 0.0,
            "workers": 0,
            "options": {"size": list(size)},
        },
        "model": {"name": model},
        "train": {"batch_size": batch, "steps": 10**9, "log_every": window, "precision": "fp32"},
        "optim": {"schedule": "constant", "lr": 1e-4},
        "eval": {"every": 10**9, "batch_size": 1, "pictures": 0},
        "checkpoint": {"every": 10**9},
        "wandb": {"mode": "disabled"},
    }
    return config_from_dict(values, "benchmark", list(overrides))


def harness(context: DistributedContext, turn: Callable[[float], None], config: Config) -> None:
    """Train as `train_ddp.py` does; rank 0 calls `turn(seconds)` after every `train.log_every` steps."""
    run, _ = build_run(config, context, open_splits(config))
    run.folder.mkdir(parents=True, exist_ok=True)
    console, trackers = Console.silent(), Trackers(print)
    if context.rank == 0:
        console.file = Console(log_file=run.folder / "log.txt").file
        trackers.add(lambda: console)
        trackers.add(lambda: MetricsFile(run.folder / "metrics.jsonl"))
        trackers.add(lambda: _Turns(turn))
    fit(run, console, trackers, StopFlag())


class _Turns(Tracker):
    """A tracker that hands over when a window of steps is done."""

    def __init__(self, turn: Callable[[float], None]) -> None:
        self.turn, self.began = turn, time.perf_counter()

    def log(self, record: Record) -> None:
        if record["event"] == "train":
            self.turn(time.perf_counter() - self.began)
            self.began = time.perf_counter()


class Job:
    """Processes of one group that work when it is their turn, so that several jobs can be timed in turn.

    Each process runs `function(context, turn, *args)`. After each window of steps, rank 0 calls `turn(seconds)`, which
    returns when the job's next turn has come. The other ranks wait for rank 0 in a collective.
    """

    def __init__(self, processes: int, threads: int | None, function: Callable[..., None], *args: Any) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["fcn.training.loop"])
        with contextlib.closing(socket.socket()) as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.pipe, theirs = context.Pipe()
        self.ranks = [
            context.Process(
                target=_rank,
                args=(rank, processes, port, threads, None if rank else theirs, function, args),
            )
            for rank in range(processes)
        ]
        for process in self.ranks:
            process.start()
        theirs.close()
        self.done()  # the first window warms up

    def go(self) -> None:
        self.pipe.send(None)

    def done(self) -> float:
        """Seconds of the window under way, when it is over."""
        return self.pipe.recv()

    def turn(self, skip: int = 0) -> float:
        """Seconds of a window, after `skip` others, which use up what loaders have prepared in the pause."""
        for _ in range(skip + 1):
            self.go()
            took = self.done()
        return took

    def close(self) -> None:
        for process in self.ranks:
            process.kill()


def _rank(
    rank: int, size: int, port: int, threads: int | None, pipe: Connection | None, function: Callable, args: tuple
) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    if threads:
        torch.set_num_threads(threads)

    def turn(seconds: float) -> None:
        try:
            pipe.send(seconds)
            pipe.recv()
        except (EOFError, OSError):  # nobody waits for us any more
            os._exit(1)

    function(distributed.start(), turn, *args)
