"""A small file of each rank that says what it is doing, to be read from outside: RUN_DIR/heartbeat/rank_00003.json."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from fcn.distributed import World
from fcn.heartbeat import whereabouts

INTERVAL_S = 10.0


class Sign(NamedTuple):
    """What a rank's file says."""

    rank: int
    world_size: int
    host: str
    pid: int
    launcher: str
    job: str | None
    """SLURM's number of the job."""
    started: float
    """When the processes of this start of the run began, by the clock of rank 0; the same on all ranks."""
    written: float
    """Seconds since the epoch."""
    interval_s: float
    """Time to the next sign."""
    state: str
    """running, finished, preempted, or failed with its cause."""
    step: int
    """Finished steps."""
    steps: int
    place: str
    """Functions of this program that the main thread is in, see `heartbeat.whereabouts`."""
    since_s: float
    """Seconds at that place."""
    waiting: bool
    """Whether it waits for other ranks there."""
    own_s: float | None
    """Seconds of a step without waiting for other ranks, of late."""
    data_s: float | None
    """Seconds that a step has waited for its data."""


class Pulse:
    """Writes this rank's file every `interval_s` from a thread, and once more at the end, with how it ended.

    The training loop only sets attributes. A folder that is gone or full stops nothing: the next sign tries again.
    """

    def __init__(self, folder: Path, world: World, started: float, step: int, steps: int) -> None:
        self.folder, self.world, self.started = folder / "heartbeat", world, started
        self.step, self.steps = step, steps
        # A thousand files that change at once are hard on a shared disk.
        self.interval_s = max(INTERVAL_S, world.size / 25)
        self.own_s: float | None = None
        self.data_s: float | None = None
        self.state = "running"
        self._place, self._since = "", time.monotonic()
        self._main = threading.main_thread().ident
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="pulse", daemon=True)

    def __enter__(self) -> Pulse:
        with contextlib.suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            if self.world.rank == 0:
                for path in self.folder.glob("rank_*.json"):  # of a start with more ranks
                    if int(path.stem.removeprefix("rank_")) >= self.world.size:
                        path.unlink(missing_ok=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is not None:
            first = (str(error).splitlines() or [""])[0]
            self.state = f"failed: {kind.__name__ if kind else ''}: {first}"
        self._over.set()
        self._thread.join()

    def _beat(self) -> None:
        while not self._over.wait(self.interval_s if self._place else 0):
            self._write()
        self._write()

    def _write(self) -> None:
        place, waiting = whereabouts(self._main)
        if place != self._place:
            self._place, self._since = place, time.monotonic()
        sign = Sign(
            self.world.rank, self.world.size, socket.gethostname(), os.getpid(), self.world.launcher, self.world.job,
            self.started, time.time(), self.interval_s, self.state, self.step, self.steps, place,
            time.monotonic() - self._since, waiting, self.own_s, self.data_s,
        )  # fmt: skip
        path = self.folder / f"rank_{self.world.rank:05d}.json"
        temporary = path.with_name(f".{path.name}.tmp")
        with contextlib.suppress(OSError):
            temporary.write_text(json.dumps(sign._asdict()) + "\n", encoding="utf-8")
            temporary.replace(path)


def read_signs(folder: Path) -> list[Sign]:
    """The signs of the newest start of a run, by rank; of files that cannot be read there are none."""
    signs = []
    for path in sorted((folder / "heartbeat").glob("rank_*.json")):
        with contextlib.suppress(OSError, ValueError, TypeError):
            values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            signs.append(Sign(**values))
    newest = max((sign.started for sign in signs), default=0.0)
    return [sign for sign in signs if sign.started == newest]
