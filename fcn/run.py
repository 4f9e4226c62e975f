"""A run: what it consists of, its state as plain data, and how that is saved and loaded."""

from __future__ import annotations

import os
import sys
import uuid
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fcn import checkpoint, distributed, seeding
from fcn.checkpoint import BackgroundSaver
from fcn.config import IMAGENET_MEAN, IMAGENET_STD, Config, config_changes, to_dict, total_steps
from fcn.data.datasets import SegmentationDataset
from fcn.data.transforms import to_input
from fcn.distributed import World
from fcn.errors import InputError
from fcn.guard import FP16_SEARCH, NonFiniteGuard
from fcn.losses import build_loss
from fcn.models import MODELS, build_model
from fcn.models.custom import examine
from fcn.models.layers import SampleKeys, convert_dropout, convert_sync_batchnorm
from fcn.optim import WeightAverage, build_optimizer
from fcn.tracking import Record

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


@dataclass(frozen=True, slots=True)
class Numerics:
    """How the forward pass computes."""

    precision: str
    channels_last: bool
    device: torch.device
    mean: tuple[float, float, float] = IMAGENET_MEAN
    """Of red, green and blue, 0 to 1, for the normalisation of images."""
    std: tuple[float, float, float] = IMAGENET_STD

    @classmethod
    def of(cls, config: Config, device: torch.device) -> Numerics:
        return cls(config.train.precision, config.train.channels_last, device, config.data.mean, config.data.std)

    @property
    def input_dtype(self) -> torch.dtype:
        return torch.float64 if self.precision == "fp64" else torch.float32

    def to_input(self, images: torch.Tensor, sizes: torch.Tensor | None = None) -> torch.Tensor:
        """images (N, H, W, 3) uint8 on the device → the network's input (N, 3, H, W); `sizes` as in `to_input`."""
        return to_input(images, sizes, self.input_dtype, self.channels_last, self.mean, self.std)

    @property
    def layout(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def autocast(self) -> Any:
        if self.precision in ("bf16", "fp16"):
            return torch.autocast(self.device.type, DTYPES[self.precision])
        return nullcontext()

    def scaler(self) -> torch.amp.GradScaler:
        """fp16 gradients underflow without scaling. Under the other precisions the scaler does nothing."""
        return torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")

    def place(self, model: nn.Module) -> nn.Module:
        """Move a model to the device, the type and the memory format of the run, in place."""
        model.to(self.device, self.input_dtype, memory_format=self.layout)
        for parameter in model.parameters():
            if parameter.ndim == 4:  # `to` leaves the strides of 1×1 kernels, DistributedDataParallel compares them
                parameter.data = torch.empty_like(parameter, memory_format=self.layout).copy_(parameter.data)
        return model


class Run:
    """Everything a run consists of, and its state as plain data.

    Raises:
        InputError: on every rank alike, if `loss.weights` does not fit the data set's classes.
    """

    def __init__(
        self,
        config: Config,
        world: World,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        splits: dict[str, SegmentationDataset],
        tracker_id: str,
        sample_keys: SampleKeys | None = None,
    ) -> None:
        self.config, self.world, self.model, self.optimizer, self.splits = config, world, model, optimizer, splits
        self.sample_keys = sample_keys
        self.numerics = Numerics.of(config, world.device)
        self.criterion = build_loss(config.loss, len(splits[config.data.train].classes), world.device)
        self.scaler = self.numerics.scaler()
        search = FP16_SEARCH if self.scaler.is_enabled() else 0
        self.guard = NonFiniteGuard(config.train.max_nonfinite + search, world.device)
        self.average = WeightAverage(model, config.train.ema) if config.train.ema else None
        self.train_split = splits[config.data.train]
        self.steps = total_steps(config.train, len(self.train_split))
        self.folder = Path(config.run_dir)
        self.checkpoints = self.folder / "checkpoints"
        self.step = 0
        """Finished steps. The position in the data and the learning rate follow from it."""
        self.replaced: tuple[str, ...] = ()
        """What was wrong with each image that another one stood in for, in the epoch so far."""
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
            "guard": self.guard.state(),
            **({"ema": self.average.model.state_dict()} if self.average else {}),
            "replaced": list(self.replaced),
            "best": self.best,
            "last_eval": self.last_eval,
            "tracker_id": self.tracker_id,
            "config": to_dict(self.config),
            "classes": list(self.train_split.classes.names),
            "palette": [list(colour) for colour in self.train_split.classes.palette],
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
        self.guard.load(state.get("guard", {"streak": 0, "skipped": 0}))
        if self.average:
            self.average.model.load_state_dict(state["ema"])
        self.replaced = tuple(state.get("replaced", ()))
        self.step, self.best, self.last_eval = state["step"], state["best"], state["last_eval"]
        if source.parent == self.checkpoints:  # a run that starts from another run's checkpoint is tracked by itself
            self.tracker_id = state["tracker_id"]
        return harmless

    def note_score(self, record: Record) -> bool:
        """Take note of an evaluation; returns whether it is the best one by `checkpoint.best`."""
        metric = self.config.checkpoint.best
        score, best = record[metric] or 0.0, (self.best or {}).get(metric)
        self.last_eval = record
        if best is not None and score <= best:
            return False
        self.best = {metric: score, "step": self.step}
        return True

    def save(self, saver: BackgroundSaver) -> None:
        """Rank 0 saves the run; the others have nothing that it lacks."""
        if self.world.rank == 0:
            saver.save(checkpoint.checkpoint_path(self.checkpoints, self.step).name, self.state())

    def save_best(self, saver: BackgroundSaver) -> None:
        """best.pt: the weights that were scored and what they are, without what only resuming needs."""
        if self.world.rank == 0:
            state = {key: value for key, value in self.state().items() if key not in ("optimizer", "scaler", "guard")}
            state["model"] = state.pop("ema", state["model"])
            saver.save("best.pt", state)


def build_run(config: Config, world: World, splits: dict[str, SegmentationDataset]) -> tuple[Run, list[str]]:
    """Every rank builds the same weights from the seed; also returns what to know about a network of the user's own."""
    if config.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else cuBLAS has no deterministic kernels
    torch.use_deterministic_algorithms(config.train.deterministic, warn_only=True)
    torch.backends.cudnn.benchmark = config.data.crop is not None and not config.train.deterministic
    torch.manual_seed(seeding.derive(config.seed, "weights"))
    classes = len(splits[config.data.train].classes)
    model = distributed.together(lambda: build_model(config.model.name, classes, **config.model.arguments()))
    sample_keys = convert_dropout(model)
    if config.train.sync_bn:
        model = convert_sync_batchnorm(model)
    numerics = Numerics.of(config, world.device)
    model = numerics.place(model)
    notes = []
    if config.model.name not in MODELS:
        size = config.data.crop or (64, 64)
        notes = distributed.together(
            lambda: examine(model, sample_keys, classes, size, numerics.autocast(), sync_bn=config.train.sync_bn)
        )
    run = Run(config, world, model, build_optimizer(model, config.optim), splits, uuid.uuid4().hex[:8], sample_keys)
    return run, notes
