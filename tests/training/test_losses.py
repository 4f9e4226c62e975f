"""Each loss against its formula in plain numpy, what ignored pixels may do to it (nothing), and what divides it."""

import inspect
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from fcn.config import Loss
from fcn.config.keys import AddedLosses, options_of
from fcn.data import LabelCounts
from fcn.data.loaders import count_labels
from fcn.errors import InputError
from fcn.training import build_loss
from fcn.training.losses import LOSSES, cross_entropy

WEIGHTS = (0.5, 2.0, 0.0)

# --- the formulas, pixel by pixel, in float64 ----------------------------------------------------------------------


def probabilities(logits):
    exp = np.exp(logits - logits.max(1, keepdims=True))
    return exp / exp.sum(1, keepdims=True)


def valid_pixels(labels):
    return [place for place in np.ndindex(labels.shape) if labels[place] != 255]


def pixel_losses(logits, labels, weights=(1, 1, 1), label_smoothing=0.0):
    """(n, y, x) → loss of a valid pixel: cross-entropy with the smoothed label as target."""
    p, found = probabilities(logits), {}
    for n, y, x in valid_pixels(labels):
        target = np.full(3, label_smoothing / 3)
        target[labels[n, y, x]] += 1 - label_smoothing
        found[n, y, x] = -sum(target[c] * weights[c] * np.log(p[n, c, y, x]) for c in range(3))
    return found


def numpy_cross_entropy(logits, labels, **options):
    return sum(pixel_losses(logits, labels, **options).values())


def numpy_focal(logits, labels, weights=(1, 1, 1), gamma=2.0):
    p = probabilities(logits)
    at_label = [(weights[labels[n, y, x]], p[n, labels[n, y, x], y, x]) for n, y, x in valid_pixels(labels)]
    return sum(-w * (1 - q) ** gamma * np.log(q) for w, q in at_label)


def numpy_ohem(logits, labels, keep=0.25, **options):
    total, losses = 0.0, pixel_losses(logits, labels, **options)
    for image in range(len(labels)):
        own = sorted((loss for place, loss in losses.items() if place[0] == image), reverse=True)
        total += sum(own[: math.ceil(keep * len(own))])
    return total


def over_classes(logits, labels, class_loss):
    """Sum over the images of the mean over the classes there of class_loss(probabilities, is it the label)."""
    total, p = 0.0, probabilities(logits)
    for n, image in enumerate(labels):
        valid = image != 255
        classes = np.unique(image[valid])
        total += sum(class_loss(p[n, c][valid], image[valid] == c) for c in classes) / max(1, len(classes))
    return total


def numpy_dice(logits, labels):
    return over_classes(logits, labels, lambda p, g: 1 - 2 * (p * g).sum() / (p.sum() + g.sum()))


def numpy_lovasz(logits, labels):
    """The Lovász extension of the set function J(M) = |M| / |labelled ∪ M| of the mispredicted pixels M."""

    def extension(p, g):
        errors, mispredicted, value, before = np.where(g, 1 - p, p), set(), 0.0, 0.0
        for pixel in np.argsort(-errors):
            mispredicted.add(pixel)
            jaccard = len(mispredicted) / len(mispredicted | set(np.flatnonzero(g)))
            value += errors[pixel] * (jaccard - before)
            before = jaccard
        return value

    return over_classes(logits, labels, extension)


FORMULAS = {
    "cross_entropy": numpy_cross_entropy, "focal": numpy_focal, "ohem": numpy_ohem,
    "dice": numpy_dice, "lovasz": numpy_lovasz,
}  # fmt: skip
CASES = [
    ("cross_entropy", {}),
    ("cross_entropy", {"weights": WEIGHTS}),
    ("cross_entropy", {"label_smoothing": 0.1}),
    ("cross_entropy", {"weights": WEIGHTS, "label_smoothing": 0.3}),
    ("focal", {}),
    ("focal", {"weights": WEIGHTS, "gamma": 0.5}),
    ("focal", {"gamma": 0.0}),
    ("ohem", {}),
    ("ohem", {"weights": WEIGHTS, "label_smoothing": 0.1, "keep": 0.6}),
    ("dice", {}),
    ("lovasz", {}),
]


def function(name, options):
    """The loss with its options, weights as a tensor."""
    tensors = {key: torch.tensor(value) if key == "weights" else value for key, value in options.items()}
    return lambda logits, labels: LOSSES[name](logits, labels, **tensors)


@pytest.fixture(params=CASES, ids=lambda case: " ".join([case[0], *case[1]]))
def case(request):
    return request.param


@pytest.fixture
def loss(case):
    return function(*case)


def sample(dtype=torch.float64):
    """Three images of three classes, partly ignored; the second lacks a class, the third has no valid pixel."""
    torch.manual_seed(0)
    logits, labels = torch.randn(3, 3, 4, 5).to(dtype), torch.randint(0, 3, (3, 4, 5))
    labels[0, 1] = 255
    labels[1, :, 2] = 255
    labels[1][labels[1] == 2] = 0
    labels[2] = 255
    return logits, labels


def gradient(loss, logits, labels):
    logits = logits.clone().requires_grad_()
    loss(logits, labels).backward()
    return logits.grad


# --- sums ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "relative"), [(torch.float64, 1e-13), (torch.float32, 1e-5)])
def test_sum_is_that_of_the_formula(case, loss, dtype, relative):
    logits, labels = sample(dtype)
    expected = FORMULAS[case[0]](logits.double().numpy(), labels.numpy(), **case[1])
    found = loss(logits, labels)
    assert found.shape == ()
    assert found.dtype == dtype
    assert found.item() == pytest.approx(expected, rel=relative)


def test_gradient_is_that_of_the_sum(loss):
    logits, labels = sample()
    assert torch.autograd.gradcheck(lambda logits: loss(logits, labels), logits.requires_grad_())


def test_the_gradient_of_cross_entropy_is_softmax_minus_one_hot_and_zero_where_ignored():
    logits, labels = sample()
    valid = labels.numpy() != 255
    expected = probabilities(logits.numpy())
    for n, y, x in valid_pixels(labels.numpy()):
        expected[n, labels[n, y, x], y, x] -= 1
    found = gradient(cross_entropy, logits, labels).numpy().transpose(0, 2, 3, 1)
    assert not found[~valid].any()
    np.testing.assert_allclose(found[valid], expected.transpose(0, 2, 3, 1)[valid], rtol=0, atol=1e-15)


@pytest.mark.parametrize("value", [1e30, -1e30, 0.0])
def test_logits_of_ignored_pixels_change_nothing(loss, value):
    logits, labels = sample()
    before, before_gradient = loss(logits, labels), gradient(loss, logits, labels)
    assert not before_gradient.transpose(0, 1)[:, labels == 255].any()
    logits[:, 1][labels == 255] = value
    assert torch.equal(loss(logits, labels), before)
    assert torch.equal(gradient(loss, logits, labels), before_gradient)


@pytest.mark.parametrize("images", [2, 0])
def test_nothing_valid_gives_zero_and_zero_gradients(loss, images):
    logits, labels = torch.randn(images, 3, 4, 5), torch.full((images, 4, 5), 255)
    assert loss(logits, labels).item() == 0
    assert not gradient(loss, logits, labels).any()


@pytest.mark.parametrize(("size", "label"), [((1, 1), 1), ((4, 5), 0)])
def test_one_class_alone_and_one_pixel(case, loss, size, label):
    logits, labels = torch.randn(2, 3, *size).double(), torch.full((2, *size), label)
    expected = FORMULAS[case[0]](logits.numpy(), labels.numpy(), **case[1])
    assert loss(logits, labels).item() == pytest.approx(expected, rel=1e-13)
    assert gradient(loss, logits, labels).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_computed_with_in_float32(loss, dtype):
    logits, labels = sample(dtype)
    with torch.autocast("cpu", dtype):
        found = loss(logits, labels)
    assert found.dtype == torch.float32
    assert torch.equal(found, loss(logits.float(), labels))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_summed_in_float32(dtype):
    # 4096·log 2 = 2839.1; bfloat16 has no number between 2832 and 2848, float16 none between 2838 and 2840.
    found = cross_entropy(torch.zeros(1, 2, 64, 64, dtype=dtype), torch.zeros(1, 64, 64, dtype=torch.int64))
    assert found.item() == pytest.approx(4096 * np.log(2), rel=1e-6)


def test_certain_logits_have_a_finite_loss_and_gradient(loss):
    """Right or wrong beyond what float32 can tell from probabilities 0 and 1."""
    logits, labels = sample(torch.float32)
    assert loss(logits * 1e4, labels).isfinite()
    assert gradient(loss, logits * 1e4, labels).isfinite().all()


@pytest.mark.parametrize("name", ["dice", "lovasz"])
def test_right_prediction_has_no_region_loss_and_wrong_one_the_most(name):
    _, labels = sample()
    right = F.one_hot(labels.clamp(max=2), 3).permute(0, 3, 1, 2).float() * 1e3
    assert LOSSES[name](right, labels).item() == pytest.approx(0, abs=1e-6)
    assert LOSSES[name](right.roll(1, dims=1), labels).item() == pytest.approx(2)  # images with a valid pixel


# --- the loss of a step --------------------------------------------------------------------------------------------


def label_counts(labels):
    return LabelCounts.of(count_labels(labels.numpy().astype(np.uint8)))


@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize(
    "options", [{}, {"label_smoothing": 0.2}, {"name": "focal", "gamma": 0.0}, {"name": "ohem", "keep": 1.0}]
)
def test_mean_of_cross_entropy_is_that_of_pytorch(weights, options):
    """Focal without its factor and OHEM of all pixels are cross-entropy."""
    logits, labels = sample()
    found = build_loss(Loss(weights=weights, **options), 3)(logits, labels, label_counts(labels))
    weight, smoothing = torch.tensor(weights or (1.0,) * 3).double(), options.get("label_smoothing", 0.0)
    expected = F.cross_entropy(logits, labels, weight, ignore_index=255, label_smoothing=smoothing)
    assert found.item() == pytest.approx(expected.item(), rel=1e-14)


def test_each_loss_is_divided_by_its_units():
    logits, labels = sample()
    valid, images = int((labels != 255).sum()), 2
    for name, units in {"focal": valid, "ohem": 0.25 * valid, "dice": images, "lovasz": images}.items():
        found = build_loss(Loss(name=name), 3)(logits, labels, label_counts(labels))
        assert found.item() == pytest.approx(LOSSES[name](logits, labels).item() / units, rel=1e-14)


def test_added_losses_are_weighed():
    logits, labels = sample()
    config = Loss(name="focal", add=AddedLosses(dice=0.5, ohem=2.0), weights=WEIGHTS, gamma=1.0, keep=0.5)
    alone = {
        "focal": Loss(name="focal", weights=WEIGHTS, gamma=1.0),
        "dice": Loss(name="dice"),
        "ohem": Loss(name="ohem", weights=WEIGHTS, keep=0.5),
    }
    parts = {name: build_loss(loss, 3)(logits, labels, label_counts(labels)).item() for name, loss in alone.items()}
    found = build_loss(config, 3)(logits, labels, label_counts(labels))
    assert found.item() == pytest.approx(parts["focal"] + 0.5 * parts["dice"] + 2 * parts["ohem"], rel=1e-14)


def test_parts_of_a_batch_add_up_to_its_loss(case):
    logits, labels = sample()
    criterion = build_loss(Loss(name=case[0], **case[1]), 3)
    parts = [criterion(logits[n : n + 1], labels[n : n + 1], label_counts(labels)).item() for n in range(3)]
    assert sum(parts) == pytest.approx(criterion(logits, labels, label_counts(labels)).item(), rel=1e-14)


def test_batch_without_units_has_loss_zero(case):
    """Nothing valid, or only pixels of a class that weighs nothing."""
    criterion, logits = build_loss(Loss(name=case[0], **case[1]), 3), torch.randn(2, 3, 4, 5)
    for label in (255, 2) if "weights" in case[1] else (255,):
        labels = torch.full((2, 4, 5), label)
        assert criterion(logits, labels, label_counts(labels)).item() == 0
        assert not gradient(lambda x, y: criterion(x, y, label_counts(y)), logits, labels).any()


def test_no_loss_waits_for_the_device(case):
    """Tensors without data: what looks at a value, takes a shape from one, or comes from the host at a step, raises."""
    criterion, counts = build_loss(Loss(name=case[0], **case[1]), 3, "meta"), label_counts(sample()[1])
    logits, labels = torch.empty(3, 3, 4, 5, device="meta"), torch.empty(3, 4, 5, dtype=torch.int64, device="meta")
    assert gradient(lambda x, y: criterion(x, y, counts), logits, labels).shape == logits.shape


@pytest.mark.parametrize("classes", [2, 4])
def test_another_number_of_weights_than_classes_is_the_users_fault(classes):
    with pytest.raises(InputError, match=rf"^loss\.weights: found 3 numbers for a data set of {classes} classes; acc"):
        build_loss(Loss(weights=WEIGHTS), classes)


def test_functions_take_the_options_that_are_listed():
    for name, function in LOSSES.items():
        assert set(inspect.signature(function).parameters) == {"logits", "labels", *options_of(Loss, name)}
