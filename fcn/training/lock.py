"""One run at a time in a run directory."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from fcn import distributed
from fcn.errors import InputError
from fcn.files import must_be_writable, read_text
from fcn.tracking import TIME_FORMAT, Console, record_failure
from fcn.training.run import Run

LOCK = "lock"
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""How file systems say that they have none."""
MOST_BYTES = 10_000
"""Of the file, which has a line."""
PATIENCE_S = 30
"""How long a run waits for one that may be about to leave, such as the same one before it was started again."""


@contextlib.contextmanager
def lock_run_dir(run: Run, console: Console) -> Iterator[None]:
    """Inside, no other run can use this run's directory; rank 0 holds a lock on a file there.

    The kernel gives the lock back when the process ends, however it ends, and an NFS server does so for a machine that
    is gone. A file system that has no locks is used without, after a warning.

    Raises:
        InputError: on every rank, if another run is there and does not end soon.
    """
    patience = min(PATIENCE_S, run.config.train.timeout / 2)
    file = distributed.run_on_all_ranks(lambda: _lock(run, console, patience) if run.context.rank == 0 else None)
    _warn_if_not_shared(run, console)
    try:
        yield
    finally:
        if file:
            file.close()


def _warn_if_not_shared(run: Run, console: Console) -> None:
    """Say if machines have run directories of their own, by what rank 0 has just written into the lock's file."""
    path = run.folder / LOCK

    def read() -> str:
        with contextlib.suppress(OSError, ValueError):
            return read_text(path, MOST_BYTES, errors="replace")
        return ""

    wanted, deadline = distributed.all_gather_object(read())[0], time.monotonic() + 2
    while read() != wanted and time.monotonic() < deadline:  # NFS shows a new file after a while
        time.sleep(0.2)
    hosts = distributed.all_gather_object(None if read() == wanted else socket.gethostname())
    apart = [f"rank {rank} on {host}" for rank, host in enumerate(hosts) if host]
    if apart:
        console.warning(
            f"run_dir: {run.folder} is another folder for {', '.join(apart[:4])}{' and more' * (len(apart) > 4)}; only "
            f"rank 0's has checkpoints, and a resume needs rank 0 there; use an absolute path on a shared file system"
        )


def _lock(run: Run, console: Console, patience: float) -> BinaryIO | None:
    with must_be_writable(f"run_dir: {run.folder}"):
        file = (run.folder / LOCK).open("ab+")
    deadline = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() < deadline:
                time.sleep(0.2)
                continue
            file.close()
            raise InputError(
                f"{run.folder}: another run is there{_holder(run.folder / LOCK)}; stop it first, or choose another "
                f"run_dir"
            ) from None
        except OSError as error:
            file.close()
            if error.errno not in NO_LOCKS:
                raise
            console.warning(
                f"{run.folder}: this file system has no locks ({error.strerror}); make sure that no other run "
                f"uses this directory"
            )
            return None
        break
    me = {"host": socket.gethostname(), "pid": os.getpid(), "job": run.context.job, "since": time.strftime(TIME_FORMAT)}
    with contextlib.suppress(OSError):  # a full disk: the lock holds all the same
        file.truncate(0)
        file.write(json.dumps(me).encode() + b"\n")
        file.flush()
    return file


def record_failure_if_idle(folder: Path, text: str) -> None:
    """Write why a run could not start into the directory of its earlier starts, unless a run is there now."""
    with contextlib.suppress(OSError), (folder / LOCK).open("rb+") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        record_failure(folder, text)


def _holder(path: Path) -> str:
    """Who says in the file that it holds the lock."""
    try:
        found = json.loads(read_text(path, MOST_BYTES, errors="replace"))
        job = f", SLURM job {found['job']}" if found["job"] else ""
        return f": process {found['pid']} on {found['host']}{job}, since {found['since']}"
    except (OSError, ValueError, TypeError, KeyError):
        return ""
