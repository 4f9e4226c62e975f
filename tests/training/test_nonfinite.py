"""Steps without a finite gradient: counted on the device, undone, and too many of them end the run."""

import pytest
import torch
from torch import nn

from fcn.training.nonfinite import BufferSnapshot, NonFiniteGuard

GOOD, BAD = torch.tensor(True), torch.tensor(False)


def fed(limit: int, pattern: str) -> NonFiniteGuard:
    """A guard after the steps of a text such as "..x.", x for a bad one."""
    guard = NonFiniteGuard(limit, torch.device("cpu"))
    for step, letter in enumerate(pattern):
        guard.record(BAD if letter == "x" else GOOD, step)
    return guard


@pytest.mark.parametrize(
    ("limit", "pattern", "expected"),
    [
        (0, "....", (0, 0, None)),
        (0, "..x.", (1, 0, 2)),
        (0, "x", (1, 1, 0)),
        (1, ".x.x.", (2, 0, None)),
        (1, "x.xx", (3, 2, 3)),
        (3, "xxx.xxx.", (6, 0, None)),
        (3, "xxx.xxxx", (7, 4, 7)),
        (3, "xx", (2, 2, None)),
    ],
)
def test_more_than_the_limit_in_a_row_trip_it(limit, pattern, expected):
    assert fed(limit, pattern).read() == expected


def test_once_tripped_it_stays_so_and_names_the_first_step():
    guard = fed(1, ".xx..xxx")
    skipped, _, tripped_at = guard.read()
    assert (skipped, tripped_at) == (2, 2)


def test_the_gate_lets_every_bit_through_until_it_trips_and_nothing_after():
    loss = torch.tensor(1 / 3, dtype=torch.float64)
    assert torch.equal(loss * fed(2, "xx").gate, loss)
    assert (loss * fed(2, "xxx").gate).isnan()
    assert (loss * fed(2, "xxx....").gate).isnan()


def test_a_resumed_guard_counts_on():
    resumed = NonFiniteGuard(3, torch.device("cpu"))
    resumed.load(fed(3, "x.xx").state())
    resumed.record(BAD, 4)
    assert resumed.read() == (4, 3, None)
    resumed.record(BAD, 5)
    assert resumed.read() == (5, 4, 5)


def network() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2).double())
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 2)
    return model


def test_buffers_come_back_after_a_bad_step_and_stay_after_a_good_one():
    model = network()
    before = [buffer.clone() for buffer in model.buffers()]
    for finite in (BAD, GOOD):
        kept = BufferSnapshot(model)
        model[0].running_mean.fill_(float("nan"))
        model[2].running_var.mul_(3)
        kept.restore_unless(finite)
        if not finite:
            assert all(torch.equal(a, b) for a, b in zip(model.buffers(), before, strict=True))
    assert model[0].running_mean.isnan().all()
    assert torch.equal(model[2].running_var, before[4] * 3)


def test_a_network_without_buffers_needs_nothing():
    model = nn.Conv2d(1, 1, 1)
    BufferSnapshot(model).restore_unless(BAD)
    assert torch.isfinite(model.weight).all()
