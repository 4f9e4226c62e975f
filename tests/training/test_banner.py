"""What a run says before its first step and after its last one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fcn.config import load_config
from fcn.data import build_dataset
from fcn.distributed import DistributedContext
from fcn.training import Run, build_run, end_banner
from fcn.training.banner import describe

ROOT = Path(__file__).parents[2]


def run_of(shapes_root: Path, folder: Path, world_size: int, *overrides: str) -> Run:
    """The run of one of several ranks, on 24 training and 10 validation images."""
    words = [f"data.root={shapes_root}", f"run_dir={folder}", *overrides]
    config = load_config(ROOT / "configs" / "quickstart.yaml", words, world_size)
    splits = {name: build_dataset(config.data, name) for name in ("train", "val")}
    return build_run(config, DistributedContext(0, 1, 0, torch.device("cpu"), "torchrun"), splits)[0]


def lines(run: Run, hosts: list[str], world_size: int) -> dict[str, str]:
    """Title → text."""
    run.context = DistributedContext(0, world_size, 0, torch.device("cpu"), "torchrun")
    return describe(run, hosts)


def test_the_screen_fits_a_terminal_of_80_columns(shapes_root: Path, tmp_path: Path, monkeypatch) -> None:
    run = run_of(shapes_root, Path("runs/quickstart"), 2)
    run.config.data.root = "data/shapes"
    assert max(8 + len(text) for text in describe(run, ["a"]).values()) <= 79


def test_what_runs_where(shapes_root: Path, tmp_path: Path) -> None:
    run = run_of(
        shapes_root, tmp_path, 3, "train.uneven=true", "train.batch_size=16", "train.micro_batch=4", "train.ema=0.9",
        "train.steps=30", "train.grad_clip=1.0", "loss.add={dice: 0.5}", "model.norm=none",
    )  # fmt: skip
    found = lines(run, ["a", "b", "a"], 3)
    parameters = sum(parameter.numel() for parameter in run.state.model.parameters())
    assert found["model"].startswith(f"unet, {parameters:,} parameters")
    assert found["on"].startswith("3 x CPU on 2 machines (torchrun")
    assert found["on"].endswith("fp32, channels last, sync-BN, EMA 0.9")
    assert found["data"] == f"shapes from {shapes_root}, 7 classes"
    assert found["images"] == "train 24, val 10; crop 96x96, scale 0.8 to 1.25, flip 0.5"
    assert found["batch"] == "global batch 16 = 3 processes x 5 or 6 images, 4 a pass; 1 loader each"
    assert found["optim"] == "adamw, lr 0.003, cosine, warm-up 20; loss cross_entropy + 0.5 dice"
    assert found["steps"] == "30 = 20.0 epochs; scored every 200, saved every 100"
    assert found["run"] == f"{tmp_path}, no checkpoint, from the beginning"
    run.state.step = 7
    assert lines(run, ["a"], 3)["run"] == f"{tmp_path}, from step 7"


def test_shards(shapes_root: Path, tmp_path: Path) -> None:
    run = run_of(shapes_root, tmp_path, 1, "train.batch_size=12", "train.shards=6")
    assert lines(run, ["a"], 4)["batch"].startswith(
        "global batch 12 = 4 processes x 2 or 4 images; 6 shards of 2 images"
    )


def test_whole_images_without_a_resize(shapes_root: Path, tmp_path: Path) -> None:
    run = run_of(shapes_root, tmp_path, 1, "data.crop=null", "data.scale=null")
    assert lines(run, ["a"], 1)["images"] == "train 24, val 10; whole, flip 0.5"


@pytest.mark.parametrize("pictures", [0, 2])
def test_what_to_type_next(shapes_root: Path, tmp_path: Path, pictures: int) -> None:
    run = run_of(shapes_root, tmp_path, 1, f"eval.pictures={pictures}")
    run.best = {"miou": 0.5, "step": 20}
    first, *rest = end_banner(run, {"miou": 0.25, "split": "val", "images": 10}).splitlines()
    assert first == "finished: mIoU 0.2500 on val (10 images); best mIoU on val 0.5000 at step 20"
    best = tmp_path / "checkpoints" / "best.pt"
    assert f"python -m fcn evaluate --checkpoint {best}" in rest[1]
    assert ("report.html" in rest[0]) == bool(pictures)
    assert ("python -m fcn report" in rest[0]) == (not pictures)
    assert "absent" in end_banner(run, {"miou": None, "split": "val", "images": 10})
