"""The networks side by side: parameters, multiply-adds, images per second; and LinkNet against U-Net on CamVid.

    python -m benchmarks.models                                   every network, at 512x512
    python -m benchmarks.models --camvid data/camvid              LinkNet and U-Net trained for equal steps

Prints Markdown. Timings are medians over rounds in which every network has its turn, with the lowest and the highest.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import CHECKOUT, hardware, seconds, spread
from fcn.config import Loss, Optim
from fcn.data.loaders import Batch, Step, Totals, count_labels
from fcn.engine import train_step
from fcn.inference import infer
from fcn.losses import build_loss
from fcn.models import MODELS, build_model
from fcn.optim import build_optimizer
from fcn.run import DTYPES, Numerics

CLASSES = 21
VARIANTS = [
    *((name, {}) for name in MODELS if name not in ("unet", "linknet")),
    ("fcn8s", {"layout": "same"}),
    ("unet", {"norm": "none"}),
    ("unet", {"norm": "batch"}),
    ("linknet", {"encoder": "plain"}),
    ("linknet", {"encoder": "resnet18"}),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, nargs=2, default=[512, 512], metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--batch", type=int, default=None, help="images of a pass; default: 1 on a CPU, 16 on a GPU")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--precision", choices=DTYPES, default=None, help="default: fp32 on a CPU, bf16 on a GPU")
    parser.add_argument("--camvid", metavar="ROOT", help="train LinkNet and U-Net there instead")
    parser.add_argument("--steps", type=int, default=150, help="of each training with --camvid")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="config keys for --camvid")
    args = parser.parse_args()
    cuda = torch.cuda.is_available()
    if args.camvid:
        compare_on_camvid(args.camvid, args.steps, args.overrides)
    else:
        device = torch.device("cuda" if cuda else "cpu")
        numerics = Numerics(args.precision or ("bf16" if cuda else "fp32"), True, device)
        reviewers_table(tuple(args.size), args.batch or (16 if cuda else 1), args.rounds, numerics)


def reviewers_table(size: tuple[int, int], batch: int, rounds: int, numerics: Numerics) -> None:
    """Every network, with `CLASSES` classes."""
    times: dict[int, tuple[list[float], list[float]]] = {}
    for _ in range(rounds):
        for number, (name, options) in enumerate(VARIANTS):
            inference, training = measure(name, options, size, batch, numerics)
            found = times.setdefault(number, ([], []))
            found[0].append(batch / inference)
            found[1].append(batch / training)
    height, width = size
    print(f"{hardware()}, {numerics.precision}, {height}x{width}, batch {batch}, {CLASSES} classes, {rounds} rounds\n")
    print(f"| model | parameters | multiply-adds at {height}×{width} | inference, images/s | training, images/s |")
    print("|---|---|---|---|---|")
    for number, (name, options) in enumerate(VARIANTS):
        label = " ".join([f"`{name}`", *(f"{key}={value}" for key, value in options.items())])
        parameters, products = cost(name, options, size)
        columns = [f"{parameters / 1e6:.1f} M", f"{products / 1e9:.1f} G", *map(spread, times[number])]
        print(f"| {label} | {' | '.join(columns)} |")


def cost(name: str, options: dict, size: tuple[int, int]) -> tuple[int, int]:
    """(parameters, multiply-adds of one image's forward pass)."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model = build_model(name, CLASSES, **options).eval()
        model(torch.empty(1, 3, *size))
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2


def measure(name: str, options: dict, size: tuple[int, int], batch: int, numerics: Numerics) -> tuple[float, float]:
    """Seconds of one forward pass in evaluation and of one training step, on a batch that is already in place."""
    model, _, train, images = training(name, options, size, batch, numerics)
    step = seconds(train, numerics.device)
    model.eval()
    with torch.inference_mode():
        inference = seconds(lambda: infer(model, images, size, numerics), numerics.device)
    return inference, step


def training(
    name: str, options: dict, size: tuple[int, int], batch: int, numerics: Numerics
) -> tuple[nn.Module, torch.optim.Optimizer, Callable[[], object], torch.Tensor]:
    """(network, its optimizer, a function that does one training step on a batch in place, the batch's images)."""
    model = numerics.place(build_model(name, CLASSES, **options)).train()
    images = torch.randint(0, 256, (batch, *size, 3), dtype=torch.uint8, device=numerics.device)
    labels = torch.randint(0, CLASSES, (batch, *size), dtype=torch.uint8, device=numerics.device)
    numbers = torch.arange(batch, device=numerics.device)
    counts = count_labels(labels.cpu().numpy())
    data = Batch(images, labels, torch.tensor([size] * batch), numbers, numbers, counts)
    step = Step(data, False, Totals.of(counts), False, 0.0)
    optimizer, scaler = build_optimizer(model, Optim(lr=1e-4)), numerics.scaler()
    criterion = build_loss(Loss(), CLASSES)

    def train() -> None:
        train_step(
            model, step, criterion, optimizer, scaler, numerics,
            micro_batch=None, grad_clip=None, aux_weight=0.5,
        )  # fmt: skip

    return model, optimizer, train, images


def compare_on_camvid(root: str, steps: int, overrides: list[str]) -> None:
    """Train both for `steps` steps with `train_ddp.py` under torchrun, on all GPUs or two CPU processes."""
    processes = torch.cuda.device_count() or 2
    rows = {}
    for name in ("linknet", "unet"):
        with tempfile.TemporaryDirectory() as folder:
            command = [
                *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"),
                *("train_ddp.py", "--config", f"configs/{name}_camvid.yaml", f"data.root={Path(root).resolve()}"),
                *(f"run_dir={folder}/run", "train.epochs=null", f"train.steps={steps}", f"eval.every={steps}"),
                *("wandb.mode=disabled", "train.log_every=5", *overrides),
            ]
            subprocess.run(command, check=True, cwd=CHECKOUT, stdout=sys.stderr)
            records = [json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()]
        config = f"{name}_camvid"
        rows[config] = (
            cost(name, {}, (360, 480)),
            [record["images_per_s"] for record in records if record["event"] == "train"][1:],
            next(record["miou"] for record in reversed(records) if record["event"] == "eval"),
        )
    print(f"{hardware()}, {processes} processes, {steps} steps, {' '.join(overrides)}\n")
    print("| config | parameters | multiply-adds at 360×480 | training, images/s | mIoU on CamVid test |")
    print("|---|---|---|---|---|")
    for config, ((parameters, products), pace, miou) in rows.items():
        print(f"| {config} | {parameters / 1e6:.1f} M | {products / 1e9:.1f} G | {spread(pace)} | {miou:.4f} |")
    (small, fast), (large, slow) = ((row[0][0], statistics.median(row[1])) for row in rows.values())
    print(f"\nLinkNet has {small / large:.0%} of U-Net's parameters, and its step is {fast / slow:.1f} times as fast.")


if __name__ == "__main__":
    main()
