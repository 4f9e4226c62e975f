"""A machine without wandb and simplejpeg trains to the same bytes, and one line says what is missing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

from fcn.checkpoints import load_checkpoint
from tests.dist.ranks import CHECKOUT, environment, run

WITHOUT = """
import runpy, sys
sys.modules.update(wandb=None, simplejpeg=None)  # importing them fails, as if they were not installed
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def without(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", WITHOUT, *arguments]
    return subprocess.run(command, cwd=CHECKOUT, env=environment(), capture_output=True, text=True)


def test_it_trains_to_the_same_bytes_and_says_so_once(tiny, tmp_path: Path) -> None:
    config = tiny(wandb__mode="auto")
    done = without("train_ddp.py", "--config", config)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wandb is missing") == 1
    assert not (tmp_path / "run" / "wandb").exists()
    run(1, "train_ddp.py", "--config", config, f"run_dir={tmp_path / 'with'}", "wandb.mode=disabled")
    found, expected = (load_checkpoint(tmp_path / name)["model"] for name in ("run", "with"))
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_a_mode_that_needs_wandb_is_refused(tiny) -> None:
    done = without("train_ddp.py", "--config", tiny(wandb__mode="offline"))
    assert done.returncode == 2
    assert done.stderr == (
        "error: wandb.mode: found offline, but the package wandb is missing; pip install wandb, or set disabled\n"
    )
