"""Gradients that travel in 16 bits: nearly the same, and the same on every rank."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from fcn import distributed
from fcn.distributed import DistributedContext
from tests.dist.ranks import run_ranks


def gradient(context: DistributedContext, comm_dtype: torch.dtype | None) -> list[np.ndarray]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 4, 1))
    parallel = distributed.data_parallel(model, context, True, comm_dtype)
    torch.manual_seed(context.rank)
    parallel(torch.randn(2, 3, 9, 9)).square().sum().backward()
    return [parameter.grad.numpy() for parameter in model.parameters()]


def test_compressed_gradients_are_the_sum_to_the_precision_of_bf16() -> None:
    whole, compressed = (run_ranks(2, gradient, comm_dtype) for comm_dtype in (None, torch.bfloat16))
    for exact, found, other in zip(whole[0], *compressed, strict=True):
        assert found.dtype == np.float32
        assert np.array_equal(found, other), "every rank has the same"
        error = np.abs(found - exact).max() / np.abs(exact).max()
        assert 0 < error < 2**-6, "each term and the sum are rounded to 8 bits"
