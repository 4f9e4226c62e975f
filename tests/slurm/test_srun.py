"""train_ddp.py under srun alone, on a real cluster."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.dist.ranks import CHECKOUT, TIMEOUT_S, environment

pytestmark = pytest.mark.slurm


def srun(slurm: dict[str, str], layout: list[str], *arguments: str, **extra: str) -> subprocess.CompletedProcess[str]:
    names = ("SLURM_CONF", "PATH")
    environ = environment() | {name: slurm[name] for name in names} | extra
    return subprocess.run(
        ["srun", *layout, sys.executable, *arguments],
        cwd=CHECKOUT,
        env=environ,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )


@pytest.mark.parametrize(
    ("layout", "extra"),
    [
        (["--nodes=1", "--ntasks=2"], {}),
        # Both nodes live on this machine under names that no resolver knows, so the address must be given.
        (["--nodes=2", "--ntasks=2"], {"MASTER_ADDR": "127.0.0.1"}),
    ],
    ids=["one node", "two nodes"],
)
def test_srun_alone_gives_the_group(slurm, shapes_root: Path, tmp_path: Path, layout, extra) -> None:
    folder = tmp_path / "run"
    overrides = ["model.width=2", "train.steps=4", "wandb.mode=disabled", "data.workers=0", "train.log_every=1"]
    arguments = ["--config", "configs/quickstart.yaml", f"data.root={shapes_root}", f"run_dir={folder}", *overrides]
    done = srun(slurm, layout, "train_ddp.py", *arguments, **extra)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 2 x CPU (slurm, " in done.stdout
    assert done.stdout.count("step 3/4") == 1
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["status"], summary["images"]) == ("finished", 10)


def test_bad_input_under_srun_is_status_2(slurm) -> None:
    done = srun(slurm, ["--nodes=1", "--ntasks=2"], "train_ddp.py", "--config", "configs/none.yaml")
    assert done.returncode == 2
    assert done.stderr.count("error: configs/none.yaml: no such config file") == 1
    assert "Traceback" not in done.stderr
