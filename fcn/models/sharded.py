"""Networks that compute shard by shard, so that their gradients are the same bits on any number of processes.

See `distributed.Shards`. Kernels choose how to add, and in which order, by the size of the batch. So each layer with
parameters computes every shard by itself, forward and backward; what only looks at one element or picks one, such as
ReLU and max-pooling, takes all shards at once.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from fcn.distributed import Shards, TreeSum, aligned, subtrees
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
        for number, (arguments, named) in enumerate(self._arguments(inputs, options)):
            with self._copies_of(number):
                outputs.append(self._forward_of_shard(number, *arguments, **named))
        if not all(isinstance(output, torch.Tensor) for output in outputs):
            kind = type(outputs[0]).__name__ if outputs else "nothing"
            raise InputError(_refusal(f"a {type(self).__name__}", f"returns {kind}, not a tensor"))
        if len(outputs) == 1:
            return outputs[0]
        for output in outputs:
            if output.requires_grad:
                output.register_hook(aligned)
        return torch.cat(outputs)

    def _forward_of_shard(self, number: int, *inputs: Any, **options: Any) -> Any:
        return super().forward(*inputs, **options)  # type: ignore[misc]

    def _arguments(
        self, inputs: tuple[Any, ...], options: dict[str, Any]
    ) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
        """Of each shard, the arguments by place and by name; what is no tensor is the same for all."""
        shards = self.shards

        def split(value: Any) -> Sequence[Any]:
            return shards.split(value) if isinstance(value, torch.Tensor) else [value] * len(shards.now or ())

        try:
            placed, named = [split(value) for value in inputs], {key: split(value) for key, value in options.items()}
        except ValueError as error:
            fault = f"got a tensor whose first dimension is not that of the batch: {error}"
            raise InputError(_refusal(f"a {type(self).__name__}", fault)) from None
        for number in range(len(shards.now or ())):
            yield tuple(part[number] for part in placed), {key: part[number] for key, part in named.items()}

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
        elif type(module) not in EXACT:
            kind = ShardBatchNorm if isinstance(module, nn.modules.batchnorm._BatchNorm) else Sharded
            cls = type(module)
            module.__class__ = type(cls.__name__, (kind, cls), {"__module__": cls.__module__})
            module.shards = shards


# --- the trial -----------------------------------------------------------------------------------------------------


class _TrialShards(Shards):
    """Four shards, together or a block of them. A block gets the others' statistics from when all were together."""

    def __init__(self) -> None:
        super().__init__(4)
        self.gathered: list[torch.Tensor] = []
        self._replay: Iterator[torch.Tensor] | None = None

    @contextlib.contextmanager
    def alone(self, block: range) -> Iterator[None]:
        self.blocks, self.block, self._replay = [block], block, iter(self.gathered)
        with self.computing(block):
            yield

    def gather(self, mine: torch.Tensor) -> torch.Tensor:
        if self._replay is None:
            self.gathered.append(mine)
            return mine
        everywhere = next(self._replay).clone()
        everywhere[self.block.start : self.block.stop] = mine
        return everywhere


BLOCKS = (range(1), range(1, 4))
"""As two processes would hold the four shards of the trial; the second block does not form a single subtree."""


def examine_shards(
    network: nn.Module,
    keys: SampleKeys,
    size: tuple[int, int],
    images: int,
    autocast: contextlib.AbstractContextManager,
) -> None:
    """Run a copy of a converted network on four shards at once, and on one and the other three, and compare all bits.

    Args:
        network: after `convert_shards`.
        keys: what `convert_dropout` returned.
        size: height and width of the images.
        images: images of a shard.
        autocast: a reusable context for the forward pass.

    Raises:
        InputError: the bits differ; it names the first layer that mixes samples, or the parameter or buffer.
    """
    trial = _Trial(network, keys, size, images, autocast)
    with trial.shards.computing(trial.shards.block):
        whole = trial.compute(trial.shards.block)
    alone = []
    for block in BLOCKS:
        try:
            with trial.shards.alone(block):
                alone.append(trial.compute(block))
        except StopIteration:
            raise InputError(_refusal("its layers", "run a different number of times on one shard")) from None
    nothing = _Calls([], [])
    for name, together in whole.calls.items():
        one, other = (part.calls.get(name, nothing) for part in alone)
        same_inputs = _join(one.inputs, other.inputs, together.inputs)
        if same_inputs and not _join(one.outputs, other.outputs, together.outputs):
            title = _title(name, network.get_submodule(name))
            fault = "computes different bits for a sample, depending on what else is in the batch"
            raise InputError(_refusal(title, fault))
    for name, (gradient,) in whole.sums.items():
        sums = [part.sums.get(name) for part in alone]
        if None in sums or not _same(_added(sums), gradient):
            raise InputError(_refusal(f"the parameter {name}", "gets a gradient with different bits"))
    for name, value in whole.buffers.items():
        if not _same(alone[0].buffers[name], value):
            raise InputError(_refusal(f"the buffer {name}", "gets different bits"))


class _Calls(NamedTuple):
    """Of one layer, the tensors of all its calls."""

    inputs: list[torch.Tensor]
    outputs: list[torch.Tensor]


class _Outcome(NamedTuple):
    calls: dict[str, _Calls]
    """By name; layers inside come before what they are part of."""
    sums: dict[str, list[torch.Tensor]]
    """The gradient of each parameter, one sum for each subtree."""
    buffers: dict[str, torch.Tensor]


class _Trial:
    """A copy of a network that computes some of four shards, always from the same state."""

    def __init__(
        self,
        network: nn.Module,
        keys: SampleKeys,
        size: tuple[int, int],
        images: int,
        autocast: contextlib.AbstractContextManager,
    ) -> None:
        self.network, self.keys = copy.deepcopy((network, keys))
        self.shards, self.images, self.autocast = _TrialShards(), images, autocast
        for module in self.network.modules():
            if hasattr(module, "shards"):
                module.shards = self.shards
        self.network.train()
        first = next((p for p in network.parameters() if p.ndim == 4), next(network.parameters()))
        generator = torch.Generator().manual_seed(0)
        batch = torch.rand(self.shards.count * images, 3, *size, generator=generator).to(first.device, first.dtype)
        channels_last = first.ndim == 4 and first.is_contiguous(memory_format=torch.channels_last)
        self.batch = batch.contiguous(memory_format=torch.channels_last) if channels_last else batch
        # Weights that are zero, such as those of FCN's score layers, would hide what comes before them.
        for parameter in self.network.parameters():
            if parameter.requires_grad and not parameter.any():
                nn.init.normal_(parameter, std=0.1)
        self.before = {key: value.clone() for key, value in self.network.state_dict().items()}

    def compute(self, block: range) -> _Outcome:
        """Forward and backward of the shards of a block.

        Raises:
            InputError: a parameter has a gradient that its layer's shards do not account for.
        """
        self.network.load_state_dict(self.before)
        self.network.zero_grad(set_to_none=True)
        torch.manual_seed(0)
        part = slice(block.start * self.images, block.stop * self.images)
        self.keys.value = torch.arange(len(self.batch), device=self.batch.device)[part]
        calls: dict[str, _Calls] = {}
        with self._noting(calls), self.autocast:
            output = self.network(aligned(self.batch[part]))
        logits = output.values() if isinstance(output, Mapping) else [output]
        # A loss that differs from pixel to pixel and depends on no other one.
        losses = [(x.float() * x.detach().float().sin()).sum() for out in logits for x in self.shards.split(out)]
        torch.stack(losses).sum().backward()
        sums = {}
        for name, parameter in self.network.named_parameters():
            if parameter.grad is not None:
                if not self.shards.adds(parameter):
                    raise InputError(_refusal(f"the parameter {name}", "is used outside the layer that it belongs to"))
                sums[name] = [parameter.grad.clone(), *self.shards.further_sums(parameter)]
        return _Outcome(calls, sums, {key: value.clone() for key, value in self.network.named_buffers()})

    @contextlib.contextmanager
    def _noting(self, calls: dict[str, _Calls]) -> Iterator[None]:
        """Inside, `calls` gets what goes into and comes out of every layer."""

        def note(name: str, inputs: tuple, output: Any) -> None:
            found = output.values() if isinstance(output, Mapping) else [output]
            for kept, values in zip(calls.setdefault(name, _Calls([], [])), (inputs, found), strict=True):
                kept.extend(x.detach().clone() for x in values if isinstance(x, torch.Tensor) and x.ndim)

        hooks = [
            module.register_forward_hook(lambda _, inputs, output, name=name: note(name, inputs, output))
            for name, module in self.network.named_modules()
        ]
        yield
        for hook in hooks:
            hook.remove()


def _added(sums: list[list[torch.Tensor]]) -> torch.Tensor:
    """The blocks' sums, one for each subtree, added along the tree."""
    tree = TreeSum(4)
    for block, found in zip(BLOCKS, sums, strict=True):
        for shards, value in zip(subtrees(block, 4), found, strict=True):
            tree.push(shards, value)
    return tree.nodes[0][1]


def _join(one: list[torch.Tensor], other: list[torch.Tensor], whole: list[torch.Tensor]) -> bool:
    """Whether the tensors of the two shards are the parts of those of both."""
    return len(one) == len(other) == len(whole) and all(
        _same(torch.cat(both), joined) for *both, joined in zip(one, other, whole, strict=True)
    )


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Bit for bit, so that -0 is not 0, and NaN equals itself."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(*(tensor.reshape(-1).view(torch.uint8) for tensor in (one, other)))


def _title(name: str, module: nn.Module) -> str:
    return f"{name} ({type(module).__name__})" if name else f"the network itself ({type(module).__name__})"


def _refusal(what: str, fault: str) -> str:
    return (
        f"model.name: with train.shards, {what} {fault}; accepted: layers that treat each sample by itself, "
        f"nn.BatchNorm2d, or train.shards=null"
    )
