"""What a training step reads and changes: network, optimizer, loss, counters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from fcn import distributed
from fcn.distributed import DistributedContext, Shards
from fcn.models import DTYPES, Precision, SampleKeys
from fcn.training.losses import Criterion
from fcn.training.nonfinite import NonFiniteGuard
from fcn.training.optim import WeightAverage


@dataclass(slots=True, kw_only=True)
class TrainingState:
    """Everything that `train_step` uses. What changes from step to step goes through `state_dict`."""

    model: nn.Module
    """The network that is saved: neither compiled nor wrapped in DistributedDataParallel."""
    optimizer: torch.optim.Optimizer
    criterion: Criterion
    """See `losses.build_loss`."""
    precision: Precision
    context: DistributedContext
    network: nn.Module = None  # type: ignore[assignment]
    """The network that a step calls: the model itself, or as `distribute` wraps it."""
    learning_rate: Callable[[int], float] | None = None
    """Learning rate of step 0, 1, …; None leaves it as the optimizer has it."""
    micro_batch: int | None = None
    """Most images of one forward pass; None: all of this rank's."""
    offload: bool = False
    """Keep what the backward pass needs in host memory."""
    grad_clip: float | None = None
    aux_weight: float = 0.0
    """Weight of the loss of an auxiliary head, where the network returns {"out", "aux"}."""
    shards: Shards | None = None
    """The parts of the global batch that are computed by themselves."""
    sample_keys: SampleKeys | None = None
    """Where the network's dropout finds the keys of the samples."""
    equal_parts: bool = True
    """Whether all ranks have as many images."""
    skips: bool = False
    """Whether the network skips parts of itself at random; then all ranks skip the same."""
    nonfinite: NonFiniteGuard | None = None
    """Turns a step whose loss or gradient is not finite into one that changes nothing."""
    ema: WeightAverage | None = None
    seed: int = 0
    step: int = 0
    """Finished steps. The position in the data and the learning rate follow from it."""
    scaler: torch.amp.GradScaler = field(init=False)

    def __post_init__(self) -> None:
        self.network = self.network or self.model
        self.scaler = self.precision.scaler()

    def distribute(self, *, compiled: bool, sync_bn: bool, compression: str | None) -> nn.Module:
        """Compile the network and wrap it in DistributedDataParallel. Call it once the weights are loaded.

        Args:
            compiled: use torch.compile.
            sync_bn: see `distributed.data_parallel`.
            compression: the type in which gradients travel, a key of `DTYPES`, or None for their own.

        Returns:
            The network to evaluate: the averaged one, if weights are averaged.
        """
        network = torch.compile(self.model) if compiled else self.model
        scored = network
        if self.ema:
            scored = torch.compile(self.ema.model) if compiled else self.ema.model
        self.network = distributed.data_parallel(
            network, self.context, sync_bn, DTYPES.get(compression), self.shards, find_unused=self.skips
        )
        self.network.train()
        if self.ema and self.step == 0:  # not before all ranks have equal weights
            self.ema.reset()
        return scored

    def step_loss(self, losses: torch.Tensor) -> torch.Tensor:
        """The loss of a step, from every rank's `StepResult.losses`; every rank must call it."""
        if self.shards:
            return distributed.tree_sum(self.shards.gather(losses))
        return distributed.all_reduce_sum(losses.sum())

    def state_dict(self) -> dict[str, Any]:
        """As plain data: "step", "model", "optimizer", "scaler", "guard", and "ema" if weights are averaged."""
        return {
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "guard": self.nonfinite.state() if self.nonfinite else {},
            **({"ema": self.ema.model.state_dict()} if self.ema else {}),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        for parameter, moments in self.optimizer.state.items():
            for name, moment in moments.items():
                if moment.shape == parameter.shape:  # in the parameter's memory format, which the run may have changed
                    moments[name] = torch.empty_like(parameter).copy_(moment)
        if self.scaler.is_enabled() and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        if self.nonfinite:
            self.nonfinite.load(state.get("guard", {"streak": 0, "skipped": 0}))
        if self.ema:
            self.ema.model.load_state_dict(state["ema"])
        self.step = state["step"]
