"""One checkpoint file: complete or absent, verified by the SHA-256 next to it, plain data inside."""

from __future__ import annotations

import contextlib
import hashlib
import pickle
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch

from fcn.checkpoints.folder import digest_path, find_newest, sync_folder, verify
from fcn.errors import InputError
from fcn.files import replacing, write_atomically

FORMAT = 1
MOST_LEVELS = 32
"""Of dicts and lists in the config of a checkpoint."""


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write `state` (tensors, numbers, strings, lists, dicts) so that a crash leaves the old file or the new one.

    The checksum is in place before the file gets its name, so a named file without a matching checksum is broken. While
    a file is replaced, the checksum file contains both versions' checksums.

    Raises:
        OSError: it could not be written; the old file is still there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    digest = digest_path(path)
    try:
        with replacing(path) as file:
            writer = _HashingWriter(file)
            try:
                torch.save({"format": FORMAT, **state}, writer)
            except RuntimeError as error:  # how torch reports a failed write
                raise writer.error or error from None
            line = f"{writer.hash.hexdigest()}  {path.name}\n"
            # A damaged checksum is no reason to fail: it may contain any bytes and lack a newline.
            replaced = digest.read_text(errors="replace").splitlines() if path.exists() and digest.exists() else []
            write_atomically(digest, "".join(f"{other}\n" for other in replaced) + line)
            if replaced:
                sync_folder(path.parent)  # before the file gets its name
    except OSError:
        with contextlib.suppress(OSError):
            if not path.exists():
                digest.unlink(missing_ok=True)
        raise
    if replaced:
        sync_folder(path.parent)
        write_atomically(digest, line)
    sync_folder(path.parent)


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read and verify a checkpoint file, or the newest one in a run directory that verifies.

    Returns:
        The state on the CPU: "model" is the unwrapped state_dict, "step" the number of finished steps.

    Raises:
        InputError: the file does not exist, does not match its checksum, or contains more than plain data.
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
    if not (_is_tree(state.get("config"), set()) and all(map(_is_dense, _tensors_in(state)))):
        raise InputError(f"{path}: holds something that training does not write; give a file that fcn wrote")
    return state


def _is_dense(tensor: torch.Tensor) -> bool:
    return tensor.layout == torch.strided and not tensor.is_meta


def _is_tree(value: Any, seen: set[int], levels: int = MOST_LEVELS) -> bool:
    """Whether dicts and lists contain no other one twice: a few that do would multiply to more than the memory."""
    if not isinstance(value, Mapping | list | tuple) or not value:
        return True
    if id(value) in seen or levels == 0:
        return False
    seen.add(id(value))
    return all(_is_tree(item, seen, levels - 1) for item in (value.values() if isinstance(value, Mapping) else value))


def _tensors_in(content: Any) -> Iterator[torch.Tensor]:
    seen, left = set(), [content]
    while left:
        value = left.pop()
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, Mapping | list | tuple) and id(value) not in seen:
            seen.add(id(value))
            left += value.values() if isinstance(value, Mapping) else value


def read_plain(path: Path) -> Any:
    """Read plain data that torch.save wrote, onto the CPU.

    Raises:
        InputError: the file is missing, cannot be read, contains more than plain data, or would become larger in memory
            than it is.
    """
    try:
        size = path.stat().st_size
        _require_uncompressed(path, size)
        content = torch.load(path, map_location="cpu", weights_only=True)
        _require_stored(content, size)
        return content
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; give one that torch.save wrote") from None
    except pickle.UnpicklingError:
        raise InputError(
            f"{path}: refused: not a file of tensors and plain data, and loading anything else could run code"
        ) from None
    except Exception as error:  # whatever the reader raises, the file is at fault
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"{path}: cannot be read ({reason}); use another file") from None


def _require_uncompressed(path: Path, size: int) -> None:
    """ValueError for a zip file whose entries are larger than the file."""
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":
            return  # of older versions of PyTorch, without compression
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise ValueError("its entries are compressed, unlike those that torch.save writes")
    if (total := sum(entry.file_size for entry in entries)) > size:
        raise ValueError(f"its entries have {total} bytes, but the file has {size}")


def _require_stored(content: Any, size: int) -> None:
    """ValueError if tensors have more bytes than a file of this size can have stored."""
    storages = {}
    for tensor in filter(_is_dense, _tensors_in(content)):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        if tensor.numel() * tensor.element_size() > size:
            raise ValueError(f"a tensor {tuple(tensor.shape)} is larger than the file, which has {size} bytes")
    if (total := sum(storages.values())) > size:
        raise ValueError(f"its tensors have {total} bytes, but the file has {size}")


class _HashingWriter:
    """The file interface that torch.save needs; hashes what it writes."""

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
