"""What a rank says of itself, and when."""

from __future__ import annotations

import itertools
import json
import re
import threading
import time
from pathlib import Path

import pytest
import torch

from fcn.distributed import DistributedContext, Heartbeat, HeartbeatRecord, file_heartbeat, read_heartbeats
from fcn.distributed.heartbeat import whereabouts
from fcn.seeding import derive

CONTEXT = DistributedContext(0, 2, 0, torch.device("cpu"), "torchrun", "17")


def test_it_publishes_immediately_and_then_regularly_what_the_loop_has_set():
    published: list[HeartbeatRecord] = []
    three = threading.Event()

    def publish(record: HeartbeatRecord) -> None:
        published.append(record)
        if len(published) == 3:
            three.set()

    heartbeat = Heartbeat(CONTEXT, publish, 0.05).start()
    heartbeat.step, heartbeat.steps, heartbeat.own_s, heartbeat.data_s = 7, 9, 0.5, 0.25
    assert three.wait(10)
    heartbeat.stop()
    count = len(published)
    time.sleep(0.2)
    assert len(published) == count, "no more after the stop"
    last = published[-1]
    assert (last.rank, last.world_size, last.launcher, last.job, last.state) == (0, 2, "torchrun", "17", "running")
    assert (last.step, last.steps, last.own_s, last.data_s) == (7, 9, 0.5, 0.25)
    assert all(before.written < after.written for before, after in itertools.pairwise(published))


def test_a_publisher_whose_listener_is_gone_ends_the_thread_and_nothing_else():
    def publish(record: HeartbeatRecord) -> None:
        raise RuntimeError("the store is gone")

    heartbeat = Heartbeat(CONTEXT, publish, 0.01).start()
    heartbeat._thread.join(10)
    assert not heartbeat._thread.is_alive()
    heartbeat.stop()


def test_the_file_has_how_the_run_ended(tmp_path: Path):
    with file_heartbeat(tmp_path, CONTEXT, started=5.0, step=3, steps=9) as heartbeat:
        wait_for(lambda: read_heartbeats(tmp_path))
        heartbeat.step = 4
        heartbeat.state = "finished"
    (record,) = read_heartbeats(tmp_path)
    assert (record.started, record.step, record.steps, record.state) == (5.0, 4, 9, "finished")
    assert [path.name for path in (tmp_path / "heartbeat").iterdir()] == ["rank_00000.json"]


def test_the_file_has_the_error_that_ended_the_run(tmp_path: Path):
    def fail() -> None:
        with file_heartbeat(tmp_path, CONTEXT, started=5.0, step=3, steps=9):
            raise ZeroDivisionError("division\nby zero")

    with pytest.raises(ZeroDivisionError):
        fail()
    assert read_heartbeats(tmp_path)[0].state == "failed: ZeroDivisionError: division"


def test_files_of_an_earlier_start_with_more_ranks_are_removed_and_others_of_it_do_not_count(tmp_path: Path):
    folder = tmp_path / "heartbeat"
    folder.mkdir()
    with file_heartbeat(tmp_path, CONTEXT, started=5.0, step=0, steps=9):
        wait_for(lambda: read_heartbeats(tmp_path))
    old = read_heartbeats(tmp_path)[0]._replace(started=1.0)
    for rank in (1, 2, 3):
        (folder / f"rank_{rank:05d}.json").write_text(json.dumps(old._replace(rank=rank)._asdict()))
    (folder / "rank_00007.json").write_text("{")
    assert [record.rank for record in read_heartbeats(tmp_path)] == [0]
    with file_heartbeat(tmp_path, CONTEXT, started=9.0, step=0, steps=9):
        assert sorted(path.name for path in folder.glob("rank_*")) in (
            ["rank_00000.json", "rank_00001.json"], ["rank_00001.json"],
        )  # fmt: skip


def test_a_folder_that_cannot_be_written_stops_nothing(tmp_path: Path):
    (tmp_path / "heartbeat").write_text("a file")
    with file_heartbeat(tmp_path, CONTEXT, started=5.0, step=0, steps=9) as heartbeat:
        heartbeat.step = 1
    assert read_heartbeats(tmp_path) == []


def test_the_place_of_a_thread_is_the_innermost_of_this_program():
    inside, leave = threading.Event(), threading.Event()

    class Position:
        def __str__(self) -> str:
            inside.set()
            leave.wait(30)
            return "0"

    thread = threading.Thread(target=derive, args=(0, "purpose", Position()))
    thread.start()
    assert inside.wait(30)
    place, waiting = whereabouts(thread.ident)
    leave.set()
    thread.join()
    assert re.fullmatch(r"derive \(seeding\.py:\d+\)", place)
    assert not waiting
    assert whereabouts(thread.ident) == ("start-up", False)


def wait_for(condition, seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
