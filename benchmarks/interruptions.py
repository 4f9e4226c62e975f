"""What being interrupted costs: leaving after a signal, coming back, and a save in the middle of training.

    python -m benchmarks.interruptions [--rounds 3]

A run on two processes (all GPUs, where there are any) is sent SIGTERM at its sixth step and started again. Then steps
of a network are timed with a save beside them, and without, in turn.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.common import CHECKOUT, publish, spread, table
from benchmarks.models import training
from fcn.checkpoints import BackgroundSaver
from fcn.data.shapes import write_shapes
from fcn.models import Precision

RUNS = {
    "U-Net of the quickstart": ["--config", "configs/quickstart.yaml", "train.precision=fp32"],
    "fcn8s": ["--config", "configs/fcn8s.yaml", "train.precision=fp32", "model.weights=null"],
}
OVERRIDES = [
    "data.name=shapes", "data.train=train", "data.crop=[64,64]", "data.workers=1", "train.batch_size=4",
    "train.epochs=null", "train.steps=10000", "train.log_every=1", "eval.every=10000", "checkpoint.every=10000",
    "wandb.mode=disabled",
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    processes = torch.cuda.device_count() or 2
    with tempfile.TemporaryDirectory() as folder:
        write_shapes(Path(folder) / "shapes", train=64, val=8)
        root = Path(folder)
        signals = [[name, *leave_and_return(command, root, processes, rounds)] for name, command in RUNS.items()]
        saves = [[name, *save_beside_steps(name, root, rounds)] for name in ("linknet", "fcn8s")]
    columns = [
        "checkpoint, MB",
        "one step, s",
        "SIGTERM to exit, s",
        "start to resumed, s",
        "start to its first step, s",
    ]
    text = f"{processes} processes, 64x64 crops, batch 4, {rounds} rounds, median (lowest–highest):\n\n"
    text += table(["run", *columns], signals)
    columns = ["state, MB", "one step, s", "copy, s", "write, s", "stall, s", "stall, steps"]
    text += (
        "\n\nA save beside training, 256x256, batch 2 (on a GPU 16), one process: the copy that the step waits for, "
        "the write behind it, and by how much both delay the steps meanwhile:\n\n"
    )
    text += table(["network", *columns], saves)
    publish("what an interruption costs", f"python -m benchmarks.interruptions --rounds {rounds}", text)


def leave_and_return(arguments: list[str], folder: Path, processes: int, rounds: int) -> list[str]:
    """Columns of the first table."""
    run_dir = folder / Path(arguments[1]).stem
    leaves, resumes, firsts = [], [], []
    command = [
        *(
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc_per_node={processes}",
            "train_ddp.py",
        ),
        *(*arguments, f"data.root={folder / 'shapes'}", f"run_dir={run_dir}", *OVERRIDES),
    ]
    for number in range(rounds + 1):
        began = time.perf_counter()
        with started(command) as process:
            if number:
                until(process, "resuming at step")
                resumes.append(time.perf_counter() - began)
            until(process, "images/s")
            firsts.append(time.perf_counter() - began)
            stamps = []
            for _ in range(5):
                until(process, "images/s")
                stamps.append(time.perf_counter())
            process.send_signal(signal.SIGTERM)
            sent = time.perf_counter()
            until(process, "stopped by a signal")
            process.communicate()
            leaves.append(time.perf_counter() - sent)
    (newest, *_) = sorted((run_dir / "checkpoints").glob("step_*.pt"), reverse=True)
    steps = [after - before for before, after in itertools.pairwise(stamps)]
    size = f"{newest.stat().st_size / 1e6:.3g}"
    return [size, spread(steps), spread(leaves), spread(resumes), spread(firsts[1:])]


@contextlib.contextmanager
def started(command: list[str]) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        command, cwd=CHECKOUT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        yield process
    finally:
        process.terminate()  # torchrun, which then ends its processes


def until(process: subprocess.Popen[str], text: str) -> None:
    """Read the output up to a line with `text`."""
    seen = []
    for line in process.stdout:
        seen.append(line)
        if text in line:
            return
    raise RuntimeError(f"never printed {text!r}:\n{''.join(seen)}")


def save_beside_steps(name: str, folder: Path, rounds: int) -> list[str]:
    """Columns of the second table."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    precision = Precision("bf16" if on_gpu else "fp32", True, device)
    model, optimizer, train, _ = training(name, {}, (256, 256), 16 if on_gpu else 2, precision)
    saver = BackgroundSaver(folder / f"saves-{name}", 2, print)
    quiet, copies, writes, stalls = [], [], [], []

    def timed(steps: int) -> float:
        began = time.perf_counter()
        for _ in range(steps):
            train()
        if on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter() - began

    timed(2)
    state = {"step": 0, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
    megabytes = sum(t.numel() * t.element_size() for t in tensors(state)) / 1e6
    count = 2
    for number in range(rounds + 1):
        alone = timed(count)
        began = time.perf_counter()
        saver.save(f"step_{number + 1:08d}.pt", state)
        copied = time.perf_counter()
        beside = timed(count)
        saver.wait()
        written = time.perf_counter()
        if number == 0:  # as many steps as a write takes
            count = max(2, int((written - copied) / (alone / count)) + 1)
            continue
        quiet.append(alone / count)
        copies.append(copied - began)
        writes.append(written - copied)
        stalls.append(copied - began + beside - alone)
    share = statistics.median(stalls) / statistics.median(quiet)
    return [f"{megabytes:.0f}", spread(quiet), spread(copies), spread(writes), spread(stalls), f"{share:.2g}"]


def tensors(value: object) -> list[torch.Tensor]:
    if isinstance(value, dict):
        return [tensor for item in value.values() for tensor in tensors(item)]
    if isinstance(value, list):
        return [tensor for item in value for tensor in tensors(item)]
    return [value] if isinstance(value, torch.Tensor) else []


if __name__ == "__main__":
    main()
