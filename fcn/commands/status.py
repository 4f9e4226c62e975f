"""`python -m fcn status`: what a run is doing."""

from __future__ import annotations

import argparse
from pathlib import Path

from fcn import reports
from fcn.arguments import Parser
from fcn.commands.runner import run_on_rank_0, say

HELP = "what a live or dead run is doing"
DESCRIPTION = """Say what a run is doing, live or dead. Reads its directory and changes nothing there.

    python -m fcn status runs/quickstart
    watch -n 10 python -m fcn status runs/voc

Each rank of a run writes a heartbeat every ten seconds. Exit status: 0 the run goes on, is finished or was stopped
after saving; 1 it is dead, has failed, or a rank holds the others up.
"""


def add_arguments(parser: Parser) -> None:
    """What follows the command."""
    parser.add_run_dir()


def run(args: argparse.Namespace) -> int:
    return run_on_rank_0(status, args)


def status(args: argparse.Namespace) -> int:
    """Print the status of a run; 0 if all is well, else 1."""
    text, well = reports.run_status(Path(args.run_dir))
    say(text)
    return 0 if well else 1
