"""A training step of the harness beside a bare loop, and a whole run beside a plain DDP script.

    python -m benchmarks.step                                        what the harness adds to a bare loop
    python -m benchmarks.step --voc data/VOCdevkit/VOC2012           images/s of whole runs on files
    python -m benchmarks.step --voc data/VOCdevkit/VOC2012 data.resize=device data.cache=memory
    python -m benchmarks.step --rounds 2 --window 2 --size 64 64 --batch 2 --dry-run               tries it out

Without --voc: `fcn.training.fit` on images that are decoded in memory, with its loader's hand-over, guard, logging and
data agreement; at every log line the bare loop has its turn, in the same process: one batch in place, and nothing but
forward, loss, backward and update. Both of one network, precision and memory format.

With --voc: the harness and a script in the style of torchvision's references/segmentation, on all GPUs, or on two CPU
processes with one thread each, read, resize, crop and train on the same files, each with its own loader. KEY=VALUE goes
to the harness.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import ConcatDataset, DataLoader, DistributedSampler

from benchmarks.common import (
    Job,
    command,
    harness,
    parser,
    publish,
    ratios,
    settings,
    spread,
    table,
    take_turns,
)
from benchmarks.loader import Reference, collate
from fcn import distributed
from fcn.config import Config, Data
from fcn.data.datasets import list_split
from fcn.distributed import DistributedContext
from fcn.models import DTYPES, Precision, build_model

CLASSES = 21


def main() -> None:
    gpus = torch.cuda.device_count()
    parse = parser(__doc__, 7)
    parse.add_argument("--voc", metavar="ROOT", help="folder VOC2012 of a VOCdevkit: whole runs on its files")
    parse.add_argument("--model", default="fcn_resnet50" if gpus else "linknet", help="default: %(default)s")
    parse.add_argument("--precision", choices=DTYPES, default="bf16" if gpus else "fp32", help="default: %(default)s")
    parse.add_argument("--size", type=int, nargs=2, default=None, metavar=("HEIGHT", "WIDTH"), help="of the crops")
    parse.add_argument("--batch", type=int, default=16 if gpus else 4, help="of a process; default: %(default)s")
    parse.add_argument("--window", type=int, default=None, help="steps of a turn; default: 10, on files on a GPU 50")
    parse.add_argument("--workers", type=int, default=8 if gpus else 0, help="of a process; default: %(default)s")
    parse.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="config keys of the harness")
    args = parse.parse_intermixed_args()
    args.size = args.size or ([480, 480] if gpus or args.voc else [256, 256])
    args.window = args.window or (50 if gpus and args.voc else 10)
    (whole_runs if args.voc else overhead)(args, gpus)


def config_of(args: argparse.Namespace, folder: str, processes: int, extra: list[str]) -> Config:
    keys = [f"train.precision={args.precision}", f"data.workers={args.workers}", *extra, *args.overrides]
    return settings(folder, args.model, args.size, args.batch * processes, args.window, keys)


def overhead(args: argparse.Namespace, gpus: int) -> None:
    """One process; the first window of both does not count."""
    ours: list[float] = []
    theirs: list[float] = []
    cpu: list[float] = []
    """Processor time at each change."""
    context = distributed.start()
    loop = bare_loop(args, context.device)

    def turn(seconds: float) -> None:
        ours.append(seconds / args.window)
        cpu.append(time.process_time())
        theirs.append(loop(args.window) / args.window)
        cpu.append(time.process_time())

    with tempfile.TemporaryDirectory() as folder:
        harness(context, turn, config_of(args, folder, 1, [f"train.steps={(args.rounds + 1) * args.window}"]))
    took = [after - before for before, after in itertools.pairwise(cpu[1:])]  # harness, bare loop, harness, …
    more = [
        [100 * (ratio - 1) for ratio in ratios(*pair)] for pair in ((ours[1:], theirs[1:]), (took[::2], took[1::2]))
    ]
    rows = [
        ["bare loop", spread([1000 * step for step in theirs[1:]]), "", ""],
        ["harness", spread([1000 * step for step in ours[1:]]), *map(spread, more)],
    ]
    text = (
        f"{args.model}, {args.precision}, {'x'.join(map(str, args.size))}, batch {args.batch}, {args.workers} workers; "
    )
    text += f"{args.rounds} rounds of {args.window} steps in turn, median (lowest–highest):\n\n"
    text += table(["", "step, ms", "overhead, %", "of processor time"], rows)
    publish("a step beside a bare loop", command(), text, args.dry_run)


def bare_loop(args: argparse.Namespace, device: torch.device) -> Callable[[int], float]:
    """Returns a function that does so many steps and says how many seconds they took."""
    precision = Precision(args.precision, True, device)
    model = precision.place(build_model(args.model, CLASSES)).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9, weight_decay=1e-4, fused=True)
    images = torch.randn(args.batch, 3, *args.size, device=device).contiguous(memory_format=precision.layout)
    labels = torch.randint(0, CLASSES, (args.batch, *args.size), device=device)

    def loop(steps: int) -> float:
        began = time.perf_counter()
        for _ in range(steps):
            optimizer.zero_grad()
            with precision.autocast():
                loss = loss_of(model(images), labels)
            loss.backward()
            optimizer.step()
        loss.item()  # the device has done all but the last update
        return time.perf_counter() - began

    return loop


def loss_of(outputs: torch.Tensor | dict[str, torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy over valid pixels; an auxiliary head counts half."""
    heads = outputs if isinstance(outputs, dict) else {"out": outputs}
    losses = {name: F.cross_entropy(logits, labels, ignore_index=255) for name, logits in heads.items()}
    return losses["out"] + 0.5 * losses["aux"] if "aux" in losses else losses["out"]


def whole_runs(args: argparse.Namespace, gpus: int) -> None:
    """The second table: rates of jobs that take turns."""
    processes, threads = gpus or 2, None if gpus else 1
    skip = 1 if args.workers else 0
    with tempfile.TemporaryDirectory() as folder:
        files = [
            "data.name=voc",
            f"data.root={args.voc}",
            "data.scale=[0.5,2.0]",
            "data.hflip=0.5",
            "data.options=null",
        ]
        if any(key.startswith("data.cache=") for key in args.overrides):
            files.append(f"data.cache_dir={folder}/cache")  # jobs end by being killed, and leave it behind
        ours = f"harness, {args.precision}"
        jobs = {ours: Job(processes, threads, harness, config_of(args, folder, processes, files))}
        for amp in (False, True) if gpus else (False,):
            jobs[f"plain DDP, {'AMP' if amp else 'fp32'}"] = Job(processes, threads, plain_ddp, args, amp)
        try:
            took = take_turns({name: lambda job=job: job.turn(skip) for name, job in jobs.items()}, args.rounds)
        finally:
            for job in jobs.values():
                job.close()
    images = args.batch * processes * args.window
    rows = [
        [name, spread([images / seconds for seconds in values]), spread(ratios(values, took[ours]))]
        for name, values in took.items()
    ]
    text = f"{args.model}, {'x'.join(map(str, args.size))}, batch {args.batch} a process, {processes} processes, "
    text += f"{args.workers} workers each{''.join(f', {key}' for key in args.overrides)}; {args.rounds} rounds of "
    text += f"{args.window} steps in turn, median (lowest–highest):\n\n"
    text += table(["", "images/s", "the harness is × as fast"], rows)
    publish("whole runs beside a plain DDP script", command(), text, args.dry_run)


def plain_ddp(context: DistributedContext, turn: Callable[[float], None], args: argparse.Namespace, amp: bool) -> None:
    """As torchvision's references/segmentation train: float32 or fp16 with scaling, and a look at every loss."""
    device, on_gpu = context.device, context.device.type == "cuda"
    torch.backends.cudnn.benchmark = True
    samples = Reference(list_split(Data(name="voc", root=args.voc), "train").pairs, args.size, (0.5, 2.0))
    dataset = ConcatDataset([samples] * 100)  # workers start anew every epoch, and this split is short
    sampler = DistributedSampler(dataset, context.size, context.rank)
    loader = DataLoader(
        dataset, args.batch, sampler=sampler, num_workers=args.workers, collate_fn=collate, drop_last=True
    )
    network = build_model(args.model, CLASSES).to(device)
    model = network
    if context.size > 1:
        if on_gpu:  # PyTorch's own is for GPUs alone
            network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
        model = DistributedDataParallel(network, device_ids=[device.index] if on_gpu else None)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (1 - step / 1e9) ** 0.9)
    scaler = torch.amp.GradScaler(device.type, enabled=amp)
    model.train()
    steps, losses, began = 0, 0.0, time.perf_counter()
    for epoch in itertools.count():
        sampler.set_epoch(epoch)
        for images, labels in loader:
            images, labels = images.to(device), labels.to(device)
            with torch.autocast(device.type, torch.float16, enabled=amp):
                loss = loss_of(model(images), labels)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            schedule.step()
            losses += loss.item()
            steps += 1
            if steps % args.window == 0 and context.rank == 0:
                turn(time.perf_counter() - began)
                began = time.perf_counter()


if __name__ == "__main__":
    main()
