"""What gradients in bf16 cost in score: the quickstart's training, with and without, from the same seeds.

    python -m benchmarks.compression
    python -m benchmarks.compression --rounds 1 --steps 4 --dry-run      tries it out

Two processes train on the procedural data set of the quickstart. Runs of one seed differ in nothing but
train.gradient_compression; runs of other seeds say how much scores vary by themselves.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.common import CHECKOUT, command, parser, publish, spread, table
from fcn.data.shapes import write_shapes

KINDS = {"fp32": "null", "bf16": "bf16"}
"""What the gradients travel in → train.gradient_compression."""


def main() -> None:
    parse = parser(__doc__, 4)
    parse.add_argument("--steps", type=int, default=200)
    args = parse.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_shapes(Path(folder) / "shapes", train=600)
        runs = [{kind: train(Path(folder), kind, seed, args.steps) for kind in KINDS} for seed in range(args.rounds)]
    rows = [[str(seed), *(f"{scores[kind]:.4f}" for kind in KINDS)] for seed, scores in enumerate(runs)]
    costs = [100 * (scores["bf16"] - scores["fp32"]) for scores in runs]
    text = f"mIoU on 100 images after {args.steps} steps on two processes, by what the gradients travel in:\n\n"
    text += table(["seed", *KINDS], rows)
    text += f"\n\nbf16 less fp32: {spread(costs)} points"
    if len(runs) > 1:
        own = 100 * statistics.stdev(scores["fp32"] for scores in runs)
        text += f"; the standard deviation over the seeds, in fp32, is {own:.2g} points"
    publish("the score with gradients in bf16", command(), text + ".", args.dry_run)


def train(folder: Path, kind: str, seed: int, steps: int) -> float:
    """The final mIoU."""
    run = folder / f"{kind}_{seed}"
    words = [f"run_dir={run}", f"data.root={folder}/shapes", f"seed={seed}", f"train.steps={steps}"]
    words += [f"train.gradient_compression={KINDS[kind]}", f"eval.every={steps}", "eval.pictures=0"]
    words += [f"checkpoint.every={steps}", "wandb.mode=disabled"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train_ddp.py"]
    subprocess.run(
        [*launch, "--config", "configs/quickstart.yaml", *words],
        cwd=CHECKOUT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        check=True,
    )
    return json.loads((run / "summary.json").read_text())["miou"]


if __name__ == "__main__":
    main()
