"""Weights & Biases: one W&B run for all starts of a training run, kept by a process of its own.

The trainer passes on records and pictures and never waits for W&B: its library, server and service belong to a child
process. That process notices the end of the trainer, however it happens, because its input ends.

W&B gets one row for each step, with all records of the step, when a later step begins or the run is finished. So it has
complete rows without gaps, and the number of the last one says what is missing: that comes from metrics.jsonl. Steps
that a resumed run repeats are not sent again. If the server does not answer or refuses, everything is recorded in files
that are uploaded later, by the next start or by

    python -m fcn.tracking.wandb_tracker RUN_DIR
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import pickle
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import yaml

from fcn.arguments import Parser
from fcn.errors import InputError
from fcn.tracking.plots import resized
from fcn.tracking.records import Record, read_records, read_summary
from fcn.tracking.tracker import Scores, Tracker
from fcn.tracking.wandb_process import (
    ARTIFACT_S,
    CHECKOUT,
    FINISHED_S,
    STOPPED_S,
    SYNC_S,
    WandbStart,
    how_to_upload,
    unsynced,
)

SERVER_S = 20
"""Seconds that a start waits for the server before it records offline, unless WANDB_INIT_TIMEOUT says otherwise."""
MOST_WAITING, MOST_PICTURES = 10_000, 4
"""Most records, and evaluations with pictures, that wait for a stuck process. More pictures are dropped."""
SIDE = 640
"""Longest side of an image in W&B, in pixels."""


class WandbTracker(Tracker):
    """The trainer's side: a queue, and a thread that feeds the process from it.

    Args:
        say: shows a line to the user.
        warn: shows and records a warning.
    """

    def __init__(self, start: WandbStart, say: Callable[[str], None], warn: Callable[[str], None]) -> None:
        self.start, self.say, self.warn = start, say, warn
        self._queue: queue.Queue[tuple[str, Any]] = queue.Queue(MOST_WAITING)
        self._queue.put(("start", start))
        self._behind = False
        self._pictures = threading.Semaphore(MOST_PICTURES)
        self._process: subprocess.Popen[bytes] | None = None
        self._ended = threading.Event()
        """The process has sent its last message, or is gone."""
        self._closed = False
        self._left: str | None = None
        threading.Thread(target=self._feed, name="W&B input", daemon=True).start()
        atexit.register(self.finish, None, STOPPED_S)  # an error ends the run

    def log(self, record: Record) -> None:
        self._put(("record", record))

    def show(self, scores: Scores) -> None:
        if self._pictures.acquire(blocking=False):
            shapes = [sample.labels.shape for sample in scores.samples]
            samples = [resized(s, shape, min(1.0, SIDE / max(shape))) for s, shape in zip(scores.samples, shapes)]
            self._put(("scores", scores._replace(samples=samples)))

    def alert(self, title: str, text: str) -> None:
        self._put(("alert", (title, text)))

    def close(self, summary: Record) -> None:
        limit = STOPPED_S
        if summary["status"] == "finished":
            limit = ARTIFACT_S if self.start.artifact else FINISHED_S
        self.finish(summary, limit)

    def _put(self, message: tuple[str, Any]) -> None:
        if self._behind:
            return
        try:
            self._queue.put_nowait(message)
        except queue.Full:  # W&B has the first steps, and the next start can send the others
            self._behind = True
            self.warn("W&B takes no more records; training goes on without; metrics.jsonl has them all")

    def finish(self, summary: Record | None, limit: int) -> None:
        """Wait at most `limit` seconds for pending writes and uploads."""
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self.finish)
        deadline = time.monotonic() + limit + 1
        with contextlib.suppress(queue.Full):
            self._queue.put_nowait(("end", (summary, limit)))
        if not self._ended.wait(limit + 1):
            self._left = how_to_upload(self.start.run_dir)
        if self._process:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(max(0.5, min(2.0, deadline - time.monotonic())))
            self._process.kill()  # W&B's own service leaves with it
        if self._left:
            self.say(self._left)

    def _feed(self) -> None:
        """In a thread: start the process and write what is in the queue."""
        try:
            self._process = _spawn(self.start.run_dir)
            threading.Thread(target=self._listen, args=(self._process.stdout,), name="W&B output", daemon=True).start()
            kind = None
            while kind != "end":
                kind, content = self._queue.get()
                pickle.dump((kind, content), self._process.stdin)
                self._process.stdin.flush()
                if kind == "scores":
                    self._pictures.release()
        except OSError as error:  # the process is gone, which `_listen` notices, or could not be started
            if self._process is None:
                self.warn(f"W&B cannot be started; training goes on without ({error})")
                self._ended.set()
            self._behind = True

    def _listen(self, outbox: BinaryIO) -> None:
        """In a thread: receive messages from the process, one JSON object per line."""
        for message in map(json.loads, outbox):
            if "left" in message:
                self._left = message["left"]
                break
            (self.warn if message["warning"] else self.say)(message["say"])
        else:
            if not self._closed:
                self.warn("W&B's process ended; training goes on without")
        self._behind = True
        self._ended.set()


def _spawn(run_dir: Path) -> subprocess.Popen[bytes]:
    """Start the process in a session of its own, so that it does not get the trainer's signals."""
    environ = {
        "WANDB_INIT_TIMEOUT": str(SERVER_S),
        "WANDB_DATA_DIR": str(run_dir.absolute() / "wandb"),  # what waits to be uploaded stays with the run
        **os.environ,
        "WANDB_ERROR_REPORTING": "false",  # else W&B's library reports to its maker, and waits for that
        "PYTHONPATH": os.pathsep.join(filter(None, (str(CHECKOUT), os.environ.get("PYTHONPATH")))),
    }
    environ.pop("WANDB_SERVICE", None)
    return subprocess.Popen(
        [sys.executable, "-c", "from fcn.tracking.wandb_process import main; main()"],
        env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip


def upload(run_dir: Path) -> int:
    """Upload what the server lacks of a run that has ended; returns the exit status.

    Raises:
        InputError: the directory is not that of a run, or W&B has recorded nothing there.
    """
    if not (run_dir / "config.yaml").is_file():
        raise InputError(f"{run_dir}: no config.yaml; give a directory that training wrote")
    locks = sorted((run_dir / "wandb").glob(".*.lock"), key=lambda path: path.stat().st_mtime)
    if not locks:
        raise InputError(f"{run_dir}: W&B has recorded nothing here")
    config = yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8"))
    run_id, options = locks[-1].stem.removeprefix("."), config["wandb"] | {"mode": "online"}
    start = WandbStart(
        **options, run_dir=run_dir, run_id=run_id, config=config, environment={},
        records=read_records(run_dir / "metrics.jsonl"), program=sys.argv[0], trainer=os.getpid(),
    )  # fmt: skip
    tracker = WandbTracker(start, print, lambda text: print(f"warning: {text}"))
    tracker.finish(read_summary(run_dir) or {"status": "stopped"}, SYNC_S)
    return 1 if unsynced(run_dir, run_id) else 0


def main() -> int:
    parser = Parser(prog="python -m fcn.tracking.wandb_tracker", description="Upload what W&B's server lacks of a run.")
    parser.add_run_dir()
    try:
        return upload(Path(parser.parse_args().run_dir))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
