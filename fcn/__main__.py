"""Commands beside training: `python -m fcn check`, `evaluate`, `predict`, `export`, `compare`, `report`, `status`."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from fcn import cli, distributed, tracking
from fcn.check import check
from fcn.compare import compare
from fcn.config import load_config, protocol
from fcn.data.datasets import build_dataset
from fcn.data.layouts import mask_suffix
from fcn.distributed import World
from fcn.errors import InputError
from fcn.evaluation import draw_scores, evaluate
from fcn.export import export
from fcn.inference import load_trained
from fcn.predictions import Files, plan, predict_files
from fcn.report import write_report
from fcn.status import status

EVALUATE = """Score a checkpoint on a split, each image once, by default whole and at native label size.

    python -m fcn evaluate --checkpoint runs/quickstart --split val --json scores.json --pictures out
    torchrun --nproc_per_node=8 -m fcn evaluate --checkpoint runs/voc/checkpoints/best.pt eval.flip=true

The pictures are a heat map of the confusion matrix and, of eval.pictures images each, panels of images spread over the
split and of those with the lowest scores.
"""
PREDICT = """Write the classes of every pixel of images as palette PNGs, and overlays to look at.

    python -m fcn predict --checkpoint runs/quickstart --output predictions photo.jpg more_photos/
    torchrun --nproc_per_node=8 -m fcn predict --checkpoint best.pt --output out --set eval.window=[512,512] aerial/

FOLDER/sub/a.jpg becomes OUTPUT/sub/a.png, and OUTPUT/overlays/sub/a.png. Images are taken whole, at their own size;
eval.scales, eval.flip and eval.window hold here, too, and eval.preset does not.
"""
PREDICT_KEYS = ("eval.batch_size", "eval.scales", "eval.flip", "eval.window", "train.precision", "data.workers")
"""What `--set` may change: nothing that belongs to the network or to its training."""

CHECK = """Look before you leap: read all data of a config, try its network for a step, and say what that takes.

    python -m fcn check --config configs/linknet_camvid.yaml data.root=/data/camvid

Every fault is named at the end, one line each. Exit status: 0 no faults, 2 faults.
"""

EXPORT = """Write a checkpoint's network as one file that runs without fcn, for any number of images of any size.

    python -m fcn export --checkpoint runs/quickstart --output shapes.pt2
    python -m fcn export --checkpoint best.pt --output best.onnx

A .pt2 file is for torch.export.load, an .onnx file for other engines; to write one, onnx and onnxscript are needed.
Either takes pixels, images (N, 3, H, W) uint8 RGB, and returns their classes (N, H, W) uint8; it says so inside, with
names and colours of the classes. The file is compared with the checkpoint before it gets its name.
"""

COMPARE = """Runs side by side: how their configs differ, how far they are, what they score.

    python -m fcn compare runs/linknet-camvid runs/unet-camvid
"""

REPORT = """Write RUN_DIR/report.html, as training does at its end: a run on one page, which opens from any file share.

    python -m fcn report runs/quickstart

It is made from the folder alone, whether the run goes on, is finished or dead, and holds its pictures.
"""

STATUS = """What a run is doing, live or dead, from the outside: its folder is read, nothing of it is touched.

    python -m fcn status runs/quickstart
    watch -n 10 python -m fcn status runs/voc

Each rank of a run writes a sign of life every ten seconds. Exit status: 0 the run goes on, is finished or has left
after saving; 1 it is dead, has failed, or a rank holds the others up.
"""


def main(argv: list[str], world: World) -> int:
    parser = cli.Parser(prog="python -m fcn", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=cli.Parser)
    command = commands.add_parser("check", description=CHECK, help="look at data, network and memory before a run")
    command.add_argument("--config", required=True, metavar="FILE", help="YAML file, such as configs/quickstart.yaml")
    command.add_argument("--headers", action="store_true", help="believe the images' headers; masks are always read")
    command.add_overrides()
    command.set_defaults(run=check_command)
    command = commands.add_parser("evaluate", description=EVALUATE, help="score a checkpoint on a split")
    _add_checkpoint(command)
    command.add_argument("--split", help="split of the data set; default: the config's data.val")
    command.add_argument("--json", metavar="FILE", help="write scores and confusion matrix")
    command.add_argument("--pictures", metavar="DIR", help="draw heat map, images, and images with the lowest scores")
    command.add_overrides()
    command.set_defaults(run=evaluate_command)
    command = commands.add_parser("predict", description=PREDICT, help="label images")
    _add_checkpoint(command)
    command.add_argument("--output", required=True, metavar="DIR", help="where the results go")
    command.add_argument("--labels", metavar="DIR", help="masks under the images' names: draw image, label, prediction")
    command.add_argument("--no-overlays", action="store_true", help="write the palette PNGs alone")
    command.add_argument("--force", action="store_true", help="overwrite what is there")
    command.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help=f"change {', '.join(PREDICT_KEYS)}"
    )
    command.add_argument("inputs", nargs="+", metavar="IMAGE|DIR", help="images, or folders of images")
    command.set_defaults(run=predict_command)
    command = commands.add_parser("export", description=EXPORT, help="a network as a file that runs without fcn")
    _add_checkpoint(command)
    command.add_argument("--output", required=True, metavar="FILE", help="a name that ends in .pt2 or .onnx")
    command.add_argument("--logits", action="store_true", help="return logits (N, C, H, W) instead of classes")
    command.add_argument("--force", action="store_true", help="overwrite what is there")
    command.set_defaults(run=export_command)
    command = commands.add_parser("compare", description=COMPARE, help="runs side by side")
    command.add_argument("runs", nargs="+", metavar="RUN_DIR", help="folders that training made")
    command.set_defaults(run=compare_command)
    command = commands.add_parser("report", description=REPORT, help="a live or dead run on one page")
    command.add_argument("run_dir", metavar="RUN_DIR", help="folder that training made")
    command.set_defaults(run=report_command)
    command = commands.add_parser("status", description=STATUS, help="what a live or dead run is doing")
    command.add_argument("run_dir", metavar="RUN_DIR", help="folder that training made")
    command.set_defaults(run=status_command)
    args = parser.parse_args(argv)
    return args.run(args, world)


def _add_checkpoint(command: argparse.ArgumentParser) -> None:
    text = "a .pt file, or a run directory for its newest checkpoint"
    command.add_argument("--checkpoint", required=True, metavar="FILE|RUN_DIR", help=text)


def check_command(args: argparse.Namespace, world: World) -> int:
    """Look at a config's data, and try its network for a step."""
    if world.size > 1:
        raise InputError(f"found {world.size} processes; check needs one: python -m fcn check …")
    return check(load_config(args.config, args.overrides), args.config, world, args.headers)


def evaluate_command(args: argparse.Namespace, world: World) -> int:
    """Build the checkpoint's network and data, score one split, print and perhaps write the result."""

    def check_output() -> None:
        if world.rank != 0:
            return
        if args.json:
            path = Path(args.json).resolve()
            if not path.parent.is_dir():
                raise InputError(f"--json {args.json}: no such folder; make it first")
            if path.is_dir() or not os.access(path.parent, os.W_OK):
                raise InputError(
                    f"--json {args.json}: cannot be written; give a file in a folder that you may write to"
                )
        if args.pictures:
            with _writing(f"--pictures {args.pictures}"):
                Path(args.pictures).mkdir(parents=True, exist_ok=True)

    distributed.together(check_output)
    trained = distributed.together(lambda: load_trained(args.checkpoint, args.overrides, world.device))
    config, names = trained.config, trained.classes.names
    split = args.split or config.data.val
    dataset = distributed.together(lambda: build_dataset(config.data, split, config.loss.ignore_index))
    if dataset.classes.names != names:
        raise InputError(
            f"{args.checkpoint}: was trained on the classes {', '.join(names)}; data.name={config.data.name} has others"
        )
    found = evaluate(trained.model, dataset, config, world, trained.numerics)
    if world.rank == 0:
        record = {"step": trained.step, **found.record(split, names, config)}
        print(tracking.score_table(record))
        print(tracking.score_line(record))
        if args.json:
            result = {**record, "checkpoint": args.checkpoint, "confusion_matrix": found.matrix.counts.tolist()}
            tracking.write_atomically(Path(args.json), json.dumps(result, indent=1) + "\n")
        if args.pictures:
            with _writing(f"--pictures {args.pictures}"):
                draw_scores(
                    found, split, trained.step, trained.model, dataset, config, trained.numerics, Path(args.pictures)
                )
    return 0


@contextlib.contextmanager
def _writing(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"{what}: cannot be written ({reason}); give a folder that you may write to") from None


def predict_command(args: argparse.Namespace, world: World) -> int:
    """Build the checkpoint's network, find the images, write the predictions."""
    for override in args.set:
        if override.partition("=")[0].strip() not in PREDICT_KEYS:
            raise InputError(f"--set {override}: accepted: KEY=VALUE with one of the keys {', '.join(PREDICT_KEYS)}")
    trained = distributed.together(lambda: load_trained(args.checkpoint, args.set, world.device))

    def find() -> list[Files]:
        suffix = mask_suffix(trained.config.data)
        return plan(
            args.inputs, Path(args.output), overlays=not args.no_overlays, labels=args.labels, mask_suffix=suffix,
            force=args.force,
        )  # fmt: skip

    # One rank looks, so that all of them share the same images whatever happens to the folders meanwhile.
    files = distributed.gather(distributed.together(lambda: find() if world.rank == 0 else []))[0]
    predicted, faults = predict_files(trained, files, world)
    if world.rank == 0:
        how = protocol(replace(trained.config.eval, preset="native"), None)
        print(f"{predicted} of {len(files)} images predicted into {args.output} ({how})")
    if faults:
        raise InputError("\n".join(faults))
    return 0


def export_command(args: argparse.Namespace, world: World) -> int:
    """Write a checkpoint's network as a program, and say what it is."""
    if world.size > 1:
        raise InputError(f"found {world.size} processes; export needs one: python -m fcn export …")
    print(export(args.checkpoint, Path(args.output), logits=args.logits, force=args.force))
    return 0


def compare_command(args: argparse.Namespace, world: World) -> int:
    """Print a table of what the folders of runs say."""
    text = distributed.together(lambda: compare([Path(folder) for folder in args.runs]))
    if world.rank == 0:
        print(text)
    return 0


def report_command(args: argparse.Namespace, world: World) -> int:
    """Write a page from what a run's folder holds."""

    def write() -> None:
        if world.rank == 0:
            with _writing(args.run_dir):
                print(write_report(Path(args.run_dir)))

    distributed.together(write)
    return 0


def status_command(args: argparse.Namespace, world: World) -> int:
    """Print what a run's folder says of it."""
    text, well = distributed.together(lambda: status(Path(args.run_dir)))
    if world.rank == 0:
        print(text)
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(cli.run(main))
