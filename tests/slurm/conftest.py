"""A real SLURM cluster of two nodes on this machine."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

CONF = """
ClusterName=fcn
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
JobRequeue=1
SlurmdTimeout=10
KillWait=30
ReturnToService=2
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdLogFile={folder}/slurmd-%n.log
SlurmctldLogFile={folder}/slurmctld.log
NodeName=n[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first}-{last}] CPUs=2 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""

MORTAL = ("setpriv", "--pdeathsig", "TERM")
"""Before a daemon: it ends with the tests, even if they are killed."""


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment in which srun and sbatch reach the cluster."""
    needed = ("munged", "slurmctld", "slurmd", "srun", "sinfo")
    missing = [name for name in needed if not shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin")]
    if missing or os.geteuid() != 0:
        pytest.skip(f"needs root and SLURM (apt install slurm-wlm munge); missing: {', '.join(missing) or 'root'}")
    folder = tmp_path_factory.mktemp("slurm")
    (folder / "state").mkdir()
    port = 16817
    conf = folder / "slurm.conf"
    conf.write_text(CONF.format(host=socket.gethostname(), port=port, folder=folder, first=port + 1, last=port + 2))
    environ = {**os.environ, "SLURM_CONF": str(conf), "PATH": f"{os.environ['PATH']}:/usr/sbin"}
    with contextlib.ExitStack() as daemons:
        daemons.enter_context(_munge(folder, environ))
        command = [*MORTAL, "slurmctld", "-D"]
        process = subprocess.Popen(command, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        daemons.callback(_end, process)
        for name in ("n1", "n2"):
            daemons.enter_context(start_node(environ, name))
        _wait_for(lambda: _idle_nodes(environ) == 2, folder)
        yield environ


@pytest.fixture(scope="session")
def revive(slurm: dict[str, str]) -> Iterator[Callable[[str], None]]:
    """`revive(node)` starts the daemon of a node that a test has killed, until the end of all tests."""
    with contextlib.ExitStack() as daemons:
        yield lambda node: daemons.enter_context(start_node(slurm, node))


@contextlib.contextmanager
def start_node(slurm: dict[str, str], name: str) -> Iterator[None]:
    """The daemon of a node, until the end of the block."""
    process = subprocess.Popen(
        [*MORTAL, "slurmd", "-D", "-N", name], env=slurm, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        yield
    finally:
        _end(process)


@contextlib.contextmanager
def _munge(folder: Path, environ: dict[str, str]) -> Iterator[None]:
    """munged, unless one is running."""
    if subprocess.run(["munge", "-n"], env=environ, capture_output=True).returncode == 0:
        yield
        return
    user = pwd.getpwnam("munge")
    Path("/run/munge").mkdir(exist_ok=True)
    os.chown("/run/munge", user.pw_uid, user.pw_gid)
    with (folder / "munged.log").open("w") as log:
        process = subprocess.Popen(
            [*MORTAL, "runuser", "-u", "munge", "--", "munged", "--foreground"], stdout=log, stderr=log
        )
    try:
        _wait_for(lambda: subprocess.run(["munge", "-n"], env=environ, capture_output=True).returncode == 0, folder)
        yield
    finally:
        _end(process)


def _idle_nodes(environ: dict[str, str]) -> int:
    done = subprocess.run(["sinfo", "-h", "-t", "idle", "-o", "%D"], env=environ, capture_output=True, text=True)
    return int(done.stdout.strip() or 0)


def _wait_for(ready, folder: Path, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > end:
            logs = "\n".join(f"{path.name}:\n{path.read_text()[-1500:]}" for path in folder.glob("*.log"))
            raise AssertionError(f"the cluster did not come up in {seconds} s\n{logs}")
        time.sleep(0.2)


def _end(process: subprocess.Popen) -> None:
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
