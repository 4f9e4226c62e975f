import os
import signal
import time

import pytest

from fcn.preempt import StopFlag

TERM, INT, USR1 = signal.SIGTERM, signal.SIGINT, signal.SIGUSR1


@pytest.fixture
def flag():
    before = {number: signal.getsignal(number) for number in (TERM, INT, USR1)}
    yield StopFlag().listen()
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number: int, received) -> None:
    """A real signal to this process; Python runs the handler a moment later."""
    os.kill(os.getpid(), number)
    for _ in range(200):
        if received():
            return
        time.sleep(0.005)
    pytest.fail(f"signal {number} did not arrive")


def test_is_not_set_before_a_signal(flag):
    assert flag() is False


@pytest.mark.parametrize("number", [TERM, INT, USR1])
def test_a_signal_sets_the_flag_and_nothing_else(flag, number):
    handlers = [signal.getsignal(n) for n in (TERM, INT, USR1)]
    send(number, flag)
    assert flag() is True
    assert flag.received == {number}
    assert [signal.getsignal(n) for n in (TERM, INT, USR1)] == handlers


@pytest.mark.parametrize("number", [TERM, USR1])
def test_repeated_requests_of_a_scheduler_stay_harmless(flag, number):
    for _ in range(3):
        send(number, flag)
    assert flag() is True


@pytest.mark.parametrize("sequence", [(INT, INT), (TERM, INT, INT), (INT, TERM, INT)])
def test_a_second_sigint_leaves_at_once(flag, sequence):
    for number in sequence[:-1]:
        send(number, lambda number=number: number in flag.received)
    with pytest.raises(KeyboardInterrupt):
        send(INT, lambda: False)
