"""`python -m fcn compare`: runs side by side."""

from __future__ import annotations

import argparse
from pathlib import Path

from fcn import reports
from fcn.arguments import Parser
from fcn.commands.runner import run_on_rank_0, say

HELP = "runs side by side"
DESCRIPTION = """Put runs side by side: where their configs differ, how far they are, what they score.

    python -m fcn compare runs/linknet-camvid runs/unet-camvid
"""


def add_arguments(parser: Parser) -> None:
    """What follows the command."""
    parser.add_argument("runs", nargs="+", metavar="RUN_DIR", help="directories that training wrote")


def run(args: argparse.Namespace) -> int:
    return run_on_rank_0(compare, args)


def compare(args: argparse.Namespace) -> int:
    """Print a table with a column for each run."""
    say(reports.compare_runs([Path(folder) for folder in args.runs]))
    return 0
