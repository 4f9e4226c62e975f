"""Look before you leap: a config's data, network and memory, in one report."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fcn.cli import BAD_INPUT
from fcn.config import PRETRAINED, Config
from fcn.data.inspection import SplitReport, inspect_split, median_frequency_weights, odd_files, repeated_images
from fcn.data.labels import IGNORE_INDEX
from fcn.data.loaders import Batch, Step, Totals, TrainShares
from fcn.data.samplers import Draw, Share
from fcn.data.transforms import TrainTransform
from fcn.distributed import World
from fcn.engine import accumulation, step_settings, train_step
from fcn.errors import InputError
from fcn.optim import learning_rate, set_learning_rate
from fcn.run import Run, build_run

MB, GB = 2**20, 2**30
GPUS_GB = (16, 24, 40, 80)
HEADROOM = 0.1
"""Part of a GPU's memory that estimates leave free, for fragments and for what the libraries take."""


def check(config: Config, source: str, world: World, headers_only: bool = False) -> int:
    """Print a report of a config's data, network and memory; faults are its last lines, one for each.

    Args:
        source: what the config is called.
        headers_only: read the images' headers, and not their pixels.

    Returns:
        The exit status: 0, or 2 if there are faults. Warnings alone are no fault.

    Raises:
        InputError: no split can be opened.
    """
    names = list(dict.fromkeys(name for name in (config.data.train, config.data.val, config.data.test) if name))
    reports = [inspect_split(config.data, name, config.loss.ignore_index, headers_only) for name in names]
    faults = [fault for report in reports for fault in report.faults] + odd_files(reports) + missing_files(config)
    if not any(report.entries for report in reports):
        raise InputError("\n".join(dict.fromkeys(faults)))
    warnings = [warning for report in reports for warning in report.warnings]
    leaks, copies = repeated_images(reports)
    faults, warnings = faults + leaks, warnings + copies
    print(f"{source}: {config.data.name} in {config.data.root}\n")
    print(split_table(reports))
    warnings += advice(config, reports)
    opened = next((report.dataset for report in reports if report.dataset), None)
    if opened:
        print("\nPixels of each class, and their share of the labelled ones:\n")
        print(histogram(reports, opened.classes.names))
    print()
    train = reports[0]
    if train.sizes:
        try:
            for line in model_report(config, world, train, warnings):
                print(line)
        except InputError as error:
            faults.append(str(error))
    else:
        print(f"The network was not tried: no image of the split '{train.split}' can be read.")
    faults, warnings = list(dict.fromkeys(faults)), list(dict.fromkeys(warnings))
    print()
    for kind, lines in (("warning", warnings), ("fault", faults)):
        for line in lines:
            print(f"{kind}: {' '.join(line.splitlines())}")
    print(f"{_count(len(faults), 'fault')}, {_count(len(warnings), 'warning')}")
    return BAD_INPUT if faults else 0


def missing_files(config: Config) -> list[str]:
    """Files that the run would ask for after it started, and that are not there."""
    weights, resume = config.model.weights, config.resume
    asked = [("model.weights", weights)] if weights and weights not in PRETRAINED else []
    asked += [("resume", resume)] if resume not in ("auto", "never") else []
    return [f"{key}: {path}: no such file; correct the path" for key, path in asked if not Path(path).is_file()]


# --- tables --------------------------------------------------------------------------------------------------------


def table(columns: Sequence[Sequence[str]], width: int = 80) -> str:
    """Columns of texts side by side, the first to the left, the others to the right; what is too wide comes below."""
    first, *others = columns
    parts = [[_aligned(first, str.ljust)]]
    for column in others:
        cells = _aligned(column, str.rjust)
        if len(parts[-1]) > 1 and sum(len(c[0]) + 2 for c in parts[-1]) + len(cells[0]) > width:
            parts.append([parts[0][0]])
        parts[-1].append(cells)
    return "\n\n".join("\n".join("  ".join(row).rstrip() for row in zip(*part, strict=True)) for part in parts)


def _aligned(column: Sequence[str], pad: Callable[[str, int], str]) -> list[str]:
    width = max(map(len, column))
    return [pad(cell, width) for cell in column]


def _count(number: int, what: str) -> str:
    return f"{number or 'no'} {what}{'' if number == 1 else 's'}"


def _share(part: int, whole: int) -> str:
    return f"{part:,} {100 * part / whole if whole else 0:6.2f} %"


def _pixels(size: tuple[int, int]) -> str:
    """(height, width) as people write it."""
    return f"{size[1]}x{size[0]}"


def split_table(reports: Sequence[SplitReport]) -> str:
    """Pairs of each split, those without fault, and the sizes of these as width x height, in order of their area."""
    rows = [("split", "pairs", "sound", "sizes", "smallest", "median", "largest")]
    for report in reports:
        sizes = sorted(report.sizes.values(), key=lambda size: (size[0] * size[1], size))
        extremes = [_pixels(sizes[place]) for place in (0, len(sizes) // 2, -1)] if sizes else ["-"] * 3
        rows.append((report.split, f"{report.entries:,}", f"{len(sizes):,}", f"{len(set(sizes)):,}", *extremes))
    return table(list(zip(*rows, strict=True)))


def histogram(reports: Sequence[SplitReport], names: Sequence[str]) -> str:
    """Pixels of each class, their share of the labelled ones, and weights that the first split suggests."""
    count = len(names)
    columns = [["class", *names, "ignored"]]
    for report in reports:
        labelled, ignored = int(report.pixels[:count].sum()), int(report.pixels[IGNORE_INDEX])
        cells = [_share(int(pixels), labelled) for pixels in report.pixels[:count]]
        columns.append([report.split, *cells, _share(ignored, labelled + ignored)])
    note = "'ignored' is a share of all pixels."
    train = reports[0]
    if train.pixels[:count].any():
        weights = [f"{w:.4g}" for w in median_frequency_weights(train.pixels[:count], train.surroundings[:count])]
        columns.append(["weight", *weights, ""])
        note += (
            f" The weights balance the classes of\n'{train.split}' by median frequency (Eigen, Fergus 2015):\n"
            f"loss.weights=[{','.join(weights)}]"
        )
    return f"{table(columns)}\n\n{note}"


def advice(config: Config, reports: Sequence[SplitReport]) -> Iterator[str]:
    """What a run accepts and its owner may not expect."""
    train, crop = reports[0], config.data.crop
    if config.data.train == config.data.val:
        yield f"data.val: '{config.data.val}' is the training split, so its scores are of images that were seen"
    if train.dataset and train.pixels.any():
        names = train.dataset.classes.names
        absent = [name for name, pixels in zip(names, train.pixels, strict=False) if not pixels]
        if absent:
            yield f"split '{train.split}': no pixel of {', '.join(absent)}; the network cannot learn what it never sees"
        if absent and config.data.name == "folder" and config.data.values is None and train.pixels[IGNORE_INDEX]:
            values = f"{{{', '.join(f'{name}: {place}' for place, name in enumerate(names[:-1]))}, {names[-1]}: 255}}"
            yield f"data.values: 255 is in the masks, and ignored; if it is {names[-1]}, set data.values={values}"
    small = sum(crop is not None and (height < crop[0] or width < crop[1]) for height, width in train.sizes.values())
    if small * 2 > len(train.sizes):
        yield (
            f"data.crop: {_pixels(crop)} (width x height) is higher or wider than {small} of {len(train.sizes)} images "
            f"of '{train.split}', before data.scale; the rest of such a crop is padding"
        )


# --- the network and its memory ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes that a training step takes in one process: a straight line through two measured steps."""

    fixed: float
    """What does not depend on the number of images."""
    per_image: float

    def of(self, images: int) -> float:
        return self.fixed + self.per_image * images

    def images(self, capacity: float) -> int:
        """Most images whose step is likely to fit into a device with so many bytes."""
        return max(0, math.floor(((1 - HEADROOM) * capacity - self.fixed) / max(1.0, self.per_image)))


@contextlib.contextmanager
def saved_for_backward(apart: Iterable[torch.Tensor]) -> Iterator[dict[int, int]]:
    """Collects the storages that autograd keeps for the backward pass of what is computed inside.

    Args:
        apart: tensors whose storages are not meant, such as parameters.

    Returns:
        Bytes of each storage by its address.
    """
    known = {tensor.untyped_storage().data_ptr() for tensor in apart}
    saved: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        yield saved


def states(run: Run) -> dict[str, int]:
    """Bytes of what a run holds between steps, once it has done one."""
    parameters = list(run.model.parameters())
    moments = [value for state in run.optimizer.state.values() for value in state.values()]
    found = {
        "parameters and buffers": [*parameters, *run.model.buffers()],
        "gradients": [parameter.grad for parameter in parameters if parameter.grad is not None],
        "optimizer": [value for value in moments if isinstance(value, torch.Tensor)],
        "average of the weights": list(run.average.model.state_dict().values()) if run.average else [],
    }
    return {name: sum(tensor.nbytes for tensor in tensors) for name, tensors in found.items() if tensors}


class Trial:
    """Training steps of a run on real images: with a crop any of them, without one the largest, padded to the worst.

    Args:
        run: which the steps change.
        train: the report of its training split, with a sound image at least.
    """

    def __init__(self, run: Run, train: SplitReport) -> None:
        data = run.config.data
        scale = data.scale if data.crop or not data.scale else (data.scale[1], data.scale[1])
        transform = TrainTransform(data.crop, scale, data.hflip, data.jitter)
        self.run, self.shares = run, TrainShares(train.dataset, transform, run.config.seed)
        self.indices = sorted(train.sizes, key=lambda index: math.prod(train.sizes[index]), reverse=True)
        # A batch of images of mixed size is as high as the highest and as wide as the widest.
        self.extremes = [max(train.sizes, key=lambda index: train.sizes[index][side]) for side in (0, 1)]
        self.settings = step_settings(run) | {"micro_batch": None, "offload": False}
        self.images = 0

    def batch(self, images: int) -> Batch:
        mine = [Draw(0, self.indices[place % len(self.indices)]) for place in range(images)]
        loaded = self.shares[Share(0, mine, [*mine, *(Draw(0, index) for index in self.extremes)])]
        if isinstance(loaded, InputError):
            raise loaded
        return loaded.batch

    def step(self, images: int) -> float:
        """One real training step; returns its loss."""
        batch = self.batch(images)
        device = self.run.world.device
        on_device = Batch(*(tensor.to(device) for tensor in batch))
        step = Step(on_device, batch.padded, Totals.of(batch.counts), False, 0.0)
        set_learning_rate(self.run.optimizer, learning_rate(0, self.run.steps, self.run.config.optim))
        self.run.model.train()
        loss, _ = train_step(self.run.model, step, **self.settings)
        return float(loss)

    def bytes_of_step(self, images: int) -> int:
        """On a GPU the most memory that a step takes; on the CPU the run's states and what backward needs."""
        device = self.run.world.device
        if device.type == "cuda":
            self.step(images)  # cuDNN tries its algorithms
            torch.cuda.reset_peak_memory_stats(device)
            self.step(images)
            return torch.cuda.max_memory_allocated(device)
        with saved_for_backward([*self.run.model.parameters(), *self.run.model.buffers()]) as saved:
            self.step(images)
        return sum(saved.values()) + sum(states(self.run).values())

    def memory(self) -> Memory:
        """From steps of one and of two images, or of two and three if a BatchNorm cannot do with one."""
        few = 1
        try:
            least = self.bytes_of_step(few)
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            few = 2
            least = self.bytes_of_step(few)
        per_image = self.bytes_of_step(few + 1) - least
        return Memory(least - few * per_image, per_image)


def model_report(config: Config, world: World, train: SplitReport, warnings: list[str]) -> Iterator[str]:
    """Build the network, train it for a few steps, and say what that takes; lines for the report.

    Raises:
        InputError: the network cannot be built, or a step does not fit the device.
    """
    run, notes = build_run(config, world, {config.data.train: train.dataset})
    warnings += [f"{config.model.name}: {note}" for note in notes]
    trial = Trial(run, train)
    size = _pixels(tuple(trial.batch(1).images.shape[1:3]))
    device = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "the CPU"
    try:
        loss = trial.step(2)
        memory = trial.memory()
    except torch.OutOfMemoryError:
        raise InputError(
            f"data.crop: a training step on two images of {size} does not fit {device}; choose a smaller crop, network "
            f"or precision"
        ) from None
    parameters = sum(parameter.numel() for parameter in run.model.parameters())
    if not math.isfinite(loss):
        warnings.append(f"{config.model.name}: the loss of the first step is {loss}")
    yield f"{config.model.name}: {parameters:,} parameters, {config.train.precision}. A step on two images of {size},"
    yield f"from fresh weights, on {device}: loss {loss:.4f}."
    yield ""
    yield table([list(column) for column in zip(*_memory_rows(run, memory, size), strict=True)])
    yield ""
    yield f"A step of train.batch_size={config.train.batch_size} on"
    yield table([list(column) for column in zip(*_process_rows(run, memory), strict=True)])
    yield ""
    yield "Images that are likely to fit, per process and forward pass"
    yield table([list(column) for column in zip(*_gpu_rows(memory, world.device), strict=True)])
    yield ""
    yield from _basis(device)


def _memory_rows(run: Run, memory: Memory, size: str) -> Iterator[tuple[str, str]]:
    held = states(run)
    yield from ((name, _bytes(count)) for name, count in held.items())
    yield "other, whatever the number of images", _bytes(max(0.0, memory.fixed - sum(held.values())))
    yield f"each image of {size}", _bytes(memory.per_image)


def _process_rows(run: Run, memory: Memory) -> Iterator[tuple[str, str, str, str]]:
    train = run.config.train
    yield "processes", "images each", "at a time", "memory each"
    for processes in (1, 2, 4, 8):
        if train.batch_size % processes and not train.uneven:
            yield str(processes), "needs train.uneven=true", "", ""
            continue
        share = math.ceil(train.batch_size / processes)
        micro_batch, offload = accumulation(run.model, train.micro_batch, share)
        at_once = min(share, micro_batch or share)
        note = ", in part of the host" if offload else ""
        yield str(processes), str(share), str(at_once), _bytes(memory.of(at_once)) + note


def _gpu_rows(memory: Memory, device: torch.device) -> Iterator[tuple[str, str]]:
    yield from ((f"GPU of {size} GB", f"{memory.images(size * GB):,}") for size in GPUS_GB)
    if device.type == "cuda":
        size = torch.cuda.get_device_properties(device).total_memory
        yield f"this one, of {size / GB:.0f} GB", f"{memory.images(size):,}"


def _basis(device: str) -> Iterator[str]:
    if device == "the CPU":
        yield "These are estimates, from what the backward pass keeps of one and of two images"
        yield "on the CPU. A GPU also needs room for intermediate results and its libraries, of"
        yield f"which nothing was measured here; {HEADROOM:.0%} of a GPU are left free for them."
    else:
        yield "These are estimates, from the largest memory of a step of one and of two images on"
        yield f"{device}; {HEADROOM:.0%} of a GPU are left free for fragments and libraries."


def _bytes(count: float) -> str:
    return f"{count / GB:,.2f} GB" if count >= GB else f"{count / MB:,.1f} MB"
