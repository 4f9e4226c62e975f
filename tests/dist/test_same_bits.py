"""With `train.shards`, the number of processes changes no bit of a run. The measurements are those of the benchmark."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest
import torch

from benchmarks.same_bits import NETWORKS, SHARDS, fingerprints, train
from fcn.checkpoints import load_checkpoint, save_checkpoint
from tests.dist.ranks import complaints, run

STEPS = 6
"""`python -m benchmarks.same_bits` takes a hundred."""


def campaign(*values):
    return pytest.param(*values, marks=pytest.mark.campaign)


@pytest.fixture(scope="module")
def alone(shapes_root: Path, tmp_path_factory: pytest.TempPathFactory):
    """`alone(network, precision, *overrides)`: fingerprints of that run on one process."""
    known: dict[tuple[str, ...], dict[str, str]] = {}

    def fingerprints_of(network: str, precision: str, *overrides: str) -> dict[str, str]:
        case = (network, precision, *overrides)
        if case not in known:
            folder = tmp_path_factory.mktemp("alone")
            known[case] = train(folder, shapes_root, precision, STEPS, [1], [*NETWORKS[network], *overrides])
        return known[case]

    return fingerprints_of


@pytest.mark.parametrize(
    ("network", "precision", "processes"),
    [
        ("linknet", "bf16", [2]),
        ("fcn8s", "bf16", [4]),
        campaign("unet", "fp32", [2]),
        campaign("unet", "fp32", [3]),
        campaign("unet", "bf16", [8]),
        campaign("unet", "fp64", [3]),
        campaign("linknet", "fp32", [2]),
        campaign("linknet", "fp32", [8]),
        campaign("fcn8s", "fp32", [5]),
        campaign("fcn_resnet18", "fp32", [3]),
        campaign("fcn_resnet18", "bf16", [7]),
    ],
)
def test_runs_end_with_the_same_bytes(alone, shapes_root, tmp_path, network, precision, processes):
    """Crop, flip, jitter, clipping, warm-up, the average of the weights, sync-BN and dropout all take part."""
    assert train(tmp_path, shapes_root, precision, STEPS, processes, NETWORKS[network]) == alone(network, precision)


OTHER_WAYS = {
    "accumulated": ["train.micro_batch=2"],
    "statistics of each shard": ["train.sync_bn=false"],
    "statistics of each shard, accumulated": ["train.sync_bn=false", "train.micro_batch=2"],
    "gradients in bf16": ["train.gradient_compression=bf16"],
    "whole images": ["data.crop=null"],
    "two images a shard": [f"train.shards={SHARDS // 2}"],
    "odd sizes": ["data.crop=[49,53]", "model.width=6"],
    "two losses": ["loss.add={dice: 0.5}", "loss.label_smoothing=0.1"],
}


@pytest.mark.parametrize(
    ("precision", "way", "processes"),
    [
        ("fp32", "odd sizes", [3]),
        ("bf16", "statistics of each shard, accumulated", [3]),
        ("fp16", "gradients in bf16", [3]),
        *(campaign("fp32", way, [3]) for way in OTHER_WAYS),
        campaign("fp16", "two losses", [5]),
    ],
)
def test_every_way_of_training_keeps_the_bits(alone, shapes_root, tmp_path, precision, way, processes):
    overrides = OTHER_WAYS[way]
    expected = alone("unet", precision, *overrides)
    assert train(tmp_path, shapes_root, precision, STEPS, processes, overrides) == expected


def test_accumulation_changes_no_bit(alone):
    """Without synchronised BatchNorm, whose statistics need the whole share of a process at once."""
    assert alone("fcn8s", "bf16", "train.micro_batch=2") == alone("fcn8s", "bf16")


@pytest.mark.parametrize(
    ("processes", "steps"), [([4, 2, 3], 18), pytest.param([4, 2, 3, 8], 60, marks=pytest.mark.campaign)]
)
def test_killed_and_continued_on_other_numbers_of_processes(shapes_root, tmp_path, processes, steps):
    """In shards of two images, of which four processes have two or one."""
    overrides = OTHER_WAYS["two images a shard"]
    expected = train(tmp_path / "alone", shapes_root, "fp32", steps, [1], overrides)
    assert train(tmp_path / "killed", shapes_root, "fp32", steps, processes, overrides) == expected


def test_on_real_images(camvid_root: Path, tmp_path: Path):
    overrides = ["data.name=camvid", "data.crop=[90,120]", "data.scale=[0.25,0.5]"]
    overrides += ["eval.preset=center_crop", "eval.crop=[64,64]"]
    one, two = (train(tmp_path / str(size), camvid_root, "fp32", 3, [size], overrides) for size in (1, 2))
    assert one == two


def test_more_processes_than_shards_are_refused(tiny):
    done = run(3, "train_ddp.py", "--config", tiny(train__shards=2), status=1)
    assert "train.shards: found 2 for 3 processes; accepted: 3, 4, 6, 12; or start at most 2 processes" in done.stderr


NETWORK = """
    import torch
    from torch import nn

    class Mixing(nn.Module):
        def __init__(self, num_classes):
            super().__init__()
            self.conv = nn.Conv2d(3, num_classes, 1)

        def forward(self, images):
            return self.conv(images - images.mean())
"""


def test_a_network_that_mixes_images_is_refused_on_every_rank(tiny, tmp_path, monkeypatch):
    (tmp_path / "mixing.py").write_text(textwrap.dedent(NETWORK))
    monkeypatch.setattr("tests.dist.ranks.IMPORTS", (str(tmp_path),))
    config = tiny(model={"name": "mixing:Mixing"}, train__shards=4, train__precision="fp32")
    done = run(2, "train_ddp.py", "--config", config, status=1)
    lines = complaints(done.stderr)
    assert len(lines) == 1
    assert "the network itself (Mixing) computes different bits for a sample" in lines[0]
    assert "Traceback" not in done.stdout
    run(2, "train_ddp.py", "--config", config, "train.shards=null")  # which trains it, as before


SUBCLASS = """
    from torch import nn

    class Own(nn.BatchNorm2d):
        pass

    def build(num_classes, norm):
        norm = {"Own": Own, "SyncBatchNorm": nn.SyncBatchNorm}[norm]
        return nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), norm(6), nn.ReLU(), nn.Conv2d(6, num_classes, 1))
"""


@pytest.mark.parametrize("norm", ["Own", "SyncBatchNorm"])
def test_other_batch_norms(tiny, tmp_path, monkeypatch, norm):
    """Each rank of a subclass has statistics of its own; the scores are those of the saved ones."""
    (tmp_path / "subclass.py").write_text(textwrap.dedent(SUBCLASS))
    monkeypatch.setattr("tests.dist.ranks.IMPORTS", (str(tmp_path),))
    found = []
    for size in (1, 3):
        model = {"name": "subclass:build", "options": {"norm": norm}}
        changes = {"model": model, "train__shards": 4, "train__precision": "fp32", "train__ema": 0.9}
        run(size, "train_ddp.py", "--config", tiny(run_dir=str(tmp_path / str(size)), **changes))
        found.append(fingerprints(tmp_path / str(size)))
    assert found[0] == found[1]


def test_a_resumed_run_keeps_its_number_of_shards(tiny, tmp_path):
    run(1, "train_ddp.py", "--config", tiny(train__shards=4))
    done = run(1, "train_ddp.py", "--config", tiny(train__shards=6), status=2)
    assert "train.shards" in done.stderr
    assert load_checkpoint(tmp_path / "run")["config"]["train"]["shards"] == 4


def test_fingerprints_see_one_bit(tiny, tmp_path):
    run(1, "train_ddp.py", "--config", tiny(train__shards=4, train__ema=0.9))
    before = fingerprints(tmp_path / "run")
    (path,) = (tmp_path / "run" / "checkpoints").glob("step_*10.pt")
    state = torch.load(path, weights_only=True)
    weight = next(value for value in state["ema"].values() if value.ndim == 1)
    weight[:1].view(torch.int64).bitwise_xor_(1)
    save_checkpoint(path, state)
    after = fingerprints(tmp_path / "run")
    assert {kind for kind in before if before[kind] != after[kind]} == {"average"}
