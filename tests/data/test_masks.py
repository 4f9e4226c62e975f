"""Each kind of mask pixel becomes the label that its format lists, and anything else is named."""

import re

import numpy as np
import pytest
from PIL import Image

from fcn.config import pixel_classes
from fcn.data import MaskFormat, masks, voc_palette
from fcn.data.labels import CAMVID, VOC
from fcn.errors import InputError

LABELS = np.array([[0, 1, 2], [3, 20, 255]], np.uint8)
VOC_FORMAT = masks.index_format(VOC)


def coloured(labels: np.ndarray) -> Image.Image:
    return Image.fromarray(np.array(voc_palette(256), np.uint8)[labels])


def with_palette(labels: np.ndarray) -> Image.Image:
    mask = Image.fromarray(labels).convert("P")
    mask.putpalette(np.array(voc_palette(256), np.uint8).ravel().tolist())
    return mask


def with_alpha(labels: np.ndarray) -> Image.Image:
    mask = coloured(labels).convert("RGBA")
    mask.putalpha(Image.fromarray((labels * 7).astype(np.uint8)))
    return mask


STORED = {
    "grey": Image.fromarray,
    "palette": with_palette,
    "colours": coloured,
    "colours with alpha": with_alpha,
    "three equal channels": lambda labels: Image.fromarray(np.repeat(labels[..., None], 3, axis=2)),
    "grey with alpha": lambda labels: Image.fromarray(labels).convert("LA"),
    "16 bits": lambda labels: Image.fromarray(labels.astype(np.uint16)),
    "32 bits": lambda labels: Image.fromarray(labels.astype(np.int32)),
}


@pytest.mark.parametrize("stored", STORED)
def test_class_indices_however_they_are_stored(stored):
    assert np.array_equal(VOC_FORMAT.decode(STORED[stored](LABELS), "m.png"), LABELS)


def test_every_voc_colour_is_its_class():
    """Also (128, 128, 128): three equal channels, and class 7, not the value 128."""
    labels = np.arange(21, dtype=np.uint8)[None]
    assert np.array_equal(VOC_FORMAT.decode(coloured(labels), "m.png"), labels)
    assert np.array_equal(VOC_FORMAT.decode(coloured(np.full((1, 2), 7, np.uint8)), "m.png"), [[7, 7]])


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (
            Image.fromarray(np.array([[0, 21, 254, 42]], np.uint8)),
            "m.png: found label 21, 42, 254; accepted: 0 to 20 (21 classes) and 255 for ignore",
        ),
        (Image.fromarray(np.array([[0, 300]], np.uint16)), "m.png: found label 300; accepted: 0 to 20"),
        (Image.fromarray(np.array([[-1, 70000]], np.int32)), "m.png: found label -1, 70000; accepted: 0 to 20"),
        (
            Image.fromarray(np.array([[[1, 2, 3], [128, 0, 0]]], np.uint8)),
            "m.png: found colour #010203; accepted: #000000, #800000",
        ),
        (Image.fromarray(np.array([[[9, 9, 9], [77, 77, 77]]], np.uint8)), "m.png: found label 77; accepted: 0 to 20"),
        (
            Image.fromarray(np.arange(64, 84, dtype=np.uint8)[None]),
            "m.png: found label 64, 65, 66, 67, 68, 69, 70, 71 and 12 more",
        ),
        (Image.fromarray(np.ones((1, 1), np.float32)), "m.png: found a mask in mode F; accepted: 0 to 20"),
    ],
)
def test_what_is_no_class_is_named(mask, message):
    with pytest.raises(InputError) as caught:
        VOC_FORMAT.decode(mask, "m.png")
    assert str(caught.value).startswith(message)


def test_camvid_ignores_11():
    labels = masks.index_format(CAMVID, ignored=(11,)).decode(
        Image.fromarray(np.array([[10, 11, 255]], np.uint8)), "m.png"
    )
    assert labels.tolist() == [[10, 255, 255]]


def test_listed_values_and_the_rest():
    names = ("ground", "tree", "car")
    meaning = pixel_classes(names, {"ground": "rest", "tree": [7, 300], "car": 255, "ignore": 0})
    listed = masks.mapping(meaning.numbers, meaning.colours, meaning.rest)
    stored = np.array([[0, 7, 300, 255, 9, 65535]])
    expected = [[255, 1, 1, 2, 0, 0]]
    assert listed.decode(Image.fromarray(stored.astype(np.uint16)), "m").tolist() == expected
    assert listed.decode(Image.fromarray(stored.astype(np.int32)), "m").tolist() == expected


def test_the_rest_has_255_too(tmp_path):
    """Also where the loss ignores 255, as it does by default: only `ignore` names what is ignored."""
    stored = Image.fromarray(np.array([[0, 255, 7]], np.uint8))
    for values, expected in (
        ({"background": 0, "person": "rest"}, [[0, 1, 1]]),
        ({"background": 0, "person": "rest", "ignore": 255}, [[0, 255, 1]]),
        ({"background": 0, "person": 7, "ignore": "rest"}, [[0, 255, 1]]),
    ):
        meaning = pixel_classes(("background", "person"), values)
        listed = masks.mapping(meaning.numbers, meaning.colours, meaning.rest)
        assert listed.ignoring(255, 2).decode(stored, "m").tolist() == expected
        assert listed.decode(stored.convert("RGB"), "m").tolist() == expected


def test_listed_colours_and_the_rest():
    meaning = pixel_classes(("ground", "tree"), {"ground": "#000000", "tree": ["#00ff00", "#00FE00"], "ignore": "rest"})
    listed = masks.mapping(meaning.numbers, meaning.colours, meaning.rest)
    stored = np.array([[[0, 0, 0], [0, 255, 0], [0, 254, 0], [255, 255, 255]]], np.uint8)
    assert listed.decode(Image.fromarray(stored), "m").tolist() == [[0, 1, 1, 255]]
    # A palette's colours, where numbers are not listed; the same through grey.
    assert listed.decode(Image.fromarray(stored).quantize(4), "m").tolist() == [[0, 1, 1, 255]]
    assert listed.decode(Image.fromarray(stored[..., 0]), "m").tolist() == [[0, 0, 0, 255]]


@pytest.mark.parametrize("rest", ["ignore", "background"])
def test_the_rest_hides_no_other_reading(rest):
    """One bit, and three equal channels, with everything else given to some label."""
    values = {"background": "rest" if rest == "background" else 0, "person": 255}
    values |= {"ignore": "rest"} if rest == "ignore" else {}
    meaning = pixel_classes(("background", "person"), values)
    listed = masks.mapping(meaning.numbers, meaning.colours, meaning.rest)
    assert listed.decode(Image.fromarray(np.array([[True, False]])), "m").tolist() == [[1, 0]]
    grey = np.array([[0, 255, 7]], np.uint8)
    expected = [[0, 1, 255 if rest == "ignore" else 0]]
    for mode in ("L", "RGB", "RGBA"):
        assert listed.decode(Image.fromarray(grey).convert(mode), "m").tolist() == expected
    mixed = pixel_classes(("a", "road"), {"a": 0, "road": [1, "#804080"], "ignore": "rest"})
    listed = masks.mapping(mixed.numbers, mixed.colours, mixed.rest)
    assert listed.decode(Image.fromarray(np.array([[0, 1, 2]], np.uint8)).convert("RGB"), "m").tolist() == [[0, 1, 255]]
    colours = np.array([[[0x80, 0x40, 0x80], [9, 8, 7]]], np.uint8)
    assert listed.decode(Image.fromarray(colours), "m").tolist() == [[1, 255]]


def test_a_palette_that_was_sorted_anew_is_read_by_its_colours():
    labels = np.array([[0, 15, 255, 15]], np.uint8)
    adaptive = coloured(labels).convert("P", palette=Image.Palette.ADAPTIVE, colors=8)
    assert not np.array_equal(adaptive, labels)
    assert np.array_equal(VOC_FORMAT.decode(adaptive, "m.png"), labels)


def test_one_bit_masks_are_0_and_1_or_0_and_255():
    mask = Image.fromarray(np.array([[True, False]]))
    assert masks.mapping({0: 0, 1: 1}, {}).decode(mask, "m").tolist() == [[1, 0]]
    assert masks.mapping({0: 0, 255: 1}, {}).decode(mask, "m").tolist() == [[1, 0]]


def test_255_is_ignored_unless_it_is_listed():
    mask = Image.fromarray(np.array([[0, 255]], np.uint8))
    assert masks.mapping({0: 0, 1: 1}, {}).decode(mask, "m").tolist() == [[0, 255]]
    assert masks.mapping({0: 0, 255: 1}, {}).decode(mask, "m").tolist() == [[0, 1]]


def test_a_jpeg_mask_is_told_to_be_one(tmp_path):
    stripes = np.tile(np.array([0, 20], np.uint8).repeat(3), (16, 8))
    Image.fromarray(stripes).save(tmp_path / "m.jpg", quality=30)
    with Image.open(tmp_path / "m.jpg") as mask, pytest.raises(InputError, match="JPEG does not keep labels, export"):
        VOC_FORMAT.decode(mask, "m.jpg")


def test_numbers_are_no_colours_nor_colours_numbers():
    deep, colourful = Image.fromarray(np.zeros((2, 2), np.uint16)), Image.new("RGB", (2, 2), (1, 2, 3))
    with pytest.raises(InputError, match=r"m: found a mask in mode I;16; accepted: #ff0000 \(1 classes\)"):
        masks.mapping({}, {(255, 0, 0): 0}).decode(deep, "m")
    with pytest.raises(InputError, match=r"m: found a mask in mode RGB; accepted: 0 \(1 classes\) and 255 for ignore"):
        masks.mapping({0: 0}, {}).decode(colourful, "m")


@pytest.mark.parametrize(("threshold", "expected"), [(0, [0, 1, 1, 1]), (1, [0, 0, 1, 1]), (127, [0, 0, 0, 1])])
@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "I;16"])
def test_any_grey_above_the_threshold_is_a_person(threshold, expected, mode):
    grey = np.array([[0, 1, 127, 255]], np.uint8)
    matte = Image.fromarray(grey.astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(grey).convert(mode)
    assert matte.mode == mode
    assert MaskFormat(threshold=threshold).decode(matte, "m").tolist() == [expected]


@pytest.mark.parametrize(("label", "expected"), [(255, [0, 1, 9, 255]), (1, [0, 255, 9, 255]), (0, [255, 1, 9, 255])])
def test_one_more_label_may_be_ignored(label, expected):
    mask = Image.fromarray(np.array([[0, 1, 9, 255]], np.uint8))
    assert VOC_FORMAT.ignoring(label, 21).decode(mask, "m").tolist() == [expected]


def test_a_value_that_is_no_class_may_be_ignored():
    mask = Image.fromarray(np.array([[0, 99]], np.uint8))
    assert VOC_FORMAT.ignoring(99, 21).decode(mask, "m").tolist() == [[0, 255]]
    assert masks.mapping({0: 0, 99: 1}, {}).ignoring(99, 2).decode(mask, "m").tolist() == [[0, 1]], "it is a class here"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"a": 0, "b": 1, "c": 2}, "c: is no class; accepted: a, b, ignore"),
        ({"a": 0}, "found nothing for b; accepted: an entry for every class"),
        ({"a": 0, "b": 0}, "b: found 0, which another entry has; keep one"),
        ({"a": 0, "b": ["#ffffff", "#FFFFFF"]}, "b: found #FFFFFF, which another entry has"),
        ({"a": "rest", "b": "rest"}, "b: found the text 'rest'; accepted: a number from 0 to 65535"),
        ({"a": 0, "b": None}, "b: found null; accepted: a number from 0 to 65535, a colour in quotes such as"),
        ({"a": 0, "b": "#12345"}, "b: found the text '#12345'; accepted:"),
        ({"a": 0, "b": -1}, "b: found -1; accepted:"),
        ({"a": 0, "b": 65536}, "b: found 65536; accepted:"),
        ({"a": 0, "b": True}, "b: found true; accepted:"),
        ({"a": 0, "b": [[1]]}, "b: found [1]; accepted:"),
    ],
)
def test_values_that_cannot_be_read_are_refused(values, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        pixel_classes(("a", "b"), values)
