"""What a run prints at its start and at its end."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from fcn.checkpoints import checkpoint_path
from fcn.config import TRUST_OPTION
from fcn.metrics import METRICS, best_metric, shown
from fcn.text import plural
from fcn.tracking import Console, Record, credentials, event, wandb_is_installed
from fcn.training.run import Run, images_of_processes


def show_start(run: Run, console: Console, hosts: Sequence[str]) -> None:
    """Show what runs where, and record it for the report; `hosts` are the ranks' machines."""
    facts = describe(run, hosts)
    for title, text in facts.items():
        console.line(f"{title:<8}{text}")
    console.record(event("start", step=run.step, steps=run.steps, facts=facts))


def describe(run: Run, hosts: Sequence[str]) -> dict[str, str]:
    """What runs where: short title → text."""
    config, context = run.config, run.context
    data, train, optim = config.data, config.train, config.optim
    parameters = sum(parameter.numel() for parameter in run.state.model.parameters())
    options = [f"{key}={value}" for key, value in config.model.arguments().items() if value is not None]
    switches = {"channels last": train.channels_last, "sync-BN": train.sync_bn, "compiled": train.compile}
    switches |= {"deterministic": train.deterministic, f"EMA {train.ema}": train.ema}
    each = images_of_processes(train, context.size)
    low, high = min(each), max(each)
    share = f"{low if low == high else f'{low} or {high}'} images"
    if train.micro_batch and train.micro_batch < high:
        share += f", {train.micro_batch} a pass"
    if train.shards:
        share += f"; {plural(train.shards, 'shard')} of {plural(train.batch_size // train.shards, 'image')}"
    sizes = ", ".join(f"{name} {len(split)}" for name, split in run.splits.items())
    shape = "crop " + "x".join(map(str, data.crop)) if data.crop else "whole"
    resized = f", scale {data.scale[0]:g} to {data.scale[1]:g}" if data.scale else ""
    added = dataclasses.asdict(config.loss.add)
    losses = [config.loss.name, *(f"{weight:g} {name}" for name, weight in added.items() if weight)]
    return {
        "model": f"{config.model.name}, {parameters:,} parameters{''.join(f', {option}' for option in options)}",
        "on": f"{_devices(run, hosts)}; {', '.join([_precision(run), *(name for name, on in switches.items() if on)])}",
        "data": f"{data.name} from {data.root}, {len(run.train_split.classes)} classes",
        "images": f"{sizes}; {shape}{resized}, flip {data.hflip:g}",
        "batch": (
            f"global batch {train.batch_size} = {plural(context.size, 'process', 'processes')} x {share}; "
            f"{plural(data.workers, 'loader')} each"
        ),
        "optim": f"{optim.name}, lr {optim.lr:g}, {optim.schedule}, warm-up {optim.warmup}; loss {' + '.join(losses)}",
        "steps": (
            f"{run.steps} = {run.steps * train.batch_size / len(run.train_split):.1f} epochs; "
            f"scored every {config.eval.every}, saved every {config.checkpoint.every}"
        ),
        "W&B": _wandb(config.wandb.mode),
        "run": f"{run.folder}, {f'from step {run.step}' if run.step else 'no checkpoint, from the beginning'}",
    }


def _precision(run: Run) -> str:
    half = run.config.train.precision in ("bf16", "fp16")
    slow = half and run.context.device.type == "cpu"
    return run.config.train.precision + (" (most CPUs are slow at it: train.precision=fp32)" if slow else "")


def _wandb(mode: str) -> str:
    if mode != "auto":
        return mode
    if not wandb_is_installed(mode):
        return "nothing recorded (the package wandb is missing: pip install wandb)"
    return "online" if credentials() else "offline (not logged in)"


def _devices(run: Run, hosts: Sequence[str]) -> str:
    context = run.context
    cuda = context.device.type == "cuda"
    name = torch.cuda.get_device_name(context.device) if cuda else "CPU"
    machines = len(set(hosts))
    where = f" on {machines} machines" if machines > 1 else ""
    threads = "" if cuda else f", {torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)} each"
    return f"{context.size} x {name}{where} ({context.launcher}{threads})"


def end_banner(run: Run, summary: Record) -> str:
    """The result of a finished run, where to find it, and what to type next."""
    score = "absent (no labelled pixel)" if summary["miou"] is None else shown(summary["miou"])
    lines = [f"finished: mIoU {score} on {summary['split']} ({summary['images']} images)"]
    if run.best:
        metric = best_metric(run.best)
        lines[0] += (
            f"; best {METRICS[metric].title} on {run.config.data.val} {shown(run.best[metric])} "
            f"at step {run.best['step']}"
        )
    network, dataset = run.config.model.name, run.config.data.name
    checkpoint = run.checkpoints / "best.pt" if run.best else checkpoint_path(run.checkpoints, run.step)
    program = f"{network.replace(':', '.')}.pt2"
    model_code, data_code = (f" {TRUST_OPTION} {name}" if ":" in name else "" for name in (network, dataset))
    data_code = "" if data_code == model_code else data_code
    commands = {
        "look": f"{run.folder / 'report.html'}, {run.folder / 'pictures'}",
        "score": f"python -m fcn evaluate --checkpoint {checkpoint}{model_code}{data_code}",
        "label": f"python -m fcn predict --checkpoint {checkpoint}{model_code} --output predictions IMAGE_OR_FOLDER",
        "export": f"python -m fcn export --checkpoint {checkpoint}{model_code} --output {program}",
    }
    if not run.config.eval.pictures:
        commands["look"] = f"python -m fcn report {run.folder}"
    return "\n".join([*lines, *(f"  {title:<8}{text}" for title, text in commands.items())])
