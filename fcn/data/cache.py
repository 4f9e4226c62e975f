"""A split's decoded pixels, kept on disk or in memory, so that no file is decoded twice. See `fcn.data.cache_files`."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import shutil
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from PIL import Image, features

from fcn.config import Config
from fcn.data.cache_files import CacheFiles, create, memory_room, remove, remove_if_unused, reserve, sample_offsets
from fcn.data.datasets import OwnDataset, PairDataset, SegmentationDataset
from fcn.data.labels import Classes
from fcn.data.masks import MaskFormat
from fcn.errors import InputError

VERSION = 2
"""Version of the cache's files and of `PairDataset.read`; raise it when you change either."""
MEMORY = Path("/dev/shm")
DAY = 86400.0


def with_cache(dataset: SegmentationDataset, config: Config) -> SegmentationDataset:
    """Put the cache that `data.cache` asks for in front of the training split.

    Raises:
        InputError: it does not fit into memory, or a user's own data set does not say when it changes.
    """
    if config.data.cache is None:
        return dataset
    in_memory = config.data.cache == "memory"
    folder = cache_folder(config)
    name = f"{re.sub(r'[^0-9A-Za-z]+', '-', config.data.train)}-{fingerprint(dataset)}"
    cached = CachedDataset(dataset, folder / name, run=str(Path(config.run_dir).absolute()), in_memory=in_memory)
    try:
        cached.open()
    except InputError:
        cached.close()
        raise
    return cached


def cache_folder(config: Config) -> Path:
    """The folder of a run's caches; see `data.cache_dir`.

    Raises:
        InputError: there is no file system in memory.
    """
    data = config.data
    if data.cache == "disk":
        return Path(data.cache_dir) if data.cache_dir else Path(config.run_dir).absolute().parent / ".cache"
    if not data.cache_dir and not MEMORY.is_dir():
        raise InputError(
            f"data.cache: found memory, but no {MEMORY} here; set data.cache_dir to a file system in memory, or "
            f"data.cache=disk"
        )
    # Each user has a folder, because only the owner of a cache can write to it or remove it.
    return Path(data.cache_dir or MEMORY) / f"fcn-cache-{os.getuid()}"


def fingerprint(dataset: SegmentationDataset) -> str:
    """16 hex digits that change whenever what `dataset.read` returns may change, so that a changed data set gets a new
    cache.

    For files they depend on paths, sizes and times, the meaning of masks, and the decoding libraries.

    Raises:
        InputError: a user's own data set has no `fingerprint`.
    """
    digest = hashlib.blake2b(f"{VERSION} {PIL.__version__} {features.version('jpg')}".encode(), digest_size=8)
    if isinstance(dataset, PairDataset):
        digest.update(f"{dataset.format!r} {dataset.exif}".encode())
        for pair in dataset.pairs:
            for path in pair:
                digest.update(f"\n{path.absolute()} {_state(path)}".encode(errors="surrogateescape"))
        return digest.hexdigest()
    own = getattr(dataset.samples, "fingerprint", None) if isinstance(dataset, OwnDataset) else None
    if not isinstance(own, str) or not own:
        path = dataset.path if isinstance(dataset, OwnDataset) else type(dataset).__name__
        raise InputError(
            f"data.cache: {path} has no attribute `fingerprint`, a text that changes whenever its samples do; add it, "
            f"or set data.cache=null"
        )
    digest.update(f"{dataset.format!r} {dataset.exif} {dataset.path} {len(dataset)} {own}".encode())
    return digest.hexdigest()


def _state(path: Path) -> str:
    try:
        found = path.stat()
    except OSError:
        return "missing"  # reading it raises the error
    return f"{found.st_size} {found.st_mtime_ns}"


class CachedDataset:
    """A data set that reads each sample from its files once, and then from the cache.

    It returns what the data set returns, bit for bit, and raises what it raises; samples that cannot be read are not
    cached. If the cache cannot be used or written, it reads the files and warns once per run and node.

    Args:
        dataset: the data set to cache.
        path: folder of the cache, named by `fingerprint`.
        run: identifies the run for that warning.
        in_memory: whether the folder is in memory that must be freed; see `finished`.
    """

    def __init__(self, dataset: SegmentationDataset, path: Path, *, run: str = "", in_memory: bool = False) -> None:
        self.dataset, self.path, self.in_memory = dataset, Path(path), in_memory
        self.problem: str | None = None
        """Why the cache could not be used when it was opened."""
        self._run = zlib.crc32(run.encode(errors="surrogateescape"))
        self._sizes = np.zeros((0, 2), np.int64)
        self._offsets = np.zeros(0, np.int64)
        self._files: CacheFiles | None = None
        self._usable = self._writing = True
        self._opened = 0.0

    # --- the data set ---

    @property
    def classes(self) -> Classes:
        return self.dataset.classes

    @property
    def format(self) -> MaskFormat:
        return self.dataset.format

    def __len__(self) -> int:
        return len(self.dataset)

    def name(self, index: int) -> str:
        return self.dataset.name(index)

    def size(self, index: int) -> tuple[int, int]:
        """From the index, without reading a header."""
        known = self._sizes[index] if len(self._sizes) else (0, 0)
        return (int(known[0]), int(known[1])) if known[0] else self.dataset.size(index)

    def read(self, index: int) -> tuple[Image.Image, Image.Image]:
        image, labels = self.read_arrays(index)
        return Image.fromarray(image), Image.fromarray(labels)

    def read_arrays(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Image (H, W, 3) and labels (H, W) as read-only views of the cache, which load only the pages that are used.

        Raises:
            InputError: as the data set's `read`.
        """
        files = self._attached()
        place = self._place(index) if files else None
        if files and place and files.holds(index, place):
            return self._views(files, index)
        image, labels = (np.asarray(part) for part in self.dataset.read(index))
        if files and place and self._writing and labels.shape == self.size(index):
            self._store(files, index, place, image, labels)
        return image, labels

    def _place(self, index: int) -> slice | None:
        """The bytes of a sample in `pixels`; None if its size is unknown because its header is broken."""
        height, width = self._sizes[index].tolist()
        start = int(self._offsets[index])
        return slice(start, start + 4 * height * width) if height else None

    def _views(self, files: CacheFiles, index: int) -> tuple[np.ndarray, np.ndarray]:
        height, width = self._sizes[index].tolist()
        start, pixels = int(self._offsets[index]), height * width
        image = files.pixels[start : start + 3 * pixels].reshape(height, width, 3)
        return image, files.pixels[start + 3 * pixels : start + 4 * pixels].reshape(height, width)

    def _store(self, files: CacheFiles, index: int, place: slice, image: np.ndarray, labels: np.ndarray) -> None:
        try:
            files.write(index, place, np.concatenate([image.ravel(), labels.ravel()]))
        except OSError as error:  # most likely a full disk
            self._writing = False
            if files.is_first_to_complain(self._run, self._opened):
                print(f"warning: {self._unwritable(error)}", file=sys.stderr, flush=True)

    def _unwritable(self, error: OSError) -> str:
        return (
            f"data.cache: {self.path}: cannot be written ({error.strerror or error}); images that are not in it are "
            f"read from their files; free space there, or set data.cache=null"
        )

    # --- its files ---

    def __getstate__(self) -> dict[str, Any]:
        """For a worker, which opens the files itself and removes nothing."""
        return self.__dict__ | {"_files": None, "in_memory": False}

    def open(self) -> None:
        """Create the cache or open the existing one; `problem` says what prevents it.

        Raises:
            InputError: there is not enough memory for it.
        """
        self._opened = time.time()
        try:
            self._make_folder()
            self._files = self._open_or_create()
            if self.in_memory:
                self._check_room(self._files)
            if not self._files.writable:
                self._writing = False
                if self.images < len(self):
                    self.problem = self._unwritable(PermissionError(errno.EACCES, os.strerror(errno.EACCES)))
        except OSError as error:
            self._usable, self.problem = False, self._unwritable(error)

    def _make_folder(self) -> None:
        folder = self.path.parent
        folder.mkdir(mode=0o700 if self.in_memory else 0o777, parents=True, exist_ok=True)
        if self.in_memory and folder.lstat().st_uid != os.getuid():  # anyone may create folders in /dev/shm
            raise PermissionError(errno.EPERM, "the folder is another user's")
        for leftover in folder.glob(".*"):  # from a process that was killed while it created or removed a cache
            with contextlib.suppress(OSError):
                if time.time() - leftover.stat().st_mtime > DAY:
                    shutil.rmtree(leftover)
        if self.in_memory:
            self._remove_unused(DAY)

    def _open_or_create(self) -> CacheFiles:
        for _ in range(100):
            try:
                files = CacheFiles(self.path, len(self), lock=self.in_memory)
            except FileNotFoundError:
                create(self.path, [self._size_or_none(index) for index in range(len(self))])
            except BlockingIOError:  # another process is removing it
                time.sleep(0.02)
            except ValueError:  # cut off by a power failure, for example
                remove(self.path)
            else:
                self._sizes = files.sizes
                self._offsets = sample_offsets(files.sizes)[0]
                return files
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))

    def _size_or_none(self, index: int) -> tuple[int, int]:
        try:
            return self.dataset.size(index)
        except InputError:  # reading the sample raises it again
            return 0, 0

    def _attached(self) -> CacheFiles | None:
        """This process's handle of the files; None if there is no cache."""
        if self._files is None and self._usable:
            try:
                self._files = CacheFiles(self.path, len(self))
                self._usable = bool(np.array_equal(self._files.sizes, self._sizes))
                self._writing = self._writing and self._files.writable
            except (OSError, ValueError):  # it was removed: only time is lost
                self._usable = False
        return self._files if self._usable else None

    def _check_room(self, files: CacheFiles) -> None:
        needed = files.missing_bytes + reserve(os.fstatvfs(files.pixels_file))
        found, where = memory_room(self.path.parent)
        if needed > found:  # remove the caches of runs that were killed
            self._remove_unused(0)
            found, where = memory_room(self.path.parent)
        if needed > found:
            self.finished()
            raise InputError(
                f"data.cache: memory: found {_amount(found)} {where}, and the split needs {_amount(needed)}; set "
                f"data.cache=disk or null, or make room there"
            )

    def _remove_unused(self, age: float) -> None:
        """Remove this user's caches in memory that no run has open and that were not used for `age` seconds."""
        for other in self.path.parent.glob("[!.]*"):
            with contextlib.suppress(OSError):
                if other != self.path and time.time() - (other / "index").stat().st_mtime > age:
                    remove_if_unused(other)

    @property
    def images(self) -> int:
        """Number of samples in the cache."""
        return self._files.records_set if self._files else 0

    def describe(self) -> str:
        """Where the cache is and what it contains, in one line."""
        if not self._usable:
            return "data.cache: not used"
        size = _amount(sample_offsets(self._sizes)[1])
        return f"data.cache: {self.path}, {size} when full; {self.images} of {len(self)} images are in it"

    def close(self) -> None:
        """Read the data set's files from now on."""
        self._usable = False
        if self._files:
            self._files.close()
            self._files = None

    def finished(self) -> None:
        """The run is finished: free the memory unless another run uses it. A cache on disk stays."""
        self.close()
        if self.in_memory:
            remove_if_unused(self.path)


def _amount(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"
