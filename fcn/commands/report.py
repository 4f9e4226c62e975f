"""`python -m fcn report`: a run on one page."""

from __future__ import annotations

import argparse
from pathlib import Path

from fcn import reports
from fcn.arguments import Parser
from fcn.commands.runner import run_on_rank_0, say
from fcn.files import must_be_writable

HELP = "a live or dead run on one page"
DESCRIPTION = """Write RUN_DIR/report.html, as training does at its end: one page that opens from any file share.

    python -m fcn report runs/quickstart

The page is made from the run's directory alone, whether the run goes on, is finished or dead. It contains its
pictures.
"""


def add_arguments(parser: Parser) -> None:
    """What follows the command."""
    parser.add_run_dir()


def run(args: argparse.Namespace) -> int:
    return run_on_rank_0(report, args)


def report(args: argparse.Namespace) -> int:
    """Write the page and print its path."""
    with must_be_writable(args.run_dir):
        say(reports.write_report(Path(args.run_dir)))
    return 0
