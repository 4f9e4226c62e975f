"""Every network on real ranks: no warning, equal weights, equal masks; own and pretrained ones by the command line."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import subprocess
import tempfile
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.models import resnet18
from torchvision.models.segmentation.fcn import FCNHead

from fcn import distributed, seeding
from fcn.checkpoints import load_checkpoint
from fcn.config import Loss
from fcn.data import Batch, LabelCounts, TrainingBatch
from fcn.data.loaders import count_labels
from fcn.distributed import DistributedContext
from fcn.models import MODELS, Precision, SampleKeys, build_model, convert_dropout, convert_sync_batchnorm, examine
from fcn.training import TrainingState, build_loss, train_step
from tests.dist.ranks import CHECKOUT, TIMEOUT_S, command, complaints, environment, run, run_ranks, started

CLASSES = 4
CRITERION = build_loss(Loss(), CLASSES)
HERE = "tests.dist.test_models"


def make_step(images: int, side: int, rank: int, world_size: int) -> TrainingBatch:
    """This rank's share of one global batch, the same whatever the number of ranks."""
    generator = torch.Generator().manual_seed(5)
    pixels = torch.randint(0, 256, (images, side, side, 3), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, CLASSES, (images, side, side), generator=generator, dtype=torch.uint8)
    labels[:, : side // 4] = 255
    keys = torch.tensor([seeding.derive(0, "dropout", 0, index) >> 33 for index in range(images)])
    share = images // world_size
    mine = slice(rank * share, (rank + 1) * share)
    sizes = torch.full((share, 2), side)
    counts = count_labels(labels.numpy())
    batch = Batch(pixels[mine], labels[mine], sizes, torch.arange(images)[mine], keys[mine], counts[mine])
    return TrainingBatch(batch, False, LabelCounts.of(counts), False, 0.0)


# --- every network under DistributedDataParallel -------------------------------------------------------------------


@contextlib.contextmanager
def everything_said() -> Iterator[list[str]]:
    """What warnings say, and whatever is written to file descriptor 2, where the C++ logger writes."""
    said: list[str] = []
    with tempfile.TemporaryFile("w+") as file, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        kept = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield said
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            said += [str(warning.message) for warning in caught] + file.read().splitlines()


def checksums(model: nn.Module) -> dict[str, int]:
    return {key: zlib.crc32(tensor.contiguous().numpy()) for key, tensor in model.state_dict().items()}


def two_steps(context: DistributedContext, name: str, options: dict, side: int) -> tuple[list[str], list[str], dict[str, int]]:
    """(what was said, parameters that did not move, checksums of the state afterwards) of this rank."""
    torch.manual_seed(0)
    precision = Precision("fp32", True, context.device)
    with everything_said() as said:
        model = build_model(name, CLASSES, **options)
        keys = convert_dropout(model)
        model = precision.place(convert_sync_batchnorm(model))
        if name not in MODELS:
            found = examine(model, keys, CLASSES, (side, side), precision.autocast(), sync_bn=True)
            said += found.warnings + found.notes
        before = {key: parameter.detach().clone() for key, parameter in model.named_parameters()}
        parallel = distributed.data_parallel(model, context, sync_bn=True)
        parallel.train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        step = make_step(2 * context.size, side, context.rank, context.size)
        state = TrainingState(
            model=model, network=parallel, optimizer=optimizer, criterion=CRITERION, precision=precision,
            context=context, aux_weight=0.5, sample_keys=keys,
        )  # fmt: skip
        for _ in range(2):
            train_step(state, step)
    still = [key for key, parameter in model.named_parameters() if torch.equal(parameter, before[key])]
    return said, still, checksums(model)


SMALL = {
    "fcn32s": {"width": 4}, "fcn16s": {"width": 4}, "fcn8s": {"width": 4}, "fcn8_kitti": {"width": 4},
    "unet": {"width": 4},
}  # fmt: skip
NETWORKS = {
    **{name: (name, SMALL.get(name, {}), 16 if "resnet" in name else 64) for name in MODELS},
    "fcn8s-same": ("fcn8s", {"width": 4, "layout": "same"}, 64),
    "unet-none": ("unet", {"width": 4, "norm": "none"}, 64),
    "linknet-plain": ("linknet", {"encoder": "plain"}, 64),
    "deeplabv3_resnet50": (
        "torchvision.models.segmentation:deeplabv3_resnet50",
        {"weights_backbone": None, "aux_loss": True},
        16,
    ),
}


@pytest.mark.parametrize("network", NETWORKS)
def test_two_ranks_train_in_silence_to_the_same_weights(network: str) -> None:
    (said, still, state), (said_1, still_1, state_1) = run_ranks(2, two_steps, *NETWORKS[network])
    assert said + said_1 == []
    assert still == still_1 == [], "every parameter has moved"
    assert state == state_1


class OtherStrides(nn.Module):
    """A 1×1 kernel whose gradient comes in another memory format than its own."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, num_classes, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        products = torch.einsum("oi,nihw->nohw", self.conv.weight[:, :, 0, 0], images)
        return products + self.conv.bias[:, None, None]


def test_the_warning_that_must_not_come_would_be_heard() -> None:
    for said, _, _ in run_ranks(2, two_steps, f"{HERE}:OtherStrides", {}, 8):
        (heard,) = said
        assert "Grad strides do not match bucket view strides" in heard


class HalfUsed(nn.Module):
    """A user's network with a layer that no loss depends on, for which DistributedDataParallel would wait."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.used, self.unused = nn.Conv2d(3, num_classes, 1), nn.Conv2d(3, 7, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.unused(images)
        return self.used(images)


def test_layer_without_use_is_frozen_and_two_ranks_train() -> None:
    (said, still, state), (_, _, state_1) = run_ranks(2, two_steps, f"{HERE}:HalfUsed", {}, 8)
    assert said == ["the loss does not depend on unused.weight, unused.bias, 63.6% of the weights: they stay untrained"]
    assert still == ["unused.weight", "unused.bias"]
    assert state == state_1


# --- dropout keyed by sample ---------------------------------------------------------------------------------------


class TwoHeads(nn.Module):
    """torchvision's FCN in small: its own heads, with BatchNorm and Dropout, on two layers."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.layer3, self.layer4 = nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.classifier, self.aux_classifier = FCNHead(16, num_classes), FCNHead(16, num_classes)
        for head in (self.classifier, self.aux_classifier):
            head[3].p = 0.4  # 0.1 of four channels would often drop none

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        aux = self.layer3(images).relu()
        heads = {"out": self.classifier(self.layer4(aux).relu()), "aux": self.aux_classifier(aux)}
        return {key: nn.functional.interpolate(x, images.shape[2:], mode="bilinear") for key, x in heads.items()}


IMAGES = 8
DROPPING = {
    "fcn8s": ("fcn8s", {"width": 4}, 32),
    "fcn8_kitti": ("fcn8_kitti", {"width": 4}, 64),
    "two heads": (f"{HERE}:TwoHeads", {}, 16),
}


def dropping_step(
    context: DistributedContext, name: str, options: dict, side: int, micro_batch: int | None
) -> tuple[float, list[np.ndarray], list[np.ndarray]]:
    """(loss, gradients, for every dropout layer the mask of each of this rank's images) of one step."""
    torch.manual_seed(0)
    model = build_model(name, CLASSES, **options)
    for key, parameter in model.named_parameters():
        if key.startswith("score"):  # they start at zero, which would hide every mask
            nn.init.normal_(parameter, std=0.1)
    keys = convert_dropout(model)
    precision = Precision("fp64", True, context.device)
    model = precision.place(convert_sync_batchnorm(model))
    masks: dict[nn.Module, list[np.ndarray]] = {}

    def note(layer: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        # 0 kept, 1 dropped, 2 cannot be seen, because the input is 0 there
        seen = torch.where(inputs[0] == 0, 2, (output == 0).long())
        masks.setdefault(layer, []).extend(seen.detach().numpy().astype(np.uint8))

    for layer in model.modules():
        if isinstance(layer, nn.modules.dropout._DropoutNd):
            layer.register_forward_hook(note)
    parallel = distributed.data_parallel(model, context, sync_bn=True)
    parallel.train()
    state = TrainingState(
        model=model, network=parallel, optimizer=torch.optim.SGD(model.parameters(), lr=0.0), criterion=CRITERION,
        precision=precision, context=context, micro_batch=micro_batch, aux_weight=0.5, sample_keys=keys,
    )  # fmt: skip
    result = train_step(state, make_step(IMAGES, side, context.rank, context.size))
    total = float(distributed.all_reduce_sum(result.losses.sum()))
    gradients = [parameter.grad.contiguous().numpy() for parameter in model.parameters()]
    return total, gradients, [np.stack(images) for images in masks.values()]


@pytest.fixture(scope="module")
def on_one_process() -> dict[str, tuple]:
    context = DistributedContext(0, 1, 0, torch.device("cpu"), "python")
    return {name: dropping_step(context, *network, None) for name, network in DROPPING.items()}


@pytest.mark.parametrize(
    ("network", "world_size", "micro_batch"),
    [
        ("fcn8s", 1, 3), ("fcn8s", 2, None), ("fcn8s", 2, 1), ("fcn8s", 4, None), ("fcn8s", 4, 1),
        ("fcn8_kitti", 2, 3), ("fcn8_kitti", 4, None),
        ("two heads", 2, None), ("two heads", 4, None),  # no micro-batches: they would change BatchNorm's statistics
    ],
)  # fmt: skip
def test_dropout_gives_the_same_gradient_on_any_number_of_ranks(
    on_one_process, network: str, world_size: int, micro_batch: int | None
) -> None:
    loss, gradients, masks = on_one_process[network]
    ranks = run_ranks(world_size, dropping_step, *DROPPING[network], micro_batch)
    for found_loss, found_gradients, _ in ranks:
        assert found_loss == pytest.approx(loss, rel=1e-12)
        for found, expected in zip(found_gradients, gradients, strict=True):
            assert np.abs(found - expected).max() <= 1e-12 * max(np.abs(expected).max(), 1e-3)
    for layer, expected in enumerate(masks):
        assert np.array_equal(np.concatenate([found[layer] for _, _, found in ranks]), expected)


@pytest.mark.parametrize("network", DROPPING)
def test_every_image_and_layer_has_a_mask_of_its_own(on_one_process, network: str) -> None:
    _, gradients, masks = on_one_process[network]
    assert len(masks) == 2
    assert all(np.abs(gradient).max() > 0 for gradient in gradients), "every mask matters to some gradient"
    for one, other in itertools.combinations([image for layer in masks for image in layer], 2):
        assert ((one == 0) & (other == 1)).any()
        assert ((one == 1) & (other == 0)).any()


def test_other_keys_give_another_gradient(on_one_process) -> None:
    """Else the test above would pass for a dropout that drops nothing."""
    model = build_model("fcn8s", CLASSES, width=4)
    keys = convert_dropout(model)
    assert isinstance(keys, SampleKeys)
    images = torch.rand(2, 3, 32, 32)
    nn.init.normal_(model.score_fr.weight)
    outputs = []
    for value in ([1, 2], [1, 2], [1, 3]):
        keys.value = torch.tensor(value)
        outputs.append(model(images))
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0][0], outputs[2][0])
    assert not torch.equal(outputs[0][1], outputs[2][1])


# --- copies of rank 0's tensors ------------------------------------------------------------------------------------


def tensors_of(rank: int) -> list[torch.Tensor]:
    """In memory formats that differ between the ranks, too."""
    generator = torch.Generator().manual_seed(rank)
    images = torch.rand(3, 4, 5, 6, generator=generator)
    formats = [torch.channels_last, torch.contiguous_format]
    return [
        images.contiguous(memory_format=torch.channels_last),
        images.double().contiguous(memory_format=formats[rank % 2]),
        images.contiguous(memory_format=formats[1 - rank % 2]),
        torch.rand(4, 3, 1, 1, generator=generator).to(memory_format=torch.channels_last),
        images[:, :2].transpose(2, 3),
        nn.Parameter(images.mean((0, 2, 3))),
        torch.tensor(7 + rank),
    ]


def copy_and_look(context: DistributedContext) -> list[tuple[list, tuple[int, ...], tuple[int, ...]]]:
    tensors = tensors_of(context.rank)
    strides = [tensor.stride() for tensor in tensors]
    distributed.broadcast(tensors)
    return [(tensor.tolist(), before, tensor.stride()) for tensor, before in zip(tensors, strides, strict=True)]


def test_every_rank_gets_rank_0s_values_in_its_own_memory_format() -> None:
    expected = [tensor.tolist() for tensor in tensors_of(0)]
    for rank in run_ranks(3, copy_and_look):
        for (found, before, after), values in zip(rank, expected, strict=True):
            assert found == values
            assert before == after


# --- from the command line -----------------------------------------------------------------------------------------


def linknet_config(tiny, weights: Path, **changes) -> str:
    changes = {"train__precision": "fp32", "train__batch_size": 4, "train__steps": 2, "eval__pictures": 0} | changes
    return tiny(model={"name": "linknet", "weights": str(weights)}, **changes)


@pytest.fixture(scope="module")
def resnet18_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    torch.save(resnet18(weights=None).state_dict(), path)
    return path


def test_run_starts_from_pretrained_weights_and_says_so_once(tiny, tmp_path: Path, resnet18_file: Path) -> None:
    # A rate so small that no weight of normal size can move: what the run saves is what it started from.
    done = run(2, "train_ddp.py", "--config", linknet_config(tiny, resnet18_file, optim__lr=1e-30))
    file = torch.load(resnet18_file, weights_only=True)
    model = load_checkpoint(tmp_path / "run")["model"]
    line = f"weights from {resnet18_file}: {len(file) - 2} of {len(model)} tensors"
    log = (tmp_path / "run/log.txt").read_text()
    assert done.stdout.count(line) == log.count(line) == 1
    assert log.count("in the file, not in the network: fc.weight (1000, 512), fc.bias (1000,)") == 1
    kernels = [key for key, tensor in file.items() if tensor.ndim == 4]
    assert len(kernels) == 20
    for key in kernels:
        assert torch.equal(model[f"encoder.{key}"], file[key]), key


def test_broken_weights_end_every_rank_with_one_line(tiny, tmp_path: Path, resnet18_file: Path) -> None:
    weights = tmp_path / "weights.pth"
    state = torch.load(resnet18_file, weights_only=True)
    del state["layer2.0.conv1.weight"]
    torch.save(state, weights)
    with started(2, "train_ddp.py", "--config", linknet_config(tiny, weights), stderr=subprocess.PIPE) as process:
        _, errors = process.communicate(timeout=TIMEOUT_S)
        assert not process.family(), "nobody is left"
    (complaint,) = complaints(errors)
    assert f"model.weights: {weights}: " in complaint
    assert "missing: encoder.layer2.0.conv1.weight (128, 64, 3, 3)" in complaint
    assert errors.count("Traceback") == 1, "torchrun's own"
    assert "exitcode  : 2 " in errors, "torchrun reports the ranks' own status"
    assert not list((tmp_path / "run").glob("checkpoints/*")), "nothing was trained"


TEN_LINES = """\
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes, width=1):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.Dropout(0.5))
        self.head = nn.Conv2d(width, num_classes, 1)
    def forward(self, images):
        return {"out": self.head(self.body(images) + torch.rand(1, device=images.device))}
"""


def test_ten_lines_of_ones_own_train_and_resume_to_the_same_bytes(tiny, tmp_path: Path) -> None:
    """From weights of its own, which are gone by the time of the resume: a run that resumes does not read them."""
    (tmp_path / "mine.py").write_text(TEN_LINES)
    scope: dict = {}
    exec(TEN_LINES, scope)
    weights = tmp_path / "weights.pt"
    torch.save(scope["Net"](7, width=5).state_dict(), weights)

    def train(run_dir: Path) -> str:
        config = tiny(
            run_dir=str(run_dir), train__steps=6, eval__pictures=0,
            model={"name": "mine:Net", "weights": str(weights), "options": {"width": 5}},
        )  # fmt: skip
        done = subprocess.run(  # in the user's folder, where mine.py is
            command(2, str(CHECKOUT / "train_ddp.py"), "--config", config),
            cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=TIMEOUT_S,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    said = train(tmp_path / "whole")
    assert said.count("note: mine:Net: it draws random numbers other than by nn.Dropout") == 1
    assert said.count(f"weights from {weights}: 9 of 9 tensors") == 1
    weights.unlink()
    for file in ("step_00000004.pt", "step_00000004.pt.sha256"):  # what a run that died after step 4 leaves
        (tmp_path / "parts/checkpoints").mkdir(parents=True, exist_ok=True)
        shutil.copy(tmp_path / "whole/checkpoints" / file, tmp_path / "parts/checkpoints")
    said = train(tmp_path / "parts")
    assert "resuming at step 4/6" in said
    assert "weights from" not in said
    whole, parts = (load_checkpoint(tmp_path / name) for name in ("whole", "parts"))
    assert whole["step"] == parts["step"] == 6
    for key, tensor in whole["model"].items():
        assert torch.equal(tensor, parts["model"][key]), key
    momenta = [[state["momentum_buffer"] for state in run["optimizer"]["state"].values()] for run in (whole, parts)]
    assert momenta[0]
    assert all(torch.equal(one, other) for one, other in zip(*momenta, strict=True))
