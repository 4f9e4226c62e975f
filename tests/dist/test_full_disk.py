"""A real disk that is full for a while: training goes on, the user and the scheduler are told, and no step is lost."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from fcn.checkpoints import list_checkpoints, load_checkpoint
from fcn.checkpoints.folder import verify
from tests.checkpoints.test_saver import mounted
from tests.dist.ranks import started, wait_for_line
from tests.dist.test_run import assert_same_tensors, records, train

STEPS = 48
CHANGES = {"train__steps": STEPS, "train__batch_size": 4, "eval__every": 24, "eval__pictures": 1}
CHANGES |= {"checkpoint__every": 8, "checkpoint__keep": 2}
FULL = "No space left on device"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with mounted(tmp_path / "disk", "8m") as folder:
        yield folder


@contextlib.contextmanager
def filled(disk: Path) -> Iterator[None]:
    """The disk is full, even where the run deletes old checkpoints; then it has its room again."""
    full, over = threading.Event(), threading.Event()
    filler = disk / "filler"

    def fill() -> None:
        with open(filler, "ab", buffering=0) as file:
            while not over.wait(0.001):
                with contextlib.suppress(OSError):
                    while True:
                        file.write(bytes(1 << 16))
                full.set()

    thread = threading.Thread(target=fill)
    thread.start()
    try:
        assert full.wait(20)
        yield
    finally:
        over.set()
        thread.join()
        filler.unlink()


@pytest.fixture(scope="module")
def undisturbed() -> dict[int, tuple[dict, list, list]]:
    """By number of processes: the last state and the records of a run with room."""
    return {}


def outcome(folder: Path) -> tuple[dict, list, list]:
    """The last state, (step, loss) of every step, (step, split, score) of every evaluation."""
    losses = [(record["step"], record["loss"]) for record in records(folder, "train")]
    scores = [(record["step"], record["split"], record["miou"]) for record in records(folder, "eval")]
    return load_checkpoint(folder), losses, scores


def assert_as_undisturbed(folder: Path, tiny, undisturbed: dict, processes: int = 1) -> None:
    if processes not in undisturbed:
        train(processes, tiny(run_dir=f"{folder}-undisturbed", **CHANGES))
        undisturbed[processes] = outcome(Path(f"{folder}-undisturbed"))
    state, losses, scores = outcome(folder)
    expected = undisturbed[processes]
    assert [step for step, _ in losses] == list(range(1, STEPS + 1)), "every step once"
    assert (losses, scores) == expected[1:]
    assert_same_tensors(state, expected[0])
    best, undisturbed_best = load_checkpoint(folder / "checkpoints" / "best.pt"), expected[0]["best"]
    assert best["step"] == undisturbed_best["step"]
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["status"], summary["unsaved"]) == ("finished", [])


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.stem.removeprefix("step_"))


def rest(process: subprocess.Popen[str]) -> str:
    """The output up to the end."""
    return process.communicate(timeout=120)[0]


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.campaign)])
def test_a_disk_that_stays_full_costs_the_steps_since_the_last_save(tiny, disk, undisturbed, processes) -> None:
    folder = disk / "run"
    config = tiny(run_dir=str(folder), **CHANGES)
    with started(processes, "train_ddp.py", "--config", config) as process:
        wait_for_line(process, f"step 10/{STEPS}")
        with filled(disk):
            before = list_checkpoints(folder / "checkpoints")
            shown = rest(process)
            # torchrun has an exit status and a traceback of its own, and names the status of the rank
            assert process.returncode == 74 if processes == 1 else "exitcode  : 74" in shown
            assert f"step {STEPS}/{STEPS} " in shown, "training goes on to the end"
            present = list_checkpoints(folder / "checkpoints")
            newest = present[-1]
            assert before[-1] in present
            assert verify(before[-1]) is None
            assert step_of(newest) < STEPS // 2, "what was being written when the disk filled, or the one before"
            last = folder / "checkpoints" / f"step_{STEPS:08d}.pt"
            assert f"warning: {last}: cannot be written ({FULL})" in shown
            assert "warning: warning" not in shown
            assert f"the newest checkpoint is {newest}" in shown
            for what in (last, folder / "summary.json", folder / "metrics.jsonl"):
                (line,) = (line for line in shown.splitlines() if f"but not saved: {what}" in line)
                assert f"error: finished at step {STEPS}/{STEPS}" in line
                assert FULL in line
            assert shown.count("warning: " + str(folder / "metrics.jsonl")) == 1
            assert shown.count("Traceback") == processes - 1
            refused = train(processes, config, status=2 if processes == 1 else 1)
            assert f"run_dir: {folder}: cannot be written ({FULL}); free space there" in refused.stderr
            assert refused.stderr.count("Traceback") == processes - 1
    done = train(processes, config)
    assert f"resuming at step {step_of(newest)}/{STEPS} from {newest}" in done.stdout
    assert_as_undisturbed(folder, tiny, undisturbed, processes)
    assert not list(folder.rglob(".*.tmp"))


@pytest.mark.campaign
def test_full_for_a_while_and_again_when_a_signal_comes(tiny, disk, undisturbed) -> None:
    folder = disk / "run"
    config = tiny(run_dir=str(folder), **CHANGES)
    with started(1, "train_ddp.py", "--config", config) as process:
        wait_for_line(process, f"step 10/{STEPS}")
        with filled(disk):  # a save and an evaluation fall into this time
            shown = "".join(wait_for_line(process, f"step 26/{STEPS}"))
        assert f"warning: {folder / 'metrics.jsonl'}: 1 line(s) cannot be written ({FULL})" in shown
        assert f"warning: {folder / 'checkpoints' / 'step_00000024.pt'}: cannot be written ({FULL})" in shown
        assert "val_00000024.png failed" in shown
        wait_for_line(process, f"step 34/{STEPS}")
        with filled(disk):
            process.send_signal(signal.SIGTERM)
            shown = rest(process)
        assert process.returncode == 74
    assert "error: preempted at step" in shown
    assert "but not saved: " + str(folder / "checkpoints" / "step_") in shown
    assert "after saving" not in shown
    newest = list_checkpoints(folder / "checkpoints")[-1]
    assert step_of(newest) in (32, 40), "so the steps to 26 are not done again"
    train(1, config)
    assert_as_undisturbed(folder, tiny, undisturbed)
    log = (folder / "log.txt").read_text()
    assert [step for step in range(1, 32) if log.count(f" step {step}/{STEPS} ") != 1] == []
    assert FULL in log
