"""Checkpoints: complete or absent, verified by a SHA-256 beside them, plain data inside."""

from __future__ import annotations

import hashlib
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch

from fcn.errors import InputError

FORMAT = 1
_NAME = re.compile(r"step_(\d{8,})\.pt")


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / f"step_{step:08d}.pt"


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write `state` (tensors, numbers, texts, lists, dicts) so that a crash leaves the old file or the new one.

    The checksum is in place before the file gets its name: a named file without a matching checksum is a broken one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        writer = _HashingWriter(file)
        torch.save({"format": FORMAT, **state}, writer)
        _sync(file)
    digest = path.with_name(f"{path.name}.sha256")
    digest_temporary = path.with_name(f".{digest.name}.tmp")
    with digest_temporary.open("wb") as file:
        file.write(f"{writer.hash.hexdigest()}  {path.name}\n".encode())
        _sync(file)
    digest_temporary.replace(digest)
    temporary.replace(path)
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
        newest = find_newest(path / "checkpoints")
        if newest is None:
            raise InputError(
                f"{path}: found no checkpoint that verifies in its checkpoints/; give a run directory or a .pt file"
            )
        path = newest
    problem = verify(path)
    if problem:
        raise InputError(f"{path}: {problem}; use another checkpoint")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise InputError(
            f"{path}: refused, because loading it could run code; accepted: plain data, as fcn writes it"
        ) from None
    except (RuntimeError, EOFError, OSError) as error:
        raise InputError(f"{path}: cannot be read ({str(error).splitlines()[0]}); use another checkpoint") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise InputError(f"{path}: not a checkpoint of this program (format {FORMAT}); give a file that fcn wrote")
    return state


def verify(path: Path) -> str | None:
    """What is wrong with a checkpoint file, or None if its bytes match the checksum beside it."""
    digest = path.with_name(f"{path.name}.sha256")
    try:
        expected = digest.read_text().split()
        with path.open("rb") as file:
            found = (
                hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)
            )
    except FileNotFoundError as error:
        return (
            "no such file"
            if error.filename == str(path)
            else f"{digest.name} is missing, so the file cannot be verified"
        )
    except (OSError, UnicodeDecodeError) as error:
        return f"cannot be read ({error})"
    return None if expected[:1] == [found] else f"its SHA-256 is not the one in {digest.name}: truncated or altered"


def find_newest(folder: Path, warn: Callable[[str], None] = lambda message: None) -> Path | None:
    """The checkpoint of the highest step that verifies; broken ones are named through `warn`."""
    for path in reversed(list_checkpoints(folder)):
        problem = verify(path)
        if problem is None:
            return path
        warn(f"{path}: broken checkpoint ({problem}); trying the one before it")
    return None


def list_checkpoints(folder: Path) -> list[Path]:
    """step_*.pt of a folder, oldest step first."""
    steps = {int(match.group(1)): path for path in folder.glob("step_*.pt") if (match := _NAME.fullmatch(path.name))}
    return [steps[step] for step in sorted(steps)]


def prune(folder: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints; call after a save, so that the newest is known to be whole."""
    for path in list_checkpoints(folder)[:-keep]:
        path.unlink(missing_ok=True)
        path.with_name(f"{path.name}.sha256").unlink(missing_ok=True)


class _HashingWriter:
    """The file interface that torch.save needs, hashing what passes."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.hash = file, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.hash.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def _digest(file: BinaryIO) -> str:  # Python 3.10 has no hashlib.file_digest
    digest = hashlib.sha256()
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
