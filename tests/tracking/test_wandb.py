"""The process for W&B, without a trainer. What it recorded is read back by W&B's own reader."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from fcn.data import Classes
from fcn.tracking import Record, Sample, Scores, credentials, event, wandb_process, wandb_tracker
from fcn.tracking.wandb_process import WandbStart, media, recorded_step, recordings, row, unsynced
from fcn.tracking.wandb_tracker import WandbTracker
from tests.wandb_server import KEY, Server

pytestmark = pytest.mark.skipif(not importlib.util.find_spec("wandb"), reason="needs wandb")

RUN_ID = "abcd1234"
CLASSES = Classes(("road", "sky"), ((128, 64, 128), (70, 130, 180)))


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> None:
    """No credentials, and nothing of W&B's in the user's folders."""
    for name in [name for name in os.environ if name.startswith(("WANDB_", "NETRC"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()


def train_record(step: int, **more: object) -> Record:
    return {"event": "train", "step": step, "steps": 100, "loss": 1 / step, "lr": 0.1, "skipped": 0} | more


def eval_record(step: int, split: str = "val") -> Record:
    return {
        "event": "eval",
        "step": step,
        "split": split,
        "miou": 0.25,
        "iou": {"road": 0.25, "sky": None},
        "dice": {"road": 0.4, "sky": None},
    }


def without_dice(record: Record) -> Record:
    """A record of an older version."""
    return {key: value for key, value in record.items() if key != "dice"}


EVENTS = [event(kind, step=1, text="text") for kind in ("start", "resume", "warning", "note", "failure", "stop")]
"""Records that W&B never gets."""


def scores(step: int, side: int = 16, split: str = "val") -> Scores:
    image = np.zeros((side, side, 3), np.uint8)
    labels = np.zeros((side, side), np.uint8)
    labels[0] = 255
    sample = Sample(image, labels, np.ones((side, side), np.int64), f"{step}.png")
    return Scores(eval_record(step, split), CLASSES, np.array([[3, 1], [0, 4]]), [sample, sample])


def start(run_dir: Path, mode: str = "offline", records: list[Record] | None = None) -> WandbStart:
    return WandbStart(
        mode, "fcn", run_dir, RUN_ID, {"seed": 0}, {"processes": 1}, records or [], False, "t.py", os.getpid()
    )


@contextlib.contextmanager
def tracker(
    run_dir: Path, said: list[str], environment: dict[str, str] | None = None, **options: object
) -> Iterator[WandbTracker]:
    """A tracker whose process is killed afterwards if the test has not ended it."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (environment or {}).items():
            patch.setenv(name, value)
        wandb = WandbTracker(start(run_dir, **options), said.append, lambda text: said.append(f"warning: {text}"))
        wait_for(lambda: wandb._process)
    try:
        yield wandb
    finally:
        wandb._closed = True  # nothing to wait for when pytest exits
        if wandb._process:
            wandb._process.kill()


def finish(wandb: WandbTracker) -> None:
    wandb.close({"status": "finished", "step": 100, "miou": 0.25})


class Recorded:
    """All files of the run, read by W&B's own reader."""

    def __init__(self, run_dir: Path, run_id: str = RUN_ID) -> None:
        self.files = recordings(run_dir, run_id)
        self.records: list[dict] = []
        for file in self.files:
            command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
            lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
            self.records += map(json.loads, lines)

    def contents(self, kind: str) -> list[dict]:
        return [record[kind] for record in self.records if record["type"] == kind]

    @property
    def rows(self) -> list[dict]:
        return [record["item"] for record in self.contents("history")]

    @property
    def config(self) -> dict:
        found: dict = {}
        for record in self.contents("config"):
            found |= record["update"]
        return found


def rows_written(run_dir: Path) -> int:
    """Roughly, but fast: each row of these tests has this word twice, in history and summary."""
    return sum(file.read_bytes().count(b"train/loss") for file in recordings(run_dir, RUN_ID)) // 2


def wait_for(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_records_of_a_step_are_one_row_with_pictures_and_tables(tmp_path):
    said: list[str] = []
    with tracker(tmp_path, said, records=EVENTS) as wandb:
        for step in (1, 2, 3):
            for record in (EVENTS[2], train_record(step, skipped=max(0, step - 1)), EVENTS[3]):
                wandb.log(record)
            if step == 2:
                wandb.log(eval_record(2))
                wandb.show(scores(2, side=1000))
        wandb.alert("title", "text")
        finish(wandb)
    recorded = Recorded(tmp_path)
    found = recorded.rows
    assert [item["_step"] for item in found] == [1, 2, 3]
    assert [item["train/loss"] for item in found] == [1, 1 / 2, 1 / 3]
    assert (found[1]["val/miou"], found[1]["val/iou/road"], found[1]["val/dice/road"]) == (0.25, 0.25, 0.4)
    assert "val/iou/sky" not in found[1]
    files = recorded.files[0].parent / "files"

    def table(key: str) -> list:
        return json.loads((files / found[1][f"{key}.path"]).read_text())["data"]

    assert table("val/class_table") == [["road", 0.25, 0.4], ["sky", None, None]]
    assert table("val/confusion_table") == [["road", 3, 1], ["sky", 0, 4]]
    assert (files / found[1]["val/confusion.path"]).is_file()
    panels = {key.removeprefix("val/panels."): value for key, value in found[1].items() if "val/panels" in key}
    assert (panels["count"], panels["width"], panels["captions"]) == (2, wandb_tracker.SIDE, ["2.png"] * 2)
    assert [sorted(masks) for masks in panels["all_masks"]] == [["ground truth", "prediction"]] * 2
    assert (files / panels["all_masks"][1]["prediction"]["path"]).is_file()
    alerts = [alert["title"] for alert in recorded.contents("alert")]
    assert sorted(alerts) == [wandb_process.SKIPPED, "title"], "one alert for all skipped steps"
    assert not {key for item in found for key in item if "text" in key or "time" in key} - {"_timestamp", "_runtime"}
    assert said == [f"W&B: not uploaded yet: wandb login && python -m fcn.tracking.wandb_tracker {tmp_path}"]


def test_the_next_start_sends_what_is_missing_and_nothing_twice(tmp_path):
    """The first start is killed, loses the end of its file, and a part of what it sent is sent again."""
    said: list[str] = []
    records = [train_record(step) for step in range(1, 31)]
    records.insert(20, eval_record(20))
    with tracker(tmp_path, said) as wandb:
        for record in records[:24]:
            wandb.log(record)
        wait_for(lambda: rows_written(tmp_path) >= 20)
        wandb._process.kill()
        wandb._process.wait()
        wait_for(lambda: wandb._ended.is_set())
        wandb.log(records[24])
    assert said == ["warning: W&B's process ended; training goes on without"]
    (file,) = recordings(tmp_path, RUN_ID)
    words = [match.start() for match in re.finditer(b"train/loss", file.read_bytes())]
    os.truncate(file, words[2 * 13])  # in the middle of a record
    assert 0 < recorded_step(tmp_path, RUN_ID) < 15, "the next start must look further back than its checkpoint"
    with tracker(tmp_path, said, records=records[:17]) as wandb:  # "a checkpoint at step 17"
        for record in records[17:]:
            wandb.log(record)
        finish(wandb)
    recorded = Recorded(tmp_path)
    found = recorded.rows
    assert [item["_step"] for item in found] == list(range(1, 31))
    assert [item["train/loss"] for item in found] == [1 / step for step in range(1, 31)]
    assert [item["_step"] for item in found if "val/miou" in item] == [20]
    assert len(recorded.files) == 2


def test_a_stopped_run_keeps_its_last_step_for_the_next_start(tmp_path):
    """A signal may postpone the evaluation of a step; its record belongs in the same row."""
    said: list[str] = []
    with tracker(tmp_path, said) as wandb:
        for step in (1, 2):
            wandb.log(train_record(step))
        wandb.alert("Stopped by a signal", "step 2")
        wandb.close({"status": "preempted", "step": 2})
    assert [item["_step"] for item in Recorded(tmp_path).rows] == [1]
    with tracker(tmp_path, said, records=[train_record(1), train_record(2)]) as wandb:
        wandb.log(eval_record(2))
        finish(wandb)
    recorded = Recorded(tmp_path)
    found = [(item["_step"], item["train/loss"], item.get("val/miou")) for item in recorded.rows]
    assert found == [(1, 1, None), (2, 0.5, 0.25)]
    assert [alert["title"] for alert in recorded.contents("alert")] == ["Stopped by a signal"]
    assert [record.get("exit_code", 0) for record in recorded.contents("exit")] == [1, 0]


def test_a_process_that_is_stuck_delays_nothing_and_memory_stays_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(wandb_tracker, "MOST_WAITING", 50)
    monkeypatch.setattr(wandb_tracker, "STOPPED_S", 1)
    said: list[str] = []
    with tracker(tmp_path, said) as wandb:
        wandb._process.send_signal(signal.SIGSTOP)
        began = time.monotonic()
        for step in range(1, 3001):
            wandb.log(train_record(step))
            wandb.show(scores(step))
        assert wandb._queue.qsize() <= 50
        wandb.close({"status": "preempted", "step": 3000})
        assert time.monotonic() - began < 20
        assert wandb._process.wait(20)
    assert said == [
        "warning: W&B takes no more records; training goes on without; metrics.jsonl has them all",
        f"W&B: not uploaded yet: wandb login && python -m fcn.tracking.wandb_tracker {tmp_path}",
    ]


def test_the_end_of_the_trainer_is_the_end_of_the_process(tmp_path):
    """The process writes what it has received, and W&B's service ends with it."""
    program = f"""
import os, signal, sys
from pathlib import Path
from tests.tracking.test_wandb import start, train_record
from fcn.tracking.wandb_tracker import WandbTracker
tracker = WandbTracker(start(Path({str(tmp_path)!r})), print, print)
for step in range(1, 5):
    tracker.log(train_record(step))
while not tracker._queue.empty():
    pass
print("sent", flush=True)
sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=wandb_tracker.CHECKOUT
    ) as trainer:
        assert trainer.stdout.readline() == b"sent\n"
        trainer.kill()
    wait_for(lambda: not processes_about(tmp_path))
    recorded = Recorded(tmp_path)
    assert [item["_step"] for item in recorded.rows] == [1, 2, 3]
    assert [record["exit_code"] for record in recorded.contents("exit")] == [1]


def processes_about(run_dir: Path) -> list[str]:
    """Ids of the processes that have W&B's data in this run directory."""
    mark, found = f"WANDB_DATA_DIR={run_dir}".encode(), []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark in (folder / "environ").read_bytes():
                found.append(folder.name)
    return found


def test_without_credentials_it_records_offline_what_runs_where_and_from_which_commit(tmp_path):
    said: list[str] = []
    with tracker(tmp_path, said, mode="auto") as wandb:
        finish(wandb)
    assert recordings(tmp_path, RUN_ID)[0].parent.name.startswith("offline-run-")
    config = Recorded(tmp_path).config
    assert (config["seed"], config["environment"]["processes"]) == (0, 1)
    head = ["git", "-C", str(wandb_tracker.CHECKOUT), "rev-parse", "HEAD"]
    git = subprocess.run(head, capture_output=True, text=True, check=False)
    if git.returncode == 0:
        assert config["git"]["fcn"]["commit"] == git.stdout.strip()
        assert config["git"]["fcn"]["dirty"] in (True, False)
    else:
        assert "fcn" not in config["git"]


def test_the_key_reaches_no_file(tmp_path):
    with Server() as server, tracker(tmp_path, [], environment=server.environment, mode="auto") as wandb:
        wandb.log(train_record(1))
        finish(wandb)
        assert server.steps(RUN_ID) == [1]
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert recordings(tmp_path, RUN_ID)
    assert [path for path in files if KEY.encode() in path.read_bytes()] == []


def test_a_server_gets_every_step_once_whatever_happened(tmp_path, monkeypatch):
    """Killed online; then refused, and so offline; then online; then the server fails, and the rest is sent later."""
    records = [train_record(step) for step in range(1, 31)]
    said: list[str] = []
    with Server() as server:
        use = {"environment": server.environment, "mode": "online"}
        with tracker(tmp_path, said, **use) as wandb:
            for record in records[:10]:
                wandb.log(record)
            wait_for(lambda: rows_written(tmp_path) == 9)
        assert server.steps(RUN_ID) == [], "the client waits for more before it sends"
        server.behaviour = 401
        said.clear()
        with tracker(tmp_path, said, records=records[:8], **use) as wandb:
            for record in records[8:15]:
                wandb.log(record)
            wandb.show(scores(15))
            finish(wandb)
        assert [line.split()[:2] for line in said] == [["warning:", "W&B's"], ["W&B:", "not"]]
        assert "401" in said[0]
        server.behaviour = "keeps"
        said.clear()
        with tracker(tmp_path, said, records=records[:15], **use) as wandb:
            wandb.alert("title", "text")
            for record in records[15:20]:
                wandb.log(record)
            finish(wandb)
        assert server.steps(RUN_ID) == list(range(1, 21)), said
        assert server.alerts == ["title"]
        assert any("media/images/val/panels_15" in name for name in server.files), "pictures of the offline start"
        assert [line.split("/")[0] for line in said] == ["W&B: http:"], "nothing is left"
        said.clear()
        with tracker(tmp_path, said, records=records[:20], **use) as wandb:
            wait_for(lambda: said)
            server.behaviour = 500
            monkeypatch.setattr(wandb_tracker, "FINISHED_S", 4)
            for record in records[20:]:
                wandb.log(record)
            finish(wandb)
        assert server.steps(RUN_ID) == list(range(1, 21))
        assert said[-1] == f"W&B: not uploaded yet: python -m fcn.tracking.wandb_tracker {tmp_path}"
        server.behaviour = "keeps"
        write_run(tmp_path, records)
        done = upload(str(tmp_path), environment=server.environment)
        assert (done.returncode, done.stderr) == (0, "")
        assert server.steps(RUN_ID) == list(range(1, 31))
        assert server.exit_codes[-1] == 0


def write_run(run_dir: Path, records: list[Record]) -> None:
    """Write what training writes into a run directory and the upload reads."""
    (run_dir / "config.yaml").write_text("wandb: {mode: offline, project: fcn, artifact: false}")
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (run_dir / "summary.json").write_text('{"status": "finished"}')


def upload(*arguments: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fcn.tracking.wandb_tracker", *arguments]
    return subprocess.run(
        command, env=os.environ | (environment or {}), cwd=wandb_tracker.CHECKOUT, stdin=subprocess.DEVNULL,
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def test_what_was_recorded_offline_is_uploaded_by_the_command_that_the_user_is_told(tmp_path):
    """Two starts, events between the records; the server gets rows, pictures and tables once, then nothing more."""
    said: list[str] = []
    records = [train_record(step) for step in range(1, 6)]
    with tracker(tmp_path, said) as wandb:
        for record in (records[0], EVENTS[2], records[1], eval_record(2)):
            wandb.log(record)
        wandb.show(scores(2))
        wandb.log(records[2])
        wandb.close({"status": "preempted", "step": 3})
    with tracker(tmp_path, said, records=[*records[:3], eval_record(2), *EVENTS]) as wandb:
        for record in records[3:]:
            wandb.log(record)
        finish(wandb)
    command = f"python -m fcn.tracking.wandb_tracker {tmp_path}"
    assert said == [f"W&B: not uploaded yet: wandb login && {command}"] * 2
    write_run(tmp_path, [*records, eval_record(2), *EVENTS])
    with Server(403) as server:
        done = upload(str(tmp_path), environment=server.environment)
        assert (done.returncode, done.stderr) == (1, "")
        warning, hint = done.stdout.splitlines()
        assert warning.startswith("warning: W&B's server cannot be used (")
        assert hint == f"W&B: not uploaded yet: {command}"
        server.behaviour = "keeps"
        for _ in range(2):
            done = upload(str(tmp_path), environment=server.environment)
            assert (done.returncode, done.stderr) == (0, "")
            assert done.stdout == f"W&B: {server.environment['WANDB_BASE_URL']}/me/fcn/runs/{RUN_ID}\n"
            assert server.steps(RUN_ID) == [1, 2, 3, 4, 5]
        (row,) = [row for row in server.history[RUN_ID].values() if "val/miou" in row]
        assert (row["_step"], row["val/dice/road"], row["train/loss"]) == (2, 0.4, 0.5)
        assert any("media/images/val/panels_2" in name for name in server.files)
        assert any("media/table/val/class_table_2" in name for name in server.files)
    assert unsynced(tmp_path, RUN_ID) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "{prog}: the following arguments are required: RUN_DIR; see {prog} --help"),
        (["a", "b"], "{prog}: unrecognized arguments: b; see {prog} --help"),
        (["nowhere"], "nowhere: no config.yaml; give a directory that training wrote"),
        (["{run}"], "{run}: W&B has recorded nothing here"),
    ],
)
def test_a_usage_error_is_one_line(tmp_path, arguments, message):
    write_run(tmp_path, [])
    names = {"prog": "python -m fcn.tracking.wandb_tracker", "run": str(tmp_path)}
    done = upload(*(argument.format(**names) for argument in arguments))
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"error: {message.format(**names)}\n")


def test_a_server_that_lets_nobody_write_costs_one_warning_and_the_next_start_goes_on(tmp_path):
    records = [train_record(step) for step in range(1, 5)]
    said: list[str] = []
    with Server("forbids") as server:
        use = {"environment": server.environment, "mode": "online"}
        with tracker(tmp_path, said, **use) as wandb:
            for record in records[:2]:
                wandb.log(record)
            finish(wandb)
        assert said == [
            f"warning: W&B's server cannot be used (permission denied); recording offline in {tmp_path / 'wandb'}",
            f"W&B: not uploaded yet: python -m fcn.tracking.wandb_tracker {tmp_path}",
        ]
        assert [item["_step"] for item in Recorded(tmp_path).rows] == [1, 2]
        assert [file.parent.name[:12] for file in recordings(tmp_path, "*")] == ["offline-run-"]
        server.behaviour = "keeps"
        with tracker(tmp_path, said, records=records[:2], **use) as wandb:
            for record in records[2:]:
                wandb.log(record)
            finish(wandb)
        assert server.steps(RUN_ID) == [1, 2, 3, 4]
    assert unsynced(tmp_path, RUN_ID) == []


def test_a_working_directory_of_another_repository_is_named_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "working_directory" not in wandb_process._repositories()
    commands = (
        ["init", "-q"],
        ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "--allow-empty", "-m", "x"],
    )
    for command in commands:
        subprocess.run(["git", *command], check=True)
    found = wandb_process._repositories()["working_directory"]
    assert (found["dirty"], found["root"], len(found["commit"])) == (False, str(tmp_path), 40)
    (tmp_path / "a").write_text("1")
    subprocess.run(["git", "add", "a"], check=True)
    assert wandb_process._repositories()["working_directory"]["dirty"]


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (train_record(2), {"train/loss": 0.5, "train/lr": 0.1, "train/skipped": 0}),
        (train_record(2, loss=None), {"train/lr": 0.1, "train/skipped": 0}),
        (eval_record(2, "test"), {"test/miou": 0.25, "test/iou/road": 0.25, "test/dice/road": 0.4}),
        (without_dice(eval_record(2)), {"val/miou": 0.25, "val/iou/road": 0.25}),
        ({"event": "replaced", "step": 2, "epoch": 1, "faults": ["a", "b"]}, {"train/epoch": 1, "train/replaced": 2}),
    ],
)
def test_a_row_has_the_numbers_of_a_record(record, expected):
    assert row(record) == expected


def test_the_class_table_of_an_older_run_has_the_scores_of_its_record():
    older = scores(2)._replace(record=without_dice(eval_record(2)), samples=[])
    table = media(older)["val/class_table"]
    assert (table.columns, table.data) == (["class", "iou"], [["road", 0.25], ["sky", None]])


def test_recordings_are_those_of_the_run_in_the_order_of_their_starts(tmp_path):
    """W&B adds a number to the folder of a second start in the same second."""
    folders = [
        "run-20270101_000001-a",
        "offline-run-20270101_000002-a",
        "run-20270101_000002-a-1",
        "run-20270102_000001-a",
    ]
    for folder in [*reversed(folders), "run-20270101_000001-b", "offline-run-20270101_000001-b"]:
        (tmp_path / "wandb" / folder).mkdir(parents=True)
        (tmp_path / "wandb" / folder / f"run-{folder.split('-')[-1 - folder.endswith('-1')]}.wandb").touch()
    assert [path.parent.name for path in recordings(tmp_path, "a")] == folders
    assert len(recordings(tmp_path, "*")) == 6
    recordings(tmp_path, "a")[2].with_name("run-a.wandb.synced").touch()
    assert [path.parent.name for path in unsynced(tmp_path, "a")] == [*folders[:2], folders[3]]


NETRC = "machine {host}\n  login user\n  password 0123456789012345678901234567890123456789\n"


@pytest.mark.parametrize(
    ("netrc_name", "host", "key", "expected"),
    [
        pytest.param(None, None, None, False, id="nothing"),
        pytest.param(None, None, "0123456789012345678901234567890123456789", True, id="key"),
        pytest.param(None, None, "", False, id="empty key"),
        pytest.param(".netrc", "api.wandb.ai", None, True, id="netrc in the home folder"),
        pytest.param("elsewhere", "api.wandb.ai", None, True, id="netrc named by NETRC"),
        pytest.param(".netrc", "example.org", None, False, id="netrc of another machine"),
    ],
)
def test_credentials_are_a_key_or_a_netrc_entry(tmp_path, monkeypatch, netrc_name, host, key, expected):
    monkeypatch.setenv("HOME", str(tmp_path))
    if netrc_name:
        file = tmp_path / netrc_name
        file.write_text(NETRC.format(host=host))
        file.chmod(0o600)
        if netrc_name != ".netrc":
            monkeypatch.setenv("NETRC", str(file))
    if key is not None:
        monkeypatch.setenv("WANDB_API_KEY", key)
    assert credentials() is expected
