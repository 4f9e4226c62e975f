"""Command lines carried out in this process, whose InputErrors a test can catch."""

from __future__ import annotations

from collections.abc import Sequence

import torch

import train_ddp
from fcn.commands import cli
from fcn.distributed import DistributedContext

ALONE = DistributedContext(0, 1, 0, torch.device("cpu"), "python")


def call(words: Sequence[str], context: DistributedContext = ALONE) -> int:
    """What `python -m fcn WORDS` does inside the process group of `context`; returns the exit status."""
    args = cli.parser().parse_args([str(word) for word in words])
    command = getattr(cli.COMMANDS[args.command], args.command)
    return command(args) if args.command in ("status", "compare", "report") else command(args, context)


def train(words: Sequence[str], context: DistributedContext = ALONE) -> int:
    """What `train_ddp.py WORDS` does inside the process group of `context`; returns the exit status."""
    return train_ddp.train(train_ddp.parser().parse_args([str(word) for word in words]), context)
