import fcntl
import io
import json
import math
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import threading
from pathlib import Path

import pytest

from fcn.metrics import CLASS_METRICS, METRICS, Metric
from fcn.tracking import Console, MetricsFile, Tracker, Trackers, read_summary, rewind_metrics, score_line, score_table

ROOT = Path(__file__).parents[2]
STAMPED = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d "
TRAIN = {
    "event": "train", "step": 1200, "steps": 30000, "epoch": 13.08, "loss": 0.71234, "lr": 0.0097, "grad_norm": 1.5,
    "images_per_s": 123.44, "data_wait": 0.05, "eta_s": 11107.0,
}  # fmt: skip
EVAL = {
    "event": "eval", "step": 40, "split": "val", "miou": 0.5, "iou": {"road": 0.75, "sky": None, "pavement": 0.25},
    "mdice": 0.625, "dice": {"road": 0.875, "sky": None, "pavement": 0.375},
    "pixel_acc": 0.8, "mean_acc": 0.6, "fw_iou": 0.7, "classes": 2, "images": 101, "protocol": "short520, flip",
}  # fmt: skip
WITHOUT_DICE = {key: value for key, value in EVAL.items() if key not in ("dice", "mdice")}
"""A record of an older version."""


# --- console


def test_without_a_terminal_every_line_starts_with_the_time_and_goes_to_the_log_too(tmp_path):
    stream = io.StringIO()
    console = Console(stream, tmp_path / "log.txt")
    console.line("one\ntwo")
    console.progress("three")
    console.progress("four")
    shown = stream.getvalue()
    assert re.fullmatch("".join(f"{STAMPED}{word}\n" for word in ("one", "two", "three", "four")), shown)
    assert (tmp_path / "log.txt").read_text() == shown


def test_the_log_file_of_an_earlier_start_is_continued(tmp_path):
    (tmp_path / "log.txt").write_text("before\n")
    Console(io.StringIO(), tmp_path / "log.txt").line("after")
    assert re.fullmatch(f"before\n{STAMPED}after\n", (tmp_path / "log.txt").read_text())


@pytest.mark.parametrize(
    ("more", "loss", "save", "end"),
    [
        ({}, "loss 0.7123", "", ""),
        ({"loss": None, "save_wait": 0.004}, "loss not finite", "", ""),
        ({"save_wait": 0.25, "of_peak": 0.4}, "loss 0.7123", "save wait 25%  ", "  40% of peak"),
    ],
)
def test_a_train_record_is_a_progress_line_with_its_numbers(more, loss, save, end):
    stream = io.StringIO()
    Console(stream).log(TRAIN | more)
    assert re.fullmatch(STAMPED, stream.getvalue()[:20])
    assert stream.getvalue()[20:] == (
        f"step 1200/30000  {loss}  123.4 images/s  ETA 3:05:07  data wait 5%  {save}lr 9.70e-03  epoch 13.08{end}\n"
    )


def test_replaced_images_are_named_once_each():
    stream = io.StringIO()
    Console(stream).log({"event": "replaced", "step": 9, "epoch": 2, "faults": ["a.png: cut off", "b.png: gone"] * 2})
    assert [line[20:] for line in stream.getvalue().splitlines()] == [
        "warning: a.png: cut off", "warning: b.png: gone", "epoch 2: 4 broken images were replaced by others",
    ]  # fmt: skip


class Terminal:
    """A real pseudo-terminal; `text()` returns all that was written to it."""

    def __init__(self, columns: int = 80) -> None:
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        self.stream = os.fdopen(slave, "w")
        self.received = b""
        # A terminal that nobody reads blocks its writer.
        self.reader = threading.Thread(target=self._read)
        self.reader.start()

    def _read(self) -> None:
        try:
            while data := os.read(self.master, 4096):
                self.received += data
        except OSError:  # the other end is closed
            pass

    def text(self) -> str:
        self.stream.close()
        self.reader.join()
        os.close(self.master)
        return self.received.decode()


def screen(text: str, columns: int) -> list[str]:
    """What a terminal of that width shows after carriage returns, newlines, wrapping, and overwriting."""
    rows, row, column = [""], 0, 0
    for letter in text:
        if letter == "\r":
            column = 0
        elif letter == "\n":
            row += 1
        else:
            if column == columns:
                row, column = row + 1, 0
            rows += [""] * (row + 1 - len(rows))
            line = rows[row].ljust(column)
            rows[row] = line[:column] + letter + line[column + 1 :]
            column += 1
    return [line.rstrip() for line in rows]


def test_on_a_terminal_the_progress_line_is_rewritten_in_place(tmp_path):
    terminal = Terminal()
    console = Console(terminal.stream, tmp_path / "log.txt")
    console.progress("step 10 of 20, a long line")
    console.progress("step 11")
    console.progress("step 12 of 20")
    text = terminal.text()
    assert text.count("\r") == 3
    assert "\n" not in text
    assert screen(text, 80) == ["step 12 of 20"]
    assert len((tmp_path / "log.txt").read_text().splitlines()) == 3


def test_on_a_terminal_a_line_replaces_the_progress_line_and_stays():
    terminal = Terminal()
    console = Console(terminal.stream)
    console.progress("step 10 of 20, a long line")
    console.line("done")
    console.progress("step 11")
    console.line("and done")
    assert screen(terminal.text(), 80) == ["done", "and done"]


def test_the_progress_line_of_a_long_run_stays_on_one_row_of_an_80_column_terminal():
    terminal = Terminal(80)
    console = Console(terminal.stream)
    for step in (1200, 1210, 1220):
        console.log(TRAIN | {"step": step})
    shown = screen(terminal.text(), 80)
    assert len(shown) == 1
    assert "1220/30000" in shown[0]


def test_a_narrow_terminal_shows_whole_fields():
    terminal = Terminal(60)
    Console(terminal.stream).log(TRAIN)
    (shown,) = screen(terminal.text(), 60)
    assert shown == "step 1200/30000  loss 0.7123  123.4 images/s  ETA 3:05:07"


def test_a_silent_console_shows_nothing(capfd):
    console = Console.silent()
    console.line("one")
    console.log(TRAIN)
    assert capfd.readouterr() == ("", "")


# --- metrics.jsonl


def test_the_metrics_file_has_each_record_in_a_line_immediately_and_is_continued(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"event": "train", "step": 1}\n')
    tracker = MetricsFile(path)
    for number, record in enumerate((TRAIN, EVAL), start=2):
        tracker.log(record)
        assert len(path.read_text().splitlines()) == number
    tracker.close({})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"event": "train", "step": 1}, TRAIN, EVAL]


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_number_that_json_does_not_have_leaves_the_file_valid(tmp_path, value):
    MetricsFile(tmp_path / "metrics.jsonl").log(TRAIN | {"grad_norm": value})  # under fp16 an overflow is normal

    def refuse(constant: str) -> None:
        pytest.fail(f"{constant} is not JSON")

    json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)


def write_metrics(path: Path, *lines: str | bytes | dict) -> Path:
    whole = [json.dumps(line) + "\n" if isinstance(line, dict) else line for line in lines]
    path.write_bytes(b"".join(line if isinstance(line, bytes) else line.encode() for line in whole))
    return path


def steps(path: Path) -> list[tuple]:
    return [(r["step"], r.get("split")) for r in map(json.loads, path.read_text().splitlines())]


def test_rewinding_keeps_the_records_up_to_the_step_as_they_are(tmp_path):
    path = write_metrics(
        tmp_path / "m.jsonl",
        '{"event": "train",  "step": 10}\n',
        {"event": "eval", "step": 20, "split": "val"},
        {"event": "train", "step": 20},
        {"event": "train", "step": 21},
        {"event": "eval", "step": 30, "split": "val"},
    )
    kept = path.read_text().splitlines(keepends=True)[:3]
    rewind_metrics(path, 20, None)
    assert path.read_text() == "".join(kept)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "half",
    [
        '{"event": "tra', '{"event": "train", "step": 1', '{"event": "tr\n', "\n", "\0\0\0", b"\xff\xfe",
        "7\n", "[1, 2]\n", '{"event": "train"}\n', '{"step": 1}\n',
    ],
)  # fmt: skip
def test_rewinding_drops_a_line_that_is_no_record(tmp_path, half):
    path = write_metrics(tmp_path / "m.jsonl", {"event": "train", "step": 10}, half)
    rewind_metrics(path, 20, None)
    assert steps(path) == [(10, None)]
    MetricsFile(path).log({"event": "train", "step": 20})
    assert steps(path) == [(10, None), (20, None)]


def test_rewinding_drops_the_score_of_the_final_split(tmp_path):
    val, test = ({"event": "eval", "step": 20, "split": split} for split in ("val", "test"))
    path = write_metrics(tmp_path / "m.jsonl", val, test)
    rewind_metrics(path, 20, "test")
    assert steps(path) == [(20, "val")]


def test_rewinding_to_the_start_leaves_an_empty_file(tmp_path):
    path = write_metrics(tmp_path / "m.jsonl", {"event": "train", "step": 1})
    rewind_metrics(path, 0, None)
    assert path.read_text() == ""


def test_rewinding_makes_no_file(tmp_path):
    rewind_metrics(tmp_path / "m.jsonl", 5, "test")
    assert list(tmp_path.iterdir()) == []


# --- several trackers


class Recorder(Tracker):
    def __init__(self, fails_at: tuple[int, ...] = (), fails_to_close: bool = False) -> None:
        self.fails_at, self.fails_to_close = fails_at, fails_to_close
        self.asked: list[int] = []
        self.closed = 0

    def log(self, record) -> None:
        self.asked.append(record["step"])
        if record["step"] in self.fails_at:
            raise OSError("disk full")

    def close(self, summary) -> None:
        self.closed += 1
        if self.fails_to_close:
            raise ConnectionError("nobody there")


class Broken(Recorder):
    pass


def test_a_tracker_that_raises_is_named_once_and_dropped_and_the_others_go_on():
    warnings: list[str] = []
    trackers = Trackers(warnings.append)
    before, broken, after = Recorder(), Broken(fails_at=(2, 3)), Recorder()
    for tracker in (before, broken, after):
        trackers.add(lambda tracker=tracker: tracker)
    for step in (1, 2, 3, 4):
        trackers.log({"event": "train", "step": step})
    trackers.close({"status": "finished"})
    assert before.asked == after.asked == [1, 2, 3, 4]
    assert before.closed == after.closed == 1
    assert broken.asked == [1, 2]
    assert broken.closed == 0
    assert warnings == ["Broken failed; training goes on without (OSError: disk full)"]


def test_a_tracker_that_cannot_start_is_reported_and_the_others_go_on():
    def build() -> Recorder:
        raise PermissionError("not yours")

    warnings: list[str] = []
    trackers, other = Trackers(warnings.append), Recorder()
    trackers.add(build)
    trackers.add(lambda: other)
    trackers.log({"event": "train", "step": 1})
    assert other.asked == [1]
    assert warnings == ["starting a tracker failed; training goes on without (PermissionError: not yours)"]


def test_a_tracker_that_cannot_close_does_not_keep_the_others_from_closing():
    warnings: list[str] = []
    trackers, other = Trackers(warnings.append), Recorder()
    trackers.add(lambda: Broken(fails_to_close=True))
    trackers.add(lambda: other)
    trackers.close({"status": "finished"})
    assert other.closed == 1
    assert warnings == ["Broken failed; training goes on without (ConnectionError: nobody there)"]


def test_a_tracker_needs_only_the_methods_that_it_has_something_to_do_in():
    trackers = Trackers(pytest.fail)
    trackers.add(Tracker)
    trackers.log(TRAIN)
    trackers.show(None)
    trackers.alert("title", "text")
    assert trackers.flush() == []
    trackers.close({})


# --- scores as text


def test_the_table_has_every_class_and_every_metric():
    assert score_table(EVAL).splitlines() == [
        "                  IoU     Dice",
        "  road            0.7500  0.8750",
        "  sky             absent  absent",
        "  pavement        0.2500  0.3750",
        "  --------------",
        "  mIoU            0.5000",
        "  mDice           0.6250",
        "  pixel accuracy  0.8000",
        "  mean accuracy   0.6000",
        "  fw IoU          0.7000",
    ]


def test_the_table_of_an_older_run_has_the_metrics_of_its_record():
    assert score_table(WITHOUT_DICE | {"miou": None, "iou": {"a class with a long name": 0.5}}).splitlines() == [
        "                            IoU",
        "  a class with a long name  0.5000",
        "  ------------------------",
        "  mIoU                      absent",
        "  pixel accuracy            0.8000",
        "  mean accuracy             0.6000",
        "  fw IoU                    0.7000",
    ]


@pytest.mark.parametrize(("record", "dice"), [(EVAL, "mDice 0.6250, "), (WITHOUT_DICE, "")])
def test_the_score_line_has_every_metric_and_says_where_the_scores_are_from(record, dice):
    assert score_line(record | {"miou": None}) == (
        f"val at step 40 (short520, flip): mIoU absent over 2 classes, {dice}pixel accuracy 0.8000, "
        "mean accuracy 0.6000, fw IoU 0.7000, 101 images"
    )


def test_a_metric_of_the_table_of_metrics_is_shown(monkeypatch):
    """Without a change to the console."""
    monkeypatch.setitem(METRICS, "kappa", Metric("kappa", lambda counts: 0.5))
    monkeypatch.setitem(CLASS_METRICS, "recall2", Metric("recall²", lambda counts: []))
    record = EVAL | {"kappa": 0.3, "recall2": dict.fromkeys(EVAL["iou"], 0.2)}
    assert "kappa 0.3000, 101 images" in score_line(record)
    lines = score_table(record).splitlines()
    assert lines[:2] == ["                  IoU     Dice    recall²", "  road            0.7500  0.8750  0.2000"]
    assert lines[-1] == "  kappa           0.3000"


# --- imports


@pytest.mark.parametrize("path", sorted((ROOT / "fcn" / "tracking").glob("*.py")), ids=lambda path: path.stem)
def test_importing_a_module_of_this_room_imports_nothing_heavy(path):
    """The trainer never imports wandb; `python -m fcn status` and `report` read records without PyTorch."""
    module = f"fcn.tracking.{path.stem}".removesuffix(".__init__")
    program = f"import sys, {module}; print(*{{'torch', 'wandb', 'matplotlib'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "\n"


# --- summary.json


@pytest.mark.parametrize("content", [None, "", '{"status": "fin'])
def test_no_summary_yet_is_an_empty_one(tmp_path, content):
    if content is not None:
        (tmp_path / "summary.json").write_text(content)
    assert read_summary(tmp_path) == {}


def test_the_summary_is_read_back(tmp_path):
    (tmp_path / "summary.json").write_text('{"status": "finished", "miou": null}')
    assert read_summary(tmp_path) == {"status": "finished", "miou": None}
