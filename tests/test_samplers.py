"""The data of a step is the same for any number of processes, and no image is lost or doubled."""

from collections import Counter

import pytest

from fcn.data.samplers import EvalSampler, GlobalBatchSampler

WORLDS = [1, 2, 3, 4, 6]


def sampler(size=10, batch=12, steps=5, start=0, seed=0, rank=0, world=1):
    return GlobalBatchSampler(
        range(size), batch_size=batch, steps=steps, start_step=start, seed=seed, rank=rank, world_size=world
    )


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("size", [5, 10, 12, 100])
def test_ranks_together_draw_the_global_batch_whatever_their_number(size, world):
    alone = list(sampler(size))
    ranks = [list(sampler(size, rank=rank, world=world)) for rank in range(world)]
    assert len(alone) == 5
    for step, (single, *shares) in enumerate(zip(alone, *ranks)):
        assert single.mine == single.all
        assert len(single.all) == 12
        assert [share.step for share in shares] == [step] * world
        assert all(share.all == single.all for share in shares)
        assert all(len(share.mine) == 12 // world for share in shares)
        assert [draw for share in shares for draw in share.mine] == single.all


@pytest.mark.parametrize(("size", "batch", "steps"), [(10, 12, 5), (12, 12, 4), (7, 3, 14), (100, 12, 25), (3, 12, 6)])
def test_each_epoch_draws_each_index_once(size, batch, steps):
    draws = [draw for share in sampler(size, batch, steps) for draw in share.all]
    epochs = batch * steps // size
    assert [draw.epoch for draw in draws] == [epoch for epoch in range(epochs) for _ in range(size)]
    for epoch in range(epochs):
        assert sorted(draw.index for draw in draws if draw.epoch == epoch) == list(range(size))


def test_epochs_and_seeds_have_orders_of_their_own():
    def orders(seed):
        return [tuple(draw.index for draw in share.all) for share in sampler(40, 40, 4, seed=seed)]

    assert len({*orders(0), *orders(1)}) == 8
    assert orders(0) == orders(0)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("start", [0, 1, 4, 5, 9])
def test_start_at_a_step_yields_the_tail_of_the_run(start, world):
    for rank in range(world):
        whole = list(sampler(rank=rank, world=world))
        resumed = sampler(start=start, rank=rank, world=world)
        assert list(resumed) == whole[start:]
        assert len(resumed) == len(whole[start:])


def test_start_at_a_late_step_reads_nothing_before_it():
    step = 10**12  # drawing what came before would never end
    (share,) = sampler(size=7, batch=4, steps=step + 1, start=step)
    assert share.step == step
    assert [draw.epoch for draw in share.mine] == [(4 * step + i) // 7 for i in range(4)]


def test_asking_for_a_batch_twice_or_out_of_order_changes_nothing():
    one = sampler()
    shuffled = {step: one.global_batch(step) for step in (3, 0, 4, 1, 0, 2)}
    assert [shuffled[step] for step in range(5)] == [share.all for share in sampler()]
    assert list(one) == list(one)


@pytest.mark.parametrize("world", [5, 7, 13])
def test_parts_that_cannot_be_equal_differ_by_one_image_and_keep_the_order(world):
    whole = list(sampler())
    parts = [list(sampler(rank=rank, world=world)) for rank in range(world)]
    for step, share in enumerate(whole):
        assert [draw for part in parts for draw in part[step].mine] == list(share.mine)
        sizes = [len(part[step].mine) for part in parts]
        assert max(sizes) - min(sizes) == 1
        assert all(part[step].all == share.all for part in parts)


def test_epoch_cannot_be_set():
    with pytest.raises(TypeError, match="start_step"):
        sampler().set_epoch(1)


# --- evaluation ----------------------------------------------------------------------------------------------------

MIXED = [(4, 6), (6, 4), (4, 6), (5, 5), (6, 4), (4, 6), (4, 6), (5, 5), (4, 6), (6, 4), (9, 9), (4, 6), (4, 6)]
SIZES = {"mixed": MIXED, "equal": [(8, 8)] * 11, "all different": [(i, 3) for i in range(1, 9)], "one": [(2, 2)]}


def batches(sizes, batch_size, rank, world):
    return list(EvalSampler(sizes, batch_size=batch_size, rank=rank, world_size=world))


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("batch_size", [1, 3, 64])
@pytest.mark.parametrize("world", [1, 2, 3, 4, 5, 6, 7])
def test_every_image_is_evaluated_once_among_images_of_its_size(sizes, batch_size, world):
    ranks = [batches(sizes, batch_size, rank, world) for rank in range(world)]
    assert sorted(index for rank in ranks for batch in rank for index in batch) == list(range(len(sizes)))
    for batch in (batch for rank in ranks for batch in rank):
        assert 1 <= len(batch) <= batch_size
        assert len({sizes[index] for index in batch}) == 1
    shares = [sum(map(len, rank)) for rank in ranks]
    assert max(shares) - min(shares) <= 1


@pytest.mark.parametrize("world", [2, 3])
def test_each_rank_gets_its_part_of_every_size(world):
    ranks = [batches(MIXED, 64, rank, world) for rank in range(world)]
    for size, count in Counter(MIXED).items():
        parts = [sum(MIXED[index] == size for batch in rank for index in batch) for rank in ranks]
        assert all(count // world <= part <= count // world + 1 for part in parts)


def test_batches_are_as_full_as_the_sizes_allow():
    # Seven of (4, 6), three of (6, 4), two of (5, 5) and one of (9, 9), at most three each.
    sampler = EvalSampler(MIXED, batch_size=3, rank=0, world_size=1)
    assert len(sampler) == len(list(sampler)) == 3 + 1 + 1 + 1
    assert list(sampler) == list(sampler)


def test_rank_without_images_has_no_batches():
    assert batches([(2, 2), (3, 3)], 4, rank=2, world=3) == []
    assert len(EvalSampler([], batch_size=4, rank=0, world_size=1)) == 0
