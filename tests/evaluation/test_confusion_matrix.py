import math

import pytest
import torch

from fcn.evaluation.confusion_matrix import ConfusionMatrix, image_miou

NAMES = ("a", "b", "c")
LABELS = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2, 2])
PREDICTIONS = torch.tensor([0, 0, 1, 1, 2, 2, 2, 2, 0, 2])
COUNTS = [[2, 1, 0], [0, 1, 1], [1, 0, 4]]


def matrix(labels: torch.Tensor, predictions: torch.Tensor, num_classes: int = 3, **options) -> ConfusionMatrix:
    result = ConfusionMatrix(num_classes, **options)
    result.update(labels, predictions)
    return result


def test_counts_have_labels_down_and_predictions_across():
    counts = matrix(LABELS, PREDICTIONS).counts
    assert counts.tolist() == COUNTS
    assert counts.dtype == torch.int64


def test_scores_of_an_example_worked_out_by_hand():
    scores = matrix(LABELS, PREDICTIONS).scores(NAMES)
    assert scores["iou"] == pytest.approx({"a": 2 / 4, "b": 1 / 3, "c": 4 / 6}, rel=1e-15)
    assert scores["miou"] == pytest.approx(1 / 2, rel=1e-15)
    assert scores["pixel_acc"] == pytest.approx(7 / 10, rel=1e-15)
    assert scores["mean_acc"] == pytest.approx((2 / 3 + 1 / 2 + 4 / 5) / 3, rel=1e-15)
    assert scores["fw_iou"] == pytest.approx((3 * 2 / 4 + 2 * 1 / 3 + 5 * 4 / 6) / 10, rel=1e-15)
    assert scores["classes"] == 3


def test_an_absent_class_is_none_and_enters_no_mean():
    scores = matrix(torch.tensor([0, 0, 2, 2]), torch.tensor([0, 2, 2, 2])).scores(NAMES)
    assert scores["iou"] == {"a": 1 / 2, "b": None, "c": 2 / 3}
    assert scores["miou"] == pytest.approx((1 / 2 + 2 / 3) / 2, rel=1e-15)
    assert scores["mean_acc"] == pytest.approx((1 / 2 + 1) / 2, rel=1e-15)
    assert scores["fw_iou"] == pytest.approx((2 * 1 / 2 + 2 * 2 / 3) / 4, rel=1e-15)
    assert scores["classes"] == 2


def test_a_class_that_is_predicted_but_never_labelled_counts_as_zero():
    scores = matrix(torch.tensor([0, 0, 2, 2]), torch.tensor([0, 1, 2, 2])).scores(NAMES)
    assert scores["iou"] == {"a": 1 / 2, "b": 0, "c": 1}
    assert scores["miou"] == pytest.approx((1 / 2 + 0 + 1) / 3, rel=1e-15)
    # It has no labelled pixel whose share could be right.
    assert scores["mean_acc"] == pytest.approx((1 / 2 + 1) / 2, rel=1e-15)
    assert scores["classes"] == 3


@pytest.mark.parametrize("labels", [torch.full((4,), 255), torch.zeros(0, dtype=torch.int64)], ids=["ignored", "empty"])
def test_nothing_valid_scores_none(labels):
    scores = matrix(labels, torch.zeros_like(labels)).scores(NAMES)
    assert scores.pop("iou") == scores.pop("dice") == dict.fromkeys(NAMES)
    assert scores.pop("classes") == 0
    assert scores == dict.fromkeys(("miou", "mdice", "pixel_acc", "mean_acc", "fw_iou"))


def test_no_pixel_is_lost_past_two_to_the_24():
    result, part = ConfusionMatrix(2), torch.ones(2**22, dtype=torch.uint8)
    for _ in range(4):
        result.update(part, part)
    result.update(part[:1], part[:1])  # 2^24 + 1 is the first whole number that float32 does not have
    assert result.counts.tolist() == [[0, 0], [0, 2**24 + 1]]


def test_the_order_of_updates_does_not_matter():
    torch.manual_seed(0)
    batches = [(torch.randint(0, 3, (2, 5, 7)), torch.randint(0, 3, (2, 5, 7))) for _ in range(6)]
    forward, backward, at_once = ConfusionMatrix(3), ConfusionMatrix(3), ConfusionMatrix(3)
    for batch in batches:
        forward.update(*batch)
    for batch in reversed(batches):
        backward.update(*batch)
    at_once.update(*(torch.cat(parts) for parts in zip(*batches, strict=True)))
    assert torch.equal(forward.counts, backward.counts)
    assert torch.equal(forward.counts, at_once.counts)
    assert forward.counts.sum() == 6 * 2 * 5 * 7


@pytest.mark.parametrize("ignore_index", [255, 0, -1])
def test_ignored_pixels_are_counted_nowhere(ignore_index):
    labels = torch.tensor([ignore_index, 1, 2, ignore_index, 255])
    counts = matrix(labels, torch.tensor([0, 1, 1, 2, 0]), ignore_index=ignore_index).counts
    assert counts.tolist() == [[0, 0, 0], [0, 1, 0], [0, 1, 0]]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64], ids=str)
def test_any_integer_type_is_accepted(dtype):
    assert matrix(LABELS.to(dtype), PREDICTIONS.to(dtype)).counts.tolist() == COUNTS


def test_many_classes_in_uint8_do_not_overflow():
    counts = matrix(torch.tensor([200], dtype=torch.uint8), torch.tensor([199], dtype=torch.uint8), 201).counts
    assert counts.nonzero().tolist() == [[200, 199]]


@pytest.mark.parametrize(("label", "prediction"), [(3, 0), (-1, 0), (254, 0), (0, 3), (0, -1), (2, 255)])
def test_a_value_that_is_no_class_is_reported(label, prediction):
    broken = matrix(torch.tensor([0, label]), torch.tensor([0, prediction]))
    with pytest.raises(ValueError, match=r"1 pixels .* outside 0 to 2"):
        _ = broken.counts


def test_different_shapes_are_refused():
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(3, 2\)"):
        ConfusionMatrix(3).update(torch.zeros(2, 3, dtype=torch.int64), torch.zeros(3, 2, dtype=torch.int64))


def test_all_reduce_of_one_process_changes_nothing():
    result = matrix(LABELS, PREDICTIONS)
    result.all_reduce()
    assert result.counts.tolist() == COUNTS


def test_an_update_returns_the_counts_of_each_image():
    generator = torch.Generator().manual_seed(0)
    labels, predictions = (torch.randint(0, 4, (3, 5, 7), generator=generator) for _ in range(2))
    labels[1, 2:] = 255
    matrix = ConfusionMatrix(4)
    counts = matrix.update(labels, predictions)
    for image in range(3):
        alone = ConfusionMatrix(4)
        alone.update(labels[image], predictions[image])
        assert torch.equal(counts[image], alone.counts)
    assert torch.equal(matrix.counts, counts.sum(0))


def test_the_score_of_an_image_is_over_its_own_classes_and_nan_without_a_valid_pixel():
    labels = torch.tensor([[[0, 0, 1, 1]], [[255, 255, 255, 255]], [[2, 2, 2, 255]]])
    predictions = torch.tensor([[[0, 1, 1, 1]], [[0, 1, 2, 3]], [[2, 2, 3, 0]]])
    first, nothing, third = image_miou(ConfusionMatrix(4).update(labels, predictions)).tolist()
    assert first == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert math.isnan(nothing)
    assert third == pytest.approx((2 / 3 + 0) / 2)  # classes 2 and 3


def test_an_ignored_class_is_not_in_the_score_of_an_image():
    labels = torch.tensor([[[255, 1, 1, 2]], [[255, 255, 255, 255]]])
    predictions = torch.tensor([[[0, 0, 1, 2]], [[0, 1, 2, 0]]])
    counts = ConfusionMatrix(3, ignore_index=0).update(labels, predictions)
    first, nothing = image_miou(counts, 0).tolist()
    assert first == pytest.approx((1 / 2 + 1) / 2)
    assert math.isnan(nothing)
    assert image_miou(counts)[0].item() == pytest.approx((0 + 1 / 2 + 1) / 3)
