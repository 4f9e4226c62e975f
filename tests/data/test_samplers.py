"""The data of a step is the same for any number of processes, and no image is lost or doubled."""

import itertools
import random
from collections import Counter

import pytest

from fcn.data import EvalSampler, GlobalBatchSampler
from fcn.data.samplers import group_by_shape
from fcn.errors import InputError

WORLDS = [1, 2, 3, 4, 6]


def sampler(size=10, batch=12, steps=5, start=0, seed=0, rank=0, world_size=1, window=1, shape=None, shards=None):
    return GlobalBatchSampler(
        range(size),
        batch_size=batch,
        steps=steps,
        start_step=start,
        seed=seed,
        rank=rank,
        world_size=world_size,
        shards=shards,
        window=window,
        shape=shape,
    )


@pytest.mark.parametrize(("world_size", "expected"), [(1, [12]), (2, [6, 6]), (3, [3, 3, 6]), (4, [3, 3, 3, 3])])
def test_a_rank_takes_whole_shards(world_size, expected):
    ranks = [list(sampler(rank=rank, world_size=world_size, shards=4)) for rank in range(world_size)]
    for single, *rank_batches in zip(sampler(), *ranks):
        assert [len(rank_batch.local) for rank_batch in rank_batches] == expected
        assert [ref for rank_batch in rank_batches for ref in rank_batch.local] == single.local


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("size", [5, 10, 12, 100])
def test_ranks_together_draw_the_global_batch_whatever_their_number(size, world_size):
    alone = list(sampler(size))
    ranks = [list(sampler(size, rank=rank, world_size=world_size)) for rank in range(world_size)]
    assert len(alone) == 5
    for step, (single, *rank_batches) in enumerate(zip(alone, *ranks)):
        assert single.local == single.global_batch
        assert len(single.global_batch) == 12
        assert [rank_batch.step for rank_batch in rank_batches] == [step] * world_size
        assert all(rank_batch.global_batch == single.global_batch for rank_batch in rank_batches)
        assert all(len(rank_batch.local) == 12 // world_size for rank_batch in rank_batches)
        assert [ref for rank_batch in rank_batches for ref in rank_batch.local] == single.global_batch


@pytest.mark.parametrize(("size", "batch", "steps"), [(10, 12, 5), (12, 12, 4), (7, 3, 14), (100, 12, 25), (3, 12, 6)])
def test_each_epoch_draws_each_index_once(size, batch, steps):
    refs = [ref for rank_batch in sampler(size, batch, steps) for ref in rank_batch.global_batch]
    epochs = batch * steps // size
    assert [ref.epoch for ref in refs] == [epoch for epoch in range(epochs) for _ in range(size)]
    for epoch in range(epochs):
        assert sorted(ref.index for ref in refs if ref.epoch == epoch) == list(range(size))


def test_epochs_and_seeds_have_orders_of_their_own():
    def orders(seed):
        return [tuple(ref.index for ref in rank_batch.global_batch) for rank_batch in sampler(40, 40, 4, seed=seed)]

    assert len({*orders(0), *orders(1)}) == 8
    assert orders(0) == orders(0)


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("start", [0, 1, 4, 5, 9])
def test_start_at_a_step_yields_the_tail_of_the_run(start, world_size):
    for rank in range(world_size):
        whole = list(sampler(rank=rank, world_size=world_size))
        resumed = sampler(start=start, rank=rank, world_size=world_size)
        assert list(resumed) == whole[start:]
        assert len(resumed) == len(whole[start:])


def test_start_at_a_late_step_reads_nothing_before_it():
    step = 10**12  # drawing what came before would never end
    (rank_batch,) = sampler(size=7, batch=4, steps=step + 1, start=step)
    assert rank_batch.step == step
    assert [ref.epoch for ref in rank_batch.local] == [(4 * step + i) // 7 for i in range(4)]


def test_asking_for_a_batch_twice_or_out_of_order_changes_nothing():
    one = sampler()
    shuffled = {step: one.global_batch(step) for step in (3, 0, 4, 1, 0, 2)}
    assert [shuffled[step] for step in range(5)] == [rank_batch.global_batch for rank_batch in sampler()]
    assert list(one) == list(one)


@pytest.mark.parametrize("world_size", [5, 7, 13])
def test_parts_that_cannot_be_equal_differ_by_one_image_and_keep_the_order(world_size):
    whole = list(sampler())
    parts = [list(sampler(rank=rank, world_size=world_size)) for rank in range(world_size)]
    for step, rank_batch in enumerate(whole):
        assert [ref for part in parts for ref in part[step].local] == list(rank_batch.local)
        sizes = [len(part[step].local) for part in parts]
        assert max(sizes) - min(sizes) == 1
        assert all(part[step].global_batch == rank_batch.global_batch for part in parts)


def test_epoch_cannot_be_set():
    with pytest.raises(TypeError, match="start_step"):
        sampler().set_epoch(1)


# --- images of similar shape share a batch ---------------------------------------------------------------------------


def shape(ref):
    """As of a photograph in VOC, resized anew in each epoch."""
    rng = random.Random(f"{ref.epoch} {ref.index}")
    sides = (500, rng.choice([375, 375, 375, 375, 333, 334, 332, 335, 360, 400, 500, 281]))
    scale = rng.choice([1, 1, 1, 0.5])
    return tuple(int(side * scale) for side in (sides if rng.random() < 0.25 else sides[::-1]))


def padded_share(batches):
    shapes = [[shape(ref) for ref in batch] for batch in batches]
    held = sum(len(batch) * max(h for h, _ in batch) * max(w for _, w in batch) for batch in shapes)
    return 1 - sum(height * width for batch in shapes for height, width in batch) / held


@pytest.mark.parametrize("window", [1, 2, 3, 8, 1000])
@pytest.mark.parametrize(("size", "batch"), [(10, 12), (12, 12), (7, 3), (100, 12), (3, 12), (24, 4), (97, 4), (50, 1)])
def test_exchanging_images_keeps_every_epoch_in_its_place_and_once(size, batch, window):
    steps = -(-3 * size // batch)
    refs = [
        ref for rank_batch in sampler(size, batch, steps, window=window, shape=shape) for ref in rank_batch.global_batch
    ]
    assert [ref.epoch for ref in refs[: 3 * size]] == [epoch for epoch in range(3) for _ in range(size)]
    for epoch in range(3):
        assert sorted(ref.index for ref in refs if ref.epoch == epoch)[:size] == list(range(size))


@pytest.mark.parametrize("window", [2, 8])
@pytest.mark.parametrize("start", [0, 1, 7, 8, 20])
def test_exchanging_images_depends_on_neither_world_size_nor_start(start, window):
    whole = [rank_batch.global_batch for rank_batch in sampler(100, 6, 40, window=window, shape=shape)]
    for world_size in (1, 2, 4, 7):
        ranks = [
            list(sampler(100, 6, 40, start, rank=rank, world_size=world_size, window=window, shape=shape))
            for rank in range(world_size)
        ]
        for batch, *rank_batches in zip(whole[start:], *ranks, strict=True):
            assert all(rank_batch.global_batch == batch for rank_batch in rank_batches)
            assert [ref for rank_batch in rank_batches for ref in rank_batch.local] == batch
    other = sampler(100, 6, 40, window=window, shape=shape)
    assert {step: other.global_batch(step) for step in (30, 3, 29, 4, 30)} == {s: whole[s] for s in (30, 3, 29, 4)}
    assert whole != [rank_batch.global_batch for rank_batch in sampler(100, 6, 40, seed=1, window=window, shape=shape)]


def test_steps_exchange_images_within_their_window_alone():
    plain = [rank_batch.global_batch for rank_batch in sampler(100, 6, 17)]
    mixed = [rank_batch.global_batch for rank_batch in sampler(100, 6, 17, window=6, shape=shape)]
    # 16 whole batches and four images more: windows of at most six are 6, 6 and 4 steps.
    for window in (range(0, 6), range(6, 12), range(12, 16)):
        before, after = ([ref for step in window for ref in batches[step]] for batches in (plain, mixed))
        assert sorted(before) == sorted(after)
        assert before != after
    assert mixed[16] == plain[16], "begins in one epoch and ends in the next"


def test_a_window_of_one_step_is_the_random_order():
    plain = [rank_batch.global_batch for rank_batch in sampler(100, 6, 40)]
    assert [rank_batch.global_batch for rank_batch in sampler(100, 6, 40, window=1, shape=shape)] == plain
    assert [rank_batch.global_batch for rank_batch in sampler(100, 6, 40, window=8)] == plain


def test_a_late_step_asks_for_the_shapes_of_its_window_alone():
    asked = []

    def noting(ref):
        asked.append(ref)
        return shape(ref)

    step = 10**12 + 5
    (rank_batch,) = sampler(10**4, 4, step + 1, step, window=8, shape=noting)
    assert len(asked) == len(set(asked)) <= 8 * 4
    assert set(rank_batch.global_batch) <= set(asked)


def test_most_of_the_padding_goes():
    plain, mixed = (
        padded_share([rank_batch.global_batch for rank_batch in sampler(1464, 16, 91, window=window, shape=shape)])
        for window in (1, 32)
    )
    assert plain > 0.25
    assert mixed < 0.05


def test_the_order_of_batches_depends_on_no_shape():
    batches = [rank_batch.global_batch for rank_batch in sampler(256, 8, 32, window=32, shape=shape)]
    areas = [max(height * width for height, width in map(shape, batch)) for batch in batches]
    assert areas not in (sorted(areas), sorted(areas, reverse=True))
    changes = [other - one for one, other in itertools.pairwise(areas)]
    assert min(sum(change > 0 for change in changes), sum(change < 0 for change in changes)) >= 5


def test_an_image_of_unknown_shape_is_drawn_like_the_others():
    def faulty(ref):
        if ref.index % 7 == 3:
            raise InputError("broken")
        return shape(ref)

    refs = [ref for rank_batch in sampler(96, 4, 24, window=8, shape=faulty) for ref in rank_batch.global_batch]
    assert sorted(ref.index for ref in refs) == list(range(96))


def test_groups_are_split_where_it_pads_least():
    tall, wide, square = (9, 1), (1, 9), (5, 5)
    shapes = [tall, wide, square, wide, tall, square, wide, wide]
    found = [[shapes[place] for place in batch] for batch in group_by_shape(shapes, 2)]
    assert sorted(found) == [[wide, wide], [wide, wide], [square, square], [tall, tall]]
    assert group_by_shape([(3, 4)] * 6, 2) == [[0, 1], [2, 3], [4, 5]], "equal shapes keep their order"
    assert group_by_shape([(3, 4)] * 3, 1) == [[0], [1], [2]]


# --- evaluation ----------------------------------------------------------------------------------------------------

MIXED = [(4, 6), (6, 4), (4, 6), (5, 5), (6, 4), (4, 6), (4, 6), (5, 5), (4, 6), (6, 4), (9, 9), (4, 6), (4, 6)]
SIZES = {"mixed": MIXED, "equal": [(8, 8)] * 11, "all different": [(i, 3) for i in range(1, 9)], "one": [(2, 2)]}


def batches(sizes, batch_size, rank, world_size):
    return list(EvalSampler(sizes, batch_size=batch_size, rank=rank, world_size=world_size))


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("batch_size", [1, 3, 64])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5, 6, 7])
def test_every_image_is_evaluated_once_among_images_of_its_size(sizes, batch_size, world_size):
    ranks = [batches(sizes, batch_size, rank, world_size) for rank in range(world_size)]
    assert sorted(index for rank in ranks for batch in rank for index in batch) == list(range(len(sizes)))
    for batch in (batch for rank in ranks for batch in rank):
        assert 1 <= len(batch) <= batch_size
        assert len({sizes[index] for index in batch}) == 1
    rank_batches = [sum(map(len, rank)) for rank in ranks]
    assert max(rank_batches) - min(rank_batches) <= 1


@pytest.mark.parametrize("world_size", [2, 3])
def test_each_rank_gets_its_part_of_every_size(world_size):
    ranks = [batches(MIXED, 64, rank, world_size) for rank in range(world_size)]
    for size, count in Counter(MIXED).items():
        parts = [sum(MIXED[index] == size for batch in rank for index in batch) for rank in ranks]
        assert all(count // world_size <= part <= count // world_size + 1 for part in parts)


def test_batches_are_as_full_as_the_sizes_allow():
    # Seven of (4, 6), three of (6, 4), two of (5, 5) and one of (9, 9), at most three each.
    sampler = EvalSampler(MIXED, batch_size=3, rank=0, world_size=1)
    assert len(sampler) == len(list(sampler)) == 3 + 1 + 1 + 1
    assert list(sampler) == list(sampler)


def test_rank_without_images_has_no_batches():
    assert batches([(2, 2), (3, 3)], 4, rank=2, world_size=3) == []
    assert len(EvalSampler([], batch_size=4, rank=0, world_size=1)) == 0
