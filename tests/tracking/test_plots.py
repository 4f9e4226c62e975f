from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

from fcn.data import Classes, voc_palette
from fcn.data.labels import SHAPES, VOC
from fcn.tracking import Sample
from fcn.tracking.plots import (
    CELL,
    CURVES,
    ERROR_COLOUR,
    GAP,
    IGNORE_COLOUR,
    colourise,
    confusion,
    curves,
    panels,
    resized,
    save,
)

RED, GREEN, BLUE = (200, 10, 20), (30, 190, 40), (50, 60, 210)
CLASSES = Classes(("red", "green", "blue"), (RED, GREEN, BLUE))
PHOTO = (90, 120, 150)


def photo(height: int, width: int) -> np.ndarray:
    return np.full((height, width, 3), PHOTO, np.uint8)


def count(picture: Image.Image, colour: tuple[int, int, int]) -> int:
    return int((np.asarray(picture) == colour).all(axis=2).sum())


def columns(sheet: Image.Image) -> list[Image.Image]:
    """The sheet cut at the middle of the gaps between image, label, prediction and errors."""
    cuts = [0, *(n * (CELL + GAP) + GAP // 2 for n in (1, 2, 3)), sheet.width]
    return [sheet.crop((left, 0, right, sheet.height)) for left, right in pairwise(cuts)]


@pytest.mark.parametrize("dtype", [np.uint8, np.int64])
def test_every_class_has_its_palette_colour_and_255_the_ignore_colour(dtype):
    labels = np.array([[0, 1, 2], [255, 6, 5]], dtype)
    picture = np.asarray(colourise(labels, SHAPES))
    expected = [
        [SHAPES.palette[0], SHAPES.palette[1], SHAPES.palette[2]],
        [IGNORE_COLOUR, SHAPES.palette[6], SHAPES.palette[5]],
    ]
    assert picture.tolist() == np.array(expected).tolist()


@pytest.mark.parametrize("classes", [SHAPES, VOC], ids=["shapes", "voc"])
def test_the_ignore_colour_is_no_class(classes):
    assert IGNORE_COLOUR not in classes.palette


@pytest.mark.parametrize(
    ("height", "width", "area"),
    [
        pytest.param(40, 80, CELL * CELL // 2, id="landscape"),
        pytest.param(80, 40, CELL * CELL // 2, id="portrait"),
        pytest.param(720, 720, CELL * CELL, id="larger than a cell"),
        pytest.param(1, 1, CELL * CELL, id="one pixel"),
        pytest.param(1, 2000, CELL, id="one row"),
    ],
)
def test_image_label_and_prediction_stand_side_by_side_at_the_size_of_a_cell(height, width, area):
    labels, predictions = np.full((height, width), 1, np.uint8), np.full((height, width), 2, np.int64)
    image, label, prediction, errors = columns(panels([Sample(photo(height, width), labels, predictions, "")], CLASSES))
    assert count(image, PHOTO) == area
    assert count(label, GREEN) == area
    assert count(prediction, BLUE) == area
    assert count(label, BLUE) == count(prediction, GREEN) == 0
    assert count(errors, ERROR_COLOUR) == area


def test_labels_keep_their_place_and_get_no_mixed_colours():
    labels = np.array([[0, 1], [2, 255]], np.uint8)
    _, label, *_ = columns(panels([Sample(photo(2, 2), labels, np.zeros((2, 2), np.uint8), "")], CLASSES))
    pixels = np.asarray(label)
    ys, xs = {}, {}
    for colour in (RED, GREEN, BLUE, IGNORE_COLOUR):
        assert count(label, colour) == CELL * CELL // 4
        y, x = np.nonzero((pixels == colour).all(axis=2))
        ys[colour], xs[colour] = y.mean(), x.mean()
    assert ys[RED] == ys[GREEN] < ys[BLUE] == ys[IGNORE_COLOUR]
    assert xs[RED] == xs[BLUE] < xs[GREEN] == xs[IGNORE_COLOUR]


def test_the_legend_shows_exactly_the_classes_that_occur():
    labels = np.full((10, 10), 1, np.uint8)
    labels[0] = 255
    first_column, *_ = columns(panels([Sample(photo(10, 10), labels, np.ones((10, 10), np.uint8), "")], CLASSES))
    assert count(first_column, GREEN) > 100
    assert count(first_column, IGNORE_COLOUR) > 100
    assert count(first_column, RED) == count(first_column, BLUE) == 0


def test_a_long_legend_shows_every_class():
    labels = np.array([range(len(VOC))], np.uint8)
    sheet = panels([Sample(photo(1, len(VOC)), labels, labels, "")], VOC)
    # The only row is 17 pixels high; the legend is what stands below it and its caption.
    legend = sheet.crop((0, sheet.height // 2, sheet.width, sheet.height))
    assert [name for name, colour in zip(VOC.names, VOC.palette, strict=True) if count(legend, colour) < 100] == []


def test_rows_of_mixed_sizes_stand_below_each_other():
    def row(height: int, width: int, label: int) -> Sample:
        labels = np.full((height, width), label, np.uint8)
        return Sample(photo(height, width), labels, labels, f"{height}x{width}")

    _, label, *_ = columns(panels([row(40, 80, 0), row(80, 40, 1), row(30, 30, 2)], CLASSES))
    assert [count(label, colour) for colour in (RED, GREEN, BLUE)] == [CELL**2 // 2, CELL**2 // 2, CELL**2]
    pixels = np.asarray(label)
    spans = [np.nonzero((pixels == colour).all(axis=2).any(axis=1))[0] for colour in (RED, GREEN, BLUE)]
    assert spans[0].max() < spans[1].min()
    assert spans[1].max() < spans[2].min()


@pytest.mark.parametrize(
    ("shape", "scale", "size"), [((4, 8), 2, (8, 16)), ((4, 8, 3), 0.5, (2, 4)), ((1, 1000), 0.1, (1, 100))]
)
def test_resizing_gives_image_and_labels_one_size_and_mixes_no_labels(shape, scale, size):
    labels, predictions = np.array([[0, 255], [2, 9]], np.uint8), np.array([[1, 1], [255, 7]])
    small = resized(Sample(photo(6, 6), labels, predictions, "caption"), shape, scale)
    assert small.image.shape == (*size, 3)
    assert (small.image == PHOTO).all()
    assert small.labels.shape == small.predictions.shape == size
    assert small.labels.dtype == small.predictions.dtype == np.uint8
    assert set(small.labels.flat) <= set(labels.flat)
    assert set(small.predictions.flat) <= set(predictions.flat)
    if min(size) > 1:
        assert small.labels[[0, 0, -1, -1], [0, -1, 0, -1]].tolist() == labels.flatten().tolist()
    assert small.caption == "caption"


def test_errors_are_where_valid_labels_and_predictions_differ():
    labels = np.array([[0, 1, 2, 255]], np.uint8)
    *_, drawn = columns(panels([Sample(photo(1, 4), labels, np.array([[0, 2, 1, 1]]), "")], CLASSES))
    assert count(drawn, ERROR_COLOUR) == 2 * (CELL // 4) ** 2
    *_, none = columns(panels([Sample(photo(1, 4), labels, np.array([[0, 1, 2, 1]]), "")], CLASSES))
    assert count(none, ERROR_COLOUR) == 0


@pytest.mark.parametrize("name", ["a.png", "folder/" * 100 + "a.png", "é Ж λ.png"])
def test_the_end_of_a_caption_is_never_cut_off(name):
    labels = np.zeros((4, 4), np.uint8)
    sheets = [
        np.asarray(panels([Sample(photo(4, 4), labels, labels, f"{name}   mIoU {score}")], CLASSES))
        for score in (0.25, 0.75)
    ]
    assert not np.array_equal(*sheets)
    assert (sheets[0][:, -GAP:] == 255).all()


def test_accents_greek_and_cyrillic_are_no_boxes():
    labels = np.zeros((4, 4), np.uint8)
    sheets = [np.asarray(panels([Sample(photo(4, 4), labels, labels, name)], CLASSES)) for name in "éüЖλ"]
    assert len({sheet.tobytes() for sheet in sheets}) == 4


def many_classes(number: int, name: str = "{}") -> Classes:
    return Classes(tuple(name.format(index) for index in range(number)), voc_palette(number))


@pytest.mark.parametrize(
    ("name", "shown"), [("a\x1b[31m\x07b", "a\\x1b[31m\\x07b"), ("a\nb\tc", "a b\\tc"), ("a\udcffb", "a\\udcffb")]
)
def test_control_characters_are_drawn_as_they_are_spelled(name, shown, recwarn):
    """In heat map, legend, caption and curves, without a word of the drawing library's."""

    def drawn(name):
        classes = Classes((name, "green", "blue"), (RED, GREEN, BLUE))
        sheet = panels([Sample(photo(9, 9), np.zeros((9, 9), np.uint8), np.zeros((9, 9), np.int64), name)], classes)
        record = {"event": "eval", "step": 1, "split": name, "miou": 0.5}
        return [np.asarray(picture) for picture in (confusion(np.eye(3, dtype=int), classes), sheet, curves([record]))]

    for one, other in zip(drawn(name), drawn(shown), strict=True):
        assert np.array_equal(one, other)
    assert not [warning for warning in recwarn.list if warning.category is not ResourceWarning]


def test_characters_that_the_font_lacks_are_boxes_without_a_warning(recwarn):
    confusion(np.eye(3, dtype=int), Classes(("道路", "green", "blue"), (RED, GREEN, BLUE)))
    assert not [warning for warning in recwarn.list if warning.category is not ResourceWarning]


@pytest.mark.parametrize("name", ["{}", "class {} of a long & winded $name$, longer than any that is known"])
@pytest.mark.parametrize("number", [2, 11, 21, 150])
def test_a_heat_map_has_all_of_its_names_and_a_size_that_can_be_shown(number, name):
    counts = np.eye(number, dtype=np.int64)
    drawn = np.asarray(confusion(counts, many_classes(number, name)))
    assert max(drawn.shape) <= 2600
    edges = drawn[0], drawn[-1], drawn[:, 0], drawn[:, -1]
    assert all((edge == 255).all() for edge in edges), "something is cut off"
    dark = (drawn == (8, 48, 107)).all(axis=2)  # 100 %
    assert dark.any(axis=0).sum() >= 4 * number, "each class has a cell of some pixels"


def test_a_class_that_no_pixel_is_labelled_with_looks_absent_and_not_like_0_percent():
    counts = np.array([[90, 10], [0, 0]])
    present, absent = (np.asarray(confusion(matrix, many_classes(2))) for matrix in (np.eye(2, dtype=int) * 9, counts))
    zero, empty = (247, 251, 255), (237, 237, 237)
    zeros = [int((drawn == zero).all(axis=2).sum()) for drawn in (present, absent)]
    empties = [int((drawn == empty).all(axis=2).sum()) for drawn in (present, absent)]
    assert zeros[0] > 2 * 30**2
    assert zeros[1] < zeros[0] / 10
    assert empties[0] < 10
    assert empties[1] > 2 * 30**2


def test_a_heat_map_shows_shares_of_the_labels_and_not_counts():
    classes = many_classes(3)
    counts = np.array([[8, 2, 0], [0, 1, 1], [3, 0, 1]])
    drawn = [np.asarray(confusion(counts * factor, classes)) for factor in (1, np.array([[1], [1000], [10**12]]))]
    assert np.array_equal(*drawn)
    assert not np.array_equal(drawn[0], np.asarray(confusion(counts.T, classes)))
    assert not np.array_equal(drawn[0], np.asarray(confusion(counts, many_classes(3, "other {}"))))


def test_a_picture_that_cannot_be_written_leaves_the_one_before(tmp_path):
    path = tmp_path / "pictures" / "a.png"
    save(Image.new("RGB", (4, 4), RED), path)
    before = path.read_bytes()
    with pytest.raises(OSError, match="cannot write mode"):
        save(Image.new("HSV", (4, 4)), path)
    assert [one.name for one in path.parent.iterdir()] == ["a.png"]
    assert path.read_bytes() == before


def train(step: int) -> dict:
    return {"event": "train", "step": step, "loss": 2 / step, "lr": 0.1 / step, "images_per_s": 50 + step}


def evaluation(step: int, split: str, miou: float | None) -> dict:
    return {"event": "eval", "step": step, "split": split, "miou": miou}


def draw(records: list[dict], resumed: tuple[int, ...] = ()) -> np.ndarray:
    return np.asarray(curves(records, resumed))


def quarters(picture: np.ndarray) -> dict[str, np.ndarray]:
    """By what is drawn in them."""
    height, width = picture.shape[0] // 2, picture.shape[1] // 2
    corners = [(top, left) for top in (0, height) for left in (0, width)]
    return {key: picture[y : y + height, x : x + width] for key, (y, x) in zip(CURVES, corners, strict=True)}


def changed(one: list[dict], other: list[dict]) -> set[str]:
    """The curves that differ."""
    pairs = zip(quarters(draw(one)).items(), quarters(draw(other)).values(), strict=True)
    return {key for (key, drawn), also in pairs if not np.array_equal(drawn, also)}


def test_each_curve_has_a_quarter_of_its_own():
    steps = [train(10), train(20), evaluation(20, "val", 0.4)]
    for key in ("loss", "lr", "images_per_s"):
        assert changed(steps, [{**steps[0], key: steps[0][key] * 0.9}, *steps[1:]]) == {key}
    assert changed(steps, [*steps[:2], evaluation(20, "val", 0.3)]) == {"miou"}


def reds(picture: np.ndarray) -> int:
    """Pixels of the marks of values that are not finite."""
    return int(((picture[..., 0] > 200) & (picture[..., 1:] < 150).all(axis=2)).sum())


def test_losses_that_are_not_finite_are_a_gap_and_marked():
    steps = [*map(train, range(1, 41))]
    cut = [{**record, "loss": None} if 10 <= record["step"] < 30 else record for record in steps]
    whole, gap = (quarters(draw(records))["loss"] for records in (steps, cut))
    assert reds(whole) == 0
    assert reds(gap) > 20
    assert blues(gap) < blues(whole)


def blues(picture: np.ndarray) -> int:
    """Pixels of the first curve."""
    return int((picture == (31, 119, 180)).all(axis=2).sum())


@pytest.mark.parametrize("records", [1, 10_000])
def test_curves_of_one_record_and_of_many_can_be_seen(records):
    drawn = quarters(draw([train(step) for step in range(1, records + 1)]))
    assert all(blues(drawn[key]) >= 4 for key in ("loss", "lr", "images_per_s"))


def test_a_loss_that_was_never_finite_leaves_the_other_curves():
    drawn = quarters(draw([{**train(step), "loss": None} for step in (1, 2, 3)] + [evaluation(3, "val", None)]))
    assert reds(drawn["loss"]) > 0
    assert blues(drawn["lr"]) > 0
    assert blues(drawn["miou"]) == blues(drawn["loss"]) == 0


def test_every_resume_is_a_line_in_all_curves():
    steps = [*map(train, range(1, 41)), evaluation(40, "val", 0.5)]
    plain, once, twice = (quarters(draw(steps, resumed)) for resumed in ((), (13,), (13, 27)))
    assert [key for key in CURVES if np.array_equal(plain[key], once[key])] == []
    assert [key for key in CURVES if np.array_equal(once[key], twice[key])] == []


def test_the_best_score_has_a_star():
    """It covers more than the dots of the curve, and stands at the best step."""
    scores = [evaluation(10 * n, "val", 0.9 if n == 3 else 0.3) for n in range(1, 10)]
    drawn = quarters(draw(scores))["miou"]
    ys, _ = np.nonzero((drawn == (31, 119, 180)).all(axis=2))
    rows = np.bincount(ys, minlength=len(drawn))
    assert rows[: len(drawn) // 3].max() >= 8
