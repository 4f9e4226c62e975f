"""Class names and palettes are those that the data sets' authors published."""

import numpy as np
import pytest
from PIL import Image

from fcn.data import IGNORE_INDEX, Classes, voc_palette
from fcn.data.labels import CAMVID, CAMVID_UNLABELLED, SHAPES, VOC


@pytest.mark.parametrize(
    ("index", "colour"),
    [
        (0, (0, 0, 0)),
        (1, (128, 0, 0)),
        (2, (0, 128, 0)),
        (3, (128, 128, 0)),
        (4, (0, 0, 128)),
        (8, (64, 0, 0)),
        (15, (192, 128, 128)),
        (20, (0, 64, 128)),
        (255, (224, 224, 192)),
    ],
)
def test_voc_palette_has_the_published_colours(index, colour):
    assert voc_palette(256)[index] == colour


def test_voc_palette_equals_that_of_the_real_masks(voc_root):
    with Image.open(next((voc_root / "SegmentationClass").iterdir())) as mask:
        assert np.array_equal(np.array(mask.getpalette()).reshape(-1, 3), voc_palette(256))


def test_voc_palette_has_256_different_colours():
    assert len(set(voc_palette(256))) == 256


@pytest.mark.parametrize(("classes", "count"), [(VOC, 21), (SHAPES, 7), (CAMVID, 11)])
def test_every_class_has_a_name_and_a_colour_of_its_own(classes, count):
    assert len(classes) == len(set(classes.names)) == len(set(classes.palette)) == count
    assert all(0 <= value <= 255 for colour in classes.palette for value in colour)


def test_known_class_indices():
    assert (VOC.names[15], VOC.names[20], CAMVID.names[0], CAMVID.names[8], CAMVID.names[10]) == (
        "person", "tvmonitor", "sky", "car", "bicyclist",
    )  # fmt: skip
    assert IGNORE_INDEX == 255
    assert len(CAMVID) == CAMVID_UNLABELLED


def test_names_without_colours_are_refused():
    with pytest.raises(AssertionError):
        Classes(("a", "b"), ((0, 0, 0),))
