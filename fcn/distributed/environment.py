"""What the launcher says about this process, read from the environment. Needs no PyTorch."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from fcn.text import printable


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


def report_failure(message: str, of_all: bool = False) -> bool:
    """Write the message where torchrun looks for the cause, so that its report, which comes last, ends with it.

    Args:
        of_all: every rank fails with this message; the report has it once for each machine.

    Returns:
        Whether that is enough. Without torchrun it is not, nor before a restart, unless the attempt before said the
        same: the report knows the last attempt only, and the others may take hours.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return False
    now, local_rank = int(time.time()), read_place(os.environ).local_rank
    if of_all and local_rank:  # torchrun takes the earliest failure for the cause
        message, now = "the same as that of local_rank 0", now + 5
    failure = {"message": printable(message), "extraInfo": {"timestamp": str(now)}}
    try:
        Path(path).write_text(json.dumps({"message": failure}), encoding="utf-8")
    except OSError:
        return False
    done, most = (int(os.environ.get(f"TORCHELASTIC_{name}", "0")) for name in ("RESTART_COUNT", "MAX_RESTARTS"))
    return done >= most or _was_reported(Path(path), done, failure)


def _was_reported(path: Path, attempt: int, failure: Mapping[str, object]) -> bool:
    """Whether the attempt before this one ended with the same message; torchrun has a folder for each."""
    before = path.parents[1].with_name(f"attempt_{attempt - 1}") / path.parent.name / path.name
    try:
        return json.loads(before.read_text(encoding="utf-8"))["message"]["message"] == failure["message"]
    except (OSError, ValueError, KeyError, TypeError):
        return False


def wait_for_the_message(seconds: float = 15) -> None:
    """Give rank 0 time to print its message before this rank exits: torchrun then ends all ranks."""
    time.sleep(seconds)
    raise SystemExit(2)
