"""The process that talks to W&B: rows and media, the server, recordings on disk.

It receives pickled messages from the trainer (`WandbTracker`) on standard input and answers with lines of JSON.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import fcntl
import importlib.util
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
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TextIO
from urllib.parse import urlsplit

from fcn.data import IGNORE_INDEX, Classes
from fcn.errors import InputError
from fcn.metrics import CLASS_METRICS
from fcn.tracking import plots
from fcn.tracking.records import STEP_EVENTS, TIME_FORMAT, Record
from fcn.tracking.tracker import Sample, Scores

CHECKOUT = Path(__file__).resolve().parents[2]
FINISHED_S, ARTIFACT_S, STOPPED_S = 30, 300, 10
"""Seconds that the end of a run waits for uploads: finished, finished with an artifact, stopped."""
SYNC_S = 900
"""Seconds that uploading the offline recordings of earlier starts may take."""
OTHER_S = 30
"""Seconds to wait for the process of a killed start, which still writes what it has."""
FLUSH_S = 1.0
"""Rows younger than this may be missing from W&B's file after a kill. The next start sends them again."""
SKIPPED = "Steps without a finite loss are skipped"


@dataclass(frozen=True)
class WandbStart:
    """What the process needs to know."""

    mode: str
    """auto, online or offline."""
    project: str
    run_dir: Path
    run_id: str
    config: Record
    environment: Record
    """What runs where in this start; empty for an upload."""
    records: list[Record]
    """The records of earlier starts."""
    artifact: bool
    """Whether best.pt is uploaded when the run is finished."""
    program: str
    trainer: int
    """Process id, for system metrics."""


def main() -> None:
    """Handle messages until the trainer has ended, then exit in bounded time."""
    inbox, outbox = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "w", buffering=1)
    output = _redirect_output()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # a scheduler sends them to every process
    with contextlib.suppress(OSError):
        os.nice(5)
    start: WandbStart = pickle.load(inbox)[1]

    def send(**message: str | bool | None) -> None:
        with contextlib.suppress(OSError):  # the trainer is gone
            outbox.write(json.dumps(message) + "\n")

    def say(text: str, warning: bool = False) -> None:
        send(say=text, warning=warning)

    try:
        folder = start.run_dir / "wandb"
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f".{start.run_id}.lock").open("w") as lock:
            _wait_for_the_one_before(lock)
            history = _open(start, say)
            summary, limit = _receive(history, inbox)
            _end(history, start, summary, limit, output)
        uploaded = not unsynced(start.run_dir, start.run_id)
    except Exception as error:
        say(f"W&B failed; training goes on without ({type(error).__name__}: {_first_line(error)})", warning=True)
        uploaded = False
    send(left=None if uploaded else how_to_upload(start.run_dir))
    os._exit(0)  # W&B's library would wait for its service, which ends by itself


def _redirect_output() -> BinaryIO:
    """Redirect what W&B and its service print to an unnamed file; returns that file."""
    output = tempfile.TemporaryFile()  # noqa: SIM115 - it is open as long as the process lives
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, number in ((nothing, 0), (output.fileno(), 1), (output.fileno(), 2)):
        os.dup2(source, number)
    return output


def _wait_for_the_one_before(lock: TextIO) -> None:
    """Wait for the process of a killed start, which may still be writing."""
    deadline = time.monotonic() + OTHER_S
    while time.monotonic() < deadline:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        time.sleep(0.1)


class History:
    """The rows of a W&B run: each training step once, complete, in order.

    W&B could merge the records of a step, too. But when a stopped run finishes, it would write the last step, and then
    ignore the evaluation that the next start adds to that step.

    `known` is the last step that W&B has.
    """

    def __init__(self, run: Any, known: int) -> None:
        self.run, self.known = run, known
        self._step: int = known
        self._row: Record = {}
        self._media: dict[str, Any] = {}
        self._skipped = 0

    def add(self, record: Record) -> None:
        """Add a record; the records of a step become one row."""
        if record["event"] not in STEP_EVENTS:
            return
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
        """Add media to the row of their record, unless W&B already has that row."""
        if scores.record["step"] == self._step > self.known:
            self._media |= media(scores)

    def send(self) -> None:
        """Send the row, which is now complete."""
        if not self._row:
            return
        try:
            self.run.log({**self._row, **self._media}, step=self._step, commit=True)
        except Exception:  # for tables it asks the server, which may be gone by now
            self.run.log(self._row, step=self._step, commit=True)
        self.known, self._row, self._media = self._step, {}, {}


def row(record: Record) -> Record:
    """The numbers of a record under their names in W&B."""
    prefix = record["split"] if record["event"] == "eval" else "train"
    values = {key: value for key, value in record.items() if isinstance(value, int | float)}
    for key in ("step", "steps"):
        values.pop(key, None)
    if "faults" in record:
        values["replaced"] = len(record["faults"])
    for key in CLASS_METRICS:
        scores = record.get(key, {}).items()
        values |= {f"{key}/{name}": value for name, value in scores if value is not None}
    return {f"{prefix}/{key}": value for key, value in values.items()}


def media(scores: Scores) -> dict[str, Any]:
    """Class scores and confusion matrix as tables, the matrix as a picture, images with masks to switch on."""
    import wandb

    names, split = scores.classes.names, scores.record["split"]
    counts = scores.confusion_matrix.tolist()
    known = [key for key in CLASS_METRICS if key in scores.record]
    shown: dict[str, Any] = {
        f"{split}/class_table": wandb.Table(
            ["class", *known], [[name, *(scores.record[key][name] for key in known)] for name in names]
        ),
        f"{split}/confusion_table": wandb.Table(
            ["label \\ prediction", *names], [[name, *pixels] for name, pixels in zip(names, counts, strict=True)]
        ),
        f"{split}/confusion": wandb.Image(plots.confusion(scores.confusion_matrix, scores.classes)),
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


def _open(start: WandbStart, say: Callable[..., None]) -> History:
    """Find out which steps W&B has and send the missing ones from earlier starts."""
    mode, before = start.mode, recordings(start.run_dir, start.run_id)
    if mode == "auto":
        mode = "online" if credentials() else "offline"
    if mode == "online":
        try:
            _log_in()
            _upload_offline_recordings(start)
            history = _init(start, "online")
            say(f"W&B: {history.run.url}")
        except Exception as error:
            mode = "offline"
            _clean_up_attempt(start, before)
            folder = start.run_dir / "wandb"
            say(f"W&B's server cannot be used ({_first_line(error)}); recording offline in {folder}", warning=True)
    if mode == "offline":
        history = _init(start, "offline")
    if start.environment:
        environment = start.environment | {"started": time.strftime(TIME_FORMAT)}
        config = {**start.config, "environment": environment, "git": _repositories()}
        history.run.config.update(config, allow_val_change=True)
    for record in start.records:
        history.add(record)
    return history


def _log_in() -> None:
    """Check that the server answers and knows the key, which takes ten seconds at most and prompts nobody."""
    import wandb

    if not wandb.login(verify=True):
        raise RuntimeError("not logged in; see `wandb login`")


def _init(start: WandbStart, mode: str) -> History:
    """Start or continue the W&B run; raises what W&B does if the server is silent or refuses."""
    import wandb

    known = recorded_step(start.run_dir, start.run_id) if mode == "offline" else None
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
    return History(run, run.starting_step - 1 if known is None else known)


def _clean_up_attempt(start: WandbStart, before: list[Path]) -> None:
    """Clean up after a failed start of the W&B run; the recordings in `before` stay."""
    import wandb

    if attempts := set(recordings(start.run_dir, start.run_id)) - set(before):
        with contextlib.suppress(Exception):
            _within(5, wandb.teardown)  # else W&B says that the run's id is in use
        for file in attempts:
            shutil.rmtree(file.parent, ignore_errors=True)


def _receive(history: History, inbox: BinaryIO) -> tuple[Record | None, float]:
    """Process the trainer's messages; returns its summary, and how long the end may take."""
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


def _end(history: History, start: WandbStart, summary: Record | None, limit: float, output: BinaryIO) -> None:
    """Finish the W&B run within the limit; if it is uploaded, mark its recordings."""
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
    if not run.offline and in_time and not _gave_up(output):  # this start uploaded what earlier ones did not
        for file in recordings(start.run_dir, start.run_id):
            if not _is_offline(file):
                file.with_name(f"{file.name}.synced").touch()


def _log_artifact(run: Any, best: Path, summary: Record) -> None:
    import wandb

    artifact = wandb.Artifact(f"{run.id}-best", "model", metadata={"best": summary.get("best")})
    artifact.add_file(str(best), policy="immutable", skip_cache=True)  # no copy of a gigabyte
    run.log_artifact(artifact)


def _gave_up(output: BinaryIO) -> bool:
    """Whether W&B's service printed that it stopped uploading."""
    output.seek(0)
    return b"will not be synced" in output.read()


def _within(seconds: float, action: Callable[[], None]) -> bool:
    """Whether an action ended in time; raises what it raises. One that takes longer goes on in its thread."""
    future = concurrent.futures.ThreadPoolExecutor(1).submit(action)
    in_time = bool(concurrent.futures.wait([future], seconds).done)
    if in_time:
        future.result()
    return in_time


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# --- recordings: folders under run_dir/wandb


def recordings(run_dir: Path, run_id: str) -> list[Path]:
    """W&B's files of a run, one for each start, oldest first."""
    found = (run_dir / "wandb").glob(f"*run-*/run-{run_id}.wandb")
    return sorted(found, key=lambda path: path.parent.name.removeprefix("offline-"))


def recorded_step(run_dir: Path, run_id: str) -> int:
    """The last step with a row in W&B's files, or -1. A file may end in the middle of a record."""
    for file in reversed(recordings(run_dir, run_id)):
        if steps := _steps(file):
            return max(steps)
    return -1


def _steps(file: Path) -> list[int]:
    """The steps of a file's rows, read with W&B's own reader."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as reader:
        rows = (json.loads(line)["history"] for line in reader.stdout if b'"type":"history"' in line)
        return [row["step"].get("num", 0) for row in rows]


def unsynced(run_dir: Path, run_id: str) -> list[Path]:
    """The recordings that may contain what the server does not have."""
    files = recordings(run_dir, run_id)
    return [file for file in files if not file.with_name(f"{file.name}.synced").exists()]


def _is_offline(file: Path) -> bool:
    return file.parent.name.startswith("offline-")


def _upload_offline_recordings(start: WandbStart) -> None:
    """Upload the offline recordings of earlier starts before this one sends anything.

    `wandb sync` appends all rows of a file to those that the server has. So earlier rows, which a killed online start
    may not have sent, go first; and it never gets online recordings, because the server may have some of their rows.

    Raises:
        RuntimeError: they cannot be uploaded.
    """
    waiting = unsynced(start.run_dir, start.run_id)
    files = [file for file in waiting if _is_offline(file)]
    if not files:
        return
    if files != waiting and (steps := _steps(files[0])):
        history = _init(start, "online")
        for record in start.records:
            if record["step"] < min(steps):
                history.add(record)
        history.send()
        if not _within(FINISHED_S, history.run.finish):
            raise RuntimeError("the server is too slow")
    command = [sys.executable, "-m", "wandb", "sync", *(str(file.parent) for file in files)]
    subprocess.run(command, stdin=subprocess.DEVNULL, timeout=SYNC_S, check=False)
    if left := [file.parent.name for file in files if file in unsynced(start.run_dir, start.run_id)]:
        raise RuntimeError(f"{', '.join(left)}: recorded by an earlier start, and cannot be uploaded")


def how_to_upload(run_dir: Path) -> str:
    """The line that tells the user what to type to upload the rest of a run."""
    command = f"python -m fcn.tracking.wandb_tracker {shlex.quote(str(run_dir))}"
    return f"W&B: not uploaded yet: {'' if credentials() else 'wandb login && '}{command}"


def wandb_is_installed(mode: str) -> bool:
    """Whether there is the package wandb; without it `wandb.mode: auto` records nothing there.

    Raises:
        InputError: it is missing, and another mode asks for it.
    """
    found = importlib.util.find_spec("wandb") is not None
    if not found and mode != "auto":
        raise InputError(
            f"wandb.mode: found {mode}, but the package wandb is missing; pip install wandb, or set disabled"
        )
    return found


def credentials() -> bool:
    """Whether W&B can log in without a prompt: a key in the environment, or in netrc, where `wandb login` puts it."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        return netrc.netrc(os.environ.get("NETRC") or Path.home() / ".netrc").authenticators(host or "") is not None
    except (OSError, netrc.NetrcParseError):
        return False


# --- git


def _repositories() -> Record:
    """The commits of this checkout and of the working directory, if that is another repository."""
    fcn, here = _commit(CHECKOUT), _commit(Path.cwd())
    found = {"fcn": fcn, "working_directory": None if here == fcn else here}
    return {name: state for name, state in found.items() if state}


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
