"""Sums over shards: one tree, wherever the shards are."""

from __future__ import annotations

import contextlib
import itertools

import pytest
import torch
from torch import nn

from fcn import distributed
from fcn.distributed import DistributedContext, Shards, block_of, tree_sum
from fcn.distributed.shards import TreeSum, subtrees
from tests.dist.ranks import run_ranks

COUNTS = range(1, 18)


def brackets(block: range, count: int) -> list[str]:
    """The sums of a block as brackets, from a tree over text."""

    class Text(str):
        dtype = None

        def __add__(self, other: str) -> Text:
            return Text(f"({self}{other})")

        add_ = __add__

    tree = TreeSum(count)
    for shard in block:
        tree.push(range(shard, shard + 1), Text("abcdefghijklmnopq"[shard]))
    return [value for _, value in tree.nodes]


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (1, "a"),
        (2, "(ab)"),
        (3, "((ab)c)"),
        (5, "(((ab)(cd))e)"),
        (7, "(((ab)(cd))((ef)g))"),
        (8, "(((ab)(cd))((ef)(gh)))"),
    ],
)
def test_neighbours_are_added_and_an_odd_one_moves_up(count, expected):
    assert brackets(range(count), count) == [expected]


def test_a_block_has_the_subtrees_that_lie_inside():
    assert brackets(range(2, 5), 8) == ["(cd)", "e"]
    assert brackets(range(5, 8), 8) == ["f", "(gh)"]
    assert brackets(range(5, 7), 7) == ["f", "g"]
    assert subtrees(range(6, 12), 12) == [range(6, 8), range(8, 12)]


@pytest.mark.parametrize("count", COUNTS)
def test_the_root_has_the_same_bits_from_any_blocks(count):
    values = torch.randn(count, 5, generator=torch.Generator().manual_seed(0))
    expected = tree_sum(values.clone())
    for world_size in range(1, count + 1):
        whole = TreeSum(count)
        for rank in range(world_size):
            block = block_of(rank, world_size, count)
            part = TreeSum(count)
            for shard in block:
                part.push(range(shard, shard + 1), values[shard].clone())
            assert [shards for shards, _ in part.nodes] == subtrees(block, count)
            for shards, value in part.nodes:
                whole.push(shards, value)
        assert [shards for shards, _ in whole.nodes] == [range(count)]
        assert torch.equal(whole.nodes[0][1], expected), world_size


def test_a_sum_leaves_its_values_as_they_are():
    values = torch.ones(6, 2)
    assert torch.equal(tree_sum(values), torch.full((2,), 6.0))
    assert torch.equal(values, torch.ones(6, 2))


@pytest.mark.parametrize("count", COUNTS)
def test_blocks_cover_the_shards_in_order_and_differ_by_one_at_most(count):
    for world_size in range(1, count + 1):
        blocks = [block_of(rank, world_size, count) for rank in range(world_size)]
        assert list(itertools.chain(*blocks)) == list(range(count))
        assert {len(block) for block in blocks} <= {count // world_size, -(-count // world_size)}


def gathered(context: DistributedContext, count: int) -> list[float]:
    shards = Shards(count, context.rank, context.size)
    return shards.gather(torch.tensor([[10.0 * shard] for shard in shards.block])).flatten().tolist()


def test_rows_of_unequal_blocks_are_gathered_in_order():
    for found in run_ranks(3, gathered, 7):
        assert found == [0, 10, 20, 30, 40, 50, 60]


def exchanged(context: DistributedContext, count: int, comm_dtype: torch.dtype | None, passes: bool) -> list[bytes]:
    """Gradients of a product whose parameters have shapes that fill no piece, by shards of one row each."""
    torch.manual_seed(0)
    network = nn.ParameterList([torch.randn(7), torch.randn(3, 5, 1, 2).contiguous(memory_format=torch.channels_last)])
    inputs = torch.randn(count, 7 + 30) * torch.logspace(-3, 3, count)[:, None]
    shards = Shards(count, context.rank, context.size, comm_dtype)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = network

        def forward(self, rows: torch.Tensor) -> torch.Tensor:
            one, other = (shards.copies(parameter) for parameter in self.parts)
            both = zip(shards.split(rows), one, other, strict=True)
            return torch.cat([(row * torch.cat([a, b.flatten()])).sum()[None] for row, a, b in both])

    parallel = distributed.data_parallel(Net(), context, True, None, shards)
    mine = inputs[shards.block.start : shards.block.stop]
    pieces = [shards.block[place : place + 1] for place in range(len(mine))] if passes else [shards.block]
    for piece in pieces:
        last = piece.stop == shards.block.stop
        with contextlib.nullcontext() if last else distributed.no_sync(parallel), shards.computing(piece):
            parallel(inputs[piece.start : piece.stop]).sum().backward()
    return [parameter.grad.contiguous().numpy().tobytes() for parameter in network]


@pytest.mark.parametrize("passes", [False, True], ids=["at once", "one by one"])
@pytest.mark.parametrize("comm_dtype", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("count", [4, 7])
def test_gradients_have_the_same_bits_on_any_number_of_ranks(count, comm_dtype, passes):
    alone = exchanged(DistributedContext(0, 1, 0, torch.device("cpu"), "python"), count, comm_dtype, False)
    for world_size in (1, 2, 3, 4):
        for found in run_ranks(world_size, exchanged, count, comm_dtype, passes):
            assert found == alone, world_size


def failed(context: DistributedContext) -> str:
    """One rank leaves while the other one exchanges gradients."""
    shards = Shards(2, context.rank, context.size)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat(
                [(part * copy).sum()[None] for part, copy in zip(shards.split(x), shards.copies(self.weight))]
            )

    parallel = distributed.data_parallel(Net(), context, True, None, shards)
    if context.rank:
        return "left"
    try:
        with shards.computing(shards.block):
            parallel(torch.ones(1, 3)).sum().backward()
    except RuntimeError as error:
        return str(distributed.is_communication_failure(error))
    return "nothing was raised"


def test_an_exchange_that_fails_is_a_failure_of_communication():
    assert run_ranks(2, failed) == ["True", "left"]
