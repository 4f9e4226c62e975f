"""The same numbers on any number of processes, measured.

    python -m benchmarks.same_numbers --camvid data/camvid --voc data/VOCdevkit/VOC2012

Prints Markdown: the gradient of one step of every network; whole runs in float64; the same runs in float32 beside a
loop as it is commonly written (`benchmarks/stock_ddp.py`); and confusion matrices. `tests/dist/test_same_numbers.py`
asserts on the same measurements.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn
from torchvision.models.resnet import Bottleneck

from benchmarks.common import hardware
from fcn import distributed
from fcn.checkpoints import load_checkpoint
from fcn.config import Data, Loss, load_config
from fcn.data import Batch, LabelCounts, TrainingBatch, build_dataset
from fcn.data.datasets import PairDataset
from fcn.data.loaders import count_labels
from fcn.data.shapes import write_shapes
from fcn.distributed import DistributedContext
from fcn.evaluation import Evaluator, evaluate_split
from fcn.models import MODELS, Precision, build_model, convert_dropout, convert_sync_batchnorm
from fcn.training import TrainingState, accumulation, build_loss, train_step
from tests.dist.ranks import CHECKOUT, run, run_ranks

GLOBAL_BATCH, SIDES, CLASSES, AUX_WEIGHT = 12, (17, 21), 5, 0.5
NARROW = {
    **{name: {"width": 4, "dropout": 0.0} for name in ("fcn32s", "fcn16s", "fcn8s", "fcn8_kitti")},
    "unet": {"width": 4},
}
NETWORKS: dict[str, tuple[str, dict]] = {
    **{name: (name, NARROW.get(name, {})) for name in MODELS},
    "fcn8s same": ("fcn8s", NARROW["fcn8s"] | {"layout": "same"}),
    "unet without norm": ("unet", {"width": 4, "norm": "none"}),
    "linknet plain": ("linknet", {"encoder": "plain"}),
}


# --- the gradient of one step --------------------------------------------------------------------------------------


def make_batch() -> tuple[torch.Tensor, torch.Tensor]:
    """images (12, H, W, 3) uint8 and labels (12, H, W) uint8: image 0 is ignored entirely, 1 but for one pixel."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (GLOBAL_BATCH, *SIDES, 3), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, CLASSES, (GLOBAL_BATCH, *SIDES), generator=generator, dtype=torch.uint8)
    valid = torch.rand(labels.shape, generator=generator) < torch.linspace(0, 1, GLOBAL_BATCH)[:, None, None]
    valid[1] = False
    valid[1, 3, 4] = True
    return images, torch.where(valid, labels, 255)


def make_step(context: DistributedContext) -> TrainingBatch:
    """A rank's share of that batch."""
    images, labels = make_batch()
    mine = slice(*(place * GLOBAL_BATCH // context.size for place in (context.rank, context.rank + 1)))
    numbers, counts = torch.arange(GLOBAL_BATCH)[mine], count_labels(labels.numpy())
    sizes = torch.tensor([SIDES] * len(numbers)).reshape(-1, 2)
    batch = Batch(images[mine], labels[mine], sizes, numbers, numbers, counts[mine])
    return TrainingBatch(batch, False, LabelCounts.of(counts), False, 0.0)


def make_network(name: str, options: Mapping[str, Any]) -> nn.Module:
    """In float64, without dropout, with heads that let gradients through and residuals that do not amplify rounding."""
    torch.manual_seed(0)
    model = build_model(name, CLASSES, **options).double()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, Bottleneck):
            nn.init.constant_(module.bn3.weight, 0.2)
    for parameter in model.parameters():
        if not parameter.any() and parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.1)
    return model


def step_gradients(
    context: DistributedContext, networks: Sequence[str], micro_batch: int | None, folder: str
) -> dict[str, dict]:
    """Loss, gradients and float buffers after one step of SGD with rate 0, compared on the last rank.

    One process without accumulation comes first: it leaves its result in `folder`, for the others to compare with.

    Returns:
        network → {"one process" or "plain PyTorch": largest relative difference}.
    """
    step = make_step(context)
    precision = Precision("fp64", True, context.device)
    results = {}
    for label in networks:
        model = precision.place(convert_sync_batchnorm(make_network(*NETWORKS[label])))
        keys = convert_dropout(model)
        micro, offload = accumulation(model, micro_batch, len(step.local.images))
        state = TrainingState(
            model=model, network=distributed.data_parallel(model, context, sync_bn=True),
            optimizer=torch.optim.SGD(model.parameters(), lr=0.0, fused=True), criterion=build_loss(Loss(), CLASSES),
            precision=precision, context=context, micro_batch=micro, aux_weight=AUX_WEIGHT, sample_keys=keys,
            offload=offload,
        )  # fmt: skip
        loss = state.step_loss(train_step(state, step).losses)
        if micro_batch and not micro:
            continue  # BatchNorm over the global batch takes the whole share at once
        found = [loss, *_outcome(model)]
        reference = Path(folder) / f"{label}.pt"
        if context.rank < context.size - 1:
            continue
        if reference.exists():
            results[label] = {"one process": largest_difference(found, torch.load(reference, weights_only=True))}
        else:
            torch.save(found, reference)
            results[label] = {"plain PyTorch": largest_difference(found, plain_gradients(label))}
    return results


def plain_gradients(label: str) -> list[torch.Tensor]:
    """The same from a few lines of plain PyTorch, which share nothing with the harness but the network."""
    images, labels = make_batch()
    model = make_network(*NETWORKS[label])
    mean, std = (torch.tensor(x, dtype=torch.float64) for x in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    output = model(((images.double() / 255 - mean) / std).permute(0, 3, 1, 2))
    valid = labels != 255
    losses = []
    for logits in output.values() if isinstance(output, dict) else [output]:
        picked = logits.log_softmax(1).gather(1, labels.long().clamp(max=CLASSES - 1)[:, None])[:, 0]
        losses.append(-picked[valid].mean())
    loss = losses[0] + AUX_WEIGHT * sum(losses[1:])
    loss.backward()
    return [loss.detach(), *_outcome(model)]


def _outcome(model: nn.Module) -> list[torch.Tensor]:
    return [*(p.grad for p in model.parameters()), *(b for b in model.buffers() if b.is_floating_point())]


def largest_difference(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    """Over all tensors, relative to the tensor's largest entry, or to 1/1000 of the largest of all if that is more.

    The floor is for gradients that are zero but for rounding, such as of a bias before BatchNorm.
    """
    largest = [float(tensor.abs().max()) for tensor in expected]
    floor = 1e-3 * max(largest)
    pairs = zip(found, expected, largest, strict=True)
    return _largest([(one - other).abs().max() / max(size, floor) for one, other, size in pairs])


def _largest(values: Sequence[torch.Tensor]) -> float:
    """NaN if any is, which Python's `max` does not promise."""
    return float(torch.stack(list(values)).max())


def gradient_table(worlds: Sequence[int], split: Sequence[int], networks: Sequence[str]) -> dict[str, dict[str, float]]:
    """Network → {what is compared: largest relative difference}; whole shares on `worlds`, accumulation on `split`."""
    with tempfile.TemporaryDirectory() as folder:
        runs = [(1, None), *((size, None) for size in worlds if size > 1), *((size, 2) for size in split)]
        found = {(size, micro): run_ranks(size, step_gradients, networks, micro, folder)[-1] for size, micro in runs}
    table = {}
    for label in networks:
        alone = {
            key: result[label]["one process"] for key, result in found.items() if "one process" in result.get(label, {})
        }
        table[label] = {
            **{f"{size} processes": alone[size, None] for size in worlds},
            "accumulated": max((alone[size, 2] for size in split if (size, 2) in alone), default=None),
            "plain PyTorch": found[1, None][label]["plain PyTorch"],
        }
    return table


# --- whole runs ----------------------------------------------------------------------------------------------------


def run_config(folder: Path, data: Path, precision: str, steps: int, workers: int) -> str:
    """Write the config of a run with everything that could depend on the number of processes; returns its path."""
    config = yaml.safe_load((CHECKOUT / "configs" / "quickstart.yaml").read_text())
    config["run_dir"] = str(folder / "run")
    config["data"] |= {"root": str(data), "crop": [48, 64], "workers": workers, "jitter": [0.3, 0.3, 0.3, 0.1]}
    config["model"]["width"] = 4
    config["train"] |= {"batch_size": 12, "steps": steps, "precision": precision, "log_every": 1}
    config["train"] |= {"grad_clip": 0.5, "ema": 0.9}
    config["optim"] |= {"name": "sgd", "lr": 0.01, "warmup": 5}
    config["eval"] |= {"every": steps, "batch_size": 4, "pictures": 0}
    config["checkpoint"]["every"] = 5
    config["wandb"]["mode"] = "disabled"
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return str(path)


def end_of_run(folder: Path) -> dict[str, list[float]]:
    """The weights, their average, the running statistics and the loss column of a finished run."""
    state = load_checkpoint(folder / "run")
    records = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    tensors = {f"{kind}/{key}": value for kind in ("model", "ema") for key, value in state[kind].items()}
    floats = {key: value.double().flatten().tolist() for key, value in tensors.items() if value.is_floating_point()}
    return floats | {"loss": [record["loss"] for record in records if record["event"] == "train"]}


def spread(
    one: Mapping[str, list[float]], other: Mapping[str, list[float]], euclidean: bool = False
) -> dict[str, float]:
    """Relative difference of the weights, of their average, of the running statistics, and the largest of any loss.

    The largest of any tensor's entries, relative to the tensor's largest; or, `euclidean`, of all as one vector.
    """
    assert one.keys() == other.keys()
    groups: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {"weights": [], "average": [], "statistics": []}
    groups["loss"] = []
    for key in one:
        a, b = (torch.tensor(values[key], dtype=torch.float64) for values in (one, other))
        groups["loss" if key == "loss" else _kind(key)].append((a - b, b))
    result = {}
    for kind, pairs in groups.items():
        if kind == "loss":
            result[kind] = float((pairs[0][0] / pairs[0][1]).abs().max())
        elif euclidean:
            difference, size = (torch.cat(column) for column in zip(*pairs, strict=True))
            result[kind] = float(difference.norm() / size.norm())
        else:
            result[kind] = _largest([d.abs().max() / b.abs().max().clamp_min(1e-12) for d, b in pairs])
    return result


def _kind(key: str) -> str:
    if "running_" in key:
        return "statistics"
    return "average" if key.startswith("ema/") else "weights"


def train(processes: int, data: Path, precision: str, steps: int, workers: int, folder: Path) -> dict[str, list[float]]:
    folder.mkdir(parents=True)
    run(processes, "train_ddp.py", "--config", run_config(folder, data, precision, steps, workers))
    return end_of_run(folder)


def train_stock(processes: int, data: Path, steps: int, folder: Path) -> dict[str, list[float]]:
    folder.mkdir(parents=True)
    output = folder / "end.pt"
    run(processes, "-m", "benchmarks.stock_ddp", str(data), str(output), str(steps), timeout_s=1800)
    return torch.load(output, weights_only=True)


# --- confusion matrices --------------------------------------------------------------------------------------------


def confusion_matrices(
    context: DistributedContext, splits: Mapping[str, tuple[str, str, str, int | None]], batch_sizes: Sequence[int]
) -> dict[str, tuple[list, int]]:
    """Score splits with a fixed network that nobody trained.

    Args:
        splits: label → (data set, root, split, most images or None).

    Returns:
        "label, batch size" → (confusion matrix, images counted).
    """
    results = {}
    torch.set_num_threads(1)
    for label, (name, root, split, limit) in splits.items():
        dataset = build_dataset(Data(name=name, root=root), split)
        if limit:
            dataset = PairDataset(dataset.pairs[:limit], dataset.classes, dataset.format)
        precision = Precision("fp32", True, context.device)
        torch.manual_seed(0)
        model = precision.place(build_model("unet", len(dataset.classes), width=4))
        for batch_size in batch_sizes:
            overrides = [f"eval.batch_size={batch_size}", "data.workers=0"]
            config = load_config(CHECKOUT / "configs" / "quickstart.yaml", overrides)
            found = evaluate_split(Evaluator(model, "split", dataset, config, precision, context))
            matrix, images = found.matrix, found.images
            results[f"{label}, batch {batch_size}"] = matrix.counts.tolist(), images
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--camvid", metavar="ROOT")
    parser.add_argument("--voc", metavar="ROOT")
    parser.add_argument("--steps", type=int, default=100)
    args = parser.parse_args()
    print(f"{hardware()}, gloo, one thread a process\n")
    print_gradients()
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "shapes"
        write_shapes(data, train=50, val=20)
        print_runs(Path(folder), data, args.steps)
    print_matrices(args.camvid, args.voc)


def print_gradients() -> None:
    print(f"Gradient and running statistics of one step, float64, global batch {GLOBAL_BATCH}; against one process:\n")
    for row, (label, entries) in enumerate(gradient_table((2, 3, 4, 5), (1, 2, 3, 4), list(NETWORKS)).items()):
        if row == 0:
            print(f"| network | {' | '.join(entries)} |\n|---|{'---|' * len(entries)}")
        print(f"| {label} | {' | '.join('' if value is None else f'{value:.0e}' for value in entries.values())} |")


def print_runs(folder: Path, data: Path, steps: int) -> None:
    print(f"\nRuns of {steps} steps on `shapes` (U-Net of width 4, crop, flip, jitter, sync-BN, clipping, average), ")
    print("difference from the run on one process, relative: ‖a - b‖ / ‖b‖ of all tensors, the largest of any loss:\n")
    print("| run | processes | weights | average | running statistics | loss of any step |\n|---|---|---|---|---|---|")
    for label, workers in (("float64", 2), ("float64", 0), ("float32", 2), ("float32, stock DDP", 2)):
        alone: Mapping[str, list[float]] = {}
        for processes in (1, 2, 3, 4):
            where = folder / f"{label}-{workers}-{processes}"
            if "stock" in label:
                end = train_stock(processes, data, steps, where)
            else:
                end = train(processes, data, "fp64" if label == "float64" else "fp32", steps, workers, where)
            alone = alone or end
            if processes > 1:
                row = " | ".join(f"{value:.0e}" for value in spread(end, alone, euclidean=True).values())
                print(f"| {label}, {workers} workers | {processes} | {row} |", flush=True)


def print_matrices(camvid: str | None, voc: str | None) -> None:
    splits: dict[str, tuple[str, str, str, int | None]] = {}
    if camvid:
        splits["CamVid test"] = ("camvid", camvid, "test", None)
    if voc:
        splits["VOC val"] = ("voc", voc, "val", None)
        splits["5 images"] = ("voc", voc, "val", 5)
    if not splits:
        return
    worlds, batches = (1, 2, 3, 4, 7), (1, 4, 9)
    found = {size: run_ranks(size, confusion_matrices, splits, batches)[0] for size in worlds}
    print(f"\nConfusion matrices, {' '.join(map(str, worlds))} processes, batches of {' '.join(map(str, batches))}:\n")
    print("| split | images counted | different matrices |\n|---|---|---|")
    for label in splits:
        results = [found[size][f"{label}, batch {batch}"] for size in worlds for batch in batches]
        print(
            f"| {label} | {sorted({images for _, images in results})} | {len({str(matrix) for matrix, _ in results})} |"
        )


if __name__ == "__main__":
    main()
