"""Machines that share no file system: each process has a folder of its own under the same relative name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

from fcn.checkpoints import load_checkpoint
from tests.dist.ranks import CHECKOUT, TIMEOUT_S, environment, free_port
from tests.dist.test_run import records


def train(config: str, folders: list[Path], *overrides: str) -> list[str]:
    """Start a rank in each folder, as by hand on a machine each; their outputs."""
    port, ranks = free_port(), []
    for rank, folder in enumerate(folders):
        folder.mkdir(exist_ok=True)
        place = {"RANK": rank, "LOCAL_RANK": 0, "WORLD_SIZE": len(folders), "MASTER_PORT": port}
        environ = environment() | {key: str(value) for key, value in place.items()} | {"MASTER_ADDR": "127.0.0.1"}
        ranks.append(
            subprocess.Popen(
                [sys.executable, CHECKOUT / "train_ddp.py", "--config", config, "run_dir=run", *overrides],
                cwd=folder, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )  # fmt: skip
        )
    outputs = [process.communicate(timeout=TIMEOUT_S)[0] for process in ranks]
    assert [process.returncode for process in ranks] == [0] * len(ranks), "\n".join(outputs)
    return outputs


def test_it_is_said_and_a_resume_gets_rank_0s_checkpoint(tiny, tmp_path: Path) -> None:
    config = tiny(optim__schedule="constant", train__steps=8)
    one, other, together = tmp_path / "one", tmp_path / "other", tmp_path / "together"
    for steps in (4, 8):
        said = train(config, [one, other], f"train.steps={steps}")
        assert said[0].count("warning: run_dir: run is another folder for rank 1 on ") == 1
        assert not list((other / "run").glob("checkpoints/*"))
    assert "resuming at step 4/8" in said[0]
    for steps in (4, 8):
        (said, _) = train(config, [together, together], f"train.steps={steps}")
        assert "another folder" not in said
    expected, found = (load_checkpoint(folder / "run")["model"] for folder in (together, one))
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    assert [record["step"] for record in records(one / "run", "train")] == list(range(1, 9))
