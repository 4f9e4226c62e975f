"""Real processes for tests: functions on gloo ranks, and the command line under torchrun."""

from __future__ import annotations

import contextlib
import functools
import multiprocessing.connection
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

from fcn import distributed

CHECKOUT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 180
PRELOADED = [
    "train_ddp", "fcn.training.setup", "fcn.training.loop", "fcn.evaluation.predictions", "fcn.evaluation.export",
    "torch._dynamo", "torch._inductor.config", "matplotlib.backends.backend_agg",
]  # fmt: skip
IMPORTS: tuple[str, ...] = ()
"""Folders with modules of a test, for the processes that it starts."""


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any, devices: str = "") -> list[Any]:
    """`function(context, *args)` on every rank of a fresh gloo group; the results in rank order, plain picklable data.

    `devices` is CUDA_VISIBLE_DEVICES there: by default no GPU.
    """
    context = _context()
    queue = context.Queue()
    port = free_port()
    ranks = [
        context.Process(target=_rank_main, args=(rank, world_size, port, queue, devices, function, args))
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    results = dict(queue.get(timeout=TIMEOUT_S) for _ in ranks)
    for process in ranks:
        process.join(TIMEOUT_S)
    failed = [result for result in results.values() if isinstance(result, _Failure)]
    assert not failed, "\n".join(failed)
    return [results[rank] for rank in range(world_size)]


def _context() -> Any:
    """Processes of a server that imports once what all of them need, and forks before any thread is started."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


class _Failure(str):
    pass


def _rank_main(
    rank: int, world_size: int, port: int, queue: Any, devices: str, function: Callable[..., Any], args: tuple
) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), CUDA_VISIBLE_DEVICES=devices)
    try:
        import torch

        torch.set_num_threads(1)
        result = function(distributed.start(timeout_s=TIMEOUT_S), *args)
    except BaseException:
        result = _Failure(f"rank {rank}:\n{traceback.format_exc()}")
    queue.put((rank, result))
    distributed.stop()


def free_port() -> int:
    """A port that nobody listens on now."""
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def command(processes: int, *arguments: str) -> list[str]:
    """The command line of a user: torchrun, or plain python for one process."""
    if processes == 1:
        return [sys.executable, *arguments]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [*launcher, *arguments]


def environment() -> dict[str, str]:
    """Without GPUs, credentials, or variables of a launcher around the tests."""
    hidden = ("SLURM_", "WANDB_", "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(hidden)}
    return kept | {
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": ":".join((str(CHECKOUT), *IMPORTS)),
    }


def run(
    processes: int, *arguments: str, status: int | None = 0, timeout_s: float = TIMEOUT_S
) -> subprocess.CompletedProcess[str]:
    """Run a command line to the end and check the exit status (None: any).

    Under torchrun, if that is part of what is tested: where a rank fails, or torchrun has arguments of its own. A run
    of several ranks that shall succeed, and any of one process, gets its processes from a server that has imported
    PyTorch: same program, same arguments, same variables, some ten seconds sooner.
    """
    if arguments[0].startswith("--") or (processes > 1 and status != 0):
        done = _run_under_torchrun(processes, *arguments)
    else:
        done = _run_at_once(processes, *arguments, timeout_s=timeout_s)
    assert status is None or done.returncode == status, f"status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def complaints(errors: str) -> list[str]:
    """The lines that tell a user of torchrun what is wrong: the cause in its report, and nowhere else."""
    cause = errors[errors.rindex("Root Cause") :].partition("  traceback : ")[2].partition("\n====")[0]
    lines = [line.strip() for line in cause.splitlines()]
    assert [errors.count(line) for line in lines] == [1] * len(lines), errors
    assert not re.search("^error: ", errors, re.MULTILINE), "before restarts only"
    return lines


def _run_under_torchrun(processes: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(processes, *arguments),
        cwd=CHECKOUT,
        env=environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )


def _run_at_once(processes: int, *arguments: str, timeout_s: float) -> subprocess.CompletedProcess[str]:
    place = {} if processes == 1 else {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1"}
    place |= {"MASTER_PORT": str(free_port())} if place else {}
    with contextlib.ExitStack() as stack:
        outputs = [stack.enter_context(tempfile.NamedTemporaryFile()) for _ in range(2)]
        ranks = []
        for rank in range(processes):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if place else {}
            names = [file.name for file in outputs]
            target = (list(arguments), environment() | place | own, names)
            ranks.append(_context().Process(target=_program_main, args=target))
            ranks[-1].start()
        deadline = time.monotonic() + timeout_s
        while any(rank.is_alive() for rank in ranks):
            failed = [rank for rank in ranks if rank.exitcode not in (None, 0)]
            if (failed and processes > 1) or time.monotonic() > deadline:  # the others would wait for it
                for rank in ranks:
                    rank.kill()
            multiprocessing.connection.wait([rank.sentinel for rank in ranks if rank.is_alive()], timeout=1)
        stdout, stderr = (Path(file.name).read_text() for file in outputs)
    codes = [rank.exitcode for rank in ranks]
    return subprocess.CompletedProcess(arguments, next((code for code in codes if code), 0), stdout, stderr)


def _program_main(arguments: list[str], environ: dict[str, str], outputs: list[str]) -> None:
    """What `python ARGUMENTS` does, in a process that exists already."""
    for number, name in enumerate([os.devnull, *outputs]):
        os.dup2(os.open(name, os.O_RDWR | os.O_APPEND), number)
    sys.stdin = os.fdopen(0)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
    os.environ.clear()
    os.environ.update(environ)
    os.chdir(CHECKOUT)
    sys.path[:0] = environ["PYTHONPATH"].split(":")
    torch.set_num_threads(int(environ["OMP_NUM_THREADS"]))
    module = arguments[0] == "-m"
    sys.argv = arguments[1:] if module else arguments
    sys.modules.pop("fcn.__main__", None)  # which the server has imported; runpy would warn
    start = functools.partial(runpy.run_module, alter_sys=True) if module else runpy.run_path
    start(sys.argv[0], run_name="__main__")


class Launched(subprocess.Popen):
    """A command and every process that comes of it, which torchrun puts into sessions of their own."""

    def __init__(
        self, processes: int, *arguments: str, stderr: int = subprocess.STDOUT, within: Sequence[str] = ()
    ) -> None:
        self.mark = f"FCN_TEST_LAUNCH={uuid.uuid4()}"
        environ = environment() | dict([self.mark.split("=")])
        super().__init__(
            [*within, *command(processes, *arguments)],
            cwd=CHECKOUT,
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )

    def family(self) -> dict[int, list[str]]:
        """Process id → environment of all that are alive."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                variables = (folder / "environ").read_bytes().decode(errors="replace").split("\0")
                if self.mark in variables:
                    found[int(folder.name)] = variables
        return found

    def rank(self, rank: int) -> int:
        """Process id of a rank (its data-loader workers, which inherit its environment, came later)."""
        return min(pid for pid, variables in self.family().items() if f"RANK={rank}" in variables)

    def left(self, seconds: float = 20) -> dict[int, str]:
        """Command lines of the processes that are still alive after so long."""
        deadline = time.monotonic() + seconds
        while (family := self.family()) and time.monotonic() < deadline:
            time.sleep(0.2)
        found = {}
        for pid in family:
            with contextlib.suppress(OSError):
                found[pid] = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        return found

    def kill_all(self) -> None:
        """SIGKILL to every process; returns when none is left."""
        while family := self.family():
            for pid in family:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.wait(0.1)


@contextlib.contextmanager
def started(
    processes: int,
    *arguments: str,
    stderr: int = subprocess.STDOUT,
    timeout_s: float = TIMEOUT_S,
    within: Sequence[str] = (),
) -> Iterator[Launched]:
    """Start a command, as the arguments of `within` if given; nothing of it is left afterwards."""
    process = Launched(processes, *arguments, stderr=stderr, within=within)
    watchdog = threading.Timer(timeout_s, process.kill_all)  # a hang must fail its test, not stop the others
    watchdog.start()
    try:
        yield process
        if process.poll() is not None:
            assert not process.left(), "processes of a run that has ended"
    finally:
        watchdog.cancel()
        process.kill_all()
        process.communicate()


def wait_for_line(process: subprocess.Popen[str], text: str) -> list[str]:
    """Read the output up to the first line that contains `text`."""
    lines = []
    assert process.stdout is not None
    for line in process.stdout:
        lines.append(line)
        if text in line:
            return lines
    raise AssertionError(f"never printed {text!r}:\n{''.join(lines)}")
