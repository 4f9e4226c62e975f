"""Sync-BN on gloo equals nn.BatchNorm2d on the union of the ranks' batches."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fcn.distributed import DistributedContext
from fcn.models import SyncBatchNorm2d, convert_sync_batchnorm
from tests.dist.ranks import run_ranks

CHANNELS = 5


def make_union(sizes: list[int], channels_last: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Images and output gradients; the channels' means are far from 0, where naive variances lose digits."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(sum(sizes), CHANNELS, 3, 4, generator=generator, dtype=torch.float64)
    images = images + 10 * torch.arange(CHANNELS).reshape(1, -1, 1, 1)
    grads = torch.randn(images.shape, generator=generator, dtype=torch.float64)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return images.contiguous(memory_format=layout), grads.contiguous(memory_format=layout)


def make_norm() -> nn.Sequential:
    norm = nn.BatchNorm2d(CHANNELS, momentum=0.3).double()
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 2, CHANNELS))
        norm.bias.copy_(torch.linspace(-1, 1, CHANNELS))
    return nn.Sequential(norm)


def train_twice(model: nn.Sequential, images: torch.Tensor, grads: torch.Tensor) -> dict[str, torch.Tensor]:
    """Two training passes, so that running statistics move twice; everything that a rank can see of them."""
    for _ in range(2):
        model.zero_grad()
        images = images.detach().requires_grad_()
        output = model(images)
        output.backward(grads)
    norm = model[0]
    return {
        "output": output.detach(),
        "input_grad": images.grad,
        "weight_grad": norm.weight.grad,
        "bias_grad": norm.bias.grad,
        "running_mean": norm.running_mean,
        "running_var": norm.running_var,
        "batches": norm.num_batches_tracked,
    }


def one_rank(context: DistributedContext, sizes: list[int], channels_last: bool) -> dict[str, list]:
    images, grads = make_union(sizes, channels_last)
    mine = slice(sum(sizes[: context.rank]), sum(sizes[: context.rank + 1]))
    model = convert_sync_batchnorm(make_norm())
    assert type(model[0]) is SyncBatchNorm2d
    return {key: value.tolist() for key, value in train_twice(model, images[mine], grads[mine]).items()}


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("sizes", [[3, 3], [5, 1], [4, 0], [2, 1, 3]])
def test_numbers_are_those_of_the_union_batch(sizes: list[int], channels_last: bool) -> None:
    ranks = run_ranks(len(sizes), one_rank, sizes, channels_last)
    expected = train_twice(make_norm(), *make_union(sizes, channels_last))
    for key in ("output", "input_grad"):
        parts = [torch.tensor(rank[key], dtype=torch.float64).reshape(-1, CHANNELS, 3, 4) for rank in ranks]
        torch.testing.assert_close(torch.cat(parts), expected[key], rtol=1e-12, atol=1e-12)
    for key in ("weight_grad", "bias_grad"):  # each rank holds its own part of the sum
        total = sum(torch.tensor(rank[key], dtype=torch.float64) for rank in ranks)
        torch.testing.assert_close(total, expected[key], rtol=1e-12, atol=1e-12)
    for rank in ranks:
        for key in ("running_mean", "running_var"):
            torch.testing.assert_close(
                torch.tensor(rank[key], dtype=torch.float64), expected[key], rtol=1e-12, atol=1e-12
            )
        assert rank["batches"] == 2


def no_affine_rank(context: DistributedContext, images: list) -> list:
    norm = convert_sync_batchnorm(nn.Sequential(nn.BatchNorm2d(2, affine=False)))
    mine = torch.tensor(images)[context.rank :: context.size].requires_grad_()
    output = norm(mine)
    output.pow(3).sum().backward()
    return [output.tolist(), mine.grad.tolist()]


def test_a_norm_without_weight_and_bias() -> None:
    images = torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    ranks = run_ranks(2, no_affine_rank, images.tolist())
    images.requires_grad_()
    output = nn.BatchNorm2d(2, affine=False)(images)
    output.pow(3).sum().backward()
    for rank, (found, grad) in enumerate(ranks):
        torch.testing.assert_close(torch.tensor(found), output.detach()[rank::2])
        torch.testing.assert_close(torch.tensor(grad), images.grad[rank::2], rtol=1e-4, atol=1e-5)


class WithActivation(nn.BatchNorm2d):
    """Calls `F.batch_norm` itself, as timm's BatchNormAct2d does."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.num_batches_tracked.add_(1)
        output = F.batch_norm(
            images, self.running_mean, self.running_var, self.weight, self.bias, self.training, self.momentum, self.eps
        )
        return F.gelu(output)


class Scaled(nn.BatchNorm2d):
    """Adds to what BatchNorm2d does."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return super().forward(images).sin() * images.amax(1, keepdim=True)


def subclass_rank(context: DistributedContext, kind: type, sizes: list[int], compiled: bool) -> dict[str, list]:
    images, grads = make_union(sizes, False)
    mine = slice(sum(sizes[: context.rank]), sum(sizes[: context.rank + 1]))
    model = convert_sync_batchnorm(nn.Sequential(kind(CHANNELS, momentum=0.3).double()))
    if compiled:
        model.compile()
    return {key: value.tolist() for key, value in train_twice(model, images[mine], grads[mine]).items()}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("sizes", [[3, 3], [4, 1]])
@pytest.mark.parametrize("kind", [WithActivation, Scaled])
def test_a_subclass_keeps_its_own_forward_and_the_numbers_of_the_union_batch(kind, sizes, compiled) -> None:
    ranks = run_ranks(2, subclass_rank, kind, sizes, compiled)
    expected = train_twice(nn.Sequential(kind(CHANNELS, momentum=0.3).double()), *make_union(sizes, False))
    for key in ("output", "input_grad"):
        parts = [torch.tensor(rank[key], dtype=torch.float64).reshape(-1, CHANNELS, 3, 4) for rank in ranks]
        torch.testing.assert_close(torch.cat(parts), expected[key], rtol=1e-12, atol=1e-12)
    for rank in ranks:
        for key in ("running_mean", "running_var"):
            torch.testing.assert_close(
                torch.tensor(rank[key], dtype=torch.float64), expected[key], rtol=1e-12, atol=1e-12
            )
        assert rank["batches"] == 2
