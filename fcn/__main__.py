"""Commands beside training: `python -m fcn evaluate`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from fcn import cli, distributed, tracking
from fcn.checkpoint import load_checkpoint
from fcn.config import config_from_dict
from fcn.data.datasets import build_dataset
from fcn.distributed import World
from fcn.engine import evaluate
from fcn.errors import InputError
from fcn.models import build_model
from fcn.run import Numerics

EVALUATE = """Score a checkpoint on a split, each image once, at native label size.

    python -m fcn evaluate --checkpoint runs/quickstart --split val
    torchrun --nproc_per_node=8 -m fcn evaluate --checkpoint runs/quickstart/checkpoints/best.pt eval.batch_size=1
"""


def main(argv: list[str], world: World) -> int:
    parser = cli.Parser(prog="python -m fcn", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=cli.Parser)
    command = commands.add_parser("evaluate", description=EVALUATE, help="score a checkpoint on a split")
    command.add_argument(
        "--checkpoint",
        required=True,
        metavar="FILE|RUN_DIR",
        help="a .pt file, or a run directory for its newest checkpoint",
    )
    command.add_argument("--split", help="split of the data set; default: the config's data.val")
    command.add_argument("--output", metavar="FILE", help="write scores and confusion matrix as JSON")
    command.add_overrides()
    args = parser.parse_args(argv)
    return evaluate_command(args.checkpoint, args.split, args.output, args.overrides, world)


def evaluate_command(path: str, split: str | None, output: str | None, overrides: list[str], world: World) -> int:
    """Build the checkpoint's network and data, score one split, print and perhaps write the result."""
    if output and not Path(output).resolve().parent.is_dir():
        raise InputError(f"--output {output}: no such folder; make it first")
    state = distributed.together(lambda: load_checkpoint(path))
    # Nothing is trained, so any number of processes fits the batch size of the training run.
    config = distributed.together(lambda: config_from_dict(state["config"], path, overrides))
    split = split or config.data.val
    dataset = distributed.together(lambda: build_dataset(config.data, split, config.loss.ignore_index))
    if list(dataset.classes.names) != state["classes"]:
        raise InputError(
            f"{path}: was trained on the classes {', '.join(state['classes'])}; data.name={config.data.name} has others"
        )
    numerics = Numerics(config.train.precision, config.train.channels_last, world.device)
    model = numerics.place(build_model(config.model.name, len(dataset.classes), **config.model.arguments()))
    try:
        model.load_state_dict(state.get("ema", state["model"]))
    except RuntimeError:
        raise InputError(f"{path}: holds another network than model.* describes; leave those keys as trained") from None
    matrix, images = evaluate(model, dataset, config, world, numerics)
    if world.rank == 0:
        record = {"split": split, "step": state["step"], **matrix.scores(dataset.classes.names), "images": images}
        print(tracking.score_table(record))
        print(tracking.score_line(record))
        if output:
            result = {**record, "checkpoint": path, "confusion_matrix": matrix.counts.tolist()}
            Path(output).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
