"""Two machines, made of network namespaces, and a network that is cut between them in the middle of a run."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fcn.checkpoints import load_checkpoint
from tests.dist import ranks
from tests.dist.ranks import Launched, started
from tests.dist.test_elastic import wait_for
from tests.dist.test_run import assert_same_tensors, records

UNREACHABLE = "the host of the process group cannot be reached: it is down, or the network is cut"


class Machines:
    """Two network namespaces and the cable between them; nothing outside can be reached from there."""

    def __init__(self) -> None:
        self.names = [f"fcn-{os.getpid()}-{number}" for number in range(2)]
        self.addresses = [f"10.200.{os.getpid() % 250}.{number + 1}" for number in range(2)]

    def set_up(self) -> None:
        for name in self.names:
            ip("netns", "add", name)
        ip(*f"link add eth0 netns {self.names[0]} type veth peer name eth0 netns {self.names[1]}".split())
        for name, address in zip(self.names, self.addresses):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "lo", "up")
        self.cable("up")

    def cable(self, state: str) -> None:
        for name in self.names:
            ip("-n", name, "link", "set", "eth0", state)

    def tear_down(self) -> None:
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)

    @contextlib.contextmanager
    def both(self, *command: str) -> Iterator[list[Launched]]:
        """The same command on both; nothing of it is left afterwards."""
        with contextlib.ExitStack() as stack:
            yield [stack.enter_context(started(0, "ip", "netns", "exec", name, *command)) for name in self.names]


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@pytest.fixture
def machines() -> Iterator[Machines]:
    pair = Machines()
    try:
        pair.set_up()
    except (OSError, subprocess.CalledProcessError) as error:
        pair.tear_down()
        pytest.skip(f"needs iproute2, root and network namespaces: {getattr(error, 'stderr', None) or error}".strip())
    try:
        yield pair
    finally:
        pair.tear_down()


def test_a_cut_network_is_named_on_both_sides(
    machines: Machines, tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, folder = tmp_path / "whole", tmp_path / "run"
    changes = {"train__steps": 50, "eval__every": 500, "checkpoint__every": 5}
    ranks.run(2, "train_ddp.py", "--config", tiny(run_dir=str(whole), **changes))
    monkeypatch.setattr(ranks, "command", lambda _, *arguments: list(arguments))
    for name, value in {
        "NODES": "2", "RDZV_HOST": machines.addresses[0], "PROCESSES": "1", "MAX_RESTARTS": "0",
        "NETWORK_TIMEOUT": "15", "GLOO_SOCKET_IFNAME": "eth0",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    command = ("bash", "launch/multinode.sh", tiny(run_dir=str(folder), **changes))

    with machines.both(*command, "train.timeout=8") as agents:
        wait_for(folder / "log.txt", "step 15/50")
        machines.cable("down")
        cut, outputs = time.monotonic(), []
        for agent in agents:
            outputs.append(agent.communicate(timeout=90)[0])
            print(f"ended {time.monotonic() - cut:.1f} s after the cut\n{outputs[-1]}")
        assert [agent.returncode for agent in agents] == [1, 1]
        assert not any(agent.family() for agent in agents), "nobody is left"
    first = [[line for line in output.splitlines() if line.startswith("error: ")] for output in outputs]
    assert first[0][0].startswith("error: rank 1 (process ")
    assert "sends no heartbeat; it was in " in first[0][0]
    assert first[1][0].startswith(f"error: {UNREACHABLE} (")

    machines.cable("up")
    with machines.both(*command) as agents:
        outputs = [agent.communicate(timeout=90)[0] for agent in agents]
        assert [agent.returncode for agent in agents] == [0, 0], outputs
    assert "resuming at step" in (folder / "log.txt").read_text()
    assert [record["step"] for record in records(folder, "train")] == list(range(1, 51))
    assert_same_tensors(load_checkpoint(whole), load_checkpoint(folder))
