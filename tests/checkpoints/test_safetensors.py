"""A .safetensors file is read to the bits that are in it, or refused in one line."""

from __future__ import annotations

import json
import math
import resource
import struct
from pathlib import Path

import pytest
import torch

from fcn.checkpoints import load_pretrained
from fcn.checkpoints.safetensors import DTYPES, read_safetensors
from fcn.errors import InputError
from fcn.models import build_model

F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
LEAD = "not a whole file in the safetensors format: "


def write(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def save(path: Path, tensors: dict[str, torch.Tensor], **more: object) -> Path:
    """As the safetensors library does: without holes, in any order of names."""
    names, header, data = {dtype: name for name, dtype in DTYPES.items()}, {}, b""
    for name, tensor in tensors.items():
        raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
        offsets = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        data += raw
    return write(path, more | dict(reversed(header.items())), data)


def test_every_dtype_and_shape_comes_back_bit_for_bit(tmp_path):
    shapes = [(3, 2), (), (0, 4), (5,), (1, 2, 3, 4)]
    expected = {
        f"{dtype}.{shape}": (torch.randn(shape) * 100).to(dtype) for dtype in DTYPES.values() for shape in shapes
    }
    found = read_safetensors(save(tmp_path / "a.safetensors", expected, __metadata__={"format": "pt"}))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(found[name], tensor), name


def test_a_network_takes_its_weights_from_it(tmp_path):
    trained, fresh = (build_model("unet", 3, width=2) for _ in range(2))
    wrapped = {f"module.{name}": tensor for name, tensor in trained.state_dict().items()}
    path = save(tmp_path / "unet.safetensors", wrapped)
    lines = load_pretrained(fresh, "unet", str(path), 3)
    assert lines[0].startswith(f"weights from {path}: ")
    assert lines[1:] == ["taken from the file's names without 'module.'"]
    for name, tensor in trained.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], tensor), name


def test_weights_that_are_not_finite_are_refused_here_too(tmp_path):
    tensors = build_model("unet", 3, width=2).state_dict()
    path = save(tmp_path / "unet.safetensors", tensors | {"classifier.bias": torch.full((3,), math.nan)})
    with pytest.raises(InputError, match=rf"^model\.weights: {path}: classifier\.bias \(3,\) is not a dense tensor"):
        load_pretrained(build_model("unet", 3, width=2), "unet", str(path), 3)


def with_entry(**changes: object) -> dict:
    return {"w": F32 | changes}


DAMAGED = {
    "empty": (b"", 0, "its header should have"),
    "nothing but a length": (b"", 2, "its header should have 2 bytes"),
    "a header longer than the file": (b"{}", 3, "its header should have 3 bytes; accepted: 2 to 2"),
    "a header longer than all memory": (b"{}", 2**64 - 1, "its header should have 18446744073709551615 bytes"),
    "no json": (b"{no", None, "Expecting property name"),
    "no text": (b"{\xff}", None, "its header is not text in UTF-8"),
    "a list": (b"[]", None, "its header is not a mapping"),
    "too deep": (b"[" * 100_000, None, ""),
    "a number of many digits": (b'{"w": ' + b"9" * 5000 + b"}", None, ""),
    "a name twice": (b'{"w": 1, "w": 2}', None, "a name stands in its header twice"),
    "an entry that is no mapping": ({"w": 3}, None, "w has dtype None"),
    "an unknown dtype": (with_entry(dtype="F8_E4M3"), None, "w has dtype F8_E4M3; accepted: F64, F32"),
    "no shape": (with_entry(shape=None), None, "w has no shape"),
    "a shape of texts": (with_entry(shape=["2"]), None, "w has no shape"),
    "a negative shape": (with_entry(shape=[-1, -2]), None, "w has no shape"),
    "a shape of booleans": (with_entry(shape=[True, 2]), None, "w has no shape"),
    "a fraction": (with_entry(shape=[2.0]), None, "w has no shape"),
    "many dimensions": (with_entry(shape=[1] * 99 + [2]), None, "w has no shape"),
    "no offsets": (with_entry(data_offsets=[0]), None, "w has no shape or no data_offsets"),
    "offsets the wrong way round": (with_entry(data_offsets=[8, 0]), None, "w has -8 bytes of data; accepted: 8"),
    "another size than its shape": (with_entry(shape=[3]), None, "w has 8 bytes of data; accepted: 12, for F32 [3]"),
    "a gigantic shape": (with_entry(shape=[2**62, 2**62]), None, "w has 8 bytes of data"),
    "a gigantic shape of nothing": (with_entry(shape=[0, 2**62, 2**62], data_offsets=[0, 0]), None, "w has 0 bytes"),
    "data beyond the end": (with_entry(shape=[2**40], data_offsets=[0, 2**42]), None, f"the data of w end at {2**42}"),
    "a hole": (with_entry(data_offsets=[4, 12]), None, "the data of w begin at 4; accepted: 0"),
    "an overlap": ({"w": F32, "v": F32}, None, "the data of v begin at 0; accepted: 8"),
    "a rest": ({}, None, "its tensors end at 0, but the file has 8 bytes of data"),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_a_file_that_breaks_the_format_is_refused_in_one_line(tmp_path, what):
    header, length, message = DAMAGED[what]
    path = write(tmp_path / "w.safetensors", header, b"" if isinstance(header, bytes) else bytes(8), length)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError) as caught:
        read_safetensors(path)
    assert str(caught.value).startswith(f"{path}: {LEAD}{message}")
    assert "\n" not in str(caught.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000, "KiB"


def test_every_shorter_file_is_refused(tmp_path):
    path = save(tmp_path / "w.safetensors", {"a": torch.ones(2), "b": torch.ones(3, dtype=torch.int8)})
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match=LEAD):
            read_safetensors(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"w\.safetensors: no such file; give one in the safetensors format"):
        read_safetensors(tmp_path / "w.safetensors")
