"""Predict image files and write files: palette PNGs of class indices, overlays, and panels with labels."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from fcn import distributed
from fcn.data import (
    LAYOUTS,
    EvalSampler,
    MaskFormat,
    batch_loader,
    check_sizes,
    classes_and_format,
    decode,
    index_format,
    open_image,
    read_pixels,
    size_of,
    walk_images,
)
from fcn.distributed import DistributedContext
from fcn.errors import InputError
from fcn.evaluation.inference import TTA, Trained, predict
from fcn.tracking import Sample, plots


class Files(NamedTuple):
    """An image and the files written for it."""

    image: Path
    classes: Path
    """8-bit palette PNG of class indices, of the size of the image as it is read."""
    overlay: Path | None = None
    label: Path | None = None
    """The image's mask, for `panel`."""
    panel: Path | None = None

    @property
    def results(self) -> list[Path]:
        return [path for path in (self.classes, self.overlay, self.panel) if path]


# --- which files ---------------------------------------------------------------------------------------------------


def plan_files(
    inputs: Sequence[str], output: Path, *, overlays: bool, labels: str | None, mask_suffix: str, force: bool
) -> list[Files]:
    """Find images in files and folders, decide what to write for each, and make sure that it can be written.

    Args:
        inputs: images, and folders that are searched recursively, except hidden files and folders, and `output`.
        labels: a folder of masks with the relative paths and names of their images.
        mask_suffix: what follows the image's name in a mask's name, before its type.
        force: overwrite existing results.

    Raises:
        InputError: an input or the folder of masks is missing or contains no images, two images would be written to the
            same file, a result exists or is itself an input, or `output` is not writable.
    """
    images = {}
    for given in map(Path, inputs):
        for image, name in _images(given, output):
            images[os.path.realpath(image), name] = image
    names = {name for _, name in images}
    if mask_suffix:  # masks may be in their images' folders
        images = {
            key: path
            for key, path in images.items()
            if not (key[1].endswith(mask_suffix) and key[1].removesuffix(mask_suffix) in names)
        }
    found = {}
    if labels is not None:
        if not Path(labels).is_dir():
            raise InputError(f"--labels {labels}: no such folder; accepted: a folder of masks under the images' names")
        found = {name: path for path, name in _images(Path(labels), output)}
    files = []
    for (_, name), image in images.items():
        overlay, panel = (output / folder / f"{name}.png" for folder in ("overlays", "panels"))
        label = found.get(f"{name}{mask_suffix}")
        files.append(Files(image, output / f"{name}.png", overlay if overlays else None, label, label and panel))
    if found and not any(file.label for file in files):
        (_, name), _ = next(iter(images.items()))
        raise InputError(
            f"--labels {labels}: found no mask of these images; accepted: names such as {name}{mask_suffix}.png"
        )
    _check_results(files, force)
    try:
        for folder in {path.parent for file in files for path in file.results}:
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"--output {output}: cannot be made ({error}); choose a folder that you may write to"
        ) from None
    return files


def _images(given: Path, output: Path) -> Iterator[tuple[Path, str]]:
    """(file, its path relative to `given` without suffix) of an image, or of a folder's images sorted by name."""
    if given.is_file():
        yield given, given.stem
        return
    if not given.is_dir():
        hint = f"; settings go behind --set: --set {given}" if "=" in str(given) else ""
        raise InputError(f"{given}: no such file or folder; give images, or folders of images{hint}")
    results = os.path.realpath(output)
    if os.path.realpath(given) == results:
        raise InputError(f"--output {output}: is an input folder itself; choose another folder")
    images = list(walk_images(given, [results]))
    if not images:
        raise InputError(f"{given}: found no images; give images, or folders of images")
    yield from ((image, str(image.relative_to(given).with_suffix(""))) for image in sorted(images))


def _check_results(files: Sequence[Files], force: bool) -> None:
    inputs = {os.path.realpath(path) for file in files for path in (file.image, file.label) if path}
    sources: dict[Path, Path] = {}
    for file in files:
        for path in file.results:
            other = sources.setdefault(path, file.image)
            if other != file.image:
                raise InputError(
                    f"{file.image}: its result would be {path}, and so would that of {other}; rename one, or predict "
                    f"them into different folders"
                )
            if os.path.realpath(path) in inputs:
                raise InputError(f"{path}: is an input, and would be overwritten; choose another --output")
    there = [path for path in sources if path.exists()]
    if there and not force:
        more = f" (and {len(there) - 1} more results)" if len(there) > 1 else ""
        raise InputError(f"{there[0]}: exists{more}; choose another --output, or overwrite with --force")


# --- read, predict, write ------------------------------------------------------------------------------------------


class Loaded(NamedTuple):
    """Images of one size."""

    places: list[int]
    """Their positions in the list of files."""
    images: torch.Tensor
    """(N, H, W, 3) uint8."""


class ImageBatches(Dataset):
    """Loads images: `batches[places]` is (a `Loaded` for each size, a line for each image that cannot be read)."""

    def __init__(self, paths: Sequence[Path], exif: bool) -> None:
        self.paths, self.exif = paths, exif

    def __getitem__(self, places: Sequence[int]) -> tuple[list[Loaded], list[str]]:
        read: list[tuple[int, np.ndarray]] = []
        faults = []
        for place in places:
            try:
                read.append((place, read_pixels(self.paths[place], self.exif)))
            except InputError as error:
                faults.append(str(error))
        loaded = []
        # They have equal sizes by their headers, which may be wrong.
        read.sort(key=lambda pair: pair[1].shape)
        for _, group in groupby(read, lambda pair: pair[1].shape):
            indices, images = zip(*group, strict=True)
            loaded.append(Loaded(list(indices), torch.from_numpy(np.stack(images))))
        return loaded, faults


@torch.inference_mode()
def predict_files(trained: Trained, files: Sequence[Files], context: DistributedContext) -> tuple[int, list[str]]:
    """Predict images and write the results. The ranks share the images; all must pass the same list.

    Returns:
        (images predicted, a line for each file that cannot be read and for the first one that cannot be written), over
        all ranks.
    """
    config, faults, predicted = trained.config, [], 0
    exif = config.data.exif_orientation
    sizes = distributed.all_gather_object([_size(file.image, exif) for file in files] if context.rank == 0 else [])[0]
    readable = [file for file, size in zip(files, sizes, strict=True) if not isinstance(size, str)]
    if context.rank == 0:
        faults += [size for size in sizes if isinstance(size, str)]
    sizes = [size for size in sizes if not isinstance(size, str)]
    sampler = EvalSampler(sizes, batch_size=config.eval.batch_size, rank=context.rank, world_size=context.size)
    batches = ImageBatches([file.image for file in readable], exif)
    workers = config.data.workers if len(sampler) > config.data.workers else 0
    try:
        with _progress(sum(map(len, sampler)), context) as progress:
            for item in batch_loader(batches, sampler, workers, context.device):
                if isinstance(item, InputError):
                    raise item
                loaded, broken = item
                faults += broken
                for places, images in loaded:
                    faults += _predict_batch(trained, [readable[place] for place in places], images)
                    predicted += len(places)
                    progress.update(len(places))
                progress.update(len(broken))
    except InputError as error:  # nothing can be written, or workers died
        faults.append(str(error))
    counts, lines = zip(*distributed.all_gather_object((predicted, faults)), strict=True)
    return sum(counts), sorted(line for part in lines for line in part)


def _predict_batch(trained: Trained, files: Sequence[Files], images: torch.Tensor) -> list[str]:
    """Predict images of one size and write the results; returns a line for each mask that cannot be read."""
    precision, faults = trained.precision, []
    size = (images.shape[1], images.shape[2])
    found = predict(trained.model, images.to(precision.device), size, precision, TTA.of(trained.config.eval))
    for file, pixels, classes in zip(files, images.numpy(), found.to(torch.uint8).cpu().numpy(), strict=True):
        _save(plots.palette_image(classes, trained.classes), file.classes)
        if file.overlay:
            _save(plots.overlay(Image.fromarray(pixels), classes, trained.classes), file.overlay)
        if file.label and file.panel:
            try:
                labels = _read_labels(file, size, trained)
            except InputError as error:
                faults.append(str(error))
                continue
            row = Sample(pixels, labels, classes, file.image.name)
            _save(plots.panels([row], trained.classes), file.panel)
    return faults


def _size(path: Path, exif: bool) -> tuple[int, int] | str:
    """(height, width) from an image's header, or what is wrong with the file."""
    try:
        with open_image(path) as image:
            return size_of(image, exif)[::-1]
    except InputError as error:
        return str(error)


def _read_labels(file: Files, size: tuple[int, int], trained: Trained) -> np.ndarray:
    """The labels of an image, in the mask format of the training data set."""
    exif = trained.config.data.exif_orientation
    mask = decode(file.label, exif)
    check_sizes(file.image, size[::-1], file.label, mask.size, exif)
    return _mask_format(trained).decode(mask, file.label)


def _mask_format(trained: Trained) -> MaskFormat:
    data = trained.config.data
    known = classes_and_format(data)[1] if data.name in LAYOUTS else index_format(trained.classes)
    return known.ignoring(trained.config.loss.ignore_index, len(trained.classes))


def _save(picture: Image.Image, path: Path) -> None:
    """Write a PNG atomically."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        picture.save(temporary, "PNG", compress_level=1)  # a third of the time for photographs
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise InputError(f"{path}: cannot be written ({error}); make room there, or choose another --output") from None


def _progress(images: int, context: DistributedContext) -> Any:
    """Rank 0's progress through its images: a bar on a terminal, elsewhere a line every ten seconds."""
    from tqdm import tqdm  # nothing else needs it

    live = sys.stderr.isatty()
    return tqdm(
        total=images,
        desc=f"process 1 of {context.size}" if context.size > 1 else "predict",
        unit=" images",
        disable=context.rank != 0,
        file=sys.stderr if live else _Lines(sys.stderr),
        mininterval=0.1 if live else 10,
    )


class _Lines:
    """A stream on which tqdm writes new lines instead of rewriting one."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> None:
        if text.strip():
            self.stream.write(f"{text.strip()}\n")

    def flush(self) -> None:
        self.stream.flush()
