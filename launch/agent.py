"""torchrun with two mends: python launch/agent.py SECONDS TORCHRUN'S ARGUMENTS

A newcomer hears where the group meets. torchrun (seen in 2.14) tells it once: an agent that has been in a group before
does not repeat the address for those who join, and they wait for it in vain.

A cut network is noticed. An agent asks the rendezvous host for news ten times a second. When that host can be reached
no more, the question waits until TCP gives up, which takes a quarter of an hour and cannot be interrupted, not even by
SIGTERM; torchrun has no option for it. Here it takes SECONDS, after which the agent ends its processes and fails. A
shorter cut is survived.
"""

from __future__ import annotations

import contextlib
import os
import runpy
import socket
import stat
import sys
import threading
import time

from torch.distributed.elastic.rendezvous import RendezvousConnectionError, RendezvousInfo
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler


def bound_connections(seconds: float) -> None:
    """Let all TCP connections of this process fail when the other side has not answered for so long."""
    for number in map(int, os.listdir("/proc/self/fd")):
        with contextlib.suppress(OSError):
            if stat.S_ISSOCK(os.fstat(number).st_mode):
                with socket.socket(fileno=os.dup(number)) as connection:
                    bound(connection, seconds)


def bound(connection: socket.socket, seconds: float) -> None:
    if connection.type == socket.SOCK_STREAM and connection.family in (socket.AF_INET, socket.AF_INET6):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(seconds * 1000))
        # Where all that was sent has arrived and the answer is lost, only a probe finds out.
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, max(1, int(seconds / 3)))
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, max(1, int(seconds / 3)))
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)


def keep_bounding(seconds: float) -> None:
    """With every new group torchrun opens new connections."""
    while True:
        bound_connections(seconds)
        time.sleep(1)


def meet_anew() -> None:
    """Let the first agent of every new group open a store and tell the others where it is."""
    join = DynamicRendezvousHandler.next_rendezvous

    def next_rendezvous(self: DynamicRendezvousHandler) -> RendezvousInfo:
        self._bootstrap_store_info = None
        return join(self)

    DynamicRendezvousHandler.next_rendezvous = next_rendezvous


def main() -> int:
    seconds = float(sys.argv.pop(1))
    meet_anew()
    if sys.platform == "linux":
        threading.Thread(target=keep_bounding, args=(seconds,), name="connections", daemon=True).start()
    try:
        runpy.run_module("torch.distributed.run", run_name="__main__", alter_sys=True)
    except RendezvousConnectionError as error:
        cause = str(error.__cause__ or error).splitlines()[0]
        where = "the rendezvous host cannot be reached: it is down, or the network is cut"
        print(f"error: {where} ({cause})", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
