"""A run: what it consists of, and how it is saved and continued."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from fcn import distributed, seeding
from fcn.checkpoints import BackgroundSaver, checkpoint_path
from fcn.config import Config, Train, config_changes, to_dict, total_steps
from fcn.data import SegmentationDataset, TrainingBatch, split_identity
from fcn.distributed import DistributedContext, Shards, block_of
from fcn.errors import InputError
from fcn.models import (
    DTYPES,
    MODELS,
    Examined,
    Precision,
    build_model,
    convert_dropout,
    convert_shards,
    convert_sync_batchnorm,
    examine,
    examine_shards,
)
from fcn.tracking import Record, is_sound, versions
from fcn.training.losses import build_loss
from fcn.training.nonfinite import FP16_SEARCH, NonFiniteGuard
from fcn.training.optim import WeightAverage, build_optimizer, learning_rate
from fcn.training.state import TrainingState
from fcn.training.step import accumulation


def _is(*kinds: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, kinds) and not isinstance(value, bool)


def _is_score(value: Any) -> bool:
    return value is None or (isinstance(value, dict) and is_sound({"step": 0} | value))


PARTS: dict[str, Callable[[Any], bool]] = {
    "config": _is(dict),
    "model": _is(dict),
    "optimizer": _is(dict),
    "scaler": _is(dict),
    "step": lambda value: isinstance(value, int) and value >= 0,
    "train_images": _is(int),
    "best": _is_score,
    "last_eval": _is_score,
    "tracker_id": _is(str),
}
"""What a checkpoint must have to continue from it. The file may be foreign."""


class Run:
    """A training run: its config, data, training state, and scores so far.

    Args:
        splits: the data sets by the names of their splits.
    """

    def __init__(
        self,
        config: Config,
        context: DistributedContext,
        state: TrainingState,
        splits: dict[str, SegmentationDataset],
    ) -> None:
        self.config, self.context, self.state, self.splits = config, context, state, splits
        self.train_split = splits[config.data.train]
        self.steps = total_steps(config.train, len(self.train_split))
        self.folder = Path(config.run_dir)
        self.checkpoints = self.folder / "checkpoints"
        self.replaced: tuple[str, ...] = ()
        """What was wrong with each broken image that was replaced in the current epoch."""
        self.best: Record | None = None
        self.last_eval: Record | None = None
        self.tracker_id = uuid.uuid4().hex[:8]

    @cached_property
    def data(self) -> dict[str, str]:
        """What the training split is; see `data.split_identity`. Looks at every file."""
        return split_identity(self.train_split, self.config.data.root)

    @property
    def step(self) -> int:
        """Finished steps."""
        return self.state.step

    def advance(self, batch: TrainingBatch) -> None:
        """Count a finished step on this batch."""
        self.state.step += 1
        self.replaced += batch.replaced

    def is_due(self, every: int, step: int | None = None) -> bool:
        """Whether something that happens every `every` steps, and after the last one, is due after `step` steps."""
        step = self.step if step is None else step
        return step > 0 and (step % every == 0 or step == self.steps)

    @property
    def ends_an_epoch(self) -> bool:
        """Whether the last finished step contained the last image of an epoch."""
        size, batch = len(self.train_split), self.config.train.batch_size
        return self.step * batch // size > (self.step - 1) * batch // size

    def note_score(self, record: Record) -> bool:
        """Remember an evaluation; returns whether it is the best one so far by `checkpoint.best`. Without a labelled
        pixel it has no score, and is never the best."""
        metric = self.config.checkpoint.best
        score, best = record[metric], (self.best or {}).get(metric)
        self.last_eval = record
        if score is None or (best is not None and score <= best):
            return False
        self.best = {metric: score, "step": self.step}
        return True

    # --- saving and loading

    def state_dict(self) -> dict[str, Any]:
        """Everything that determines the rest of the run, as plain data."""
        classes = self.train_split.classes
        return {
            **self.state.state_dict(),
            "replaced": list(self.replaced),
            "best": self.best,
            "last_eval": self.last_eval,
            "tracker_id": self.tracker_id,
            "config": to_dict(self.config),
            "classes": list(classes.names),
            "palette": [list(colour) for colour in classes.palette],
            "train_images": len(self.train_split),
            "data": self.data,
            "world_size": self.context.size,
            "versions": versions(),
        }

    def load_state_dict(self, state: dict[str, Any], source: Path) -> list[str]:
        """Continue from a checkpoint's state; returns the config differences that are allowed.

        Raises:
            InputError: the checkpoint belongs to another run, or has no training state.
        """
        if "optimizer" not in state:
            raise InputError(f"{source}: holds weights only; resume from a step_*.pt file")
        odd = [key for key, accepts in PARTS.items() if key not in state or not accepts(state[key])]
        if odd:
            raise InputError(
                f"{source}: {', '.join(odd)}: missing or not what training writes; resume from another file"
            )
        fatal, harmless = config_changes(state["config"], to_dict(self.config))
        if state["train_images"] != len(self.train_split):
            fatal.append(f"images of the training split: {state['train_images']} → {len(self.train_split)}")
        elif self.context.rank == 0:  # for all; a checkpoint of an older version does not say
            then = state.get("data", {})
            changed = [title for title in then.keys() & self.data.keys() if then[title] != self.data[title]]
            fatal += [f"the {title} of the training split changed" for title in sorted(changed)]
        if fatal:
            raise InputError(
                f"{source}: this checkpoint belongs to another run: {'; '.join(fatal)}; "
                f"set these back to resume, or give the new run its own run_dir"
            )
        try:
            self.state.load_state_dict(state)
        except (KeyError, ValueError, RuntimeError, TypeError, AttributeError, IndexError) as error:
            reason = " ".join(str(error).split())
            raise InputError(f"{source}: does not fit this run ({reason:.500}); resume from another file") from None
        self.replaced = tuple(state.get("replaced", ()))
        self.best, self.last_eval = state["best"], state["last_eval"]
        if source.parent == self.checkpoints:  # a run that starts from another run's checkpoint is tracked separately
            self.tracker_id = state["tracker_id"]
        return harmless

    def save(self, saver: BackgroundSaver) -> None:
        """Save the run. Rank 0 has everything that is needed."""
        if self.context.rank == 0:
            saver.save(checkpoint_path(self.checkpoints, self.step).name, self.state_dict())

    def save_best(self, saver: BackgroundSaver) -> None:
        """Save the scored weights as best.pt, without what only resuming needs."""
        if self.context.rank == 0:
            state = self.state_dict()
            state = {key: value for key, value in state.items() if key not in ("optimizer", "scaler", "guard")}
            state["model"] = state.pop("ema", state["model"])
            saver.save("best.pt", state)


def images_of_processes(train: Train, processes: int) -> list[int]:
    """How many images of a global batch each process has."""
    shards = train.shards or train.batch_size
    return [len(block_of(rank, processes, shards)) * (train.batch_size // shards) for rank in range(processes)]


def build_run(
    config: Config, context: DistributedContext, splits: dict[str, SegmentationDataset]
) -> tuple[Run, Examined]:
    """Build network, optimizer and loss; every rank gets the same weights from the seed.

    Returns:
        The run, and what there is to say about a user's own network.

    Raises:
        InputError: on every rank, if the network cannot be built or `loss.weights` does not fit the classes.
    """
    train = config.train
    _choose_kernels(config, context)
    torch.manual_seed(seeding.derive(config.seed, "weights"))
    train_split = splits[config.data.train]
    classes = len(train_split.classes)
    model = distributed.run_on_all_ranks(lambda: build_model(config.model.name, classes, **config.model.arguments()))
    sample_keys = convert_dropout(model)
    if train.sync_bn:
        model = convert_sync_batchnorm(model)
    precision = Precision.of(config, context.device)
    model = precision.place(model)
    examined = Examined()
    own, size = config.model.name not in MODELS, config.data.crop or (64, 64)
    if own:
        examined = examine(
            model, sample_keys, classes, size, precision.autocast(), sync_bn=train.sync_bn, seed=context.rank
        )
    equal_parts = len(set(images_of_processes(train, context.size))) == 1
    if examined.skips and examined.draws_by_image and not equal_parts:
        raise InputError(
            f"train.uneven: {config.model.name} skips parts of itself at random and draws for each image, so processes "
            f"with more images would skip others; set train.batch_size to a multiple of {context.size}"
        )
    shards = None
    if train.shards:
        if examined.skips:
            raise InputError(
                f"train.shards: {config.model.name} skips parts of itself at random; set train.shards=null"
            )
        shards = Shards(train.shards, context.rank, context.size, DTYPES.get(train.gradient_compression))
        distributed.run_on_all_ranks(lambda: convert_shards(model, shards))
        if own:
            images = min(2, train.batch_size // train.shards)  # more tell nothing else
            for tried in [size] if config.data.crop else [size, (61, 67)]:  # odd sizes have another way in kernels
                distributed.run_on_all_ranks(
                    lambda tried=tried: examine_shards(model, sample_keys, tried, images, precision.autocast())
                )
    micro_batch, offload = accumulation(model, train.micro_batch, max(images_of_processes(train, context.size)))
    state = TrainingState(
        model=model,
        optimizer=build_optimizer(model, config.optim),
        criterion=build_loss(config.loss, classes, context.device),
        precision=precision,
        context=context,
        learning_rate=partial(learning_rate, steps=total_steps(train, len(train_split)), config=config.optim),
        micro_batch=micro_batch,
        offload=offload,
        grad_clip=train.grad_clip,
        aux_weight=config.loss.aux_weight,
        shards=shards,
        sample_keys=sample_keys,
        equal_parts=equal_parts,
        skips=examined.skips,
        nonfinite=NonFiniteGuard(
            train.max_nonfinite + (FP16_SEARCH if train.precision == "fp16" else 0), context.device
        ),
        ema=WeightAverage(model, train.ema) if train.ema else None,
        seed=config.seed,
    )
    return Run(config, context, state, splits), examined


def _choose_kernels(config: Config, context: DistributedContext) -> None:
    """Autotuned kernels; or deterministic ones where there are some; or with shards only deterministic ones."""
    train = config.train
    fixed = train.deterministic or train.shards is not None
    if fixed:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else cuBLAS has no deterministic kernels
    torch.use_deterministic_algorithms(fixed, warn_only=train.shards is None)
    torch.utils.deterministic.fill_uninitialized_memory = False  # nothing reads it, and filling costs a seventh
    torch.backends.cudnn.benchmark = config.data.crop is not None and not fixed
    if train.shards and context.device.type == "cpu":
        torch.set_num_threads(1)  # kernels divide sums among threads, and launchers give processes different numbers
