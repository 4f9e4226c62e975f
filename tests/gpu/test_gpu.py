"""What only a GPU can show. Skipped where there is none."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import nn

from fcn import distributed
from fcn.config import Data, Loss, Optim, load_config
from fcn.data import (
    Batch,
    GlobalBatchSampler,
    LabelCounts,
    RankBatches,
    TrainingBatch,
    TrainTransform,
    batch_loader,
    build_dataset,
    device_batches,
    inspect_split,
)
from fcn.data.loaders import count_labels
from fcn.distributed import DistributedContext, Shards
from fcn.evaluation.confusion_matrix import ConfusionMatrix
from fcn.models import Precision, build_model, convert_dropout, convert_shards, convert_sync_batchnorm
from fcn.training import TrainingState, Trial, build_loss, build_run, states, train_step
from fcn.training.losses import LOSSES
from fcn.training.nonfinite import NonFiniteGuard
from fcn.training.optim import build_optimizer
from tests.dist.ranks import run_ranks

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

CLASSES, SIDE, IMAGES = 5, 64, 4
CONTEXT = DistributedContext(0, 1, 0, torch.device("cuda", 0), "python")
CRITERION = build_loss(Loss(), CLASSES)


def make_step() -> TrainingBatch:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (IMAGES, SIDE, SIDE, 3), generator=generator, dtype=torch.uint8)
    labels = (images.sum(-1) * CLASSES // 766).to(torch.uint8)
    sizes = torch.tensor([[SIDE, SIDE]] * IMAGES)
    numbers, counts = torch.arange(IMAGES), count_labels(labels.numpy())
    batch = Batch(*(tensor.cuda() for tensor in (images, labels, sizes, numbers, numbers, counts)))
    return TrainingBatch(batch, False, LabelCounts.of(counts), False, 0.0)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_training_lowers_the_loss_without_a_host_sync(precision: str, channels_last: bool, compiled: bool) -> None:
    torch.manual_seed(0)
    precision = Precision(precision, channels_last, torch.device("cuda"))
    model = precision.place(build_model("unet", CLASSES, width=8))
    optimizer = build_optimizer(model, Optim(name="adamw", lr=1e-3))
    state = TrainingState(
        model=model, network=torch.compile(model) if compiled else model, optimizer=optimizer, criterion=CRITERION,
        precision=precision, context=CONTEXT, micro_batch=2, grad_clip=1.0,
        nonfinite=NonFiniteGuard(3, torch.device("cuda")),
    )  # fmt: skip
    step = make_step()

    def train() -> torch.Tensor:
        return train_step(state, step).losses.sum()

    first = [train() for _ in range(3)]  # warm-up: compilation and cached constants may wait for the device
    torch.cuda.set_sync_debug_mode("error")
    try:
        last = [train() for _ in range(20)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert last[-1] < first[0]


@pytest.mark.parametrize("name", LOSSES)
def test_loss_repeats_bit_for_bit_without_a_host_sync(name: str) -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(2, CLASSES, 300, 400, generator=generator).cuda().requires_grad_()
    labels = torch.randint(0, CLASSES, (2, 300, 400), generator=generator, dtype=torch.uint8)
    labels[:, :50] = 255
    label_counts, labels = LabelCounts.of(count_labels(labels.numpy())), labels.long().cuda()
    own = {} if name in ("dice", "lovasz") else {"weights": (1.0, 0.5, 2.0, 1.0, 3.0)}
    criterion = build_loss(Loss(name=name, **own), CLASSES, "cuda")
    results = []
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(10):
            loss = criterion(logits, labels, label_counts)
            results.append([loss, *torch.autograd.grad(loss, logits)])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for result in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(result, results[0], strict=True))


def shared_gpu_rank(context: DistributedContext) -> list:
    images, grads = union()
    half = slice(context.rank * 2, context.rank * 2 + 2)
    model = convert_sync_batchnorm(nn.Sequential(nn.BatchNorm2d(3)).double().cuda())
    inputs = images[half].cuda().requires_grad_()
    output = model(inputs)
    output.backward(grads[half].cuda())
    return [output.tolist(), inputs.grad.tolist()]


def union() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    images, grads = (torch.randn(4, 3, 5, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    return images, grads


def test_sync_bn_of_two_gloo_ranks_on_one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FCN_BACKEND", "gloo")
    ranks = run_ranks(2, shared_gpu_rank, devices=os.environ.get("CUDA_VISIBLE_DEVICES", "0"))
    images, grads = union()
    images.requires_grad_()
    output = nn.BatchNorm2d(3).double()(images)
    output.backward(grads)
    for position, expected in enumerate((output.detach(), images.grad)):
        found = torch.cat([torch.tensor(rank[position], dtype=torch.float64) for rank in ranks])
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def amp_rank(context: DistributedContext, precision: str) -> list:
    """Gradients of one step of a network with sync-BN, under autocast, each rank with its part of the images."""
    torch.manual_seed(0)
    step = make_step()
    mine = slice(*(place * IMAGES // context.size for place in (context.rank, context.rank + 1)))
    step = step._replace(local=Batch(*(tensor[mine] for tensor in step.local)))
    precision = Precision(precision, True, context.device)
    model = precision.place(convert_sync_batchnorm(build_model("unet", CLASSES, width=8)))
    state = TrainingState(
        model=model, network=distributed.data_parallel(model, context, sync_bn=True),
        optimizer=build_optimizer(model, Optim(lr=1e-9)), criterion=CRITERION, precision=precision, context=context,
    )  # fmt: skip
    train_step(state, step)
    return [parameter.grad.flatten().tolist() for parameter in model.parameters()]


@pytest.mark.parametrize(("precision", "tolerance"), [("fp64", 1e-12), ("fp32", 1e-3), ("bf16", 5e-2), ("fp16", 5e-2)])
def test_gradient_of_two_gloo_ranks_on_one_gpu(monkeypatch, precision: str, tolerance: float) -> None:
    monkeypatch.setenv("FCN_BACKEND", "gloo")
    devices = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
    alone, shared = (run_ranks(size, amp_rank, precision, devices=devices)[0] for size in (1, 2))
    for one, other in zip(shared, alone, strict=True):
        expected = torch.tensor(other, dtype=torch.float64)
        difference = (torch.tensor(one, dtype=torch.float64) - expected).norm()
        assert difference <= tolerance * expected.norm().clamp_min(1e-6)


def sharded_rank(context: DistributedContext, precision: str, sync_bn: bool) -> dict[str, list]:
    """Weights and statistics after three steps of a network with dropout, two of four shards on each of two ranks."""
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(0)
    shards = Shards(IMAGES, context.rank, context.size)
    step, block = make_step(), shards.block
    step = step._replace(local=Batch(*(tensor[block.start : block.stop] for tensor in step.local)))
    precision = Precision(precision, True, context.device, one_by_one=True)
    model = nn.Sequential(build_model("linknet", 8), nn.Dropout(0.5), nn.Conv2d(8, CLASSES, 1))
    keys = convert_dropout(model)
    model = precision.place(convert_sync_batchnorm(model) if sync_bn else model)
    convert_shards(model, shards)
    state = TrainingState(
        model=model, network=distributed.data_parallel(model, context, sync_bn, shards=shards),
        optimizer=build_optimizer(model, Optim(name="sgd", lr=0.1)), criterion=CRITERION, precision=precision,
        context=context, shards=shards, sample_keys=keys, grad_clip=0.5,
    )  # fmt: skip
    losses = [state.step_loss(train_step(state, step).losses).item() for _ in range(3)]
    return {"losses": losses} | {key: value.flatten().tolist() for key, value in model.state_dict().items()}


@pytest.mark.parametrize("backend", ["gloo", "nccl"])
@pytest.mark.parametrize("sync_bn", [True, False])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_shards_give_the_same_bits_on_two_ranks_of_one_gpu(monkeypatch, precision, sync_bn, backend) -> None:
    """NCCL lets ranks share a GPU from version 2.30 on, if it is told to."""
    if backend == "nccl" and torch.cuda.nccl.version() < (2, 30):
        pytest.skip("needs NCCL 2.30")
    settings = {"NCCL_MULTI_RANK_GPU_ENABLE": "1", "NCCL_NVLS_ENABLE": "0", "NCCL_MAX_CTAS": "4"}
    for name, value in {"FCN_BACKEND": backend, "CUBLAS_WORKSPACE_CONFIG": ":4096:8", **settings}.items():
        monkeypatch.setenv(name, value)
    devices = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
    alone, *shared = (
        rank for size in (1, 2) for rank in run_ranks(size, sharded_rank, precision, sync_bn, devices=devices)
    )
    assert shared[0] == alone  # without sync-BN, rank 1 keeps the statistics of its own first shard


def test_what_waits_in_host_memory_gives_the_same_gradient_for_less_device_memory() -> None:
    results = []
    for offload in (False, True):
        torch.manual_seed(0)
        precision = Precision("fp32", True, torch.device("cuda"))
        model = precision.place(build_model("unet", CLASSES, width=16))
        optimizer = build_optimizer(model, Optim(lr=1e-9))
        torch.cuda.reset_peak_memory_stats()
        state = TrainingState(
            model=model, optimizer=optimizer, criterion=CRITERION, precision=precision, context=CONTEXT,
            offload=offload,
        )  # fmt: skip
        train_step(state, make_step())
        results.append(([p.grad.clone() for p in model.parameters()], torch.cuda.max_memory_allocated()))
    for one, other in zip(*(grads for grads, _ in results), strict=True):
        torch.testing.assert_close(one, other)
    assert results[1][1] < results[0][1]


def test_memory_of_a_checked_config_is_what_its_steps_take(shapes_root: Path) -> None:
    overrides = [f"data.root={shapes_root}", "data.crop=[96,96]"]
    config = load_config("configs/quickstart.yaml", overrides)
    report = inspect_split(config.data, "train")
    run, _ = build_run(
        config, DistributedContext(0, 1, 0, torch.device("cuda", 0), "python"), {"train": report.dataset}
    )
    trial = Trial(run, report)
    memory = trial.memory()
    assert 0 < sum(states(run).values()) < memory.fixed
    assert memory.of(8) == pytest.approx(trial.bytes_of_step(8), rel=0.25)


def test_batches_cross_in_a_stream_of_their_own_and_are_what_the_loader_made(shapes_root: Path) -> None:
    """With both resizes; the one on the device is the loader's to one grey level, and that of a CPU to the bit."""
    dataset = build_dataset(Data(name="shapes", root=str(shapes_root)), "train")
    transform = TrainTransform((48, 56), (0.5, 2.0), 0.5)

    def batches(device: str, later: bool) -> list[torch.Tensor]:
        sampler = GlobalBatchSampler(dataset, batch_size=6, steps=8, start_step=0, seed=0, rank=0, world_size=1)
        shares = RankBatches(dataset, transform, 0, resize_later=later)
        loader = batch_loader(shares, sampler, 1, torch.device(device))
        return [step.local.images.cpu() for step in device_batches(loader, torch.device(device))]

    for later in (False, True):
        for found, expected in zip(batches("cuda", later), batches("cpu", later), strict=True):
            assert torch.equal(found, expected)
    for one, other in zip(batches("cuda", True), batches("cuda", False), strict=True):
        assert (one.int() - other.int()).abs().max() <= 1


def test_the_confusion_matrix_counts_without_a_host_sync() -> None:
    generator = torch.Generator().manual_seed(0)
    labels, predictions = (torch.randint(0, CLASSES, (4, 99, 77), generator=generator) for _ in range(2))
    labels[0] = 255
    here, there = ConfusionMatrix(CLASSES), ConfusionMatrix(CLASSES, device="cuda")
    here.update(labels, predictions)
    pair = labels.cuda(), predictions.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        there.update(*pair)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(here.counts, there.counts)
