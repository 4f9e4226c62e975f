"""Processes that were started for different runs, or that see different data, end at once and say what differs."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fcn import training
from fcn.config import load_config
from fcn.distributed import DistributedContext, require_equal
from fcn.errors import InputError
from fcn.training import build_run, open_splits
from tests.cli import train
from tests.dist.ranks import CHECKOUT, TIMEOUT_S, environment, free_port, run, run_ranks


def start_by_hand(commands: list[list[str]]) -> list[subprocess.CompletedProcess[str]]:
    """A process for each command line, as somebody starts them who has no launcher."""
    place = {"WORLD_SIZE": str(len(commands)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    started = [
        subprocess.Popen(
            [sys.executable, "train_ddp.py", *words], cwd=CHECKOUT, text=True, stdin=subprocess.DEVNULL,
            env=environment() | place | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for rank, words in enumerate(commands)
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=TIMEOUT_S) for process in started]
    finally:
        for process in started:
            process.kill()
    return [
        subprocess.CompletedProcess(process.args, process.returncode, *output)
        for process, output in zip(started, outputs, strict=True)
    ]


def test_processes_started_by_hand_with_other_keys(tiny, tmp_path):
    one = ["--config", tiny()]
    zero, other = start_by_hand([one, [*one, "optim.lr=0.5", "train.steps=11"]])
    assert (zero.returncode, other.returncode) == (2, 2)
    host = os.uname().nodename
    lines = [line for line in zero.stderr.splitlines() if line.startswith("error:")]
    assert lines == [
        f"error: {key}: the processes disagree, found {mine} on rank 0 on {host}; {theirs} on rank 1 on {host}; "
        f"start every process with the same config and overrides"
        for key, mine, theirs in (("train.steps", "10", "11"), ("optim.lr", "0.02", "0.5"))
    ]
    assert "Traceback" not in zero.stderr + other.stderr
    assert not (tmp_path / "run").exists()


def answer(context: DistributedContext, config: str, own: list[str]) -> str:
    """What a rank with one more override says."""
    with pytest.raises(InputError) as refused:
        train(["--config", config, *own[context.rank : context.rank + 1]], context)
    return str(refused.value)


@pytest.mark.parametrize(
    "override",
    ["seed=1", "train.batch_size=24", "data.crop=[32,32]", "run_dir=elsewhere", "loss.add={dice: 0.5}", "model.width=3"],
)
def test_any_key_that_decides_a_number(tiny, override):
    found = run_ranks(2, answer, tiny(), ["optim.momentum=0.9", override])
    key = override.partition("=")[0].replace("loss.add", "loss.add.dice")
    assert found[0] == found[1]
    assert found[0].startswith(f"{key}: the processes disagree, found ")
    assert "\n" not in found[0]


def test_keys_that_may_differ(tiny, shapes_root, tmp_path):
    shutil.copytree(shapes_root, tmp_path / "copy")  # with other times
    config = tiny()
    overrides = [["data.workers=1"], [f"data.root={tmp_path / 'copy'}", f"data.cache_dir={tmp_path}"]]
    for process in start_by_hand([["--config", config, "train.steps=2", *own] for own in overrides]):
        assert process.returncode == 0, process.stderr


def facts(context: DistributedContext, remedy: str) -> str:
    own = {"version": ["2.1", "2.1", "2.2", None][context.rank], "same": 3}
    with pytest.raises(InputError) as refused:
        require_equal(None if context.rank == 3 else own, remedy)
    require_equal(None if context.rank == 3 else {"same": 3}, remedy)
    return str(refused.value)


def test_each_value_is_told_with_its_ranks():
    found = run_ranks(4, facts, "install one")
    host = os.uname().nodename
    text = f"'2.1' on rank 0 on {host}, rank 1 on {host}; '2.2' on rank 2 on {host}; install one"
    assert found == [f"version: the processes disagree, found {text}"] * 4


def see(context: DistributedContext, config: str, roots: list[str]) -> str:
    """The answer of the last process of a machine for each root."""
    config = load_config(config, [f"data.root={roots[context.rank]}"])
    context = dataclasses.replace(context, local_rank=0)  # as if each rank had a machine of its own
    run, _ = build_run(config, context, open_splits(config))
    try:
        training.require_equal_data(run)
    except InputError as error:
        return str(error)
    return ""


def first_of(root: Path, folder: str, split: str) -> Path:
    name = (root / "ImageSets" / "Segmentation" / f"{split}.txt").read_text().split()[0]
    return next((root / folder).glob(f"{name}.*"))


def grow(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def shorten(root: Path) -> None:
    path = root / "ImageSets" / "Segmentation" / "val.txt"
    path.write_text("\n".join(path.read_text().split()[:-1]))


@pytest.mark.parametrize(
    ("change", "title"),
    [
        (lambda root: None, ""),
        (shorten, "number of images of the split val"),
        (lambda root: grow(first_of(root, "JPEGImages", "train")), "sizes of the image files of the split train"),
        (lambda root: grow(first_of(root, "SegmentationClass", "val")), "sizes of the mask files of the split val"),
    ],
    ids=["none", "fewer", "image", "mask"],
)
def test_machines_that_see_other_files(tiny, shapes_root, tmp_path, change, title):
    shutil.copytree(shapes_root, tmp_path / "copy")
    change(tmp_path / "copy")
    first, second = run_ranks(2, see, tiny(), [str(shapes_root), str(tmp_path / "copy")])
    assert first == second
    assert first.startswith(f"{title}: the processes disagree" if title else "")
    assert bool(first) == bool(title)


@pytest.mark.parametrize("change", ["another mask", "another order", "none"])
def test_a_run_does_not_resume_on_other_data(tiny, shapes_root, tmp_path, change):
    root = tmp_path / "copy"
    shutil.copytree(shapes_root, root)
    config = tiny(data__root=str(root))
    run(1, "train_ddp.py", "--config", config, "train.steps=4")
    moved = root.rename(tmp_path / "moved")
    words = ""
    if change == "another mask":
        grow(first_of(moved, "SegmentationClass", "train"))
        words = "the sizes of the mask files of the training split changed"
    if change == "another order":
        path = moved / "ImageSets" / "Segmentation" / "train.txt"
        path.write_text("\n".join(reversed(path.read_text().split())))
        words = "the names or order of the images of the training split changed"
    command = ("train_ddp.py", "--config", config, "train.steps=6", f"data.root={moved}")
    done = run(1, *command, status=2 if words else 0)
    assert words in done.stderr
    assert "Traceback" not in done.stderr
