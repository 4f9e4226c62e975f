"""A user's own network, by import path, and what can be promised for it."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from fcn.config import call_by_path
from fcn.errors import InputError
from fcn.models.layers import SampleKeys, SyncBatchNorm2d


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
    return network


def _logits_in_evaluation(module: nn.Module, _: Any, output: Any) -> Any:
    return output.get("out", output) if isinstance(output, Mapping) and not module.training else output


def examine(
    network: nn.Module,
    keys: SampleKeys,
    num_classes: int,
    size: tuple[int, int],
    autocast: contextlib.AbstractContextManager,
    *,
    sync_bn: bool,
) -> list[str]:
    """Try a copy of a converted and placed network on two random images.

    Parameters that no loss depends on are frozen, because DistributedDataParallel would wait for their gradients.

    Args:
        network: after `convert_dropout`, which returned `keys`, and perhaps `convert_sync_batchnorm`.
        size: height and width of the images.
        autocast: a reusable context for the forward pass.
        sync_bn: whether batch statistics should be those of all processes.

    Returns:
        Notes for the user, one line each: what was frozen, and what will depend on the number of processes.

    Raises:
        InputError: the output is not what training and evaluation need.
    """
    trial, trial_keys = copy.deepcopy((network, keys))
    first = next(network.parameters(), None)
    if first is None or not any(parameter.requires_grad for parameter in network.parameters()):
        raise InputError("model.name: the network has no parameters that require a gradient, so nothing to train")
    images = torch.rand(2, 3, *size, dtype=first.dtype, device=first.device)
    trial_keys.value = torch.arange(2, device=first.device)
    with torch.no_grad(), autocast:
        _check("in evaluation", trial.eval()(images), images, num_classes)
    trial.train()
    before = _random_state(first.device)
    with autocast:
        output = trial(images)
    draws = not torch.equal(before, _random_state(first.device))
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
    sum(logits.float().sum() for logits in outputs.values()).backward()
    notes = []
    unused = [
        name for name, parameter in trial.named_parameters() if parameter.requires_grad and parameter.grad is None
    ]
    for name in unused:
        network.get_parameter(name).requires_grad_(False)
    if unused:
        notes.append(f"the loss does not depend on {_some(unused)}: frozen")
    if draws:
        notes.append(
            "it draws random numbers other than by nn.Dropout and nn.Dropout2d on (N, …): a resumed run repeats them, "
            "but another number of processes or micro-batches draws others"
        )
    if sync_bn and (norms := [name for name, module in network.named_modules() if _unsynchronised(module)]):
        notes.append(
            f"batch statistics of {_some(norms)} are not those of the global batch: only nn.BatchNorm2d is converted"
        )
    return notes


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


def _random_state(device: torch.device) -> torch.Tensor:
    """The state of the generators that a network on this device may use."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return torch.cat(states)


def _unsynchronised(module: nn.Module) -> bool:
    from torchvision.ops import FrozenBatchNorm2d  # fcn's own networks never come here

    known = (SyncBatchNorm2d, nn.SyncBatchNorm, FrozenBatchNorm2d, nn.modules.instancenorm._InstanceNorm)
    counts = isinstance(module, nn.modules.batchnorm._BatchNorm) or hasattr(module, "running_mean")
    return counts and not isinstance(module, known)


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
