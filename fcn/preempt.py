"""Signals become a flag. Saving happens later, at a step boundary on which all ranks agree."""

from __future__ import annotations

import signal

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopFlag:
    """`flag()` is whether a signal has asked this process to save and leave; a second SIGINT leaves at once."""

    def __init__(self) -> None:
        self.received: set[int] = set()

    def __call__(self) -> bool:
        return bool(self.received)

    def listen(self) -> StopFlag:
        for number in SIGNALS:
            signal.signal(number, self._on_signal)
        return self

    def _on_signal(self, number: int, frame: object) -> None:
        if number == signal.SIGINT and number in self.received:
            raise KeyboardInterrupt
        self.received.add(number)
