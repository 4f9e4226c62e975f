"""Derived seeds: every random choice is a pure function of (seed, what it is for, where it happens)."""

from __future__ import annotations

import hashlib
import random

import numpy as np


def derive(seed: int, purpose: str, *position: int) -> int:
    """A 64-bit seed that depends on all arguments, equal on every machine and library version.

    Hashing keeps the streams of (seed 0, epoch 1) and (seed 1, epoch 0) apart, which adding or multiplying does not.
    """
    text = ":".join([purpose, str(seed), *map(str, position)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def generator(seed: int, purpose: str, *position: int) -> random.Random:
    """Uniform numbers for a few choices (`random.Random.random` is the same in every Python version)."""
    return random.Random(derive(seed, purpose, *position))


def permutation(n: int, seed: int, purpose: str, *position: int) -> np.ndarray:
    """A random order of 0..n-1, (n,) int64.

    Sorts the raw output of a bit generator: NumPy keeps that stream fixed for ever, but not `Generator.permutation`.
    """
    return np.argsort(np.random.PCG64(derive(seed, purpose, *position)).random_raw(n), kind="stable")


def seed_generators(seed: int) -> None:
    """Seed the global generators of PyTorch, Python and NumPy, which a user's network may draw from."""
    import torch  # here, because the rest needs none

    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % (1 << 32))
