"""Machines that leave a run and join it: two agents of launch/multinode.sh share one run directory."""

from __future__ import annotations

import contextlib
import re
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fcn.checkpoints import load_checkpoint
from tests.dist import ranks
from tests.dist.ranks import Launched, free_port, started, wait_for_line
from tests.dist.test_run import assert_same_tensors, largest_difference, records

NETWORK = """
    import os, time
    from torch import nn

    class Gated(nn.Sequential):
        '''Stands still in its sixth training step, as long as a file for this number of processes exists.'''

        def __init__(self, num_classes, gates):
            super().__init__(
                nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, num_classes, 1)
            )
            self.gate, self.calls = f"{gates}/{os.environ.get('WORLD_SIZE', 0)}", 0

        def forward(self, images):
            self.calls += self.training
            if self.training and self.calls > 5 and os.path.exists(self.gate):
                while os.path.exists(self.gate):
                    time.sleep(0.02)
                time.sleep(0.5)  # for the signal that follows the line that the test waited for
            return super().forward(images)
"""
STEPS = 24


@pytest.fixture
def gated(tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Configs of slow motion; 2 does not divide the batch."""
    (tmp_path / "gated.py").write_text(textwrap.dedent(NETWORK))
    monkeypatch.setattr(ranks, "IMPORTS", (str(tmp_path),))
    model = {"name": "gated:Gated", "options": {"gates": str(tmp_path)}}
    changes = {"train__batch_size": 11, "train__steps": STEPS, "eval__every": 15, "checkpoint__every": 3}
    return lambda run_dir, **more: tiny(model=model, run_dir=run_dir, **changes, **more)


def wait_for(path: Path, text: str, times: int = 1) -> None:
    """Until the file is there and holds the text so often."""
    deadline = time.monotonic() + 60
    while not (path.exists() and path.read_text().count(text) >= times):
        assert time.monotonic() < deadline, f"no {text!r} in {path}"
        time.sleep(0.02)


def resumed(folder: Path) -> list[int]:
    return [int(step) for step in re.findall(r"resuming at step (\d+)/", (folder / "log.txt").read_text())]


# The processes of the lowest address get the first ranks: also rank 0 may leave and come back.
@pytest.mark.parametrize(
    ("leaver", "shards"),
    [
        (0, 11),
        pytest.param(1, 11, marks=pytest.mark.campaign),
        pytest.param(0, None, marks=pytest.mark.campaign),
        pytest.param(1, None, marks=pytest.mark.campaign),
    ],
)
def test_a_machine_is_killed_and_comes_back(
    gated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, leaver: int, shards: int | None
) -> None:
    """The run ends like an undisturbed one on one process: with shards in float32 to the bit."""
    changes = {"train__shards": shards, "train__precision": "fp32" if shards else "fp64"}
    whole, folder = tmp_path / "whole", tmp_path / "run"
    config = gated(str(folder), **changes)
    ranks.run(1, "train_ddp.py", "--config", gated(str(whole), **changes), "train.uneven=true")
    monkeypatch.setattr(ranks, "command", lambda _, *arguments: list(arguments))
    for name, value in {
        "NODES": "1:2", "RDZV_HOST": "127.0.0.1", "RDZV_PORT": str(free_port()), "PROCESSES": "1", "LAST_CALL": "1",
        "RDZV_CONF": "keep_alive_interval=1", "LOGLEVEL": "INFO",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)

    def agent(address: int) -> contextlib.AbstractContextManager[Launched]:
        return started(0, "env", f"LOCAL_ADDR=127.0.0.{address}", "bash", "launch/multinode.sh", config)

    both, alone = (tmp_path / size for size in "21")
    both.touch()
    alone.touch()
    with agent(2 - leaver) as stays:
        wait_for(folder / "log.txt", f"step 5/{STEPS}")
        with agent(1 + leaver) as leaves:
            wait_for_line(stays, "Detected 1 new nodes")
            alone.unlink()
            wait_for(folder / "log.txt", " 2 x CPU")
            alone.touch()
            wait_for(folder / "log.txt", f"step 11/{STEPS}")
            wait_for(folder / "checkpoints" / "step_00000009.pt.sha256", ".pt")
            leaves.kill_all()
        both.unlink()
        wait_for(folder / "log.txt", "resuming at step", times=2)
        wait_for(folder / "log.txt", f"step {resumed(folder)[-1] + 5}/{STEPS}")
        with agent(1 + leaver) as returns:
            wait_for_line(stays, "Detected 1 new nodes")
            alone.unlink()
            output = stays.communicate(timeout=60)[0]
            assert (stays.returncode, returns.wait(60)) == (0, 0), output
    log = (folder / "log.txt").read_text()
    assert re.findall(r" on +(\d) x CPU(?: on 2 machines)? \(torchrun,", log) == ["1", "2", "1", "2"]
    joined, left, joined_again = resumed(folder)
    assert 5 < joined <= left < joined_again < STEPS
    for step in joined, joined_again:
        assert f"stopped by a signal at step {step}/{STEPS}" in log, "who is told of a join saves: no step is lost"
    assert "= 1 process x 11 images" in log
    assert log.count("= 2 processes x 5 or 6 images") == 2
    assert [record["step"] for record in records(folder, "train")] == list(range(1, STEPS + 1))
    if shards:
        assert_same_tensors(load_checkpoint(whole), load_checkpoint(folder))
    else:
        assert largest_difference(load_checkpoint(whole), load_checkpoint(folder)) <= 1e-9
