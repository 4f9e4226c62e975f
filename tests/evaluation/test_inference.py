"""What the network sees of an image, and what becomes of its logits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from fcn.evaluation.inference import TTA, infer, predict
from fcn.models import Precision, build_model

CPU = torch.device("cpu")
PLAIN = (0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255)
FP64 = Precision("fp64", True, CPU, *PLAIN)
"""Inputs are the pixels' own numbers."""


class Pointwise(nn.Module):
    """Each pixel's logits are its red, green and blue."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs.clone()


class Recording(nn.Module):
    """Logits that are the mean of the input; remembers what it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[torch.Tensor] = []

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.seen.append(inputs[0])
        return inputs.mean(dim=(2, 3), keepdim=True).expand_as(inputs)


def pictures(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, (*shape, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


SIZES = [(1, 1), (1, 9), (13, 4), (24, 30)]
VIEWS = [
    TTA(),
    TTA(flip=True),
    TTA(scales=(0.5, 1.0, 1.7)),
    TTA((0.6, 2.0), True, (5, 7)),
    TTA(window=(6, 1)),
]


@pytest.mark.parametrize("tta", VIEWS, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_classes_have_the_size_that_is_asked_for(size, tta):
    model = build_model("unet", 4, width=2).eval()
    for wanted in (size, (size[0] * 2, 3)):
        classes = predict(model, pictures(2, *size), wanted, Precision("fp32", True, CPU), tta)
        assert (classes.shape, classes.dtype) == ((2, *wanted), torch.int64)
        assert 0 <= classes.min() <= classes.max() < 4


@pytest.mark.parametrize(
    ("precision", "channels_last", "tta"),
    [
        *((precision, layout, TTA()) for precision in ("fp32", "bf16", "fp64") for layout in (False, True)),
        ("fp32", True, TTA((0.5, 1.0), True, (96, 128))),
    ],
)
def test_scores_of_an_image_do_not_depend_on_its_batch(precision, channels_last, tta):
    """LinkNet at this size has a transposed convolution whose CPU kernel gives five images other bits than one."""
    torch.manual_seed(0)
    precision = Precision(precision, channels_last, CPU)
    model = precision.place(build_model("linknet", 11)).eval()
    images = pictures(5, 180, 240)
    with torch.inference_mode():
        run_on_all_ranks = infer(model, images, (180, 240), precision, tta)
        alone = torch.cat([infer(model, image[None], (180, 240), precision, tta) for image in images])
    assert torch.equal(run_on_all_ranks, alone)


def test_normalisation_is_the_run_s():
    model, images = Recording(), pictures(1, 4, 5)
    infer(model, images, (4, 5), Precision("fp64", True, CPU, (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)))
    expected = (images[0].double() / 255 - torch.tensor([0.1, 0.2, 0.3])) / torch.tensor([0.5, 0.6, 0.7])
    torch.testing.assert_close(model.seen[0], expected.permute(2, 0, 1), rtol=1e-6, atol=1e-6)


# --- windows -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [(1, 1), (5, 5), (6, 30), (24, 4), (23, 29), (24, 30), (99, 99)])
@pytest.mark.parametrize("size", SIZES)
def test_windows_of_a_pointwise_network_give_the_logits_of_the_whole_image(size, window):
    images = pictures(2, *size)
    whole, parts = (infer(Pointwise(), images, size, FP64, TTA(window=shape)) for shape in (None, window))
    torch.testing.assert_close(parts, whole, rtol=1e-15, atol=0)


def test_windows_overlap_by_a_third_and_their_logits_are_averaged():
    """A row of 8 pixels and windows of 3: they begin at 0, 2, 4 and, to end with the row, 5."""
    row = torch.tensor([3, 0, 6, 0, 0, 9, 0, 3], dtype=torch.uint8)
    image = row[None, None, :, None].expand(1, 1, 8, 3)
    model = Recording()
    logits = infer(model, image, (1, 8), FP64, TTA(window=(3, 3)))
    assert [seen[0, 0].tolist() for seen in model.seen] == [[3, 0, 6], [6, 0, 0], [0, 9, 0], [9, 0, 3]]
    # The windows' means are 3, 2, 3, 4; pixels 2, 4, 5 and 6 lie in two of them.
    assert logits[0, 0, 0].tolist() == [3, 3, 2.5, 2, 2.5, 3.5, 3.5, 4]


@pytest.mark.parametrize(
    ("size", "scale", "seen"),
    [((40, 10), 1.0, (16, 10)), ((10, 40), 1.0, (10, 12)), ((16, 12), 1.0, (16, 12)), ((20, 20), 0.5, (10, 10))],
)
def test_a_window_is_as_long_as_the_scaled_image_where_that_is_shorter(size, scale, seen):
    model = Recording()
    infer(model, pictures(1, *size), size, FP64, TTA((scale,), window=(16, 12)))
    assert {tuple(part.shape[1:]) for part in model.seen} == {seen}


# --- flip and scales -----------------------------------------------------------------------------------------------


class EdgeOnTheLeft(nn.Module):
    """Three classes from the differences of neighbours in a row: its mirror image has them the other way."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs - inputs.roll(1, dims=-1)


def test_flip_averages_the_softmax_of_both_directions():
    images = pictures(1, 5, 6)
    found = infer(EdgeOnTheLeft(), images, (5, 6), FP64, TTA(flip=True))
    pixels = images.double().permute(0, 3, 1, 2)
    left, right = (pixels - pixels.roll(shift, dims=-1) for shift in (1, -1))
    torch.testing.assert_close(found, (left.softmax(1) + right.softmax(1)) / 2)


def test_flip_of_a_symmetric_network_changes_no_class():
    images = pictures(2, 9, 14)
    assert torch.equal(*(predict(Pointwise(), images, (9, 14), FP64, TTA(flip=flip)) for flip in (False, True)))


def test_scales_average_the_softmax_at_the_size_of_the_labels():
    """A flat image is flat at any scale: the recording network's logits are the colour, whatever it sees."""
    colour = torch.tensor([10, 12, 11], dtype=torch.uint8)
    model = Recording()
    found = infer(model, colour.expand(1, 6, 10, 3), (7, 5), FP64, TTA((0.5, 1.0, 2.0)))
    assert [tuple(seen.shape[1:]) for seen in model.seen] == [(3, 5), (6, 10), (12, 20)]
    expected = colour.double().softmax(0)[None, :, None, None].expand(1, 3, 7, 5)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("scale", [0.5, 2.0, 3.0])
@pytest.mark.parametrize("upright", [False, True])
def test_edges_stay_where_they_are_at_any_scale(scale, upright):
    """An edge between two pixels, which no shift by a part of a pixel survives, in either direction."""
    image = torch.zeros(1, 24, 36, 3, dtype=torch.uint8)
    image[:, :, :12, 0], image[:, :, 12:, 1] = 255, 255
    image = image.transpose(1, 2).contiguous() if upright else image
    size = tuple(image.shape[1:3])
    assert torch.equal(predict(Pointwise(), image, size, FP64, TTA((scale,))), image.argmax(-1))


@pytest.mark.parametrize("scale", [0.3, 0.5, 1.6, 2.0])
def test_the_network_sees_what_pillow_s_bilinear_resize_gives(scale):
    images, model = pictures(1, 20, 30), Recording()
    infer(model, images, (20, 30), FP64, TTA((scale,)))
    expected = Image.fromarray(images[0].numpy()).resize(
        (round(30 * scale), round(20 * scale)), Image.Resampling.BILINEAR
    )
    assert np.abs(model.seen[0].permute(1, 2, 0).numpy() - np.asarray(expected)).max() < 1.5  # Pillow rounds twice


def test_logits_of_another_size_are_resized_bilinearly():
    logits = infer(Pointwise(), pictures(1, 20, 30), (50, 40), FP64)
    expected = Image.fromarray(pictures(1, 20, 30)[0].numpy()).resize((40, 50), Image.Resampling.BILINEAR)
    assert np.abs(logits[0].permute(1, 2, 0).numpy() - np.asarray(expected)).max() < 1.5  # Pillow rounds twice


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_averages_are_taken_in_float32(precision):
    model = build_model("unet", 4, width=2).eval()
    precision = Precision(precision, True, CPU)
    assert infer(model, pictures(1, 8, 8), (8, 8), precision, TTA((1.0, 2.0))).dtype == torch.float32
    assert infer(model, pictures(1, 8, 8), (8, 8), precision, TTA(window=(4, 4))).dtype == torch.float32
