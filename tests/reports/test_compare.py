"""Runs side by side, from their folders."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from fcn.errors import InputError
from fcn.reports import compare_runs


def write_run(folder: Path, lr: float, miou: float | None, finished: bool = True) -> Path:
    folder.mkdir(parents=True)
    config = {"run_dir": str(folder), "seed": 0, "optim": {"lr": lr, "name": "sgd"}, "data": {"crop": None}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    lines = [
        {
            "event": "train",
            "step": step,
            "steps": 40,
            "loss": 1 / step,
            "images_per_s": 10.0 * step,
            "lr": lr,
            "step_s": 90.0,
        }
        for step in (10, 20, 30)
    ]
    if miou is not None:
        scores = {"miou": miou, "pixel_acc": 0.5, "mean_acc": 0.25, "fw_iou": 0.125, "iou": {"sky": miou, "car": None}}
        lines += [{"event": "eval", "step": 30, "split": "val", "images": 7, "protocol": "native", **scores}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"event": "tr')
    if finished:
        summary = {"status": "finished", "step": 30, "steps": 40, "best": {"miou": miou, "step": 30}}
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def rows(text: str) -> dict[str, list[str]]:
    """First cell → the others; cells are two spaces or more apart."""
    lines = [re.split(r"\s{2,}", line.strip()) for line in text.splitlines()]
    return {line[0]: line[1:] for line in lines}


def test_differences_and_scores_stand_side_by_side(tmp_path):
    one, other = write_run(tmp_path / "a", 0.1, 0.75), write_run(tmp_path / "b", 0.2, None, finished=False)
    table = rows(compare_runs([one, other]))
    assert table["a"] == ["b"]
    assert table["optim.lr"] == ["0.1", "0.2"]
    assert not {"seed", "run_dir", "optim.name", "data.crop"} & table.keys(), "what is equal is left out"
    assert table["status"] == ["finished", "running or dead"]
    assert table["step"] == ["30/40", "30/40"]
    assert table["images/s, median"] == ["200.0", "200.0"]
    assert table["training time"] == ["45:00", "45:00"]
    assert table["mIoU"] == ["0.7500", "-"]
    assert table["IoU car"] == ["absent", "-"]
    assert table["best"] == ["mIoU 0.7500 at 30", "-"]


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path):
    runs = [write_run(tmp_path / name / "run", 0.1, 0.5) for name in ("x", "y")]
    table = rows(compare_runs(runs))
    assert table["x/run"] == ["y/run"]
    assert "no key of the config differs" in table


def test_a_key_that_only_one_config_has_is_a_difference(tmp_path):
    one, other = (write_run(tmp_path / name, 0.1, 0.5) for name in "ab")
    config = yaml.safe_load((one / "config.yaml").read_text())
    (one / "config.yaml").write_text(yaml.safe_dump({**config, "model": {"width": 4}}))
    assert rows(compare_runs([one, other]))["model.width"] == ["4", "null"]


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda run: (run / "config.yaml").unlink(), r"no run is there \(no config.yaml\)"),
        (lambda run: (run / "config.yaml").write_text("a: [1"), "config.yaml: cannot be read"),
        (lambda run: (run / "config.yaml").write_text("text"), "config.yaml: cannot be read"),
    ],
)
def test_a_folder_that_is_no_run_is_named(tmp_path, break_it, message):
    run = write_run(tmp_path / "a", 0.1, 0.5)
    break_it(run)
    with pytest.raises(InputError, match=message):
        compare_runs([run])
