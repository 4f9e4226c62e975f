"""Whole runs from the command line: the same numbers on any number of processes, and no step lost."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from PIL import Image

from fcn.checkpoints import list_checkpoints, load_checkpoint
from tests.dist.ranks import run, started, wait_for_line


def train(processes: int, config: str, *overrides: str, status: int = 0) -> subprocess.CompletedProcess[str]:
    return run(processes, "train_ddp.py", "--config", config, *overrides, status=status)


def records(run_dir: Path, event: str) -> list[dict]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == event]


def assert_same_tensors(one: dict, other: dict) -> None:
    """Model, its average, optimizer and guard, bit for bit."""
    assert one["guard"] == other["guard"]
    for kind in ("model", "ema"):
        assert one.get(kind, {}).keys() == other.get(kind, {}).keys()
        for key, value in one.get(kind, {}).items():
            assert torch.equal(value, other[kind][key]), (kind, key)
    states = one["optimizer"]["state"], other["optimizer"]["state"]
    assert states[0].keys() == states[1].keys()
    assert states[0]
    for number, state in states[0].items():
        for key, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(states[1][number][key])), (number, key)


def largest_difference(one: dict, other: dict) -> float:
    """Over all tensors of a model, relative to the tensor's largest entry."""
    differences = []
    for key, value in one["model"].items():
        difference = (value.double() - other["model"][key].double()).abs().max()
        differences.append(difference / value.double().abs().max().clamp_min(1e-12))
    return float(torch.stack(differences).max())  # NaN if any is


def test_a_run_leaves_what_the_design_names(tiny, tmp_path: Path) -> None:
    done = train(2, tiny(data__test="train", train__ema=0.9, checkpoint__every=5, eval__pictures=2))
    folder = tmp_path / "run"
    assert {path.name for path in folder.iterdir()} == {
        "config.yaml", "lock", "metrics.jsonl", "checkpoints", "pictures", "summary.json", "log.txt", "heartbeat",
        "scores_val.json", "scores_train.json", "report.html",
    }  # fmt: skip
    assert [record["step"] for record in records(folder, "train")] == list(range(1, 11))
    assert [(record["step"], record["split"]) for record in records(folder, "eval")] == [
        (5, "val"),
        (10, "val"),
        (10, "train"),
    ]
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["status"], summary["step"], summary["images"], summary["split"]) == ("finished", 10, 24, "train")
    assert summary["miou"] == records(folder, "eval")[-1]["miou"]
    checkpoints = folder / "checkpoints"
    assert [path.name for path in list_checkpoints(checkpoints)] == [f"step_{n:08d}.pt" for n in (5, 10)]
    best = load_checkpoint(checkpoints / "best.pt")
    assert best["step"] == summary["best"]["step"]
    average = load_checkpoint(checkpoints / f"step_{best['step']:08d}.pt")["ema"]
    assert all(torch.equal(best["model"][key], average[key]) for key in average), "what was scored is the average"
    assert {path.name for path in (folder / "pictures").iterdir()} == {
        "val_00000005.png", "val_00000010.png", "train_00000010.png", "val_confusion.png", "train_confusion.png",
        "val_worst.png", "train_worst.png", "curves.png",
    }  # fmt: skip
    assert done.stdout.count("step 7/10") == 1, "one progress line per process group, not per rank"
    again = train(2, tiny(data__test="train", train__ema=0.9, checkpoint__every=5, eval__pictures=2))
    assert "this run is finished" in again.stdout
    assert not records(folder, "train")[10:]


def test_a_split_without_a_labelled_pixel_has_no_score_and_a_later_one_is_the_best(tiny, tmp_path, shapes_root) -> None:
    pytest.importorskip("wandb")
    root, folder = shutil.copytree(shapes_root, tmp_path / "shapes"), tmp_path / "run"
    for name in (root / "ImageSets/Segmentation/val.txt").read_text().split():
        mask = Image.open(root / f"SegmentationClass/{name}.png")
        Image.new("L", mask.size, 255).save(root / f"SegmentationClass/{name}.png")
    changes = {"data__root": str(root), "eval__pictures": 2, "wandb__mode": "offline", "wandb__artifact": True}
    config = tiny(**changes)
    done = train(2, config)
    warning = (
        "warning: split 'val': no pixel of its 10 images is labelled, so there is nothing to score; correct its masks, "
        "data.values or loss.ignore_index, or choose another split"
    )
    assert (done.stdout.count(warning), done.stdout.count("warning:"), done.stderr.count("warning:")) == (1, 1, 0)
    assert "finished: mIoU absent (no labelled pixel) on val (10 images)\n" in done.stdout
    newest = folder / "checkpoints/step_00000010.pt"
    assert f"python -m fcn evaluate --checkpoint {newest}\n" in done.stdout
    assert [record["text"] for record in records(folder, "warning")] == [warning.removeprefix("warning: ")]
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["miou"], summary["best"], load_checkpoint(newest)["best"]) == (None, None, None)
    assert not (folder / "checkpoints/best.pt").exists()
    assert not (folder / "pictures/val_worst.png").exists()
    shown = [run(1, "-m", "fcn", *words).stdout for words in (["status", str(folder)], ["compare", *[str(folder)] * 2])]
    shown.append((folder / "report.html").read_text())
    assert [text.count("absent") > 0 for text in shown] == [True] * 3
    assert not [text for text in shown if "0.0000" in text or re.search(r"[Bb]est(?! mIoU on)\b.*(step|at) \d", text)]
    assert warning in run(1, "-m", "fcn", "evaluate", "--checkpoint", str(newest)).stdout

    done = train(2, config, "data.val=train", "train.steps=15", "eval.pictures=0", "wandb.mode=disabled")
    best = json.loads((folder / "summary.json").read_text())["best"]
    assert best == {"miou": records(folder, "eval")[-1]["miou"], "step": 15}
    assert f"; best mIoU on train {best['miou']:.4f} at step 15\n" in done.stdout
    assert load_checkpoint(folder / "checkpoints/best.pt")["step"] == 15


def test_whole_images_of_mixed_size_give_the_same_numbers(tiny, tmp_path: Path) -> None:
    """Without a crop the padding collate decides the shape, and BatchNorm sees it: ranks must agree on one.

    So they must on which images of similar shape share a step. 24 images of four each: windows of two steps.
    """
    results = []
    for processes in (1, 2):
        folder = tmp_path / f"run{processes}"
        train(processes, tiny(run_dir=str(folder), data__crop=None, data__group=2, train__batch_size=4, train__steps=4))
        results.append(load_checkpoint(folder))
    assert largest_difference(*results) <= 1e-9


@pytest.mark.parametrize(
    "precision", ["fp16", *(pytest.param(name, marks=pytest.mark.campaign) for name in ("fp32", "bf16"))]
)
def test_killed_in_the_middle_of_an_epoch_ends_with_the_same_bytes(tiny, tmp_path: Path, precision: str) -> None:
    # 24 images and a batch of 8: an epoch has three steps, and a checkpoint is due every 4.
    changes = {
        "train__ema": 0.9,
        "train__precision": precision,
        "train__steps": 24,
        "train__batch_size": 8,
        "eval__every": 12,
        "data__workers": 1,
    }
    whole, killed = (tiny(run_dir=str(tmp_path / name), **changes) for name in ("whole", "killed"))
    train(2, whole)
    with started(2, "train_ddp.py", "--config", killed) as process:
        wait_for_line(process, "step 7/24")
        process.kill_all()
    assert 4 <= load_checkpoint(tmp_path / "killed")["step"] < 24
    assert "resuming at step" in train(2, killed).stdout
    assert_same_tensors(load_checkpoint(tmp_path / "whole"), load_checkpoint(tmp_path / "killed"))
    columns = [[(r["step"], r["loss"]) for r in records(tmp_path / name, "train")] for name in ("whole", "killed")]
    assert columns[0] == columns[1], "every step once, with the loss of the uninterrupted run"


SIGNALS = {
    "USR1 to one rank": lambda process: os.kill(process.rank(1), signal.SIGUSR1),
    "TERM to torchrun": lambda process: process.terminate(),
    "TERM to every process of the ranks": lambda process: [
        os.kill(pid, signal.SIGTERM) for pid in process.family() if pid != process.pid
    ],
}


@pytest.fixture(scope="module")
def undisturbed() -> list[Path]:
    """Empty at first; then the folder of the run that all signals' runs must equal."""
    return []


@pytest.mark.parametrize(
    "target",
    [
        "USR1 to one rank",
        "TERM to torchrun",
        pytest.param("TERM to every process of the ranks", marks=pytest.mark.campaign),
    ],
)
def test_a_signal_saves_and_the_run_ends_with_the_same_bytes(tiny, tmp_path: Path, undisturbed, target) -> None:
    changes = {"train__steps": 40, "eval__every": 30, "data__workers": 1}
    whole, stopped = (tiny(run_dir=str(tmp_path / name), **changes) for name in ("whole", "stopped"))
    if not undisturbed:
        train(2, whole)
        undisturbed.append(tmp_path / "whole")
    with started(2, "train_ddp.py", "--config", stopped) as process:
        wait_for_line(process, "step 6/40")
        SIGNALS[target](process)
        wait_for_line(process, "stopped by a signal")
        process.communicate(timeout=60)
        assert not process.family(), "nobody is left"
    summary = json.loads((tmp_path / "stopped" / "summary.json").read_text())
    assert summary["status"] == "preempted"
    assert 6 <= summary["step"] < 40
    train(2, stopped)
    assert_same_tensors(load_checkpoint(undisturbed[0]), load_checkpoint(tmp_path / "stopped"))


def test_preemption_of_one_process_exits_with_75(tiny) -> None:
    with started(1, "train_ddp.py", "--config", tiny(train__steps=200)) as process:
        wait_for_line(process, "step 2/200")
        process.send_signal(signal.SIGTERM)
        wait_for_line(process, "stopped by a signal")
        assert process.wait(60) == 75


def test_a_broken_checkpoint_is_named_and_the_one_before_is_used(tiny, tmp_path: Path) -> None:
    config = tiny()
    train(1, config)
    checkpoints = tmp_path / "run" / "checkpoints"
    before = load_checkpoint(tmp_path / "run")
    newest = checkpoints / "step_00000010.pt"
    newest.write_bytes(newest.read_bytes()[:-100])
    (tmp_path / "run" / "summary.json").unlink()
    again = train(1, config)
    assert "step_00000010.pt: broken checkpoint" in again.stdout
    assert "resuming at step 8/10" in again.stdout
    assert_same_tensors(before, load_checkpoint(tmp_path / "run"))


def test_another_run_in_the_same_folder_is_refused(tiny, tmp_path: Path) -> None:
    train(1, tiny())
    refused = train(1, tiny(seed=1, model__width=3), status=2)
    assert "model.width: 2 → 3; seed: 0 → 1" in refused.stderr
    refused = train(1, tiny(resume="never"), status=2)
    assert "resume=never" in refused.stderr


@pytest.mark.parametrize(
    ("batch_size", "processes"),
    [(5, 2), *(pytest.param(*case, marks=pytest.mark.campaign) for case in ((1, 1), (4, 3)))],
)
def test_evaluation_counts_the_same_integers(trained: Path, tmp_path: Path, batch_size: int, processes: int) -> None:
    output = tmp_path / "scores.json"
    arguments = ("-m", "fcn", "evaluate", "--checkpoint", str(trained), "--json", str(output))
    run(processes, *arguments, f"eval.batch_size={batch_size}")
    found = json.loads(output.read_text())
    assert found["images"] == 10
    assert found["confusion_matrix"] == independent_matrix(trained)


@pytest.fixture(scope="module")
def trained(shapes_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    overrides = (
        f"data.root={shapes_root}",
        f"run_dir={folder}",
        "model.width=2",
        "train.steps=8",
        "wandb.mode=disabled",
    )
    train(1, "configs/quickstart.yaml", *overrides, "data.workers=0")
    return folder


def independent_matrix(run_dir: Path) -> list[list[int]]:
    """Images one by one, with Pillow and numpy alone around the network."""
    import numpy as np
    from PIL import Image

    from fcn.models import build_model

    state = load_checkpoint(run_dir)
    model = build_model("unet", 7, width=2, norm="batch").to(memory_format=torch.channels_last).eval()
    model.load_state_dict(state["model"])
    root = Path(state["config"]["data"]["root"])
    counts = np.zeros((7, 7), np.int64)
    for name in (root / "ImageSets/Segmentation/val.txt").read_text().split():
        pixels = np.asarray(Image.open(root / "JPEGImages" / f"{name}.jpg")).astype(np.float32)
        mean, std = np.float32([0.485, 0.456, 0.406]) * 255, np.float32([0.229, 0.224, 0.225]) * 255
        with torch.no_grad():
            logits = model(torch.from_numpy((pixels - mean) / std).permute(2, 0, 1)[None])
        predictions = logits[0].numpy().argmax(0)
        labels = np.asarray(Image.open(root / "SegmentationClass" / f"{name}.png"))
        np.add.at(counts, (labels[labels != 255], predictions[labels != 255]), 1)
    return counts.tolist()
