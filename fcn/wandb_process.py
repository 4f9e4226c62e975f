"""The process that alone has to do with W&B: its rows and pictures, its server, its recordings on the disk.

It hears from the trainer (`weights_and_biases.WandB`) through its standard input, pickled, and answers with lines.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import netrc
import os
import pickle
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TextIO
from urllib.parse import urlsplit

from fcn import pictures
from fcn.data.labels import IGNORE_INDEX, Classes
from fcn.tracking import Record, Sample, Scores

CHECKOUT = Path(__file__).resolve().parents[1]
FINISHED_S, ARTIFACT_S, STOPPED_S = 30, 300, 10
"""How long the end of a run waits for what is still to be uploaded: finished, finished with an artifact, stopped."""
SYNC_S = 900
"""How long the upload of what earlier starts recorded offline may take."""
OTHER_S = 30
"""How long to wait for the process of a start that was killed, which writes what it has."""
FLUSH_S = 1.0
"""Rows that are younger than this may not be in W&B's file after a kill. They are sent again by the next start."""
SKIPPED = "Steps without a finite loss are skipped"


@dataclass(frozen=True, slots=True)
class Start:
    """What the process for W&B needs to know."""

    mode: str
    """auto, online or offline."""
    project: str
    run_dir: Path
    run_id: str
    config: Record
    environment: Record
    """What runs where; changes from start to start. Empty where nothing runs."""
    records: list[Record]
    """Of the steps before this start."""
    artifact: bool
    """Whether best.pt is uploaded when the run is finished."""
    program: str
    trainer: int
    """Process id, for the system's metrics."""


def main() -> None:
    """Receive from the trainer until it has no more to say or is gone, and leave in bounded time."""
    inbox, outbox = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "w", buffering=1)
    words = _muted()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # a scheduler sends them to every process
    with contextlib.suppress(OSError):
        os.nice(5)
    start = Start(**pickle.load(inbox))

    def say(text: str) -> None:
        _tell(outbox, say=text)

    folder = start.run_dir / "wandb"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f".{start.run_id}.lock").open("w") as lock:
            _wait_for_the_one_before(lock)
            history = _open(start, say)
            summary, limit = _receive(history, start, inbox)
            left = _end(history, start, summary, limit, words)
    except Exception as error:
        say(f"warning: W&B failed; training goes on without ({type(error).__name__}: {_first_line(error)})")
        left = how_to_sync(start.run_dir, start.run_id, whole=False)
    _tell(outbox, left=left)
    os._exit(0)  # W&B's library would wait for its service, which leaves by itself


def _tell(outbox: TextIO, **words: str | None) -> None:
    with contextlib.suppress(OSError):  # nobody listens any more
        outbox.write(json.dumps(words) + "\n")


def _muted() -> BinaryIO:
    """Send what W&B prints, and its service, to a file without a name; returns that file."""
    words = tempfile.TemporaryFile()  # noqa: SIM115 - it is open as long as the process lives
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, number in ((nothing, 0), (words.fileno(), 1), (words.fileno(), 2)):
        os.dup2(source, number)
    return words


def _wait_for_the_one_before(lock: TextIO) -> None:
    """A start that was killed may have left its process, which still writes what it was given."""
    deadline = time.monotonic() + OTHER_S
    while time.monotonic() < deadline:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        time.sleep(0.1)


class History:
    """The rows of a W&B run: each step of the trainer once, whole, in order.

    `known` is the last step that W&B has.
    """

    def __init__(self, run: Any, known: int) -> None:
        self.run, self.known = run, known
        self._step: int = known
        self._row: Record = {}
        self._media: dict[str, Any] = {}
        self._skipped = 0

    def add(self, record: Record) -> None:
        """A record of the trainer; those of one step become one row."""
        skipped, before = record.get("skipped", self._skipped), self._skipped
        self._skipped = skipped
        if record["step"] <= self.known:
            return
        if record["step"] > self._step:
            self.send()
            self._step = record["step"]
        self._row |= row(record)
        if skipped > before == 0:
            self.run.alert(SKIPPED, f"step {record['step']}: {skipped} so far", level="WARN")

    def show(self, scores: Scores) -> None:
        """Pictures and tables, for the row of their record; those of a row that W&B has already are there too."""
        if scores.record["step"] == self._step > self.known:
            self._media |= media(scores)

    def send(self) -> None:
        """The row is whole."""
        if not self._row:
            return
        try:
            self.run.log({**self._row, **self._media}, step=self._step, commit=True)
        except Exception:  # it asks the server about tables, which may have gone by now
            self.run.log(self._row, step=self._step, commit=True)
        self.known, self._row, self._media = self._step, {}, {}


def row(record: Record) -> Record:
    """The numbers of a record by their names in W&B."""
    prefix = record["split"] if record["event"] == "eval" else "train"
    values = {f"{prefix}/{key}": value for key, value in record.items() if isinstance(value, int | float)}
    for key in ("step", "steps"):
        values.pop(f"{prefix}/{key}", None)
    if "faults" in record:
        values["train/replaced"] = len(record["faults"])
    scores = record.get("iou", {}).items()
    return values | {f"{prefix}/iou/{name}": value for name, value in scores if value is not None}


def media(scores: Scores) -> dict[str, Any]:
    """Per-class IoU and confusion matrix as tables, the matrix as a picture, images with masks to be switched on."""
    import wandb

    names, split = scores.classes.names, scores.record["split"]
    counts = scores.confusion_matrix.tolist()
    shown: dict[str, Any] = {
        f"{split}/iou_table": wandb.Table(["class", "iou"], [list(item) for item in scores.record["iou"].items()]),
        f"{split}/confusion_table": wandb.Table(
            ["label \\ prediction", *names], [[name, *pixels] for name, pixels in zip(names, counts, strict=True)]
        ),
        f"{split}/confusion": wandb.Image(pictures.confusion(scores.confusion_matrix, scores.classes)),
    }
    if scores.samples:
        shown[f"{split}/panels"] = [_panel(sample, scores.classes) for sample in scores.samples]
    return shown


def _panel(sample: Sample, classes: Classes) -> Any:
    import wandb

    labels = {**dict(enumerate(classes.names)), IGNORE_INDEX: "ignored"}
    masks = {
        name: {"mask_data": mask, "class_labels": labels}
        for name, mask in (("ground truth", sample.labels), ("prediction", sample.predictions))
    }
    return wandb.Image(sample.image, caption=sample.caption, masks=masks, file_type="jpg")


def _open(start: Start, say: Callable[[str], None]) -> History:
    """Find what W&B has of the run and send what it lacks of the steps before this start."""
    mode, before = start.mode, recordings(start.run_dir, start.run_id)
    if mode == "auto":
        mode = "online" if credentials() else "offline"
    if mode == "online":
        try:
            _log_in()
            _upload_recordings(start)
            history = _init(start, "online")
            say(f"W&B: {history.run.url}")
        except Exception as error:
            mode = "offline"
            _forget_the_attempt(start, before)
            folder = start.run_dir / "wandb"
            say(f"warning: W&B's server cannot be used ({_first_line(error)}); recording offline in {folder}")
    if mode == "offline":
        history = _init(start, "offline")
    if start.environment:
        where = start.environment | {"started": time.strftime("%Y-%m-%d %H:%M:%S")}
        history.run.config.update({**start.config, "environment": where, "git": _repositories()}, allow_val_change=True)
    for record in start.records:
        history.add(record)
    return history


def _log_in() -> None:
    """Ask the server whether it is there and knows the key, which takes ten seconds at most and asks nobody else."""
    import wandb

    if not wandb.login(verify=True):
        raise RuntimeError("not logged in; see `wandb login`")


def _init(start: Start, mode: str) -> History:
    """Start or continue the W&B run; raises what W&B does if the server is silent or refuses."""
    import wandb

    known = recorded_step(start.run_dir, start.run_id) if mode == "offline" else -1

    settings = wandb.Settings(
        console="off",
        program=start.program,
        x_stats_pid=start.trainer,
        x_transaction_log_flush_interval=FLUSH_S,
    )
    run = wandb.init(
        project=start.project, id=start.run_id, name=start.run_dir.name, dir=str(start.run_dir), mode=mode,
        resume="allow", settings=settings,
    )  # fmt: skip
    return History(run, known if mode == "offline" else max(run.starting_step, run.step) - 1)


def _forget_the_attempt(start: Start, before: list[Path]) -> None:
    """Make room for another start of the same W&B run; `before` are the recordings that are to stay."""
    import wandb

    def tear_down() -> None:
        with contextlib.suppress(Exception):
            wandb.teardown()

    attempts = set(recordings(start.run_dir, start.run_id)) - set(before)
    if attempts:
        _within(5, tear_down)
    for file in attempts:
        shutil.rmtree(file.parent, ignore_errors=True)


def _receive(history: History, start: Start, inbox: BinaryIO) -> tuple[Record | None, float]:
    """What the trainer sends, to its end; returns its summary, and how long the end may take."""
    while True:
        try:
            kind, content = pickle.load(inbox)
        except (EOFError, pickle.UnpicklingError, OSError):  # killed, perhaps in the middle of a message
            return None, STOPPED_S
        if kind == "end":
            return content
        if kind == "record":
            history.add(content)
        elif kind == "scores":
            history.show(content)
        elif kind == "alert":
            history.run.alert(content[0][:64], content[1], level="WARN")


def _end(history: History, start: Start, summary: Record | None, limit: float, words: BinaryIO) -> str | None:
    """Finish the W&B run within the limit; returns a line for the user if something is not uploaded."""
    run = history.run
    finished = summary is not None and summary["status"] == "finished"

    def finish() -> None:
        if finished:  # else the step may go on: the next start sends its row
            history.send()
        if summary:
            plain = {key: value for key, value in summary.items() if isinstance(value, int | float | str)}
            run.summary.update(plain | {"best": summary.get("best")})
        best = start.run_dir / "checkpoints" / "best.pt"
        if finished and start.artifact and best.exists():
            _log_artifact(run, best, summary)
        if summary and summary["status"] == "preempted":
            run.mark_preempting()
        run.finish(exit_code=0 if finished else 1)

    in_time = _within(limit, finish)
    if not run.offline and in_time and not _gave_up(words):  # what an earlier start did not upload, this one did
        for file in recordings(start.run_dir, start.run_id):
            if not _is_offline(file):
                file.with_name(f"{file.name}.synced").touch()
    return how_to_sync(start.run_dir, start.run_id)


def _log_artifact(run: Any, best: Path, summary: Record) -> None:
    import wandb

    artifact = wandb.Artifact(f"{run.id}-best", "model", metadata={"best": summary.get("best")})
    artifact.add_file(str(best), policy="immutable", skip_cache=True)  # no copy of a gigabyte
    run.log_artifact(artifact)


def _gave_up(words: BinaryIO) -> bool:
    """Whether W&B's service said that it stopped uploading."""
    words.seek(0)
    return b"will not be synced" in words.read()


def _within(seconds: float, action: Callable[[], None]) -> bool:
    """Whether an action came to its end in time. What it raises is raised here."""
    raised: list[Exception] = []

    def act() -> None:
        try:
            action()
        except Exception as error:
            raised.append(error)

    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    thread.join(seconds)
    if raised:
        raise raised[0]
    return not thread.is_alive()


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# --- recordings: folders under run_dir/wandb


def recordings(run_dir: Path, run_id: str) -> list[Path]:
    """W&B's files of a run, one for each start that came so far, the oldest first."""
    found = (run_dir / "wandb").glob(f"*run-*-{run_id}/run-{run_id}.wandb")
    return sorted(found, key=lambda path: path.parent.name.removeprefix("offline-"))


def recorded_step(run_dir: Path, run_id: str) -> int:
    """The last step that W&B's files have a row of; -1 if none has. A file may end in the middle of a record."""
    for file in reversed(recordings(run_dir, run_id)):
        if steps := list(_steps(file)):
            return max(steps)
    return -1


def _steps(file: Path) -> Iterator[int]:
    """The steps of a file's rows, read by W&B's own reader."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as reader:
        for line in reader.stdout:
            if b'"type":"history"' in line:
                yield json.loads(line)["history"]["step"].get("num", 0)


def unsynced(run_dir: Path, run_id: str) -> list[Path]:
    """The recordings that may hold what the server does not have."""
    files = recordings(run_dir, run_id)
    return [file for file in files if not file.with_name(f"{file.name}.synced").exists()]


def _is_offline(file: Path) -> bool:
    return file.parent.name.startswith("offline-")


def _upload_recordings(start: Start) -> None:
    """What earlier starts recorded offline comes before what this one will send.

    Raises:
        RuntimeError: it cannot be uploaded.
    """
    waiting = unsynced(start.run_dir, start.run_id)
    files = [file for file in waiting if _is_offline(file)]
    if not files:
        return
    if files != waiting and (steps := list(_steps(files[0]))):
        _fill(start, min(steps))
    command = [sys.executable, "-m", "wandb", "sync", *(str(file.parent) for file in files)]
    subprocess.run(command, stdin=subprocess.DEVNULL, timeout=SYNC_S, check=False)
    if left := [file.parent.name for file in files if file in unsynced(start.run_dir, start.run_id)]:
        raise RuntimeError(f"{', '.join(left)}: recorded by an earlier start, and cannot be uploaded")


def _fill(start: Start, end: int) -> None:
    """Send the rows before a step that a start online, which was killed, may have left behind."""
    history = _init(start, "online")
    for record in start.records:
        if record["step"] < end:
            history.add(record)
    history.send()
    if not _within(FINISHED_S, history.run.finish):
        raise RuntimeError("the server is too slow")


def how_to_sync(run_dir: Path, run_id: str, whole: bool = True) -> str | None:
    """A line for the user, if there is something to upload; `whole` if the recordings lack nothing."""
    files = unsynced(run_dir, run_id)
    command = ["wandb", "sync", *(str(file.parent) for file in files)]
    if not whole or not all(_is_offline(file) for file in files):  # `wandb sync` would repeat what the server has
        command = ["python", "-m", "fcn.weights_and_biases", str(run_dir)]
    elif files == recordings(run_dir, run_id):  # one name for all of them, however often the run was started
        folder = shlex.quote(str(run_dir / "wandb"))
        return f"W&B: recorded offline; to upload it: wandb login, then wandb sync {folder}/offline-run-*-{run_id}"
    return f"W&B: not uploaded yet: {shlex.join(command)}" if files or not whole else None


def credentials() -> bool:
    """Whether W&B can log in without asking: a key in the environment, or in netrc, where `wandb login` writes it."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        return netrc.netrc(os.environ.get("NETRC") or Path.home() / ".netrc").authenticators(host or "") is not None
    except (OSError, netrc.NetrcParseError):
        return False


# --- git


def _repositories() -> Record:
    """Commits of this checkout and, if it is another repository, of the working directory."""
    found = {"fcn": _commit(CHECKOUT), "working_directory": _commit(Path.cwd())}
    same = found["fcn"] and found["working_directory"] and found["fcn"]["root"] == found["working_directory"]["root"]
    return {name: state for name, state in found.items() if state and not (same and name == "working_directory")}


def _commit(folder: Path) -> Record | None:
    """{commit, dirty, root}; None without git or a commit."""

    def git(*arguments: str) -> str:
        command = ["git", "--no-optional-locks", "-C", str(folder), *arguments]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=20, check=True)
        return done.stdout.strip()

    try:
        root, commit = git("rev-parse", "--show-toplevel"), git("rev-parse", "HEAD")
        return {"commit": commit, "dirty": bool(git("status", "--porcelain", "--untracked-files=no")), "root": root}
    except (OSError, subprocess.SubprocessError):
        return None
