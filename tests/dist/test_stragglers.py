"""Which rank the others wait for, of runs in which one rank really is slow."""

from __future__ import annotations

from pathlib import Path

import pytest

from fcn.distributed import StragglerDetector, slowest
from fcn.tracking import read_records
from tests.dist import ranks

SLOW_NETWORK = """
import os, time, torch

class Slow(torch.nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.body = torch.nn.Sequential(
            torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.BatchNorm2d(4), torch.nn.Conv2d(4, num_classes, 1)
        )

    def forward(self, images):
        if self.training and os.environ.get("RANK") == "1":
            time.sleep(0.15)
        return self.body(images)
"""

SLOW_DATA = """
import os, time
import numpy as np

class Slow:
    classes = ["a", "b"]

    def __init__(self, root, split):
        pass

    def __len__(self):
        return 24

    def size(self, index):
        return 48, 48

    def __getitem__(self, index):
        if os.environ.get("RANK") == "1":
            time.sleep(0.05)
        rng = np.random.default_rng(index)
        return rng.integers(0, 256, (48, 48, 3), np.uint8), rng.integers(0, 2, (48, 48), np.uint8)
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`module(name, source)` puts a Python module where the processes of a run find it."""
    monkeypatch.setattr(ranks, "IMPORTS", (str(tmp_path),))

    def write(name: str, source: str) -> None:
        (tmp_path / f"{name}.py").write_text(source)

    return write


def train(config: str, tmp_path: Path) -> tuple[list[dict], str]:
    """Of a run on two processes: what each of its training records says of the slowest, and what it printed."""
    done = ranks.run(2, "train_ddp.py", "--config", config)
    records = read_records(tmp_path / "run" / "metrics.jsonl")
    return [record["slowest"] for record in records if record["event"] == "train"], done.stdout


def test_a_rank_whose_network_is_slow_is_named(tiny, tmp_path: Path, module) -> None:
    module("slow_network", SLOW_NETWORK)
    config = tiny(
        model={"name": "slow_network:Slow"}, train__batch_size=4, train__log_every=2, eval__every=10, eval__pictures=0
    )
    found, printed = train(config, tmp_path)
    assert [record["rank"] for record in found[1:]] == [1] * 4
    assert all(record["own_s"] - record["others_s"] > 0.1 > record["data_s"] for record in found[1:])
    assert "rank 1 on " in printed
    assert "its processor or GPU is slow or shared" in printed


def test_a_rank_that_waits_for_its_data_is_named(tiny, tmp_path: Path, module) -> None:
    module("slow_data", SLOW_DATA)
    data = {"name": "slow_data:Slow", "root": ".", "train": "t", "val": "v", "crop": [48, 48], "workers": 0}
    config = tiny(data=data, train__batch_size=8, train__log_every=2, eval__every=10, eval__pictures=0)
    found, printed = train(config, tmp_path)
    assert [record["rank"] for record in found[1:]] == [1] * 4
    assert all(record["data_s"] > 0.15 for record in found[1:])
    assert "s for its data" in printed


def test_the_others_are_the_median_of_all_but_the_slowest() -> None:
    found = slowest([(1.0, 0.0), (1.5, 0.5), (3.0, 1.0), (2.0, 1.0)])
    assert found == {"rank": 2, "own_s": 3.0, "data_s": 1.0, "others_s": 2.0}


def test_a_rank_is_named_once_for_as_long_as_it_is_slow() -> None:
    watch = StragglerDetector(["a", "b"])
    times = {"slow": [(1.0, 0.0), (2.0, 0.0)], "other": [(2.0, 0.0), (1.0, 0.0)], "equal": [(1.0, 0.0), (1.1, 0.0)]}
    course = ["slow", "slow", "equal", *["slow"] * 5, "other", "other", "other"]
    lines = [watch.notice(slowest(times[kind])) for kind in course]
    assert [place for place, line in enumerate(lines) if line] == [5, 10]
    assert "rank 1 on b" in lines[5]
    assert "rank 0 on a" in lines[10]
