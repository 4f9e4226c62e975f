import fcntl
import io
import json
import math
import os
import pty
import re
import struct
import termios
import threading
from pathlib import Path

import pytest

from fcn.tracking import (
    Console,
    JsonLines,
    Trackers,
    duration,
    read_summary,
    rewind_metrics,
    score_line,
    score_table,
    write_atomically,
)

ROOT = Path(__file__).parents[1]
STAMPED = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d "
TRAIN = {
    "event": "train", "step": 1200, "steps": 30000, "epoch": 13.08, "loss": 0.71234, "lr": 0.0097, "grad_norm": 1.5,
    "images_per_s": 123.44, "data_wait": 0.05, "eta_s": 11107.0,
}  # fmt: skip
EVAL = {
    "event": "eval", "step": 40, "split": "val", "miou": 0.5, "iou": {"road": 0.75, "sky": None, "pavement": 0.25},
    "pixel_acc": 0.8, "mean_acc": 0.6, "fw_iou": 0.7, "classes": 2, "images": 101,
    "protocol": "short520, flip",
}  # fmt: skip


# --- console


def test_elsewhere_than_on_a_terminal_every_line_is_stamped_and_goes_to_the_log_too(tmp_path):
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


def test_a_train_record_is_a_progress_line_with_its_numbers():
    stream = io.StringIO()
    Console(stream).log(TRAIN)
    words = ["1200/30000", "13.08", "0.7123", "9.70e-03", "123.4", "5%", "3:05:07"]
    assert [word for word in words if word not in stream.getvalue()] == []
    assert stream.getvalue().count("\n") == 1


class Terminal:
    """A real pseudo-terminal; `text()` is all that was written to it."""

    def __init__(self, columns: int = 80) -> None:
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        self.stream = os.fdopen(slave, "w")
        self.received = b""
        # Read along: a terminal that nobody reads blocks its writer.
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
    """What a terminal of that width shows: carriage return, newline, wrapping, and letters that overwrite."""
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


def test_json_lines_writes_a_record_a_line_at_once_and_continues_the_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"event": "train", "step": 1}\n')
    tracker = JsonLines(path)
    for number, record in enumerate((TRAIN, EVAL), start=2):
        tracker.log(record)
        assert len(path.read_text().splitlines()) == number
    tracker.close({})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"event": "train", "step": 1}, TRAIN, EVAL]


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_number_that_json_does_not_have_leaves_the_file_valid(tmp_path, value):
    JsonLines(tmp_path / "metrics.jsonl").log(TRAIN | {"grad_norm": value})  # under fp16 an overflow is normal

    def refuse(constant: str) -> None:
        pytest.fail(f"{constant} is no JSON")

    json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)


def write_metrics(path: Path, *lines: str | dict) -> Path:
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
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


@pytest.mark.parametrize("half", ['{"event": "tra', '{"event": "train", "step": 1', '{"event": "tr\n', "\n", "\0\0\0"])
def test_rewinding_drops_a_line_that_was_cut_in_half(tmp_path, half):
    path = write_metrics(tmp_path / "m.jsonl", {"event": "train", "step": 10}, half)
    rewind_metrics(path, 20, None)
    assert steps(path) == [(10, None)]
    JsonLines(path).log({"event": "train", "step": 20})
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


class Recorder:
    def __init__(self, fails_at: tuple[int, ...] = (), fails_to_close: bool = False) -> None:
        self.fails_at, self.fails_to_close = fails_at, fails_to_close
        self.asked: list[int] = []
        self.closed = 0

    def log(self, record) -> None:
        self.asked.append(record["step"])
        if record["step"] in self.fails_at:
            raise OSError("disk full")

    def alert(self, title, text) -> None:
        self.asked.append(title)

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
    assert len(warnings) == 1
    assert "Broken" in warnings[0]
    assert "disk full" in warnings[0]


def test_a_tracker_that_cannot_start_is_reported_and_the_others_go_on():
    def build() -> Recorder:
        raise PermissionError("not yours")

    warnings: list[str] = []
    trackers, other = Trackers(warnings.append), Recorder()
    trackers.add(build)
    trackers.add(lambda: other)
    trackers.log({"event": "train", "step": 1})
    assert other.asked == [1]
    assert len(warnings) == 1
    assert "not yours" in warnings[0]


def test_a_tracker_that_cannot_close_does_not_keep_the_others_from_closing():
    warnings: list[str] = []
    trackers, other = Trackers(warnings.append), Recorder()
    trackers.add(lambda: Broken(fails_to_close=True))
    trackers.add(lambda: other)
    trackers.close({"status": "finished"})
    assert other.closed == 1
    assert len(warnings) == 1


# --- text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0:00"),
        (9, "0:09"),
        (59.4, "0:59"),
        (59.6, "1:00"),
        (750, "12:30"),
        (3599.6, "1:00:00"),
        (11107, "3:05:07"),
        (360000, "100:00:00"),
    ],
)
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_the_table_names_every_class_and_says_absent():
    rows = {tuple(row.split()) for row in score_table(EVAL).splitlines()}
    assert {("road", "0.7500"), ("sky", "absent"), ("pavement", "0.2500")} <= rows
    assert {("mIoU", "0.5000"), ("pixel", "accuracy", "0.8000"), ("mean", "accuracy", "0.6000")} <= rows
    assert ("fw", "IoU", "0.7000") in rows


def test_the_score_line_says_where_the_score_is_from():
    line = score_line(EVAL | {"miou": None})
    for part in (
        "val",
        "step 40",
        "(short520, flip)",
        "mIoU absent",
        "over 2 classes",
        "0.8000",
        "0.6000",
        "0.7000",
        "101 images",
    ):
        assert part in line


# --- files


def test_writing_atomically_replaces_the_file_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "summary.json"
    for text in ("first", "ä second\n"):
        write_atomically(path, text)
        assert path.read_bytes() == text.encode("utf-8")
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("content", [None, "", '{"status": "fin'])
def test_no_summary_yet_is_an_empty_one(tmp_path, content):
    if content is not None:
        (tmp_path / "summary.json").write_text(content)
    assert read_summary(tmp_path) == {}


def test_the_summary_is_read_back(tmp_path):
    (tmp_path / "summary.json").write_text('{"status": "finished", "miou": null}')
    assert read_summary(tmp_path) == {"status": "finished", "miou": None}
