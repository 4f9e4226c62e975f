"""Heartbeats: every rank keeps saying what it is doing, so that a run that hangs can name the rank and the place.

The same record goes to two places: every second to the store of the process group, for the other ranks, and every ten
seconds to RUN_DIR/heartbeat/rank_00003.json, for people. Needs no PyTorch, so that `python -m fcn status` starts fast.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
import traceback
import typing
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple

from fcn.files import read_text, replacing

if TYPE_CHECKING:
    from fcn.distributed.process_group import DistributedContext

PACKAGE = Path(__file__).parents[1]
WAITING = ("torch/distributed/", "torch/autograd/", str(Path(__file__).parent))
"""Where a rank stands that waits for others: in a collective, in a backward pass that exchanges gradients, or already
asking which rank is missing."""
MOST_BYTES = 100_000
"""Of a file, which has less than one thousand."""
FILE_INTERVAL_S = 10.0


class HeartbeatRecord(NamedTuple):
    """What a rank says of itself."""

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
    """Time to the next record."""
    state: str
    """running, finished, preempted, or failed with its cause."""
    step: int
    """Finished steps."""
    steps: int
    place: str
    """Functions of this program that the main thread is in, outermost first, with file and line of the last one."""
    since_s: float
    """Seconds at that place."""
    waiting: bool
    """Whether it waits for other ranks there."""
    own_s: float | None
    """Seconds of a step without waiting for other ranks, lately."""
    data_s: float | None
    """Seconds that a step has waited for its data."""


class Heartbeat:
    """Calls `publish(record)` every `interval_s` from a thread. The main thread only sets attributes.

    As a context manager it publishes once more at the end, with how it ended. A `publish` that raises RuntimeError ends
    the thread, because its listener is gone.
    """

    def __init__(
        self, context: DistributedContext, publish: Callable[[HeartbeatRecord], None], interval_s: float
    ) -> None:
        self.context, self.publish, self.interval_s = context, publish, interval_s
        self.started = 0.0
        self.step = self.steps = 0
        self.own_s: float | None = None
        self.data_s: float | None = None
        self.state = "running"
        self._place, self._since = "", time.monotonic()
        self._main = threading.main_thread().ident
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def start(self) -> Heartbeat:
        self._thread.start()
        return self

    def stop(self, timeout_s: float | None = None) -> None:
        """Publish no more."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    __enter__ = start

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is not None:
            first = (str(error).splitlines() or [""])[0]
            self.state = f"failed: {kind.__name__ if kind else ''}: {first}"
        self.stop()
        self.publish(self.record())

    def _beat(self) -> None:
        with contextlib.suppress(RuntimeError):
            while True:
                self.publish(self.record())
                if self._stop.wait(self.interval_s):
                    return

    def record(self) -> HeartbeatRecord:
        """From a look at the main thread's stack."""
        place, waiting = whereabouts(self._main)
        if place != self._place:
            self._place, self._since = place, time.monotonic()
        context = self.context
        return HeartbeatRecord(
            context.rank, context.size, socket.gethostname(), os.getpid(), context.launcher, context.job,
            self.started, time.time(), self.interval_s, self.state, self.step, self.steps, place,
            time.monotonic() - self._since, waiting, self.own_s, self.data_s,
        )  # fmt: skip


def file_heartbeat(folder: Path, context: DistributedContext, started: float, step: int, steps: int) -> Heartbeat:
    """A heartbeat into RUN_DIR/heartbeat; a folder that is gone or full stops nothing, the next record tries again.

    Args:
        folder: the run's directory.
        started: when this start of the run began; the same on all ranks.
        step: finished steps.
        steps: the run's length.
    """
    folder = folder / "heartbeat"
    with contextlib.suppress(OSError, ValueError):  # ValueError: a file of somebody else's
        folder.mkdir(parents=True, exist_ok=True)
        if context.rank == 0:
            for path in folder.glob("rank_*.json"):  # of a start with more ranks
                if int(path.stem.removeprefix("rank_")) >= context.size:
                    path.unlink(missing_ok=True)

    def write(record: HeartbeatRecord) -> None:
        with contextlib.suppress(OSError), replacing(folder / f"rank_{record.rank:05d}.json", sync=False) as file:
            file.write(json.dumps(record._asdict()).encode() + b"\n")

    # A thousand files that change at the same time strain a shared disk.
    heartbeat = Heartbeat(context, write, max(FILE_INTERVAL_S, context.size / 25))
    heartbeat.started, heartbeat.step, heartbeat.steps = started, step, steps
    return heartbeat


def _fits(record: HeartbeatRecord) -> bool:
    """Whether the fields hold what they should: the file may be foreign."""
    kinds = typing.get_type_hints(HeartbeatRecord)
    accepted = {float: int | float, float | None: int | float | None}  # JSON may write 3 for 3.0
    fitting = (isinstance(value, accepted.get(kinds[key], kinds[key])) for key, value in record._asdict().items())
    return all(fitting) and all(0 <= value < 1e12 for value in record if isinstance(value, int | float))


def read_heartbeats(folder: Path) -> list[HeartbeatRecord]:
    """The newest start's records in a run's directory, by rank; files that cannot be read are left out."""
    found = []
    for path in sorted((folder / "heartbeat").glob("rank_*.json")):
        with contextlib.suppress(OSError, ValueError, TypeError):
            record = HeartbeatRecord(**json.loads(read_text(path, MOST_BYTES)))
            found += [record] if _fits(record) else []
    newest = max((record.started for record in found), default=0.0)
    return [record for record in found if record.started == newest]


def whereabouts(thread: int | None) -> tuple[str, bool]:
    """(place of a thread in this program, whether it waits for other ranks there); see `HeartbeatRecord`."""
    frame = sys._current_frames().get(thread or 0)
    frames = (
        [(at.f_code.co_filename, at.f_code.co_name, line) for at, line in traceback.walk_stack(frame)] if frame else []
    )
    ours = [at for at in frames if at[0].startswith(str(PACKAGE))]  # innermost first
    if not ours:
        return "start-up", False
    file, _, line = ours[0]
    place = " > ".join(name for _, name, _ in ours[2::-1])
    waiting = any(part in file for file, _, _ in frames[:4] for part in WAITING)
    return f"{place} ({Path(file).name}:{line})", waiting
