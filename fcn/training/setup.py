"""Prepare a run for its next step: data, console, checkpoint or fresh weights, trackers."""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import statistics
import sys
from pathlib import Path
from typing import Any

from fcn import checkpoints, distributed
from fcn.config import Config, flatten, save_config, to_dict
from fcn.data import (
    PREFETCHED,
    CachedDataset,
    SegmentationDataset,
    build_dataset,
    require_shared_memory,
    split_identity,
    with_cache,
)
from fcn.errors import InputError
from fcn.files import must_be_writable, replacing
from fcn.tracking import (
    Console,
    MetricsFile,
    Trackers,
    WandbStart,
    WandbTracker,
    environment_of,
    event,
    read_records,
    read_summary,
    rewind_metrics,
    versions,
    wandb_is_installed,
)
from fcn.training.run import Run, images_of_processes

MAY_DIFFER = ("data.root", "data.workers", "data.cache", "data.cache_dir")
"""Keys that may differ between the processes of a run."""


def require_equal_programs(config: Config) -> None:
    """Compare over all ranks what decides what they compute: config, versions, this package's source.

    Raises:
        InputError: on every rank, if processes were started with different ones.
    """
    keys = {key: value for key, value in flatten(to_dict(config)).items() if key not in MAY_DIFFER}
    distributed.require_equal(keys, "start every process with the same config and overrides")
    found = {name: version for name, version in versions().items() if name != "system"}
    distributed.require_equal(found, "install the same packages on every machine")
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package)}\0".encode() + path.read_bytes())
    source = {"the source of fcn (SHA-256)": digest.hexdigest()[:12]}
    distributed.require_equal(source, "use the same checkout on every machine")


def require_equal_data(run: Run) -> None:
    """Compare the splits over the machines, by one process of each.

    Raises:
        InputError: on every rank, if machines see different files.
    """
    facts = None
    if run.context.local_rank == 0:
        root = run.config.data.root
        splits = {
            name: split_identity(split, root) for name, split in run.splits.items() if split is not run.train_split
        }
        splits[run.config.data.train] = run.data
        facts = {
            f"{title} of the split {name}": value for name, found in splits.items() for title, value in found.items()
        }
    distributed.require_equal(facts, "give every machine the same files under data.root")


def open_splits(config: Config) -> dict[str, SegmentationDataset]:
    """The data sets of the run by the names of their splits."""
    names = [config.data.train, config.data.val, config.data.test]
    splits = {name: build_dataset(config.data, name, config.loss.ignore_index) for name in names if name}
    splits[config.data.train] = with_cache(splits[config.data.train], config)
    return splits


def open_console(run: Run) -> Console:
    """Create the run directory; rank 0 writes to the terminal and log.txt, the others are silent."""
    if run.context.rank != 0:
        return Console.silent()
    with must_be_writable(f"run_dir: {run.folder}"):
        run.folder.mkdir(parents=True, exist_ok=True)
        return Console(log_file=run.folder / "log.txt")


def require_room_for_batches(run: Run) -> None:
    """Compare what the loader's workers put into shared memory with what is free there; every rank calls it.

    Raises:
        InputError: on every rank, if it is not enough on any machine.
    """
    config, context = run.config, run.context
    data, evaluation = config.data, config.eval
    in_flight = data.workers * PREFETCHED
    train_pixels = math.prod(data.crop) if data.crop else _typical_pixels(run.train_split, data.scale or (1, 1))
    train_images = in_flight * images_of_processes(config.train, context.size)[context.rank]
    validation = run.splits[data.val]
    eval_pixels = _typical_pixels(validation, (1, 1))
    if evaluation.preset == "center_crop":
        eval_pixels = min(eval_pixels, math.prod(evaluation.crop or data.crop or (eval_pixels, 1)))
    eval_images = min(in_flight * evaluation.batch_size, math.ceil(len(validation) / context.size))
    pixels = train_images * train_pixels + eval_images * eval_pixels
    require_shared_memory(data.workers, 4 * pixels)  # bytes of image and mask


def _typical_pixels(split: SegmentationDataset, scale: tuple[float, float]) -> float:
    """The median of a few images, spread over a split, at a mean scale."""
    sizes = []
    for index in range(0, len(split), max(1, len(split) // 16)):
        with contextlib.suppress(InputError):  # a broken file is a fault when it is read
            sizes.append(math.prod(split.size(index)))
    return statistics.median(sizes or [0]) * (sum(scale) / 2) ** 2


def start_or_resume(run: Run, console: Console) -> None:
    """Rank 0 picks a checkpoint and all ranks load it. Without one the run starts, perhaps from pretrained weights."""
    path = distributed.all_gather_object(distributed.run_on_all_ranks(lambda: _pick_checkpoint(run, console)))[0]
    if path:
        state = _read_on_all_ranks(path, run.context.rank)
        changes = distributed.run_on_all_ranks(lambda: run.load_state_dict(state, Path(path)))
        console.line(f"resuming at step {run.step}/{run.steps} from {path}")
        for change in changes:
            console.line(f"changed since that checkpoint: {change}")
        console.record(event("resume", step=run.step, checkpoint=path, changes=changes))
    elif run.config.model.weights:
        _load_pretrained(run, console)
    distributed.run_on_all_ranks(lambda: _write_config(run))


def _read_on_all_ranks(path: str, rank: int) -> dict[str, Any]:
    """A checkpoint; ranks that do not see rank 0's file get its content from there."""
    if all(distributed.all_gather_object(Path(path).is_file())):
        return distributed.run_on_all_ranks(lambda: checkpoints.load_checkpoint(path))
    state = distributed.run_on_all_ranks(lambda: checkpoints.load_checkpoint(path) if rank == 0 else None)
    return distributed.broadcast_object(state)


def _pick_checkpoint(run: Run, console: Console) -> str | None:
    if run.context.rank != 0:
        return None
    if run.config.resume == "never":
        if (run.folder / "config.yaml").exists():
            raise InputError(
                f"{run.folder}: resume=never, but a run is there; choose another run_dir or delete this one"
            )
        return None

    def on_broken(path: Path, problem: str) -> None:
        with must_be_writable(f"run_dir: {run.folder}"):
            name = checkpoints.quarantine(path).name if problem.endswith(checkpoints.ALTERED) else path.name
        console.warning(f"{path}: broken checkpoint ({problem}), left as {name}; trying the one before it")

    newest = checkpoints.find_newest(run.checkpoints, on_broken)
    if newest is None and run.config.resume != "auto":
        return run.config.resume
    return str(newest) if newest else None


def _write_config(run: Run) -> None:
    """Write config.yaml; the old file survives if the new one does not fit the disk."""
    if run.context.rank == 0:
        with must_be_writable(f"run_dir: {run.folder}"), replacing(run.folder / "config.yaml") as file:
            save_config(run.config, Path(file.name))


def _load_pretrained(run: Run, console: Console) -> None:
    """Rank 0 reads, and if necessary downloads, pretrained weights for all."""
    config, model, classes = run.config.model, run.state.model, len(run.train_split.classes)
    lines = distributed.run_on_all_ranks(
        lambda: (
            checkpoints.load_pretrained(model, config.name, config.weights, classes) if run.context.rank == 0 else []
        )
    )
    distributed.broadcast(model.state_dict().values())
    for line in lines:
        console.line(line)


def is_finished(run: Run) -> bool:
    """Whether the run has nothing left to do; every rank gets the same answer."""
    finished = run.step >= run.steps and read_summary(run.folder).get("status") == "finished"
    return distributed.all_gather_object(finished)[0]


def open_trackers(run: Run, console: Console) -> Trackers:
    """The trackers of rank 0; the other ranks record nothing."""
    trackers = Trackers(console.warning)
    if run.context.rank == 0:
        path, wandb = run.folder / "metrics.jsonl", run.config.wandb
        with must_be_writable(f"run_dir: {run.folder}"):
            rewind_metrics(path, run.step, run.config.data.test)
        trackers.add(lambda: console)
        trackers.add(lambda: MetricsFile(path, console.warning))
        console.attach(trackers.log)
        if wandb.mode != "disabled" and wandb_is_installed(wandb.mode):
            start = WandbStart(
                **to_dict(wandb),
                run_dir=run.folder,
                run_id=run.tracker_id,
                config=to_dict(run.config),
                environment=environment_of(run.context),
                records=read_records(path),
                program=sys.argv[0],
                trainer=os.getpid(),
            )
            trackers.add(lambda: WandbTracker(start, console.line, console.warning))
    return trackers


def describe_cache(run: Run, console: Console) -> None:
    """Show where this node's cache is, and warn of problems on any node."""
    if isinstance(run.train_split, CachedDataset):
        console.line(run.train_split.describe())
        for problem in dict.fromkeys(filter(None, distributed.all_gather_object(run.train_split.problem))):
            console.warning(problem)


def release_cache(run: Run) -> None:
    """Free the memory of a finished run's cache."""
    if isinstance(run.train_split, CachedDataset):
        run.train_split.finished()
