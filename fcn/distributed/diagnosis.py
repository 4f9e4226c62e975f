"""After a collective failed: find the rank that is to blame, and what it was doing."""

from __future__ import annotations

import contextlib
import json
import queue
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from fcn.distributed.heartbeat import Heartbeat, HeartbeatRecord
from fcn.distributed.process_group import DistributedContext, status_store

T = TypeVar("T")

INTERVAL_S = 1.0
PATIENCE_S = 5.0
"""How long to wait for the store, which answers in milliseconds."""


class Diagnosis:
    """Publishes this rank's heartbeat to the store, and reads the others' when something went wrong.

    With one process there is nothing to do.
    """

    def __init__(self, context: DistributedContext, interval_s: float = INTERVAL_S) -> None:
        self.context = context
        self._store = status_store()
        self._lost = False
        """Whether the store could not be reached."""
        self._heartbeat = Heartbeat(context, self._publish, interval_s)
        if self._store:
            self._heartbeat.start()

    def _publish(self, record: HeartbeatRecord) -> None:
        self._store.put(f"heartbeat/{self.context.rank}", json.dumps(record))

    def last_words(self, cause: str) -> None:
        """Tell the other ranks why this one exits."""
        if self._store:
            with contextlib.suppress(RuntimeError):
                self._ask(lambda: self._store.put(f"words/{self.context.rank}", cause))

    def speaks(self) -> bool:
        """Whether this rank prints the message. A rank that cannot reach the others always does."""
        with contextlib.suppress(RuntimeError):
            return self._ask(lambda: self._store.is_first("speaker"))
        return True

    def diagnose(self) -> str:
        """Which rank is to blame, and what it was doing.

        It looks twice, to tell ranks that have stopped from those that wait, without comparing clocks.
        """
        others = [rank for rank in range(self.context.size) if rank != self.context.rank]
        try:
            words = self._ask(lambda: {rank: self._store.get(f"words/{rank}") for rank in others})
            said = {rank: text for rank, text in words.items() if text}
            if said:
                return "; ".join(f"rank {rank} failed: {text}" for rank, text in said.items())
            before = self._ask(lambda: {rank: self._read(rank) for rank in others})
            time.sleep(3 * self._heartbeat.interval_s)
            after = self._ask(lambda: {rank: self._read(rank) for rank in others})
        except RuntimeError:
            return "the host of the process group cannot be reached: it is down, or the network is cut"
        silent = [rank for rank in others if before[rank] == after[rank]]
        busy = [rank for rank in others if after[rank] and not after[rank].waiting]
        if silent:
            return "; ".join(_describe(rank, after[rank], "sends no heartbeat") for rank in silent)
        if busy:
            return "; ".join(_describe(rank, after[rank], "did not come") for rank in busy)
        return "every rank is alive and waits for the others: the network may be cut, or train.timeout is too short"

    def _read(self, rank: int) -> HeartbeatRecord | None:
        text = self._store.get(f"heartbeat/{rank}")
        return HeartbeatRecord(*json.loads(text)) if text else None

    def _ask(self, question: Callable[[], T]) -> T:
        """The store's answer; RuntimeError if it takes too long, or did so before."""
        if not self._lost:
            try:
                return within(PATIENCE_S, question)
            except RuntimeError:
                self._lost = True
        raise RuntimeError("the store cannot be reached")

    def close(self) -> None:
        """Stop before the process group does."""
        self._heartbeat.stop(PATIENCE_S)


def within(seconds: float, action: Callable[[], T]) -> T:
    """Return what `action` returns, or raise RuntimeError if that takes longer.

    The store's own time limit covers a host that does not answer, but not one behind a cut network: TCP then waits for
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


def _describe(rank: int, record: HeartbeatRecord | None, what: str) -> str:
    if record is None:
        return f"rank {rank} {what}; it was starting up"
    return (
        f"rank {rank} (process {record.pid} on {record.host}) {what}; "
        f"it was in {record.place} for {record.since_s:.0f} s"
    )
