"""A checkpoint is data: code that it names runs only if the person at the keyboard has named it, too."""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from fcn.checkpoints import load_checkpoint, save_checkpoint
from fcn.errors import InputError
from tests.cli import call, train
from tests.dist.ranks import CHECKOUT, complaints, run

CODE = """
    from pathlib import Path
    from torch import nn

    Path(__file__).with_name("marker").touch()

    def network(num_classes, pretrained=False):
        return nn.Conv2d(3, num_classes, 1, bias=False)

    def dataset(root, split):
        raise SystemExit("opened")
"""


@pytest.fixture
def hostile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """`hostile(section={key: value})` writes a checkpoint with such a config; its code would leave a file `marker`."""
    (tmp_path / "hubconf.py").write_text(textwrap.dedent(CODE))
    (tmp_path / "evil_code.py").write_text(textwrap.dedent(CODE))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("hubconf", "evil_code"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")

    def write(path: str = "evil.pt", **sections: Mapping[str, Any]) -> Path:
        config = {
            "run_dir": "gone",
            "data": {"name": "shapes", "root": "gone", "workers": 0},
            "model": {"name": "evil_code:network"},
            "train": {"batch_size": 1, "steps": 1, "precision": "fp32"},
        }
        state = {"model": {"weight": torch.eye(3).reshape(3, 3, 1, 1)}, "step": 7, "config": config | sections}
        state |= {"classes": ["red", "green", "blue"], "palette": [[255, 0, 0], [0, 255, 0], [0, 0, 255]]}
        save_checkpoint(tmp_path / path, state)
        return tmp_path / path

    return write


HUB = {"name": "torch.hub:load", "options": {"repo_or_dir": ".", "source": "local", "model": "network"}}
COMMANDS = {
    "evaluate": ["evaluate", "--checkpoint", "evil.pt"],
    "predict": ["predict", "--checkpoint", "evil.pt", "--output", "out", "a.png"],
    "export": ["export", "--checkpoint", "evil.pt", "--output", "p.pt2"],
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("model", [{"name": "evil_code:network"}, HUB, {"name": "os:system"}], ids=lambda m: m["name"])
def test_a_checkpoint_s_network_is_not_imported(hostile, tmp_path, command, model):
    hostile(model=model)
    with pytest.raises(InputError, match="asks to run code that you have not named") as refused:
        call(COMMANDS[command])
    name = model["name"]
    assert str(refused.value) == (
        f"evil.pt: asks to run code that you have not named, model.name={name}; nothing was imported. If you trust it, "
        f"add --trust-code {name}"
    )
    assert not (tmp_path / "marker").exists()


def test_nor_is_its_data_set(hostile, tmp_path):
    own = {"name": "evil_code:dataset", "root": ".", "workers": 0}
    hostile(model={"name": "unet"}, data=own)
    with pytest.raises(InputError, match=r"have not named, data\.name=evil_code:dataset; nothing was imported"):
        call(COMMANDS["evaluate"])
    hostile(data=own)
    words = "model.name=evil_code:network and data.name=evil_code:dataset.*--trust-code evil_code:network --trust-code"
    with pytest.raises(InputError, match=words):
        call(COMMANDS["evaluate"])
    assert not (tmp_path / "marker").exists()
    with pytest.raises(SystemExit, match="opened"):
        call([*COMMANDS["evaluate"], "--trust-code", "evil_code:network", "data.name=evil_code:dataset"])


@pytest.mark.parametrize("trusted", ["evil_code:other", "evil_code", "network", "torch.hub:load"])
def test_trust_in_other_code_is_none_in_this(hostile, tmp_path, trusted):
    hostile()
    with pytest.raises(InputError, match="If you trust it, add --trust-code evil_code:network"):
        call([*COMMANDS["predict"], "--trust-code", trusted])
    assert not (tmp_path / "marker").exists()


def test_code_that_the_person_names_runs(hostile, tmp_path):
    hostile()
    assert call([*COMMANDS["predict"], "--trust-code", "evil_code:network"]) == 0
    assert (tmp_path / "out" / "a.png").exists()
    assert (tmp_path / "marker").exists()


def config_of(tmp_path: Path, shapes_root: Path, **changes: Any) -> str:
    config = yaml.safe_load((CHECKOUT / "configs" / "quickstart.yaml").read_text())
    config["data"] |= {"root": str(shapes_root), "workers": 0}
    config["train"] |= {"steps": 1, "batch_size": 2}
    config["wandb"]["mode"] = "disabled"
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config | {"run_dir": str(tmp_path / "run")} | changes))
    return str(tmp_path / "config.yaml")


@pytest.mark.parametrize("way", ["run_dir", "resume", "weights"])
def test_training_from_a_foreign_checkpoint_imports_nothing(hostile, tmp_path, shapes_root, way):
    path = hostile("run/checkpoints/step_00000007.pt" if way == "run_dir" else "evil.pt", model=HUB)
    words = {"run_dir": [], "resume": [f"resume={path}"], "weights": [f"model.weights={path}"]}[way]
    with pytest.raises(InputError, match=r"evil\.pt|step_00000007\.pt|model\.name"):
        train(["--config", config_of(tmp_path, shapes_root), *words])
    assert not (tmp_path / "marker").exists()


def test_a_foreign_run_directory_is_read_without_an_import(hostile, tmp_path):
    hostile("run/checkpoints/step_00000007.pt", model=HUB)
    config = {"run_dir": "run", "model": HUB, "data": {"name": "evil_code:dataset", "root": "."}}
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "run" / "metrics.jsonl").write_text('{"event": "train", "step": 1, "loss": 1.0}\n')
    for words in (["status", "run"], ["report", "run"], ["compare", "run", "run"]):
        call(words)
    assert not (tmp_path / "marker").exists()


def test_every_rank_ends_with_one_line(hostile, tmp_path, monkeypatch):
    monkeypatch.setattr("tests.dist.ranks.IMPORTS", (str(tmp_path),))
    path = hostile()
    done = run(2, "-m", "fcn", "evaluate", "--checkpoint", str(path), status=1)
    (line,) = complaints(done.stderr)
    assert "If you trust it, add --trust-code evil_code:network" in line
    assert not (tmp_path / "marker").exists()


# --- what else a foreign directory may contain ------------------------------------------------------------------------

TRAIN = {
    "event": "train",
    "step": 3,
    "steps": 9,
    "loss": 0.5,
    "images_per_s": 7.0,
    "lr": 0.1,
    "data_wait": 0,
    "eta_s": 1,
}
EVAL = {"event": "eval", "step": 3, "split": "val", "miou": 0.5, "iou": {"a": 0.5}, "images": 2, "protocol": "native"}
SUMMARY = {"status": "finished", "step": 3, "steps": 9, "best": {"miou": 0.5, "step": 3}, "unsaved": [], "versions": {}}
BEAT = {
    "rank": 0, "world_size": 1, "host": "h", "pid": 1, "launcher": "python", "job": None, "started": 1, "written": 2.0,
    "interval_s": 1, "state": "running", "step": 3, "steps": 9, "place": "x", "since_s": 1, "waiting": False,
    "own_s": None, "data_s": 1.5,
}  # fmt: skip
ODD = ["text", None, -1, 1.5, True, [], [1], {}, {"a": "b"}, {"a": {}}, 10**400, float("nan"), [["a", "b"]], "\x1b[2J"]


def write_foreign(folder: Path, train=TRAIN, scored=EVAL, summary=SUMMARY, beat=BEAT, details=None) -> None:
    (folder / "heartbeat").mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text("model: {name: unet}\ndata: {name: shapes}\n")
    (folder / "metrics.jsonl").write_text(f"{json.dumps(train)}\n{json.dumps(scored)}\n")
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "scores_val.json").write_text(json.dumps(details or {"step": 3}))
    (folder / "heartbeat" / "rank_00000.json").write_text(json.dumps(beat))


def read_all(folder: Path) -> None:
    for words in (["status", folder], ["compare", folder, folder], ["report", folder]):
        call(words)


@pytest.mark.parametrize("file", ["train", "scored", "summary", "beat", "details"])
def test_records_of_any_content_are_read_or_left_out(tmp_path, capsys, monkeypatch, file):
    monkeypatch.setattr("fcn.reports.html._curves", lambda run: [])  # the same records, drawn a hundred times
    good = {"train": TRAIN, "scored": EVAL, "summary": SUMMARY, "beat": BEAT}
    good["details"] = {
        "step": 3,
        "classes": ["a"],
        "confusion_matrix": [[4]],
        "palette": [[1, 2, 3]],
        "ignore_index": 0,
    }
    good["details"]["image_miou"] = [["a", 0.5]]
    for key in good[file]:
        for odd in ODD:
            write_foreign(tmp_path / "run", **{file: good[file] | {key: odd}})
            read_all(tmp_path / "run")
        write_foreign(tmp_path / "run", **{file: {k: v for k, v in good[file].items() if k != key}})
        read_all(tmp_path / "run")
    assert "\x1b" not in capsys.readouterr().out


BOMB = "a: &a {x: 1}\n" + "".join(
    f"{y}: &{y} {{p: *{x}, q: *{x}}}\n" for x, y in zip("abcdefghijklmno", "bcdefghijklmnop")
)


@pytest.mark.parametrize("config", [BOMB, "[" * 5000, "!!python/object/apply:os.system [touch marker]", "\0"])
def test_a_config_that_is_no_config_gets_one_line(tmp_path, monkeypatch, config):
    monkeypatch.chdir(tmp_path)
    write_foreign(tmp_path / "run")
    (tmp_path / "run" / "config.yaml").write_text(config)
    with pytest.raises(InputError, match="cannot be read") as refused:
        call(["compare", "run", "run"])
    assert "\n" not in str(refused.value)
    call(["status", "run"])
    call(["report", "run"])
    assert not (tmp_path / "marker").exists()


def test_escape_sequences_reach_no_terminal(tmp_path, capsys):
    write_foreign(tmp_path / "run", scored=EVAL | {"split": "\x1b]0;owned\x07", "iou": {"\x1b[31mred": 0.5}})
    read_all(tmp_path / "run")
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert "IoU \\x1b[31mred" in shown


@pytest.mark.parametrize("change", [{"model": {}}, {"step": -1}, {"step": None}, {"tracker_id": 3}, {"config": [1]}])
def test_a_checkpoint_that_lacks_something_is_not_resumed_from(shapes_root, tmp_path, change):
    words = ["--config", str(CHECKOUT / "configs/quickstart.yaml"), f"data.root={shapes_root}", "data.workers=0"]
    words += ["model.width=2", "train.batch_size=2", "train.steps=1", "eval.pictures=0", "wandb.mode=disabled"]
    assert train([*words, f"run_dir={tmp_path / 'run'}"]) == 0
    state = load_checkpoint(tmp_path / "run")
    left = {key: value for key, value in (state | change).items() if value is not None}
    save_checkpoint(tmp_path / "other.pt", left)
    said = r"other\.pt: (does not fit this run \(.+\)|(step|tracker_id|config): .+); resume from another file"
    with pytest.raises(InputError, match=said):
        train([*words, f"run_dir={tmp_path / 'next'}", f"resume={tmp_path / 'other.pt'}"])
