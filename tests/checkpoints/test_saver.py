"""Saving in the background, on disks that are slow, full, read-only, gone or broken."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fcn.checkpoints import BackgroundSaver, find_newest, list_checkpoints, load_checkpoint
from fcn.checkpoints.folder import verify
from fcn.files import write_atomically
from fcn.tracking import Console, MetricsFile, rewind_metrics

ROOT = Path(__file__).parents[2]
PAGE = 4096
FLOATS = 40_000
"""Of a state, 156 KiB: some fit on a small disk, and a write can fail in the middle of one."""


def state(step: int) -> dict[str, Any]:
    return {"step": step, "model": {"w": torch.full((FLOATS,), float(step))}}


def assert_whole(path: Path, *steps: int) -> None:
    loaded = load_checkpoint(path)
    assert loaded["step"] in steps
    assert (loaded["model"]["w"] == loaded["step"]).all()


def save(saver: BackgroundSaver, name: str, step: int) -> None:
    saver.save(name, state(step))
    saver.wait()


def step_name(step: int) -> str:
    return f"step_{step:08d}.pt"


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def with_checksums(*files: str) -> set[str]:
    return {*files, *(f"{name}.sha256" for name in files)}


# --- real disks


@contextlib.contextmanager
def mounted(folder: Path, size: str) -> Iterator[Path]:
    """A small real disk, in memory; the test is skipped where that needs more rights."""
    if os.geteuid() != 0 or not shutil.which("mount"):
        pytest.skip("needs root and mount(8), to make a small file system")
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "fcn-test", folder], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"may not mount a small file system: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def room(folder: Path) -> int:
    """Free bytes of a disk."""
    disk = os.statvfs(folder)
    return disk.f_bavail * disk.f_frsize


def fill(disk: Path, leave: int = 0) -> Path:
    """Fill a disk up to `leave` bytes; returns the file that takes the room."""
    filler = disk / "filler"
    with open(filler, "wb", buffering=0) as file, contextlib.suppress(OSError):
        while (rest := room(disk) - leave) > 0:
            file.write(bytes(rest))
    assert room(disk) == leave
    return filler


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with mounted(tmp_path / "disk", "1m") as folder:
        yield folder


# --- what is saved, and when


class StuckDisk:
    """Every fsync waits until the disk is let go; counts who is in one, and notes the file."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached, self.go = threading.Event(), threading.Event()
        self.inside = self.most = 0
        self.files: list[str] = []
        self.lock, self.fsync = threading.Lock(), os.fsync
        monkeypatch.setattr(os, "fsync", self)

    def __call__(self, descriptor: int) -> None:
        with self.lock:
            self.inside += 1
            self.most = max(self.most, self.inside)
            self.files.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        self.reached.set()
        assert self.go.wait(20)
        self.fsync(descriptor)
        with self.lock:
            self.inside -= 1

    def checkpoints(self) -> list[str]:
        """The step_*.pt that were written, in order."""
        names = [name.removeprefix(".").partition(".pt")[0] for name in self.files if name.startswith(".step")]
        return [f"{name}.pt" for name in dict.fromkeys(names)]


@pytest.fixture
def stuck(monkeypatch: pytest.MonkeyPatch) -> Iterator[StuckDisk]:
    disk = StuckDisk(monkeypatch)
    yield disk
    disk.go.set()


@pytest.fixture
def warnings() -> list[str]:
    return []


def test_a_save_holds_the_state_as_it_was_at_the_call(tmp_path, stuck, warnings):
    saver = BackgroundSaver(tmp_path, 9, warnings.append)
    saver.save(step_name(1), state(1))
    assert stuck.reached.wait(10)  # the next one cannot have begun before the changes
    weight = torch.nn.Parameter(torch.zeros(3))
    moment, scale, average = torch.zeros(2), torch.tensor(0.0), torch.zeros(2, 2).t()
    rates, best = [0.1], {"miou": 0.5}
    optimizer = {"state": {0: {"m": moment}}, "groups": [{"lr": rates, "scale": [scale], "pair": (average, 7)}]}
    saver.save(step_name(2), {"step": 2, "model": {"w": weight}, "optimizer": optimizer, "best": best})
    with torch.no_grad():
        for tensor in (weight, moment, scale, average):
            tensor += 1
    rates[0], best["miou"], optimizer["groups"][0]["new"] = 0.2, 0.6, True
    stuck.go.set()
    saver.wait()
    loaded = load_checkpoint(tmp_path / step_name(2))
    group = loaded["optimizer"]["groups"][0]
    found = (loaded["model"]["w"], loaded["optimizer"]["state"][0]["m"], group["scale"][0], group["pair"][0])
    assert [float(tensor.sum()) for tensor in found] == [0.0] * 4
    assert (group["lr"], loaded["best"], group["pair"][1], "new" in group) == ([0.1], {"miou": 0.5}, 7, False)


def test_a_stuck_disk_holds_up_nobody_until_a_third_save(tmp_path, stuck, warnings):
    saver = BackgroundSaver(tmp_path, 2, warnings.append)
    saver.save(step_name(1), state(1))
    assert stuck.reached.wait(10)
    saver.save(step_name(2), state(2))
    third = threading.Thread(target=saver.save, args=(step_name(3), state(3)))
    third.start()
    third.join(0.2)
    assert third.is_alive(), "one that is written and one that waits are enough copies of the state"
    assert list_checkpoints(tmp_path) == []
    assert stuck.checkpoints() == [step_name(1)]
    stuck.go.set()
    third.join(10)
    saver.wait()
    assert stuck.checkpoints() == [step_name(step) for step in (1, 2, 3)]
    assert stuck.most == 1, "never two writers"
    assert names(tmp_path) == with_checksums(step_name(2), step_name(3))
    assert (saver.unsaved, warnings) == ({}, [])


def test_waiting_returns_when_all_is_on_the_disk(tmp_path, stuck, warnings):
    saver = BackgroundSaver(tmp_path, 2, warnings.append)
    saver.save(step_name(1), state(1))
    saver.save("best.pt", state(1))
    waiting = threading.Thread(target=saver.wait)
    waiting.start()
    waiting.join(0.1)
    assert waiting.is_alive()
    stuck.go.set()
    waiting.join(10)
    assert names(tmp_path) == with_checksums(step_name(1), "best.pt")


def test_a_bug_in_the_thread_is_raised_where_the_run_sees_it(tmp_path, warnings):
    saver = BackgroundSaver(tmp_path, 2, warnings.append)
    saver.save(step_name(1), {"step": 1, "model": threading.Lock()})
    with pytest.raises(TypeError, match="lock"):
        saver.wait()
    saver.save(step_name(2), {"step": 2, "model": threading.Lock()})
    while not saver._running[0].done():
        time.sleep(0.001)
    with pytest.raises(TypeError, match="lock"):
        saver.save(step_name(3), state(3))
    assert names(tmp_path) == set()


# --- a full disk

# How much room is left, of the room that a checkpoint of so many bytes takes.
ROOM: dict[str, Callable[[int], int]] = {
    "none": lambda size: 0,
    "for a part": lambda size: size // 2 // PAGE * PAGE,
    "for all but its checksum": lambda size: -(-size // PAGE) * PAGE,
}


@pytest.mark.parametrize("left", ROOM)
def test_a_full_disk_costs_that_save_alone(disk, warnings, left):
    folder = disk / "run" / "checkpoints"
    saver = BackgroundSaver(folder, 1, warnings.append)
    save(saver, step_name(1), 1)
    filler = fill(disk, ROOM[left]((folder / step_name(1)).stat().st_size))
    free, before = room(disk), names(folder)
    for number, step in enumerate((2, 3), start=1):
        save(saver, step_name(step), step)
        assert_whole(folder / step_name(1), 1)
        assert find_newest(folder) == folder / step_name(1)
        assert (room(disk), names(folder)) == (free, before), "nothing half-written takes room"
        assert len(warnings) == number
        for part in (folder / step_name(step), "No space left on device", "free space", folder / step_name(1)):
            assert str(part) in warnings[-1]
        (unsaved,) = saver.unsaved.values()
        assert str(folder / step_name(step)) in unsaved
        assert "No space left on device" in unsaved
    filler.unlink()
    save(saver, step_name(4), 4)
    assert_whole(folder / step_name(4), 4)
    assert names(folder) == with_checksums(step_name(4))
    assert saver.unsaved == {}
    assert len(warnings) == 2


@pytest.mark.parametrize("left", ROOM)
def test_on_a_full_disk_the_old_best_stays_and_the_new_one_is_written_later(disk, warnings, left):
    saver = BackgroundSaver(disk, 1, warnings.append)
    save(saver, "best.pt", 1)
    filler = fill(disk, ROOM[left]((disk / "best.pt").stat().st_size))
    free = room(disk)
    save(saver, "best.pt", 2)
    save(saver, step_name(3), 3)
    assert_whole(disk / "best.pt", 1)
    assert room(disk) == free
    assert set(saver.unsaved) == {"best.pt", "step"}
    filler.unlink()
    save(saver, step_name(4), 4)
    assert_whole(disk / "best.pt", 2)  # training never comes back to those weights
    assert_whole(disk / step_name(4), 4)
    assert saver.unsaved == {}
    save(saver, step_name(5), 5)
    assert names(disk) == with_checksums(step_name(5), "best.pt")
    assert len((disk / "best.pt.sha256").read_text().splitlines()) == 1


def test_a_later_best_is_not_replaced_by_an_earlier_one_that_failed(disk, warnings):
    saver = BackgroundSaver(disk, 1, warnings.append)
    filler = fill(disk)
    save(saver, "best.pt", 1)
    filler.unlink()
    save(saver, "best.pt", 2)
    save(saver, step_name(3), 3)
    assert_whole(disk / "best.pt", 2)
    assert saver.unsaved == {}


def test_what_a_killed_save_left_does_not_keep_the_disk_full(disk, warnings):
    (disk / ".step_00000001.pt.tmp").write_bytes(b"half a checkpoint")
    with open(disk / ".step_00000001.pt.tmp", "ab", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(room(disk) or PAGE)):
            pass
    assert room(disk) == 0
    saver = BackgroundSaver(disk, 1, warnings.append)
    save(saver, step_name(2), 2)
    assert_whole(disk / step_name(2), 2)
    assert (saver.unsaved, warnings) == ({}, [])


# --- other disks


def remount(disk: Path, mode: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{mode}", disk], check=True)


def test_a_read_only_disk_costs_that_save_alone(disk, warnings):
    saver = BackgroundSaver(disk, 1, warnings.append)
    save(saver, step_name(1), 1)
    remount(disk, "ro")
    save(saver, step_name(2), 2)
    for part in (disk / step_name(2), "Read-only file system", "make it writable", disk / step_name(1)):
        assert str(part) in warnings[0]
    assert str(disk / step_name(2)) in saver.unsaved["step"]
    assert_whole(disk / step_name(1), 1)
    remount(disk, "rw")
    save(saver, step_name(3), 3)
    assert names(disk) == with_checksums(step_name(3))
    assert_whole(disk / step_name(3), 3)
    assert saver.unsaved == {}
    assert len(warnings) == 1


@pytest.mark.parametrize("resumed", [False, True])
def test_a_folder_that_vanished_is_made_again_and_that_is_said(tmp_path, warnings, resumed):
    folder = tmp_path / "run" / "checkpoints"
    saver = BackgroundSaver(folder, 2, warnings.append)
    save(saver, step_name(1), 1)
    assert warnings == [], "at first there is no folder"
    if resumed:
        saver = BackgroundSaver(folder, 2, warnings.append)
    shutil.rmtree(tmp_path / "run")
    save(saver, step_name(2), 2)
    assert_whole(folder / step_name(2), 2)
    assert len(warnings) == 1
    assert str(folder) in warnings[0]
    assert "vanished" in warnings[0]
    assert saver.unsaved == {}


def test_a_folder_that_became_a_file_is_an_unsaved_state_and_no_crash(tmp_path, warnings):
    folder = tmp_path / "checkpoints"
    saver = BackgroundSaver(folder, 2, warnings.append)
    save(saver, step_name(1), 1)
    shutil.rmtree(folder)
    folder.write_text("")
    save(saver, step_name(2), 2)
    assert "there is no other checkpoint" in warnings[-1]
    assert "step" in saver.unsaved


class BrokenDisk:
    """From its `first` file operation in `folder` on, `count` of them end with EIO, some after they were done."""

    def __init__(self, folder: Path, first: int, count: int, done: bool) -> None:
        self.folder, self.failing, self.done = folder, range(first, first + count), done
        self.operations: list[str] = []

    def failed(self) -> bool:
        return len(self.operations) > self.failing.start

    def operate(self, what: str, path: Any, action: Callable[[], Any]) -> Any:
        if not str(path).startswith(str(self.folder)):
            return action()
        self.operations.append(what)
        if len(self.operations) - 1 not in self.failing:
            return action()
        if self.done and what in ("replace", "unlink"):
            action()
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        """At the border to the system: pathlib's open, replace, unlink and is_file, raw writes, os.open, os.fsync."""
        disk, real_open, real_fsync = self, Path.open, os.fsync

        class Raw(io.FileIO):
            def write(self, data: Any) -> int:
                return disk.operate("write", self.name, lambda: super(Raw, self).write(data))

        def path_open(path: Path, mode: str = "r", *args: Any, **options: Any) -> Any:
            def action() -> Any:
                if mode == "wb":
                    return io.BufferedWriter(Raw(path, mode))
                return real_open(path, mode, *args, **options)

            return disk.operate(f"open {mode}", path, action)

        def wrapped(function: Callable[..., Any], what: str) -> Callable[..., Any]:
            return lambda path, *rest, **options: disk.operate(what, path, lambda: function(path, *rest, **options))

        def fsync(descriptor: int) -> None:
            path = Path(f"/proc/self/fd/{descriptor}").readlink()
            kind = "fsync folder" if path == self.folder else "fsync"
            disk.operate(kind, path, lambda: real_fsync(descriptor))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Path, "open", path_open)
            for method in ("replace", "unlink", "is_file", "is_dir", "mkdir", "exists"):
                patch.setattr(Path, method, wrapped(getattr(Path, method), method))
            patch.setattr(os, "open", wrapped(os.open, "os.open"))
            patch.setattr(os, "fsync", fsync)
            yield


@pytest.mark.parametrize("done", [False, True], ids=["not done", "done"])
@pytest.mark.parametrize("count", [1, 10_000], ids=["once", "from then on"])
@pytest.mark.parametrize("name", [step_name(2), "best.pt"])
def test_an_error_of_any_file_operation_leaves_the_old_or_the_new_one(tmp_path, name, count, done):
    seen: set[str] = set()
    first = 0
    while True:
        folder = tmp_path / str(first)
        warnings: list[str] = []
        saver = BackgroundSaver(folder, 1, warnings.append)
        save(saver, step_name(1), 1)
        save(saver, "best.pt", 1)
        broken = BrokenDisk(folder, first, count, done)
        with broken():
            save(saver, name, 2)
        if not broken.failed():
            break
        where = (first, broken.operations[first])
        seen.add(broken.operations[first])
        newest = find_newest(folder)
        assert newest, where
        assert_whole(newest, 1, 2)
        assert_whole(folder / "best.pt", 1, 2)
        expected = newest if name != "best.pt" else folder / name
        if saver.unsaved:
            assert any(str(folder / name) in text and "Input/output error" in text for text in warnings), where
        else:
            assert_whole(expected, 2)  # no error is passed over in silence
        if count == 1 and broken.operations[first] != "unlink":
            of_none = [path for path in folder.glob("*.sha256") if not path.with_suffix("").exists()]
            assert of_none == [], where
            assert not list(folder.glob(".*.tmp")), where
        save(saver, step_name(3), 3)
        save(saver, "best.pt", 3)
        assert find_newest(folder) == folder / step_name(3), where
        assert_whole(folder / "best.pt", 3)
        assert saver.unsaved == {}, where
        assert names(folder) == with_checksums(step_name(3), "best.pt"), where
        first += 1
    assert {"open wb", "write", "fsync", "replace", "os.open", "fsync folder", "mkdir"} <= seen
    assert ("unlink" in seen) == (name != "best.pt"), "retention"


@pytest.mark.parametrize("damage", [b"\xff\xfe\x00", b"", b"0123"])
def test_a_damaged_checksum_of_the_old_best_is_no_obstacle_to_the_new_one(tmp_path, warnings, stuck, damage):
    stuck.go.set()
    saver = BackgroundSaver(tmp_path, 1, warnings.append)
    save(saver, "best.pt", 1)
    (tmp_path / "best.pt.sha256").write_bytes(damage)
    save(saver, "best.pt", 2)
    assert verify(tmp_path / "best.pt") is None
    assert_whole(tmp_path / "best.pt", 2)
    assert (saver.unsaved, warnings) == ({}, [])


# --- the other files of a run on a full disk


def steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def record(step: int) -> dict[str, Any]:
    return {"event": "train", "step": step, "note": "x" * 1500}


def test_metrics_miss_no_step_when_the_disk_was_full_for_a_while(disk, warnings):
    path = disk / "metrics.jsonl"
    tracker = MetricsFile(path, warnings.append)
    tracker.log(record(1))
    filler = fill(disk)
    for step in range(2, 9):
        tracker.log(record(step))
        written = steps(path)  # the last one is no half line
        assert written == list(range(1, len(written) + 1))
    assert len(written) == 2, "the rest of the page"
    assert len(warnings) == 1
    for part in (str(path), "No space left on device", "free space"):
        assert part in warnings[0]
    assert "6 line(s)" in (tracker.flush() or "")
    filler.unlink()
    tracker.log(record(9))
    assert steps(path) == list(range(1, 10))
    assert tracker.flush() is None
    tracker.log(record(10))
    tracker.close({})
    assert steps(path) == list(range(1, 11))
    assert len(warnings) == 1


def test_metrics_that_wait_are_written_at_the_close(disk, warnings):
    tracker = MetricsFile(disk / "metrics.jsonl", warnings.append)
    filler = fill(disk)
    for step in (1, 2):
        tracker.log(record(step))
    assert steps(disk / "metrics.jsonl") == []
    filler.unlink()
    tracker.close({})
    assert steps(disk / "metrics.jsonl") == [1, 2]


def test_half_a_line_that_cannot_be_undone_is_completed(disk, monkeypatch):
    def broken(descriptor: int, length: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "ftruncate", broken)
    path = disk / "metrics.jsonl"
    tracker = MetricsFile(path)
    tracker.log(record(1))
    filler = fill(disk)
    for step in range(2, 9):
        tracker.log(record(step))
    assert path.stat().st_size == PAGE
    assert not path.read_text().endswith("\n")
    filler.unlink()
    tracker.log(record(9))
    assert steps(path) == list(range(1, 10))


def test_a_new_outage_is_said_again(disk, warnings):
    tracker = MetricsFile(disk / "metrics.jsonl", warnings.append)
    for step in range(1, 8, 2):
        filler = fill(disk)
        tracker.log(record(step))
        tracker.log(record(step) | {"note": "x" * PAGE})
        filler.unlink()
        tracker.log(record(step + 1))
    assert len(warnings) == 4


def test_the_log_misses_no_line_when_the_disk_was_full_for_a_while(disk):
    shown = io.StringIO()
    console = Console(shown, disk / "log.txt")
    filler = fill(disk)
    for number in range(200):
        console.line(f"line {number} of many")
    assert len((disk / "log.txt").read_text().splitlines()) < 200
    filler.unlink()
    console.line("the last \udcff")  # a file name that is no UTF-8
    assert shown.getvalue().encode(errors="backslashreplace") == (disk / "log.txt").read_bytes()


def test_standard_output_on_a_full_disk_goes_on_later_and_does_not_change_the_status(disk):
    script = """
import sys
from pathlib import Path
from fcn.tracking import Console
console = Console()
filler = Path(sys.argv[1])
for line in range(100):
    console.line("before " * 20)
if sys.argv[2] == "later":
    filler.unlink()
    console.line("after")
sys.exit(74)
"""
    # Unbuffered, there is nothing left at the end that could fail.
    environ = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    for when in ("never", "later"):
        filler, output = fill(disk), disk / when
        command = [sys.executable, "-c", script, filler, when]
        with output.open("w") as file:
            done = subprocess.run(
                command, cwd=ROOT, env=environ, stdout=file, stderr=subprocess.PIPE, text=True, timeout=60
            )
        assert (done.returncode, done.stderr) == (74, "")
        assert (output.read_text()[-6:] == "after\n") == (when == "later")
        filler.unlink(missing_ok=True)


@pytest.mark.parametrize("write", ["write_atomically", "rewind_metrics"])
def test_a_small_file_is_replaced_or_stays_and_leaves_nothing(disk, write):
    path = disk / "metrics.jsonl"
    path.write_text("".join(json.dumps(record(step)) + "\n" for step in range(1, 21)))
    before = path.read_text()
    fill(disk, PAGE)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, "x" * 3 * PAGE) if write == "write_atomically" else rewind_metrics(path, 15, None)
    assert path.read_text() == before
    assert names(disk) == {"filler", "metrics.jsonl"}
    assert room(disk) == PAGE
