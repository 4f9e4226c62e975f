"""Train a segmentation network on any number of processes.

    torchrun --nproc_per_node=8 train_ddp.py --config configs/linknet_camvid.yaml [KEY=VALUE ...]

Runs under torchrun, under srun alone, and as plain `python train_ddp.py` (one process). The same command again resumes.
Exit status: 0 finished, 2 the input is at fault, 74 the last state could not be saved, 75 preempted with all saved.
"""

from __future__ import annotations

import argparse
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

# These import nothing heavy before it is used: the loader's workers import this file, too.
from fcn import commands, config, distributed, tracking, training
from fcn.arguments import Parser

if TYPE_CHECKING:
    from fcn.distributed import DistributedContext, StopFlag
    from fcn.models import Examined
    from fcn.tracking import Console
    from fcn.training import Run

NOT_SAVED, PREEMPTED = 74, 75
"""Exit statuses: EX_IOERR and EX_TEMPFAIL of sysexits.h."""


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the arguments, then train on every rank; returns the exit status."""
    return commands.run(parser(), argv)


def parser() -> Parser:
    """The arguments, with `train` as what to do with them."""
    found = Parser(prog="train_ddp.py", description=__doc__)
    found.add_config()
    found.add_overrides()
    found.set_defaults(run=lambda args: commands.run_on_ranks(train, args))
    return found


def train(args: argparse.Namespace, context: DistributedContext) -> int:
    """Config, data, network; then the run, if no other one is in its directory."""
    cfg = distributed.run_on_all_ranks(lambda: config.load_config(args.config, args.overrides, context.size))
    args.record_failure = lambda text: training.record_failure_if_idle(Path(cfg.run_dir), text)
    training.require_equal_programs(cfg)
    stop = distributed.StopFlag().listen()
    stop.leave_early = lambda: distributed.leave_at_once(PREEMPTED)
    distributed.bound_waiting(cfg.train.timeout, context, Path(cfg.run_dir) / "flight_recorder")
    splits = distributed.run_on_all_ranks(lambda: training.open_splits(cfg))
    run, examined = training.build_run(cfg, context, splits)
    training.require_equal_data(run)
    training.require_room_for_batches(run)
    console = distributed.run_on_all_ranks(lambda: training.open_console(run))
    with training.lock_run_dir(run, console):
        return carry_out(args, run, console, examined, stop)


def carry_out(args: argparse.Namespace, run: Run, console: Console, examined: Examined, stop: StopFlag) -> int:
    """Start or resume a run and train; say how it ended."""
    cfg, context = run.config, run.context
    stop.say = console.line
    args.record_failure = lambda text: tracking.record_failure(run.folder, text)
    training.start_or_resume(run, console)
    if training.is_finished(run):
        console.line(
            f"{run.folder}: this run is finished ({run.steps} steps); its scores are in {run.folder / 'summary.json'}"
        )
        training.release_cache(run)
        return 0
    trackers = distributed.run_on_all_ranks(lambda: training.open_trackers(run, console))
    hosts = distributed.all_gather_object(socket.gethostname())
    started = distributed.all_gather_object(time.time())[0]
    with distributed.file_heartbeat(run.folder, context, started, run.step, run.steps) as heartbeat:

        def leave_early() -> None:
            try:
                console.record(tracking.event("stop", step=run.step))
                heartbeat.state = "preempted"
                heartbeat.publish(heartbeat.record())
            finally:
                distributed.leave_at_once(PREEMPTED)

        stop.leave_early = leave_early
        training.show_start(run, console, hosts)
        training.describe_cache(run, console)
        for say, lines in ((console.note, examined.notes), (console.warning, examined.warnings)):
            for line in lines:
                say(f"{cfg.model.name}: {line}")
        summary = training.fit(run, console, trackers, stop, heartbeat)
        trackers.close(summary)
        unsaved = summary["unsaved"]
        heartbeat.state = f"failed: not saved: {unsaved[0]}" if unsaved else summary["status"]
    for what in unsaved:
        console.line(f"error: {summary['status']} at step {run.step}/{run.steps}, but not saved: {what}")
    if unsaved:
        return NOT_SAVED
    if summary["status"] == "preempted":
        console.line(f"stopped by a signal at step {run.step}/{run.steps} after saving; the same command continues")
        return PREEMPTED
    training.release_cache(run)
    console.line(training.end_banner(run, summary))
    return 0


if __name__ == "__main__":
    sys.exit(main())
