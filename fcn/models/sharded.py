"""Networks that compute shard by shard, so that their gradients are the same bits on any number of processes.

See `distributed.Shards`. Kernels choose how to add, and in which order, by the size of the batch. So each layer with
parameters computes every shard by itself, forward and backward; what only looks at one element or picks one, such as
ReLU and max-pooling, takes all shards at once.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from fcn.distributed import Shards
from fcn.errors import InputError
from fcn.models.layers import HalvingMaxPool, KeyedDropout, KeyedDropout2d, SampleKeys, SyncBatchNorm2d

EXACT = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.Hardtanh, nn.Identity, nn.Flatten, nn.Unflatten, nn.PixelShuffle,
    nn.PixelUnshuffle, nn.MaxPool2d, nn.AdaptiveMaxPool2d, nn.ZeroPad2d, nn.ReflectionPad2d, nn.ReplicationPad2d,
    nn.ConstantPad2d, HalvingMaxPool, KeyedDropout, KeyedDropout2d,
)  # fmt: skip
"""Layers that round each element at most once, whatever is beside it."""


class Sharded:
    """A layer that computes its own class's forward on each shard, with that shard's copy of its parameters."""

    shards: Shards
    _parameters: dict[str, nn.Parameter | None]

    def forward(self, *inputs: Any, **options: Any) -> Any:
        if not self.shards.now:
            return super().forward(*inputs, **options)  # type: ignore[misc]
        outputs = []
        for number, arguments in enumerate(self._arguments(inputs)):
            with self._copies_of(number):
                outputs.append(self._forward_of_shard(number, *arguments, **options))
        if not all(isinstance(output, torch.Tensor) for output in outputs):
            raise InputError(_refusal(f"a {type(self).__name__}", f"returns {type(outputs[0]).__name__}, no tensor"))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _forward_of_shard(self, number: int, *inputs: Any, **options: Any) -> Any:
        return super().forward(*inputs, **options)  # type: ignore[misc]

    def _arguments(self, inputs: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
        try:
            split = [
                self.shards.split(x) if isinstance(x, torch.Tensor) else [x] * len(self.shards.now) for x in inputs
            ]
        except ValueError as error:
            raise InputError(_refusal(f"a {type(self).__name__}", f"has another first dimension: {error}")) from None
        return zip(*split, strict=True)

    @contextlib.contextmanager
    def _copies_of(self, number: int) -> Iterator[None]:
        own = self._parameters
        copies = {name: p if p is None else self.shards.copies(p)[number] for name, p in own.items()}
        self.__dict__["_parameters"] = copies
        try:
            yield
        finally:
            self.__dict__["_parameters"] = own


class ShardBatchNorm(Sharded):
    """BatchNorm over each shard by itself; the running statistics are those of the first shard."""

    def _forward_of_shard(self, number: int, *inputs: Any, **options: Any) -> Any:
        if not self.training or self.shards.now[number] == 0:
            return super()._forward_of_shard(number, *inputs, **options)
        tracked = self.track_running_stats
        buffers, self.__dict__["_buffers"] = self._buffers, dict.fromkeys(self._buffers)
        self.track_running_stats = False
        try:
            return super()._forward_of_shard(number, *inputs, **options)
        finally:
            self.__dict__["_buffers"], self.track_running_stats = buffers, tracked


def convert_shards(network: nn.Module, shards: Shards) -> None:
    """Let every layer compute shard by shard, in place; the state_dict keys stay the same.

    Raises:
        InputError: a module with layers inside has parameters of its own, which no layer could apply shard by shard.
    """
    for name, module in list(network.named_modules()):
        own = [key for key, parameter in module.named_parameters(recurse=False) if parameter.requires_grad]
        if isinstance(module, SyncBatchNorm2d):
            module.shards = shards
        elif any(module.children()):
            if own:
                raise InputError(
                    f"model.name: the parameter {f'{name}.{own[0]}'.lstrip('.')} belongs to {_title(name, module)}, "
                    f"which has layers inside, so train.shards cannot apply it shard by shard; accepted: parameters of "
                    f"layers without others inside (move it into a small nn.Module), or train.shards=null"
                )
        elif not isinstance(module, EXACT):
            kind = ShardBatchNorm if isinstance(module, nn.modules.batchnorm._BatchNorm) else Sharded
            cls = type(module)
            module.__class__ = type(cls.__name__, (kind, cls), {"__module__": cls.__module__})
            module.shards = shards


# --- the trial -----------------------------------------------------------------------------------------------------


class _TrialShards(Shards):
    """Two shards, together or one by one. One alone gets the other's statistics from when they were together."""

    def __init__(self) -> None:
        super().__init__(2)
        self.gathered: list[torch.Tensor] = []
        self._replay: Iterator[torch.Tensor] | None = None

    @contextlib.contextmanager
    def alone(self, shard: int) -> Iterator[None]:
        self.blocks = [range(shard, shard + 1)]
        self.block, self._replay = self.blocks[0], iter(self.gathered)
        with self.computing(self.block):
            yield

    def gather(self, mine: torch.Tensor) -> torch.Tensor:
        if self._replay is None:
            self.gathered.append(mine)
            return mine
        return next(self._replay)


def examine_shards(
    network: nn.Module,
    keys: SampleKeys,
    size: tuple[int, int],
    images: int,
    autocast: contextlib.AbstractContextManager,
) -> None:
    """Run a copy of a converted network on two shards together and one by one, and compare all bits.

    Args:
        network: after `convert_shards`.
        keys: what `convert_dropout` returned.
        size: height and width of the images.
        images: images of a shard.
        autocast: a reusable context for the forward pass.

    Raises:
        InputError: the bits differ; it names the first layer that mixes samples, or the parameter or buffer.
    """
    trial, trial_keys = copy.deepcopy((network, keys))
    shards = _TrialShards()
    for module in trial.modules():
        if hasattr(module, "shards"):
            module.shards = shards
    trial.train()
    first = next(trial.parameters())
    generator = torch.Generator().manual_seed(0)
    batch = torch.rand(2 * images, 3, *size, generator=generator).to(first.device, first.dtype)
    if first.ndim == 4 and first.is_contiguous(memory_format=torch.channels_last):
        batch = batch.contiguous(memory_format=torch.channels_last)
    # Weights that are zero, such as those of FCN's score layers, would hide what comes before them.
    for parameter in trial.parameters():
        if parameter.requires_grad and not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    before = {key: value.clone() for key, value in trial.state_dict().items()}

    def compute(part: slice) -> tuple[dict[str, _Calls], dict[str, torch.Tensor]]:
        """(calls of each layer, by name, those inside before what they are part of; gradients), of some images."""
        calls: dict[str, _Calls] = {}

        def note(name: str, inputs: tuple, output: Any) -> None:
            found = output.values() if isinstance(output, Mapping) else [output]
            calls.setdefault(name, _Calls([], []))
            for kept, values in zip(calls[name], (inputs, found), strict=True):
                kept.extend(x.detach().clone() for x in values if isinstance(x, torch.Tensor) and x.ndim)

        hooks = [
            module.register_forward_hook(lambda _, inputs, output, name=name: note(name, inputs, output))
            for name, module in trial.named_modules()
        ]
        trial.zero_grad(set_to_none=True)
        torch.manual_seed(0)
        trial_keys.value = torch.arange(2 * images, device=first.device)[part]
        with autocast:
            output = trial(batch[part])
        for hook in hooks:
            hook.remove()
        logits = output.values() if isinstance(output, Mapping) else [output]
        # A loss that differs from pixel to pixel and depends on no other one.
        losses = [(x.float() * x.detach().float().sin()).sum() for out in logits for x in shards.split(out)]
        torch.stack(losses).sum().backward()
        return calls, {n: p.grad.clone() for n, p in trial.named_parameters() if p.grad is not None}

    with shards.computing(shards.block):
        together, gradients = compute(slice(None))
    buffers = {key: value.clone() for key, value in trial.named_buffers()}
    alone, sums = [], []
    for shard in range(2):
        trial.load_state_dict(before)
        try:
            with shards.alone(shard):
                found, own = compute(slice(shard * images, (shard + 1) * images))
        except StopIteration:
            raise InputError(_refusal("its layers", "run another number of times on one shard")) from None
        alone.append(found)
        sums.append(own)
        if shard == 0:
            changed = {key: value.clone() for key, value in trial.named_buffers()}
    nothing = _Calls([], [])
    for name, whole in together.items():
        one, other = alone[0].get(name, nothing), alone[1].get(name, nothing)
        if _join(one.inputs, other.inputs, whole.inputs) and not _join(one.outputs, other.outputs, whole.outputs):
            title = _title(name, trial.get_submodule(name))
            raise InputError(_refusal(title, "gives other bits for a sample when others are beside it"))
    for name, gradient in gradients.items():
        if not (name in sums[0] and name in sums[1] and _same(sums[0][name] + sums[1][name], gradient)):
            raise InputError(_refusal(f"the parameter {name}", "gets other bits of gradient"))
    for name, value in buffers.items():
        if not _same(changed[name], value):
            raise InputError(_refusal(f"the buffer {name}", "gets other bits"))


class _Calls(NamedTuple):
    inputs: list[torch.Tensor]
    outputs: list[torch.Tensor]


def _join(one: list[torch.Tensor], other: list[torch.Tensor], whole: list[torch.Tensor]) -> bool:
    """Whether the tensors of the two shards are the parts of those of both."""
    return len(one) == len(other) == len(whole) and all(
        _same(torch.cat(both), joined) for *both, joined in zip(one, other, whole, strict=True)
    )


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one.nan_to_num(), other.nan_to_num())


def _title(name: str, module: nn.Module) -> str:
    return f"{name} ({type(module).__name__})" if name else f"the network itself ({type(module).__name__})"


def _refusal(what: str, fault: str) -> str:
    return (
        f"model.name: with train.shards, {what} {fault}; accepted: layers that treat each sample by itself, "
        f"nn.BatchNorm2d, or train.shards=null"
    )
