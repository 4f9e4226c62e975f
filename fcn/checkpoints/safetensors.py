"""Read weights in the safetensors format, strictly: each byte of the data belongs to one tensor of the header."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, BinaryIO

import torch

from fcn.errors import InputError

MOST_HEADER = 10_000_000
"""Bytes of a header; a tensor takes about a hundred."""
MOST_DIMENSIONS = 8
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """Name → tensor, on the CPU.

    Raises:
        InputError: the file is missing, cannot be read, or breaks the format; nothing of its size was allocated.
    """
    try:
        with path.open("rb") as file:
            return _read(file, path.stat().st_size)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; give one in the safetensors format") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error}); use another file") from None
    except (ValueError, RecursionError) as error:
        reason = str(error) or type(error).__name__
        raise InputError(f"{path}: not a whole file in the safetensors format: {reason}; use another file") from None


def _read(file: BinaryIO, size: int) -> dict[str, torch.Tensor]:
    """The tensors of a file of `size` bytes; ValueError says what is wrong with it."""
    length = int.from_bytes(file.read(8), "little")
    most = min(MOST_HEADER, size - 8)
    if not 2 <= length <= most:
        raise ValueError(f"its header should have {length} bytes; accepted: 2 to {max(most, 2)}")
    try:
        header = json.loads(file.read(length), object_pairs_hook=_without_repetition)
    except UnicodeDecodeError:
        raise ValueError("its header is not text in UTF-8") from None
    if not isinstance(header, dict):
        raise ValueError("its header is not a mapping")
    header.pop("__metadata__", None)
    places = {name: _place(name, entry) for name, entry in header.items()}
    tensors, end = {}, 0
    for name, (dtype, shape, begin, stop) in sorted(places.items(), key=lambda item: item[1][2:]):
        if begin != end:
            raise ValueError(
                f"the data of {name[:99]} begin at {begin}; accepted: {end}, where the tensor before it ends"
            )
        if stop > size - 8 - length:
            raise ValueError(
                f"the data of {name[:99]} end at {stop}, but the file has {size - 8 - length} bytes of data"
            )
        data = bytearray(file.read(stop - begin))
        tensors[name] = (torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)).reshape(shape)
        end = stop
    if end != size - 8 - length:
        raise ValueError(f"its tensors end at {end}, but the file has {size - 8 - length} bytes of data")
    return {name: tensors[name] for name in header}


def _place(name: str, entry: Any) -> tuple[torch.dtype, list[int], int, int]:
    """(dtype, shape, begin, end) of a tensor, after all checks that need no file."""
    found, name = entry if isinstance(entry, dict) else {}, name[:99]
    dtype, shape, offsets = DTYPES.get(str(found.get("dtype"))), found.get("shape"), found.get("data_offsets")
    if dtype is None:
        raise ValueError(f"{name} has dtype {str(found.get('dtype'))[:20]}; accepted: {', '.join(DTYPES)}")
    if not _are_sizes(shape) or len(shape) > MOST_DIMENSIONS or not _are_sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"{name} has no shape or no data_offsets; accepted: lists of whole numbers, 0 or more")
    begin, end = offsets
    count = math.prod(shape) * dtype.itemsize
    if end - begin != count or math.prod(max(length, 1) for length in shape) >= 2**48:
        raise ValueError(f"{name} has {end - begin} bytes of data; accepted: {count}, for {found['dtype']} {shape}")
    return dtype, shape, begin, end


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name stands in its header twice")
    return found
