"""What happens around every command: the process group, one message for a fault in the input, the exit status."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from fcn import distributed
from fcn.arguments import Parser
from fcn.errors import InputError
from fcn.text import printable

if TYPE_CHECKING:
    from fcn.distributed import DistributedContext

BAD_INPUT, LOST_RANK = 2, 1


def run(parser: Parser, argv: Sequence[str] | None = None) -> int:
    """Parse the arguments and call the parser's default `run` with them; returns the exit status.

    On an InputError rank 0 prints the message, without a traceback, unless torchrun's report will show it. A usage
    error needs no process group for that, so the user does not wait for PyTorch to be imported.
    """
    rank = distributed.read_place(os.environ).rank
    distributed.end_with_launcher()
    try:
        args = parser.parse_args(argv)
        return args.run(args)
    except InputError as error:
        if rank:
            distributed.wait_for_the_message()
        if not distributed.report_failure(str(error)):
            _say(str(error))
        return BAD_INPUT


def run_on_ranks(main: Callable[[argparse.Namespace, DistributedContext], int], args: argparse.Namespace) -> int:
    """Call `main(args, context)` inside the process group and return the exit status.

    An InputError is said once: by torchrun's report, which comes last, or by rank 0. If `main` sets
    `args.record_failure`, that gets the message, too.
    """
    # Data-loader workers start from a server that has imported what they need, in milliseconds.
    multiprocessing.set_forkserver_preload(["fcn.data.loaders", "fcn.data.cache"])
    context = diagnosis = None
    try:
        context = distributed.start()
        diagnosis = distributed.Diagnosis(context)
        status = main(args, context)
    except InputError as error:
        reported = distributed.report_failure(str(error), of_all=context is not None)
        if context is None or context.rank == 0:
            _record(args, str(error))
            if not reported:
                _say(str(error))
        status = BAD_INPUT
    except Exception as error:
        if not distributed.is_communication_failure(error):
            if diagnosis:
                diagnosis.last_words(_in_a_line(error))
                _record(args, f"rank {context.rank} failed: {_in_a_line(error)}")
            raise
        # No bug of this rank: another one hung, failed, or was cut off.
        cause = f"{diagnosis.diagnose()} ({(str(error) or type(error).__name__).splitlines()[0]})"
        if diagnosis.speaks():
            _record(args, f"{cause} [seen by rank {context.rank}]")
            _say(f"{cause} [seen by rank {context.rank}]")
        distributed.report_failure(cause)
        os._exit(LOST_RANK)  # leaving the group in order could take for ever
    finally:
        for worker in multiprocessing.active_children():  # of a run that ended early; they ignore a polite request
            worker.kill()
    # torchrun ends all ranks as soon as one exits with an error: not before rank 0 has printed and saved everything.
    distributed.barrier()
    if status == BAD_INPUT and context is not None and context.launcher == "torchrun":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # this rank is about to exit, with its own status
    if diagnosis:
        diagnosis.close()
    distributed.stop()
    return status


def run_on_rank_0(main: Callable[[argparse.Namespace], int], args: argparse.Namespace) -> int:
    """Call `main(args)` in one process, without a process group: for commands that only read a run's directory."""
    return main(args) if distributed.read_place(os.environ).rank == 0 else 0


def say(text: object) -> None:
    """Print the result of a command, which may contain text from foreign files."""
    try:
        print(printable(str(text)), flush=True)
    except BrokenPipeError:  # of `… | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _in_a_line(error: Exception) -> str:
    """Kind and text; one from a loader's worker ends with them, after the worker's traceback."""
    lines = str(error).strip().splitlines() or [""]
    return lines[-1] if lines[0].startswith("Caught ") else f"{type(error).__name__}: {lines[0]}"


def _say(message: str) -> None:
    lines = (f"error: {printable(line)}" for line in message.splitlines())
    print("\n".join(lines), file=sys.stderr, flush=True)


def _record(args: argparse.Namespace, message: str) -> None:
    """The same into the run's directory, if the arguments name a run by now."""
    record = getattr(args, "record_failure", None)
    if record:
        record(message)
