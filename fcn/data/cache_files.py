"""The files of a cache of decoded samples: two files that many processes write at once, without a lock.

`pixels` holds image and labels of one sample after the other, as uint8, each sample at a page of its own. It has its
full length from the start and takes space as it is filled. `index` holds the sizes and a record for each sample: 0, or
the checksum of its pixels, which is written after them. A process that needs a missing sample decodes and writes it.
Workers, ranks and jobs may all do that at the same time, and may be killed meanwhile: they all write the same bytes.

Pixels are read through a memory mapping, whose pages all processes of a node share, so a crop touches only its own
pages. Each process verifies a sample's checksum on first use, because a record can outlive its pixels: a machine may
lose power before they are on the disk, and machines that share a disk may still see an old page. Nothing is written
through the mapping: on a full file system that would kill the process, while a write returns an error.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import shutil
import struct
import time
import uuid
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

PAGE = 4096
HEADER = struct.Struct("<8sQQ")
"""Magic, number of samples, checksum of the sizes. At COMPLAINT_AT follows which run last warned of a full disk."""
MAGIC = b"fcncache"
COMPLAINT, COMPLAINT_AT, SIZES_AT = struct.Struct("<Qd"), 32, 64
MOST_RESERVED = 1 << 30
NO_PLACE = (errno.EEXIST, errno.ENOTEMPTY)
NO_RIGHT = (errno.EACCES, errno.EPERM, errno.EROFS)


class CacheFiles:
    """The two files of a cache, opened by one process.

    Args:
        path: folder of the cache.
        count: number of samples that it must have.
        lock: mark it as in use for as long as this process lives.

    Raises:
        FileNotFoundError: it does not exist.
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
        self.total = sample_offsets(self.sizes)[1]
        if os.fstat(self.pixels_file).st_size != self.total:  # reading a page beyond the end would kill the process
            raise ValueError("a part of the pixels is missing")
        mapping = mmap.mmap(self.pixels_file, self.total, access=mmap.ACCESS_READ)
        self.pixels = np.frombuffer(mapping, np.uint8)
        self._checked = np.zeros(count, bool)

    def holds(self, index: int, place: slice) -> bool:
        """Whether the cache has a sample whose pixels match their checksum."""
        if self._checked[index]:
            return True
        record = os.pread(self.index_file, 8, self._records_at + 8 * index)
        self._checked[index] = record != bytes(8) and record == _record(self.pixels[place])
        return bool(self._checked[index])

    def write(self, index: int, place: slice, pixels: np.ndarray) -> None:
        """Write a sample, and then its record.

        Raises:
            OSError: ENOSPC before the disk is full: a run needs space for checkpoints, or in /dev/shm for batches.
        """
        disk = os.fstatvfs(self.pixels_file)
        if disk.f_bavail * disk.f_frsize < pixels.nbytes + reserve(disk):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        _write_all(self.pixels_file, memoryview(pixels), place.start)
        _write_all(self.index_file, memoryview(_record(pixels)), self._records_at + 8 * index)

    @property
    def records_set(self) -> int:
        records = os.pread(self.index_file, 8 * self.count, self._records_at)
        return int(np.count_nonzero(np.frombuffer(records, "<u8")))

    @property
    def missing_bytes(self) -> int:
        """Bytes that the file will still take."""
        return max(0, self.total - 512 * os.fstat(self.pixels_file).st_blocks)

    def is_first_to_complain(self, run: int, since: float) -> bool:
        """Whether no other process of this run, on this node, has asked since the run began."""
        try:
            fcntl.lockf(self.index_file, fcntl.LOCK_EX | fcntl.LOCK_NB, COMPLAINT.size, COMPLAINT_AT)
        except BlockingIOError:
            return False  # another process is warning now
        except OSError:
            pass  # a network disk without locks
        try:
            who, when = COMPLAINT.unpack(os.pread(self.index_file, COMPLAINT.size, COMPLAINT_AT))
            if who == run and when >= since:
                return False
            os.pwrite(self.index_file, COMPLAINT.pack(run, time.time()), COMPLAINT_AT)
        except OSError:
            pass  # better to warn twice than not at all
        finally:
            with contextlib.suppress(OSError):
                fcntl.lockf(self.index_file, fcntl.LOCK_UN, COMPLAINT.size, COMPLAINT_AT)
        return True

    def close(self) -> None:
        """Close the files. The mapping lives as long as an array uses it."""
        for file in (self.index_file, self.pixels_file):
            if file >= 0:
                os.close(file)
        self.index_file = self.pixels_file = -1

    def __del__(self) -> None:
        self.close()


def create(path: Path, sizes: list[tuple[int, int]]) -> None:
    """Create an empty cache atomically; if another process was faster, its cache stays.

    Args:
        path: folder of the cache, whose parent exists.
        sizes: (height, width) of each sample, (0, 0) for samples that are not cached.
    """
    table = np.array(sizes, "<i4").tobytes()
    header = HEADER.pack(MAGIC, len(sizes), zlib.crc32(table)).ljust(SIZES_AT, b"\0")
    with _hidden(path) as temporary:
        temporary.mkdir()
        with (temporary / "index").open("wb") as index, (temporary / "pixels").open("wb") as pixels:
            index.write(header + table + bytes(8 * len(sizes)))
            pixels.truncate(sample_offsets(np.array(sizes, np.int64))[1])
            for file in (index, pixels):
                file.flush()
                os.fsync(file.fileno())
        try:
            temporary.rename(path)
        except OSError as error:
            if error.errno not in NO_PLACE:
                raise


def remove(path: Path) -> None:
    """Remove a cache. Processes that have it open can continue to read."""
    with _hidden(path) as away, contextlib.suppress(FileNotFoundError):
        path.rename(away)


def remove_if_unused(path: Path) -> None:
    """Remove a cache in memory unless a process marks it as in use."""
    with contextlib.suppress(OSError):
        file = os.open(path / "index", os.O_RDONLY)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(file, path / "index"):
                remove(path)
        finally:
            os.close(file)


@contextlib.contextmanager
def _hidden(path: Path) -> Iterator[Path]:
    """A temporary name next to `path`; nothing remains under it."""
    name = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        yield name
    finally:
        shutil.rmtree(name, ignore_errors=True)


def _is_at(file: int, path: Path) -> bool:
    """Whether an open file is still the one with this name."""
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except OSError:
        return False


def sample_offsets(sizes: np.ndarray) -> tuple[np.ndarray, int]:
    """(start of each sample, total bytes); every sample starts at a page of its own."""
    lengths = -(-4 * sizes[:, 0] * sizes[:, 1] // PAGE) * PAGE
    ends = np.cumsum(lengths)
    return ends - lengths, max(PAGE, int(ends[-1]) if len(ends) else 0)


def _record(pixels: np.ndarray) -> bytes:
    """The checksum of a sample, 8 bytes, never 0: the sum of its words, which detects lost pages 40 times as fast as
    CRC32."""
    whole = pixels.nbytes // 8 * 8
    words = int(pixels[:whole].view("<u8").sum()) + int.from_bytes(pixels[whole:].tobytes(), "little")
    return ((words << 1 | 1) % (1 << 64)).to_bytes(8, "little")


def _write_all(file: int, data: memoryview, at: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(file, data[done:], at + done)


def reserve(disk: os.statvfs_result) -> int:
    """Bytes that a cache leaves free on a file system."""
    return min(MOST_RESERVED, disk.f_blocks * disk.f_frsize // 10)


def memory_room(folder: Path, proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> tuple[int, str]:
    """(bytes, where): the smallest amount that the file system, the machine or the job's memory limits leave free."""
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
    """Bytes charged to a control group that the kernel can reclaim: cached files."""
    stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    return int(stat.get("total_inactive_file", stat.get("inactive_file", 0)))
