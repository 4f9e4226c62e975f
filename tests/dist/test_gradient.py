"""One training step on any number of ranks has the gradient of the global mean over valid pixels."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fcn import distributed
from fcn.data.loaders import Batch, Step
from fcn.distributed import World
from fcn.engine import Numerics, train_step
from fcn.losses import cross_entropy
from fcn.models import build_model
from fcn.models.layers import convert_sync_batchnorm
from tests.dist.ranks import run_ranks

GLOBAL_BATCH, CLASSES, SIDE = 12, 4, 16


def make_batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Ignored areas from none to everything: image 7 has no valid pixel at all."""
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(0, 256, (GLOBAL_BATCH, SIDE, SIDE, 3), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, CLASSES, (GLOBAL_BATCH, SIDE, SIDE), generator=generator, dtype=torch.uint8)
    for index in range(GLOBAL_BATCH):
        labels[index, : index * SIDE // GLOBAL_BATCH] = 255
    labels[7] = 255
    return images, labels


def make_model(name: str, **options) -> nn.Module:
    torch.manual_seed(0)
    return build_model(name, CLASSES, **options).double()


def one_rank(world: World, name: str, options: dict, micro_batch: int | None) -> list:
    """Gradients and running statistics after one step of SGD with rate 0, in the order of the state_dict."""
    images, labels = make_batch()
    share = GLOBAL_BATCH // world.size
    mine = slice(world.rank * share, (world.rank + 1) * share)
    sizes = torch.tensor([[SIDE, SIDE]] * share)
    valid = int((labels != 255).sum())
    step = Step(Batch(images[mine], labels[mine], sizes, torch.arange(share), torch.arange(share)), False, valid, False, 0.0)
    model = convert_sync_batchnorm(make_model(name, **options))
    parallel = distributed.data_parallel(model, world, sync_bn=True)
    numerics = Numerics("fp64", True, world.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    loss, _ = train_step(
        parallel, step, cross_entropy, optimizer, numerics.scaler(), numerics,
        micro_batch=micro_batch, grad_clip=None, world_size=world.size,
    )  # fmt: skip
    total = float(distributed.all_reduce_sum(loss))
    buffers = [buffer.double().tolist() for buffer in model.buffers()]
    return [total, [parameter.grad.tolist() for parameter in model.parameters()], buffers]


def reference(name: str, options: dict) -> tuple[float, list[torch.Tensor], list[torch.Tensor]]:
    """Plain PyTorch: the whole batch at once, log-softmax and mean written out."""
    images, labels = make_batch()
    model = make_model(name, **options)
    mean, std = (torch.tensor(x, dtype=torch.float64) for x in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    logits = model(((images.double() / 255 - mean) / std).permute(0, 3, 1, 2))
    valid = labels != 255
    picked = logits.log_softmax(1).gather(1, labels.long().clamp(max=CLASSES - 1)[:, None])[:, 0]
    loss = -picked[valid].mean()
    loss.backward()
    return float(loss.detach()), [p.grad for p in model.parameters()], [b.double() for b in model.buffers()]


def assert_equal(found: list, expected: list[torch.Tensor]) -> None:
    """Largest difference, relative to the largest entry of the tensor, at most 1e-12."""
    for one, other in zip(found, expected, strict=True):
        difference = (torch.tensor(one, dtype=torch.float64) - other).abs().max()
        assert difference <= 1e-12 * other.abs().max().clamp_min(1e-3)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_gradient_of_a_network_with_batchnorm(world_size: int) -> None:
    options = {"width": 2, "norm": "batch"}
    loss, grads, buffers = reference("unet", options)
    for found_loss, found_grads, found_buffers in run_ranks(world_size, one_rank, "unet", options, None):
        assert found_loss == pytest.approx(loss, rel=1e-12)
        assert_equal(found_grads, grads)
        assert_equal(found_buffers, buffers)


@pytest.mark.parametrize(("world_size", "micro_batch"), [(1, 5), (2, 2), (3, 1)])
def test_accumulation_changes_nothing(world_size: int, micro_batch: int) -> None:
    options = {"width": 2, "norm": "none"}
    loss, grads, _ = reference("unet", options)
    for found_loss, found_grads, _ in run_ranks(world_size, one_rank, "unet", options, micro_batch):
        assert found_loss == pytest.approx(loss, rel=1e-12)
        assert_equal(found_grads, grads)
