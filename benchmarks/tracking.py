"""What W&B costs a run: training while its server hangs, and while it records offline, beside no W&B at all.

    python -m benchmarks.tracking                                     takes some minutes
    python -m benchmarks.tracking --rounds 1 --steps 60 --dry-run     tries it out

Whole runs of `train_ddp.py` in turn, one process with one thread, on images that are decoded in memory. Every step is
a record, and three evaluations have pictures. The server accepts connections and never answers.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks.common import CHECKOUT, command, parser, publish, ratios, settings, spread, table, take_turns
from fcn.config import save_config
from fcn.tracking import read_records

MODES = {"no W&B": "disabled", "W&B offline": "offline", "W&B, server hangs": "online"}


def main() -> None:
    parse = parser(__doc__, 5)
    parse.add_argument("--model", default="linknet", help="default: %(default)s")
    parse.add_argument(
        "--size", type=int, nargs=2, default=(128, 128), metavar=("HEIGHT", "WIDTH"), help="of the crops"
    )
    parse.add_argument("--batch", type=int, default=4, help="default: %(default)s")
    parse.add_argument("--steps", type=int, default=240, help="of a run; default: %(default)s")
    args = parse.parse_args()
    with socket.create_server(("127.0.0.1", 0)) as server:  # the kernel accepts, nobody reads
        address = f"http://127.0.0.1:{server.getsockname()[1]}"

        def rival(mode: str) -> Callable[[], tuple[float, float]]:
            return partial(run, mode, address, args.model, args.size, args.batch, args.steps)

        results = take_turns({name: rival(mode) for name, mode in MODES.items()}, args.rounds)
    base, *_ = results
    rows = []
    for name, rounds in results.items():
        rates, ends = zip(*rounds, strict=True)
        relative = ratios(rates, [rate for rate, _ in results[base]])
        rows.append([name, spread(rates), "1" if name == base else spread(relative), spread(ends)])
    publish(
        "What W&B costs a run",
        command(),
        f"{args.model}, batch {args.batch} of {args.size[0]}×{args.size[1]}, a record a step, {args.steps} steps.\n\n"
        + table(["", "images/s", f"beside {base}", "s from summary.json to the exit"], rows),
        args.dry_run,
    )


def run(mode: str, address: str, model: str, size: tuple[int, int], batch: int, steps: int) -> tuple[float, float]:
    """(images/s over all steps but the first ten, seconds from summary.json to the end of the process)."""
    with tempfile.TemporaryDirectory() as folder:
        keys = [
            "data.scale=[1,1]",
            f"train.steps={steps}",
            f"eval.every={steps // 3}",
            "eval.pictures=2",
            f"wandb.mode={mode}",
        ]
        config = Path(folder) / "config.yaml"
        save_config(settings(Path(folder) / "run", model, size, batch, 1, keys), config)
        environ = os.environ | {
            "WANDB_BASE_URL": address,
            "WANDB_API_KEY": "0" * 40,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(CHECKOUT),
        }
        subprocess.run(
            [sys.executable, "train_ddp.py", "--config", str(config)],
            cwd=CHECKOUT, env=environ, stdin=subprocess.DEVNULL, capture_output=True, check=True,
        )  # fmt: skip
        ended, summary = time.time(), Path(folder) / "run" / "summary.json"
        took = [line["step_s"] for line in read_records(Path(folder) / "run" / "metrics.jsonl") if "step_s" in line]
        return batch * len(took[10:]) / sum(took[10:]), ended - summary.stat().st_mtime


if __name__ == "__main__":
    main()
