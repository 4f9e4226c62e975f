"""Optimizers, and the learning rate as a pure function of the step."""

from __future__ import annotations

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
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, fused=True)
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.momentum, 0.999), fused=True)


def learning_rate(step: int, steps: int, config: Optim) -> float:
    """Learning rate of step `step` (0 to steps - 1) of a run of `steps`.

    Rises linearly over the first `warmup` steps. With f in [0, 1) the fraction of the remaining steps that is done:
    poly is lr·(1-f)^power (Liu et al. 2015, "ParseNet"), cosine lr·(1+cos πf)/2 (Loshchilov, Hutter 2017), step
    lr·gamma^k after k of the `milestones`, which are fractions of the whole run, and constant lr.
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
