"""`python -m fcn predict`: label images."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from fcn import data, distributed, evaluation
from fcn.arguments import Parser
from fcn.commands.runner import run_on_ranks, say
from fcn.config import protocol
from fcn.errors import InputError

if TYPE_CHECKING:
    from fcn.distributed import DistributedContext

HELP = "label images"
DESCRIPTION = """Write the classes of every pixel of images as palette PNGs, and overlays to look at.

    python -m fcn predict --checkpoint runs/quickstart --output predictions photo.jpg more_photos/
    torchrun --nproc_per_node=8 -m fcn predict --checkpoint best.pt --output out --set eval.window=[512,512] aerial/

FOLDER/sub/a.jpg becomes OUTPUT/sub/a.png, and OUTPUT/overlays/sub/a.png. Images are taken whole, at their own size.
eval.scales, eval.flip and eval.window apply here, too; eval.preset does not. Images are turned by their EXIF
orientations, or taken as they are stored, as data.exif_orientation was in training.
"""
KEYS = (
    "eval.batch_size", "eval.scales", "eval.flip", "eval.window", "train.precision", "data.workers",
    "data.exif_orientation",
)  # fmt: skip
"""What `--set` may change: nothing that belongs to the network or to its training."""


def add_arguments(parser: Parser) -> None:
    """What follows the command."""
    parser.add_checkpoint()
    parser.add_argument("--output", required=True, metavar="DIR", help="where the results go")
    parser.add_argument("--labels", metavar="DIR", help="masks under the images' names: draw image, label, prediction")
    parser.add_argument("--no-overlays", action="store_true", help="write the palette PNGs alone")
    parser.add_argument("--force", action="store_true", help="overwrite existing files")
    parser.add_argument(
        "--set", action="append", default=[], type=_setting, metavar="KEY=VALUE", help=f"change {', '.join(KEYS)}"
    )
    parser.add_argument("inputs", nargs="+", metavar="IMAGE|DIR", help="images, or folders of images")


def _setting(override: str) -> str:
    if override.partition("=")[0].strip() not in KEYS:
        raise InputError(f"--set {override}: accepted: KEY=VALUE with one of the keys {', '.join(KEYS)}")
    return override


def run(args: argparse.Namespace) -> int:
    return run_on_ranks(predict, args)


def predict(args: argparse.Namespace, context: DistributedContext) -> int:
    """Build the checkpoint's network, find the images, write the predictions."""
    trained = distributed.run_on_all_ranks(
        lambda: evaluation.load_trained(args.checkpoint, args.set, context.device, args.trust_code)
    )

    def find() -> list[evaluation.Files]:
        return evaluation.plan_files(
            args.inputs,
            Path(args.output),
            overlays=not args.no_overlays,
            labels=args.labels,
            mask_suffix=data.mask_suffix(trained.config.data),
            force=args.force,
        )

    # Rank 0 looks and the others take its list, so that all share the same images even if the folders change meanwhile.
    found = distributed.run_on_all_ranks(lambda: find() if context.rank == 0 else [])
    files = distributed.all_gather_object(found)[0]
    predicted, faults = evaluation.predict_files(trained, files, context)
    if context.rank == 0:
        how = protocol(replace(trained.config.eval, preset="native"), None)
        say(f"{predicted} of {len(files)} images predicted into {args.output} ({how})")
    if faults:
        raise InputError("\n".join(faults))
    return 0
