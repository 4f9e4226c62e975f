"""Shards: equal parts of the global batch whose sums are the same bits on any number of processes.

A sum of floating-point numbers depends on its order. Here every sum over the samples of a step is first taken over each
shard by itself, and then over the shards along one fixed binary tree, wherever they are computed: neighbours are added,
then neighbouring sums, and so on; an odd one at the end moves up as it is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from fcn.distributed.collectives import all_gather

ALIGNMENT = 64
"""Bytes. PyTorch's own memory begins at a multiple of it."""


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or a copy that begins where kernels find their fastest way.

    Kernels add in another order from other addresses, and that of a part depends on its place in the batch.
    """
    return tensor if tensor.data_ptr() % ALIGNMENT == 0 else tensor.clone()


class TreeSum:
    """Adds what belongs to shards, which are pushed in their order, along the tree.

    It holds one node for each complete subtree: for all shards the root, for a block of them perhaps several.

    Args:
        count: shards of the global batch.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.nodes: list[tuple[range, torch.Tensor]] = []
        """(shards of the subtree, their sum), in order."""

    def push(self, shards: range, value: torch.Tensor) -> None:
        """Add the next subtree. The sum of another one may be overwritten; `value` is not."""
        self.nodes.append((shards, value))
        while len(self.nodes) > 1 and self._are_siblings(self.nodes[-2][0], self.nodes[-1][0]):
            (left, one), (right, other) = self.nodes[-2:]
            # A node of several shards is a sum that was made here.
            total = one.add_(other) if len(left) > 1 and one.dtype == other.dtype else one + other
            self.nodes[-2:] = [(range(left.start, right.stop), total)]

    def _are_siblings(self, left: range, right: range) -> bool:
        width = 2 * len(left)
        return left.start % width == 0 and right.stop == min(left.start + width, self.count)


def subtrees(block: range, count: int) -> list[range]:
    """The complete subtrees of the tree over `count` shards that make up a block of them."""
    tree, nothing = TreeSum(count), torch.zeros(())
    for shard in block:
        tree.push(range(shard, shard + 1), nothing + 0)
    return [shards for shards, _ in tree.nodes]


def tree_sum(values: torch.Tensor) -> torch.Tensor:
    """(S, *shape) → the sum over S shards along the tree."""
    tree = TreeSum(len(values))
    for shard, value in enumerate(values):
        tree.push(range(shard, shard + 1), value)
    return tree.nodes[0][1]


def block_of(rank: int, world_size: int, count: int) -> range:
    """The shards of a rank; with a world size that does not divide `count`, some ranks have one more than others."""
    return range(rank * count // world_size, (rank + 1) * count // world_size)


class Shards:
    """The shards of one process, and what its network needs to compute shard by shard.

    Args:
        count: shards of the global batch, at least `world_size`.
        comm_dtype: type in which gradients are added and travel, or None for their own.
    """

    def __init__(self, count: int, rank: int = 0, world_size: int = 1, comm_dtype: torch.dtype | None = None) -> None:
        self.count, self.comm_dtype = count, comm_dtype
        self.blocks = [block_of(other, world_size, count) for other in range(world_size)]
        self.block = self.blocks[rank]
        self.now: range | None = None
        """The shards whose samples the network computes at the moment; None: it computes as without shards."""
        self.failure: Exception | None = None
        """Why gradients could not be exchanged."""
        self._copies: dict[int, tuple[torch.Tensor, ...]] = {}
        self._sums: dict[int, TreeSum] = {}

    @contextlib.contextmanager
    def computing(self, shards: range) -> Iterator[None]:
        """Inside are the forward and the backward pass of the next shards of this process.

        Raises:
            Exception: what ended the exchange of gradients with other processes.
        """
        if shards.start == self.block.start:
            self._sums.clear()
        self.now = shards
        try:
            yield
        finally:
            self.now = None
            self._copies.clear()
        if self.failure:
            raise self.failure

    def split(self, tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The part of each shard of a tensor whose first dimension is that of the samples.

        Raises:
            ValueError: there are no equal parts.
        """
        assert self.now is not None
        if tensor.ndim == 0 or len(tensor) % len(self.now):
            raise ValueError(f"{tuple(tensor.shape)} cannot be split into {len(self.now)} shards")
        # `split` gathers the parts' gradients once; `tensor_split` would fill a whole tensor for each.
        parts = (tensor,) if len(self.now) == 1 else tensor.split(len(tensor) // len(self.now))
        return tuple(map(aligned, parts))

    def copies(self, parameter: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """One view of a parameter for each shard; its gradient is the sum of theirs, along the tree.

        If the shards of this process do not form a single subtree, the gradient is the sum of the first one, and
        `further_sums` has the others. If they are computed in several passes, the last one gives the gradient.
        """
        assert self.now is not None
        if not (parameter.requires_grad and torch.is_grad_enabled()):
            return (parameter,) * len(self.now)
        if id(parameter) not in self._copies:
            self._copies[id(parameter)] = _Copies.apply(parameter, self)
        return self._copies[id(parameter)]

    def adds(self, parameter: torch.Tensor) -> bool:
        """Whether the gradient of the last pass was added along the tree."""
        return id(parameter) in self._sums

    def further_sums(self, parameter: torch.Tensor) -> list[torch.Tensor]:
        """The sums of this process's subtrees after the first one, once."""
        return [value for _, value in self._sums.pop(id(parameter)).nodes]

    def gather(self, mine: torch.Tensor) -> torch.Tensor:
        """A row for each shard of this process, (n, *shape) → those of all shards, (S, *shape), on every process."""
        if len(self.blocks) == 1:
            return mine
        most = max(map(len, self.blocks))
        if len(mine) < most:
            mine = torch.cat([mine, mine.new_zeros(most - len(mine), *mine.shape[1:])])
        parts = all_gather(mine)
        return torch.cat([part[: len(block)] for part, block in zip(parts, self.blocks, strict=True)])

    def add_gradients(
        self, parameter: torch.Tensor, shards: range, gradients: tuple[torch.Tensor, ...]
    ) -> torch.Tensor | None:
        """Take in the gradients of a pass; returns what autograd adds to the parameter's `grad`."""
        tree = self._sums.setdefault(id(parameter), TreeSum(self.count))
        for shard, gradient in zip(shards, gradients, strict=True):
            tree.push(range(shard, shard + 1), gradient.to(self.comm_dtype or gradient.dtype))
        if shards.stop < self.block.stop:
            return None
        _, first = tree.nodes.pop(0)  # for autograd alone, which then needs no copy
        if first.stride() != parameter.stride():  # of 1x1 kernels; DistributedDataParallel would warn
            first = first.new_empty_strided(parameter.shape, parameter.stride()).copy_(first)
        return first.to(parameter.dtype)


class _Copies(torch.autograd.Function):
    @staticmethod
    def forward(ctx, parameter: torch.Tensor, shards: Shards) -> tuple[torch.Tensor, ...]:
        ctx.parameter, ctx.shards, ctx.now = parameter, shards, shards.now
        return tuple(parameter.view_as(parameter) for _ in shards.now)

    @staticmethod
    def backward(ctx, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, None]:
        return ctx.shards.add_gradients(ctx.parameter, ctx.now, gradients), None
