"""Runs from the command line with a cache: the same bytes as without, and a disk that fills is one warning."""

from __future__ import annotations

from pathlib import Path

import pytest

from fcn.checkpoints import load_checkpoint
from tests.checkpoints.test_saver import mounted
from tests.dist.test_run import assert_same_tensors, train

CHANGES = {"eval__pictures": 0, "eval__every": 6, "train__steps": 6, "data__jitter": [0.2, 0.2, 0.2, 0.1]}


@pytest.fixture(scope="module")
def without() -> list[dict]:
    """Empty at first; then the last state of a run without a cache."""
    return []


def assert_as_without(tiny, tmp_path: Path, without: list[dict], **keys) -> tuple[str, list[str]]:
    """Three epochs of two processes with a worker each; returns what they printed, and the warnings in it."""
    if not without:
        train(2, tiny(run_dir=str(tmp_path / "without"), **CHANGES))
        without.append(load_checkpoint(tmp_path / "without"))
    done = train(2, tiny(run_dir=str(tmp_path / "run"), data__workers=1, **CHANGES, **keys))
    assert_same_tensors(load_checkpoint(tmp_path / "run"), without[0])
    shown = done.stdout + done.stderr
    # That one process is slower than the other is the machine's doing.
    return shown, [line for line in shown.splitlines() if "warning" in line.lower() and " is slow: " not in line]


def test_a_cache_on_a_disk_changes_no_number(tiny, tmp_path: Path, without) -> None:
    shown, warnings = assert_as_without(tiny, tmp_path, without, data__cache="disk")
    assert warnings == []
    (folder,) = (tmp_path / ".cache").iterdir()
    assert f"data.cache: {folder}, 1." in shown
    assert "MB when full; 0 of 24 images are in it" in shown
    records = (folder / "index").read_bytes()[-8 * 24 :]
    assert all(any(records[start : start + 8]) for start in range(0, len(records), 8)), "all are in it now"


@pytest.mark.campaign
def test_a_disk_that_fills_changes_no_number_and_is_one_warning(tiny, tmp_path: Path, without) -> None:
    with mounted(tmp_path / "disk", "600k") as disk:
        _, warnings = assert_as_without(tiny, tmp_path, without, data__cache="disk", data__cache_dir=str(disk))
        (folder,) = disk.iterdir()
    (warning,) = warnings
    assert f"warning: data.cache: {folder}: cannot be written (No space left on device); images" in warning


@pytest.mark.campaign
def test_the_last_rank_gives_memory_back(tiny, tmp_path: Path, without) -> None:
    keys = {"data__cache": "memory", "data__cache_dir": str(tmp_path)}
    assert assert_as_without(tiny, tmp_path, without, **keys)[1] == []
    (folder,) = tmp_path.glob("fcn-cache-*")
    assert list(folder.iterdir()) == []
