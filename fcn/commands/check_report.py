"""The report of `python -m fcn check` on a config's data, network and memory."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch

from fcn.commands.runner import say
from fcn.config import PRETRAINED, Config
from fcn.data import (
    IGNORE_INDEX,
    SplitReport,
    inspect_split,
    median_frequency_weights,
    odd_files,
    repeated_images,
)
from fcn.distributed import DistributedContext
from fcn.errors import InputError
from fcn.text import plural, table
from fcn.training import (
    GB,
    HEADROOM,
    MB,
    Memory,
    Run,
    Trial,
    accumulation,
    build_run,
    images_of_processes,
    states,
)

GPUS_GB = (16, 24, 40, 80)


def check_config(config: Config, source: str, context: DistributedContext, *, headers_only: bool = False) -> list[str]:
    """Print a report of a config's data, network and memory; the faults are its last lines, one for each.

    Args:
        source: name of the config file.
        headers_only: read only the headers of images, not their pixels.

    Returns:
        The faults, without warnings.

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
    say(f"{source}: {config.data.name} in {config.data.root}\n")
    say(split_table(reports))
    warnings += advice(config, reports)
    opened = next((report.dataset for report in reports if report.dataset), None)
    if opened:
        say("\nPixels of each class, and their share of the labelled ones:\n")
        say(histogram(reports, opened.classes.names))
    print()
    train = reports[0]
    if train.sizes:
        try:
            for line in model_report(config, context, train, warnings):
                say(line)
        except InputError as error:
            faults.append(str(error))
    else:
        say(f"The network was not tried: no image of the split '{train.split}' can be read.")
    faults, warnings = list(dict.fromkeys(faults)), list(dict.fromkeys(warnings))
    print()
    for kind, lines in (("warning", warnings), ("fault", faults)):
        for line in lines:
            say(f"{kind}: {' '.join(line.splitlines())}")
    say(f"{plural(len(faults), 'fault')}, {plural(len(warnings), 'warning')}")
    return faults


def missing_files(config: Config) -> list[str]:
    """Files that the run would need after its start and that do not exist."""
    weights, resume = config.model.weights, config.resume
    asked = [("model.weights", weights)] if weights and weights not in PRETRAINED else []
    asked += [("resume", resume)] if resume not in ("auto", "never") else []
    return [f"{key}: {path}: no such file; correct the path" for key, path in asked if not Path(path).is_file()]


# --- tables --------------------------------------------------------------------------------------------------------


def _table(rows: Iterable[Sequence[str]]) -> str:
    return table(list(rows), right=True, width=80)


def _share(part: int, whole: int) -> str:
    return f"{part:,} {100 * part / whole if whole else 0:6.2f} %"


def _pixels(size: tuple[int, int]) -> str:
    """(height, width) as WIDTHxHEIGHT."""
    return f"{size[1]}x{size[0]}"


def split_table(reports: Sequence[SplitReport]) -> str:
    """For each split its pairs, those without a fault, and the sizes of these by area, as width x height."""
    rows = [("split", "pairs", "sound", "sizes", "smallest", "median", "largest")]
    for report in reports:
        sizes = sorted(report.sizes.values(), key=lambda size: (size[0] * size[1], size))
        extremes = [_pixels(sizes[place]) for place in (0, len(sizes) // 2, -1)] if sizes else ["-"] * 3
        rows.append((report.split, f"{report.entries:,}", f"{len(sizes):,}", f"{len(set(sizes)):,}", *extremes))
    return table(rows, right=True, width=80)


def histogram(reports: Sequence[SplitReport], names: Sequence[str]) -> str:
    """Pixels of each class, their share of the labelled pixels, and class weights from the first split."""
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
    return f"{_table(zip(*columns, strict=True))}\n\n{note}"


def advice(config: Config, reports: Sequence[SplitReport]) -> Iterator[str]:
    """Warnings about what a run accepts but its owner may not expect."""
    train, crop = reports[0], config.data.crop
    ambiguous = [source for report in reports for source in report.ambiguous]
    if ambiguous:
        yield (
            f"{ambiguous[0]}: its EXIF orientation is not its mask's ({plural(len(ambiguous), 'such image')}); each "
            f"file is turned by its own; if masks were drawn on the pixels as stored, set data.exif_orientation=false"
        )
    if config.data.train == config.data.val:
        yield f"data.val: '{config.data.val}' is the training split, so its scores are of images that were seen"
    if train.dataset and train.pixels.any():
        names = train.dataset.classes.names
        wanted = [place for place in range(len(names)) if place != config.loss.ignore_index]
        absent = [names[place] for place in wanted if not train.pixels[place]]
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


def model_report(config: Config, context: DistributedContext, train: SplitReport, warnings: list[str]) -> Iterator[str]:
    """Build the network, train it for a few steps, and say what that takes; lines for the report.

    Raises:
        InputError: the network cannot be built, or a step does not fit the device.
    """
    run, examined = build_run(config, context, {config.data.train: train.dataset})
    warnings += [f"{config.model.name}: {line}" for line in (*examined.warnings, *examined.notes)]
    trial = Trial(run, train)
    size = _pixels(tuple(trial.batch(1).images.shape[1:3]))
    device = torch.cuda.get_device_name(context.device) if context.device.type == "cuda" else "the CPU"
    try:
        loss = trial.step(2)
        memory = trial.memory()
    except torch.OutOfMemoryError:
        raise InputError(
            f"data.crop: a training step on two images of {size} does not fit {device}; choose a smaller crop, network "
            f"or precision"
        ) from None
    parameters = sum(parameter.numel() for parameter in run.state.model.parameters())
    if not math.isfinite(loss):
        warnings.append(f"{config.model.name}: the loss of the first step is {loss}")
    yield f"{config.model.name}: {parameters:,} parameters, {config.train.precision}. A step on two images of {size},"
    yield f"from fresh weights, on {device}: loss {loss:.4f}."
    yield ""
    yield _table(_memory_rows(run, memory, size))
    yield ""
    yield f"A step of train.batch_size={config.train.batch_size} on"
    yield _table(_process_rows(run, memory))
    yield ""
    yield "Images that are likely to fit, per process and forward pass"
    yield _table(_gpu_rows(memory, context.device))
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
        if train.shards and processes > train.shards:
            yield str(processes), f"needs train.shards={processes} or more", "", ""
            continue
        if train.batch_size % processes and not (train.uneven or train.shards):
            yield str(processes), "needs train.uneven=true", "", ""
            continue
        share = max(images_of_processes(train, processes))
        micro_batch, offload = accumulation(run.state.model, train.micro_batch, share)
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
