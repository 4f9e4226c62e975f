"""The same bits on any number of processes with `train.shards`, measured.

    python -m benchmarks.same_bits --camvid data/camvid

Prints Markdown: the start of SHA-256 over everything that whole runs end with, on several numbers of processes and with
kills in between, beside a loop as it is commonly written (`benchmarks/stock_ddp.py`). `tests/dist/test_same_bits.py`
asserts on the same runs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import pickle
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import hardware, table
from benchmarks.same_numbers import run_config, train_stock
from fcn.checkpoints import load_checkpoint
from fcn.data.shapes import write_shapes
from tests.dist.ranks import run, started, wait_for_line

SHARDS, TIMEOUT_S = 12, 1800
NETWORKS = {
    "unet": [],
    "linknet": ["model.name=linknet", "model.norm=null", "model.width=null"],
    "fcn8s": ["model.name=fcn8s", "model.norm=null"],
    "fcn_resnet18": ["model.name=fcn_resnet18", "model.norm=null", "model.width=null"],
}
"""Overrides of the config. FCN-8s and FCN-ResNet have dropout."""


def arguments(folder: Path, data: Path, precision: str, steps: int, overrides: Sequence[str]) -> list[str]:
    """The command line of a run with crop, flip, jitter, sync-BN, clipping, warm-up and an average of the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    config = run_config(folder, data, precision, steps, workers=0)
    return ["train_ddp.py", "--config", config, f"train.shards={SHARDS}", *overrides]


def train(
    folder: Path, data: Path, precision: str, steps: int, processes: Sequence[int], overrides: Sequence[str] = ()
) -> dict[str, str]:
    """Fingerprints of a run on so many processes; on several numbers, one after another, each but the last killed."""
    command = arguments(folder, data, precision, steps, overrides)
    for turn, size in enumerate(processes[:-1], start=1):
        with started(size, *command, timeout_s=TIMEOUT_S) as process:
            wait_for_line(process, f"step {turn * steps // len(processes)}/")
            process.kill_all()
        assert load_checkpoint(folder / "run")["step"] < steps
    done = run(processes[-1], *command, timeout_s=TIMEOUT_S)
    assert not done.stderr, done.stderr
    return fingerprints(folder / "run")


def fingerprints(run_dir: Path) -> dict[str, str]:
    """SHA-256 of everything that a run ends with, by kind."""
    state = load_checkpoint(run_dir)
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    of_images = json.loads(next(run_dir.glob("scores_*.json")).read_text())
    statistics = {key for key in state["model"] if "running_" in key or "num_batches" in key}
    kinds = {
        "weights": {key: value for key, value in state["model"].items() if key not in statistics},
        "statistics": {key: state["model"][key] for key in statistics},
        "optimizer": state["optimizer"],
        "average": state["ema"],
        "losses": [(record["step"], record["loss"], record["grad_norm"]) for record in records if "loss" in record],
        "scores": of_images,
    }
    return {kind: _sha256(value) for kind, value in kinds.items()}


def _sha256(value: Any) -> str:
    digest = hashlib.sha256()
    for part in _flatten(value, ""):
        digest.update(part)
    return digest.hexdigest()


def _flatten(value: Any, path: str) -> Iterable[bytes]:
    """Of nested dicts and lists every leaf, with its place; of tensors the type and the bytes."""
    if isinstance(value, dict):
        for key in sorted(value, key=str):
            yield from _flatten(value[key], f"{path}/{key}")
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            yield from _flatten(item, f"{path}/{number}")
    elif isinstance(value, torch.Tensor):
        yield f"{path} {value.dtype} {tuple(value.shape)}".encode()
        yield value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    else:
        yield f"{path} {value!r}".encode()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--camvid", metavar="ROOT")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--networks", nargs="+", default=["unet", "linknet"], choices=list(NETWORKS))
    args = parser.parse_args()
    print(f"{hardware()}, gloo, one thread a process; {args.steps} steps of 12 images in {SHARDS} shards\n")
    worlds: list[tuple[int, ...]] = [(1,), (2,), (3,), (4,), (8,), (4, 2, 3, 8)]
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = folder / "shapes"
        write_shapes(data, train=50, val=20)
        runs = [(f"{net}, {kind}", kind, data, NETWORKS[net]) for net in args.networks for kind in ("fp32", "bf16")]
        if args.camvid:
            camvid = ["data.name=camvid", "data.scale=[0.5,1]", "data.crop=[90,120]", "eval.every=1000000"]
            runs.append(("unet on CamVid, fp32", "fp32", Path(args.camvid), camvid))
        for label, precision, root, overrides in runs:
            found = []
            for number, processes in enumerate(worlds):
                where = folder / f"{label}-{number}"
                found.append(_sha256(train(where, root, precision, args.steps, processes, overrides)))
            rows.append([label, *(digest[:12] for digest in found)])
            print(rows[-1], flush=True)
        stock = [train_stock(size, data, args.steps, folder / f"stock-{size}") for size in (1, 2, 3, 4)]
        rows.append(["stock DDP, fp32", *(hashlib.sha256(pickle.dumps(end)).hexdigest()[:12] for end in stock), "", ""])
    heads = [" → ".join(map(str, processes)) for processes in worlds]
    print(f"\n{table(['run', *heads], rows)}")


if __name__ == "__main__":
    main()
