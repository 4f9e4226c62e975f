"""The networks side by side: parameters, multiply-adds, images per second, memory; and LinkNet against U-Net on CamVid.

    python -m benchmarks.models                                   every network, at 512x512
    python -m benchmarks.models --precision fp32 bf16 fp16        in every precision
    python -m benchmarks.models --camvid data/camvid              LinkNet and U-Net trained for equal steps
    python -m benchmarks.models --models linknet --size 128 128 --rounds 1 --dry-run      tries it out

Timings are medians over rounds in which every network has its turn, with the lowest and the highest. Memory is the
most that PyTorch had allocated on the GPU during a training step, weights, gradients and momentum included.
"""

from __future__ import annotations

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

from benchmarks.common import CHECKOUT, command, parser, publish, seconds, spread, table
from fcn.config import Loss, Optim
from fcn.data import Batch, LabelCounts, TrainingBatch
from fcn.data.loaders import count_labels
from fcn.distributed import DistributedContext
from fcn.evaluation.inference import infer
from fcn.models import DTYPES, MODELS, Precision, build_model
from fcn.training import TrainingState, build_loss, train_step
from fcn.training.optim import build_optimizer

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
    cuda = torch.cuda.is_available()
    parse = parser(__doc__, 3)
    parse.add_argument("--size", type=int, nargs=2, default=[512, 512], metavar=("HEIGHT", "WIDTH"))
    parse.add_argument("--batch", type=int, default=16 if cuda else 1, help="images of a pass; default: %(default)s")
    parse.add_argument(
        "--models", nargs="+", choices=MODELS, default=list(MODELS), metavar="MODEL", help="default: all"
    )
    precisions = ["fp32", "bf16", "fp16"] if cuda else ["fp32"]
    parse.add_argument(
        "--precision",
        nargs="+",
        choices=DTYPES,
        default=precisions,
        metavar="PRECISION",
        help=f"{', '.join(DTYPES)}; default: {' '.join(precisions)}",
    )
    parse.add_argument("--camvid", metavar="ROOT", help="train LinkNet and U-Net there instead")
    parse.add_argument("--steps", type=int, default=150, help="of each training with --camvid")
    parse.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="config keys for --camvid")
    args = parse.parse_intermixed_args()
    if args.camvid:
        text = compare_on_camvid(args.camvid, args.steps, args.overrides)
        publish("LinkNet and U-Net on CamVid", command(), text, args.dry_run)
        return
    device = torch.device("cuda" if cuda else "cpu")
    torch.backends.cudnn.benchmark = True
    variants = [variant for variant in VARIANTS if variant[0] in args.models]
    height, width = size = tuple(args.size)
    text = f"{height}x{width}, batch {args.batch}, {CLASSES} classes, {args.rounds} rounds, median (lowest–highest)."
    for precision in args.precision:
        precision = Precision(precision, True, device)
        text += f"\n\n{precision}:\n\n{reviewers_table(variants, size, args.batch, args.rounds, precision)}"
    publish("every network", command(), text, args.dry_run)


def reviewers_table(
    variants: list[tuple[str, dict]], size: tuple[int, int], batch: int, rounds: int, precision: Precision
) -> str:
    """Every network, with `CLASSES` classes; memory on a GPU alone."""
    found = [[measure(*variant, size, batch, precision) for variant in variants] for _ in range(rounds)]
    head = ["model", "parameters", f"multiply-adds at {size[0]}×{size[1]}", "inference, images/s", "training, images/s"]
    rows = []
    for number, (name, options) in enumerate(variants):
        label = " ".join([f"`{name}`", *(f"{key}={value}" for key, value in options.items())])
        parameters, products = cost(name, options, size)
        inference, step, memory = zip(*(results[number] for results in found), strict=True)
        throughput = [spread([batch / seconds for seconds in times]) for times in (inference, step)]
        rows.append([label, f"{parameters / 1e6:.1f} M", f"{products / 1e9:.1f} G", *throughput])
        if precision.device.type == "cuda":
            rows[-1].append(f"{max(memory) / 2**30:.1f}")
    return table(head + (["memory in training, GiB"] if precision.device.type == "cuda" else []), rows)


def cost(name: str, options: dict, size: tuple[int, int]) -> tuple[int, int]:
    """(parameters, multiply-adds of one image's forward pass)."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model = build_model(name, CLASSES, **options).eval()
        model(torch.empty(1, 3, *size))
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2


def measure(
    name: str, options: dict, size: tuple[int, int], batch: int, precision: Precision
) -> tuple[float, float, float]:
    """Seconds of one forward pass in evaluation and of one training step, on a batch in place; bytes on a GPU."""
    on_gpu = precision.device.type == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    model, _, train, images = training(name, options, size, batch, precision)
    step = seconds(train, precision.device)
    memory = torch.cuda.max_memory_allocated() if on_gpu else 0
    model.eval()
    with torch.inference_mode():
        inference = seconds(lambda: infer(model, images, size, precision), precision.device)
    return inference, step, memory


def training(
    name: str, options: dict, size: tuple[int, int], batch: int, precision: Precision
) -> tuple[nn.Module, torch.optim.Optimizer, Callable[[], object], torch.Tensor]:
    """(network, its optimizer, a function that does one training step on a batch in place, the batch's images)."""
    model = precision.place(build_model(name, CLASSES, **options)).train()
    images = torch.randint(0, 256, (batch, *size, 3), dtype=torch.uint8, device=precision.device)
    labels = torch.randint(0, CLASSES, (batch, *size), dtype=torch.uint8, device=precision.device)
    numbers = torch.arange(batch, device=precision.device)
    counts = count_labels(labels.cpu().numpy())
    data = Batch(images, labels, torch.tensor([size] * batch), numbers, numbers, counts)
    step = TrainingBatch(data, False, LabelCounts.of(counts), False, 0.0)
    state = TrainingState(
        model=model,
        optimizer=build_optimizer(model, Optim(lr=1e-4)),
        criterion=build_loss(Loss(), CLASSES),
        precision=precision,
        context=DistributedContext(0, 1, 0, precision.device, "python"),
        aux_weight=0.5,
    )
    return model, state.optimizer, lambda: train_step(state, step), images


def compare_on_camvid(root: str, steps: int, overrides: list[str]) -> str:
    """Train both for `steps` steps with `train_ddp.py` under torchrun, on all GPUs or two CPU processes."""
    processes = torch.cuda.device_count() or 2
    found = {}
    for name in ("linknet", "unet"):
        with tempfile.TemporaryDirectory() as folder:
            launch = [
                *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"),
                *("train_ddp.py", "--config", f"configs/{name}_camvid.yaml", f"data.root={Path(root).resolve()}"),
                *(f"run_dir={folder}/run", "train.epochs=null", f"train.steps={steps}", f"eval.every={steps}"),
                *("wandb.mode=disabled", "train.log_every=5", *overrides),
            ]
            subprocess.run(launch, check=True, cwd=CHECKOUT, stdout=sys.stderr)
            records = [json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()]
        config = f"{name}_camvid"
        found[config] = (
            cost(name, {}, (360, 480)),
            [record["images_per_s"] for record in records if record["event"] == "train"][1:],
            next(record["miou"] for record in reversed(records) if record["event"] == "eval"),
        )
    rows = [
        [config, f"{parameters / 1e6:.1f} M", f"{products / 1e9:.1f} G", spread(throughput), f"{miou:.4f}"]
        for config, ((parameters, products), throughput, miou) in found.items()
    ]
    head = ["config", "parameters", "multiply-adds at 360×480", "training, images/s", "mIoU on CamVid test"]
    (small, fast), (large, slow) = ((row[0][0], statistics.median(row[1])) for row in found.values())
    text = f"{processes} processes, {steps} steps {' '.join(overrides)}\n\n{table(head, rows)}\n\n"
    return (
        text
        + f"LinkNet has {small / large:.0%} of U-Net's parameters, and its step is {fast / slow:.1f} times as fast."
    )


if __name__ == "__main__":
    main()
