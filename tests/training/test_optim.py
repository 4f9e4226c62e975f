import math
import random

import numpy as np
import pytest
import torch
from torch import nn

from fcn.config import Optim
from fcn.training.optim import WeightAverage, build_optimizer, learning_rate, set_learning_rate

SCHEDULES = ("poly", "cosine", "step", "constant")


@pytest.mark.parametrize(
    ("schedule", "step", "factor"),
    [
        ("poly", 4, 1),
        ("poly", 9, 0.5**0.9),
        ("poly", 13, 0.1**0.9),
        ("cosine", 4, 1),
        ("cosine", 9, 0.5),
        ("cosine", 13, (1 + math.cos(0.9 * math.pi)) / 2),
        ("constant", 4, 1),
        ("constant", 9, 1),
        ("constant", 13, 1),
    ],
)
def test_rate_at_the_first_middle_and_last_step_after_the_warm_up(schedule, step, factor):
    config = Optim(lr=0.2, schedule=schedule, warmup=4)  # 14 steps: 10 after the warm-up
    assert learning_rate(step, 14, config) == pytest.approx(0.2 * factor, rel=1e-14)


@pytest.mark.parametrize(("step", "factor"), [(0, 1), (59, 1), (60, 0.1), (84, 0.1), (85, 0.01), (99, 0.01)])
def test_step_schedule_multiplies_by_gamma_at_each_milestone(step, factor):
    config = Optim(lr=0.2, schedule="step", milestones=(0.6, 0.85), gamma=0.1)
    assert learning_rate(step, 100, config) == pytest.approx(0.2 * factor, rel=1e-14)


def test_a_milestone_of_n_percent_falls_on_step_n_of_100():
    def first_lowered_step(milestone: float) -> int:
        config = Optim(lr=1.0, schedule="step", milestones=(milestone,), gamma=0.5)
        return [learning_rate(step, 100, config) for step in range(100)].index(0.5)

    percents = range(1, 100)
    assert {n: first_lowered_step(float(f"0.{n:02d}")) for n in percents} == {n: n for n in percents}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warm_up_rises_linearly_to_the_full_rate(schedule):
    config = Optim(lr=0.4, schedule=schedule, warmup=4, milestones=(0.9,))
    rates = [learning_rate(step, 100, config) for step in range(5)]
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4], rel=1e-14)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (5, 5), (5, 9)])
def test_every_step_of_a_short_run_has_a_rate_above_zero(schedule, steps, warmup):
    config = Optim(lr=0.4, schedule=schedule, warmup=warmup)
    assert all(0 < learning_rate(step, steps, config) <= 0.4 for step in range(steps))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_rate_depends_on_the_step_and_not_on_earlier_calls(schedule):
    config = Optim(schedule=schedule, warmup=3)
    in_order = [learning_rate(step, 50, config) for step in range(50)]
    shuffled = random.Random(0).sample(range(50), 50)
    assert [learning_rate(step, 50, config) for step in shuffled] == [in_order[step] for step in shuffled]


def test_set_learning_rate_reaches_every_group():
    optimizer = build_optimizer(nn.Conv2d(2, 2, 3), Optim(lr=0.1))
    set_learning_rate(optimizer, 0.025)
    assert [group["lr"] for group in optimizer.param_groups] == [0.025, 0.025]


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_only_parameters_of_several_dimensions_are_decayed(name):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 2, 2))
    optimizer = build_optimizer(model, Optim(name=name, weight_decay=0.3))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    expected = {
        "0.weight": 0.3, "0.bias": 0, "1.weight": 0, "1.bias": 0, "2.weight": 0.3, "2.bias": 0,
    }  # fmt: skip
    assert {key: decay[id(p)] for key, p in model.named_parameters()} == expected


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_first_step_that_is_skipped_on_the_device_leaves_no_trace(name):
    """Otherwise SGD's momentum would be whatever stood in memory; fp16 skips its first steps as a rule."""
    results = []
    for skipped in (0, 3):
        weight = nn.Parameter(torch.tensor([[1.0, -2.0]]))
        optimizer = build_optimizer(nn.ParameterList([weight]), Optim(name=name, lr=0.1, weight_decay=0.0))
        for step in range(skipped + 2):
            bad = step < skipped
            weight.grad = torch.full((1, 2), float("nan") if bad else 0.5)
            optimizer.grad_scale, optimizer.found_inf = None, torch.tensor(float(bad))
            optimizer.step()
        results.append(weight.detach().clone())
    assert torch.equal(*results)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_frozen_parameters_are_left_out(name):
    model = nn.Linear(3, 2)
    model.weight.requires_grad_(False)
    optimizer = build_optimizer(model, Optim(name=name))
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(held) == 1
    assert held[0] is model.bias


def sgd_by_hand(w, gradients, lr, momentum, decay):
    velocity = np.zeros_like(w)
    for gradient in gradients:
        velocity = momentum * velocity + gradient + decay * w
        w = w - lr * velocity
    return w


def adamw_by_hand(w, gradients, lr, beta1, decay):
    mean, square = np.zeros_like(w), np.zeros_like(w)
    for t, gradient in enumerate(gradients, start=1):
        w = w - lr * decay * w
        mean = beta1 * mean + (1 - beta1) * gradient
        square = 0.999 * square + 0.001 * gradient**2
        w = w - lr * (mean / (1 - beta1**t)) / (np.sqrt(square / (1 - 0.999**t)) + 1e-8)
    return w


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize(("name", "by_hand"), [("sgd", sgd_by_hand), ("adamw", adamw_by_hand)])
def test_steps_equal_the_computation_by_hand(name, by_hand, steps):
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    optimizer = build_optimizer(model, Optim(name=name, lr=0.1, momentum=0.8, weight_decay=0.05))
    start = [p.detach().numpy().copy() for p in (model.weight, model.bias)]
    gradients = [np.random.default_rng(0).normal(size=(steps, *w.shape)) for w in start]
    expected = [by_hand(w, g, 0.1, 0.8, decay) for w, g, decay in zip(start, gradients, (0.05, 0.0), strict=True)]
    for step in range(steps):
        model.weight.grad, model.bias.grad = (torch.from_numpy(g[step].copy()) for g in gradients)
        optimizer.step()
    np.testing.assert_allclose(model.weight.detach().numpy(), expected[0], rtol=0, atol=1e-14)
    np.testing.assert_allclose(model.bias.detach().numpy(), expected[1], rtol=0, atol=1e-14)


def test_the_average_equals_the_computation_by_hand():
    model = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), nn.BatchNorm2d(1))
    average = WeightAverage(model, 0.5)
    weight, mean = float(model[0].weight.detach()), 0.0
    for step, value in enumerate((3.0, -1.0, 4.0, 1.0, 5.0, 9.0, 2.0, 6.0, 5.0, 3.0, 5.0)):
        with torch.no_grad():
            model[0].weight.fill_(value)
            model[1].running_mean.fill_(-value)
            model[1].num_batches_tracked += 1
        average.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        weight, mean = decay * weight + (1 - decay) * value, decay * mean - (1 - decay) * value
        assert float(average.model[0].weight) == pytest.approx(weight, rel=1e-6)
        assert float(average.model[1].running_mean) == pytest.approx(mean, rel=1e-6)
        assert int(average.model[1].num_batches_tracked) == step + 1
    average.reset()
    assert all(torch.equal(a, b) for a, b in zip(average.model.state_dict().values(), model.state_dict().values()))
    assert not average.model.training
    assert model.training


def test_the_average_has_no_part_in_training():
    model = nn.Linear(2, 2)
    average = WeightAverage(model, 0.9)
    assert not any(parameter.requires_grad for parameter in average.model.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not {id(p) for p in average.model.parameters()} & {id(p) for p in model.parameters()}
