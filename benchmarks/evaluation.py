"""Scoring a split: ours beside a loop in the style of torchvision's references/segmentation.

    python -m benchmarks.evaluation --voc data/VOCdevkit/VOC2012
    python -m benchmarks.evaluation --voc data/VOCdevkit/VOC2012 --images 8 --rounds 2 --dry-run      tries it out

`fcn.evaluation.evaluate` and the other loop take turns on the same files with the same network, labels and sizes. Ours
has batches of equal size, autocast on a GPU, and a confusion matrix that stays on the device. The other has one image a
pass in float32, finds the valid pixels with a mask, and looks at a number of the matrix after every image. How many
pixels the two score differently is printed, too: in float32 only rounding, in another memory format, decides a few.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from benchmarks.common import command, parser, publish, ratios, settings, spread, table, take_turns
from benchmarks.loader import Pairs, Sample, collate, finish
from fcn import distributed
from fcn.data import EvalTransform, build_dataset, decode
from fcn.data.datasets import list_split
from fcn.evaluation import Evaluator, evaluate_split
from fcn.models import DTYPES, Precision, build_model

CLASSES = 21


def main() -> None:
    on_gpu = torch.cuda.is_available()
    parse = parser(__doc__, 5)
    parse.add_argument("--voc", required=True, metavar="ROOT", help="folder VOC2012 of a VOCdevkit")
    parse.add_argument("--split", default="val")
    parse.add_argument("--images", type=int, default=None, help="score the first so many of the split; default: all")
    parse.add_argument("--presets", nargs="+", choices=("native", "short520"), default=["native", "short520"])
    parse.add_argument("--model", default="fcn_resnet50" if on_gpu else "linknet", help="default: %(default)s")
    parse.add_argument("--precision", choices=DTYPES, default="bf16" if on_gpu else "fp32", help="default: %(default)s")
    parse.add_argument("--workers", type=int, default=8 if on_gpu else 0, help="of both; default: %(default)s")
    parse.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="config keys of ours")
    args = parse.parse_intermixed_args()
    rows = []
    for preset in args.presets:
        count, took, different = compare(args, preset)
        for name, seconds in took.items():
            throughput, ratio = [count / one for one in seconds], ratios(took["other loop"], seconds)
            rows.append([preset, name, spread(throughput), spread(ratio), f"{different:.2g}" if name == "ours" else ""])
    text = f"{args.model}, ours in {args.precision}, {args.workers} workers, {count} images; "
    text += f"{args.rounds} rounds in turn, median (lowest–highest):\n\n"
    text += table(["preset", "", "images/s", "× the other loop", "share of pixels that differ"], rows)
    publish("evaluation", command(), text, args.dry_run)


def compare(args: argparse.Namespace, preset: str) -> tuple[int, dict[str, list[float]], float]:
    """(images, seconds of every round, share of the pixels that the two matrices count in different places)."""
    context = distributed.start()
    keys = ["data.name=voc", f"data.root={args.voc}", "data.options=null", f"data.workers={args.workers}"]
    keys += [f"train.precision={args.precision}", f"eval.preset={preset}", "eval.batch_size=8", *args.overrides]
    config = settings("unused", args.model, (480, 480), 1, 1, keys)
    pairs = list_split(config.data, args.split).pairs[: args.images]
    dataset = build_dataset(config.data, args.split, pairs=pairs)
    torch.manual_seed(0)
    theirs = build_model(args.model, CLASSES).to(context.device).eval()
    ours, precision = build_model(args.model, CLASSES), Precision.of(config, context.device)
    ours.load_state_dict(theirs.state_dict())
    precision.place(ours).eval()
    loader = DataLoader(Samples(pairs, preset), 1, num_workers=args.workers, collate_fn=collate)
    matrices: dict[str, torch.Tensor] = {}

    def run_ours() -> torch.Tensor:
        return evaluate_split(Evaluator(ours, "val", dataset, config, precision, context)).matrix.counts

    def timed(name: str, action: Callable[[], torch.Tensor]) -> float:
        began = time.perf_counter()
        matrices[name] = action()
        return time.perf_counter() - began

    rivals = {"other loop": lambda: loop(theirs, loader, context.device), "ours": run_ours}
    took = take_turns({name: lambda n=name, a=action: timed(n, a) for name, action in rivals.items()}, args.rounds)
    first, second = matrices.values()
    return len(pairs), took, float((first - second).abs().sum() / 2 / first.sum())


class Samples(Dataset):
    """Whole images and labels, prepared on the CPU one by one."""

    def __init__(self, pairs: Pairs, preset: str) -> None:
        self.pairs, self.transform = pairs, EvalTransform(preset)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Sample:
        image, mask = self.pairs[index]
        return finish(*self.transform(decode(image).convert("RGB"), decode(mask)))


@torch.inference_mode()
def loop(model: nn.Module, loader: DataLoader, device: torch.device) -> torch.Tensor:
    """The confusion matrix (C, C), labels down."""
    matrix = torch.zeros(CLASSES, CLASSES, dtype=torch.int64, device=device)
    for images, labels in loader:
        outputs = model(images.to(device))
        logits = outputs["out"] if isinstance(outputs, dict) else outputs
        truth, found = labels.to(device).flatten(), logits.argmax(1).flatten()
        valid = (truth >= 0) & (truth < CLASSES)
        pairs = CLASSES * truth[valid] + found[valid]
        matrix += torch.bincount(pairs, minlength=CLASSES**2).reshape(CLASSES, CLASSES)
        matrix.diagonal().sum().item()
    return matrix.cpu()


if __name__ == "__main__":
    main()
