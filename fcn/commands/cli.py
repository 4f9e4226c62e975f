"""`python -m fcn COMMAND`: finds the command and runs it."""

from __future__ import annotations

from collections.abc import Sequence

from fcn.arguments import Parser
from fcn.commands import check, compare, evaluate, export, predict, report, status
from fcn.commands.runner import run

COMMANDS = {
    "check": check,
    "evaluate": evaluate,
    "predict": predict,
    "export": export,
    "compare": compare,
    "report": report,
    "status": status,
}
"""Each module has HELP (one line), DESCRIPTION, `add_arguments(parser)` and `run(args)` → exit status.

None of them imports PyTorch before `run` is called, so that `--help` and usage errors answer immediately."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; `argv` is what follows `python -m fcn`. Returns the exit status."""
    return run(parser(), argv)


def parser() -> Parser:
    """The arguments of all commands; each sets `run`."""
    main_parser = Parser(prog="python -m fcn", description="Commands around training.")
    subparsers = main_parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    for name, command in COMMANDS.items():
        subparser = subparsers.add_parser(name, description=command.DESCRIPTION, help=command.HELP)
        command.add_arguments(subparser)
        subparser.set_defaults(run=command.run)
    return main_parser
