"""How much of a batch of whole images is padding, in random order and with windows of steps that exchange images.

    python -m benchmarks.padding --voc VOC2012

Sizes are those of the images in VOC2012, train and val, and for epochs as long as VOC's own, sizes drawn from them with
replacement. No image is decoded.
"""

from __future__ import annotations

import argparse
import itertools
import random
from collections.abc import Sequence

from benchmarks.common import publish, table
from fcn.config import Data
from fcn.data import GlobalBatchSampler, RankBatches, TrainTransform, build_dataset

EPOCHS = {"train": 1464, "trainaug": 10582}
"""Images of VOC's training splits."""
BATCHES, SCALES, WINDOWS = (8, 16, 32), (None, (0.5, 2.0)), (1, 8, 16, 32, 64)


class Sizes(list):
    """What a data set says of its images without reading them."""

    size = list.__getitem__


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--voc", metavar="ROOT", required=True, help="folder VOC2012, whole or in part")
    parser.add_argument("--dry-run", action="store_true", help="print, and leave RESULTS.md as it is")
    args = parser.parse_args()
    splits = [build_dataset(Data(name="voc", root=args.voc), split) for split in ("train", "val")]
    real = [split.size(index) for split in splits for index in range(len(split))]
    rng = random.Random(0)
    epochs = {"these": real} | {name: [rng.choice(real) for _ in range(n)] for name, n in EPOCHS.items()}
    rows = []
    for (name, sizes), scale, batch_size in itertools.product(epochs.items(), SCALES, BATCHES):
        shares = [f"{padded_share(sizes, scale, batch_size, window):.1%}" for window in WINDOWS]
        rows.append([f"{name}, {len(sizes)}", f"{scale[0]}–{scale[1]}" if scale else "null", str(batch_size), *shares])
    windows = [f"`data.group: {window}`" for window in WINDOWS]
    text = "Padded share of all pixels, over an epoch or at least a thousand images:\n\n"
    text += table(["images of an epoch", "`data.scale`", "batch", *windows], rows)
    if args.dry_run:
        print(text)
    else:
        publish("padding of whole images", "python -m benchmarks.padding --voc VOC2012", text)


def padded_share(
    sizes: Sequence[tuple[int, int]], scale: tuple[float, float] | None, batch_size: int, window: int
) -> float:
    """Over an epoch, and at least one thousand images."""
    batches = RankBatches(Sizes(sizes), TrainTransform(None, scale, hflip=0.0), seed=0)
    steps = -(-max(len(sizes), 1000) // batch_size)
    sampler = GlobalBatchSampler(
        sizes,
        batch_size=batch_size,
        steps=steps,
        start_step=0,
        seed=0,
        rank=0,
        world_size=1,
        window=window,
        shape=batches.shape,
    )
    held = used = 0
    for batch in sampler:
        shapes = [batches.shape(sample) for sample in batch.global_batch]
        held += batch_size * max(height for height, _ in shapes) * max(width for _, width in shapes)
        used += sum(height * width for height, width in shapes)
    return 1 - used / held


if __name__ == "__main__":
    main()
