"""What a person reads at the start and at the end of a run."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch

from fcn.run import Run
from fcn.tracking import Record
from fcn.wandb_process import credentials


def start_screen(run: Run, hosts: Sequence[str]) -> str:
    """What runs where, a line each; `hosts` are the ranks' machines."""
    config, world = run.config, run.world
    data, train, optim = config.data, config.train, config.optim
    parameters = sum(parameter.numel() for parameter in run.model.parameters())
    options = [f"{key}={value}" for key, value in config.model.arguments().items() if value is not None]
    switches = {"channels last": train.channels_last, "sync-BN": train.sync_bn, "compiled": train.compile}
    switches |= {"deterministic": train.deterministic, f"EMA {train.ema}": train.ema}
    low, high = train.batch_size // world.size, math.ceil(train.batch_size / world.size)
    share = f"{low if low == high else f'{low} or {high}'} images"
    if train.micro_batch and train.micro_batch < high:
        share += f", {train.micro_batch} a pass"
    sizes = ", ".join(f"{name} {len(split)}" for name, split in run.splits.items())
    shape = "crop " + "x".join(map(str, data.crop)) if data.crop else "whole"
    resized = f", scale {data.scale[0]:g} to {data.scale[1]:g}" if data.scale else ""
    added = dataclasses.asdict(config.loss.add)
    losses = [config.loss.name, *(f"{weight:g} {name}" for name, weight in added.items() if weight)]
    lines = {
        "model": f"{config.model.name}, {parameters:,} parameters{''.join(f', {option}' for option in options)}",
        "on": f"{_devices(run, hosts)}; {', '.join([_precision(run), *(name for name, on in switches.items() if on)])}",
        "data": f"{data.name} from {data.root}, {len(run.train_split.classes)} classes",
        "images": f"{sizes}; {shape}{resized}, flip {data.hflip:g}",
        "batch": f"global batch {train.batch_size} = {_processes(world.size)} x {share}; {_workers(data.workers)}",
        "optim": f"{optim.name}, lr {optim.lr:g}, {optim.schedule}, warm-up {optim.warmup}; loss {' + '.join(losses)}",
        "steps": (
            f"{run.steps} = {run.steps * train.batch_size / len(run.train_split):.1f} epochs; "
            f"scored every {config.eval.every}, saved every {config.checkpoint.every}"
        ),
        "W&B": _wandb(config.wandb.mode),
        "run": f"{run.folder}, {f'from step {run.step}' if run.step else 'no checkpoint, from the beginning'}",
    }
    return "\n".join(f"{title:<8}{text}" for title, text in lines.items())


def _processes(number: int) -> str:
    return f"{number} process{'es' * (number > 1)}"


def _precision(run: Run) -> str:
    half = run.config.train.precision in ("bf16", "fp16")
    slow = half and run.world.device.type == "cpu"
    return run.config.train.precision + (" (most CPUs are slow at it: train.precision=fp32)" if slow else "")


def _workers(number: int) -> str:
    return f"{number or 'no'} loader{'s' * (number != 1)} each"


def _wandb(mode: str) -> str:
    if mode != "auto":
        return mode
    return "online" if credentials() else "offline (not logged in)"


def _devices(run: Run, hosts: Sequence[str]) -> str:
    world = run.world
    cuda = world.device.type == "cuda"
    name = torch.cuda.get_device_name(world.device) if cuda else "CPU"
    machines = len(set(hosts))
    where = f" on {machines} machines" if machines > 1 else ""
    threads = "" if cuda else f", {torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)} each"
    return f"{world.size} x {name}{where} ({world.launcher}{threads})"


def end_screen(run: Run, summary: Record) -> str:
    """What came of a finished run, where it is, and what to type next."""
    best = run.best or {}
    metric = next((key for key in best if key != "step"), None)
    score = "absent (no valid pixel)" if summary["miou"] is None else f"{summary['miou']:.4f}"
    lines = [f"finished: mIoU {score} on {summary['split']} ({summary['images']} images)"]
    if metric:
        name = "mIoU" if metric == "miou" else metric
        lines[0] += f"; best {name} on {run.config.data.val} {best[metric]:.4f} at step {best['step']}"
    checkpoint, program = run.checkpoints / "best.pt", f"{run.config.model.name.replace(':', '.')}.pt2"
    commands = {
        "look": f"{run.folder / 'report.html'}, {run.folder / 'pictures'}",
        "score": f"python -m fcn evaluate --checkpoint {checkpoint}",
        "label": f"python -m fcn predict --checkpoint {checkpoint} --output predictions IMAGE_OR_FOLDER",
        "export": f"python -m fcn export --checkpoint {checkpoint} --output {program}",
    }
    if not run.config.eval.pictures:
        commands["look"] = f"python -m fcn report {run.folder}"
    return "\n".join([*lines, *(f"  {title:<8}{text}" for title, text in commands.items())])
