"""`python -m fcn export`: a network as a file that runs without fcn."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from fcn import evaluation
from fcn.arguments import Parser
from fcn.commands.runner import run_on_ranks, say
from fcn.errors import InputError

if TYPE_CHECKING:
    from fcn.distributed import DistributedContext

HELP = "a network as a file that runs without fcn"
DESCRIPTION = """Write a checkpoint's network as one file that runs without fcn, for any number of images of any size.

    python -m fcn export --checkpoint runs/quickstart --output shapes.pt2
    python -m fcn export --checkpoint best.pt --output best.onnx

A .pt2 file is for torch.export.load, an .onnx file for other engines; to write one, onnx and onnxscript are needed.
Both take pixels, images (N, 3, H, W) uint8 RGB, and return their classes (N, H, W) uint8. The file describes itself,
with names and colours of the classes. It is compared with the checkpoint before it gets its name.
"""


def add_arguments(parser: Parser) -> None:
    """What follows the command."""
    parser.add_checkpoint()
    parser.add_argument("--output", required=True, metavar="FILE", help="a name that ends in .pt2 or .onnx")
    parser.add_argument("--logits", action="store_true", help="return logits (N, C, H, W) instead of classes")
    parser.add_argument("--force", action="store_true", help="overwrite an existing file")


def run(args: argparse.Namespace) -> int:
    return run_on_ranks(export, args)


def export(args: argparse.Namespace, context: DistributedContext) -> int:
    """Write the file and say what it is."""
    if context.size > 1:
        raise InputError(f"found {context.size} processes; export needs one: python -m fcn export …")
    output, options = Path(args.output), {"logits": args.logits, "force": args.force}
    say(evaluation.export_checkpoint(args.checkpoint, output, **options, trusted=args.trust_code))
    return 0
