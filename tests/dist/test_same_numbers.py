"""The world size decides how fast a run is, not what it computes. The measurements are those of the benchmark."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path

import pytest
import torch

from benchmarks.same_numbers import (
    CLASSES,
    NETWORKS,
    confusion_matrices,
    end_of_run,
    gradient_table,
    largest_difference,
    make_network,
    make_step,
    run_config,
    spread,
    train,
)
from fcn import distributed
from fcn.checkpoints import load_checkpoint
from fcn.config import Loss
from fcn.config.keys import AddedLosses
from fcn.distributed import DistributedContext
from fcn.models import Precision
from fcn.training import losses
from fcn.training import TrainingState, build_loss, train_step
from tests.dist.ranks import run, run_ranks, started, wait_for_line
from tests.dist.test_run import assert_same_tensors

WITHOUT_NORM = {"fcn32s", "fcn16s", "fcn8s", "fcn8s same", "fcn8_kitti", "unet without norm"}
FAMILIES = ["fcn8s", "fcn_resnet50", "unet", "unet without norm", "linknet"]
"""One network of each; the others are made of the same parts."""


@pytest.mark.parametrize(
    ("processes", "accumulated", "networks"),
    [
        pytest.param((5,), (3,), FAMILIES, id="families"),
        pytest.param((2, 3, 4, 5), (1, 3), list(NETWORKS), id="all", marks=pytest.mark.campaign),
    ],
)
def test_gradient_of_networks_is_the_same_and_that_of_plain_pytorch(processes, accumulated, networks) -> None:
    """Global batch 12 with very unequal ignore areas, one image ignored entirely; with and without accumulation.

    Five processes hold two or three of the twelve images.
    """
    table = gradient_table(processes, accumulated, networks)
    assert set(table) == set(networks)
    values = {label: [value for value in entries.values() if value is not None] for label, entries in table.items()}
    assert {label: found for label, found in values.items() if not all(value <= 1e-12 for value in found)} == {}
    assert all(any(value > 0 for value in found) for found in values.values()), "rounding must show"
    plain = {label for label, entries in table.items() if entries["accumulated"] is not None}
    assert plain == set(networks) & WITHOUT_NORM


LOSSES = {
    **{name: Loss(name=name) for name in losses.LOSSES},
    "weights, smoothing, sum": Loss(
        name="ohem", add=AddedLosses(dice=0.5, lovasz=2.0, focal=1.0), weights=(1, 0.5, 0, 2, 3), label_smoothing=0.1
    ),
}


def loss_gradients(context: DistributedContext, micro_batch: int | None) -> dict[str, list[torch.Tensor]]:
    """Label → [loss, gradient of each parameter] of one step on this rank's share of a fixed global batch."""
    found = {}
    for label, config in LOSSES.items():
        model = make_network("unet", {"width": 4, "norm": "none"})
        state = TrainingState(
            model=model, network=distributed.data_parallel(model, context, sync_bn=True),
            optimizer=torch.optim.SGD(model.parameters(), lr=0.0), criterion=build_loss(config, CLASSES),
            precision=Precision("fp64", False, context.device), context=context, micro_batch=micro_batch,
        )  # fmt: skip
        tensors = [
            state.step_loss(train_step(state, make_step(context)).losses),
            *(parameter.grad for parameter in model.parameters()),
        ]
        found[label] = [tensor.numpy() for tensor in tensors]
    return found


def test_gradient_of_every_loss_is_the_same() -> None:
    """One image is ignored entirely, one but for a pixel, and the others by very unequal parts."""
    alone = loss_gradients(DistributedContext(0, 1, 0, torch.device("cpu"), "python"), None)
    for processes, micro_batch in ((1, 5), (2, None), (3, 2)):
        found = run_ranks(processes, loss_gradients, micro_batch)[-1]
        for label, arrays in found.items():
            tensors, expected = ([torch.from_numpy(array) for array in side] for side in (arrays, alone[label]))
            assert largest_difference(tensors, expected) <= 1e-12, (label, processes)


STEPS = 40
"""`python -m benchmarks.same_numbers` takes a hundred."""
OTHERS = ((2, 2), (3, 2), (4, 2), (1, 0), (2, 0), (3, 0))


@pytest.fixture(scope="module")
def alone(shapes_root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    """The end of a run in float64 on one process, with a worker."""
    return train(1, shapes_root, "fp64", STEPS, 1, tmp_path_factory.mktemp("alone") / "1")


@pytest.mark.parametrize(
    ("processes", "workers"),
    [(4, 0), *(pytest.param(*case, marks=pytest.mark.campaign) for case in OTHERS)],
)
def test_many_steps_end_with_the_same_weights(alone, shapes_root, tmp_path, processes: int, workers: int) -> None:
    """Crop, flip, jitter, sync-BN, clipping and the average of the weights all take part."""
    end = train(processes, shapes_root, "fp64", STEPS, workers, tmp_path / "run")
    assert len(end["loss"]) == STEPS
    assert all(value <= 1e-9 for value in spread(end, alone).values())


def test_interrupted_on_four_continued_on_one_and_three(alone, shapes_root: Path, tmp_path: Path) -> None:
    config = run_config(tmp_path, shapes_root, "fp64", STEPS, 1)
    for processes, interrupt_at in ((4, 12), (1, 26)):
        with started(processes, "train_ddp.py", "--config", config) as process:
            wait_for_line(process, f"step {interrupt_at}/{STEPS}")
            process.kill_all()
        assert load_checkpoint(tmp_path / "run")["step"] < STEPS
    run(3, "train_ddp.py", "--config", config)
    end = end_of_run(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["event"] == "train"] == list(range(1, STEPS + 1))
    assert all(value <= 1e-9 for value in spread(end, alone).values())


@pytest.mark.parametrize(
    ("images", "cases"),
    [
        pytest.param(40, ((1, (4,)), (3, (9,)), (7, ())), id="some"),
        pytest.param(None, [(n, (1, 4, 9)) for n in (1, 2, 3, 4, 7)], id="all", marks=pytest.mark.campaign),
    ],
)
def test_confusion_matrices_are_equal_integers(camvid_root: Path, voc_root: Path, images: int | None, cases) -> None:
    """Number of processes → batch sizes on CamVid, on so many of its images; the small splits see all sizes."""
    voc = str(voc_root)
    large = {"CamVid test": ("camvid", str(camvid_root), "test", images)}
    small = {"VOC val": ("voc", voc, "val", None), "5 images": ("voc", voc, "val", 5)}
    found: dict[str, set[str]] = {}
    scored: dict[str, set[int]] = {}
    for processes, batches in cases:
        for splits, sizes in ((large, batches), (small, (1, 4, 9))):
            results = run_ranks(processes, confusion_matrices, splits, sizes)[0] if sizes else {}
            for label, (matrix, count) in results.items():
                split = label.partition(",")[0]
                found.setdefault(split, set()).add(json.dumps(matrix))
                scored.setdefault(split, set()).add(count)
    assert scored == {"CamVid test": {images or 233}, "VOC val": {61}, "5 images": {5}}
    assert {split: len(matrices) for split, matrices in found.items()} == dict.fromkeys(found, 1)
    for matrices in found.values():
        (matrix,) = map(json.loads, matrices)
        assert sum(any(column) for column in zip(*matrix)) >= 3, "several classes are predicted"


NETWORK = """
    import torch
    from torch import nn

    class Putting(nn.Conv2d):
        def forward(self, images):
            logits = super().forward(images)
            mark = torch.zeros(4).put_(torch.tensor([1]), torch.ones(1))
            return logits + mark[1]

    def build(num_classes):
        return Putting(3, num_classes, 1)
"""


def test_deterministic_runs_repeat_bit_for_bit_and_name_what_could_not(tiny, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "putting.py").write_text(textwrap.dedent(NETWORK))
    monkeypatch.setattr("tests.dist.ranks.IMPORTS", (str(tmp_path),))
    states = []
    for name in ("one", "other"):
        changes = {"model": {"name": "putting:build"}, "train__precision": "fp32"}
        config = tiny(run_dir=str(tmp_path / name), train__deterministic=True, **changes)
        done = run(2, "train_ddp.py", "--config", config)
        assert done.stdout.count("no deterministic kernel for put_") == 1
        states.append(load_checkpoint(tmp_path / name))
    assert_same_tensors(*states)
