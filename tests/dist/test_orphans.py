"""Whoever is killed, no process of a run stays behind."""

from __future__ import annotations

import os
import signal
import time

import pytest

from fcn.checkpoints import load_checkpoint
from tests.dist.ranks import Launched, started, wait_for_line

LONG = {"train__steps": 500, "data__workers": 1, "checkpoint__every": 100}


def kill_launcher(process: Launched) -> None:
    process.kill()
    process.wait()


def test_ranks_save_and_leave_when_torchrun_is_killed(tiny, tmp_path):
    with started(2, "train_ddp.py", "--config", tiny(**LONG)) as process:
        wait_for_line(process, "step 5/500")
        kill_launcher(process)
        assert not process.left(30)
    step = load_checkpoint(tmp_path / "run")["step"]
    assert 5 <= step < 400
    assert "stopped by a signal" in (tmp_path / "run" / "log.txt").read_text()


@pytest.mark.parametrize("after_s", [1.5, 4.0, pytest.param(8.0, marks=pytest.mark.campaign)])
def test_ranks_leave_when_torchrun_is_killed_before_they_train(tiny, after_s):
    with started(2, "train_ddp.py", "--config", tiny(**LONG)) as process:
        time.sleep(after_s)  # in their imports, at the rendezvous, or in the first steps
        kill_launcher(process)
        assert not process.left(30)


def test_a_rank_that_cannot_save_leaves_all_the_same_when_torchrun_is_killed(tiny):
    with started(2, "train_ddp.py", "--config", tiny(**LONG)) as process:
        wait_for_line(process, "step 5/500")
        stopped = process.rank(1)
        os.kill(stopped, signal.SIGSTOP)  # rank 0 waits for it
        kill_launcher(process)
        deadline = time.monotonic() + 50
        while any("RANK=0" in environ for environ in process.family().values()) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert time.monotonic() < deadline
        os.kill(stopped, signal.SIGCONT)
        assert not process.left(30)


def test_loader_workers_leave_when_their_process_is_killed(tiny):
    with started(1, "train_ddp.py", "--config", tiny(**LONG)) as process:
        wait_for_line(process, "step 5/500")
        assert len(process.family()) >= 3, "the fork server and a worker"
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert not process.left()


def test_a_killed_rank_takes_its_workers_along(tiny):
    with started(2, "train_ddp.py", "--config", tiny(**LONG)) as process:
        wait_for_line(process, "step 5/500")
        os.kill(process.rank(1), signal.SIGKILL)
        process.communicate(timeout=60)
        assert process.returncode != 0
        assert not process.left()


@pytest.mark.parametrize("mode", ["offline", "disabled"])
def test_nothing_is_left_when_torchrun_and_all_ranks_are_killed_at_once(tiny, mode):
    if mode == "offline":
        pytest.importorskip("wandb")
    config = tiny(**LONG | {"wandb__mode": mode})
    with started(2, "train_ddp.py", "--config", config) as process:
        wait_for_line(process, "step 5/500")
        assert ("wandb" in " ".join(process.left(0).values())) == (mode == "offline")
        for pid in (process.pid, process.rank(0), process.rank(1)):
            os.kill(pid, signal.SIGKILL)
        process.wait()
        assert not process.left(30)
