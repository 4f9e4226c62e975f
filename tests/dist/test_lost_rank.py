"""A rank that hangs, fails or dies ends the run within train.timeout, and the message names it and what it was doing."""

from __future__ import annotations

import os
import re
import signal
import textwrap
from pathlib import Path

import pytest

from tests.dist.ranks import run, started, wait_for_line
from tests.dist.test_run import records

NETWORK = """
    import os, time
    from torch import nn

    class Stubborn(nn.Conv2d):
        '''Rank 1 sleeps, or fails, in a step; once, if it can leave a note that it did.'''

        def __init__(self, num_classes, how, note):
            super().__init__(3, num_classes, 1)
            self.how, self.note, self.calls = how, note, 0

        def forward(self, images):
            self.calls += self.training
            if os.environ.get("RANK") == "1" and self.calls == 8 and not os.path.exists(self.note):
                open(self.note, "w").close()
                self.sleep_on() if self.how == "hang" else 1 / 0
            return super().forward(images)

        def sleep_on(self):
            time.sleep(3600)
"""


@pytest.fixture
def stubborn(tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "stubborn.py").write_text(textwrap.dedent(NETWORK))
    monkeypatch.setattr("tests.dist.ranks.IMPORTS", (str(tmp_path),))

    def write(how: str, **changes) -> str:
        options = {"how": how, "note": str(tmp_path / f"note-{how}")}
        return tiny(model={"name": "stubborn:Stubborn", "options": options}, **changes)

    return write


def test_a_stopped_rank_is_named(tiny) -> None:
    with started(2, "train_ddp.py", "--config", tiny(train__steps=4000, train__timeout=3)) as process:
        wait_for_line(process, "step 150/4000")
        stopped = process.rank(1)
        os.kill(stopped, signal.SIGSTOP)
        line = wait_for_line(process, "error: ")[-1]
        assert re.search(rf"error: rank 1 \(process {stopped} on .+\) sends no heartbeat; it was in .+ for", line)
        assert "[seen by rank 0]" in line
        os.kill(stopped, signal.SIGKILL)  # torchrun would do so after its 30 seconds
        assert process.wait(60) == 1


def test_a_rank_that_sleeps_is_named_with_the_place(stubborn, tmp_path: Path) -> None:
    with started(2, "train_ddp.py", "--config", stubborn("hang", train__timeout=3)) as process:
        line = wait_for_line(process, "error: ")[-1]
        process.kill_all()
    place = r"it was in timed_step > train_step > \w+ \(step\.py:\d+\) for [3-9] s"
    assert re.search(rf"error: rank 1 .+ did not come; {place}", line)
    assert (tmp_path / "run" / "log.txt").read_text().count(line.strip()) == 1, "the log has it, too"
    (failure,) = records(tmp_path / "run", "failure")
    assert f"error: {failure['text']}" == line.strip()


def test_torchrun_restarts_a_group_whose_rank_failed(stubborn, tmp_path: Path) -> None:
    done = run(2, "--max-restarts=1", "train_ddp.py", "--config", stubborn("fail"))
    assert "ZeroDivisionError" in done.stderr
    assert "error: rank 1 failed: ZeroDivisionError: division by zero" in done.stderr
    assert "resuming at step 4/10" in done.stdout
    assert [record["step"] for record in records(tmp_path / "run", "train")] == list(range(1, 11))
