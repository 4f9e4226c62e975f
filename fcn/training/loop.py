"""The loop: what a run does from its first step to its last."""

from __future__ import annotations

import json
import re
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fcn import checkpoints, distributed, evaluation, reports
from fcn.checkpoints import BackgroundSaver
from fcn.data import (
    GlobalBatchSampler,
    Patience,
    RankBatches,
    TrainingBatch,
    TrainTransform,
    batch_loader,
    device_batches,
)
from fcn.distributed import ComputeTimer, Heartbeat, StopFlag, StragglerDetector, slowest
from fcn.errors import InputError
from fcn.files import write_atomically
from fcn.tracking import Console, Record, Trackers, event, plots, read_records, resumed_steps, score_table, versions
from fcn.training import throughput
from fcn.training.run import Run
from fcn.training.sanity import SanityCheck
from fcn.training.step import StepResult, train_step
from fcn.training.throughput import ThroughputMeter


@dataclass(slots=True)
class Session:
    """One start of a run: the run itself, and what observes and saves it."""

    run: Run
    console: Console
    trackers: Trackers
    stop: StopFlag
    heartbeat: Heartbeat | None
    saver: BackgroundSaver
    meter: ThroughputMeter
    timer: ComputeTimer
    stragglers: StragglerDetector
    sanity: SanityCheck
    scored: nn.Module
    """The network to evaluate."""
    profiler: Any
    """See `throughput.profiler`."""


def fit(run: Run, console: Console, trackers: Trackers, stop: StopFlag, heartbeat: Heartbeat | None = None) -> Record:
    """Train from `run.step` to the end, or until a signal; return the summary.

    A signal during an evaluation skips it; the resumed run starts with that evaluation.
    """
    train = run.config.train
    trace = run.folder / "profile" / f"step_{run.step:08d}_rank_{run.context.rank}.json.gz"
    session = Session(
        run, console, trackers, stop, heartbeat,
        saver=BackgroundSaver(run.checkpoints, run.config.checkpoint.keep, console.warning),
        meter=throughput.meter_for(run),
        timer=ComputeTimer(run.context.device, run.context.comm_timer),
        stragglers=StragglerDetector(distributed.all_gather_object(socket.gethostname())),
        sanity=SanityCheck(run.config, run.train_split.classes, len(run.train_split)),
        scored=run.state.distribute(
            compiled=train.compile, sync_bn=train.sync_bn, compression=train.gradient_compression
        ),
        profiler=throughput.profiler(train.profile, trace, console.line),
    )  # fmt: skip
    try:
        with session.profiler:
            train_to_the_end(session)
        return summarise(session, "finished", final_scores(session))
    except evaluation.Stopped:
        run.save(session.saver)
        trackers.alert("Stopped by a signal", f"{run.folder}: step {run.step}/{run.steps}; the same command continues")
        return summarise(session, "preempted")
    finally:
        session.saver.wait()  # whatever ends the run, complete the save that has begun


def train_to_the_end(session: Session) -> None:
    """Do the remaining steps, with their evaluations and saves."""
    run = session.run
    validate_if_owed(session)
    for batch in training_data(run, session.stop):
        stop_if_asked(session, batch)
        result = timed_step(session, batch)
        run.advance(batch)
        begin_to_save(session)
        observe(session, batch, result)
        validate_if_due(session)
        save_if_due(session)
    _, streak = check_finite(session)
    if streak:
        session.console.warning(
            f"the loss or the gradient of the last {streak} steps was not finite, so these weights may be useless; "
            f"lower optim.lr, lengthen optim.warmup or set train.grad_clip"
        )


def begin_to_save(session: Session) -> None:
    """From the first finished step on, a signal waits for a step's end instead of ending the process at once."""
    if session.stop.leave_early:
        distributed.barrier()  # no rank leaves while another one would wait for it to save
        session.stop.leave_early = None


def timed_step(session: Session, batch: TrainingBatch) -> StepResult:
    """`train_step`, measured."""
    run = session.run
    log_next = run.is_due(run.config.train.log_every, run.step + 1)
    naming = (
        _naming_nondeterminism(session.console)
        if run.config.train.deterministic and session.meter.first
        else nullcontext()
    )
    with naming, session.timer.step(batch.data_wait_s, sampled=log_next):
        return train_step(run.state, batch)


def observe(session: Session, batch: TrainingBatch, result: StepResult) -> None:
    """Report a finished step: profiler, throughput, heartbeat, replaced images, odd labels and, when due, the log."""
    run = session.run
    session.profiler.step()
    session.meter.step(batch.data_wait_s)
    if session.heartbeat:
        session.heartbeat.step = run.step
    if run.replaced and (run.step == run.steps or run.ends_an_epoch):
        session.trackers.log(_replaced_record(run))
        run.replaced = ()
    if run.is_due(run.config.train.log_every):
        _log_step(session, result)
    if finding := session.sanity.step(batch.label_counts, run.step == run.steps):
        session.console.warning(finding)


def _log_step(session: Session, result: StepResult) -> None:
    run, context = session.run, session.run.context
    skipped, _ = check_finite(session)
    loss = run.state.step_loss(result.losses)
    record = {
        "event": "train",
        "step": run.step,
        "steps": run.steps,
        "epoch": run.step * run.config.train.batch_size / len(run.train_split),
        "loss": _or_none(loss),
        "lr": run.state.learning_rate(run.step - 1),
        "grad_norm": _or_none(result.grad_norm),
        "skipped": skipped,
        **session.meter.read(),
        "memory_gb": throughput.memory_gb(context.device),
    }
    times = session.timer.take()
    if session.heartbeat:
        session.heartbeat.own_s, session.heartbeat.data_s = times
    if context.size > 1:
        mine = torch.tensor(times, dtype=torch.float64, device=context.device)
        record["slowest"] = slowest(distributed.all_gather(mine).tolist())
    session.trackers.log(record)
    if context.size > 1 and (straggler := session.stragglers.notice(record["slowest"])):
        session.console.warning(straggler)


def validate_if_owed(session: Session) -> None:
    """Do the evaluation that a signal interrupted before this start."""
    run = session.run
    if run.is_due(run.config.eval.every) and (run.last_eval or {}).get("step") != run.step:
        _validate(session)


def validate_if_due(session: Session) -> None:
    """Score `data.val` every `eval.every` steps, and after the last one."""
    if session.run.is_due(session.run.config.eval.every):
        check_finite(session)
        _validate(session)


def _validate(session: Session) -> None:
    run = session.run
    with session.meter.paused():
        if run.note_score(score(session, run.config.data.val, last=run.step == run.steps)):
            run.save_best(session.saver)


def save_if_due(session: Session) -> None:
    """Save every `checkpoint.every` steps, and after the last one."""
    run = session.run
    if not run.is_due(run.config.checkpoint.every):
        return
    _, streak = check_finite(session)
    if streak and run.step < run.steps:
        return  # weights whose loss is not finite may be useless to resume from
    with session.meter.saving():
        session.trackers.flush()  # a resumed run does not repeat the records before its checkpoint
        run.save(session.saver)


def stop_if_asked(session: Session, batch: TrainingBatch) -> None:
    """Raise Stopped on every rank if any rank was asked to save and leave."""
    if batch.stop:
        check_finite(session)
        raise evaluation.Stopped


def check_finite(session: Session) -> tuple[int, int]:
    """Read how many steps were skipped because their loss or gradient was not finite; waits for the device.

    Returns:
        (steps skipped so far, length of the current streak).

    Raises:
        InputError: on every rank, if the streak is too long.
    """
    run, guard = session.run, session.run.state.nonfinite
    skipped, streak, tripped_at = guard.read()
    if tripped_at is None:
        return skipped, streak
    refs = _sampler(run, _rank_batches(run)).global_batch(tripped_at)
    names = sorted({run.train_split.name(ref.index) for ref in refs})
    shown = ", ".join(names[:16]) + (f" and {len(names) - 16} more" if len(names) > 16 else "")
    good = checkpoints.list_checkpoints(run.checkpoints)
    session.trackers.alert("The loss is not finite", f"{run.folder}: the run ended at step {tripped_at + 1}")
    raise InputError(
        f"step {tripped_at + 1}: the loss or the gradient was not finite, {guard.limit + 1} times in a row; the "
        f"images of that step are {shown}; lower optim.lr, lengthen optim.warmup or set train.grad_clip; "
        + (f"the last checkpoint is {good[-1]}" if good else "there is no checkpoint yet")
    )


def score(session: Session, split: str, last: bool) -> Record:
    """Evaluate, record and show a split; after the `last` step, also show the images with the lowest scores."""
    run, config, state = session.run, session.run.config, session.run.state
    for network in (state.model, state.ema.model) if state.ema else (state.model,):
        distributed.broadcast(network.buffers())  # the ones that are saved; each rank may have its own BatchNorm
    evaluator = evaluation.Evaluator(session.scored, split, run.splits[split], config, state.precision, run.context)
    found = evaluation.evaluate_split(evaluator, session.stop)
    record = {"event": "eval", "step": run.step, **found.record()}
    session.trackers.log(record)
    if split == config.data.val and (finding := session.sanity.evaluation(found.matrix.counts.tolist(), split, last)):
        session.console.warning(finding)
    if run.context.rank == 0:

        def show() -> None:
            session.trackers.show(evaluation.show_scores(found, record, run.folder, worst=last))

        session.trackers.attempt(show, f"showing the scores of {split}")
    return record


def final_scores(session: Session) -> Record:
    """Score the test split, if there is one, and draw the curves; return the final scores."""
    run = session.run
    final = run.last_eval
    if run.config.data.test:
        final = score(session, run.config.data.test, last=True)
    elif final is None or final["step"] != run.step:  # a resumed run whose train.steps was lowered
        final = score(session, run.config.data.val, last=True)
    if run.context.rank == 0:
        curves = run.folder / "pictures" / "curves.png"

        def draw() -> None:
            records = read_records(run.folder / "metrics.jsonl")
            plots.save(plots.curves(records, resumed_steps(records)), curves)

        if run.config.eval.pictures:
            session.trackers.attempt(draw, curves.name)
        session.console.line(score_table(final))
    return final


def summarise(session: Session, status: str, final: Record | None = None) -> Record:
    """Wait until everything is saved, then write summary.json and report.html; return the summary.

    Its scores belong to the weights of the last step. "unsaved" lists what could not be saved, on every rank.
    """
    run, saver = session.run, session.saver
    saver.wait()
    session.console.record(event("finish" if status == "finished" else "stop", step=run.step))
    scores = {key: value for key, value in (final or {}).items() if key not in ("event", "step")}
    summary = {
        "status": status,
        "step": run.step,
        "steps": run.steps,
        "miou": None,
        "images": None,
        **scores,
        "best": run.best,
        "unsaved": [*sorted(saver.unsaved.values()), *session.trackers.flush()],
        "versions": versions(),
    }
    if run.context.rank == 0:
        path = run.folder / "summary.json"
        try:
            write_atomically(path, json.dumps(summary, indent=2) + "\n")
        except OSError as error:
            summary["unsaved"].append(f"{path}: cannot be written ({error.strerror or error})")
            session.console.warning(f"{summary['unsaved'][-1]}; free space there or make it writable")
        if run.config.eval.pictures:
            session.trackers.attempt(lambda: reports.write_report(run.folder), "report.html")
    summary["unsaved"] = distributed.all_gather_object(summary["unsaved"])[0]
    return summary


def training_data(run: Run, stop: StopFlag) -> Iterator[TrainingBatch]:
    """The remaining batches, on the device."""
    batches, device = _rank_batches(run), run.context.device
    patience = Patience(run.config.train.timeout, stop)
    loader = batch_loader(batches, _sampler(run, batches), run.config.data.workers, device, patience)
    return device_batches(loader, device)


def _rank_batches(run: Run) -> RankBatches:
    data = run.config.data
    transform = TrainTransform(data.crop, data.scale, data.hflip, data.jitter)
    skip, later = data.on_error == "skip", data.resize == "device"
    return RankBatches(run.train_split, transform, run.config.seed, skip=skip, resize_later=later)


def _sampler(run: Run, batches: RankBatches) -> GlobalBatchSampler:
    return GlobalBatchSampler(
        run.train_split,
        batch_size=run.config.train.batch_size,
        steps=run.steps,
        start_step=run.step,
        seed=run.config.seed,
        rank=run.context.rank,
        world_size=run.context.size,
        shards=run.config.train.shards,
        window=run.config.data.group,
        shape=None if run.config.data.crop else batches.shape,
    )


def _replaced_record(run: Run) -> Record:
    """The broken images that were replaced in the epoch that just ended, or in its part at the end of the run."""
    seen, size = run.step * run.config.train.batch_size, len(run.train_split)
    epoch = seen // size if run.ends_an_epoch else -(-seen // size)
    return {"event": "replaced", "step": run.step, "epoch": epoch, "faults": list(run.replaced)}


@contextmanager
def _naming_nondeterminism(console: Console) -> Iterator[None]:
    """Note once which operations PyTorch warned about."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    texts = [str(warning.message) for warning in caught]
    names = {match.group(1) for text in texts if (match := re.match(r"(\S+) does not have a deterministic", text))}
    for warning in caught:
        if "does not have a deterministic" not in str(warning.message):
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    warnings.filterwarnings("ignore", message=".*does not have a deterministic implementation")
    if names:
        console.note(f"train.deterministic: no deterministic kernel for {', '.join(sorted(names))}")


def _or_none(value: torch.Tensor) -> float | None:
    """The value as a float, or None if it is not finite."""
    return float(value) if value.isfinite() else None
