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


def scores(context: DistributedContext, root: str, batch_size: int) -> tuple[np.ndarray, list[int]]:
    """mIoU of each image, and the images with the lowest."""
    overrides = [f"data.root={root}", f"eval.batch_size={batch_size}", "data.workers=0"]
    config = load_config(CHECKOUT / "configs" / "quickstart.yaml", overrides)
    found = evaluate_split(Evaluator(network(), "val", build_dataset(config.data, "val"), config, PRECISION, context))
    return found.image_miou.numpy(), found.worst(4)


def by_hand(root: Path) -> np.ndarray:
    config = load_config(CHECKOUT / "configs" / "quickstart.yaml", [f"data.root={root}"])
    dataset, model, found = build_dataset(config.data, "val"), network().eval(), []
    for index in range(len(dataset)):
        image, mask = (np.array(part) for part in dataset.read(index))
        with torch.inference_mode():
            classes = predict(model, torch.from_numpy(image)[None], mask.shape, PRECISION)[0].numpy()
        pairs = [(mask == label, (classes == label) & (mask != 255)) for label in range(7)]
        overlaps = [((a & b).sum(), (a | b).sum()) for a, b in pairs]
        found.append(np.mean([both / either for both, either in overlaps if either]))
    return np.array(found)


def test_the_scores_of_images_are_the_same_on_any_number_of_ranks(shapes_root: Path) -> None:
    expected = by_hand(shapes_root)
    assert len(set(expected.round(6).tolist())) > 5, "images differ"
    for processes, batch_size in ((1, 3), (3, 2), (4, 8)):
        for found, worst in run_ranks(processes, scores, str(shapes_root), batch_size):
            assert np.abs(found - expected).max() < 1e-12
            assert worst == np.argsort(found, kind="stable")[:4].tolist()
