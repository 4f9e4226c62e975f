"""The table of metrics, against numbers worked out by hand."""

import math
import random

import pytest

from fcn.metrics import CLASS_METRICS, METRICS, Counts, best_metric, mean, scores, shown

# Labels down, predictions across; "d" occurs in neither, "c" is predicted once and never right.
MATRIX = [[6, 2, 0, 0], [1, 3, 1, 0], [0, 2, 0, 0], [0, 0, 0, 0]]
NAMES = ["a", "b", "c", "d"]


def test_every_metric_by_hand():
    found = scores(MATRIX, NAMES)
    assert found["iou"] == {"a": 6 / 9, "b": 3 / 9, "c": 0.0, "d": None}
    assert found["dice"] == {"a": 12 / 15, "b": 6 / 12, "c": 0.0, "d": None}
    assert found["miou"] == pytest.approx((6 / 9 + 3 / 9 + 0) / 3, rel=1e-15)
    assert found["mdice"] == pytest.approx((12 / 15 + 6 / 12 + 0) / 3, rel=1e-15)
    assert found["pixel_acc"] == 9 / 15
    assert found["mean_acc"] == pytest.approx((6 / 8 + 3 / 5 + 0 / 2) / 3, rel=1e-15)
    assert found["fw_iou"] == pytest.approx((8 * 6 / 9 + 5 * 3 / 9 + 2 * 0) / 15, rel=1e-15)
    assert found["classes"] == 3
    assert found.keys() == {*METRICS, "iou", "dice", "classes"}, "details are not among them"


def test_details_of_classes_by_hand():
    counts = Counts(MATRIX)
    assert CLASS_METRICS["precision"].formula(counts) == [6 / 7, 3 / 7, 0.0, None]
    assert CLASS_METRICS["recall"].formula(counts) == [6 / 8, 3 / 5, 0.0, None]


def test_a_class_that_is_predicted_and_never_labelled_counts_in_iou_and_not_in_recall():
    found = scores([[3, 1], [0, 0]], ["a", "b"])
    assert found["iou"] == {"a": 3 / 4, "b": 0.0}
    assert found["miou"] == 3 / 8
    assert found["mean_acc"] == 3 / 4
    assert found["fw_iou"] == 3 / 4


@pytest.mark.parametrize("ignored", [None, 255, 0, 1, 2])
def test_an_ignored_class_has_no_score_and_is_in_no_mean_beside_sets_of_pixels(ignored):
    """As if only the other classes were scored; what is predicted as the ignored one is a miss."""
    rng = random.Random(0)
    pixels = [(rng.randrange(4), rng.randrange(4)) for _ in range(500)]
    pixels = [(label, found) for label, found in pixels if label not in (ignored, 3) and found != 3]
    matrix = [[pixels.count((label, found)) for found in range(4)] for label in range(4)]
    ious, dices, recalls = {}, {}, {}
    for name, c in zip(NAMES, range(3)):
        labelled = {place for place, (label, _) in enumerate(pixels) if label == c}
        predicted = {place for place, (_, found) in enumerate(pixels) if found == c}
        assert predicted, "also of the ignored class"
        if c != ignored:
            ious[name] = len(labelled & predicted) / len(labelled | predicted)
            dices[name] = 2 * len(labelled & predicted) / (len(labelled) + len(predicted))
            recalls[name] = len(labelled & predicted) / len(labelled)
    found, counts = scores(matrix, NAMES, ignored), Counts(matrix, ignored)
    assert found["iou"] == dict.fromkeys(NAMES) | ious
    assert found["dice"] == dict.fromkeys(NAMES) | dices
    assert found["classes"] == len(ious) == (3 if ignored in (None, 255) else 2)
    assert found["miou"] == pytest.approx(sum(ious.values()) / len(ious), rel=1e-15)
    assert found["mdice"] == pytest.approx(sum(dices.values()) / len(dices), rel=1e-15)
    assert found["mean_acc"] == pytest.approx(sum(recalls.values()) / len(recalls), rel=1e-15)
    assert found["pixel_acc"] == sum(label == found for label, found in pixels) / len(pixels)
    shares = [[label for label, _ in pixels].count(NAMES.index(name)) / len(pixels) for name in ious]
    assert found["fw_iou"] == pytest.approx(sum(map(math.prod, zip(shares, ious.values()))), rel=1e-14)
    for key in ("precision", "recall"):
        values = dict(zip(NAMES, CLASS_METRICS[key].formula(counts)))
        assert {name for name, value in values.items() if value is not None} == ious.keys()


@pytest.mark.parametrize("size", [1, 2, 5])
def test_without_a_valid_pixel_every_score_is_none(size):
    names = NAMES[:size] + ["e"] * max(0, size - 4)
    found = scores([[0] * size for _ in range(size)], names)
    assert found.pop("classes") == 0
    for key in ("iou", "dice"):
        assert set(found.pop(key).values()) == {None}
    assert set(found.values()) == {None}


def test_dice_is_twice_iou_over_one_plus_iou():
    rng = random.Random(0)
    for _ in range(20):
        counts = Counts([[rng.randrange(1, 1000) for _ in range(6)] for _ in range(6)])
        for iou, dice in zip(counts.iou, counts.dice, strict=True):
            assert dice == pytest.approx(2 * iou / (1 + iou), rel=1e-15)


def test_counts_beyond_two_to_the_53_are_summed_exactly():
    large = 2**60
    assert Counts([[large, 1], [0, large]]).total == 2 * large + 1


def test_mean_leaves_out_what_is_absent():
    assert mean([0.5, None, 0.0]) == 0.25
    assert mean([None]) is None
    assert mean([]) is None


def test_how_scores_are_shown():
    assert shown(0.98765) == "0.9877"
    assert shown(None) == "absent"
    assert best_metric({"mdice": 0.5, "step": 3}) == best_metric({"step": 3, "mdice": 0.5}) == "mdice"
