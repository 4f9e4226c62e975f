"""The score of every image of a split, on any number of ranks, beside numpy's from the network's predictions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from fcn.config import load_config
from fcn.data import build_dataset
from fcn.distributed import DistributedContext
from fcn.evaluation import Evaluator, evaluate_split
from fcn.evaluation.inference import predict
from fcn.models import Precision, build_model
from tests.dist.ranks import CHECKOUT, run_ranks

CPU = torch.device("cpu")
PRECISION = Precision("fp32", True, CPU)


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return PRECISION.place(build_model("unet", 7, width=2))


def scores(
    context: DistributedContext, root: str, batch_size: int, ignored: int = 255
) -> tuple[np.ndarray, list[int], dict]:
    """mIoU of each image, the images with the lowest, and the record."""
    keys = [f"data.root={root}", f"eval.batch_size={batch_size}", "data.workers=0", f"loss.ignore_index={ignored}"]
    config = load_config(CHECKOUT / "configs" / "quickstart.yaml", keys)
    dataset = build_dataset(config.data, "val", ignored)
    found = evaluate_split(Evaluator(network(), "val", dataset, config, PRECISION, context))
    return found.image_miou.numpy(), found.worst(4), found.record()


def by_hand(root: Path, ignored: int = 255) -> tuple[np.ndarray, list[float | None]]:
    """mIoU of each image, IoU of each class."""
    config = load_config(CHECKOUT / "configs" / "quickstart.yaml", [f"data.root={root}"])
    dataset, model, found, totals = build_dataset(config.data, "val"), network().eval(), [], np.zeros((7, 2))
    for index in range(len(dataset)):
        image, mask = (np.array(part) for part in dataset.read(index))
        with torch.inference_mode():
            classes = predict(model, torch.from_numpy(image)[None], mask.shape, PRECISION)[0].numpy()
        mask = np.where(mask == ignored, 255, mask)
        pairs = [(mask == label, (classes == label) & (mask != 255)) for label in range(7)]
        overlaps = np.array([((a & b).sum(), (a | b).sum()) if c != ignored else (0, 0) for c, (a, b) in enumerate(pairs)])
        found.append(np.mean([both / either for both, either in overlaps if either]))
        totals += overlaps
    return np.array(found), [both / either if either else None for both, either in totals.tolist()]


def test_the_scores_of_images_are_the_same_on_any_number_of_ranks(shapes_root: Path) -> None:
    expected, _ = by_hand(shapes_root)
    assert len(set(expected.round(6).tolist())) > 5, "images differ"
    for processes, batch_size in ((1, 3), (3, 2), (4, 8)):
        for found, worst, _ in run_ranks(processes, scores, str(shapes_root), batch_size):
            assert np.abs(found - expected).max() < 1e-12
            assert worst == np.argsort(found, kind="stable")[:4].tolist()


def test_an_ignored_class_is_in_no_score(shapes_root: Path) -> None:
    """Class 0, which the network also predicts for pixels of other classes."""
    images, classes = by_hand(shapes_root, ignored=0)
    assert classes[0] is None
    for found, _, record in run_ranks(2, scores, str(shapes_root), 4, 0):
        assert np.abs(found - images).max() < 1e-12
        assert list(record["iou"].values()) == classes
        counted = [iou for iou in classes if iou is not None]
        assert abs(record["miou"] - np.mean(counted)) < 1e-15
        assert record["classes"] == len(counted)
