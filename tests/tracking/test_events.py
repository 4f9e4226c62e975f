"""What happens to a run becomes records: starts, warnings, failures."""

from __future__ import annotations

import io
import json
import os
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fcn.tracking import (
    Console,
    MetricsFile,
    Record,
    Tracker,
    Trackers,
    event,
    read_records,
    record_failure,
    resumed_steps,
    rewind_metrics,
)
from tests.checkpoints.test_saver import fill, mounted

NO_ROOM = "No space left on device"


def console_of(folder: Path) -> tuple[Console, io.StringIO]:
    stream = io.StringIO()
    return Console(stream, folder / "log.txt"), stream


def trackers_of(console: Console, folder: Path) -> Trackers:
    """The trackers of a run."""
    trackers = Trackers(console.warning)
    trackers.add(lambda: console)
    trackers.add(lambda: MetricsFile(folder / "metrics.jsonl", console.warning))
    console.attach(trackers.log)
    return trackers


def train_record(step: int, **more: object) -> Record:
    keys = ("loss", "images_per_s", "eta_s", "data_wait", "lr", "epoch")
    return {"event": "train", "step": step, "steps": 9, **dict.fromkeys(keys, 0.5), **more}


def summary_of(records: list[Record]) -> list[tuple]:
    """(event, step) of each record, with its text if it has one."""
    return [(r["event"], r["step"], *([r["text"]] if "text" in r else [])) for r in records]


def recorded(folder: Path) -> list[tuple]:
    """What is in metrics.jsonl, of which every line is a whole record."""
    path = folder / "metrics.jsonl"
    records = read_records(path)
    assert len(path.read_bytes().splitlines()) == len(records)
    return summary_of(records)


def said(text: str) -> list[str]:
    """Lines without their times."""
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", line) for line in text.splitlines())
    return [line[20:] for line in text.splitlines()]


class Recorder(Tracker):
    """Keeps what it is given; raises on records of an event in `fails`."""

    def __init__(self, *fails: str) -> None:
        self.records: list[Record] = []
        self.fails = fails

    def log(self, record: Record) -> None:
        self.records.append(record)
        if record["event"] in self.fails:
            raise ValueError("broken")


def in_threads(number: int, action: Callable[[str], None]) -> None:
    """Call `action` with a different letter from each of several threads, at the same time."""
    begin = threading.Barrier(number)

    def act(name: str) -> None:
        begin.wait()
        action(name)

    threads = [threading.Thread(target=act, args=(name,)) for name in "abcdefgh"[:number]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


# --- events become records


def test_warnings_and_notes_are_shown_and_recorded_with_the_step_before_them(tmp_path):
    console, stream = console_of(tmp_path)
    trackers = trackers_of(console, tmp_path)
    console.record(event("start", step=2, steps=9, facts={}))
    console.note("look here")
    trackers.log(train_record(3))
    console.warning("two\nlines")
    assert recorded(tmp_path) == [
        ("start", 2), ("note", 2, "look here"), ("train", 3), ("warning", 3, "two\nlines"),
    ]  # fmt: skip
    for record in read_records(tmp_path / "metrics.jsonl"):
        assert ("time" in record) == (record["event"] != "train")
        assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", record.get("time", "2026-01-01 00:00:00"))
    assert [line for line in said(stream.getvalue()) if "step" not in line] == [
        "note: look here", "warning: two", "lines",
    ]  # fmt: skip
    assert (tmp_path / "log.txt").read_text() == stream.getvalue()


def test_events_from_before_there_are_trackers_are_delivered_once_and_in_order(tmp_path):
    console, _ = console_of(tmp_path)
    console.warning("one")
    console.record(event("resume", step=4, checkpoint="c", changes=[]))
    console.note("two")
    trackers_of(console, tmp_path)
    console.warning("three")
    assert recorded(tmp_path) == [("warning", 0, "one"), ("resume", 4), ("note", 4, "two"), ("warning", 4, "three")]
    assert resumed_steps(read_records(tmp_path / "metrics.jsonl")) == [4]
    again = Recorder()
    console.attach(again.log)
    assert again.records == []


def test_a_continued_file_goes_on_with_its_last_step(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps(train_record(7)) + "\n")
    console, _ = console_of(tmp_path)
    console.warning("a checkpoint is broken")
    trackers_of(console, tmp_path)
    assert recorded(tmp_path) == [("train", 7), ("warning", 7, "a checkpoint is broken")]


@pytest.mark.parametrize("kind", ["start", "resume", "stop", "finish", "warning", "note", "failure"])
def test_the_console_does_not_show_an_event_again(kind):
    stream = io.StringIO()
    Console(stream).log(event(kind, step=1, text="t"))
    assert stream.getvalue() == ""


def test_warnings_from_several_threads_are_whole_records_in_the_order_of_each_thread(tmp_path):
    """And every tracker receives all records in the same order."""
    console, _ = console_of(tmp_path)
    trackers = trackers_of(console, tmp_path)
    recorder = Recorder()
    trackers.add(lambda: recorder)

    def act(name: str) -> None:
        for number in range(200):
            if name == "a":
                trackers.log(train_record(number))
            else:
                console.warning(f"{name} {number} " + "x" * 500)

    in_threads(4, act)
    found = recorded(tmp_path)
    assert [step for kind, step, *_ in found if kind == "train"] == list(range(200))
    warned = [text[0].split()[:2] for kind, _, *text in found if kind == "warning"]
    for name in "bcd":
        assert [number for who, number in warned if who == name] == [str(number) for number in range(200)]
    assert len(found) == 4 * 200
    assert [(r["event"], r.get("text")) for r in recorder.records] == [
        (kind, text[0] if text else None) for kind, _, *text in found
    ]
    steps = [step for _, step, *_ in found]
    assert steps == sorted(steps), "a warning has the step of the record before it"


# --- trackers that fail


def test_a_tracker_that_fails_is_dropped_with_one_warning_although_the_warning_is_a_record(tmp_path):
    console, stream = console_of(tmp_path)
    broken, last = Recorder("train", "warning"), Recorder()
    trackers = Trackers(console.warning)
    trackers.add(lambda: broken)
    trackers.add(lambda: MetricsFile(tmp_path / "metrics.jsonl", console.warning))
    trackers.add(lambda: last)
    console.attach(trackers.log)
    trackers.log(train_record(1))
    trackers.log(train_record(2))
    warning = "Recorder failed; training goes on without (ValueError: broken)"
    assert summary_of(broken.records) == [("train", 1)]
    assert recorded(tmp_path) == [("train", 1), ("warning", 1, warning), ("train", 2)]
    assert [record["event"] for record in last.records] == ["train", "warning", "train"]
    assert said(stream.getvalue()) == [f"warning: {warning}"]


def test_trackers_that_fail_on_a_warning_are_each_warned_of_once(tmp_path):
    console, stream = console_of(tmp_path)
    trackers = trackers_of(console, tmp_path)
    for broken in (Recorder("warning"), Recorder("warning")):
        trackers.add(lambda broken=broken: broken)
    console.warning("first")
    console.warning("last")
    warning = "warning: Recorder failed; training goes on without (ValueError: broken)"
    assert said(stream.getvalue()) == ["warning: first", warning, warning, "warning: last"]
    assert [text for _, _, text in recorded(tmp_path)] == [
        line.removeprefix("warning: ") for line in said(stream.getvalue())
    ]


def test_a_tracker_that_fails_in_several_threads_is_warned_of_once(tmp_path):
    console, stream = console_of(tmp_path)
    trackers = trackers_of(console, tmp_path)
    for _ in range(20):
        trackers.add(lambda: Recorder("train"))
    in_threads(8, lambda name: trackers.log(train_record(1, who=name)))
    assert len([line for line in said(stream.getvalue()) if "Recorder failed" in line]) == 20
    assert [kind for kind, *_ in recorded(tmp_path)].count("train") == 8


def test_a_warning_from_a_tracker_that_closes_late_is_recorded(tmp_path):
    class Late(Tracker):
        def close(self, summary: Record) -> None:
            threading.Thread(target=console.warning, args=("the server does not answer",)).start()

    console, stream = console_of(tmp_path)
    trackers = trackers_of(console, tmp_path)
    trackers.add(Late)
    trackers.log(train_record(1))
    trackers.close({"status": "finished"})
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    assert recorded(tmp_path) == [("train", 1), ("warning", 1, "the server does not answer")]
    assert said(stream.getvalue())[1:] == ["warning: the server does not answer"]


# --- a full disk


@pytest.fixture
def disk(tmp_path) -> Iterator[Path]:
    with mounted(tmp_path / "disk", "256k") as folder:
        yield folder


@pytest.mark.parametrize("threads", [1, 4])
def test_a_full_disk_is_one_warning_and_every_record_is_written_when_there_is_room(disk, threads):
    """The log and the metrics are on that disk; the terminal shows the warning."""
    console, stream = console_of(disk)
    trackers = trackers_of(console, disk)
    trackers.log(train_record(0))
    filler = fill(disk, leave=4096)
    in_threads(threads, lambda name: [trackers.log(train_record(1, who=name, padding="x" * 500)) for _ in range(30)])
    (warning,) = [line for line in said(stream.getvalue()) if "cannot be written" in line]
    assert re.fullmatch(
        rf"warning: {disk}/metrics\.jsonl: \d+ line\(s\) cannot be written \({NO_ROOM}\); it is kept and written when "
        r"there is room; free space there",
        warning,
    )
    (problem,) = trackers.flush()
    assert re.fullmatch(rf"{disk}/metrics\.jsonl: \d+ line\(s\) cannot be written \({NO_ROOM}\)", problem)
    written = recorded(disk)
    filler.unlink()
    assert trackers.flush() == []
    found = recorded(disk)
    assert found[: len(written)] == written
    assert [step for kind, step, *_ in found if kind == "train"] == [0] + [1] * 30 * threads
    assert [(step, f"warning: {text[0]}") for kind, step, *text in found if kind == "warning"] == [(1, warning)]
    console.line("room again")
    assert (disk / "log.txt").read_text() == stream.getvalue()


def test_a_disk_that_is_full_again_is_warned_of_again(disk):
    console, stream = console_of(disk.parent)
    trackers = trackers_of(console, disk)
    for _ in range(2):
        filler = fill(disk)
        for step in range(1, 40):
            trackers.log(train_record(step, padding="x" * 500))
        filler.unlink()
        assert trackers.flush() == []
        trackers.log(train_record(40))
    assert len([line for line in said(stream.getvalue()) if "cannot be written" in line]) == 2
    assert [step for kind, step, *_ in recorded(disk) if kind == "train"] == list(range(1, 41)) * 2


# --- a resumed run


def test_a_resumed_run_repeats_steps_and_keeps_what_happened(tmp_path):
    path = tmp_path / "metrics.jsonl"
    records = [
        event("start", step=0, steps=9, facts={}), train_record(1), event("warning", step=1, text="w"), train_record(2),
        {"event": "replaced", "step": 2, "epoch": 1, "faults": []}, event("note", step=2, text="n"),
        {"event": "eval", "step": 1, "split": "val"}, {"event": "eval", "step": 1, "split": "test"},
        event("stop", step=2), event("failure", step=2, text="f"),
    ]  # fmt: skip
    lines = [json.dumps(record) + "\n" for record in records]
    path.write_text("".join(lines) + '{"event": "tr')
    rewind_metrics(path, 1, "test")
    assert path.read_text().splitlines(keepends=True) == [lines[kept] for kept in (0, 1, 2, 5, 6, 8, 9)]
    assert [kind for kind, *_ in recorded(tmp_path)] == ["start", "train", "warning", "note", "eval", "stop", "failure"]


# --- failures


def test_what_ends_a_run_is_in_its_log_and_its_records(tmp_path):
    console, stream = console_of(tmp_path)
    trackers_of(console, tmp_path).log(train_record(7))
    record_failure(tmp_path, "data: broken\noptim: too")
    log = (tmp_path / "log.txt").read_text()
    assert said(log.removeprefix(stream.getvalue())) == ["error: data: broken", "error: optim: too"]
    assert recorded(tmp_path) == [("train", 7), ("failure", 7, "data: broken\noptim: too")]
    assert "time" in read_records(tmp_path / "metrics.jsonl")[-1]


def test_a_run_that_fails_before_its_first_record_has_a_failure_at_step_0(tmp_path):
    record_failure(tmp_path, "data.root: no such directory")
    assert said((tmp_path / "log.txt").read_text()) == ["error: data.root: no such directory"]
    assert recorded(tmp_path) == [("failure", 0, "data.root: no such directory")]


def test_a_failure_after_damaged_lines_is_recorded(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(json.dumps(train_record(3)).encode() + b"\n\xff\xfe\n\0\0\n")
    record_failure(tmp_path, "why \udc80")
    assert summary_of(read_records(path)) == [("train", 3), ("failure", 3, "why \udc80")]


def test_a_failure_in_a_directory_that_is_gone_makes_no_directory(tmp_path):
    record_failure(tmp_path / "nowhere", "text")
    assert os.listdir(tmp_path) == []


def test_a_failure_on_a_full_disk_raises_nothing_and_leaves_whole_lines(disk):
    console, stream = console_of(disk)
    trackers_of(console, disk).log(train_record(7))
    filler = fill(disk)
    record_failure(disk, "x" * 10_000)
    assert recorded(disk) == [("train", 7)]
    assert (disk / "log.txt").read_text() == stream.getvalue()
    filler.unlink()
    record_failure(disk, "again")
    assert recorded(disk) == [("train", 7), ("failure", 7, "again")]


def test_a_failure_in_a_directory_that_cannot_be_written_raises_nothing(tmp_path):
    (tmp_path / "run").write_text("a file")
    record_failure(tmp_path / "run", "text")
    assert (tmp_path / "run").read_text() == "a file"
