"""Train a segmentation network on any number of processes.

    torchrun --nproc_per_node=8 train_ddp.py --config configs/linknet_camvid.yaml [KEY=VALUE ...]

Runs under torchrun, under srun alone, and as plain `python train_ddp.py` (one process). The same command again resumes.
Exit status: 0 finished, 2 the input is at fault, 74 the last state could not be saved, 75 preempted after saving.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from fcn import checkpoint, cli, distributed, tracking, weights_and_biases
from fcn.config import Config, load_config, save_config, to_dict
from fcn.data.cache import CachedDataset, with_cache
from fcn.data.datasets import SegmentationDataset, build_dataset
from fcn.distributed import World
from fcn.engine import fit
from fcn.errors import InputError
from fcn.preempt import StopFlag
from fcn.pretrained import load_pretrained
from fcn.pulse import Pulse
from fcn.run import Run, build_run
from fcn.screens import end_screen, start_screen

NOT_SAVED, PREEMPTED = 74, 75
"""Exit statuses: EX_IOERR and EX_TEMPFAIL of sysexits.h."""


def main(argv: list[str], world: World) -> int:
    parser = cli.Parser(prog="train_ddp.py", description=__doc__)
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML file, such as configs/quickstart.yaml")
    parser.add_overrides()
    args = parser.parse_args(argv)
    config = distributed.together(lambda: load_config(args.config, args.overrides, world.size))
    stop = StopFlag().listen()
    distributed.bound_waiting(config.train.timeout, world, Path(config.run_dir) / "flight_recorder")
    splits = distributed.together(lambda: open_splits(config))
    run, notes = build_run(config, world, splits)
    console = distributed.together(lambda: open_console(run))
    stop.say = console.line
    start_or_resume(run, console)
    cached = run.train_split if isinstance(run.train_split, CachedDataset) else None
    if distributed.gather(is_finished(run))[0]:
        console.line(
            f"{run.folder}: this run is finished ({run.steps} steps); its scores are in {run.folder / 'summary.json'}"
        )
        if cached:
            cached.finished()
        return 0
    trackers = distributed.together(lambda: open_trackers(run, console))
    console.line(start_screen(run, distributed.gather(socket.gethostname())))
    describe_cache(run, console)
    for note in notes:
        console.line(f"note: {config.model.name}: {note}")
    with Pulse(run.folder, world, distributed.gather(time.time())[0], run.step, run.steps) as pulse:
        summary = fit(run, console, trackers, stop, pulse)
        trackers.close(summary)
        pulse.state = summary["status"]
    for what in summary["unsaved"]:
        console.line(f"error: {summary['status']} at step {run.step}/{run.steps}, but not saved: {what}")
    if summary["unsaved"]:
        return NOT_SAVED
    if summary["status"] == "preempted":
        console.line(f"stopped by a signal at step {run.step}/{run.steps} after saving; the same command continues")
        return PREEMPTED
    if cached:
        cached.finished()
    console.line(end_screen(run, summary))
    return 0


def open_splits(config: Config) -> dict[str, SegmentationDataset]:
    """The data sets of the run by their split's name."""
    names = [config.data.train, config.data.val, config.data.test]
    splits = {name: build_dataset(config.data, name, config.loss.ignore_index) for name in names if name}
    splits[config.data.train] = with_cache(splits[config.data.train], config)
    return splits


def open_console(run: Run) -> tracking.Console:
    """Terminal and log file on rank 0, silence on the others; makes the run directory."""
    if run.world.rank != 0:
        return tracking.Console.silent()
    with writing(run.folder):
        run.folder.mkdir(parents=True, exist_ok=True)
        return tracking.Console(log_file=run.folder / "log.txt")


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """What a run cannot begin without; the disk may be full of the run before."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"run_dir: {folder}: cannot be written ({error.strerror}); "
            "free space there, or choose a folder that you may write to"
        ) from None


def start_or_resume(run: Run, console: tracking.Console) -> None:
    """Rank 0 picks the checkpoint, every rank loads it. Without one the run starts, from pretrained weights if any."""

    def set_aside(path: Path, problem: str) -> None:
        with writing(run.folder):
            name = checkpoint.set_aside(path).name if problem.endswith(checkpoint.ALTERED) else path.name
        console.line(f"warning: {path}: broken checkpoint ({problem}), left as {name}; trying the one before it")

    def pick() -> str | None:
        if run.world.rank != 0:
            return None
        if run.config.resume == "never":
            if (run.folder / "config.yaml").exists():
                raise InputError(
                    f"{run.folder}: resume=never, but a run is there; choose another run_dir or delete this one"
                )
            return None
        newest = checkpoint.find_newest(run.checkpoints, set_aside)
        if newest is None and run.config.resume != "auto":
            return run.config.resume
        return str(newest) if newest else None

    path = distributed.gather(distributed.together(pick))[0]
    if path:
        changes = distributed.together(lambda: run.load(checkpoint.load_checkpoint(path), Path(path)))
        console.line(f"resuming at step {run.step}/{run.steps} from {path}")
        for change in changes:
            console.line(f"changed since that checkpoint: {change}")
    elif run.config.model.weights:
        load_weights(run, console)
    distributed.together(lambda: write_config(run))


def write_config(run: Run) -> None:
    """config.yaml: the old one stays where the new one finds no room."""
    if run.world.rank == 0:
        with writing(run.folder), tracking.replacing(run.folder / "config.yaml") as file:
            save_config(run.config, Path(file.name))


def load_weights(run: Run, console: tracking.Console) -> None:
    """Rank 0 reads, and perhaps downloads, pretrained weights for all."""
    name, weights, classes = run.config.model.name, run.config.model.weights, len(run.train_split.classes)
    lines = distributed.together(
        lambda: load_pretrained(run.model, name, weights, classes) if run.world.rank == 0 else []
    )
    distributed.copy_from_rank_0(run.model.state_dict().values())
    for line in lines:
        console.line(line)


def is_finished(run: Run) -> bool:
    """Whether there is nothing left to do."""
    return run.step >= run.steps and tracking.read_summary(run.folder).get("status") == "finished"


def open_trackers(run: Run, console: tracking.Console) -> tracking.Trackers:
    """Only rank 0 records anything."""
    trackers = tracking.Trackers(console.line)
    if run.world.rank == 0:
        metrics, wandb = run.folder / "metrics.jsonl", run.config.wandb
        with writing(run.folder):
            tracking.rewind_metrics(metrics, run.step, run.config.data.test)
        trackers.add(lambda: console)
        trackers.add(lambda: tracking.JsonLines(metrics, console.line))
        if wandb.mode != "disabled":
            start = weights_and_biases.Start(
                **to_dict(wandb),
                run_dir=run.folder,
                run_id=run.tracker_id,
                config=to_dict(run.config),
                environment=weights_and_biases.environment(run.world),
                records=tracking.read_records(metrics),
                program=sys.argv[0],
                trainer=os.getpid(),
            )
            trackers.add(lambda: weights_and_biases.WandB(start, console.line))
    return trackers


def describe_cache(run: Run, console: tracking.Console) -> None:
    """Where the cache of this node is, and on which nodes there is something wrong with it."""
    if isinstance(run.train_split, CachedDataset):
        console.line(run.train_split.describe())
        for problem in dict.fromkeys(filter(None, distributed.gather(run.train_split.problem))):
            console.line(f"warning: {problem}")


if __name__ == "__main__":
    sys.exit(cli.run(main))
