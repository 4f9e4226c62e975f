"""`python -m fcn status` on real runs: alive, killed, preempted, finished, failed; and on files of runs elsewhere."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from pathlib import Path

import pytest

from fcn.errors import InputError
from fcn.pulse import Sign, read_signs
from fcn.status import status
from tests.dist.ranks import run, started, wait_for_line


def test_a_live_run_then_a_killed_one_then_a_preempted_one_then_a_finished_one(tiny, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    config = tiny(train__steps=100_000, eval__every=100_000, checkpoint__every=5)
    with started(2, "train_ddp.py", "--config", config) as launched:
        wait_for_line(launched, "step 6/")
        text = run(1, "-m", "fcn", "status", str(folder)).stdout
        assert "running, 2 processes by torchrun" in text
        assert "newest checkpoint: step " in text
        assert [line.split()[:3] for line in text.splitlines()[-2:]] == [
            [str(rank), socket.gethostname(), str(launched.rank(rank))] for rank in (0, 1)
        ]
        launched.kill_all()
    text = run(1, "-m", "fcn", "status", str(folder), status=1).stdout
    assert "dead: killed, or its machine is down" in text
    assert text.count("gone; was in ") == 2

    with started(1, "train_ddp.py", "--config", config) as launched:  # one rank less than before
        wait_for_line(launched, "resuming at step")
        wait_for_line(launched, "data wait")
        launched.send_signal(signal.SIGTERM)
        assert launched.wait(60) == 75
    text = run(1, "-m", "fcn", "status", str(folder)).stdout
    assert "preempted " in text
    assert [sign.rank for sign in read_signs(folder)] == [0]

    step = read_signs(folder)[0].step
    run(2, "train_ddp.py", "--config", config, f"train.steps={step + 2}")
    text = run(1, "-m", "fcn", "status", str(folder)).stdout
    assert "finished " in text
    assert f"step {step + 2}/{step + 2}" in text
    assert "mIoU 0." in text


def test_a_run_that_failed_says_what_of(tiny, tmp_path: Path) -> None:
    config = tiny(train__max_nonfinite=1, optim__lr=1e30)
    run(2, "train_ddp.py", "--config", config, status=1)  # torchrun's own status
    text = run(1, "-m", "fcn", "status", str(tmp_path / "run"), status=1).stdout
    assert "failed " in text
    assert "the loss or the gradient was not finite" in text


def test_no_run(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no run is there"):
        status(tmp_path)
    done = run(1, "-m", "fcn", "status", str(tmp_path / "nowhere"), status=2)
    assert done.stderr.count("\n") == 1


# --- of machines that this one cannot look into


STARTED = time.time() - 48 * 3600


def sign(rank: int, ago: float = 4, **changes) -> dict:
    """What a rank wrote `ago` seconds ago, in a start of two days ago."""
    now = time.time()
    values = {
        "rank": rank, "world_size": 3, "host": f"node{rank}", "pid": 100 + rank, "launcher": "slurm", "job": "77",
        "started": STARTED, "written": now - ago, "interval_s": 10.0, "state": "running", "step": 40, "steps": 90,
        "place": "fit > _train (engine.py:1)", "since_s": 0.1, "waiting": True, "own_s": 0.5, "data_s": 0.0,
    }  # fmt: skip
    assert set(values) == set(Sign._fields)
    return values | changes


def written(folder: Path, *signs: dict) -> tuple[str, bool]:
    """`status` of a folder with those signs."""
    (folder / "heartbeat").mkdir(parents=True)
    (folder / "config.yaml").write_text("seed: 0\n")
    for one in signs:
        (folder / "heartbeat" / f"rank_{one['rank']:05d}.json").write_text(json.dumps(one))
    return status(folder)


def test_all_alive(tmp_path: Path) -> None:
    text, well = written(tmp_path, *map(sign, range(3)))
    assert well
    assert "running, 3 processes by slurm, SLURM job 77" in text


def test_a_rank_that_gives_no_sign(tmp_path: Path) -> None:
    text, well = written(tmp_path, sign(0), sign(1, ago=200), sign(2))
    assert not well
    assert "no sign of life of rank 1 on node1 (process 101)" in text


def test_a_rank_without_a_file(tmp_path: Path) -> None:
    text, well = written(tmp_path, sign(0), sign(2))
    assert not well
    assert "no sign of life of rank 1" in text


def test_a_rank_that_holds_the_others_up(tmp_path: Path) -> None:
    busy = sign(2, waiting=False, since_s=300.0, place="_train > device_steps (loaders.py:9)")
    text, well = written(tmp_path, sign(0), sign(1), busy)
    assert not well
    assert "held up by rank 2 on node2, in _train > device_steps (loaders.py:9) for 5:00" in text


def test_all_silent(tmp_path: Path) -> None:
    text, well = written(tmp_path, *(sign(rank, ago=4000) for rank in range(3)))
    assert not well
    assert "dead" in text
    assert "1:06:40 ago" in text


def test_files_of_an_earlier_start_and_broken_ones_do_not_count(tmp_path: Path) -> None:
    older = sign(2, started=STARTED - 9000, ago=200_000)
    text, well = written(tmp_path, sign(0, world_size=2), sign(1, world_size=2), older)
    assert well
    assert "running, 2 processes" in text
    (tmp_path / "heartbeat" / "rank_00009.json").write_text('{"rank":')
    assert [one.rank for one in read_signs(tmp_path)] == [0, 1]


@pytest.mark.parametrize("buried", [True, False])
def test_a_process_of_this_machine_that_is_gone_is_seen_at_once(tmp_path: Path, buried: bool) -> None:
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitid(os.P_PID, child, os.WEXITED | (0 if buried else os.WNOWAIT))
    here = {"host": socket.gethostname(), "world_size": 2}
    text, well = written(tmp_path, sign(0, **here, pid=os.getpid()), sign(1, **here, pid=child))
    assert not well
    assert f"no sign of life of rank 1 on {socket.gethostname()} (process {child})" in text
