"""`python -m fcn status` on real runs: alive, killed, preempted, finished, failed; and on files of runs elsewhere."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from pathlib import Path

import pytest

from fcn.distributed import HeartbeatRecord, read_heartbeats
from fcn.errors import InputError
from fcn.reports import run_status
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
    assert [beat.rank for beat in read_heartbeats(folder)] == [0]

    step = read_heartbeats(folder)[0].step
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
        run_status(tmp_path)
    done = run(1, "-m", "fcn", "status", str(tmp_path / "nowhere"), status=2)
    assert done.stderr.count("\n") == 1


# --- of machines that this one cannot look into


STARTED = time.time() - 48 * 3600


def beat(rank: int, ago: float = 4, **changes) -> dict:
    """What a rank wrote `ago` seconds ago, in a start of two days ago."""
    now = time.time()
    values = {
        "rank": rank, "world_size": 3, "host": f"node{rank}", "pid": 100 + rank, "launcher": "slurm", "job": "77",
        "started": STARTED, "written": now - ago, "interval_s": 10.0, "state": "running", "step": 40, "steps": 90,
        "place": "fit > train_to_the_end (loop.py:1)", "since_s": 0.1, "waiting": True, "own_s": 0.5, "data_s": 0.0,
    }  # fmt: skip
    assert set(values) == set(HeartbeatRecord._fields)
    return values | changes


def written(folder: Path, *beats: dict) -> tuple[str, bool]:
    """`status` of a folder with those signs."""
    (folder / "heartbeat").mkdir(parents=True)
    (folder / "config.yaml").write_text("seed: 0\n")
    for one in beats:
        (folder / "heartbeat" / f"rank_{one['rank']:05d}.json").write_text(json.dumps(one))
    return run_status(folder)


def test_all_alive(tmp_path: Path) -> None:
    text, well = written(tmp_path, *map(beat, range(3)))
    assert well
    assert "running, 3 processes by slurm, SLURM job 77" in text


def test_a_rank_that_gives_no_sign(tmp_path: Path) -> None:
    text, well = written(tmp_path, beat(0), beat(1, ago=200), beat(2))
    assert not well
    assert "no heartbeat from rank 1 on node1 (process 101)" in text


def test_a_rank_without_a_file(tmp_path: Path) -> None:
    text, well = written(tmp_path, beat(0), beat(2))
    assert not well
    assert "no heartbeat from rank 1" in text


def test_a_rank_that_holds_the_others_up(tmp_path: Path) -> None:
    busy = beat(2, waiting=False, since_s=300.0, place="_train > device_batches (loaders.py:9)")
    text, well = written(tmp_path, beat(0), beat(1), busy)
    assert not well
    assert "held up by rank 2 on node2, in _train > device_batches (loaders.py:9) for 5:00" in text


def test_all_silent(tmp_path: Path) -> None:
    text, well = written(tmp_path, *(beat(rank, ago=4000) for rank in range(3)))
    assert not well
    assert "dead" in text
    assert "1:06:40 ago" in text


def test_files_of_an_earlier_start_and_broken_ones_do_not_count(tmp_path: Path) -> None:
    older = beat(2, started=STARTED - 9000, ago=200_000)
    text, well = written(tmp_path, beat(0, world_size=2), beat(1, world_size=2), older)
    assert well
    assert "running, 2 processes" in text
    (tmp_path / "heartbeat" / "rank_00009.json").write_text('{"rank":')
    assert [one.rank for one in read_heartbeats(tmp_path)] == [0, 1]


@pytest.mark.parametrize("buried", [True, False])
def test_a_process_of_this_machine_that_is_gone_is_seen_at_once(tmp_path: Path, buried: bool) -> None:
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitid(os.P_PID, child, os.WEXITED | (0 if buried else os.WNOWAIT))
    here = {"host": socket.gethostname(), "world_size": 2}
    text, well = written(tmp_path, beat(0, **here, pid=os.getpid()), beat(1, **here, pid=child))
    assert not well
    assert f"no heartbeat from rank 1 on {socket.gethostname()} (process {child})" in text
