import os
import queue
import signal
import subprocess
import sys
import time

import pytest

from fcn.distributed import StopFlag
from tests.dist.ranks import CHECKOUT

TERM, INT, USR1 = signal.SIGTERM, signal.SIGINT, signal.SIGUSR1


@pytest.fixture
def left():
    """The signals on which the process would have left at once."""
    return queue.Queue()


@pytest.fixture
def flag(left):
    before = {number: signal.getsignal(number) for number in (TERM, INT, USR1)}
    yield StopFlag(left.put).listen()
    signal.set_wakeup_fd(-1)
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number: int, received) -> None:
    """A real signal to this process; a thread takes note of it a moment later."""
    os.kill(os.getpid(), number)
    for _ in range(200):
        if received():
            return
        time.sleep(0.005)
    pytest.fail(f"signal {number} did not arrive")


def test_is_not_set_before_a_signal(flag):
    assert flag() is False


@pytest.mark.parametrize("number", [TERM, INT, USR1])
def test_a_signal_sets_the_flag_and_nothing_else(flag, left, number):
    handlers = [signal.getsignal(n) for n in (TERM, INT, USR1)]
    send(number, flag)
    assert flag() is True
    assert flag.received == {number}
    assert [signal.getsignal(n) for n in (TERM, INT, USR1)] == handlers
    assert left.empty()


def test_the_first_signal_is_acknowledged_at_once(flag, left):
    said = []
    flag.say = said.append
    send(INT, lambda: said)
    assert said == ["SIGINT: leaving after the next step, once it is saved; again to leave immediately"]
    send(INT, lambda: not left.empty())
    assert len(said) == 1


@pytest.mark.parametrize("number", [TERM, USR1])
def test_repeated_requests_of_a_scheduler_stay_harmless(flag, left, number):
    for _ in range(3):
        send(number, flag)
    assert flag() is True
    assert left.empty()


@pytest.mark.parametrize("sequence", [(INT, INT), (INT, TERM), (TERM, INT, INT), (USR1, INT, INT)])
def test_a_second_sigint_leaves_at_once(flag, left, sequence):
    for number in sequence[:-1]:
        send(number, lambda number=number: number in flag.received)
    assert left.empty()
    send(sequence[-1], lambda: not left.empty())


BLOCKED = """
import ctypes
from fcn.distributed.signals import StopFlag
flag = StopFlag().listen()
print("ready", flush=True)
mutex = ctypes.create_string_buffer(64)
lock = ctypes.CDLL(None).pthread_mutex_lock  # gives the interpreter's lock away, as a collective does
for _ in range(2):
    lock(mutex)  # the second time for ever, signals or not
"""


def test_it_leaves_although_the_main_thread_waits_in_c():
    command = [sys.executable, "-c", BLOCKED]
    with subprocess.Popen(command, cwd=CHECKOUT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(INT)
        time.sleep(0.5)
        assert process.poll() is None
        process.send_signal(INT)
        assert process.wait(10) == 128 + INT
