"""Everything that waits for a GPU, in ten minutes and one command.

    python -m benchmarks.gpu prepare build/gpu                         here: downloads what the GPU's machine may lack
    python -m benchmarks.gpu run OUT --packages build/gpu              there, without a network
    python -m benchmarks.gpu run OUT --rehearse                        tries it out on a CPU, at small sizes

`run` goes through the parts below in order of worth. Each is a process group with a time limit; its output is in
OUT/PART.txt while it runs, and OUT/summary.md gets a line when it ends. A part that fails or takes too long stops
nothing else.

With --nccl FILE (libnccl.so.2 of NCCL 2.30 or newer, perhaps compressed as .xz) several ranks also share the GPU under
NCCL. To run it from a checkout, no package of this project needs to be installed there beside PyTorch, torchvision,
NumPy, Pillow, PyYAML and matplotlib.
"""

from __future__ import annotations

import argparse
import contextlib
import lzma
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

CHECKOUT = Path(__file__).resolve().parents[1]
PACKAGES = ("simplejpeg", "tqdm", "jinja2", "markupsafe", "pytest", "pluggy", "iniconfig", "packaging", "pygments")
"""With what they need themselves. 4 MB."""
MACHINE = "import torch, platform; print(platform.python_version(), torch.__version__, torch.cuda.is_available() and (\
torch.cuda.get_device_name(), torch.cuda.nccl.version(), torch.backends.cudnn.version()))"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone")


class Part(NamedTuple):
    """A command for `python`, and how long it may take."""

    name: str
    limit_s: float
    arguments: Sequence[str]
    variables: dict[str, str] = {}  # noqa: RUF012 - never changed


def parts(work: Path, out: Path, rehearse: bool, nccl: Path | None) -> list[Part]:
    """All parts, most valuable first."""
    data = work / "shapes"
    crop, batch, width, steps = ("[64,64]", 8, 4, 12) if rehearse else ("[480,480]", 32, 64, 200)
    small = ("--size", "64", "64", "--batch", "2", "--window", "2") if rehearse else ()
    rounds = ("--rounds", "2" if rehearse else "5", "--dry-run")

    def train(name: str, *overrides: str, config: str = "quickstart") -> list[str]:
        return [
            "train_ddp.py", "--config", f"configs/{config}.yaml", f"data.root={data}", f"run_dir={work / name}",
            "wandb.mode=disabled", "eval.pictures=1", f"data.crop={crop}", f"train.batch_size={batch}",
            f"train.steps={steps}", f"eval.every={steps}", f"checkpoint.every={steps}", *overrides,
        ]  # fmt: skip

    def bits(name: str, processes: int, backend: str, **variables: str) -> Part:
        launch = [*TORCHRUN, f"--nproc_per_node={processes}"] if processes > 1 else []
        fixed = ("train.shards=4", "train.batch_size=8", "train.steps=20", "train.precision=bf16", "data.crop=[96,96]")
        run = [*launch, *train(name, *fixed, "eval.every=20", "checkpoint.every=20")]
        return Part(name, 60, run, {"FCN_BACKEND": backend, **variables})

    equal = [bits("bits-1", 1, ""), bits("bits-2-gloo", 2, "gloo")]
    if nccl:
        equal.append(bits("bits-2-nccl", 2, "nccl", LD_PRELOAD=str(nccl)))
    big = (f"model.width={width}", "train.precision=bf16")
    return [
        Part("machine", 30, ["-c", MACHINE]),
        Part("data", 60, ["-m", "fcn.data.shapes", str(data), "--train", "48" if rehearse else "400", "--val", "20"]),
        Part("tests", 200, ["-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "tests/gpu"]),
        Part("train", 90, train("train", *big)),
        Part("step", 90, ["-m", "benchmarks.step", *rounds, *small]),
        *equal,
        Part("compare-bits", 30, ["-m", "benchmarks.gpu", "compare", *(str(work / part.name) for part in equal)]),
        Part("models", 120, ["-m", "benchmarks.models", *rounds, *small[:5], "--models", "linknet", "unet", "fcn8s"]),
        Part("compiled", 120, train("compiled", *big, "train.compile=true")),
        Part("resize-on-device", 60, train("device", *big, "data.resize=device")),
        Part("check", 60, ["-m", "fcn", "check", "--config", "configs/quickstart.yaml", f"data.root={data}", *big]),
        Part("profile", 60, train("profile", *big, "train.profile=5")),
        Part("shards", 120, ["-m", "benchmarks.shards", *rounds, *small[:3], "--batch", "8"]),
    ]


def run_part(part: Part, out: Path, left_s: float) -> str:
    """Run a part; returns how it ended."""
    began, limit = time.monotonic(), min(part.limit_s, left_s)
    with (out / f"{part.name}.txt").open("w") as file:
        process = subprocess.Popen(
            [sys.executable, *part.arguments], cwd=CHECKOUT, env=os.environ | part.variables, stdin=subprocess.DEVNULL,
            stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            status: object = process.wait(limit)
        except subprocess.TimeoutExpired:
            status = f"stopped after {limit:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    return f"| {part.name} | {status} | {time.monotonic() - began:.0f} s |"


def run(args: argparse.Namespace) -> int:
    """Install, then run all parts until the time is over."""
    deadline, out = time.monotonic() + args.limit, Path(args.out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    if args.packages:
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--find-links", args.packages, *PACKAGES]
        subprocess.run(command, check=False)  # without one of them, the parts that need it fail alone
    with tempfile.TemporaryDirectory() as folder, (out / "summary.md").open("w", buffering=1) as summary:
        nccl = _unpacked(Path(args.nccl), Path(folder)) if args.nccl else None
        summary.write("| part | status | time |\n|---|---|---|\n")
        for part in parts(Path(folder), out, args.rehearse, nccl):
            left = deadline - time.monotonic()
            if args.only and part.name not in args.only:
                continue
            line = f"| {part.name} | no time left | |" if left < 10 else run_part(part, out, left)
            summary.write(f"{line}\n")
            print(line, flush=True)
        for name in ("report.html", "summary.json", "metrics.jsonl"):
            with contextlib.suppress(OSError):
                shutil.copy(Path(folder) / "train" / name, out / name)
        for trace in Path(folder).glob("profile/profile/*.json.gz"):
            shutil.copy(trace, out / trace.name)
    return 0


def _unpacked(path: Path, folder: Path) -> Path:
    if path.suffix != ".xz":
        return path.resolve()
    target = folder / path.stem
    with lzma.open(path) as source, target.open("wb") as file:
        shutil.copyfileobj(source, file)
    return target


def prepare(args: argparse.Namespace) -> int:
    """Download the wheels for Python 3.12 on Linux."""
    where = ("--python-version", "3.12", "--platform", "manylinux_2_28_x86_64", "--only-binary=:all:", "--no-deps")
    command = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", "-d", args.folder, *where]
    return subprocess.run([*command, *PACKAGES]).returncode


def compare(args: argparse.Namespace) -> int:
    """Say whether the last checkpoints of run directories have equal tensors."""
    import hashlib

    from fcn.checkpoints import load_checkpoint

    digests = {}
    for folder in args.folders:
        model, digest = load_checkpoint(folder)["model"], hashlib.sha256()
        for key, tensor in sorted(model.items()):
            digest.update(key.encode() + tensor.contiguous().numpy().tobytes())
        digests[folder] = digest.hexdigest()[:12]
        print(Path(folder).name, digests[folder])
    return 0 if len(set(digests.values())) == 1 else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("prepare", help="download packages")
    one.add_argument("folder")
    one.set_defaults(act=prepare)
    one = commands.add_parser("run", help="run all parts")
    one.add_argument("out")
    one.add_argument("--packages", metavar="FOLDER", help="what `prepare` downloaded")
    one.add_argument("--nccl", metavar="FILE", help="libnccl.so.2 of NCCL 2.30 or newer, or the same with .xz")
    one.add_argument("--limit", type=float, default=560, help="seconds; default: %(default)s")
    one.add_argument("--only", nargs="+", metavar="PART", help="these parts alone")
    one.add_argument("--rehearse", action="store_true", help="small sizes, for a CPU")
    one.set_defaults(act=run)
    one = commands.add_parser("compare", help="compare checkpoints of run directories")
    one.add_argument("folders", nargs="+")
    one.set_defaults(act=compare)
    args = parser.parse_args()
    return args.act(args)


if __name__ == "__main__":
    sys.exit(main())
