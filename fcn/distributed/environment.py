"""What the launcher says about this process, read from the environment. Needs no PyTorch."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple


class Place(NamedTuple):
    """Which process of the job this is."""

    rank: int
    size: int
    local_rank: int
    launcher: str
    """torchrun, slurm or python."""


def read_place(environ: Mapping[str, str]) -> Place:
    """From the variables that torchrun or `srun` sets; without them, one process."""
    if "RANK" in environ and "WORLD_SIZE" in environ:
        place = [int(environ.get(key, "0")) for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK")]
        return Place(*place, "torchrun")
    # An sbatch script itself has SLURM_PROCID=0 and SLURM_NTASKS=N; only `srun` sets the step's variables.
    if "SLURM_STEP_NUM_TASKS" in environ and "SLURM_PROCID" in environ:
        place = [int(environ[key]) for key in ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")]
        return Place(*place, "slurm")
    return Place(0, 1, 0, "python")


def slurm_rendezvous(environ: Mapping[str, str]) -> tuple[str, str]:
    """(address, port) where the tasks of a SLURM step meet: the step's first host, and a port for this step.

    MASTER_ADDR and MASTER_PORT take precedence, if the site needs another address.
    """
    if environ.get("SLURM_STEP_NUM_NODES") == "1":
        address = "127.0.0.1"
    else:  # "gpu[07-09,12],big3" → "gpu07"
        first = re.match(r"(?:\[[^\]]*\]|[^,\[])+", environ.get("SLURM_STEP_NODELIST", "127.0.0.1"))
        address = re.sub(r"\[(\w+)[^\]]*\]", r"\1", first.group() if first else "127.0.0.1")
    # Steps of one job, and jobs on one node, need different ports; the kernel assigns those from 32768 up.
    job, step = (int(environ.get(key, "0")) for key in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    port = 20000 + (job * 101 + step) % 12000
    return environ.get("MASTER_ADDR", address), environ.get("MASTER_PORT", str(port))


def report_failure(message: str) -> None:
    """Write the message where torchrun looks for the cause, so that its own report ends with it."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        failure = {"message": message, "extraInfo": {"timestamp": str(int(time.time()))}}
        Path(path).write_text(json.dumps({"message": failure}), encoding="utf-8")


def wait_for_the_message(seconds: float = 15) -> None:
    """Give rank 0 time to print its message before this rank exits: torchrun then ends all ranks."""
    time.sleep(seconds)
    raise SystemExit(2)
