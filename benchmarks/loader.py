"""The data path alone: images a second of one core, from VOC files to batches of training crops.

    python -m benchmarks.loader --voc data/VOCdevkit/VOC2012
    python -m benchmarks.loader --voc data/VOCdevkit/VOC2012 --images 16 --rounds 2 --dry-run      tries it out

Ours, torchvision's reference pipeline and decoding alone take turns in one process with one thread and no workers, on
the same files, which the operating system has in memory after the first turn. Both pipelines resize by a random factor
of the same range, flip and crop, and end with a collated batch: ours of uint8 with the labels counted, which the device
normalises (with data.resize=device, of the pixels that it still has to resize); the reference's of normalised float32.
"""

from __future__ import annotations

import argparse
import atexit
import itertools
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from torchvision.io import ImageReadMode, decode_jpeg, read_file
from torchvision.transforms import InterpolationMode, RandomCrop, functional

from benchmarks.common import command, parser, publish, ratios, settings, spread, table, take_turns
from fcn.config import IMAGENET_MEAN, IMAGENET_STD, Data
from fcn.data import GlobalBatchSampler, RankBatches, TrainTransform, build_dataset
from fcn.data.datasets import list_split

REFERENCE, FLOOR = "torchvision's reference pipeline", "Pillow decodes image and mask"
Pairs = Sequence[tuple[Path, Path]]
Sample = tuple[torch.Tensor, torch.Tensor]


def main() -> None:
    parse = parser(__doc__, 7)
    parse.add_argument("--voc", required=True, metavar="ROOT", help="folder VOC2012 of a VOCdevkit")
    parse.add_argument("--split", default="train")
    parse.add_argument("--images", type=int, default=None, help="read the first so many of the split; default: all")
    parse.add_argument("--batch", type=int, default=8)
    parse.add_argument("--crop", type=int, nargs=2, default=[480, 480], metavar=("HEIGHT", "WIDTH"))
    parse.add_argument("--scale", type=float, nargs=2, default=[0.5, 2.0], metavar=("LOW", "HIGH"))
    args = parse.parse_args()
    torch.set_num_threads(1)
    random.seed(0)
    torch.manual_seed(0)
    pairs = list_split(Data(name="voc", root=args.voc), args.split).pairs[: args.images]
    results = take_turns({name: timed(work) for name, work in rivals(args, pairs).items()}, args.rounds)
    wall, cpu = ({name: [pair[place] for pair in pairs_] for name, pairs_ in results.items()} for place in (0, 1))
    rows = []
    for name in results:
        throughput = [len(pairs) / seconds for seconds in wall[name]]
        columns = [ratios(clock[base], clock[name]) for base in (REFERENCE, FLOOR) for clock in (wall, cpu)]
        rows.append([name, spread(throughput), *map(spread, columns)])
    head = ["", "images/s", f"× {REFERENCE}", "in CPU time", f"× {FLOOR}", "in CPU time"]
    size, scale = "x".join(map(str, args.crop)), "–".join(map(str, args.scale))
    text = (
        f"{len(pairs)} images, crop {size}, scale {scale}, flip 0.5, batches of {args.batch}, one thread, no workers; "
    )
    text += f"{args.rounds} rounds in turn, median (lowest–highest) of each round's ratio:\n\n" + table(head, rows)
    publish("the loader, per core", command(), text, args.dry_run)


def rivals(args: argparse.Namespace, pairs: Pairs) -> dict[str, Callable[[], object]]:
    """What takes turns: each call reads all images once."""
    reference = Reference(pairs, args.crop, args.scale)
    found = {
        FLOOR: lambda: [(Image.open(image).load(), Image.open(mask).load()) for image, mask in pairs],
        "Pillow decodes the image": lambda: [Image.open(image).load() for image, _ in pairs],
        "torchvision.io decodes the image": lambda: [
            decode_jpeg(read_file(str(image)), mode=ImageReadMode.RGB) for image, _ in pairs
        ],
        REFERENCE: lambda: [
            collate([reference[index] for index in range(start, min(start + args.batch, len(pairs)))])
            for start in range(0, len(pairs), args.batch)
        ],
    }
    for cache in (None, "memory"):
        for resize in (None, "device"):
            keys = {key: value for key, value in (("cache", cache), ("resize", resize)) if value}
            if set(keys) <= set(Data.__dataclass_fields__):
                name = "".join(["ours", *(f", data.{key}={value}" for key, value in keys.items())])
                found[name] = ours(args, pairs, keys)
    return found


def ours(args: argparse.Namespace, pairs: Pairs, keys: dict[str, str]) -> Callable[[], object]:
    """The harness's own loading, with other keys under `data:`."""
    words = ["data.name=voc", f"data.root={args.voc}", f"data.train={args.split}", "data.options=null"]
    config = settings(
        "unused", "linknet", args.crop, args.batch, 1, [*words, *(f"data.{k}={v}" for k, v in keys.items())]
    )
    dataset = build_dataset(config.data, args.split, pairs=pairs)
    if "cache" in keys:
        from fcn.data import with_cache

        dataset = with_cache(dataset, config)
        atexit.register(dataset.finished)
    later = {"resize_later": True} if "resize" in keys else {}
    shares = RankBatches(dataset, TrainTransform(tuple(args.crop), tuple(args.scale), 0.5), seed=0, **later)
    sampler = GlobalBatchSampler(
        dataset, batch_size=args.batch, steps=10**9, start_step=0, seed=0, rank=0, world_size=1
    )
    stream, steps = iter(sampler), max(1, len(pairs) // args.batch)
    return lambda: [shares[share].batch.images.shape for share in itertools.islice(stream, steps)]


def timed(work: Callable[[], object]) -> Callable[[], tuple[float, float]]:
    """Returns seconds of the clock and of the processor."""

    def measure() -> tuple[float, float]:
        wall, cpu = time.perf_counter(), time.process_time()
        work()
        return time.perf_counter() - wall, time.process_time() - cpu

    return measure


class Reference(Dataset):
    """Samples as torchvision's references/segmentation prepare them on Pillow, step by step and in their order.

    One thing differs: the short side is drawn relative to the image's own, so that the sizes are those of our images.
    """

    def __init__(self, pairs: Pairs, crop: Sequence[int], scale: Sequence[float]) -> None:
        self.pairs, self.crop, self.scale = pairs, crop, scale

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Sample:
        image, mask = Image.open(self.pairs[index][0]).convert("RGB"), Image.open(self.pairs[index][1])
        low, high = (int(min(image.size) * factor) for factor in self.scale)
        side = [random.randint(low, high)]
        image = functional.resize(image, side, antialias=True)
        mask = functional.resize(mask, side, InterpolationMode.NEAREST)
        if random.random() < 0.5:
            image, mask = functional.hflip(image), functional.hflip(mask)
        missing = [max(0, want - have) for want, have in zip(self.crop, (image.height, image.width), strict=True)]
        if any(missing):
            border = [0, 0, missing[1], missing[0]]
            image, mask = functional.pad(image, border, fill=0), functional.pad(mask, border, fill=255)
        window = RandomCrop.get_params(image, self.crop)
        image, mask = functional.crop(image, *window), functional.crop(mask, *window)
        return finish(image, mask)


def finish(image: Image.Image, mask: Image.Image) -> Sample:
    """The reference's last steps: normalised float32 (3, h, w), and int64 labels (h, w)."""
    pixels = functional.convert_image_dtype(functional.pil_to_tensor(image), torch.float32)
    return functional.normalize(pixels, IMAGENET_MEAN, IMAGENET_STD), torch.as_tensor(np.array(mask), dtype=torch.int64)


def collate(samples: Sequence[Sample]) -> Sample:
    """One batch, padded with 0 and 255 to the largest sample, as the references do it."""
    height, width = (max(labels.shape[side] for _, labels in samples) for side in (0, 1))
    images, targets = torch.zeros(len(samples), 3, height, width), torch.full((len(samples), height, width), 255)
    for row, (image, labels) in enumerate(samples):
        h, w = labels.shape
        images[row, :, :h, :w].copy_(image)
        targets[row, :h, :w].copy_(labels)
    return images, targets


if __name__ == "__main__":
    main()
