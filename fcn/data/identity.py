"""What a split of a data set is: enough to tell whether two processes, or two starts of a run, train on the same."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

from fcn.data.cache import CachedDataset
from fcn.data.datasets import OwnDataset, PairDataset, SegmentationDataset


def split_identity(dataset: SegmentationDataset, root: str | Path) -> dict[str, str]:
    """What would make a split another one: title → value or digest.

    For files that is their names below `root` in the order of the list, and their sizes; their content is not read, and
    their times differ between copies. For a user's own data set it is the attribute `fingerprint`, if there is one.
    """
    if isinstance(dataset, CachedDataset):
        dataset = dataset.dataset
    found = {"number of images": str(len(dataset)), "class names": ", ".join(dataset.classes.names)}
    if isinstance(dataset, PairDataset):
        images, masks = ([pair[side] for pair in dataset.pairs] for side in (0, 1))
        found["names or order of the images"] = _digest(os.path.relpath(path, root) for path in images)
        found["names or order of the masks"] = _digest(os.path.relpath(path, root) for path in masks)
        found["sizes of the image files"] = _digest(map(_size, images))
        found["sizes of the mask files"] = _digest(map(_size, masks))
        found["meaning of the masks' values"] = _digest([repr(dataset.format)])
    elif isinstance(dataset, OwnDataset):
        found["fingerprint"] = str(getattr(dataset.samples, "fingerprint", ""))
    return found


def _size(path: Path) -> str:
    try:
        return str(path.stat().st_size)
    except OSError:
        return "missing"  # reading it raises the error


def _digest(texts: Iterable[str]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for text in texts:
        digest.update(text.encode(errors="surrogateescape") + b"\0")
    return digest.hexdigest()
