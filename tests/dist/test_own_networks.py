"""What networks of users do that framework code does not expect: they skip blocks, freeze statistics, pool to a point."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest
import torch

from fcn.checkpoints import load_checkpoint
from tests.dist.ranks import run
from tests.dist.test_run import records

NETWORKS = """
    import os, random
    import numpy as np
    import torch
    from torch import nn

    class Body(nn.Module):
        def __init__(self, num_classes):
            super().__init__()
            self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
            self.blocks = nn.ModuleList(
                nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()) for _ in range(3)
            )
            self.head = nn.Conv2d(4, num_classes, 1)

        def forward(self, images):
            x = self.stem(images)
            for number, block in enumerate(self.blocks):
                if not (self.training and self.skips(number)):
                    x = x + block(x)
            return self.head(x)

    class StochasticDepth(Body):
        '''Huang et al. 2016: each block is skipped for the whole batch, by three generators in turn.'''

        def skips(self, number):
            return [random.random, np.random.random, lambda: torch.rand(()).item()][number]() < 0.4

    class ByRank(Body):
        '''Rank 1 never runs the last block.'''

        def __init__(self, num_classes):
            super().__init__(num_classes)
            self.blocks[2] = nn.Conv2d(4, 4, 1)

        def skips(self, number):
            return number == 2 and os.environ.get("RANK") == "1"

    class Frozen(Body):
        '''Pretrained statistics that must not move.'''

        def __init__(self, num_classes):
            super().__init__(num_classes)
            self.blocks[1].eval()
            self.stem[1].eval()

        def skips(self, number):
            return False

    class Point(Body):
        '''Pools images to one pixel before BatchNorm, as ASPP does.'''

        def __init__(self, num_classes):
            super().__init__(num_classes)
            self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4))
            self.blocks = nn.ModuleList()

        def forward(self, images):
            x = self.stem(images)
            return self.head(x + self.pool(x))

    class Still(Frozen):
        def __init__(self, num_classes):
            super().__init__(num_classes)
            self.spare = nn.Conv2d(4, 4, 1)
"""


@pytest.fixture
def own(tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`own(name, **changes)` writes the config of a run with one of these networks."""
    (tmp_path / "own.py").write_text(textwrap.dedent(NETWORKS))
    monkeypatch.setattr("tests.dist.ranks.IMPORTS", (str(tmp_path),))
    return lambda name, **changes: tiny(model={"name": f"own:{name}"}, eval__pictures=0, **changes)


def losses(folder: Path) -> list[float]:
    return [record["loss"] for record in records(folder, "train")]


def test_blocks_that_are_skipped_at_random_train_alike_on_any_number_of_processes(own, tmp_path: Path) -> None:
    found = []
    for processes in (1, 2, 3):
        config = own("StochasticDepth", run_dir=str(tmp_path / str(processes)), train__steps=12)
        done = run(processes, "train_ddp.py", "--config", config)
        assert "it skips blocks.0.0.weight, " in done.stdout
        found.append((losses(tmp_path / str(processes)), load_checkpoint(tmp_path / str(processes))["model"]))
    (alone, weights), *others = found
    assert len(alone) == 12
    for loss, other in others:
        assert loss == pytest.approx(alone, rel=1e-9)
        for key, tensor in weights.items():
            torch.testing.assert_close(other[key], tensor, rtol=1e-8, atol=1e-8)


def test_blocks_that_are_skipped_resume_to_the_same_bytes(own, tmp_path: Path) -> None:
    config = own("StochasticDepth", train__steps=12)
    for folder, steps in (("whole", [12]), ("parts", [8, 12])):
        for end in steps:
            run(2, "train_ddp.py", "--config", config, f"run_dir={tmp_path / folder}", f"train.steps={end}",
                "optim.schedule=constant")  # fmt: skip
    whole, parts = (load_checkpoint(tmp_path / name)["model"] for name in ("whole", "parts"))
    assert all(torch.equal(whole[key], parts[key]) for key in whole)


def test_ranks_that_take_other_paths_train_together(own, tmp_path: Path) -> None:
    done = run(2, "train_ddp.py", "--config", own("ByRank"))
    assert "it skips blocks.2.weight, blocks.2.bias in some steps" in done.stdout
    assert len(losses(tmp_path / "run")) == 10


@pytest.mark.parametrize("processes", [1, 2])
def test_statistics_that_the_user_froze_stay(own, tmp_path: Path, processes: int) -> None:
    run(processes, "train_ddp.py", "--config", own("Frozen"))
    model = load_checkpoint(tmp_path / "run")["model"]
    for layer in ("stem.1", "blocks.1.1"):
        assert torch.equal(model[f"{layer}.running_mean"], torch.zeros(4, dtype=torch.float64))
        assert model[f"{layer}.num_batches_tracked"] == 0
    for layer in ("blocks.0.1", "blocks.2.1"):
        assert model[f"{layer}.num_batches_tracked"] == 10


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("sync_bn", [True, False])
def test_statistics_of_a_single_value_are_refused_by_every_rank(own, processes: int, sync_bn: bool) -> None:
    size = 1 if sync_bn else processes
    config = own("Point", train__batch_size=size, train__uneven=True, train__sync_bn=sync_bn)
    done = run(processes, "train_ddp.py", "--config", config, status=2 if processes == 1 else 1)
    assert "train.batch_size: a BatchNorm layer gets a single value of each channel" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr.partition("torch/distributed/elastic")[0]
    assert processes == 1 or done.stderr.count("exitcode  : 2 ") == processes


def test_two_values_are_enough(own, tmp_path: Path) -> None:
    run(2, "train_ddp.py", "--config", own("Point", train__batch_size=2))
    assert len(losses(tmp_path / "run")) == 10


def test_what_stays_untrained_is_a_warning(own, tmp_path: Path) -> None:
    run(2, "train_ddp.py", "--config", own("Still"))
    warnings = [record["text"] for record in records(tmp_path / "run", "warning")]
    said = "own:Still: the loss does not depend on spare.weight, spare.bias, 3.1% of the weights: they stay untrained"
    assert said in warnings
