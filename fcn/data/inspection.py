"""Inspect the files of a split: faults by file, sizes of images, pixels of each class."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import re
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from fcn.config import Data
from fcn.data.datasets import (
    PairDataset,
    SegmentationDataset,
    build_dataset,
    check_num_classes,
    check_sizes,
    list_split,
)
from fcn.data.images import ON_ITS_SIDE, decode, open_image, orientation, read_pixels, size_of
from fcn.data.labels import IGNORE_INDEX
from fcn.data.layouts import LAYOUTS, missing_files
from fcn.data.workers import item_loader
from fcn.errors import InputError

Size = tuple[int, int]


@dataclass(slots=True)
class Sample:
    """The findings for one image and its mask."""

    source: str
    """The name of the image in messages: its file, or its index in a user's own data set."""
    faults: list[str] = field(default_factory=list)
    """Faults that stop a run or spoil it unnoticed, one line each."""
    warnings: list[str] = field(default_factory=list)
    size: Size | None = None
    """(height, width) as a run sees it; None if unreadable."""
    counts: np.ndarray | None = None
    """(256,) int64: pixels of each label, 255 = ignore; None if the mask is unreadable."""
    digest: bytes | None = None
    """Hash of the image's content; None if only its header was read."""
    ambiguous: bool = False
    """Image and mask are turned differently by EXIF, and their equal sizes do not tell whether that is right."""

    @contextlib.contextmanager
    def noting(self, prefix: str = "") -> Iterator[None]:
        """Turn an InputError into a fault."""
        try:
            yield
        except InputError as error:
            self.faults.append(f"{prefix}{error}")


class Inspector(Dataset):
    """Reads sample after sample of a split, in worker processes: `inspector[index]` is a Sample.

    Args:
        dataset: whose files are all there.
        split: its name.
        headers_only: believe an image's header, as long as the end of its file is there; masks are always decoded.
    """

    def __init__(self, dataset: SegmentationDataset, split: str, headers_only: bool) -> None:
        self.dataset, self.split, self.headers_only = dataset, split, headers_only

    def __getitem__(self, index: int) -> Sample:
        files = isinstance(self.dataset, PairDataset)
        sample = self._files(*self.dataset.pairs[index]) if files else self._own(index)
        if sample.counts is not None and not sample.counts[:IGNORE_INDEX].any():
            source = self.dataset.pairs[index][1] if files else sample.source
            sample.faults.append(
                f"{source}: all its pixels are ignored, so there is nothing to learn or to score; label it or remove it"
            )
        return sample

    def _files(self, image_path: Path, mask_path: Path) -> Sample:
        sample, exif = Sample(str(image_path)), self.dataset.exif
        image_size = mask = None
        with sample.noting():
            image_size = self._image(image_path, sample)
            sample.size = image_size[::-1]
        with sample.noting():
            mask = decode(mask_path, exif)
            self._hidden(mask_path, sample)
            sample.counts = _histogram(self.dataset.format.decode(mask, mask_path))
        if image_size and mask:
            with sample.noting():
                check_sizes(image_path, image_size, mask_path, mask.size, exif)
                sample.ambiguous = exif and _turn_differently(image_path, mask_path)
        return sample

    def _image(self, path: Path, sample: Sample) -> Size:
        """(width, height)."""
        with open_image(path) as image:
            if self.headers_only and _has_its_end(path, image.format):
                return size_of(image, self.dataset.exif)
        height, width = read_pixels(path, self.dataset.exif).shape[:2]
        self._hidden(path, sample)
        if not self.headers_only:
            sample.digest = hashlib.blake2b(path.read_bytes()).digest()
        return width, height

    def _hidden(self, path: Path, sample: Sample) -> None:
        complaint = hidden_damage(path)
        if complaint:
            harmless = re.search(r"\b\d{1,2} extraneous bytes before marker 0xd9", complaint)
            (sample.warnings if harmless else sample.faults).append(
                f"{path}: opens, but is damaged ({complaint}); copy it again or remove it from the split"
            )

    def _own(self, index: int) -> Sample:
        sample = Sample(f"split '{self.split}': sample {index} of {self.dataset.path}")
        with sample.noting(f"split '{self.split}': "):
            image, labels = self.dataset.read(index)
            sample.size = (image.height, image.width)
            sample.digest = hashlib.blake2b(image.tobytes()).digest()
            sample.counts = _histogram(np.asarray(labels))
        return sample


def _histogram(labels: np.ndarray) -> np.ndarray:
    return np.bincount(labels.ravel(), minlength=256)


def _turn_differently(image_path: Path, mask_path: Path) -> bool:
    """Whether EXIF turns an image and its mask differently, but neither or both between upright and lying."""
    with open_image(image_path) as image, open_image(mask_path) as mask:
        one, other = orientation(image), orientation(mask)
        square = image.width == image.height
        return one != other and (square or (one in ON_ITS_SIDE) == (other in ON_ITS_SIDE))


def _has_its_end(path: Path, image_format: str | None) -> bool:
    """Whether the end marker of a JPEG or PNG is near the end of the file; False for other types, which have none.

    A JPEG's cannot occur within its pixels. What cameras append after it may hide it.
    """
    mark = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND"}.get(image_format or "")
    if not mark:
        return False
    with path.open("rb") as file:
        file.seek(-min(1024, path.stat().st_size), os.SEEK_END)
        return mark in file.read()


def hidden_damage(path: Path) -> str | None:
    """What is wrong with a file that Pillow decodes without an error, or None.

    Pillow drops libjpeg's warnings, and a JPEG that is damaged in the middle decodes to other pixels; torchvision lets
    libjpeg print the first of them. A PNG's pixels can change without harm to the decoder, but not its checksums.
    """
    with open_image(path) as image:
        if image.format == "PNG":
            try:
                image.verify()
            except Exception as error:  # SyntaxError, OSError, struct.error: whatever the damage leads to
                return str(error)
        if image.format not in ("JPEG", "MPO"):  # MPO: several JPEGs, as phones write them
            return None
    from torchvision.io import decode_jpeg  # only `check` needs it

    with _printed_by_c() as printed, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torchvision 0.29 says that a later one has no decoders
        try:
            decode_jpeg(torch.from_numpy(np.fromfile(path, np.uint8)))
        except RuntimeError as error:  # also for some rare kinds of JPEG that Pillow reads
            printed.append(f"{error}\n")
    complaint = re.search(r"(Corrupt JPEG data|Premature end|Image is incomplete).*", "".join(printed))
    return complaint.group().strip() if complaint else None


@contextlib.contextmanager
def _printed_by_c() -> Iterator[list[str]]:
    """Collect in a list what C code writes to stderr inside."""
    printed: list[str] = []
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield printed
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            file.seek(0)
            printed.append(file.read().decode(errors="replace"))


# --- a whole split -------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class SplitReport:
    """The findings for a split."""

    split: str
    entries: int = 0
    """Pairs that the split names, whether they exist or not."""
    dataset: SegmentationDataset | None = None
    """The pairs whose files exist, each once; None if there are none."""
    sizes: dict[int, Size] = field(default_factory=dict)
    """Index → (height, width) of the samples of `dataset` without faults."""
    pixels: np.ndarray = field(default_factory=lambda: np.zeros(256, np.int64))
    """(256,) int64: pixels of each label in all readable masks, 255 = ignore."""
    surroundings: np.ndarray = field(default_factory=lambda: np.zeros(256, np.int64))
    """(256,) int64: for each label, the labelled pixels of any class in the images in which it occurs."""
    digests: dict[str, bytes | None] = field(default_factory=dict)
    """Name in messages → hash of the image's content, for readable images."""
    oddities: dict[str, str] = field(default_factory=dict)
    """File → what is wrong with it in its folder, which may be the folder of all splits."""
    ambiguous: list[str] = field(default_factory=list)
    """Names in messages of the images that are turned by EXIF unlike their masks; see `Sample`."""
    incomplete: set[str] = field(default_factory=set)
    """Files of pairs of which one is missing."""
    faults: list[str] = field(default_factory=list)
    """One line each, with the file."""
    warnings: list[str] = field(default_factory=list)

    def add(self, index: int, sample: Sample) -> None:
        self.faults += sample.faults
        self.warnings += sample.warnings
        if sample.size:
            self.digests[sample.source] = sample.digest
        if sample.counts is not None:
            self.pixels += sample.counts
            self.surroundings += (sample.counts > 0) * sample.counts[:IGNORE_INDEX].sum()
        if sample.ambiguous:
            self.ambiguous.append(sample.source)
        if sample.size and not sample.faults:
            self.sizes[index] = sample.size


def inspect_split(data: Data, split: str, ignore_index: int = IGNORE_INDEX, headers_only: bool = False) -> SplitReport:
    """Read every image and mask of a split in parallel, with a progress bar on a terminal. The report contains the
    faults.

    Args:
        ignore_index: one more label value to ignore.
        headers_only: see `Inspector`.
    """
    report = SplitReport(split)
    try:
        dataset = report.dataset = _open(data, split, ignore_index, report)
    except InputError as error:
        report.faults.append(str(error))
        return report
    if dataset is None:
        return report
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # A worker takes longer to start than a few images to read.
    workers = min(data.workers or cores, cores, len(dataset) // 64)
    samples = item_loader(Inspector(dataset, split, headers_only), len(dataset), workers)
    progress = tqdm(samples, desc=f"reading {split}", total=len(dataset), unit=" images", leave=False, disable=None)
    for index, sample in enumerate(progress):
        if isinstance(sample, InputError):  # workers died
            raise sample
        report.add(index, sample)
    return report


def _open(data: Data, split: str, ignore_index: int, report: SplitReport) -> SegmentationDataset | None:
    """The pairs of a split whose files exist; the report gets what is wrong with the others."""
    pairs = None
    if data.name in LAYOUTS:
        listing = list_split(data, split)
        report.entries = len(listing.pairs)
        report.oddities = {oddity.partition(": ")[0]: oddity for oddity in listing.oddities}
        pairs = _present(listing.pairs, split, report)
        if listing.pairs and not pairs:
            return None
    dataset = build_dataset(dataclasses.replace(data, num_classes=None), split, ignore_index, pairs)
    report.entries = report.entries or len(dataset)
    try:
        check_num_classes(data, dataset.classes)
    except InputError as error:
        report.faults.append(str(error))
    return dataset


def _present(pairs: Sequence[tuple[Path, Path]], split: str, report: SplitReport) -> list[tuple[Path, Path]]:
    missing = set(missing_files(pairs))
    present = []
    for pair in dict.fromkeys(pairs):
        gone = [path for path in pair if path in missing]
        if gone:
            report.incomplete |= set(map(str, pair))
            what = f"no such file, nor its mask {gone[1].name}" if len(gone) == 2 else "no such file"
            report.faults.append(f"{gone[0]}: {what}, but the split '{split}' needs it; add it, or take the image out")
        else:
            present.append(pair)
    report.faults += [
        f"{image}: found {count} times in the split '{split}'; accepted: once; remove an entry"
        for image, count in Counter(image for image, _ in pairs).items()
        if count > 1
    ]
    return present


# --- what splits have in common ------------------------------------------------------------------------------------


def odd_files(reports: Sequence[SplitReport]) -> list[str]:
    """The oddities of all splits, one line each, without files whose pair is already a fault."""
    known = set().union(*(report.incomplete for report in reports))
    oddities = {file: oddity for report in reports for file, oddity in report.oddities.items()}
    return [oddity for file, oddity in oddities.items() if file not in known]


def repeated_images(reports: Iterable[SplitReport]) -> tuple[list[str], list[str]]:
    """(faults: images in more than one split, by file or content; warnings: equal images in a split), one line each."""
    splits: dict[str, list[str]] = {}
    twins: dict[bytes, list[str]] = {}
    for report in reports:
        for source, digest in report.digests.items():
            splits.setdefault(source, []).append(report.split)
            if digest:
                twins.setdefault(digest, []).append(source)
    faults = [
        f"{source}: is in the splits {' and '.join(map(repr, names))}; accepted: one; remove it from the other lists"
        for source, names in splits.items()
        if len(names) > 1
    ]
    warnings = []
    for sources in twins.values():
        first, *others = dict.fromkeys(sources)
        for other in others:
            home, away = splits[first][0], splits[other][0]
            leak = home != away
            (faults if leak else warnings).append(
                f"{other}: has the same content as {first}"
                + (f", so the splits '{home}' and '{away}' share an image" if leak else "")
                + "; remove one of them"
            )
    return faults, warnings


def median_frequency_weights(pixels: np.ndarray, surroundings: np.ndarray) -> np.ndarray:
    """Weights of the classes by median-frequency balancing (Eigen and Fergus 2015; as SegNet uses it), (C,) float64.

    The frequency of a class is its share of the labelled pixels of those images in which it occurs; its weight is the
    median of the classes' frequencies, divided by its own. A class that never occurs gets 1.

    Args:
        pixels: (C,) pixels of each class.
        surroundings: (C,) labelled pixels, of any class, of the images in which each class occurs.
    """
    weights = np.ones(len(pixels))
    occurs = pixels > 0
    frequency = pixels[occurs] / surroundings[occurs]
    weights[occurs] = np.median(frequency) / frequency if occurs.any() else 1
    return weights
