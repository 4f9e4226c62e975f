"""On a real cluster of two nodes: srun alone, and launch/slurm.sbatch with time limits, nodes that die, scancel.

    bash tests/run.sh -m campaign tests/slurm

runs all of it; by default the warning before a time limit is sent by hand, which takes seconds instead of minutes.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fcn.checkpoints import load_checkpoint
from tests.dist.ranks import CHECKOUT, TIMEOUT_S, environment
from tests.dist.test_run import assert_same_tensors, records, train

pytestmark = pytest.mark.slurm

STEPS = 200
NETWORK = """
    import time
    from fcn.models import build_model

    def build(num_classes, delay):
        '''A network whose training steps take `delay` seconds and more, on machines of any speed.'''
        model = build_model("unet", num_classes, width=2, norm="batch")
        model.register_forward_pre_hook(lambda *_: time.sleep(delay) if model.training else None)
        return model
"""


@pytest.fixture(scope="module", autouse=True)
def slow_network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("modules")
    (folder / "slow_network.py").write_text(textwrap.dedent(NETWORK))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.dist.ranks.IMPORTS", (str(folder),))
        yield


class Job:
    """A job of launch/slurm.sbatch on both nodes."""

    def __init__(
        self,
        slurm: dict[str, str],
        folder: Path,
        shapes_root: Path,
        *options: str,
        delay: float = 0.02,
        suffix: str = "",
    ) -> None:
        self.environ = environment() | {name: slurm[name] for name in ("SLURM_CONF", "PATH")}
        # Both nodes live on this machine, under names that no resolver knows.
        self.environ |= {"RDZV_HOST": "127.0.0.1", "PROCESSES": "1", "LOGS": str(folder / "logs")}
        self.environ |= {"VENV": str(Path(sys.prefix)), "GRACE": "20"}
        self.run_dir, self.output = folder / f"run{suffix}", folder / f"job{suffix}.log"
        overrides = settings(shapes_root, self.run_dir, delay)
        command = ["sbatch", "--parsable", "--nodes=2", f"--output={self.output}", *options]
        self.id = self._run(*command, "launch/slurm.sbatch", "configs/quickstart.yaml", *overrides).strip()

    def task(self, number: int) -> Job:
        """One task of an array."""
        task = copy.copy(self)
        task.id = f"{self.id}_{number}"
        task.run_dir, task.output = (Path(str(path).replace("%a", str(number))) for path in (self.run_dir, self.output))
        return task

    def _run(self, *command: str) -> str:
        done = subprocess.run(command, cwd=CHECKOUT, env=self.environ, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def field(self, name: str) -> str:
        return re.search(rf"\b{name}=(\w+)", self._run("scontrol", "show", "job", self.id)).group(1)

    def state(self) -> str:
        return self.field("JobState")

    def log(self) -> str:
        return self.output.read_text() if self.output.exists() else ""

    def wait_for(self, ready: Callable[[], bool], seconds: float = 150) -> None:
        """Also lets a job that was queued again start soon: SLURM would have it wait for two minutes.

        Not at once: a node on which the job is still being ended refuses to start it.
        """
        end = time.monotonic() + seconds
        pending = 0
        while not ready():
            assert time.monotonic() < end, f"{self.state()}\n{self.log()[-6000:]}"
            pending = pending + 1 if self.state() == "PENDING" else 0
            if pending == 10:
                self._quietly("scontrol", "update", f"JobId={self.id}", "StartTime=now")
            time.sleep(0.5)

    def _quietly(self, *command: str) -> None:
        subprocess.run(command, env=self.environ, capture_output=True)

    def cancel(self) -> None:
        self._quietly("scancel", self.id)

    def warn(self) -> None:
        """What SLURM does before the time limit."""
        self._quietly("scancel", "--signal=USR1", "--batch", self.id)

    def is_over(self) -> bool:
        return self.state() in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


def settings(shapes_root: Path, run_dir: Path, delay: float) -> list[str]:
    return [
        f"data.root={shapes_root}", f"run_dir={run_dir}", "data.workers=0", "data.crop=[48,48]",
        "model.name=slow_network:build", f"model.options={{delay: {delay}}}", "model.norm=null", "model.width=null",
        f"train.steps={STEPS}", "train.batch_size=4", "train.log_every=20", "eval.every=100000", "eval.pictures=0",
        "checkpoint.every=20", "wandb.mode=disabled",
    ]  # fmt: skip


@contextlib.contextmanager
def submitted(*arguments, **options) -> Iterator[Job]:
    job = Job(*arguments, **options)
    try:
        yield job
    finally:
        job.cancel()


@pytest.fixture(scope="module")
def whole(shapes_root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The end of the run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(2, "configs/quickstart.yaml", *settings(shapes_root, folder, delay=0))
    return load_checkpoint(folder)


def assert_undisturbed(job: Job, whole: dict) -> None:
    assert job.state() == "COMPLETED", job.log()
    assert_same_tensors(load_checkpoint(job.run_dir), whole)
    assert [record["step"] for record in records(job.run_dir, "train")] == list(range(20, STEPS + 1, 20))
    assert json.loads((job.run_dir / "summary.json").read_text())["status"] == "finished"


def test_warned_it_saves_queues_itself_again_and_ends_as_if_nothing_had_happened(
    slurm, shapes_root, tmp_path, whole
) -> None:
    with submitted(slurm, tmp_path, shapes_root) as job:
        job.wait_for(lambda: "step 60/" in job.log())
        job.warn()
        job.wait_for(lambda: "resuming at step" in job.log())
        job.wait_for(job.is_over, 300)
        assert re.search(r"stopped by a signal at step \d+/200 after saving", job.log())
        assert_undisturbed(job, whole)
        ranks = {path.parent.name for path in (tmp_path / "logs").rglob("stdout.log")}
        assert ranks == {"0"}, "each node's torchrun keeps a log of its rank"


def test_a_warned_task_of_an_array_leaves_the_others_alone(slurm, shapes_root, tmp_path) -> None:
    with submitted(slurm, tmp_path, shapes_root, "--array=3-4", "--nodes=1", suffix="_%a") as array:
        tasks = [array.task(3), array.task(4)]
        for task in tasks:
            task.wait_for(lambda task=task: "step 60/" in task.log())
        namesake, other = sorted(tasks, key=lambda task: task.field("JobId") != array.id)
        assert namesake.field("JobId") == array.id != other.field("JobId"), "one task has the array's own number"
        namesake.warn()
        for task in tasks:
            task.wait_for(task.is_over, 300)
            assert task.state() == "COMPLETED", task.log()
            assert load_checkpoint(task.run_dir)["step"] == STEPS
        assert "resuming at step" in namesake.log()
        assert (namesake.field("Restarts"), other.field("Restarts")) == ("1", "0")
        assert "stopped by a signal" not in other.log()


@pytest.mark.campaign
def test_the_time_limit_warns_it(slurm, shapes_root, tmp_path, whole) -> None:
    """SLURM looks at time limits twice a minute, so the warning comes 20 to 50 s after the start."""
    with submitted(slurm, tmp_path, shapes_root, "--time=2", "--signal=B:USR1@70", delay=0.2) as job:
        job.wait_for(lambda: "stopped by a signal at step" in job.log())
        job.wait_for(job.is_over, 400)
        assert "resuming at step" in job.log()
        assert_undisturbed(job, whole)


@pytest.mark.campaign
def test_a_node_that_dies_leads_to_another_start(slurm, revive, shapes_root, tmp_path, whole) -> None:
    with submitted(slurm, tmp_path, shapes_root) as job:
        job.wait_for(lambda: "step 100/" in job.log())
        kill_node(slurm, "n2", job.id)
        job.wait_for(lambda: job.state() == "PENDING", 120)
        revive("n2")
        job.wait_for(job.is_over, 300)
        assert_undisturbed(job, whole)


def kill_node(slurm: dict[str, str], node: str, job: str) -> None:
    """SIGKILL to the node's daemon and to everything of the job that runs there."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
            variables = (folder / "environ").read_bytes().decode(errors="replace").split("\0")
            daemon = words[0].endswith("slurmd") and words[-2:-1] == [node]
            task = f"SLURMD_NODENAME={node}" in variables and f"SLURM_JOB_ID={job}" in variables
            step = (
                "slurmstepd" in words[0]
                and f"SLURM_CONF={slurm['SLURM_CONF']}" in variables
                and node in " ".join(words)
            )
            if daemon or task or step:
                os.kill(int(folder.name), signal.SIGKILL)


@pytest.mark.campaign
def test_scancel_leaves_a_checkpoint(slurm, shapes_root, tmp_path) -> None:
    with submitted(slurm, tmp_path, shapes_root) as job:
        job.wait_for(lambda: "step 100/" in job.log())
        began = time.monotonic()
        job.cancel()
        job.wait_for(lambda: job.state() == "CANCELLED" and "stopped by a signal" in job.log(), 40)
        assert time.monotonic() - began < 30
        stopped = int(re.search(r"stopped by a signal at step (\d+)", job.log()).group(1))
        assert load_checkpoint(job.run_dir)["step"] == stopped


# --- srun alone


def srun(slurm: dict[str, str], layout: list[str], *arguments: str, **extra: str) -> subprocess.CompletedProcess[str]:
    names = ("SLURM_CONF", "PATH")
    environ = environment() | {name: slurm[name] for name in names} | extra
    return subprocess.run(
        ["srun", *layout, sys.executable, *arguments],
        cwd=CHECKOUT,
        env=environ,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )


@pytest.mark.parametrize(
    ("layout", "extra"),
    [
        (["--nodes=1", "--ntasks=2"], {}),
        # Both nodes live on this machine under names that no resolver knows, so the address must be given.
        (["--nodes=2", "--ntasks=2"], {"MASTER_ADDR": "127.0.0.1"}),
    ],
    ids=["one node", "two nodes"],
)
def test_srun_alone_gives_the_group(slurm, shapes_root: Path, tmp_path: Path, layout, extra) -> None:
    folder = tmp_path / "run"
    overrides = ["model.width=2", "train.steps=4", "wandb.mode=disabled", "data.workers=0", "train.log_every=1"]
    arguments = ["--config", "configs/quickstart.yaml", f"data.root={shapes_root}", f"run_dir={folder}", *overrides]
    done = srun(slurm, layout, "train_ddp.py", *arguments, **extra)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 2 x CPU (slurm, " in done.stdout
    assert done.stdout.count("step 3/4") == 1
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["status"], summary["images"]) == ("finished", 10)


def test_bad_input_under_srun_is_status_2(slurm) -> None:
    done = srun(slurm, ["--nodes=1", "--ntasks=2"], "train_ddp.py", "--config", "configs/none.yaml")
    assert done.returncode == 2
    assert done.stderr.count("error: configs/none.yaml: no such config file") == 1
    assert "Traceback" not in done.stderr
