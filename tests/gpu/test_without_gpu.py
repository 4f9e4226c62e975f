"""What can be found out about the code for GPUs without one.

On fake tensors of the device `cuda`, operations know shapes, types and devices, and hold no values. So whatever mixes
devices fails, and so does whatever needs a value on the host, which on a GPU would wait for it. PyTorch's backward
engine needs a real GPU for them; the same step with its backward pass runs on the `meta` device.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fcn.checkpoints.saver import to_host
from fcn.config import Data, Loss, Optim
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
)
from fcn.data.transforms import _statistics, resize_windows
from fcn.distributed import DistributedContext, Shards
from fcn.distributed.stragglers import CommTimer, ComputeTimer
from fcn.evaluation.confusion_matrix import ConfusionMatrix, image_miou
from fcn.evaluation.inference import TTA, predict
from fcn.models import MODELS, Precision, build_model, convert_dropout, convert_shards
from fcn.training import TrainingState, build_loss, train_step
from fcn.training.losses import LOSSES
from fcn.training.nonfinite import NonFiniteGuard
from fcn.training.optim import build_optimizer
from fcn.training.step import _accumulate_gradients, saved_on_host

CLASSES, SIDE, IMAGES = 5, 64, 4
CUDA, META = torch.device("cuda", 0), torch.device("meta")


class NoCopies(TorchDispatchMode):
    """Refuses copies between host and GPU for which one waits for the other; fake tensors themselves allow them."""

    warm = False
    """Whether constants are on the GPU, so that nothing has to be copied there."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("_to_copy", "copy_"):
            source, target = (args[0], result) if name == "_to_copy" else (args[1], args[0])
            waits = not (kwargs or {}).get("non_blocking", len(args) > 2 and args[2])
            if waits and source.device != target.device and (self.warm or source.device.type == "cuda"):
                raise AssertionError(f"{tuple(source.shape)}: a copy from {source.device} to {target.device} waits")
        return result


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[NoCopies]:
    """Everything that the test makes on CUDA is fake; autocast and the scaler believe that there is a GPU."""
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda *_, **__: True)
    monkeypatch.setattr("torch.nn.init.trunc_normal_", lambda tensor, **_: tensor)  # looks at its values
    _statistics.cache_clear()
    try:
        with FakeTensorMode(), NoCopies() as copies:
            yield copies
    finally:
        _statistics.cache_clear()  # of fake tensors


def training_batch(device: torch.device, images: int = IMAGES) -> TrainingBatch:
    pixels = torch.empty(images, SIDE, SIDE, 3, dtype=torch.uint8, device=device)
    labels = torch.empty(images, SIDE, SIDE, dtype=torch.uint8, device=device)
    sizes, numbers = (torch.empty(shape, dtype=torch.int64, device=device) for shape in ((images, 2), (images,)))
    counts = LabelCounts([SIDE * SIDE] * CLASSES + [0] * (256 - CLASSES), images)
    return TrainingBatch(Batch(pixels, labels, sizes, numbers, numbers, numbers), True, counts, False, 0.0)


def training_state(device: torch.device, precision: str, name: str = "unet", loss: str = "cross_entropy", **settings):
    """A state with everything that a quiet step may use; the network is made on the device."""
    with torch.device(device):
        model = build_model(name, CLASSES, **({"width": 8} if name == "unet" else {}))
    precision = Precision(precision, True, device)
    if precision.input_dtype != torch.float32:
        model.to(precision.input_dtype)
    return TrainingState(
        model=model, optimizer=build_optimizer(model, Optim(name="adamw")),
        criterion=build_loss(Loss(name=loss), CLASSES, device), precision=precision,
        context=DistributedContext(0, 1, 0, device, "python"), grad_clip=1.0, aux_weight=0.5,
        nonfinite=NonFiniteGuard(3, device), **settings,
    )  # fmt: skip


@pytest.fixture
def gradients_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of the backward engine: every parameter of the graph gets a gradient."""

    def backward(loss: torch.Tensor) -> None:
        seen, waiting = set(), [loss.grad_fn]
        while waiting:
            node = waiting.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            if hasattr(node, "variable"):
                node.variable.grad = torch.empty_like(node.variable)
            waiting += [parent for parent, _ in node.next_functions]

    monkeypatch.setattr(torch.Tensor, "backward", backward)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", MODELS)
def test_a_step_neither_mixes_devices_nor_waits(fake_cuda, gradients_by_hand, name: str, precision: str) -> None:
    state = training_state(CUDA, precision, name)
    assert state.scaler.is_enabled() == (precision == "fp16")
    two_steps(state, fake_cuda)


def two_steps(state: TrainingState, copies: NoCopies) -> None:
    """Of which the first may bring constants to the GPU."""
    for _ in range(2):
        result = train_step(state, training_batch(CUDA))
        copies.warm = True
    assert result.losses.device == result.grad_norm.device == CUDA
    assert all(parameter.grad.device == CUDA for parameter in state.model.parameters())


@pytest.mark.parametrize("micro_batch", [None, 1])
@pytest.mark.parametrize("offload", [False, True])
def test_a_step_in_parts_neither_mixes_devices_nor_waits(
    fake_cuda, gradients_by_hand, micro_batch: int | None, offload: bool
) -> None:
    state = training_state(CUDA, "bf16", micro_batch=micro_batch, offload=offload)
    two_steps(state, fake_cuda)


@pytest.mark.parametrize("name", LOSSES)
def test_no_loss_mixes_devices_or_waits(fake_cuda, name: str) -> None:
    own = {} if name in ("dice", "lovasz") else {"weights": (1.0, 0.5, 2.0, 1.0, 3.0)}
    criterion = build_loss(Loss(name=name, **own), CLASSES, CUDA)
    fake_cuda.warm = True
    logits = torch.empty(2, CLASSES, 30, 40, device=CUDA, requires_grad=True)
    labels = torch.empty(2, 30, 40, dtype=torch.int64, device=CUDA)
    loss = criterion(logits, labels, LabelCounts([480] * CLASSES + [0] * (256 - CLASSES), 2))
    assert (loss.device, loss.shape, loss.requires_grad) == (CUDA, (), True)


@pytest.mark.parametrize("name", LOSSES)
def test_no_gradient_of_a_loss_needs_the_host(name: str) -> None:
    """On `meta`, whose tensors have no values either, the backward engine works."""
    criterion = build_loss(Loss(name=name), CLASSES, META)
    logits = torch.empty(2, CLASSES, 30, 40, device=META, requires_grad=True)
    labels = torch.empty(2, 30, 40, dtype=torch.int64, device=META)
    criterion(logits, labels, LabelCounts([480] * CLASSES + [0] * (256 - CLASSES), 2)).backward()
    assert logits.grad.shape == logits.shape


@pytest.mark.parametrize("name", MODELS)
def test_no_backward_pass_needs_the_host(name: str) -> None:
    state = training_state(META, "fp32", name)
    assert _accumulate_gradients(state, training_batch(META)).is_meta
    assert all(parameter.grad.is_meta for parameter in state.model.parameters())


def test_no_backward_pass_of_shards_with_dropout_needs_the_host() -> None:
    state = training_state(META, "fp32", "fcn_resnet18")
    state.sample_keys, state.shards = convert_dropout(state.model), Shards(IMAGES, 0, 1)
    convert_shards(state.model, state.shards)
    assert _accumulate_gradients(state, training_batch(META)).shape == (IMAGES,)


@pytest.mark.parametrize("tta", [TTA(), TTA((0.5, 1.0), True), TTA(window=(48, 40))])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@torch.no_grad()
def test_evaluation_neither_mixes_devices_nor_waits(fake_cuda, precision: str, tta: TTA) -> None:
    state = training_state(CUDA, precision)
    matrix = ConfusionMatrix(CLASSES, device=CUDA)
    for _ in range(2):
        batch = training_batch(CUDA).local
        classes = predict(state.model.eval(), batch.images, (SIDE, SIDE), state.precision, tta)
        scores = image_miou(matrix.update(batch.labels, classes))
        fake_cuda.warm = True
    assert (classes.device, scores.device, scores.shape) == (CUDA, CUDA, (IMAGES,))


def test_the_resize_on_the_gpu_neither_mixes_devices_nor_waits(fake_cuda) -> None:
    fake_cuda.warm = True
    windows = torch.empty(IMAGES, 90, 70, 3, dtype=torch.uint8, device=CUDA)
    resized = resize_windows(windows, torch.empty(IMAGES, 2, 5, dtype=torch.float64, device=CUDA), (SIDE, 48))
    assert (resized.device, resized.shape, resized.dtype) == (CUDA, (IMAGES, SIDE, 48, 3), torch.uint8)


def test_what_waits_in_host_memory_comes_back_to_the_gpu(fake_cuda) -> None:
    with saved_on_host():
        large = torch.empty(1 << 14, device=CUDA, requires_grad=True).add(1)
        squared = large.square()
    assert squared.grad_fn._saved_self is not large
    assert squared.grad_fn._saved_self.device == CUDA


class Stream:
    """In place of a CUDA stream and its events: notes what is asked of them, in order."""

    def __init__(self) -> None:
        self.asked = []

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """What goes to CUDA here becomes a fake tensor."""
        with FakeTensorMode(allow_non_fake_inputs=True), NoCopies() as copies:
            copies.warm = True
            yield

    def record_event(self, event: str = "event") -> str:
        self.asked.append(f"{event} after the copy")
        return event

    def wait_event(self, event: str) -> None:
        self.asked.append(f"wait for {event}")


def test_batches_cross_in_a_stream_that_the_step_waits_for(monkeypatch, shapes_root: Path) -> None:
    stream, kept = Stream(), []
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "stream", Stream.inside)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, given: kept.append(tensor))
    dataset = build_dataset(Data(name="shapes", root=str(shapes_root)), "train")
    sampler = GlobalBatchSampler(dataset, batch_size=2, steps=2, start_step=0, seed=0, rank=0, world_size=1)
    batches = RankBatches(dataset, TrainTransform((48, 56), (0.5, 2.0), 0.5), 0, resize_later=True)
    for step in device_batches(batch_loader(batches, sampler, 0, torch.device("cpu")), CUDA):
        stream.asked.append("step")
        assert step.local.images.shape == (2, 48, 56, 3)
        assert all(tensor.device == CUDA for tensor in step.local)
        assert [id(tensor) for tensor in kept] == [id(tensor) for tensor in step.local]
        kept.clear()
    copied, waited = "event after the copy", "wait for event"
    assert stream.asked == [copied, copied, waited, "step", waited, "step"]


class Event:
    """In place of a CUDA event: the clock advances by a second with each one that is recorded."""

    clock = 0.0

    def __init__(self, enable_timing: bool = False) -> None:
        self.waited = False

    def record(self) -> None:
        Event.clock += 1
        self.at = Event.clock

    def synchronize(self) -> None:
        self.waited = True

    def elapsed_time(self, other: Event) -> float:
        return (other.at - self.at) * 1000


def test_time_without_waiting_for_others_is_measured_by_events(fake_cuda, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    comm, tensor = CommTimer(), torch.empty((), device=CUDA)
    timer = ComputeTimer(CUDA, comm)
    with timer.step(0.25, sampled=False):
        pass
    with timer.step(0.25, sampled=True):  # five seconds between its six events, one of them an exchange, one the last
        with comm.counting(tensor):
            pass
        comm.gradients_are_ready(tensor)
        comm.backward_ended(tensor)
    assert timer.take() == (3.0, 0.25)


def test_a_state_is_copied_to_the_host_without_waiting(fake_cuda, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    state = {"weights": [torch.empty(3, device=CUDA)], "step": 7}
    copied, wait = to_host(state)
    assert copied["weights"][0].device.type == "cpu"
    assert copied["step"] == 7
    assert not wait.__self__.waited
    wait()
    assert wait.__self__.waited
