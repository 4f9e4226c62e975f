"""A split's decoded pixels, kept on a disk or in memory: after the first epoch no file is decoded again.

A cache is a folder with two files. `pixels` holds image and labels of one sample after the other, as uint8, each sample
at a page of its own; it is as long as all of them from the start, and takes room as it is filled. `index` holds the
sizes, and for each sample a record: 0, or the checksum of its pixels, which is written after them. Whoever needs a
sample first decodes it and writes it. Workers, ranks and jobs may all do that at once, and be killed while they do:
all write the same bytes, and nobody holds a lock.

Pixels are read through a memory mapping, whose pages all processes of a node share, so a crop touches the pages of the
crop alone. Each process compares a sample's checksum the first time: a record can outlive its pixels, where a machine
lost power before they were on the disk, or where machines share a disk and one still has an old page. Nothing is ever
written through the mapping: on a full file system that kills the process, where a write gives an error.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import mmap
import os
import re
import shutil
import struct
import sys
import time
import uuid
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from PIL import Image, features

from fcn.config import Config
from fcn.data.datasets import OwnDataset, PairDataset, SegmentationDataset
from fcn.data.labels import Classes
from fcn.data.masks import MaskFormat
from fcn.errors import InputError

VERSION = 1
"""Of the files, and of what `PairDataset.read` makes of given ones: whoever changes either raises it."""
PAGE = 4096
HEADER = struct.Struct("<8sQQ")
"""Magic, number of samples, checksum of the sizes; then, at COMPLAINT, who last said that there is no room."""
MAGIC = b"fcncache"
COMPLAINT, COMPLAINT_AT, SIZES_AT = struct.Struct("<Qd"), 32, 64
MEMORY = Path("/dev/shm")
DAY = 86400.0
MOST_RESERVED = 1 << 30
NO_PLACE = (errno.EEXIST, errno.ENOTEMPTY)
NO_RIGHT = (errno.EACCES, errno.EPERM, errno.EROFS)


def with_cache(dataset: SegmentationDataset, config: Config) -> SegmentationDataset:
    """The training split behind the cache that `data.cache` asks for; itself if it asks for none.

    Raises:
        InputError: it does not fit into memory, or a data set of the user's own does not say when it changes.
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
    """Where the caches of a run lie; see `data.cache_dir`.

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
    # A folder of each user's own, for only its owner can write to a cache, or remove it.
    return Path(data.cache_dir or MEMORY) / f"fcn-cache-{os.getuid()}"


def fingerprint(dataset: SegmentationDataset) -> str:
    """16 hex digits that change with whatever `dataset.read` returns: a changed data set has another cache.

    Of files: their paths, sizes and times, what masks mean, and the libraries that decode.

    Raises:
        InputError: a data set of the user's own has no `fingerprint`.
    """
    digest = hashlib.blake2b(f"{VERSION} {PIL.__version__} {features.version('jpg')}".encode(), digest_size=8)
    if isinstance(dataset, PairDataset):
        digest.update(repr(dataset.format).encode())
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
    digest.update(f"{dataset.format!r} {dataset.path} {len(dataset)} {own}".encode())
    return digest.hexdigest()


def _state(path: Path) -> str:
    try:
        found = path.stat()
    except OSError:
        return "missing"  # who reads it says so
    return f"{found.st_size} {found.st_mtime_ns}"


class CachedDataset:
    """A data set that reads each sample from its files once, and then from the cache.

    It reads what the data set reads, bit for bit, and raises what it raises; what cannot be read is not cached. If the
    cache cannot be used, or not be written any more, it reads the files, and says so once in a run and node.

    Args:
        dataset: what is cached.
        path: folder of the cache, named by `fingerprint`.
        run: names the run, for that warning.
        in_memory: whether the folder is in memory, which is given back; see `finished`.
    """

    def __init__(self, dataset: SegmentationDataset, path: Path, *, run: str = "", in_memory: bool = False) -> None:
        self.dataset, self.path, self.in_memory = dataset, Path(path), in_memory
        self.problem: str | None = None
        """Why the cache was of no use when it was opened."""
        self._run = zlib.crc32(run.encode(errors="surrogateescape"))
        self._sizes = np.zeros((0, 2), np.int64)
        self._offsets = np.zeros(0, np.int64)
        self._files: _Files | None = None
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
        """From the index: no header is read again."""
        known = self._sizes[index] if len(self._sizes) else (0, 0)
        return (int(known[0]), int(known[1])) if known[0] else self.dataset.size(index)

    def read(self, index: int) -> tuple[Image.Image, Image.Image]:
        image, labels = self.read_arrays(index)
        return Image.fromarray(image), Image.fromarray(labels)

    def read_arrays(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Image (H, W, 3) and labels (H, W), read-only views of the cache: only what is taken from them is touched.

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
        """Bytes of a sample in `pixels`; None if its size is unknown, because its header is broken."""
        height, width = self._sizes[index].tolist()
        start = int(self._offsets[index])
        return slice(start, start + 4 * height * width) if height else None

    def _views(self, files: _Files, index: int) -> tuple[np.ndarray, np.ndarray]:
        height, width = self._sizes[index].tolist()
        start, pixels = int(self._offsets[index]), height * width
        image = files.pixels[start : start + 3 * pixels].reshape(height, width, 3)
        return image, files.pixels[start + 3 * pixels : start + 4 * pixels].reshape(height, width)

    def _store(self, files: _Files, index: int, place: slice, image: np.ndarray, labels: np.ndarray) -> None:
        try:
            files.write(index, place, np.concatenate([image.ravel(), labels.ravel()]))
        except OSError as error:  # a full disk, most likely; whoever has room goes on
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
        """For a worker, which opens the files by itself and removes nothing."""
        return self.__dict__ | {"_files": None, "in_memory": False}

    def open(self) -> None:
        """Make the cache, or open the one that is there. What hinders it is left in `problem`.

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
        if self.in_memory and folder.lstat().st_uid != os.getuid():  # anyone may make folders in /dev/shm
            raise PermissionError(errno.EPERM, "the folder is another user's")
        for leftover in folder.glob(".*"):  # of a process that was killed while it made or removed a cache
            with contextlib.suppress(OSError):
                if time.time() - leftover.stat().st_mtime > DAY:
                    shutil.rmtree(leftover)
        if self.in_memory:
            self._remove_unused(DAY)

    def _open_or_create(self) -> _Files:
        for _ in range(100):
            try:
                files = _Files(self.path, len(self), lock=self.in_memory)
            except FileNotFoundError:
                create(self.path, [self._size_or_none(index) for index in range(len(self))])
            except BlockingIOError:  # another process is removing it
                time.sleep(0.02)
            except ValueError:  # it lost its end with the power, say
                _remove(self.path)
            else:
                self._sizes = files.sizes
                self._offsets = _offsets(files.sizes)[0]
                return files
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))

    def _size_or_none(self, index: int) -> tuple[int, int]:
        try:
            return self.dataset.size(index)
        except InputError:  # whoever reads it hears of it
            return 0, 0

    def _attached(self) -> _Files | None:
        """The files of this process; None if there is no cache."""
        if self._files is None and self._usable:
            try:
                self._files = _Files(self.path, len(self))
                self._usable = bool(np.array_equal(self._files.sizes, self._sizes))
                self._writing = self._writing and self._files.writable
            except (OSError, ValueError):  # somebody removed it: nothing is lost but time
                self._usable = False
        return self._files if self._usable else None

    def _check_room(self, files: _Files) -> None:
        needed = files.missing_bytes + _reserve(os.fstatvfs(files.pixels_file))
        found, where = memory_room(self.path.parent)
        if needed > found:  # caches of runs that were killed
            self._remove_unused(0)
            found, where = memory_room(self.path.parent)
        if needed > found:
            self.finished()
            raise InputError(
                f"data.cache: memory: found {_amount(found)} {where}, and the split needs {_amount(needed)}; set "
                f"data.cache=disk or null, or make room there"
            )

    def _remove_unused(self, age: float) -> None:
        """Caches of this user in memory that no run has open, and none has opened or filled for so many seconds."""
        for other in self.path.parent.glob("[!.]*"):
            with contextlib.suppress(OSError):
                if other != self.path and time.time() - (other / "index").stat().st_mtime > age:
                    _remove_if_unused(other)

    @property
    def images(self) -> int:
        """How many samples are in the cache."""
        return self._files.records_set if self._files else 0

    def describe(self) -> str:
        """One line on where the cache is and what is in it."""
        if not self._usable:
            return "data.cache: not used"
        size = _amount(_offsets(self._sizes)[1])
        return f"data.cache: {self.path}, {size} when full; {self.images} of {len(self)} images are in it"

    def close(self) -> None:
        """From now on the files of the data set are read."""
        self._usable = False
        if self._files:
            self._files.close()
            self._files = None

    def finished(self) -> None:
        """The run is over: give the memory back, unless another run uses it. What is on a disk stays."""
        self.close()
        if self.in_memory:
            _remove_if_unused(self.path)


class _Files:
    """The two files of a cache as one process has them open.

    Args:
        path: folder of the cache.
        count: samples that it must have.
        lock: hold it as being in use, for as long as this process lives.

    Raises:
        FileNotFoundError: there is none.
        BlockingIOError: it is being removed.
        ValueError: it is damaged.
        OSError: it cannot be opened.
    """

    def __init__(self, path: Path, count: int, lock: bool = False) -> None:
        self.index_file = self.pixels_file = -1
        try:
            self._open(path, count, lock)
        except BaseException:
            self.close()
            raise

    def _open(self, path: Path, count: int, lock: bool) -> None:
        self.writable = True
        try:
            self.index_file = os.open(path / "index", os.O_RDWR)
            self.pixels_file = os.open(path / "pixels", os.O_RDWR)
        except OSError as error:
            if error.errno not in NO_RIGHT:
                raise
            self.close()
            self.writable = False
            self.index_file = os.open(path / "index", os.O_RDONLY)
            self.pixels_file = os.open(path / "pixels", os.O_RDONLY)
        if lock:
            fcntl.flock(self.index_file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # the kernel releases it when a process dies
            if not _is_at(self.index_file, path / "index"):
                raise BlockingIOError(errno.EAGAIN, "was removed meanwhile")
            os.utime(self.index_file)
        self._records_at = SIZES_AT + 8 * count
        start = os.pread(self.index_file, self._records_at, 0)
        if len(start) < self._records_at or os.fstat(self.index_file).st_size != self._records_at + 8 * count:
            raise ValueError("a part of the index is missing")
        sizes = start[SIZES_AT:]
        if HEADER.unpack_from(start) != (MAGIC, count, zlib.crc32(sizes)):
            raise ValueError("the index is broken")
        self.count = count
        self.sizes = np.frombuffer(sizes, "<i4").reshape(count, 2).astype(np.int64)
        self.total = _offsets(self.sizes)[1]
        if os.fstat(self.pixels_file).st_size != self.total:  # behind its end no page could be read
            raise ValueError("a part of the pixels is missing")
        mapping = mmap.mmap(self.pixels_file, self.total, access=mmap.ACCESS_READ)
        self.pixels = np.frombuffer(mapping, np.uint8)
        self._checked = np.zeros(count, bool)

    def holds(self, index: int, place: slice) -> bool:
        """Whether a sample is there, with the checksum that was written after it."""
        if self._checked[index]:
            return True
        record = os.pread(self.index_file, 8, self._records_at + 8 * index)
        self._checked[index] = record != bytes(8) and record == _record(self.pixels[place])
        return bool(self._checked[index])

    def write(self, index: int, place: slice, pixels: np.ndarray) -> None:
        """A sample, and then its record.

        Raises:
            OSError: ENOSPC before the last room is taken: a run needs some for checkpoints, or in /dev/shm for batches.
        """
        disk = os.fstatvfs(self.pixels_file)
        if disk.f_bavail * disk.f_frsize < pixels.nbytes + _reserve(disk):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        _write_all(self.pixels_file, memoryview(pixels), place.start)
        _write_all(self.index_file, memoryview(_record(pixels)), self._records_at + 8 * index)

    @property
    def records_set(self) -> int:
        records = os.pread(self.index_file, 8 * self.count, self._records_at)
        return int(np.count_nonzero(np.frombuffer(records, "<u8")))

    @property
    def missing_bytes(self) -> int:
        """What the file will take beside what it takes."""
        return max(0, self.total - 512 * os.fstat(self.pixels_file).st_blocks)

    def is_first_to_complain(self, run: int, since: float) -> bool:
        """Whether no other process of the run has asked this, on this node, since the run began."""
        try:
            fcntl.lockf(self.index_file, fcntl.LOCK_EX | fcntl.LOCK_NB, COMPLAINT.size, COMPLAINT_AT)
        except BlockingIOError:
            return False  # it is saying so now
        except OSError:
            pass  # a network's disk without locks
        try:
            who, when = COMPLAINT.unpack(os.pread(self.index_file, COMPLAINT.size, COMPLAINT_AT))
            if who == run and when >= since:
                return False
            os.pwrite(self.index_file, COMPLAINT.pack(run, time.time()), COMPLAINT_AT)
        except OSError:
            pass  # better said twice than not at all
        finally:
            with contextlib.suppress(OSError):
                fcntl.lockf(self.index_file, fcntl.LOCK_UN, COMPLAINT.size, COMPLAINT_AT)
        return True

    def close(self) -> None:
        """The mapping lives as long as an array looks into it."""
        for file in (self.index_file, self.pixels_file):
            if file >= 0:
                os.close(file)
        self.index_file = self.pixels_file = -1

    def __del__(self) -> None:
        self.close()


def create(path: Path, sizes: list[tuple[int, int]]) -> None:
    """An empty cache, whole or not at all; one that another process made meanwhile stays.

    Args:
        path: its folder, in a folder that is there.
        sizes: (height, width) of each sample, (0, 0) for those that are not to be cached.
    """
    table = np.array(sizes, "<i4").tobytes()
    header = HEADER.pack(MAGIC, len(sizes), zlib.crc32(table)).ljust(SIZES_AT, b"\0")
    with _hidden(path) as temporary:
        temporary.mkdir()
        with (temporary / "index").open("wb") as index, (temporary / "pixels").open("wb") as pixels:
            index.write(header + table + bytes(8 * len(sizes)))
            pixels.truncate(_offsets(np.array(sizes, np.int64))[1])
            for file in (index, pixels):
                file.flush()
                os.fsync(file.fileno())
        try:
            temporary.rename(path)
        except OSError as error:
            if error.errno not in NO_PLACE:
                raise


def _remove(path: Path) -> None:
    """Whoever has it open can go on reading."""
    with _hidden(path) as away, contextlib.suppress(FileNotFoundError):
        path.rename(away)


def _remove_if_unused(path: Path) -> None:
    """Remove a cache in memory that no process holds as being in use."""
    with contextlib.suppress(OSError):
        file = os.open(path / "index", os.O_RDONLY)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(file, path / "index"):
                _remove(path)
        finally:
            os.close(file)


@contextlib.contextmanager
def _hidden(path: Path) -> Iterator[Path]:
    """A name beside `path` for what is not there yet or no more; nothing is left under it."""
    name = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        yield name
    finally:
        shutil.rmtree(name, ignore_errors=True)


def _is_at(file: int, path: Path) -> bool:
    """Whether an open file is the one that has this name now."""
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except OSError:
        return False


def _offsets(sizes: np.ndarray) -> tuple[np.ndarray, int]:
    """(where each sample begins, bytes of all): every sample begins at a page, so that no two share one."""
    lengths = -(-4 * sizes[:, 0] * sizes[:, 1] // PAGE) * PAGE
    ends = np.cumsum(lengths)
    return ends - lengths, max(PAGE, int(ends[-1]) if len(ends) else 0)


def _record(pixels: np.ndarray) -> bytes:
    """Checksum of a sample, 8 bytes, never 0: the sum of its words, which finds lost pages in 1/40 of CRC32's time."""
    whole = pixels.nbytes // 8 * 8
    words = int(pixels[:whole].view("<u8").sum()) + int.from_bytes(pixels[whole:].tobytes(), "little")
    return ((words << 1 | 1) % (1 << 64)).to_bytes(8, "little")


def _write_all(file: int, data: memoryview, at: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(file, data[done:], at + done)


def _reserve(disk: os.statvfs_result) -> int:
    """Bytes of a file system that a cache leaves free."""
    return min(MOST_RESERVED, disk.f_blocks * disk.f_frsize // 10)


def memory_room(folder: Path, proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> tuple[int, str]:
    """(bytes, where): the least of what the file system, the machine and the job's memory limits leave free."""
    disk = os.statvfs(folder)
    found = [(disk.f_bavail * disk.f_frsize, f"free in {folder}")]
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = (proc / "meminfo").read_text().splitlines()
        free = next(line.split()[1] for line in lines if line.startswith("MemAvailable:"))
        found.append((1024 * int(free), "of free memory"))
    with contextlib.suppress(OSError):
        for line in (proc / "self" / "cgroup").read_text().splitlines():
            _, controllers, group = line.split(":", 2)
            second = not controllers  # cgroup v2 has one hierarchy for all
            if not second and "memory" not in controllers.split(","):
                continue
            names = ("memory.max", "memory.current") if second else ("memory.limit_in_bytes", "memory.usage_in_bytes")
            root = cgroups if second else cgroups / "memory"
            place = root / group.lstrip("/")
            for level in (place, *place.parents):
                with contextlib.suppress(OSError, ValueError):  # "max" is no number: no limit
                    limit, used = (int((level / name).read_text()) for name in names)
                    free = limit - used + _droppable(level)
                    found.append((max(0, free), "below the memory limit of this job"))
                if level == root:
                    break
    return min(found)


def _droppable(group: Path) -> int:
    """Bytes that a control group is charged for, and that the kernel takes back when they are needed: files read."""
    stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    return int(stat.get("total_inactive_file", stat.get("inactive_file", 0)))


def _amount(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"
