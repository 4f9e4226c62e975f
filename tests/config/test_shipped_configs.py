"""Every file in configs/ trains: two steps on a miniature of its data set, made in the public layout."""

import json
from pathlib import Path

import pytest
import yaml

from fcn.checkpoints import load_checkpoint
from tests import miniatures
from tests.cli import train

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
NARROW = {"fcn32s", "fcn16s", "fcn8s", "fcn8_kitti", "unet"}
"""Networks whose width is an option: at full width the VGGs have 134 million parameters."""


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_two_steps(path, tmp_path, shapes_root):
    config = yaml.safe_load(path.read_text())
    name, model = config["data"]["name"], config["model"]["name"]
    root = tmp_path / "data"
    if name == "shapes":
        root = shapes_root
    else:
        miniatures.MAKERS[name](root)
    run_dir = tmp_path / "run"
    overrides = {
        "run_dir": run_dir, "data.root": root, "data.workers": 0, "data.crop": "[32, 40]", "model.weights": "null",
        "train.batch_size": 2, "train.steps": 2, "train.epochs": "null", "train.precision": "fp32",
        "train.log_every": 1, "eval.pictures": 1, "wandb.mode": "disabled",
    }  # fmt: skip
    overrides |= {"model.width": 2} if model in NARROW else {}
    arguments = ["--config", str(path), *(f"{key}={value}" for key, value in overrides.items())]
    assert train(arguments) == 0
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    losses = {record["step"]: record["loss"] for record in records if record["event"] == "train"}
    assert losses.keys() == {1, 2}
    assert all(loss is not None and 0 < loss < 20 for loss in losses.values())
    scored = {record["split"]: record["images"] for record in records if record["event"] == "eval"}
    assert scored.keys() == {config["data"]["val"], *filter(None, [config["data"].get("test")])}
    state = load_checkpoint(run_dir)
    assert (state["step"], state["config"]["model"]["name"], state["config"]["data"]["name"]) == (2, model, name)


def test_names_say_network_and_data_set():
    for path in CONFIGS:
        config = yaml.safe_load(path.read_text())
        if path.stem not in ("fcn8s", "quickstart"):
            assert path.stem == f"{config['model']['name']}_{config['data']['name']}"
