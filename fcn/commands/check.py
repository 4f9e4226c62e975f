"""`python -m fcn check`: look at data, network and memory before a run."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from fcn import commands
from fcn.arguments import Parser
from fcn.commands.runner import BAD_INPUT, run_on_ranks
from fcn.config import load_config
from fcn.errors import InputError

if TYPE_CHECKING:
    from fcn.distributed import DistributedContext

HELP = "look at data, network and memory before a run"
DESCRIPTION = """Read all data that a config names, try its network for a step, and say what that takes.

    python -m fcn check --config configs/linknet_camvid.yaml data.root=/data/camvid

Every fault is named at the end, one line each. Exit status: 0 no faults, 2 faults.
"""


def add_arguments(parser: Parser) -> None:
    """What follows the command."""
    parser.add_config()
    parser.add_argument("--headers", action="store_true", help="trust the images' headers; masks are always read")
    parser.add_overrides()


def run(args: argparse.Namespace) -> int:
    return run_on_ranks(check, args)


def check(args: argparse.Namespace, context: DistributedContext) -> int:
    """Print the report; 2 if it names a fault."""
    if context.size > 1:
        raise InputError(f"found {context.size} processes; check needs one: python -m fcn check …")
    config = load_config(args.config, args.overrides)
    faults = commands.check_config(config, args.config, context, headers_only=args.headers)
    return BAD_INPUT if faults else 0
