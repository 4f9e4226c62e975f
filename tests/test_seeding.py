"""Derived seeds are pure functions of their arguments, the same in every process."""

import hashlib
import itertools
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from fcn.seeding import derive, generator, permutation

PROBE = """
import json
from fcn.seeding import derive, generator, permutation
rng = generator(3, "a", 1, 2)
print(json.dumps([derive(3, "a", 1, 2), [rng.random() for _ in range(3)], permutation(9, 3, "a", 1).tolist()]))
"""


def test_seed_is_the_same_in_another_process_with_other_hashes():
    rng = generator(3, "a", 1, 2)
    here = [derive(3, "a", 1, 2), [rng.random() for _ in range(3)], permutation(9, 3, "a", 1).tolist()]
    for hash_seed in ("1", "2"):
        there = subprocess.run(
            [sys.executable, "-c", PROBE],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            cwd=Path(__file__).parents[1],
            capture_output=True,
            check=True,
        )
        assert json.loads(there.stdout) == here


def test_seed_is_the_digest_of_its_arguments():
    # A change of this format would change every run that is resumed.
    digest = hashlib.blake2b(b"order:7:1:2", digest_size=8).hexdigest()
    assert derive(7, "order", 1, 2) == int(digest, 16)


def test_no_two_places_share_a_seed():
    places = list(itertools.product(range(4), ("order", "augment"), range(12), range(12)))
    assert len({derive(seed, purpose, *position) for seed, purpose, *position in places}) == len(places)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ((0, "a", 1), (1, "a", 0)),
        ((1, "a", 23), (12, "a", 3)),
        ((0, "a", 1, 11), (0, "a", 11, 1)),
        ((0, "a"), (0, "a", 0)),
    ],
)
def test_swapped_or_joined_numbers_are_other_seeds(one, other):
    assert derive(*one) != derive(*other)


def test_generators_of_equal_arguments_agree_and_do_not_share_state():
    first, second = generator(0, "a", 5), generator(0, "a", 5)
    assert [first.random() for _ in range(4)] == [second.random() for _ in range(4)]
    assert generator(0, "a", 5).random() != generator(0, "a", 6).random()


@pytest.mark.parametrize("n", [0, 1, 2, 3, 100, 1000])
def test_permutation_holds_every_index_once(n):
    order = permutation(n, 0, "order", 3)
    assert order.dtype == np.int64
    assert sorted(order.tolist()) == list(range(n))


def test_permutation_depends_on_every_argument():
    orders = [permutation(50, *key).tolist() for key in ((0, "a", 0), (1, "a", 0), (0, "b", 0), (0, "a", 1))]
    assert len(set(map(tuple, orders))) == 4


def test_all_orders_are_equally_likely():
    counts = Counter(tuple(permutation(3, 0, "order", epoch).tolist()) for epoch in range(3000))
    assert len(counts) == 6
    # Six cells of 500: chi-square with 5 degrees of freedom is below 20.5 in 99.9 % of fair draws.
    assert sum((count - 500) ** 2 / 500 for count in counts.values()) < 20.5
