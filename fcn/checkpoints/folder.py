"""A folder of checkpoints: which are there, which verify, which may go. Needs no PyTorch."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from fcn.files import read_text

ALTERED = "truncated or altered"
MOST_DIGEST = 10_000
"""Bytes of a checksum file, which has a line or two."""
STEP_NAME = re.compile(r"step_(\d{8,})\.pt")


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / f"step_{step:08d}.pt"


def verify(path: Path) -> str | None:
    """What is wrong with a checkpoint file, or None if its bytes match the checksum next to it."""
    digest = digest_path(path)
    try:
        for file in (path, digest):
            if not file.is_file():
                return "no such file" if file is path else f"{digest.name} is missing, so the file cannot be verified"
        expected = [line.split()[:1] for line in read_text(digest, MOST_DIGEST).splitlines()]
        with path.open("rb") as file:
            found = _sha256(file)
    except (OSError, ValueError) as error:
        return f"cannot be read ({error})"
    return None if [found] in expected else f"its SHA-256 is not the one in {digest.name}: {ALTERED}"


def find_newest(folder: Path, on_broken: Callable[[Path, str], None] = lambda path, problem: None) -> Path | None:
    """The newest checkpoint that verifies; each newer, broken one is passed to `on_broken`."""
    for path in reversed(list_checkpoints(folder)):
        problem = verify(path)
        if problem is None:
            return path
        on_broken(path, problem)
    return None


def quarantine(path: Path) -> Path:
    """Rename a broken checkpoint, so that it does not count among those that are kept; returns its new path."""
    return path.rename(path.with_name(f"{path.name}.broken"))


def list_checkpoints(folder: Path) -> list[Path]:
    """The step_*.pt files of a folder, oldest step first."""
    steps = {
        int(match.group(1)): path for path in folder.glob("step_*.pt") if (match := STEP_NAME.fullmatch(path.name))
    }
    return [steps[step] for step in sorted(steps)]


def prune(folder: Path, keep: int) -> None:
    """Delete checkpoints older than the newest `keep` (1 or more) that verify, and leftovers of killed saves.

    Checkpoints that do not verify do not count, so that the last good one is never deleted. Call it while no save runs.
    """
    good = 0
    present = list_checkpoints(folder)
    for path in reversed(present) if len(present) > keep else ():
        if good >= keep:
            path.unlink(missing_ok=True)
            digest_path(path).unlink(missing_ok=True)
        else:
            good += verify(path) is None
    remove_leftovers(folder)


def remove_leftovers(folder: Path) -> None:
    """Delete leftovers of killed saves: half a file, a checksum without a file. Call it while no save runs."""
    orphans = [path for path in folder.glob("step_*.pt.sha256") if not path.with_suffix("").exists()]
    for path in [*folder.glob(".*.tmp"), *orphans]:
        path.unlink(missing_ok=True)


def digest_path(path: Path) -> Path:
    """The file that contains the checksum."""
    return path.with_name(f"{path.name}.sha256")


def _sha256(file: BinaryIO) -> str:  # hashlib.file_digest needs Python 3.11
    digest = hashlib.sha256()
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()


def sync_folder(folder: Path) -> None:
    """Wait until the disk has the folder's names."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
