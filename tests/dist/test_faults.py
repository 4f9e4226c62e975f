"""Steps that go wrong on one rank: every rank decides the same, and nobody waits for ever."""

from __future__ import annotations

import json
import shutil
import textwrap
from pathlib import Path

import pytest
import torch

from tests.cli import train
from fcn.checkpoints import load_checkpoint
from fcn.data.shapes import write_shapes
from fcn.distributed import DistributedContext
from tests.dist.ranks import complaints, run, run_ranks
from tests.dist.test_run import largest_difference, records

NETWORK = """
    import os
    import torch
    from torch import nn

    class Faulty(nn.Module):
        '''NaN or infinite logits in chosen training steps, on the last rank alone.'''

        def __init__(self, num_classes, bad, value):
            super().__init__()
            self.layers = nn.Sequential(
                nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, num_classes, 1)
            )
            self.bad, self.value = bad, float(value)
            self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

        def forward(self, images):
            if self.training:
                self.calls += 1
                last = int(os.environ.get("RANK", 0)) == int(os.environ.get("WORLD_SIZE", 1)) - 1
                if last and int(self.calls) in self.bad:
                    return self.layers(images * self.value)
            return self.layers(images)

    def build(num_classes, bad, value):
        return Faulty(num_classes, bad, value)
"""


@pytest.fixture
def faulty(tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`faulty(bad, value, **changes)`: the config of a run whose last rank sees `value` in the steps `bad`."""
    folder = tmp_path / "modules"
    folder.mkdir()
    (folder / "faulty_network.py").write_text(textwrap.dedent(NETWORK))
    monkeypatch.setattr("tests.dist.ranks.IMPORTS", (str(folder),))

    def write(bad: list[int], value: str = "nan", **changes) -> str:
        model = {"name": "faulty_network:build", "options": {"bad": bad, "value": value}}
        return tiny(**({"model": model, "train__steps": 8, "eval__every": 8} | changes))

    return write


@pytest.mark.parametrize(
    ("value", "precision"), [("nan", "fp64"), pytest.param("inf", "bf16", marks=pytest.mark.campaign)]
)
def test_a_bad_step_of_one_rank_is_skipped_by_all(faulty, tmp_path: Path, value: str, precision: str) -> None:
    states = []
    for processes in (1, 3):
        folder = tmp_path / f"run{processes}"
        run(
            processes,
            "train_ddp.py",
            "--config",
            faulty([3, 4], value, run_dir=str(folder), train__precision=precision),
        )
        lines = records(folder, "train")
        assert [line["step"] for line in lines] == list(range(1, 9))
        assert [line["step"] for line in lines if line["loss"] is None or line["grad_norm"] is None] == [3, 4]
        assert [line["skipped"] for line in lines] == [0, 0, 1, 2, 2, 2, 2, 2]
        states.append(load_checkpoint(folder))
        assert all(torch.isfinite(tensor).all() for tensor in states[-1]["model"].values())
    if precision == "fp64":
        assert largest_difference(*states) <= 1e-9, "which steps are skipped does not depend on the world size"


def test_a_skipped_step_changes_no_weight_statistic_or_momentum(faulty, tmp_path: Path) -> None:
    """Steps 1 to 4 are bad: what is there after step 4 is what the seed made."""
    run(
        2, "train_ddp.py", "--config", faulty([1, 2, 3, 4], train__max_nonfinite=4, train__steps=4, checkpoint__every=9)
    )
    end = load_checkpoint(tmp_path / "run")
    run(2, "train_ddp.py", "--config", faulty([], run_dir=str(tmp_path / "one"), train__steps=1, optim__lr=1e-30))
    start = load_checkpoint(tmp_path / "one")
    weights = [key for key in start["model"] if "running" not in key and key != "calls" and "num_batches" not in key]
    for key in weights:  # a rate of 1e-30 moves what starts at 0 by less than this
        assert (end["model"][key] - start["model"][key]).abs().max() <= 1e-25
    assert torch.equal(end["model"]["layers.1.running_mean"], torch.zeros(4, dtype=torch.float64))
    assert not any(state["momentum_buffer"].any() for state in end["optimizer"]["state"].values())


@pytest.mark.parametrize("log_every", [pytest.param(1, marks=pytest.mark.campaign), 20])
def test_too_many_in_a_row_end_every_rank_with_one_message(faulty, tmp_path: Path, log_every: int) -> None:
    config = faulty([5, 6, 7, 8, 9, 10, 11, 12], train__steps=20, train__max_nonfinite=2, train__log_every=log_every)
    done = run(2, "train_ddp.py", "--config", config, status=None)
    assert done.returncode != 0
    (line,) = complaints(done.stderr)
    assert "step 7: the loss or the gradient was not finite, 3 times in a row" in line
    assert "step_00000004.pt" in line
    assert line.count("0000") >= 12, "the images of the step are named"
    assert done.stderr.count("Traceback") == 1, "torchrun's own"
    assert load_checkpoint(tmp_path / "run")["step"] == 4
    assert (tmp_path / "run" / "log.txt").read_text().splitlines()[-1].endswith(f"error: {line}"), "the log ends with it, too"
    assert [record["text"] for record in records(tmp_path / "run", "failure")] == [line]


def test_a_rank_without_valid_pixels_and_a_step_without_any(tiny, tmp_path: Path) -> None:
    """Six images of eight are ignored entirely, and two of the four ranks have no image at all.

    One part of the loss is divided by weighed pixels, the other by images.
    """
    from PIL import Image

    root = tmp_path / "shapes"
    write_shapes(root, train=8, val=4)
    names = (root / "ImageSets/Segmentation/train.txt").read_text().split()
    for name in names[:6]:
        path = root / "SegmentationClass" / f"{name}.png"
        with Image.open(path) as mask:
            blank = Image.new("P", mask.size, 255)
            blank.putpalette(mask.getpalette())
        blank.save(path)
    results = []
    for processes in (1, 4):
        folder = tmp_path / f"run{processes}"
        loss = {"loss__weights": [0.5, 1, 2, 1, 0, 3, 1], "loss__add": {"dice": 0.5}}
        config = tiny(data__root=str(root), run_dir=str(folder), train__batch_size=2, train__uneven=True, **loss)
        run(processes, "train_ddp.py", "--config", config)
        results.append(([line["loss"] for line in records(folder, "train")], load_checkpoint(folder)))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-9, abs=1e-12)
    assert 0.0 in results[0][0], "a step without a valid pixel has loss 0"
    assert largest_difference(results[0][1], results[1][1]) <= 1e-9


def train_in_process(context: DistributedContext, arguments: list[str]) -> int:
    return train(arguments, context)


def test_broken_images_are_replaced_alike_on_any_number_of_processes(tiny, shapes_root: Path, tmp_path: Path) -> None:
    """Whole images of mixed size, two of them cut off in the middle of the file, two epochs."""
    root = shutil.copytree(shapes_root, tmp_path / "shapes")
    names = (root / "ImageSets/Segmentation/train.txt").read_text().split()
    for path in (root / f"JPEGImages/{names[4]}.jpg", root / f"SegmentationClass/{names[17]}.png"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    ends, reports = [], []
    for processes in (1, 3):
        folder = tmp_path / f"run{processes}"
        changes = {"data__on_error": "skip", "data__crop": None, "train__steps": 4, "eval__every": 4}
        changes |= {"train__batch_size": 15, "train__steps": 4}  # epochs of 24 images end within a step
        config = tiny(run_dir=str(folder), data__root=str(root), **changes)
        assert run_ranks(processes, train_in_process, ["--config", config]) == [0] * processes
        reports.append(records(folder, "replaced"))
        ends.append(load_checkpoint(folder))
        log = (folder / "log.txt").read_text()
        assert log.count("broken images were replaced by others") == 2
        assert log.count(f"warning: {root}/JPEGImages/{names[4]}.jpg: broken image") == 2
    assert reports[0] == reports[1]
    assert [(line["step"], line["epoch"]) for line in reports[0]] == [(2, 1), (4, 2)]
    one, other = (torch.cat([tensor.flatten().double() for tensor in end["model"].values()]) for end in ends)
    assert (one - other).norm() <= 1e-9 * one.norm()


def test_what_the_line_of_a_skipped_step_says(faulty, tmp_path: Path) -> None:
    done = run(1, "train_ddp.py", "--config", faulty([3]))
    assert "step 3/8" in done.stdout
    assert "loss not finite" in done.stdout
    for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
