"""`python -m fcn evaluate`: score a checkpoint."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from fcn import data, distributed, evaluation, tracking
from fcn.arguments import Parser
from fcn.commands.runner import run_on_ranks, say
from fcn.errors import InputError
from fcn.files import must_be_writable, write_atomically

if TYPE_CHECKING:
    from fcn.distributed import DistributedContext

HELP = "score a checkpoint on a split"
DESCRIPTION = """Score a checkpoint on a split: each image once, by default whole and at the size of its labels.

    python -m fcn evaluate --checkpoint runs/quickstart --split val --json scores.json --pictures out
    torchrun --nproc_per_node=8 -m fcn evaluate --checkpoint runs/voc/checkpoints/best.pt eval.flip=true

The pictures are a heat map of the confusion matrix and, of eval.pictures images each, panels of images spread over the
split and of those with the lowest scores.
"""


def add_arguments(parser: Parser) -> None:
    """What follows the command."""
    parser.add_checkpoint()
    parser.add_argument("--split", help="split of the data set; default: the config's data.val")
    parser.add_argument("--json", metavar="FILE", help="write scores and confusion matrix")
    parser.add_argument("--pictures", metavar="DIR", help="draw heat map, images, and images with the lowest scores")
    parser.add_overrides()


def run(args: argparse.Namespace) -> int:
    return run_on_ranks(evaluate, args)


def evaluate(args: argparse.Namespace, context: DistributedContext) -> int:
    """Build the checkpoint's network and data, score one split, print and perhaps write the result."""
    if context.rank == 0:
        distributed.run_on_all_ranks(lambda: _check_outputs(args.json, args.pictures))
    else:
        distributed.run_on_all_ranks(lambda: None)
    trained = distributed.run_on_all_ranks(
        lambda: evaluation.load_trained(
            args.checkpoint, args.overrides, context.device, args.trust_code, with_data=True
        )
    )
    config, names = trained.config, trained.classes.names
    split = args.split or config.data.val
    dataset = distributed.run_on_all_ranks(lambda: data.build_dataset(config.data, split, config.loss.ignore_index))
    if dataset.classes.names != names:
        raise InputError(
            f"{args.checkpoint}: was trained on the classes {', '.join(names)}; data.name={config.data.name} has others"
        )
    found = evaluation.evaluate_split(
        evaluation.Evaluator(trained.model, split, dataset, config, trained.precision, context)
    )
    if context.rank == 0:
        record = {"step": trained.step, **found.record()}
        say(tracking.score_table(record))
        say(tracking.score_line(record))
        if problem := tracking.nothing_to_score(record):
            say(f"warning: {problem}")
        if args.json:
            result = {**record, "checkpoint": args.checkpoint, **found.counts()}
            write_atomically(Path(args.json), json.dumps(result, indent=1) + "\n")
        if args.pictures:
            with must_be_writable(f"--pictures {args.pictures}"):
                evaluation.draw_scores(found, trained.step, Path(args.pictures))
    return 0


def _check_outputs(json_file: str | None, pictures: str | None) -> None:
    if json_file:
        path = Path(json_file).resolve()
        if not path.parent.is_dir():
            raise InputError(f"--json {json_file}: no such folder; make it first")
        if path.is_dir() or not os.access(path.parent, os.W_OK):
            raise InputError(f"--json {json_file}: cannot be written; give a file in a folder that you may write to")
    if pictures:
        with must_be_writable(f"--pictures {pictures}"):
            Path(pictures).mkdir(parents=True, exist_ok=True)
