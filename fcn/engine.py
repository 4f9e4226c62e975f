"""The loop: one training step, one run."""

from __future__ import annotations

import json
import math
import re
import socket
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from fcn import accounting, checkpoint, distributed, pictures, seeding
from fcn.accounting import Pace
from fcn.checkpoint import BackgroundSaver
from fcn.data.loaders import Step, TrainShares, device_steps, train_loader
from fcn.data.samplers import GlobalBatchSampler
from fcn.data.transforms import TrainTransform
from fcn.errors import InputError
from fcn.evaluation import Stopped, evaluate, show_scores
from fcn.guard import KeptBuffers, NonFiniteGuard
from fcn.losses import Criterion
from fcn.models.layers import SampleKeys, SyncBatchNorm2d
from fcn.optim import learning_rate, set_learning_rate
from fcn.preempt import StopFlag
from fcn.pulse import Pulse
from fcn.report import resumes, versions, write_report
from fcn.run import DTYPES, Numerics, Run
from fcn.stragglers import WAITS, OwnTime, Watch, slowest
from fcn.tracking import Console, Record, Trackers, read_records, score_table, write_atomically


def train_step(
    model: nn.Module,
    step: Step,
    criterion: Criterion,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    numerics: Numerics,
    *,
    micro_batch: int | None,
    grad_clip: float | None,
    aux_weight: float = 0.0,
    sample_keys: SampleKeys | None = None,
    guard: NonFiniteGuard | None = None,
    number: int = 0,
    offload: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Forward, backward and update on this rank's share; nothing here waits for the device.

    The gradient is that of the loss of the global batch: each micro-batch's part of it is a sum over its own pixels or
    images, divided by totals of the global batch, and `distributed.data_parallel` adds the ranks' gradients.

    Args:
        criterion: what `losses.build_loss` returns.
        micro_batch: most images per forward.
        aux_weight: weight of the loss of an auxiliary head, where the model returns {"out", "aux"}.
        sample_keys: where the model's dropout finds the keys of the samples.
        guard: makes a step whose loss or gradient is not finite change nothing; `number` is the step's, from 0.
        offload: keep what the backward pass needs in host memory.

    Returns:
        (this rank's part of the step's loss, norm of the global gradient before clipping), on the device.
    """
    batch = step.batch
    share = len(batch.images)  # 0 on a rank beyond the batch size
    parts = max(1, math.ceil(share / (micro_batch or share or 1)))
    kept = KeptBuffers(model) if guard else None
    optimizer.zero_grad(set_to_none=True)
    loss = torch.zeros((), dtype=numerics.input_dtype, device=batch.images.device)
    for part, micro in enumerate(zip(*(tensor.chunk(parts) for tensor in batch), strict=True), start=1):
        images, labels, sizes, _, keys, _ = micro
        if sample_keys is not None:
            sample_keys.value = keys
        with distributed.local_gradients(model) if part < parts else nullcontext():
            with numerics.autocast(), saved_on_host() if offload else nullcontext():
                outputs = model(numerics.to_input(images, sizes if step.padded else None))
                if not isinstance(outputs, Mapping):
                    outputs = {"out": outputs}
                part_loss = criterion(outputs["out"], labels.long(), step.totals)
                if "aux" in outputs:
                    part_loss = part_loss + aux_weight * criterion(outputs["aux"], labels.long(), step.totals)
            loss += part_loss.detach()
            if guard:  # 1 + 0·loss is 1, but NaN if the loss is not finite, and then so is every rank's summed gradient
                part_loss = part_loss * (guard.gate * (1 + 0 * part_loss.detach()))
            scaler.scale(part_loss).backward()
    WAITS.backward_ended(loss)
    scaler.unscale_(optimizer)
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    grad_norm = nn.utils.get_total_norm(gradients)
    if grad_clip:
        nn.utils.clip_grads_with_norm_(model.parameters(), grad_clip, grad_norm)
    if guard:
        finite = grad_norm.isfinite() & guard.gate.isfinite()
        if not scaler.is_enabled():  # the fused optimizers skip the update on the device, as they do for the scaler
            optimizer.grad_scale, optimizer.found_inf = None, (~finite).float()
        kept.restore_unless(finite)
        guard.record(finite, number)
    scaler.step(optimizer)
    scaler.update()
    return loss, grad_norm


def saved_on_host() -> AbstractContextManager:
    """Inside, what the backward pass will need goes to host memory and comes back when it is needed.

    Parameters stay, because they take no memory of their own, and so do small tensors.
    """

    def pack(tensor: torch.Tensor) -> torch.Tensor | tuple[torch.device, torch.Tensor]:
        if not tensor.is_cuda or isinstance(tensor, nn.Parameter) or tensor.numel() < 1 << 14:
            return tensor
        host = torch.empty_like(tensor, device="cpu", pin_memory=True)
        return tensor.device, host.copy_(tensor, non_blocking=True)

    def unpack(packed: torch.Tensor | tuple[torch.device, torch.Tensor]) -> torch.Tensor:
        return packed if isinstance(packed, torch.Tensor) else packed[1].to(packed[0], non_blocking=True)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def score(
    run: Run, model: nn.Module, split: str, trackers: Trackers, stop: Callable[[], bool], last: bool = False
) -> Record:
    """Evaluate, record and show a split; after the `last` step also the images with the worst scores."""
    dataset, config = run.splits[split], run.config
    if not config.train.sync_bn:  # score the statistics that are saved, not each rank's own
        for scored in (run.model, run.average.model) if run.average else (run.model,):
            distributed.copy_from_rank_0(scored.buffers())
    found = evaluate(model, dataset, config, run.world, run.numerics, stop)
    record = {"event": "eval", "step": run.step, **found.record(split, dataset.classes.names, config)}
    trackers.log(record)
    if run.world.rank == 0:

        def show() -> None:
            trackers.show(show_scores(found, record, model, dataset, config, run.numerics, run.folder, worst=last))

        trackers.attempt(show, f"showing the scores of {split}")
    return record


def fit(run: Run, console: Console, trackers: Trackers, stop: StopFlag, pulse: Pulse | None = None) -> Record:
    """Train from `run.step` to the end or to a signal, and return the summary.

    A signal during an evaluation leaves that one out; the resumed run begins with it.
    """
    saver = BackgroundSaver(run.checkpoints, run.config.checkpoint.keep, console.line)
    trace = run.folder / "profile" / f"step_{run.step:08d}_rank_{run.world.rank}.json.gz"
    try:
        with accounting.profiler(run.config.train.profile, trace, console.line) as profiler:
            scored = _train(run, saver, console, trackers, stop, profiler.step, pulse)
        final = _finish(run, scored, console, trackers, stop)
        return _summary(run, "finished", saver, console, trackers, final)
    except Stopped:
        run.save(saver)
        trackers.alert("Stopped by a signal", f"{run.folder}: step {run.step}/{run.steps}; the same command continues")
        return _summary(run, "preempted", saver, console, trackers)
    finally:
        saver.wait()  # whatever ends the run, a save that was begun is completed


def _train(
    run: Run,
    saver: BackgroundSaver,
    console: Console,
    trackers: Trackers,
    stop: StopFlag,
    after_step: Callable[[], None],
    pulse: Pulse | None,
) -> nn.Module:
    """The steps that are left, with their evaluations and saves; returns the network to be scored."""
    config, world, train = run.config, run.world, run.config.train
    network = torch.compile(run.model) if train.compile else run.model
    scored = network
    if run.average:
        scored = torch.compile(run.average.model) if train.compile else run.average.model
    wire_type = DTYPES.get(train.gradient_compression)
    parallel = distributed.data_parallel(network, world, train.sync_bn, wire_type)
    parallel.train()
    if run.average and run.step == 0:  # not before all ranks have equal weights
        run.average.reset()
    settings = step_settings(run)
    loss = grad_norm = None
    pace, own_time = _pace(run), OwnTime(world.device)
    slow = Watch(distributed.gather(socket.gethostname()))

    def score_val() -> None:
        if run.note_score(score(run, scored, config.data.val, trackers, stop, run.step == run.steps)):
            run.save_best(saver)

    if _is_due(run.step, config.eval.every, run.steps) and (run.last_eval or {}).get("step") != run.step:
        score_val()  # a signal kept the run from it
    for data in _training_data(run, stop):
        if data.stop:
            _check_steps(run, trackers)
            raise Stopped
        lr = learning_rate(run.step, run.steps, config.optim)
        set_learning_rate(run.optimizer, lr)
        # For networks that draw random numbers by themselves: a resumed run draws the same ones.
        torch.manual_seed(seeding.derive(config.seed, "forward", run.step, world.rank))
        with (
            _naming_nondeterminism(console) if train.deterministic and pace.first else nullcontext(),
            own_time.step(data.waited_s, sampled=_is_due(run.step + 1, train.log_every, run.steps)),
        ):
            loss, grad_norm = train_step(parallel, data, number=run.step, **settings)
        if run.average:
            run.average.update(run.step)
        run.step += 1
        after_step()
        if pulse:
            pulse.step = run.step
        pace.step(data.waited_s)
        last = run.step == run.steps
        run.replaced += data.replaced
        if run.replaced and (last or _ends_an_epoch(run)):
            trackers.log(_replaced_record(run))
            run.replaced = ()
        log_due, eval_due, save_due = (
            _is_due(run.step, every, run.steps)
            for every in (train.log_every, config.eval.every, config.checkpoint.every)
        )
        if log_due or eval_due or save_due:
            skipped, streak = _check_steps(run, trackers)
        if log_due:
            loss = distributed.all_reduce_sum(loss.clone())
            record = _train_record(run, loss, lr, grad_norm, skipped, pace)
            times = own_time.take()
            if pulse:
                pulse.own_s, pulse.data_s = times
            if world.size > 1:
                mine = torch.tensor(times, dtype=torch.float64, device=world.device)
                record["slowest"] = slowest(distributed.stack_ranks(mine).tolist())
            trackers.log(record)
            if world.size > 1 and (line := slow.notice(record["slowest"])):
                console.line(line)
        if eval_due:
            with pace.paused():
                score_val()
        if save_due and (last or not streak):  # weights that give no finite loss may be no good to resume from
            with pace.saving():
                trackers.flush()  # records of steps before a checkpoint are not made again
                run.save(saver)
    return scored


def _train_record(run: Run, loss: torch.Tensor, lr: float, grad_norm: torch.Tensor, skipped: int, pace: Pace) -> Record:
    return {
        "event": "train",
        "step": run.step,
        "steps": run.steps,
        "epoch": run.step * run.config.train.batch_size / len(run.train_split),
        "loss": _or_none(loss),
        "lr": lr,
        "grad_norm": _or_none(grad_norm),
        "skipped": skipped,
        **pace.read(),
        "memory_gb": accounting.memory_gb(run.world.device),
    }


def _replaced_record(run: Run) -> Record:
    """What was wrong with the broken images of an epoch that ends, or of the part of one at the end of the run."""
    seen, size = run.step * run.config.train.batch_size, len(run.train_split)
    epoch = seen // size if _ends_an_epoch(run) else math.ceil(seen / size)
    return {"event": "replaced", "step": run.step, "epoch": epoch, "faults": list(run.replaced)}


def _pace(run: Run) -> Pace:
    train, world = run.config.train, run.world
    flops = accounting.step_flops(run.model, run.config.data.crop, train.batch_size) if world.rank == 0 else None
    peak = accounting.peak_flops(world.device, train.precision)
    return Pace(train.batch_size, run.step, run.steps, flops, peak and peak * world.size)


def _is_due(step: int, every: int, steps: int) -> bool:
    """Whether something that is done every so many steps, and at the end, is due after so many finished steps."""
    return step > 0 and (step % every == 0 or step == steps)


def _ends_an_epoch(run: Run) -> bool:
    """Whether the last image of an epoch was in the step before `run.step`."""
    size, batch = len(run.train_split), run.config.train.batch_size
    return run.step * batch // size > (run.step - 1) * batch // size


def step_settings(run: Run) -> dict[str, Any]:
    """The arguments of `train_step` that stay the same over a run."""
    train = run.config.train
    micro_batch, offload = accumulation(run.model, train.micro_batch, math.ceil(train.batch_size / run.world.size))
    return {
        "criterion": run.criterion,
        "optimizer": run.optimizer,
        "scaler": run.scaler,
        "numerics": run.numerics,
        "micro_batch": micro_batch,
        "grad_clip": train.grad_clip,
        "aux_weight": run.config.loss.aux_weight,
        "sample_keys": run.sample_keys,
        "guard": run.guard,
        "offload": offload,
    }


def accumulation(model: nn.Module, micro_batch: int | None, share: int) -> tuple[int | None, bool]:
    """(images per forward, whether to offload) of a rank with `share` images.

    Statistics of the global batch need the whole share at once.
    """
    if micro_batch and any(isinstance(module, SyncBatchNorm2d) for module in model.modules()):
        return None, share > micro_batch
    return micro_batch, False


@contextmanager
def _naming_nondeterminism(console: Console) -> Iterator[None]:
    """Say which operations PyTorch warned about, once."""
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
        console.line(f"note: train.deterministic: no deterministic kernel for {', '.join(sorted(names))}")


def _training_data(run: Run, stop: StopFlag) -> Iterator[Step]:
    loader = train_loader(_shares(run), _sampler(run), run.config.data.workers, run.world.device)
    return device_steps(loader, run.world.device, stop)


def _shares(run: Run) -> TrainShares:
    data = run.config.data
    transform = TrainTransform(data.crop, data.scale, data.hflip, data.jitter)
    skip, later = data.on_error == "skip", data.resize == "device"
    return TrainShares(run.train_split, transform, run.config.seed, skip=skip, resize_later=later)


def _sampler(run: Run) -> GlobalBatchSampler:
    return GlobalBatchSampler(
        run.train_split,
        batch_size=run.config.train.batch_size,
        steps=run.steps,
        start_step=run.step,
        seed=run.config.seed,
        rank=run.world.rank,
        world_size=run.world.size,
        window=run.config.data.group,
        shape=None if run.config.data.crop else _shares(run).shape,
    )


def _finish(run: Run, model: nn.Module, console: Console, trackers: Trackers, stop: StopFlag) -> Record:
    """Score the test split if there is one, draw the curves; returns the final scores."""
    final = run.last_eval
    if run.config.data.test:
        final = score(run, model, run.config.data.test, trackers, stop, last=True)
    elif final is None or final["step"] != run.step:  # a resumed run whose train.steps was lowered
        final = score(run, model, run.config.data.val, trackers, stop, last=True)
    if run.world.rank == 0:
        records, curves = run.folder / "metrics.jsonl", run.folder / "pictures" / "curves.png"

        def draw() -> None:
            pictures.save(pictures.curves(read_records(records), resumes(run.folder / "log.txt")), curves)

        if run.config.eval.pictures:
            trackers.attempt(draw, curves.name)
        console.line(score_table(final))
    return final


def _summary(
    run: Run, status: str, saver: BackgroundSaver, console: Console, trackers: Trackers, final: Record | None = None
) -> Record:
    """summary.json: where the run stands, once everything is saved; then report.html.

    The scores are those of the last step's weights.

    "unsaved" names what could not be saved, on every rank.
    """
    saver.wait()
    scores = {key: value for key, value in (final or {}).items() if key not in ("event", "step")}
    summary = {
        "status": status,
        "step": run.step,
        "steps": run.steps,
        "miou": None,
        "images": None,
        **scores,
        "best": run.best,
        "unsaved": [*sorted(saver.unsaved.values()), *trackers.flush()],
        "versions": versions(),
    }
    if run.world.rank == 0:
        path = run.folder / "summary.json"
        try:
            write_atomically(path, json.dumps(summary, indent=2) + "\n")
        except OSError as error:
            summary["unsaved"].append(f"{path}: cannot be written ({error.strerror})")
            console.line(f"warning: {summary['unsaved'][-1]}; free space there or make it writable")
        if run.config.eval.pictures:
            trackers.attempt(lambda: write_report(run.folder), "report.html")
    summary["unsaved"] = distributed.gather(summary["unsaved"])[0]
    return summary


def _check_steps(run: Run, trackers: Trackers) -> tuple[int, int]:
    """Look at the guard, which waits for the device.

    Returns:
        (steps that it has skipped so far, those of them that were the last ones).

    Raises:
        InputError: on every rank, if too many in a row were not finite.
    """
    skipped, streak, tripped_at = run.guard.read()
    if tripped_at is None:
        return skipped, streak
    names = sorted({run.train_split.name(draw.index) for draw in _sampler(run).global_batch(tripped_at)})
    shown = ", ".join(names[:16]) + (f" and {len(names) - 16} more" if len(names) > 16 else "")
    good = checkpoint.list_checkpoints(run.checkpoints)
    trackers.alert("The loss is not finite", f"{run.folder}: the run ended at step {tripped_at + 1}")
    raise InputError(
        f"step {tripped_at + 1}: the loss or the gradient was not finite, {run.guard.limit + 1} times in a row; the "
        f"images of that step are {shown}; lower optim.lr, lengthen optim.warmup or set train.grad_clip; "
        + (f"the last checkpoint is {good[-1]}" if good else "there is no checkpoint yet")
    )


def _or_none(value: torch.Tensor) -> float | None:
    """A number that JSON can hold."""
    return float(value) if value.isfinite() else None
