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
            self.blocks.eval()
            self.blocks[0].train()  # all but the first block stay as they are
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

    class ByImage(StochasticDepth):
        '''Draws for each image, too.'''

        def forward(self, images):
            torch.rand(len(images))
            return super().forward(images)

        def skips(self, number):
            return torch.rand(()).item() < 0.4

    class WithActivation(nn.BatchNorm2d):
        def forward(self, images):
            return super().forward(images).relu()

    class Ghost(nn.BatchNorm2d):
        '''Hoffer, Hubara, Soudry 2017: statistics of parts of the batch.'''

        def forward(self, images):
            return torch.cat([super(Ghost, self).forward(part) for part in images.split(2)])

    class ByItself(nn.BatchNorm2d):
        def forward(self, images):
            mean, var = images.mean((0, 2, 3), keepdim=True), images.var((0, 2, 3), keepdim=True)
            return (images - mean) / (var + self.eps).sqrt() * self.weight[:, None, None] + self.bias[:, None, None]

    def with_norm(num_classes, kind):
        body = Frozen(num_classes)
        body.blocks = nn.ModuleList([nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), globals()[kind](4))])
        return body

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
        assert loss == pytest.approx(alone, rel=1e-12)
        for key, tensor in weights.items():
            torch.testing.assert_close(other[key], tensor, rtol=1e-12, atol=1e-12)


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
    assert "it skips blocks.2.weight, blocks.2.bias in some steps: on some processes" in done.stdout
    assert len(losses(tmp_path / "run")) == 10


@pytest.mark.parametrize("processes", [1, 2])
def test_statistics_that_the_user_froze_stay(own, tmp_path: Path, processes: int) -> None:
    done = run(processes, "train_ddp.py", "--config", own("Frozen"))
    assert "note: own:Frozen: stem.1, blocks stay in evaluation mode, as your function left them" in done.stdout
    model = load_checkpoint(tmp_path / "run")["model"]
    for layer in ("stem.1", "blocks.1.1", "blocks.2.1"):
        assert torch.equal(model[f"{layer}.running_mean"], torch.zeros(4, dtype=torch.float64))
        assert model[f"{layer}.num_batches_tracked"] == 0
    assert model["blocks.0.1.num_batches_tracked"] == 10, "and evaluation moved nothing"


@pytest.mark.parametrize(("processes", "sync_bn"), [(1, True), (2, True), (2, False)])
def test_statistics_of_a_single_value_are_refused_by_every_rank(own, processes: int, sync_bn: bool) -> None:
    size = 1 if sync_bn else processes
    config = own("Point", train__batch_size=size, train__uneven=True, train__sync_bn=sync_bn)
    done = run(processes, "train_ddp.py", "--config", config, status=2 if processes == 1 else 1)
    assert "train.batch_size: a BatchNorm layer gets a single value of each channel" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr.partition("torch/distributed/elastic")[0]
    assert processes == 1 or "exitcode  : 2 " in done.stderr


def test_blocks_that_ranks_could_not_skip_together_are_refused(own) -> None:
    config = own("ByImage", train__batch_size=5, train__uneven=True)
    done = run(2, "train_ddp.py", "--config", config, status=1)
    assert "train.uneven: own:ByImage skips parts of itself at random and draws for each image" in done.stderr
    run(2, "train_ddp.py", "--config", config, "train.batch_size=6", "train.steps=3")


@pytest.mark.parametrize("kind", ["WithActivation", "Ghost", "ByItself"])
def test_subclasses_of_batchnorm_in_unequal_parts(own, tmp_path: Path, kind: str) -> None:
    """One that calls F.batch_norm once is synchronised, and takes all of a rank's images; the others are noted."""
    config = own("", train__batch_size=5, train__uneven=True, train__micro_batch=2, train__steps=4)
    name = "model={name: own:with_norm, options: {kind: " + kind + "}}"
    found = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        done = run(processes, "train_ddp.py", "--config", config, name, f"run_dir={folder}")
        assert ("batch statistics of blocks.0.1 are not" in done.stdout) == (kind != "WithActivation")
        found.append(losses(folder))
    assert len(found[1]) == 4
    if kind == "WithActivation":
        assert found[1] == pytest.approx(found[0], rel=1e-12)


def test_two_values_are_enough(own, tmp_path: Path) -> None:
    run(2, "train_ddp.py", "--config", own("Point", train__batch_size=2))
    assert len(losses(tmp_path / "run")) == 10


def test_what_stays_untrained_is_a_warning(own, tmp_path: Path) -> None:
    run(2, "train_ddp.py", "--config", own("Still"))
    warnings = [record["text"] for record in records(tmp_path / "run", "warning")]
    said = "own:Still: the loss does not depend on spare.weight, spare.bias, 3.1% of the weights: they stay untrained"
    assert said in warnings
