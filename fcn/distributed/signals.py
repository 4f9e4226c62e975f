"""Signals set a flag. Saving happens later, at a step boundary that all ranks agree on."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
PR_SET_PDEATHSIG = 1
"""Of Linux's prctl."""


def leave_at_once(status: int) -> None:
    """End this process and its loader workers immediately."""
    for worker in multiprocessing.active_children():
        worker.kill()
    os._exit(status)


def end_with_launcher() -> None:
    """Get SIGTERM when torchrun or SLURM's daemon is killed, which then passes on no signal: no rank stays alone.

    Before `StopFlag.listen` it ends the process, afterwards the run is saved first. A process that was started by hand
    may outlive its shell.
    """
    if _launched() and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _launched() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ or "SLURM_STEP_NUM_TASKS" in os.environ


def _grace_s() -> float:
    """What torchrun would leave to a process between SIGTERM and SIGKILL."""
    return float(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "30"))


def end_with_creator() -> None:
    """Let this process of `multiprocessing` end, by a thread, as soon as the process that asked for it is gone.

    It comes from a fork server. Its parent is that server, which lives as long as any of its processes.
    """

    def wait() -> None:
        creator = multiprocessing.parent_process()
        if creator is not None:
            creator.join()
            os._exit(1)

    threading.Thread(target=wait, name="end with creator", daemon=True).start()


class StopFlag:
    """`flag()` says whether a signal asked this process to save and leave. A second SIGINT leaves immediately.

    So does a SIGTERM after a SIGINT, because torchrun turns the second Ctrl-C into one.
    """

    def __init__(self, leave: Callable[[int], None] = lambda number: leave_at_once(128 + number)) -> None:
        self.received: set[int] = set()
        self.leave = leave
        self.say: Callable[[str], None] = lambda text: None
        """Tells the user about a signal."""
        self.leave_early: Callable[[], None] | None = None
        """Ends the process while there is nothing to save: a first step may take minutes to compile or to be read."""

    def __call__(self) -> bool:
        return bool(self.received)

    def listen(self) -> StopFlag:
        """Receive signals in a thread, because a main thread that waits in a collective runs no Python handler."""
        inbox, self._outbox = socket.socketpair()
        self._launcher = os.getppid()
        self._outbox.setblocking(False)
        for number in SIGNALS:
            signal.signal(number, lambda *_: None)
        signal.set_wakeup_fd(self._outbox.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._receive, args=(inbox,), name="signals", daemon=True).start()
        return self

    def _receive(self, inbox: socket.socket) -> None:
        while numbers := inbox.recv(64):
            for number in numbers:
                if number in (signal.SIGINT, signal.SIGTERM) and signal.SIGINT in self.received:
                    self.leave(number)
                if number == signal.SIGTERM and _launched() and os.getppid() != self._launcher:
                    last_chance = threading.Timer(_grace_s(), self.leave, (number,))  # nobody else will end it
                    last_chance.daemon = True
                    last_chance.start()
                if number in SIGNALS:
                    first = not self.received
                    self.received.add(number)
                    leave_early = self.leave_early  # the main thread may take it away
                    if first and leave_early:
                        name = signal.Signals(number).name
                        self.say(f"{name}: leaving at once, as there is nothing to save yet")
                        leave_early()
                    elif first:
                        again = "; again to leave immediately" if number == signal.SIGINT else ""
                        self.say(f"{signal.Signals(number).name}: leaving after the next step, once it is saved{again}")
