"""A loader's worker that dies, hangs or has no room ends the run on every rank, and says why; a signal is obeyed while
a rank waits for it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import textwrap
import time
from pathlib import Path

import pytest

from fcn.checkpoints import load_checkpoint
from tests.dist.ranks import Launched, started, wait_for_line
from tests.dist.test_run import records

DATA = """
    import os, signal, time
    from pathlib import Path
    import numpy as np

    class Fragile:
        '''Once the file `note` is there, reading a training image fails on rank 1 in the way that is asked for.'''

        classes = ["left", "right"]

        def __init__(self, root, split, how, note):
            self.fails, self.note = split == "train" and os.environ.get("RANK", "1") == "1", Path(note)
            self.how = getattr(self, how)

        def __len__(self):
            return 24

        def size(self, index):
            return 48, 48

        def __getitem__(self, index):
            if self.fails and self.note.exists():
                self.how()
            labels = np.zeros((48, 48), np.uint8)
            labels[:, 24:] = 1
            return np.random.default_rng(index).integers(0, 255, (48, 48, 3), np.uint8), labels

        def die(self):
            os.kill(os.getpid(), signal.SIGKILL)

        def leave(self):
            os._exit(3)

        def hang(self):
            time.sleep(3600)

        def stumble(self):
            raise KeyError("a bug")
"""
LONG = {"train__steps": 2000, "checkpoint__every": 1000, "eval__every": 1000, "data__workers": 1}


@pytest.fixture
def fragile(tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`fragile(how)` writes the config of a run; `tmp_path/note` then makes a worker of rank 1 fail."""
    (tmp_path / "fragile.py").write_text(textwrap.dedent(DATA))
    monkeypatch.setattr("tests.dist.ranks.IMPORTS", (str(tmp_path),))

    def write(how: str, **changes) -> str:
        options = {"how": how, "note": str(tmp_path / "note")}
        data = {"name": "fragile:Fragile", "root": str(tmp_path), "train": "train", "val": "val", "options": options}
        return tiny(**LONG | changes, data=data | {"crop": [48, 48], "workers": 1})

    return write


def ended(process: Launched) -> str:
    """The output of a run that has ended, and of which nothing is left."""
    output = process.communicate(timeout=60)[0]
    assert not process.left()
    return output


SLOW = pytest.mark.campaign


@pytest.mark.parametrize("processes", [pytest.param(1, marks=SLOW), 2])
@pytest.mark.parametrize(
    ("how", "timeout", "cause"),
    [
        ("die", 600, "data.workers: a worker died (killed by SIGKILL), most often for want of memory"),
        pytest.param("leave", 600, "data.workers: a worker exited with status 3, which", marks=pytest.mark.campaign),
        ("hang", 20, "because a worker waits for a file or hangs; look at the storage of data.root"),
    ],
)
def test_a_worker_that_fails_ends_the_run(fragile, tmp_path: Path, processes, how, timeout, cause) -> None:
    with started(processes, "train_ddp.py", "--config", fragile(how, train__timeout=timeout)) as process:
        wait_for_line(process, "step 5/2000")
        (tmp_path / "note").touch()
        output = ended(process)
    assert process.returncode == (2 if processes == 1 else 1), output
    assert cause in output
    assert "data.workers" in records(tmp_path / "run", "failure")[0]["text"]
    assert "Traceback" not in output.partition("torch/distributed/elastic")[0], "torchrun has one of its own"


def test_a_bug_in_a_worker_keeps_its_traceback(fragile, tmp_path: Path) -> None:
    with started(1, "train_ddp.py", "--config", fragile("stumble")) as process:
        wait_for_line(process, "step 5/2000")
        (tmp_path / "note").touch()
        output = ended(process)
    assert process.returncode == 1
    assert "in stumble" in output
    (failure,) = records(tmp_path / "run", "failure")
    assert failure["text"] == "rank 0 failed: KeyError: 'a bug'"


@pytest.mark.parametrize("processes", [pytest.param(1, marks=SLOW), 2])
def test_sigterm_is_obeyed_while_a_rank_waits_for_its_worker(fragile, tmp_path: Path, processes) -> None:
    with started(processes, "train_ddp.py", "--config", fragile("hang")) as process:
        wait_for_line(process, "step 5/2000")
        (tmp_path / "note").touch()
        seen = wait_for_the_last_step(tmp_path / "run")
        process.send_signal(signal.SIGTERM)
        output = ended(process)
    assert "stopped by a signal" in output
    assert load_checkpoint(tmp_path / "run")["step"] >= seen


def wait_for_the_last_step(run: Path) -> int:
    """The step that a run has reached when it makes no more progress."""
    step, since = -1, time.monotonic()
    while time.monotonic() - since < 2:
        newest = records(run, "train")[-1]["step"]
        if newest != step:
            step, since = newest, time.monotonic()
        time.sleep(0.1)
    return step


@pytest.mark.parametrize(
    ("how", "processes"),
    [("hang", 2), ("compile", 1), pytest.param("hang", 1, marks=SLOW), pytest.param("compile", 2, marks=SLOW)],
)
def test_sigterm_before_the_first_step_ends_the_run_at_once(fragile, tiny, tmp_path: Path, processes, how) -> None:
    if how == "hang":
        (tmp_path / "note").touch()  # the first batch never comes
        config = fragile("hang")
    else:
        config = tiny(**LONG | {"train__compile": True, "train__precision": "fp32", "model__width": 16})
    with started(processes, "train_ddp.py", "--config", config) as process:
        wait_for_line(process, "parameters")
        process.send_signal(signal.SIGTERM)
        output = ended(process)
    assert "SIGTERM: leaving at once, as there is nothing to save yet" in output
    assert processes > 1 or process.returncode == 75
    assert [record["step"] for record in records(tmp_path / "run", "stop")] == [0]
    assert "lost" not in output and "failed" not in output.partition("torch/distributed/elastic")[0]


# --- shared memory ---------------------------------------------------------------------------------------------------


def shared_memory(size: str, meanwhile: str = "") -> list[str]:
    """What runs a command with a /dev/shm of its own, as in a container, and a shell command beside it."""
    unshare = ["unshare", "--mount"]
    if os.geteuid() != 0 or not shutil.which("unshare") or subprocess.run([*unshare, "true"]).returncode:
        pytest.skip("needs root and unshare(1), for a small /dev/shm")
    beside = f"({meanwhile}) >/dev/null 2>&1 &" if meanwhile else ""
    return [*unshare, "bash", "-c", f'mount -t tmpfs -o size={size} fcn-test /dev/shm || exit; {beside} exec "$@"', "-"]


BIG = LONG | {"train__batch_size": 16, "data__workers": 2, "data__crop": [256, 256], "train__precision": "fp32"}


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=SLOW)])
def test_too_little_shared_memory_is_refused_before_training(tiny, processes) -> None:
    with started(processes, "train_ddp.py", "--config", tiny(**BIG), within=shared_memory("4m")) as process:
        output = ended(process)
    assert "error: data.workers: found 2, and what this run's workers hold on " in output
    assert " MB of /dev/shm, where 4.2 MB are free; " in output
    assert "--shm-size" in output and "step 1/" not in output
    assert processes > 1 or process.returncode == 2


@pytest.mark.parametrize("processes", [pytest.param(1, marks=SLOW), 2])
def test_shared_memory_that_fills_up_ends_the_run(tiny, tmp_path: Path, processes) -> None:
    note = tmp_path / "note"
    fill = f"while kill -0 $$; do [ ! -e {note} ] || head -c 99m /dev/zero >> /dev/shm/filler; sleep 0.05; done"
    with started(processes, "train_ddp.py", "--config", tiny(**BIG), within=shared_memory("64m", fill)) as process:
        wait_for_line(process, "step 3/2000")
        (tmp_path / "note").touch()
        output = ended(process)
    assert "data.workers: a batch does not fit /dev/shm" in output
    assert "--shm-size" in output
    assert "Queue feeder" not in output
    assert processes > 1 or process.returncode == 2
