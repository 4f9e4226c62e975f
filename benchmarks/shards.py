"""What `train.shards` costs.

    python -m benchmarks.shards
    python -m benchmarks.shards --model unet --size 64 64 --batch 8 --window 2 --rounds 2 --dry-run

Two processes with one shard each take turns with two that have none, and one process with all images in 1, 2 or 8
shards with one that has none. Everything else is equal, deterministic kernels included.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from benchmarks.common import Job, command, harness, parser, publish, ratios, settings, spread, table, take_turns

RUNS = {
    "2 processes": (2, "train.shards=null"),
    "2 processes, 2 shards": (2, "train.shards=2"),
    "1 process": (1, "train.shards=null"),
    "1 process, 1 shard": (1, "train.shards=1"),
    "1 process, 2 shards": (1, "train.shards=2"),
    "1 process, 8 shards": (1, "train.shards=8"),
}


def main() -> None:
    parse = parser(__doc__, 9)
    parse.add_argument("--model", default="linknet")
    parse.add_argument("--size", type=int, nargs=2, default=[256, 256], metavar=("HEIGHT", "WIDTH"))
    parse.add_argument("--batch", type=int, default=8, help="images of a step, a multiple of 8; default: 8")
    parse.add_argument("--window", type=int, default=4, help="steps of a turn; default: 4")
    parse.add_argument("--precision", default="fp32")
    args = parse.parse_args()
    words = [f"train.precision={args.precision}", "train.deterministic=true"]
    with tempfile.TemporaryDirectory() as folder:
        jobs = {}
        for name, (processes, shards) in RUNS.items():
            config = settings(
                Path(folder) / name.replace(" ", "-"), args.model, args.size, args.batch, args.window, [*words, shards]
            )
            jobs[name] = Job(processes, 1, harness, config)
        took = take_turns({name: job.turn for name, job in jobs.items()}, args.rounds)
        for job in jobs.values():
            job.close()
    rows = []
    for name, (processes, _) in RUNS.items():
        base = took["2 processes" if processes == 2 else "1 process"]
        speed = [args.batch * args.window / seconds for seconds in took[name]]
        rows.append([name, spread(speed), spread(ratios(base, took[name]))])
    size = "x".join(map(str, args.size))
    text = table(["run", "images/s", "compared with no shards"], rows)
    publish(f"The cost of shards: {args.model}, {args.batch} images of {size}", command(), text, args.dry_run)


if __name__ == "__main__":
    main()
