"""What a second process brings, what crosses the wire, and a model of many GPUs.

    python -m benchmarks.scaling
    python -m benchmarks.scaling --rounds 2 --window 2 --size 64 64 --batch 2 --dry-run      tries it out

Jobs of one process, of two, and of one process twice at the same time take turns on data in memory, each process with
one thread (on GPUs: one GPU, all, and no twins) and a fixed batch. The twins share the machine but no gradients: what
they lose against one is the machine's doing, and the rest is the harness's.

The last table is a MODEL, not a measurement: gradients cross in a ring, in buckets, while backward runs; the statistics
of BatchNorm cross between layers, hidden behind nothing.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from pathlib import Path

import torch
from torch import nn

from benchmarks.common import Job, command, harness, parser, publish, ratios, settings, spread, table, take_turns
from fcn.models import build_model

BUCKET = 25 * 2**20
"""Bytes of DistributedDataParallel's buckets."""
COUNTS = 256 + 4
"""Numbers of 8 bytes that the ranks agree on for every step: pixels of each label, images, faults, and so on."""


def main() -> None:
    parse = parser(__doc__, 5)
    parse.add_argument("--model", default="linknet")
    parse.add_argument("--size", type=int, nargs=2, default=[256, 256], metavar=("HEIGHT", "WIDTH"))
    parse.add_argument("--batch", type=int, default=None, help="images of a process's step; default: 4, on a GPU 16")
    parse.add_argument("--window", type=int, default=None, help="steps of a turn; default: 5, on a GPU 50")
    parse.add_argument("--precision", default=None, help="default: fp32, on a GPU bf16")
    parse.add_argument(
        "--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings of every job, such as train.sync_bn=false"
    )
    parse.add_argument("--node", type=int, default=8, help="GPUs of a node in the model")
    parse.add_argument("--nvlink", type=float, default=300, help="GB/s of a GPU inside a node; default: 300")
    parse.add_argument("--infiniband", type=float, default=40, help="GB/s of a GPU to other nodes; default: 40")
    parse.add_argument(
        "--latency",
        type=float,
        nargs=2,
        default=[3, 8],
        metavar=("INSIDE", "BETWEEN"),
        help="µs a hop, inside a node and between nodes; default: 3 8",
    )
    parse.add_argument("--step", type=float, default=None, help="ms of a step in the model; default: as measured here")
    args = parse.parse_args()
    gpus = torch.cuda.device_count()
    batch = args.batch or (16 if gpus else 4)
    many = gpus or 2
    took = measure(args, many, batch, args.window or (50 if gpus else 5), bool(gpus))
    step_s = args.step / 1000 if args.step else min(took["1 process"])
    text = efficiency(took, many, batch)
    with torch.device("meta"):
        model = build_model(args.model, 21)
    text += f"\n\nWhat a process sends a step, {args.model}, {gradient_bytes(model) / 1e6:.1f} MB of gradients:\n\n"
    text += wire(model)
    text += "\n\n" + prediction(model, step_s, args)
    publish(f"{args.model} on more processes", command(), text, args.dry_run)


def measure(args: argparse.Namespace, many: int, batch: int, window: int, on_gpu: bool) -> dict[str, list[float]]:
    """Seconds of a step in every round."""
    words = [f"train.precision={args.precision or ('bf16' if on_gpu else 'fp32')}", *args.set]
    threads = None if on_gpu else 1
    with tempfile.TemporaryDirectory() as folder:

        def job(name: str, processes: int) -> Job:
            config = settings(Path(folder) / name, args.model, args.size, batch * processes, window, words)
            return Job(processes, threads, harness, config)

        jobs = [job("one", 1)]
        rivals = {"1 process": jobs[0].turn}
        if many > 1:
            jobs.append(job("many", many))
            rivals[f"{many} processes"] = jobs[1].turn
        if not on_gpu:
            jobs.append(job("twin", 1))

            def twins() -> float:
                for twin in (jobs[0], jobs[2]):
                    twin.go()
                return sum(twin.done() for twin in (jobs[0], jobs[2])) / 2

            rivals["twins"] = twins
        try:
            took = take_turns(rivals, args.rounds)
        finally:
            for one in jobs:
                one.close()
    return {name: [seconds / window for seconds in values] for name, values in took.items()}


def efficiency(took: dict[str, list[float]], many: int, batch: int) -> str:
    """The first table."""
    alone, rows = took["1 process"], []
    for name, step in took.items():
        count = 1 if name == "1 process" else many
        share = "" if count == 1 else spread(ratios(alone, step))
        against = spread(ratios(took["twins"], step)) if name == f"{many} processes" and "twins" in took else ""
        rows.append([name, spread([count * batch / seconds for seconds in step]), share, against])
    head = ["", "images/s", f"share of {many} × 1 process", "share of the twins' rate"]
    return f"{batch} images a process, {len(alone)} rounds in turn, median (lowest–highest):\n\n" + table(head, rows)


def gradient_bytes(model: nn.Module) -> int:
    return sum(4 * parameter.numel() for parameter in model.parameters())


def norms(model: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


def wire(model: nn.Module) -> str:
    """The second table: a ring sends 2(n-1)/n of the gradients, and gathering (n-1) times what is gathered."""
    numbers = sum(5 * norm.num_features for norm in norms(model))  # mean, variance, count; and two sums on the way back
    rows = []
    for count in (2, 8, 64):
        gradients = 2 * (count - 1) / count * gradient_bytes(model)
        rest = (count - 1) * 8 * numbers + 2 * (count - 1) / count * 8 * COUNTS
        plain, compressed = gradients + rest, gradients / 2 + rest
        cells = [f"{size / 1e6:.2f}" for size in (gradients, gradients / 2, rest)]
        rows.append([str(count), *cells, f"{compressed / plain:.2f}"])
    head = ["processes", "gradients, MB", "in bf16, MB", "statistics and counts, MB", "with / without compression"]
    return table(head, rows)


def prediction(model: nn.Module, step_s: float, args: argparse.Namespace) -> str:
    """The third table."""
    rows = []
    for count in (8, 16, 32, 64, 128, 256, 512, 1024):
        plain, compressed = (exposed(gradient_bytes(model) / part, count, step_s, args) for part in (1, 2))
        statistics_s = 2 * len(norms(model)) * latency(count, args, math.ceil(math.log2(count)))
        shares = [step_s / (step_s + extra) for extra in (plain, compressed, plain + statistics_s)]
        rows.append([str(count), *(f"{share:.1%}" for share in shares)])
    head = ["GPUs", "efficiency", "with bf16 compression", "without compression, with sync-BN"]
    inside, between = args.latency
    return (
        f"**A model, not a measurement:** a step of {1000 * step_s:.1f} ms on one process, of which backward is two "
        f"thirds; gradients in buckets of {BUCKET >> 20} MiB, by ring all-reduce, 2(n-1)/n · bytes / bandwidth + "
        f"2(n-1) hops each, one bucket after the other from the moment it is ready; nodes of {args.node} GPUs, "
        f"{args.nvlink:g} GB/s and {inside:g} µs a hop inside a node, {args.infiniband:g} GB/s a GPU and {between:g} "
        f"µs between nodes; sync-BN waits twice a layer for log2(n) hops; loading, stragglers and congestion cost "
        f"nothing:\n\n" + table(head, rows)
    )


def exposed(size: float, count: int, step_s: float, args: argparse.Namespace) -> float:
    """Seconds by which the exchange of `size` bytes of gradients outlasts backward."""
    buckets = max(1, math.ceil(size / BUCKET))
    bandwidth = (args.nvlink if count <= args.node else args.infiniband) * 1e9
    each = 2 * (count - 1) / count * size / buckets / bandwidth + latency(count, args, 2 * (count - 1))
    backward, free = step_s * 2 / 3, 0.0
    for bucket in range(1, buckets + 1):
        free = max(free, backward * bucket / buckets) + each
    return free - backward


def latency(count: int, args: argparse.Namespace, hops: int) -> float:
    """Seconds of so many hops in a row, of a ring that leaves each node once, or of a tree that does so first."""
    inside, between = (microseconds * 1e-6 for microseconds in args.latency)
    if count <= args.node:
        return hops * inside
    share = 1 / args.node if hops >= count else 1 - math.log2(args.node) / math.log2(count)
    return hops * (share * between + (1 - share) * inside)


if __name__ == "__main__":
    main()
