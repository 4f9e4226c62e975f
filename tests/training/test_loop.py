"""The loop of one process: a step that does not log, score or save asks nothing of the device."""

from __future__ import annotations

import traceback
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fcn.config import load_config
from fcn.data import build_dataset, loaders, workers
from fcn.distributed import DistributedContext, StopFlag
from fcn.tracking import Console, MetricsFile, Trackers
from fcn.training import build_run, loop

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "fcn"
WAITING = {"aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::equal", "aten::masked_select"}
"""What the host has to wait for on a GPU: .item(), float(), bool(), and results whose shape depends on values."""


class HostSyncs(TorchDispatchMode):
    """Notes what the host would wait for, by the number of the step that is being done."""

    def __init__(self, step) -> None:
        super().__init__()
        self.step, self.seen = step, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name
        if name in WAITING:
            files = (frame.f_code.co_filename for frame, _ in traceback.walk_stack(None))
            asking = next(file for file in files if file.startswith(str(PACKAGE)))
            if asking not in (
                loaders.__file__,
                workers.__file__,
            ):  # which ask about batches that are in host memory on any machine
                self.seen.setdefault(self.step(), []).append(f"{name} in {asking}")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_only_steps_that_log_or_save_wait_for_the_device(shapes_root: Path, tmp_path: Path, precision: str) -> None:
    overrides = [
        f"data.root={shapes_root}", f"run_dir={tmp_path / 'run'}", "data.workers=0", "data.crop=[48,48]",
        "model.width=2", "train.batch_size=4", "train.steps=12", f"train.precision={precision}", "train.log_every=6",
        "train.ema=0.9", "train.grad_clip=1.0", "eval.every=100", "eval.pictures=0", "checkpoint.every=9",
        "optim.name=sgd",
    ]  # fmt: skip
    config = load_config(ROOT / "configs" / "quickstart.yaml", overrides)
    context = DistributedContext(0, 1, 0, torch.device("cpu"), "python")
    splits = {name: build_dataset(config.data, name) for name in ("train", "val")}
    run, _ = build_run(config, context, splits)
    trackers = Trackers(pytest.fail)
    run.folder.mkdir()
    trackers.add(lambda: MetricsFile(run.folder / "metrics.jsonl", pytest.fail))
    with HostSyncs(lambda: run.step) as waits:
        loop.fit(run, Console.silent(), trackers, StopFlag())
    assert {6, 12} <= set(waits.seen) <= {6, 9, 12}, waits.seen
