"""Whole runs with W&B: kills, signals, and servers that hang or refuse. Its files are read by its own reader."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from fcn.checkpoints import list_checkpoints, load_checkpoint
from fcn.tracking.wandb_process import recordings
from tests.dist.ranks import CHECKOUT, command, environment
from tests.dist.test_kills import finish, finished_lines, kill, start
from tests.tracking.test_wandb import Recorded, processes_about, wait_for
from tests.wandb_server import Server

pytestmark = pytest.mark.skipif(not importlib.util.find_spec("wandb"), reason="needs wandb")

STEPS, EVERY = 24, 12


def config_of(tiny, folder: Path) -> str:
    changes = {"train__steps": STEPS, "eval__every": EVERY, "eval__pictures": 1, "checkpoint__every": 3}
    return tiny(run_dir=str(folder), wandb__mode="offline", data__test="train", **changes)


@pytest.mark.parametrize("kills", [2, pytest.param(12, marks=pytest.mark.campaign)])
def test_over_kills_and_a_signal_every_step_is_recorded_once(tiny, tmp_path: Path, kills: int) -> None:
    folder = tmp_path / "run"
    config, rng = config_of(tiny, folder), random.Random(0)
    for number in range(kills):
        known = len(finished_lines(folder))
        ranks = start(config)
        wait_for(lambda known=known: len(finished_lines(folder)) > known and list_checkpoints(folder / "checkpoints"))
        time.sleep(rng.random())
        kill(ranks, first=number % 2)
        if number % 2:  # the whole node is gone; else W&B's process writes what it was given, perhaps beside the next
            for pid in processes_about(folder):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
    ranks = start(config)
    known = len(finished_lines(folder))
    wait_for(lambda: len(finished_lines(folder)) > known)
    os.kill(ranks[1].pid, signal.SIGTERM)
    for process in ranks:
        process.join(120)
    assert [process.exitcode for process in ranks] == [75, 75]
    finish(config)

    recorded = Recorded(folder, load_checkpoint(folder)["tracker_id"])
    assert recorded.files == recordings(folder, "*"), "one W&B run"
    assert 2 < len(recorded.files) <= kills + 2, "a file a start, if it came that far"
    rows, lines = recorded.rows, finished_lines(folder)
    assert [row["_step"] for row in rows] == list(range(1, STEPS + 1))
    by_step = {row["_step"]: row for row in rows}
    scored = 0
    for line in lines:
        row = by_step[line["step"]]
        if line["event"] == "train":
            assert [row[f"train/{key}"] for key in ("loss", "lr", "grad_norm", "epoch", "skipped")] == [
                line[key] for key in ("loss", "lr", "grad_norm", "epoch", "skipped")
            ]
        else:
            scored += 1
            split = line["split"]
            assert row[f"{split}/miou"] == line["miou"]
            assert {name: row.get(f"{split}/iou/{name}") for name in line["iou"]} == line["iou"]
    assert scored == STEPS // EVERY + 1
    assert len([row for row in rows if "val/miou" in row]) == STEPS // EVERY
    last = rows[-1]
    files = recorded.files[-1].parent / "files"
    for split in ("val", "train"):  # `train` is also the split that the config names as `test`
        assert last[f"{split}/panels.count"] == 1
        (masks,) = last[f"{split}/panels.all_masks"]
        media = [masks["ground truth"]["path"], masks["prediction"]["path"], *last[f"{split}/panels.filenames"]]
        media += [last[f"{split}/{name}.path"] for name in ("confusion", "confusion_table", "class_table")]
        assert [name for name in media if not (files / name).is_file()] == []
    table = json.loads((files / last["val/confusion_table.path"]).read_text())["data"]
    scores = json.loads((folder / "scores_val.json").read_text())
    assert [line[1:] for line in table] == scores["confusion_matrix"]
    assert [alert["title"] for alert in recorded.contents("alert")] == ["Stopped by a signal"]
    assert recorded.config["environment"]["processes"] == 2
    assert recorded.config["model"]["name"] == "unet"
    wait_for(lambda: not processes_about(folder))


@pytest.mark.parametrize("behaviours", [("hangs",), pytest.param((500, 401, 403), marks=pytest.mark.campaign)])
def test_servers_that_hang_fail_or_refuse_cost_one_warning(tiny, tmp_path: Path, behaviours: tuple) -> None:
    """Runs at the same time, each to its end, whose records are in files then."""
    with contextlib.ExitStack() as stack:
        servers = {str(behaviour): stack.enter_context(Server(behaviour)) for behaviour in behaviours}
        runs = {}
        for name, server in servers.items():
            config = tiny(
                run_dir=str(tmp_path / name), wandb__mode="auto", train__steps=3, eval__every=3, eval__pictures=0
            )
            environ = environment() | server.environment | {"WANDB_HTTP_TIMEOUT": "4", "HOME": str(tmp_path)}
            runs[name] = stack.enter_context(
                subprocess.Popen(
                    command(1, "train_ddp.py", "--config", config),
                    cwd=CHECKOUT,
                    env=environ,
                    text=True,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                )
            )
        for name, process in runs.items():
            output, _ = process.communicate(timeout=150)  # the pipe ends: nobody keeps it open
            assert process.returncode == 0, output
            assert servers[name].requests, "it was asked"
            about = [line for line in output.splitlines() if "wandb" in line.lower() or "W&B" in line]
            planned, warning, *rest = about
            assert planned.endswith("W&B     online")
            assert "warning: W&B's server cannot be used" in warning
            (file,) = recordings(tmp_path / name, "*")
            assert file.parent.name.startswith("offline-run-")
            (upload,) = rest
            assert upload.endswith(f"W&B: not uploaded yet: python -m fcn.tracking.wandb_tracker {tmp_path / name}")
            assert [row["_step"] for row in Recorded(tmp_path / name, "*").rows] == [1, 2, 3]
            wait_for(lambda name=name: not processes_about(tmp_path / name))


def test_a_run_that_ends_on_its_losses_is_an_alert(tiny, tmp_path: Path) -> None:
    config = tiny(wandb__mode="offline", optim__lr=1e300, train__max_nonfinite=2, train__precision="fp32")
    done = subprocess.run(
        command(1, "train_ddp.py", "--config", config), cwd=CHECKOUT, env=environment(), stdin=subprocess.DEVNULL,
        capture_output=True, text=True, timeout=150, check=False,
    )  # fmt: skip
    assert "was not finite" in done.stderr
    assert done.returncode == 2
    wait_for(lambda: not processes_about(tmp_path / "run"))
    titles = [alert["title"] for alert in Recorded(tmp_path / "run", "*").contents("alert")]
    assert titles == ["Steps without a finite loss are skipped", "The loss is not finite"]
