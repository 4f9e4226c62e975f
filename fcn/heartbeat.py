"""Signs of life of every rank, so that a run that hangs can name the rank that hung and what it was doing."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from fcn import distributed
from fcn.distributed import World

T = TypeVar("T")
PACKAGE = Path(__file__).parent
WAITING = ("torch/distributed/", "torch/autograd/", str(PACKAGE / "distributed.py"), str(PACKAGE / "heartbeat.py"))
"""Where a rank that waits for others stands: in a collective, in a backward pass that exchanges gradients, or already
asking who is to blame."""


PATIENCE_S = 5.0
"""For an answer of the board; it has one in milliseconds."""


class Sign(NamedTuple):
    """What a rank last said of itself."""

    count: int
    """Signs given so far."""
    place: str
    """Functions of this program that the main thread is in, outermost first, with file and line of the last one."""
    since_s: float
    """Seconds at that place."""
    waiting: bool
    """Whether it is waiting for other ranks there."""
    host: str
    pid: int


class Heartbeat:
    """A thread that publishes a sign of life of this rank every `interval_s`, from a look at the main thread's stack.

    The main thread does nothing for it. With one process there is nothing to do.
    """

    def __init__(self, world: World, interval_s: float = 1.0) -> None:
        self.world, self.interval_s = world, interval_s
        self._board = distributed.blackboard()
        self._lost = False
        """Whether the board could not be reached."""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        if self._board:
            self._thread.start()

    def _beat(self) -> None:
        count, place, began = 0, "", time.monotonic()
        while True:
            here, waiting = whereabouts(threading.main_thread().ident)
            if here != place:
                place, began = here, time.monotonic()
            count += 1
            sign = Sign(count, place, time.monotonic() - began, waiting, socket.gethostname(), os.getpid())
            try:
                self._board.put(f"sign/{self.world.rank}", json.dumps(sign))
            except RuntimeError:  # the process that keeps the board is gone, and so is the run
                return
            if self._stop.wait(self.interval_s):
                return

    def last_words(self, cause: str) -> None:
        """Tell the other ranks why this one leaves."""
        if self._board:
            with contextlib.suppress(RuntimeError):
                self._ask(lambda: self._board.put(f"words/{self.world.rank}", cause))

    def speaks(self) -> bool:
        """Whether this rank is the one that tells the user; each does that cannot reach the others."""
        with contextlib.suppress(RuntimeError):
            return self._ask(lambda: self._board.is_first("speaker"))
        return True

    def diagnose(self) -> str:
        """After a collective failed: which rank is to blame, and what it was doing.

        Looks twice, so that ranks that have stopped are told from those that wait, whatever their clocks say.
        """
        others = [rank for rank in range(self.world.size) if rank != self.world.rank]
        try:
            words = self._ask(lambda: {rank: self._board.get(f"words/{rank}") for rank in others})
            said = {rank: text for rank, text in words.items() if text}
            if said:
                return "; ".join(f"rank {rank} failed: {text}" for rank, text in said.items())
            before = self._ask(lambda: {rank: self._sign(rank) for rank in others})
            time.sleep(3 * self.interval_s)
            after = self._ask(lambda: {rank: self._sign(rank) for rank in others})
        except RuntimeError:
            return "the host of the process group cannot be reached: it is down, or the network is cut"
        silent = [rank for rank in others if before[rank] == after[rank]]
        busy = [rank for rank in others if after[rank] and not after[rank].waiting]
        if silent:
            return "; ".join(_describe(rank, after[rank], "gives no sign of life") for rank in silent)
        if busy:
            return "; ".join(_describe(rank, after[rank], "did not come") for rank in busy)
        return "every rank is alive and waits for the others: the network may be cut, or train.timeout is too short"

    def _sign(self, rank: int) -> Sign | None:
        text = self._board.get(f"sign/{rank}")
        return Sign(*json.loads(text)) if text else None

    def _ask(self, question: Callable[[], T]) -> T:
        """The board's answer; RuntimeError if there is none soon, and at once if there was none before."""
        if not self._lost:
            try:
                return within(PATIENCE_S, question)
            except RuntimeError:
                self._lost = True
        raise RuntimeError("the board cannot be reached")

    def close(self) -> None:
        """Stop before the process group does."""
        self._stop.set()
        if self._board:
            self._thread.join(PATIENCE_S)


def within(seconds: float, action: Callable[[], T]) -> T:
    """What `action` returns, or RuntimeError when that takes longer.

    The store's own time limit covers a host that has no answer, not one that a cut network hides: TCP then waits for
    a quarter of an hour. The thread that is left behind holds up no exit.
    """
    results: queue.SimpleQueue[tuple[Any, RuntimeError | None]] = queue.SimpleQueue()

    def act() -> None:
        try:
            results.put((action(), None))
        except RuntimeError as error:
            results.put((None, error))

    threading.Thread(target=act, daemon=True).start()
    try:
        result, error = results.get(timeout=seconds)
    except queue.Empty:
        raise RuntimeError(f"no answer within {seconds:g} s") from None
    if error:
        raise error
    return result


def whereabouts(thread: int | None) -> tuple[str, bool]:
    """(place of a thread in this program, whether it waits for other ranks there); see `Sign`."""
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


def _describe(rank: int, sign: Sign | None, what: str) -> str:
    if sign is None:
        return f"rank {rank} {what}; it was starting up"
    return f"rank {rank} (process {sign.pid} on {sign.host}) {what}; it was in {sign.place} for {sign.since_s:.0f} s"
