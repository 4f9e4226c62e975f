"""Two runs in one directory: the second one is refused, and none is stopped that may go on."""

from __future__ import annotations

import errno
import multiprocessing
import os
import re
import time
from pathlib import Path

import pytest

from fcn.config import load_config
from fcn.distributed import DistributedContext
from fcn.errors import InputError
from fcn.tracking import Console
from fcn.training import build_run, lock_run_dir, open_console, open_splits
from tests.cli import ALONE
from tests.dist.ranks import complaints, run, run_ranks, started, wait_for_line

LONG = {"train__steps": 500, "train__timeout": 4, "checkpoint__every": 5}


def test_a_second_run_is_refused_by_the_name_of_the_first(tiny, tmp_path):
    config = tiny(**LONG)
    with started(2, "train_ddp.py", "--config", config) as first:
        wait_for_line(first, "step 5/500")
        rank_0 = first.rank(0)
        for size in (1, 2):
            done = run(size, "train_ddp.py", "--config", config, status=2 if size == 1 else 1)
            lines = complaints(done.stderr) if size == 2 else [done.stderr.removeprefix("error: ").rstrip()]
            assert len(lines) == 1
            assert re.fullmatch(
                rf"{tmp_path}/run: another run is there: process {rank_0} on \S+, since [\d :-]+; "
                r"stop it first, or choose another run_dir( \[rank 0\])?",
                lines[0],
            )
        assert first.poll() is None
        first.kill_all()
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "another run" not in log
    assert log.count("no checkpoint, from the beginning") == 1
    run(1, "train_ddp.py", "--config", config, "train.steps=6")  # the first one is dead: its lock is free
    assert "resuming at step" in (tmp_path / "run" / "log.txt").read_text()


def test_a_run_that_is_about_to_leave_is_waited_for(tiny, tmp_path):
    config = tiny(**LONG | {"train__timeout": 60})
    with started(2, "train_ddp.py", "--config", config) as first:
        wait_for_line(first, "step 5/500")
        first.kill()  # torchrun alone: its ranks save and leave
        first.wait()
        run(1, "train_ddp.py", "--config", config, "train.steps=200")
    log = (tmp_path / "run" / "log.txt").read_text()
    assert log.index("stopped by a signal") < log.index("resuming at step")


def race(config: str, start, results) -> None:
    cfg = load_config(config, [])
    prepared, _ = build_run(cfg, ALONE, open_splits(cfg))
    start.wait()
    try:
        with lock_run_dir(prepared, open_console(prepared)):
            results.put("held")
            time.sleep(8)
    except InputError as error:
        results.put(str(error))


@pytest.mark.parametrize("rounds", [1, pytest.param(20, marks=pytest.mark.campaign)])
def test_one_of_twenty_gets_the_directory(tiny, rounds):
    config = tiny(train__timeout=2)
    context = multiprocessing.get_context("forkserver")
    for _ in range(rounds):
        start, results = context.Barrier(20), context.Queue()
        racers = [context.Process(target=race, args=(config, start, results)) for _ in range(20)]
        for racer in racers:
            racer.start()
        found = [results.get(timeout=120) for _ in racers]
        for racer in racers:
            racer.join()
        assert found.count("held") == 1
        assert sum("another run is there: process" in text for text in found) == 19


def refused(context: DistributedContext, config: str) -> str:
    cfg = load_config(config, [])
    prepared, _ = build_run(cfg, context, open_splits(cfg))
    with pytest.raises(InputError, match="another run is there") as error, lock_run_dir(prepared, Console.silent()):
        raise AssertionError("nobody gets here")
    return str(error.value)


def test_every_rank_is_refused(tiny):
    config = tiny(train__timeout=2)
    cfg = load_config(config, [])
    mine, _ = build_run(cfg, ALONE, open_splits(cfg))
    with lock_run_dir(mine, open_console(mine)):
        assert len(set(run_ranks(3, refused, config))) == 1
    with lock_run_dir(mine, open_console(mine)):  # and it is free again
        assert (Path(cfg.run_dir) / "lock").exists()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS])
def test_a_file_system_without_locks_is_a_warning(tiny, monkeypatch, number):
    """What the kernel answers there; no such file system is at hand."""

    def flock(*_) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", flock)
    config = tiny()
    prepared, _ = build_run(load_config(config, []), ALONE, open_splits(load_config(config, [])))
    with lock_run_dir(prepared, open_console(prepared)):
        assert f"this file system has no locks ({os.strerror(number)})" in (prepared.folder / "log.txt").read_text()
