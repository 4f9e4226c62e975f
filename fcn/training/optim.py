"""Optimizers, the learning rate as a pure function of the step, and the moving average of the weights."""

from __future__ import annotations

import copy
import math

import torch
from torch import nn

from fcn.config import Optim


def build_optimizer(model: nn.Module, config: Optim) -> torch.optim.Optimizer:
    """SGD with momentum or AdamW. Weights are decayed; biases and normalisation parameters (one dimension) are not."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    # One kernel for all parameters instead of several a parameter, and on a GPU no host sync under gradient scaling.
    if config.name == "sgd":
        optimizer = torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, fused=True)
        if config.momentum:
            # SGD leaves its buffers uninitialised until the first step, which may be a skipped one.
            for parameter in parameters:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return optimizer
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.momentum, 0.999), fused=True)


def learning_rate(step: int, steps: int, config: Optim) -> float:
    """The learning rate of step `step` (0 to steps - 1) in a run of `steps`.

    It rises linearly over the first `warmup` steps. With f in [0, 1) the finished fraction of the rest,
    poly is lr·(1-f)^power (Liu et al. 2015, "ParseNet"), cosine is lr·(1+cos πf)/2 (Loshchilov, Hutter 2017), step
    is lr·gamma^k after k of the `milestones`, which are fractions of the whole run, and constant is lr.
    """
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    done = (step - config.warmup) / max(1, steps - config.warmup)
    done = min(done, 1.0)
    if config.schedule == "poly":
        return config.lr * (1 - done) ** config.power
    if config.schedule == "cosine":
        return config.lr * (1 + math.cos(math.pi * done)) / 2
    if config.schedule == "step":
        return config.lr * config.gamma ** sum(step / steps >= fraction for fraction in config.milestones)
    return config.lr


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


class WeightAverage:
    """Exponential moving average of a network's parameters and floating-point buffers (Polyak, Juditsky 1992).

    At step s (0, 1, …) the decay is min(decay, (1 + s) / (10 + s)), so that the initial weights are soon forgotten.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.model = decay, copy.deepcopy(model).eval().requires_grad_(False)
        averages, values = self.model.state_dict().values(), model.state_dict().values()
        # A tensor under two names, such as tied weights, is averaged once.
        pairs = list({average.data_ptr(): (average, value) for average, value in zip(averages, values)}.values())
        self.floats = [pair for pair in pairs if pair[0].is_floating_point()]
        self.counters = [pair for pair in pairs if not pair[0].is_floating_point()]

    def reset(self) -> None:
        """Start again from the current weights."""
        for average, value in (*self.floats, *self.counters):
            average.copy_(value)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Include the weights after step `step` (0, 1, …)."""
        averages, values = zip(*self.floats, strict=True)
        torch._foreach_lerp_(averages, values, 1 - min(self.decay, (1 + step) / (10 + step)))
        if self.counters:
            averages, values = zip(*self.counters, strict=True)
            torch._foreach_copy_(averages, values)
