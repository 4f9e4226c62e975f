"""Kill campaign: a run on two processes that SIGKILL ends at random moments, again and again, loses no step.

    bash tests/run.sh -m campaign tests/dist/test_kills.py -s

FCN_KILL_SEED chooses another campaign. Its moments are drawn from the seed; what the processes are doing then is theirs.
"""

from __future__ import annotations

import collections
import json
import os
import random
import time
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch

from tests.cli import train
from fcn import distributed
from fcn.checkpoints import load_checkpoint
from tests.dist.ranks import free_port
from tests.dist.test_run import assert_same_tensors

STEPS, EVAL_EVERY, PROCESSES = 40, 10, 2
SEED = int(os.environ.get("FCN_KILL_SEED", "0"))
AIMS = ("start-up", "anywhere", "anywhere", "save", "evaluation")
"""Where a kill is aimed at, in turn: within the first moments, at any time, while a checkpoint is being written, and
while a split is being scored."""


def rank_main(rank: int, port: int, config: str) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(PROCESSES), OMP_NUM_THREADS="1")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), CUDA_VISIBLE_DEVICES="")
    torch.set_num_threads(1)
    status = train(["--config", config], distributed.start(timeout_s=60))
    distributed.barrier()
    distributed.stop()
    os._exit(status)


def start(config: str) -> list:
    """Two real processes, forked from a server that has imported everything."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["fcn.training.loop", "train_ddp"])
    port = free_port()
    ranks = [context.Process(target=rank_main, args=(rank, port, config)) for rank in range(PROCESSES)]
    for process in ranks:
        process.start()
    return ranks


def kill(ranks: list, first: int) -> None:
    """SIGKILL to one rank, and to the other a moment later."""
    for process in (ranks[first], ranks[1 - first]):
        process.kill()
    for process in ranks:
        process.join()


def finished_lines(folder: Path) -> list[dict]:
    """The steps and scores of metrics.jsonl, without a last line that a kill cut in half."""
    path = folder / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    records = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
    return [record for record in records if record["event"] in ("train", "eval")]


def is_saving(folder: Path) -> bool:
    return any((folder / "checkpoints").glob(".*.tmp"))


def is_scoring(folder: Path) -> bool:
    """Whether the last finished step is one to score, and its score is not there."""
    last = finished_lines(folder)[-1:]
    return bool(last) and last[0]["event"] == "train" and last[0]["step"] % EVAL_EVERY == 0


def interrupt(config: str, folder: Path, aim: str, rng: random.Random) -> str | None:
    """Start the run and kill it; returns what it was doing then, or None if it had come to its end."""
    reached = {"save": is_saving, "evaluation": is_scoring}.get(aim)
    delay = rng.random() * {"start-up": 1.0, "anywhere": 5.0, "save": 0.004, "evaluation": 0.01}[aim]
    known = len(finished_lines(folder))
    ranks = start(config)
    while reached and any(process.is_alive() for process in ranks):
        if len(finished_lines(folder)) > known and reached(folder):
            break
        time.sleep(0.0005)
    time.sleep(delay)
    ended = all(process.exitcode == 0 for process in ranks)
    doing = "save" if is_saving(folder) else "evaluation" if is_scoring(folder) else "steps"
    if len(finished_lines(folder)) <= known:
        doing = "start-up"
    kill(ranks, rng.randrange(PROCESSES))
    return None if ended else doing


def finish(config: str) -> None:
    ranks = start(config)
    for process in ranks:
        process.join(120)
    assert [process.exitcode for process in ranks] == [0] * PROCESSES


PHASES = {"start-up", "steps", "save", "evaluation"}


@pytest.mark.parametrize(("kills", "hit"), [(10, {"start-up"}), pytest.param(100, PHASES, marks=pytest.mark.campaign)])
def test_killed_at_random_moments_a_run_ends_with_the_same_bytes(tiny, tmp_path: Path, kills: int, hit: set) -> None:
    def config(name: str) -> tuple[str, Path]:
        changes = {"train__steps": STEPS, "train__precision": "fp32", "train__ema": 0.9, "data__jitter": [0.3] * 4}
        changes |= {"eval__every": EVAL_EVERY, "eval__pictures": 0, "checkpoint__every": 3}
        return tiny(run_dir=str(tmp_path / name), **changes), tmp_path / name

    undisturbed, folder = config("undisturbed")
    finish(undisturbed)
    expected, lines = load_checkpoint(folder), finished_lines(folder)
    rng = random.Random(SEED)
    done: collections.Counter[str] = collections.Counter()
    runs = 0
    while done.total() < kills:
        interrupted, folder = config(f"run{runs}")
        runs += 1
        while done.total() < kills and (doing := interrupt(interrupted, folder, AIMS[done.total() % len(AIMS)], rng)):
            done[doing] += 1
        finish(interrupted)
        assert_same_tensors(load_checkpoint(folder), expected)
        for event, keys in (("train", ("step", "loss", "grad_norm")), ("eval", ("step", "split", "iou", "images"))):
            found, wanted = (
                [[line[key] for key in keys] for line in part if line["event"] == event]
                for part in (finished_lines(folder), lines)
            )
            assert found == wanted, "every step and every score once, and the same"
    print(f"{done.total()} kills in {runs} runs, seed {SEED}: {dict(done)}")
    assert hit <= done.keys()
