"""A user's own network, by import path, and what can be promised for it."""

from __future__ import annotations

import contextlib
import copy
import random
import time
import types
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from fcn import distributed, seeding
from fcn.config import call_by_path
from fcn.errors import InputError
from fcn.models.layers import SampleKeys, SyncBatchNorm2d, SynchronisedSubclass


def build_custom(path: str, num_classes: int, options: Mapping[str, Any]) -> nn.Module:
    """Call `package.module:function` with `num_classes` and the options.

    The network takes images (N, 3, H, W) and returns logits (N, num_classes, H, W), or a mapping with those as "out"
    and perhaps "aux", as torchvision's networks do.

    Raises:
        InputError: the module or function does not exist, takes other arguments, or returns no nn.Module.
    """
    network = call_by_path("model", path, "an nn.Module", {"num_classes": num_classes}, options)
    if not isinstance(network, nn.Module):
        raise InputError(
            f"model.name: {path} returned {type(network).__name__}; accepted: a function that returns an nn.Module"
        )
    network.register_forward_hook(_logits_in_evaluation)
    if network.training:  # what the function has put into evaluation mode stays there, such as frozen BatchNorm
        for module in network.modules():
            if not module.training:
                module.train = types.MethodType(_stay, module)  # type: ignore[method-assign]
    return network


def _stay(module: nn.Module, mode: bool = True) -> nn.Module:
    """`Module.train` of a module that stays in evaluation mode; the ones in it follow, unless they stay, too."""
    for child in module.children():
        child.train(mode)
    return module


def _stays(module: nn.Module) -> bool:
    return getattr(module.train, "__func__", None) is _stay


def _logits_in_evaluation(module: nn.Module, _: Any, output: Any) -> Any:
    return output.get("out", output) if isinstance(output, Mapping) and not module.training else output


class Examined(NamedTuple):
    """What a run says about a network, one line each, and does about it."""

    notes: Sequence[str] = ()
    """What depends on the number of processes, or is not as it usually is."""
    warnings: Sequence[str] = ()
    """What does not train."""
    skips: bool = False
    """Whether it skips parts of itself at random, as with stochastic depth: a step may reach fewer parameters."""
    draws_by_image: bool = False
    """Whether it draws more random numbers for more images."""


class _Trial(NamedTuple):
    """What one rank has found."""

    unused: set[str]
    """Parameters that no forward pass reached."""
    skipped: set[str]
    """Parameters that some forward passes reached."""
    draws: bool
    draws_by_image: bool
    irregular: set[str]
    """Subclasses of BatchNorm2d that do not call `F.batch_norm` once."""


FORWARDS, TRIAL_SIDE, TRIAL_S = 32, 64, 20.0
"""Most passes of a network that draws random numbers, on each rank; the size of their images; and most seconds. One
rank misses a block that is skipped in 1 of 5 steps once in 1,300 starts."""


def examine(
    network: nn.Module,
    keys: SampleKeys,
    num_classes: int,
    size: tuple[int, int],
    autocast: contextlib.AbstractContextManager,
    *,
    sync_bn: bool,
    seed: int = 0,
) -> Examined:
    """Try a copy of a converted and placed network on two random images; every rank must call it.

    Parameters that no loss depends on, on any rank, are frozen, because DistributedDataParallel would wait for their
    gradients.

    Args:
        network: after `convert_dropout`, which returned `keys`, and perhaps `convert_sync_batchnorm`.
        size: height and width of the images.
        autocast: a reusable context for the forward pass.
        sync_bn: whether batch statistics should be those of all processes.
        seed: of what the network draws; another one on each rank tries more.

    Raises:
        InputError: on every rank, if the output is not what training and evaluation need.
    """

    def attempt() -> _Trial:
        with distributed.alone():  # a network may take another path on each rank
            return _try(network, keys, num_classes, size, autocast, seed)

    trials = distributed.all_gather_object(distributed.run_on_all_ranks(attempt))
    for name in set.union(*(trial.irregular for trial in trials)):
        network.get_submodule(name).restore()
    unused = set.intersection(*(trial.unused for trial in trials))
    skipped = set.union(*(trial.unused | trial.skipped for trial in trials)) - unused
    for name in unused:
        network.get_parameter(name).requires_grad_(False)
    draws, by_image = any(trial.draws for trial in trials), any(trial.draws_by_image for trial in trials)
    notes, warnings = _remarks(network, unused, skipped, draws, sync_bn)
    return Examined(notes, warnings, bool(skipped), by_image)


def _remarks(
    network: nn.Module, unused: set[str], skipped: set[str], draws: bool, sync_bn: bool
) -> tuple[list[str], list[str]]:
    """(notes, warnings); see `Examined`."""
    sizes = {name: parameter.numel() for name, parameter in network.named_parameters()}
    notes, warnings = [], []
    if unused:
        share = sum(sizes[name] for name in unused) / sum(sizes.values())
        warnings.append(
            f"the loss does not depend on {_some([name for name in sizes if name in unused])}, {share:.1%} of the "
            f"weights: they stay untrained"
        )
    if skipped:
        how = "all processes draw the same random numbers, so that they skip the same" if draws else "on some processes"
        notes.append(f"it skips {_some([name for name in sizes if name in skipped])} in some steps: {how}")
    elif draws:
        notes.append(
            "it draws random numbers other than by nn.Dropout and nn.Dropout2d on (N, …): a resumed run repeats them, "
            "but another number of processes or micro-batches draws others"
        )
    if resting := [name for name, module in network.named_modules() if _stays(module)]:
        outermost = [name for name in resting if not any(name.startswith(f"{other}.") for other in resting)]
        notes.append(f"{_some(outermost)} stay in evaluation mode, as your function left them")
    if sync_bn and (norms := [name for name, module in network.named_modules() if _unsynchronised(module)]):
        notes.append(
            f"batch statistics of {_some(norms)} are not those of the global batch: only nn.BatchNorm2d is converted, "
            f"and its subclasses that call F.batch_norm once"
        )
    return notes, warnings


def _try(
    network: nn.Module,
    keys: SampleKeys,
    num_classes: int,
    size: tuple[int, int],
    autocast: contextlib.AbstractContextManager,
    seed: int,
) -> _Trial:
    trial, trial_keys = copy.deepcopy((network, keys))
    first = next(network.parameters(), None)
    if first is None or not any(parameter.requires_grad for parameter in network.parameters()):
        raise InputError("model.name: the network has no parameters that require a gradient, so nothing to train")

    def step(count: int, size: tuple[int, int], seed: int) -> tuple[set[str], Any]:
        """(parameters that get a gradient, what the generators' states are afterwards)."""
        images = torch.rand(count, 3, *size, dtype=first.dtype, device=first.device)
        trial_keys.value = torch.arange(count, device=first.device)
        seeding.seed_generators(seed)
        return _reached(trial, images, num_classes, autocast), _random_states(first.device)

    images = torch.rand(2, 3, *size, dtype=first.dtype, device=first.device)
    trial_keys.value = torch.arange(2, device=first.device)
    with torch.no_grad(), autocast:
        _check("in evaluation", trial.eval()(images), images, num_classes)
    trial.train()
    wanted = {name for name, parameter in trial.named_parameters() if parameter.requires_grad}
    reached, after = step(2, size, 0)
    seeding.seed_generators(0)
    draws, skipped, by_image = after != _random_states(first.device), wanted - reached, False
    norms = {name: module for name, module in trial.named_modules() if isinstance(module, SynchronisedSubclass)}
    irregular = {name for name, module in norms.items() if module.calls not in (None, 1)}
    small = tuple(min(side, TRIAL_SIDE) for side in size)
    if draws or norms:
        try:
            step(2, small, 0)
        except Exception:  # it needs larger images
            small = size
    for module in norms.values():
        module.calls = None
    if norms:  # more images make more parts
        step(5, small, 0)
    irregular |= {name for name, module in norms.items() if module.calls not in (None, 1)}
    deadline = time.monotonic() + TRIAL_S
    for number in range(FORWARDS if draws else 0):
        if time.monotonic() > deadline:
            break
        found, _ = step(2, small, 1 + seed * FORWARDS + number)
        reached |= found
        skipped |= wanted - found
    if skipped & reached:
        try:
            by_image = step(1, small, 0)[1] != step(2, small, 0)[1]
        except ValueError:  # BatchNorm of one value
            by_image = True
    return _Trial(wanted - reached, skipped & reached, draws, by_image, irregular)


def _reached(
    trial: nn.Module, images: torch.Tensor, num_classes: int, autocast: contextlib.AbstractContextManager
) -> set[str]:
    """The parameters that get a gradient in a training step.

    Raises:
        InputError: the output is not what training needs.
    """
    with autocast:
        output = trial(images)
    outputs = output if isinstance(output, Mapping) else {"out": output}
    if not {"out"} <= outputs.keys() <= {"out", "aux"}:
        found = ", ".join(map(repr, outputs)) or "nothing"
        raise InputError(f"model.name: the network returns {found} in training; accepted: 'out', or 'out' and 'aux'")
    for name, logits in outputs.items():
        _check(f"in training, as {name!r},", logits, images, num_classes)
        if not logits.requires_grad:
            raise InputError(
                f"model.name: {name!r} has no gradient; accepted: logits, not classes, computed in PyTorch"
            )
    trial.zero_grad(set_to_none=True)
    sum(logits.float().sum() for logits in outputs.values()).backward()
    return {name for name, parameter in trial.named_parameters() if parameter.grad is not None}


def _check(when: str, logits: Any, images: torch.Tensor, num_classes: int) -> None:
    wanted = (len(images), num_classes, *images.shape[2:])
    if not isinstance(logits, torch.Tensor) or tuple(logits.shape) != wanted:
        found = type(logits).__name__
        if isinstance(logits, torch.Tensor):
            found = tuple(logits.shape)
        elif isinstance(logits, Mapping):
            found = f"a mapping with {', '.join(map(repr, logits))}"
        raise InputError(
            f"model.name: {when} the network returns {found} for images {tuple(images.shape)}; accepted: logits "
            f"{wanted}, or a mapping with them as 'out'; upsample inside the network if it returns smaller ones"
        )


def _random_states(device: torch.device) -> list[Any]:
    """The states of the generators that a network on this device may use."""
    states = [torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()]
    states.append(np.random.get_state()[2])
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device).tolist())
    return states


def _unsynchronised(module: nn.Module) -> bool:
    from torchvision.ops import FrozenBatchNorm2d  # fcn's own networks never come here

    known = (
        SyncBatchNorm2d,
        SynchronisedSubclass,
        nn.SyncBatchNorm,
        FrozenBatchNorm2d,
        nn.modules.instancenorm._InstanceNorm,
    )
    counts = isinstance(module, nn.modules.batchnorm._BatchNorm) or hasattr(module, "running_mean")
    return counts and not isinstance(module, known)


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
