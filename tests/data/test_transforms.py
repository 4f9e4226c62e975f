"""Training transforms compute what a plain resize and crop would, and the network's input is normalised exactly."""

import math
import random
from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import interpolate
from torchvision.transforms import functional, v2

from fcn.data import EvalTransform, TrainTransform, to_input
from fcn.data.transforms import resize_factors, resize_windows, source_span
from fcn.seeding import generator

SCALES = [0.4, 0.75, 1.0, 1.37, 2.0]
MEAN = np.array([0.485, 0.456, 0.406])
STD = np.array([0.229, 0.224, 0.225])


def picture(height, width, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def grey(height, width, values, seed=0):
    return Image.fromarray(np.random.default_rng(seed).choice(np.array(values, np.uint8), (height, width)))


def coordinates(height, width):
    """Labels that name their row and column: row 0..15 and column 0..15 in one byte."""
    rows, columns = np.mgrid[:height, :width]
    return Image.fromarray((rows * 16 + columns).astype(np.uint8))


def test_result_does_not_depend_on_the_order_of_the_samples():
    images = [(picture(40, 50, seed), grey(40, 50, range(7), seed)) for seed in range(6)]

    def results(order):
        transform = TrainTransform((24, 24), (0.5, 2.0), 0.5)
        return {index: transform(*images[index], generator(0, "augment", 3, index)) for index in order}

    forward, shuffled = results(range(6)), results([4, 1, 5, 0, 3, 2])
    for index in range(6):
        assert np.array_equal(forward[index][0], shuffled[index][0])
        assert np.array_equal(forward[index][1], shuffled[index][1])


@pytest.mark.parametrize("crop", [(24, 20), (200, 16), None])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("seed", range(6))
def test_crop_before_resize_equals_crop_of_the_resized_image(scale, seed, crop):
    """Of one resized by PyTorch to the bit, of one resized in float64 to one grey level; the nearest labels."""
    height, width = 83, 71
    image, labels = picture(height, width), grey(height, width, range(20))
    transform = TrainTransform(crop, (scale, scale), 0.5)
    plan = transform.plan((height, width), generator(seed, "test"))
    result, classes = transform(image, labels, generator(seed, "test"))

    full_height, full_width = int(height / plan.step), int(width / plan.step)
    window = np.s_[plan.top : plan.top + plan.height, plan.left : plan.left + plan.width]

    def whole(pixels):
        source = torch.from_numpy(pixels).permute(2, 0, 1)[None]
        factor = float(1 / plan.step) + 1e-12
        resized = interpolate(source, scale_factor=factor, mode="bilinear", antialias=True)[0].permute(1, 2, 0).numpy()
        assert resized.shape == (full_height, full_width, 3)
        return resized[window]

    expected, exact = whole(np.array(image)), whole(np.array(image, np.float64))
    rows, columns = (
        [math.floor((i + Fraction(1, 2)) * plan.step) for i in range(full)] for full in (full_height, full_width)
    )
    expected_classes = np.asarray(labels)[rows][:, columns][window]
    if plan.flip:
        expected, exact, expected_classes = expected[:, ::-1], exact[:, ::-1], expected_classes[:, ::-1]
    assert result.shape == (plan.height, plan.width, 3)
    assert (plan.height, plan.width) == tuple(map(min, (full_height, full_width), crop or (999, 999)))
    assert np.array_equal(result, expected)
    assert np.abs(result - exact).max() <= 1 + 1e-6
    assert np.array_equal(classes, expected_classes)


@pytest.mark.parametrize(
    ("low", "high", "factors"),
    [
        (0.5, 2.0, [m / 32 for m in range(16, 65)]),
        (0.75, 0.75, [0.75]),
        (0.4, 0.4, [0.4]),
        (1.01, 1.02, [1.0]),
        (1.37, 1.37, [37 / 27]),
    ],
)
def test_a_random_resize_draws_from_fractions_in_its_range(low, high, factors):
    assert [float(factor) for factor in resize_factors(low, high)] == factors


def test_only_pixels_near_the_crop_are_resized():
    """A resize of the whole would mean up to 1000 x 1000 pixels; beside the crop, up to 70 a side are computed."""
    rng = random.Random(0)
    transform = TrainTransform((480, 480), (0.5, 2.0), 0.5)
    for _ in range(300):
        plan = transform.plan((500, 500), rng)
        for start, length in ((plan.top, plan.height), (plan.left, plan.width)):
            first, end, before = source_span(start, length, 500, plan.step)
            assert 0 <= first < end <= 500
            assert before <= 66
            assert (end - first) / plan.step <= length + 72


@pytest.mark.parametrize("seed", range(8))
def test_without_resize_the_result_is_a_window_of_the_source(seed):
    image = picture(16, 16)
    result, classes = TrainTransform((7, 9), None, 0.0)(image, coordinates(16, 16), generator(seed, "test"))
    top, left = divmod(int(classes[0, 0]), 16)
    assert np.array_equal(classes, np.asarray(coordinates(16, 16))[top : top + 7, left : left + 9])
    assert np.array_equal(result, np.asarray(image)[top : top + 7, left : left + 9])


def test_every_crop_position_is_drawn_equally_often():
    labels = coordinates(5, 6)
    transform = TrainTransform((3, 3), None, 0.0)
    corners = [int(transform(picture(5, 6), labels, generator(0, "test", i))[1][0, 0]) for i in range(1200)]
    # Twelve positions of 100: chi-square with 11 degrees of freedom is below 31.3 in 99.9 % of fair draws.
    counts = np.bincount(corners, minlength=256)
    assert np.flatnonzero(counts).tolist() == [16 * row + column for row in range(3) for column in range(4)]
    assert ((counts[counts > 0] - 100) ** 2 / 100).sum() < 31.3


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("values", [(0, 255), (3, 20), (0, 1, 2, 254)])
def test_labels_never_get_a_value_that_was_not_in_the_source(scale, values):
    labels = grey(61, 47, values)
    for seed in range(4):
        _, classes = TrainTransform((32, 32), (scale, scale), 0.5)(picture(61, 47), labels, generator(seed, "test"))
        assert set(np.unique(classes).tolist()) <= set(values)


@pytest.mark.parametrize("scale", [None, (0.7, 0.7), (1.6, 1.6)])
def test_flip_turns_image_and_labels(scale):
    image, labels = picture(30, 20), grey(30, 20, range(9))
    straight = TrainTransform((16, 16), scale, 0.0)(image, labels, generator(1, "test"))
    flipped = TrainTransform((16, 16), scale, 1.0)(image, labels, generator(1, "test"))
    assert np.array_equal(flipped[0], np.flip(straight[0], axis=1))
    assert np.array_equal(flipped[1], np.flip(straight[1], axis=1))
    assert not np.array_equal(flipped[1], straight[1])


@pytest.mark.parametrize(("probability", "low", "high"), [(0.0, 0, 0), (0.25, 200, 300), (1.0, 1000, 1000)])
def test_flip_has_its_probability(probability, low, high):
    transform = TrainTransform(None, None, probability)
    # Four standard deviations of 1000 draws at 0.25 are 55.
    assert low <= sum(transform.plan((4, 4), generator(0, "test", i)).flip for i in range(1000)) <= high


COLOURS = (0.4, 0.4, 0.4, 0.2)


def test_colours_change_pixels_and_never_labels():
    image, labels = picture(20, 30), grey(20, 30, [0, 1, 255])
    for seed in range(20):
        pixels, classes = TrainTransform(None, None, 0.0, COLOURS)(image, labels, random.Random(seed))
        assert pixels.shape == (20, 30, 3)
        assert pixels.dtype == np.uint8
        assert not np.array_equal(pixels, np.asarray(image))
        assert np.array_equal(classes, np.asarray(labels))


def test_geometry_does_not_depend_on_the_colours():
    image, labels = picture(40, 50), grey(40, 50, range(7))
    for seed in range(20):
        plain, jittered = (
            TrainTransform((16, 16), (0.5, 2.0), 0.5, colours)(image, labels, random.Random(seed))[1]
            for colours in (None, COLOURS)
        )
        assert np.array_equal(plain, jittered)


@pytest.mark.parametrize(
    ("place", "adjust"),
    [(0, "adjust_brightness"), (1, "adjust_contrast"), (2, "adjust_saturation"), (3, "adjust_hue")],
)
def test_each_colour_change_is_torchvisions_within_its_bounds(place, adjust):
    """One kind at a time, with the largest change found by search among torchvision's results."""
    image, labels = picture(12, 12), grey(12, 12, [0])
    bound = 0.3
    colours = tuple(bound if other == place else 0.0 for other in range(4))
    centre = 0 if place == 3 else 1
    reachable = {
        np.asarray(getattr(functional, adjust)(image, centre + step / 2000)).tobytes()
        for step in range(-round(bound * 2000), round(bound * 2000) + 1)
    }
    seen = set()
    for seed in range(30):
        pixels, _ = TrainTransform(None, None, 0.0, colours)(image, labels, random.Random(seed))
        seen.add(pixels.tobytes())
        apart = [
            np.abs(pixels.astype(int) - np.frombuffer(other, np.uint8).reshape(pixels.shape)).max()
            for other in reachable
        ]
        nearest = min(apart)
        assert nearest <= 2, "between two neighbours of the search"
    assert len(seen) > 20


def test_colours_of_a_sample_follow_from_its_generator():
    image, labels = picture(20, 30), grey(20, 30, [0])
    one, again, other = (
        TrainTransform(None, None, 0.0, COLOURS)(image, labels, random.Random(seed))[0] for seed in (3, 3, 4)
    )
    assert np.array_equal(one, again)
    assert not np.array_equal(one, other)


def test_scale_stays_in_its_range_and_keeps_the_shape_of_the_image():
    transform = TrainTransform(None, (0.5, 2.0), 0.0)
    plans = [transform.plan((100, 200), generator(0, "test", i)) for i in range(300)]
    assert all(50 <= plan.height <= 200 and abs(plan.width - 2 * plan.height) <= 1 for plan in plans)
    assert min(plan.height for plan in plans) < 55
    assert max(plan.height for plan in plans) > 195
    assert all((plan.top, plan.left) == (0, 0) for plan in plans)


@pytest.mark.parametrize(
    ("size", "crop", "expected"),
    [
        ((10, 12), (32, 32), (10, 12)),
        ((10, 64), (32, 32), (10, 32)),
        ((64, 12), (32, 32), (32, 12)),
        ((10, 12), None, (10, 12)),
    ],
)
def test_image_smaller_than_the_crop_stays(size, crop, expected):
    result, classes = TrainTransform(crop, None, 0.0)(picture(*size), grey(*size, [1, 2]), generator(0, "test"))
    assert (result.shape, classes.shape) == ((*expected, 3), expected)
    if expected == size:
        assert np.array_equal(result, picture(*size))
        assert np.array_equal(classes, grey(*size, [1, 2]))


@pytest.mark.parametrize("crop", [(5, 5), (64, 64), None])
@pytest.mark.parametrize("size", [(1, 1), (1, 300), (7, 3), (375, 500), (333, 499)])
def test_a_crop_never_leaves_the_resized_image(size, crop):
    transform = TrainTransform(crop, (0.01, 3.0), 0.5)
    for i in range(200):
        plan = transform.plan(size, generator(0, "test", i))
        for start, length, side in ((plan.top, plan.height, size[0]), (plan.left, plan.width, size[1])):
            assert length >= 1
            assert 0 <= start <= max(1, side / plan.step) - length
    for i in range(20):
        pixels, classes = transform(picture(*size), grey(*size, [0, 1]), generator(0, "test", i))
        plan = transform.plan(size, generator(0, "test", i))
        assert (pixels.shape, classes.shape) == ((plan.height, plan.width, 3), (plan.height, plan.width))


class Largest(random.Random):
    def random(self):
        return math.nextafter(1.0, 0.0)


@pytest.mark.parametrize("size", [(37, 53), (375, 500), (333, 499)])
@pytest.mark.parametrize("scale", [0.51, 0.77, 1.3, 1.9])
def test_the_last_crop_position_is_inside(size, scale):
    transform = TrainTransform((16, 16), (scale, scale), 0.5)
    result, classes = transform(picture(*size), grey(*size, [0, 1]), Largest())
    assert (result.shape, classes.shape) == ((16, 16, 3), (16, 16))


@pytest.mark.parametrize("scale", [0.6, 0.83, 1.0, 1.29, 1.9])
@pytest.mark.parametrize("seed", range(3))
def test_image_and_labels_stay_aligned(scale, seed):
    blocks = np.random.default_rng(seed).integers(0, 12, (8, 10), np.uint8)
    labels = np.kron(blocks, np.ones((16, 16), np.uint8))
    image = np.repeat(labels[..., None] * 20, 3, axis=2)
    transform = TrainTransform((64, 64), (scale, scale), 0.5)
    pixels, classes = transform(Image.fromarray(image), Image.fromarray(labels), generator(seed, "test"))
    # Away from edges, which a resize blurs by one source pixel: all neighbours within two have one label.
    near = np.lib.stride_tricks.sliding_window_view(classes, (5, 5))
    flat = (near == classes[2:-2, 2:-2, None, None]).all(axis=(2, 3))
    assert flat.mean() > 0.3
    assert np.array_equal(pixels[2:-2, 2:-2][flat], np.repeat(classes[2:-2, 2:-2][flat][:, None] * 20, 3, axis=1))


# --- the resize on the device ---------------------------------------------------------------------------------------

SIZES = [(83, 71), (40, 90), (9, 200), (64, 64), (1, 5)]


def windows_of(transform, sizes):
    """(windows (N, H, W, 3), grids, what the resize on the CPU gives) of one image of each size."""
    sources = [(picture(*size, i), grey(*size, [0])) for i, size in enumerate(sizes)]
    samples = [transform.window(*source, generator(i, "test")) for i, source in enumerate(sources)]
    expected = [transform(*source, generator(i, "test"))[0] for i, source in enumerate(sources)]
    # Beside the windows stands garbage.
    stacked = np.random.default_rng(9).integers(0, 256, (len(sizes), 99, 222, 3), np.uint8)
    for row, (pixels, _, _) in zip(stacked, samples, strict=True):
        row[: pixels.shape[0], : pixels.shape[1]] = pixels
    return torch.from_numpy(stacked), torch.from_numpy(np.stack([grid for *_, grid in samples])), expected


@pytest.mark.parametrize("hflip", [0.0, 1.0])
@pytest.mark.parametrize("scale", [None, (0.5, 2.0), (0.3, 0.3), (0.75, 0.75), (1.5, 1.5), (2.0, 2.0)])
def test_a_batch_resized_on_the_device_is_the_loaders_to_one_grey_level(scale, hflip):
    windows, grids, expected = windows_of(TrainTransform((48, 56), scale, hflip), SIZES)
    found = resize_windows(windows, grids, (48, 56))
    assert (found.dtype, found.shape) == (torch.uint8, (len(SIZES), 48, 56, 3))
    for image, wanted in zip(found.numpy(), expected, strict=True):
        height, width = wanted.shape[:2]
        assert np.abs(image[:height, :width].astype(int) - wanted).max() <= (1 if scale else 0)
        assert not image[height:].any()
        assert not image[:, width:].any()


def test_an_image_resized_on_the_device_does_not_depend_on_its_batch():
    """To the bit: in another order, alone, with other padding, and summed in another order."""
    windows, grids, _ = windows_of(TrainTransform((48, 56), (0.5, 2.0), 0.5), SIZES)
    run_on_all_ranks = resize_windows(windows, grids, (48, 56))
    order = [3, 1, 4, 0, 2]
    assert torch.equal(resize_windows(windows[order], grids[order], (48, 56)), run_on_all_ranks[order])
    wide = torch.nn.functional.pad(windows, (0, 0, 0, 70, 0, 31))
    for i in range(len(SIZES)):
        assert torch.equal(resize_windows(wide[i : i + 1], grids[i : i + 1], (48, 56))[0], run_on_all_ranks[i])
    none = torch.zeros(0, 9, 9, 3, dtype=torch.uint8)
    assert resize_windows(none, torch.zeros(0, 2, 5, dtype=torch.float64), (48, 56)).shape == (0, 48, 56, 3)


# --- evaluation presets ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(30, 41), (41, 30), (375, 500), (700, 520), (1, 3)])
def test_short520_is_what_the_reference_does(size):
    """torchvision's references/segmentation: RandomResize(520, 520), on Pillow images."""
    image, labels = picture(*size), grey(*size, range(21))
    found = EvalTransform("short520")(image, labels)
    expected = (
        v2.functional.resize(image, [520], antialias=True),
        v2.functional.resize(labels, [520], v2.InterpolationMode.NEAREST),
    )
    assert min(found[0].size) == 520
    assert all(np.array_equal(*pair) for pair in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("size", "crop", "rows", "columns"),
    [
        ((10, 16), (4, 6), slice(3, 7), slice(5, 11)),
        ((11, 16), (4, 99), slice(3, 7), slice(0, 16)),
        ((3, 5), (8, 8), slice(0, 3), slice(0, 5)),
    ],
)
def test_center_crop_is_the_middle_of_image_and_labels(size, crop, rows, columns):
    image, labels = picture(*size), coordinates(*size)
    cut, classes = EvalTransform("center_crop", crop)(image, labels)
    assert np.array_equal(cut, np.asarray(image)[rows, columns])
    assert np.array_equal(classes, np.asarray(labels)[rows, columns])


def test_native_leaves_everything_as_it_is():
    image, labels = picture(30, 41), coordinates(30, 41)
    assert EvalTransform()(image, labels) == (image, labels)


# --- uint8 → the network's input -----------------------------------------------------------------------------------


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 2e-6)])
def test_input_is_normalised(dtype, tolerance, channels_last):
    images = np.random.default_rng(0).integers(0, 256, (2, 5, 7, 3), np.uint8)
    images[0, 0, 0], images[0, 0, 1] = 0, 255
    expected = ((images.astype(np.float64) / 255 - MEAN) / STD).transpose(0, 3, 1, 2)
    result = to_input(torch.from_numpy(images), None, dtype, channels_last)
    assert (result.dtype, result.shape) == (dtype, (2, 3, 5, 7))
    assert np.abs(result.double().numpy() - expected).max() < tolerance
    assert result.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


@pytest.mark.parametrize("value", [0, 1, 124, 255])
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_padding_is_exactly_zero_whatever_stands_there(value, channels_last, dtype):
    images = torch.full((3, 6, 8, 3), value, dtype=torch.uint8)
    sizes = torch.tensor([[6, 8], [4, 8], [2, 3]])
    result = to_input(images, sizes, dtype, channels_last)
    whole = to_input(images, None, dtype, channels_last)
    assert (whole != 0).all()
    for row, (height, width) in enumerate(sizes.tolist()):
        assert torch.equal(result[row, :, :height, :width], whole[row, :, :height, :width])
        outside = torch.ones(6, 8, dtype=torch.bool)
        outside[:height, :width] = False
        assert (result[row][:, outside] == 0).all()
    assert result.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
