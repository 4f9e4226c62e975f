"""Checkpoints: complete or absent, verified by a SHA-256 beside them, plain data inside."""

from __future__ import annotations

import hashlib
import os
import pickle
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch

from fcn.errors import InputError

FORMAT = 1
ALTERED = "truncated or altered"
_NAME = re.compile(r"step_(\d{8,})\.pt")


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / f"step_{step:08d}.pt"


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write `state` (tensors, numbers, texts, lists, dicts) so that a crash leaves the old file or the new one.

    The checksum is in place before the file gets its name: a named file without a matching checksum is a broken one.
    While a file is replaced, the checksums of both versions stand beside it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        writer = _HashingWriter(file)
        torch.save({"format": FORMAT, **state}, writer)
        _sync(file)
    line = f"{writer.hash.hexdigest()}  {path.name}\n"
    digest = _digest_path(path)
    replaced = digest.read_text() if path.exists() and digest.exists() else ""
    _write(digest, replaced + line)
    temporary.replace(path)
    if replaced:
        _sync_folder(path.parent)
        _write(digest, line)
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
        raise InputError(f"{path}: {problem}; use another checkpoint")
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
    for file in (path, digest):
        if not file.is_file():
            return "no such file" if file is path else f"{digest.name} is missing, so the file cannot be verified"
    try:
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
    """Delete all but the newest `keep` (1 or more) checkpoints, and what a killed save left behind.

    Call it after a save, so that the newest is known to be whole.
    """
    for path in list_checkpoints(folder)[:-keep]:
        path.unlink(missing_ok=True)
        _digest_path(path).unlink(missing_ok=True)
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)


class _HashingWriter:
    """The file interface that torch.save needs, hashing what passes."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.hash = file, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.hash.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def _digest_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _sha256(file: BinaryIO) -> str:  # hashlib.file_digest needs Python 3.11
    digest = hashlib.sha256()
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(text.encode())
        _sync(file)
    temporary.replace(path)


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
