"""Files that are replaced whole or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from fcn.errors import InputError


def read_text(path: Path, most: int, errors: str = "strict") -> str:
    """The text of a file in UTF-8 that may be anybody's.

    Raises:
        ValueError: it has more than `most` bytes, of which no more are read, or is not UTF-8.
    """
    with path.open("rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"it has more than {most / 1e6:g} MB")
    return content.decode(errors=errors)


def write_atomically(path: Path, text: str) -> None:
    """Replace a text file so that a crash leaves the old one or the new one."""
    with replacing(path) as file:
        file.write(text.encode())


@contextlib.contextmanager
def replacing(path: Path, sync: bool = True) -> Iterator[BinaryIO]:
    """A temporary file that takes the place of `path` at the end of the `with` block.

    After an error the old file is still there, and nothing half-written takes room.

    Args:
        sync: wait until the disk has all of it (fsync), so that a power cut leaves the old file or the new one, too.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            if sync:
                os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def must_be_writable(what: str) -> Iterator[None]:
    """Turn an OSError inside into an InputError; `what` names the folder, and the key or option that chose it."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{what}: cannot be written ({error.strerror or error}); free space there, or choose a folder that you may "
            f"write to"
        ) from None
