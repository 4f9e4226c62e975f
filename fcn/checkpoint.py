"""Checkpoints: complete or absent, verified by a SHA-256 beside them, plain data inside, written in the background."""

from __future__ import annotations

import contextlib
import hashlib
import os
import pickle
import re
import warnings
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import torch

from fcn.errors import InputError
from fcn.tracking import replacing, write_atomically

FORMAT = 1
ALTERED = "truncated or altered"
_NAME = re.compile(r"step_(\d{8,})\.pt")


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / f"step_{step:08d}.pt"


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write `state` (tensors, numbers, texts, lists, dicts) so that a crash leaves the old file or the new one.

    The checksum is in place before the file gets its name: a named file without a matching checksum is a broken one.
    While a file is replaced, the checksums of both versions stand beside it.

    Raises:
        OSError: it could not be written; what was there before still is.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    digest = _digest_path(path)
    try:
        with replacing(path) as file:
            writer = _HashingWriter(file)
            try:
                torch.save({"format": FORMAT, **state}, writer)
            except RuntimeError as error:  # torch's own words for a write that failed
                raise writer.error or error from None
            line = f"{writer.hash.hexdigest()}  {path.name}\n"
            # A damaged checksum is no reason to fail: it may be any bytes, and lack the end of its line.
            replaced = digest.read_text(errors="replace").splitlines() if path.exists() and digest.exists() else []
            write_atomically(digest, "".join(f"{other}\n" for other in replaced) + line)
            if replaced:
                _sync_folder(path.parent)  # before the file gets its name
    except OSError:
        with contextlib.suppress(OSError):
            if not path.exists():
                digest.unlink(missing_ok=True)
        raise
    if replaced:
        _sync_folder(path.parent)
        write_atomically(digest, line)
    _sync_folder(path.parent)


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read and verify a checkpoint file, or the newest one of a run directory that verifies.

    Returns:
        The state on the CPU: "model" is the unwrapped state_dict, "step" the number of finished steps.

    Raises:
        InputError: no such file, it does not match its checksum, or it holds more than plain data.
    """
    path = Path(path)
    if path.is_dir():
        newest = find_newest(path / "checkpoints", lambda broken, why: warnings.warn(f"{broken}: {why}", stacklevel=2))
        if newest is None:
            raise InputError(
                f"{path}: found no checkpoint that verifies in its checkpoints/; give a run directory or a .pt file"
            )
        path = newest
    problem = verify(path)
    if problem:
        raise InputError(f"{path}: {problem}; give a .pt file, or a run directory that has one")
    state = read_plain(path)
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise InputError(f"{path}: not a checkpoint of this program (format {FORMAT}); give a file that fcn wrote")
    return state


def read_plain(path: Path) -> Any:
    """What torch.save wrote, on the CPU, if it is plain data.

    Raises:
        InputError: the file is missing, cannot be read, or holds more than plain data.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; give one that torch.save wrote") from None
    except pickle.UnpicklingError:
        raise InputError(
            f"{path}: refused: not a file of tensors and plain data, and loading anything else could run code"
        ) from None
    except Exception as error:  # whatever a foreign file makes the reader raise, the file is at fault
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"{path}: cannot be read ({reason}); use another file") from None


def verify(path: Path) -> str | None:
    """What is wrong with a checkpoint file, or None if its bytes match the checksum beside it."""
    digest = _digest_path(path)
    try:
        for file in (path, digest):
            if not file.is_file():
                return "no such file" if file is path else f"{digest.name} is missing, so the file cannot be verified"
        expected = [line.split()[:1] for line in digest.read_text().splitlines()]
        with path.open("rb") as file:
            found = _sha256(file)
    except (OSError, UnicodeDecodeError) as error:
        return f"cannot be read ({error})"
    return None if [found] in expected else f"its SHA-256 is not the one in {digest.name}: {ALTERED}"


def find_newest(folder: Path, on_broken: Callable[[Path, str], None] = lambda path, problem: None) -> Path | None:
    """The checkpoint of the highest step that verifies; each broken one on the way is passed to `on_broken`."""
    for path in reversed(list_checkpoints(folder)):
        problem = verify(path)
        if problem is None:
            return path
        on_broken(path, problem)
    return None


def set_aside(path: Path) -> Path:
    """Rename a broken checkpoint, so that it takes no place among those that are kept; returns its new name."""
    return path.rename(path.with_name(f"{path.name}.broken"))


def list_checkpoints(folder: Path) -> list[Path]:
    """step_*.pt of a folder, oldest step first."""
    steps = {int(match.group(1)): path for path in folder.glob("step_*.pt") if (match := _NAME.fullmatch(path.name))}
    return [steps[step] for step in sorted(steps)]


def prune(folder: Path, keep: int) -> None:
    """Delete what is older than the newest `keep` (1 or more) checkpoints that verify, and leftovers of killed saves.

    Those that do not verify do not count, so that the last good one is never deleted. Call it when no save is running.
    """
    good = 0
    present = list_checkpoints(folder)
    for path in reversed(present) if len(present) > keep else ():
        if good >= keep:
            path.unlink(missing_ok=True)
            _digest_path(path).unlink(missing_ok=True)
        else:
            good += verify(path) is None
    remove_leftovers(folder)


def remove_leftovers(folder: Path) -> None:
    """Delete what saves that were killed left: half a file, a checksum of none. Call it when no save is running."""
    orphans = [path for path in folder.glob("step_*.pt.sha256") if not path.with_suffix("").exists()]
    for path in [*folder.glob(".*.tmp"), *orphans]:
        path.unlink(missing_ok=True)


class BackgroundSaver:
    """Saves checkpoints of one folder in a thread, one after the other; the caller waits only for a copy of the state.

    A save that fails is reported through `warn` (from that thread) with its path, cause and remedy, and training goes
    on; `unsaved` says so until a later save of the same kind succeeds. At most one save waits behind the one that is
    being written, so that a slow disk costs time but not memory without bound.

    Training never comes back to the weights of best.pt: if it cannot be written, its state is kept, and written after
    the next step_*.pt that can.
    """

    def __init__(self, folder: Path, keep: int, warn: Callable[[str], None]) -> None:
        self.folder, self.keep, self.warn = folder, keep, warn
        self.unsaved: dict[str, str] = {}
        """What the last save of a kind ("step" or "best.pt") failed of, for those that failed."""
        self._begun = False
        self._had_folder = folder.is_dir()
        self._kept: dict[str, dict[str, Any]] = {}
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._running: deque[Future[None]] = deque()

    def save(self, name: str, state: dict[str, Any]) -> None:
        """Start to write `state`, as it is now, to the file `name`; step_*.pt also ends in retention."""
        while self._running and (self._running[0].done() or len(self._running) > 1):
            self._running.popleft().result()
        copy, copied = to_host(state)
        self._running.append(self._thread.submit(self._write, name, copy, copied))

    def wait(self) -> None:
        """Return when nothing is left to write."""
        while self._running:
            self._running.popleft().result()

    def _write(self, name: str, state: dict[str, Any], copied: Callable[[], None]) -> None:
        path = self.folder / name
        kind = "step" if _NAME.fullmatch(name) else name
        self._kept.pop(kind, None)
        try:
            copied()
            if self._had_folder and not self.folder.is_dir():
                self.warn(f"warning: {self.folder} has vanished, with the older checkpoints; making it again")
            if not self._begun:
                remove_leftovers(self.folder)  # they may be what fills the disk
                self._begun = True
            save_checkpoint(path, state)
            self._had_folder = True
        except OSError as error:
            self._report(kind, path, error)
            if kind != "step":
                self._kept[kind] = state
            return
        self.unsaved.pop(kind, None)
        if kind == "step":
            self._prune()
            for kept in list(self._kept):
                self._write(kept, self._kept[kept], lambda: None)

    def _report(self, kind: str, path: Path, error: OSError) -> None:
        left = None
        with contextlib.suppress(OSError):  # a disk that cannot be written perhaps cannot be listed
            left = find_newest(self.folder)
        newest = f"the newest checkpoint is {left}" if left else "there is no other checkpoint"
        self.unsaved[kind] = f"{path}: cannot be written ({_reason(error)})"
        self.warn(
            f"warning: {self.unsaved[kind]}; training does not stop for that, {newest}; "
            "free space there or make it writable, the next save tries again"
        )

    def _prune(self) -> None:
        try:
            prune(self.folder, self.keep)
        except OSError as error:
            self.warn(
                f"warning: {self.folder}: older checkpoints cannot be deleted ({_reason(error)}); "
                "the next save tries again"
            )


def to_host(state: dict[str, Any]) -> tuple[dict[str, Any], Callable[[], None]]:
    """A copy of the state in host memory, and a function that waits until it is complete.

    Tensors of a GPU go to pinned memory by copies that are queued behind the step that made them: the caller, and the
    steps that it queues next, wait for nothing.
    """
    on_gpu = False

    def copy(value: Any) -> Any:
        nonlocal on_gpu
        if isinstance(value, dict):
            return {key: copy(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [copy(item) for item in value] if isinstance(value, list) else tuple(map(copy, value))
        if not isinstance(value, torch.Tensor):
            return value
        if not value.is_cuda:
            return value.detach().clone()
        on_gpu = True
        host = torch.empty_like(value, device="cpu", pin_memory=True)
        return host.copy_(value.detach(), non_blocking=True)

    copied = copy(state)
    if not on_gpu:
        return copied, lambda: None
    event = torch.cuda.Event()
    event.record()
    return copied, event.synchronize


class _HashingWriter:
    """The file interface that torch.save needs, hashing what passes."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.hash = file, hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        self.hash.update(data)
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def _digest_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _sha256(file: BinaryIO) -> str:  # hashlib.file_digest needs Python 3.11
    digest = hashlib.sha256()
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()


def _reason(error: OSError) -> str:
    return error.strerror or str(error)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
