"""Corruption campaign: damaged checkpoints of many kinds, none of which is loaded as good.

bash tests/run.sh -m campaign tests/checkpoints/test_corruption.py -s
"""

from __future__ import annotations

import collections
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fcn.checkpoints import checkpoint_path, find_newest, list_checkpoints, load_checkpoint
from fcn.checkpoints.format import save_checkpoint
from fcn.errors import InputError

STEPS = (10, 20, 30)


def state(step: int) -> dict:
    generator = torch.Generator().manual_seed(step)
    return {"step": step, "model": {f"layer{i}": torch.randn(40, 7, generator=generator) for i in range(3)}}


def digest_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def cut(path: Path, rng: random.Random) -> None:
    """At any byte, or next to the borders of the records and headers that the file consists of."""
    data = path.read_bytes()
    borders = [place for mark in (b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06") for place in places(data, mark)]
    near = rng.choice(borders) + rng.randrange(-2, 3)
    path.write_bytes(data[: rng.choice((rng.randrange(len(data)), min(max(0, near), len(data) - 1)))])


def places(data: bytes, mark: bytes) -> list[int]:
    return [place for place in range(len(data)) if data.startswith(mark, place)]


def flip_bit(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def zero_block(path: Path, rng: random.Random) -> None:
    """As a disk leaves a file whose size was written and whose content was not."""
    data = bytearray(path.read_bytes())
    start = rng.randrange(len(data) - 64)
    span = slice(start, start + rng.randrange(64, 4096))
    if not any(data[span]):
        span = slice(0, 64)
    data[span] = bytes(len(data[span]))
    path.write_bytes(data)


def grow(path: Path, rng: random.Random) -> None:
    with path.open("ab") as file:
        file.write(rng.randbytes(rng.randrange(1, 600)))


def swap(path: Path, rng: random.Random) -> None:
    """Another step's content under this name, with this name's checksum."""
    others = [other for other in list_checkpoints(path.parents[2] / "whole" / "checkpoints") if other.name != path.name]
    shutil.copyfile(rng.choice(others), path)


def break_digest(path: Path, rng: random.Random) -> None:
    digest = digest_of(path)
    text = digest.read_text()
    place = rng.randrange(64)
    damaged = ("", text[:place], text[:place] + ("0" if text[place] != "0" else "1") + text[place + 1 :], "\xff" * 70)
    digest.write_bytes(rng.choice(damaged).encode("latin-1"))


def half_written(path: Path, rng: random.Random) -> None:
    """A crash before the rename: the temporary file is there, and the name is not."""
    data = path.read_bytes()
    path.with_name(f".{path.name}.tmp").write_bytes(data[: rng.randrange(len(data) + 1)])
    path.unlink()
    if rng.random() < 0.5:
        digest_of(path).unlink()


DAMAGE: dict[str, Callable[[Path, random.Random], None]] = {
    "cut": cut,
    "bit flipped": flip_bit,
    "block of zeros": zero_block,
    "grown": grow,
    "emptied": lambda path, rng: path.write_bytes(b""),
    "noise": lambda path, rng: path.write_bytes(rng.randbytes(path.stat().st_size)),
    "swapped": swap,
    "checksum missing": lambda path, rng: digest_of(path).unlink(),
    "checksum damaged": break_digest,
    "half written": half_written,
    "a folder": lambda path, rng: (path.unlink(), path.mkdir()),
    "a dangling link": lambda path, rng: (path.unlink(), path.symlink_to("/no/such/file")),
}


@pytest.mark.filterwarnings("ignore:.*step_000000")
@pytest.mark.parametrize("rounds", [60, pytest.param(600, marks=pytest.mark.campaign)])
def test_no_damaged_checkpoint_is_loaded_as_good(tmp_path: Path, rounds: int) -> None:
    """Each round damages the newest one, two or all three of a run's checkpoints, in ways of its own."""
    whole = tmp_path / "whole" / "checkpoints"
    for step in STEPS:
        save_checkpoint(checkpoint_path(whole, step), state(step))
    damaged: collections.Counter[str] = collections.Counter()
    for number in range(rounds):
        rng = random.Random(number)
        run = tmp_path / f"run{number}"
        shutil.copytree(whole.parent, run)
        spoiled = rng.choice((1, 1, 2, 3))
        for step in STEPS[-spoiled:]:
            kind = rng.choice(list(DAMAGE))
            DAMAGE[kind](checkpoint_path(run / "checkpoints", step), rng)
            damaged[kind] += 1
        good = STEPS[:-spoiled]
        named: list[Path] = []
        newest = find_newest(run / "checkpoints", lambda path, problem: named.append(path))  # noqa: B023 - called here
        if good:
            assert newest == checkpoint_path(run / "checkpoints", good[-1]), number
            found, expected = load_checkpoint(newest), state(good[-1])
            assert found["step"] == expected["step"]
            assert all(torch.equal(found["model"][key], value) for key, value in expected["model"].items())
        else:
            assert newest is None, number
            with pytest.raises(InputError, match="found no checkpoint that verifies"):
                load_checkpoint(run)
        for step in STEPS[-spoiled:]:
            with pytest.raises(InputError):
                load_checkpoint(checkpoint_path(run / "checkpoints", step))
        assert set(named) <= {checkpoint_path(run / "checkpoints", step) for step in STEPS[-spoiled:]}
        shutil.rmtree(run)
    print(f"{damaged.total()} damaged checkpoints: {dict(damaged)}")
    assert damaged.total() >= rounds
    assert damaged.keys() == DAMAGE.keys()
