"""The loop: one training step, one evaluation, one run."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

from fcn import checkpoint, distributed, pictures, seeding
from fcn.config import Config, config_changes, to_dict, total_steps
from fcn.data.datasets import PairDataset
from fcn.data.loaders import Batch, Step, TrainShares, device_steps, eval_loader, train_loader
from fcn.data.samplers import EvalSampler, GlobalBatchSampler
from fcn.data.transforms import TrainTransform, rescale, to_input
from fcn.distributed import World
from fcn.errors import InputError
from fcn.losses import LOSSES
from fcn.metrics import ConfusionMatrix
from fcn.models.layers import SampleKeys
from fcn.optim import learning_rate, set_learning_rate
from fcn.preempt import StopFlag
from fcn.tracking import Console, Pace, Record, Trackers, score_table, write_atomically

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


@dataclass(frozen=True, slots=True)
class Numerics:
    """How the forward pass computes."""

    precision: str
    channels_last: bool
    device: torch.device

    @property
    def input_dtype(self) -> torch.dtype:
        return torch.float64 if self.precision == "fp64" else torch.float32

    def autocast(self) -> Any:
        if self.precision in ("bf16", "fp16"):
            return torch.autocast(self.device.type, DTYPES[self.precision])
        return nullcontext()

    def scaler(self) -> torch.amp.GradScaler:
        """fp16 gradients underflow without scaling. Under the other precisions the scaler does nothing."""
        return torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")

    def place(self, model: nn.Module) -> nn.Module:
        """Move a model to the device, the type and the memory format of the run, in place."""
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        model.to(self.device, self.input_dtype, memory_format=layout)
        for parameter in model.parameters():
            if parameter.ndim == 4:  # `to` leaves the strides of 1×1 kernels, DistributedDataParallel compares them
                parameter.data = torch.empty_like(parameter, memory_format=layout).copy_(parameter.data)
        return model


def train_step(
    model: nn.Module,
    step: Step,
    loss_fn: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    numerics: Numerics,
    *,
    micro_batch: int | None,
    grad_clip: float | None,
    world_size: int,
    aux_weight: float = 0.0,
    sample_keys: SampleKeys | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Forward, backward and update on this rank's share; nothing here waits for the device.

    The gradient is that of the loss sum over all valid pixels of the global batch, divided by their count: each rank
    divides its sum by the global count, and multiplies by the world size because DistributedDataParallel averages.

    Args:
        loss_fn: (logits, labels) → sum over the valid pixels.
        micro_batch: most images per forward.
        aux_weight: weight of the loss of an auxiliary head, where the model returns {"out", "aux"}.
        sample_keys: where the model's dropout finds the keys of the samples.

    Returns:
        (this rank's loss sum divided by the global count, norm of the global gradient before clipping), on the device.
    """
    batch = step.batch
    parts = max(1, math.ceil(len(batch.images) / (micro_batch or len(batch.images))))
    optimizer.zero_grad(set_to_none=True)
    loss = torch.zeros((), dtype=numerics.input_dtype, device=batch.images.device)
    for part, micro in enumerate(zip(*(tensor.chunk(parts) for tensor in batch), strict=True), start=1):
        images, labels, sizes, _, keys = micro
        if sample_keys is not None:
            sample_keys.value = keys
        with distributed.local_gradients(model) if part < parts else nullcontext():
            with numerics.autocast():
                outputs = model(
                    to_input(images, sizes if step.padded else None, numerics.input_dtype, numerics.channels_last)
                )
                if not isinstance(outputs, Mapping):
                    outputs = {"out": outputs}
                part_loss = loss_fn(outputs["out"], labels.long())
                if "aux" in outputs:
                    part_loss = part_loss + aux_weight * loss_fn(outputs["aux"], labels.long())
                part_loss = part_loss / max(1, step.valid_count)
            scaler.scale(part_loss * world_size).backward()
        loss += part_loss.detach()
    scaler.unscale_(optimizer)
    grad_norm = nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
    scaler.step(optimizer)
    scaler.update()
    return loss, grad_norm


def infer(model: nn.Module, images: torch.Tensor, numerics: Numerics) -> torch.Tensor:
    """images (N, H, W, 3) uint8 on the device → logits (N, C, H, W).

    On the CPU the images go through one at a time: kernels there choose their algorithm, and so the last bits, by the
    size of the batch, and a batch is no faster than its images. So no score depends on `eval.batch_size`.
    """
    inputs = to_input(images, None, numerics.input_dtype, numerics.channels_last)
    with numerics.autocast():
        if inputs.device.type != "cpu":
            return model(inputs)
        return torch.cat([model(one) for one in inputs.split(1)])


def predict(model: nn.Module, images: torch.Tensor, size: tuple[int, int], numerics: Numerics) -> torch.Tensor:
    """images (N, H, W, 3) uint8 on the device → classes (N, *size) int64; logits are resized before the argmax."""
    logits = infer(model, images, numerics)
    if logits.shape[-2:] != size:
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        logits = nn.functional.interpolate(wide, size=size, mode="bilinear", align_corners=False)
    return logits.argmax(dim=1)


@torch.inference_mode()
def evaluate(
    model: nn.Module, dataset: PairDataset, config: Config, world: World, numerics: Numerics
) -> tuple[ConfusionMatrix, int]:
    """Score every image of a split exactly once, whole, at the native size of its labels.

    Returns:
        (the confusion matrix over all ranks, the number of images counted).

    Raises:
        InputError: on every rank, if any rank met a broken file.
        RuntimeError: an image was counted twice or not at all.
    """
    sizes = distributed.together(lambda: [dataset.size(index) for index in range(len(dataset))])
    sampler = EvalSampler(sizes, batch_size=config.eval.batch_size, rank=world.rank, world_size=world.size)
    loader: DataLoader[Batch] = eval_loader(dataset, sampler, config.eval.scale, config.data.workers, world.device)
    matrix = ConfusionMatrix(len(dataset.classes), device=world.device)
    seen = torch.zeros(len(dataset), dtype=torch.int64)
    fault = None
    was_training = model.training
    model.eval()
    for batch in loader:
        if isinstance(batch, InputError):
            fault = str(batch)
            break
        seen[batch.indices] += 1
        images, labels = (tensor.to(world.device, non_blocking=True) for tensor in batch[:2])
        matrix.update(labels, predict(model, images, tuple(labels.shape[-2:]), numerics))
    model.train(was_training)
    distributed.raise_together(fault)
    matrix.all_reduce()
    distributed.all_reduce_sum(seen)
    if not bool((seen == 1).all()):
        raise RuntimeError(
            f"evaluation must count each image once; counts of some are {sorted(set(seen[seen != 1].tolist()))}"
        )
    return matrix, int(seen.sum())


class Run:
    """Everything a run consists of, and its state as plain data."""

    def __init__(
        self,
        config: Config,
        world: World,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        splits: dict[str, PairDataset],
        tracker_id: str,
        sample_keys: SampleKeys | None = None,
    ) -> None:
        self.config, self.world, self.model, self.optimizer, self.splits = config, world, model, optimizer, splits
        self.sample_keys = sample_keys
        self.numerics = Numerics(config.train.precision, config.train.channels_last, world.device)
        self.scaler = self.numerics.scaler()
        self.train_split = splits[config.data.train]
        self.steps = total_steps(config.train, len(self.train_split))
        self.folder = Path(config.run_dir)
        self.checkpoints = self.folder / "checkpoints"
        self.step = 0
        """Finished steps. The position in the data and the learning rate follow from it."""
        self.best: Record | None = None
        self.last_eval: Record | None = None
        self.tracker_id = tracker_id

    def state(self) -> dict[str, Any]:
        """Everything that shapes the rest of the run, as plain data."""
        return {
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "best": self.best,
            "last_eval": self.last_eval,
            "tracker_id": self.tracker_id,
            "config": to_dict(self.config),
            "classes": list(self.train_split.classes.names),
            "train_images": len(self.train_split),
            "world_size": self.world.size,
            "versions": {"python": sys.version.split()[0], "torch": str(torch.__version__), "numpy": np.__version__},
        }

    def load(self, state: dict[str, Any], source: Path) -> list[str]:
        """Continue from a checkpoint's state; returns the config differences that are allowed.

        Raises:
            InputError: the checkpoint belongs to another run, or has no training state.
        """
        if "optimizer" not in state:
            raise InputError(f"{source}: holds weights only; resume from a step_*.pt file")
        fatal, harmless = config_changes(state["config"], to_dict(self.config))
        if state["train_images"] != len(self.train_split):
            fatal.append(f"images of the training split: {state['train_images']} → {len(self.train_split)}")
        if fatal:
            raise InputError(
                f"{source}: this checkpoint belongs to another run: {'; '.join(fatal)}; "
                f"set these keys back to resume, or give the new run its own run_dir"
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        for parameter, moments in self.optimizer.state.items():
            for name, moment in moments.items():
                if moment.shape == parameter.shape:  # in the parameter's memory format, which the run may have changed
                    moments[name] = torch.empty_like(parameter).copy_(moment)
        if self.scaler.is_enabled() and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.step, self.best, self.last_eval = state["step"], state["best"], state["last_eval"]
        if source.parent == self.checkpoints:  # a run that starts from another run's checkpoint is tracked by itself
            self.tracker_id = state["tracker_id"]
        return harmless

    def save(self) -> None:
        """Rank 0 writes the checkpoint; the others have nothing that it lacks."""
        if self.world.rank == 0:
            checkpoint.save_checkpoint(checkpoint.checkpoint_path(self.checkpoints, self.step), self.state())
            checkpoint.prune(self.checkpoints, self.config.checkpoint.keep)

    def save_best(self) -> None:
        """best.pt: the weights and what they are, without what only resuming needs."""
        if self.world.rank == 0:
            state = {key: value for key, value in self.state().items() if key not in ("optimizer", "scaler")}
            checkpoint.save_checkpoint(self.checkpoints / "best.pt", state)

    def score(self, model: nn.Module, split: str, trackers: Trackers) -> Record:
        """Evaluate and record a split, and draw panels of some of its images."""
        dataset = self.splits[split]
        if not self.config.train.sync_bn:  # score the statistics that are saved, not each rank's own
            distributed.copy_from_rank_0(self.model.buffers())
        matrix, images = evaluate(model, dataset, self.config, self.world, self.numerics)
        scores = matrix.scores(dataset.classes.names)
        record = {"event": "eval", "step": self.step, "split": split, **scores, "images": images}
        trackers.log(record)
        if self.world.rank == 0 and self.config.eval.pictures:
            path = self.folder / "pictures" / f"{split}_{self.step:08d}.png"
            trackers.attempt(lambda: self._draw_panels(model, dataset, path), path.name)
        return record

    @torch.inference_mode()
    def _draw_panels(self, model: nn.Module, dataset: PairDataset, path: Path) -> None:
        rows = []
        was_training = model.training
        model.eval()
        # Spread over the split: neighbours are often frames of one video.
        shown = min(self.config.eval.pictures, len(dataset))
        try:
            for index in (i * len(dataset) // shown for i in range(shown)):
                image, mask = dataset.read(index)
                pixels = np.array(rescale(image, self.config.eval.scale))
                batch = torch.from_numpy(pixels)[None].to(self.world.device)
                classes = predict(model, batch, (mask.height, mask.width), self.numerics)[0]
                rows.append((np.asarray(image), np.asarray(mask), classes.cpu().numpy(), dataset.name(index)))
        finally:  # rank 0 alone in evaluation mode would leave the other ranks waiting for its statistics
            model.train(was_training)
        path.parent.mkdir(parents=True, exist_ok=True)
        pictures.panels(rows, dataset.classes).save(path)


def fit(run: Run, console: Console, trackers: Trackers, stop: StopFlag) -> Record:
    """Train from `run.step` to the end or to a signal, and return the summary."""
    config, world, train = run.config, run.world, run.config.train
    network = torch.compile(run.model) if train.compile else run.model
    parallel = distributed.data_parallel(network, world, train.sync_bn)
    parallel.train()
    step_args = {
        "micro_batch": train.micro_batch,
        "grad_clip": train.grad_clip,
        "world_size": world.size,
        "aux_weight": config.loss.aux_weight,
        "sample_keys": run.sample_keys,
    }
    loss = grad_norm = None
    pace = Pace(train.batch_size, run.step, run.steps)
    for data in _training_data(run, stop):
        if data.stop:
            if loss is not None:
                _finite_loss(run, loss, grad_norm)
            run.save()
            return _summary(run, "preempted")
        lr = learning_rate(run.step, run.steps, config.optim)
        set_learning_rate(run.optimizer, lr)
        # For networks that draw random numbers by themselves: a resumed run draws the same ones.
        torch.manual_seed(seeding.derive(config.seed, "forward", run.step, world.rank))
        loss, grad_norm = train_step(
            parallel, data, LOSSES[config.loss.name], run.optimizer, run.scaler, run.numerics, **step_args
        )
        run.step += 1
        pace.step(data.waited_s)
        last = run.step == run.steps
        log_due, eval_due, save_due = (
            last or run.step % every == 0 for every in (train.log_every, config.eval.every, config.checkpoint.every)
        )
        if log_due or eval_due or save_due:
            value = _finite_loss(run, loss, grad_norm)
        if log_due:
            epoch = run.step * train.batch_size / len(run.train_split)
            record = {"event": "train", "step": run.step, "steps": run.steps, "epoch": epoch, "loss": value, "lr": lr}
            trackers.log(record | {"grad_norm": float(grad_norm), **pace.read()})
        if eval_due:
            with pace.paused():
                run.last_eval = run.score(network, config.data.val, trackers)
                if run.best is None or (run.last_eval["miou"] or 0) > run.best["miou"]:
                    run.best = {"miou": run.last_eval["miou"] or 0.0, "step": run.step}
                    run.save_best()
        if save_due:
            with pace.paused():
                run.save()
    return _finish(run, network, console, trackers)


def _training_data(run: Run, stop: StopFlag) -> Iterator[Step]:
    config, world, dataset = run.config, run.world, run.train_split
    transform = TrainTransform(config.data.crop, config.data.scale, config.data.hflip)
    sampler = GlobalBatchSampler(
        dataset,
        batch_size=config.train.batch_size,
        steps=run.steps,
        start_step=run.step,
        seed=config.seed,
        rank=world.rank,
        world_size=world.size,
    )
    loader = train_loader(TrainShares(dataset, transform, config.seed), sampler, config.data.workers, world.device)
    return device_steps(loader, world.device, stop)


def _finish(run: Run, model: nn.Module, console: Console, trackers: Trackers) -> Record:
    """Score the test split if there is one, draw the curves, write the summary."""
    final = run.last_eval
    if run.config.data.test:
        final = run.score(model, run.config.data.test, trackers)
    elif final is None or final["step"] != run.step:  # a resumed run whose train.steps was lowered
        final = run.score(model, run.config.data.val, trackers)
    if run.world.rank == 0:
        folder = run.folder / "pictures"
        folder.mkdir(exist_ok=True)
        trackers.attempt(lambda: pictures.curves(run.folder / "metrics.jsonl", folder / "curves.png"), "curves.png")
        console.line(score_table(final))
    return _summary(run, "finished", final)


def _summary(run: Run, status: str, final: Record | None = None) -> Record:
    """summary.json: where the run stands. The scores are those of the weights of the last step."""
    scores = {key: value for key, value in (final or {}).items() if key not in ("event", "step")}
    summary = {
        "status": status,
        "step": run.step,
        "steps": run.steps,
        "miou": None,
        "images": None,
        **scores,
        "best": run.best,
    }
    if run.world.rank == 0:
        write_atomically(run.folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    return summary


def _finite_loss(run: Run, loss: torch.Tensor, grad_norm: torch.Tensor) -> float:
    """The global loss of the last step. Called before every save, so that no checkpoint holds weights that are NaN.

    Raises:
        InputError: on every rank, if the loss is not finite, or the gradient where no scaler skips such a step.
    """
    value, norm = float(distributed.all_reduce_sum(loss.clone())), float(grad_norm)
    if math.isfinite(value) and (math.isfinite(norm) or run.scaler.is_enabled()):
        return value
    good = checkpoint.list_checkpoints(run.checkpoints)
    where = f"the last checkpoint before is {good[-1]}" if good else "there is no checkpoint yet"
    raise InputError(
        f"step {run.step}: the loss is {value} and the gradient's norm {norm}; "
        f"lower optim.lr, lengthen optim.warmup or set train.grad_clip; {where}"
    )
