"""What every entry point shares: arguments, the process group, and one message for a fault in the input."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from fcn import distributed
from fcn.distributed import World
from fcn.errors import InputError
from fcn.heartbeat import Heartbeat

BAD_INPUT, LOST_RANK = 2, 1


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are InputErrors, so that rank 0 alone prints them."""

    def __init__(self, **options: object) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)  # type: ignore[arg-type]

    def add_overrides(self) -> None:
        self.add_argument(
            "overrides",
            nargs="*",
            metavar="KEY=VALUE",
            help="override a config key, such as optim.lr=0.01 or data.crop=[256,256]",
        )

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{self.prog}: {message}; see {self.prog} --help")


def run(main: Callable[[list[str], World], int], argv: list[str] | None = None) -> int:
    """Call `main(argv, world)` inside the process group and return the exit status.

    An InputError is printed once, by rank 0, without a traceback, and is the cause that torchrun's own report shows.
    """
    multiprocessing.set_forkserver_preload(["fcn.engine", "fcn.models"])  # loader workers then start in milliseconds
    world = heart = None
    try:
        world = distributed.start()
        heart = Heartbeat(world)
        status = main(sys.argv[1:] if argv is None else argv, world)
    except InputError as error:
        if world is None or world.rank == 0:
            print("\n".join(f"error: {line}" for line in str(error).splitlines()), file=sys.stderr, flush=True)
        distributed.report_failure(str(error))
        status = BAD_INPUT
    except Exception as error:
        if not distributed.is_communication_failure(error):
            if heart:
                heart.last_words(f"{type(error).__name__}: {error}")
            raise
        # No bug of this rank: another one hung, failed, or was cut off.
        cause = f"{heart.diagnose()} ({str(error).splitlines()[0]})"
        if heart.speaks():
            print(f"error: {cause} [seen by rank {world.rank}]", file=sys.stderr, flush=True)
        distributed.report_failure(cause)
        os._exit(LOST_RANK)  # taking leave of the group could take for ever
    finally:
        for worker in multiprocessing.active_children():  # of a run that ended early; they ignore a polite request
            worker.kill()
    # torchrun ends all ranks as soon as one exits with an error: not before rank 0 has said and saved everything.
    distributed.barrier()
    heart and heart.close()
    distributed.stop()
    return status
