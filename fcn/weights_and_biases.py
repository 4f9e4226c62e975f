"""Weights & Biases: one W&B run for all starts of a training run, kept by a process of its own.

The trainer hands records and pictures over and never waits for W&B: its library, its server and its service belong to
a child process, which learns of the trainer's end, however it came, from the end of its input.

W&B gets a row for each step, all records of the step in one, when a later step begins or the run is finished. So it
has whole rows, from the first step on without a gap, and the number of its last one says what it lacks: that is taken
from metrics.jsonl, and steps that a resumed run does again are not sent again. Where the server does not answer, or
refuses, everything is recorded in files for `wandb sync`.

    python -m fcn.weights_and_biases RUN_DIR

sends what a server that left in the middle of a run did not get.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import json
import os
import pickle
import platform
import queue
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import yaml
from PIL import Image

from fcn.tracking import Record, Sample, Scores, read_records, read_summary
from fcn.wandb_process import ARTIFACT_S, CHECKOUT, FINISHED_S, STOPPED_S, SYNC_S, Start, how_to_sync, unsynced

if TYPE_CHECKING:
    from fcn.distributed import World

SERVER_S = 20
"""How long a start waits for the server before it records offline, unless WANDB_INIT_TIMEOUT says otherwise."""
MOST_WAITING, MOST_PICTURES = 10_000, 4
"""Records, and evaluations with pictures, that wait for a process that is stuck. Pictures beyond are dropped."""
SIDE = 640
"""Longest side of an image in W&B, in pixels."""


def environment(world: World) -> Record:
    """Versions, machine and processes of a start."""
    import torch

    cuda = world.device.type == "cuda"
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        "host": socket.gethostname(),
        "device": torch.cuda.get_device_name(world.device) if cuda else "CPU",
        "launcher": world.launcher,
        "processes": world.size,
        **({"slurm_job": world.job} if world.job else {}),
    }


class WandB:
    """The trainer's end: a queue, and a thread that feeds the process. `say` shows a line to the user."""

    def __init__(self, start: Start, say: Callable[[str], None]) -> None:
        self.start, self.say = start, say
        self._queue: queue.Queue[Any] = queue.Queue(MOST_WAITING)
        self._behind = False
        self._pictures = threading.Semaphore(MOST_PICTURES)
        self._process: subprocess.Popen[bytes] | None = None
        self._ended = threading.Event()
        """The process has said its last word, or is gone."""
        self._closed = False
        self._left: str | None = None
        threading.Thread(target=self._feed, name="W&B", daemon=True).start()
        atexit.register(self.finish, None, STOPPED_S)  # an error ends the run

    def log(self, record: Record) -> None:
        self._put(("record", record))

    def show(self, scores: Scores) -> None:
        if self._pictures.acquire(blocking=False):
            samples = [_reduced(sample) for sample in scores.samples]
            self._put(("scores", scores._replace(samples=samples)))

    def alert(self, title: str, text: str) -> None:
        self._put(("alert", (title, text)))

    def flush(self) -> None:
        pass  # nobody waits for W&B

    def close(self, summary: Record) -> None:
        limit = STOPPED_S
        if summary["status"] == "finished":
            limit = ARTIFACT_S if self.start.artifact else FINISHED_S
        self.finish(summary, limit)

    def _put(self, message: Any) -> None:
        if self._behind:
            return
        try:
            self._queue.put_nowait(message)
        except queue.Full:  # of a run on which W&B has the first steps, the next start can send the others
            self._behind = True
            self.say("warning: W&B takes no more records; training goes on without; metrics.jsonl has them all")

    def finish(self, summary: Record | None, limit: int) -> None:
        """Wait so many seconds at most for what is still to be written and uploaded."""
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self.finish)
        deadline = time.monotonic() + limit + 1
        with contextlib.suppress(queue.Full):
            self._queue.put_nowait(("end", (summary, limit)))
        if not self._ended.wait(limit + 1):
            self._left = how_to_sync(self.start.run_dir, self.start.run_id, whole=False)
        if self._process:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(max(0.5, min(2.0, deadline - time.monotonic())))
            self._process.kill()  # W&B's own service leaves with it
        if self._left:
            self.say(self._left)

    def _feed(self) -> None:
        """In a thread: start the process, write what is in the queue."""
        try:
            self._process = _spawn(self.start.run_dir)
            threading.Thread(target=self._listen, args=(self._process.stdout,), name="W&B's words", daemon=True).start()
            inbox = self._process.stdin
            pickle.dump(dataclasses.asdict(self.start), inbox)
            inbox.flush()
            while True:
                message = self._queue.get()
                pickle.dump(message, inbox)
                inbox.flush()
                if message[0] == "scores":
                    self._pictures.release()
                if message[0] == "end":
                    return
        except OSError as error:  # the process is gone, which its other end tells; or there never was one
            if self._process is None:
                self.say(f"warning: W&B cannot be started; training goes on without ({error})")
                self._ended.set()
            self._behind = True

    def _listen(self, outbox: BinaryIO) -> None:
        """In a thread: what the process has to say, one JSON object a line."""
        left = None
        for line in outbox:
            words = json.loads(line)
            if "left" in words:
                left = words
                break
            self.say(words["say"])
        if left:
            self._left = left["left"]
        elif not self._closed:
            self.say("warning: W&B's process ended; training goes on without")
        self._behind = True
        self._ended.set()


def _reduced(sample: Sample) -> Sample:
    """Image and labels in one size, small enough to be many."""
    height, width = sample.labels.shape
    scale = min(1.0, SIDE / max(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    image = np.asarray(Image.fromarray(sample.image).resize(size, Image.Resampling.BILINEAR))
    labels, predictions = (
        np.asarray(Image.fromarray(part.astype(np.uint8)).resize(size, Image.Resampling.NEAREST))
        for part in (sample.labels, sample.predictions)
    )
    return Sample(image, labels, predictions, sample.caption)


def _spawn(run_dir: Path) -> subprocess.Popen[bytes]:
    """The process, in a session of its own: signals to the trainer are not for it."""
    environ = {
        "WANDB_INIT_TIMEOUT": str(SERVER_S),
        "WANDB_DATA_DIR": str(run_dir.absolute() / "wandb"),  # what waits to be uploaded stays with the run
        **os.environ,
        "WANDB_ERROR_REPORTING": "false",  # else W&B's library reports to its maker, and waits for that
        "PYTHONPATH": os.pathsep.join(filter(None, (str(CHECKOUT), os.environ.get("PYTHONPATH")))),
    }
    environ.pop("WANDB_SERVICE", None)
    return subprocess.Popen(
        [sys.executable, "-c", "from fcn.wandb_process import main; main()"],
        env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip


def upload(run_dir: Path) -> int:
    """Send what the server does not have of a run that is over; returns the exit status."""
    config = yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8"))
    locks = sorted((run_dir / "wandb").glob(".*.lock"), key=lambda path: path.stat().st_mtime)
    if not locks:
        print(f"error: {run_dir}: W&B has recorded nothing here", file=sys.stderr)
        return 2
    run_id = locks[-1].stem.removeprefix(".")
    records, options = read_records(run_dir / "metrics.jsonl"), config["wandb"] | {"mode": "online"}
    start = Start(
        **options, run_dir=run_dir, run_id=run_id, config=config, environment={}, records=records,
        program=sys.argv[0], trainer=os.getpid(),
    )  # fmt: skip
    tracker = WandB(start, print)
    tracker.finish(read_summary(run_dir) or {"status": "stopped"}, SYNC_S)
    return 1 if unsynced(run_dir, run_id) else 0


if __name__ == "__main__":
    if len(sys.argv) != 2 or not (Path(sys.argv[1]) / "config.yaml").is_file():
        sys.exit("usage: python -m fcn.weights_and_biases RUN_DIR")
    sys.exit(upload(Path(sys.argv[1])))
