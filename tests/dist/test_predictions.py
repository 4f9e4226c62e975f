"""What `evaluate` counts is what `predict` writes, on any number of processes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

import train_ddp
from fcn.distributed import DistributedContext
from tests.cli import ALONE, call
from tests.dist.ranks import run_ranks


def numpy_matrix(predictions: Path, masks: Path, classes: int) -> list[list[int]]:
    counts = np.zeros((classes, classes), np.int64)
    sizes = set()
    for path in sorted(predictions.glob("*.png")):
        found, labels = (np.asarray(Image.open(folder / path.name)) for folder in (predictions, masks))
        assert found.shape == labels.shape
        sizes.add(found.shape)
        np.add.at(counts, (labels[labels != 255], found[labels != 255]), 1)
    assert any(height > width for height, width in sizes)
    assert any(height < width for height, width in sizes)
    return counts.tolist()


def command(context: DistributedContext, arguments: list[str]) -> int:
    return call(arguments, context)


def test_evaluate_counts_what_predict_writes(tiny, shapes_root: Path, tmp_path: Path) -> None:
    assert train_ddp.main(["--config", tiny(train__steps=8, eval__pictures=0)]) == 0
    checkpoint = ("--checkpoint", str(tmp_path / "run"))
    names = (shapes_root / "ImageSets/Segmentation/val.txt").read_text().split()
    images = [str(shapes_root / f"JPEGImages/{name}.jpg") for name in names]
    matrices = []

    def check(name: str, protocol: str) -> None:
        scores = json.loads((tmp_path / f"{name}.json").read_text())
        assert (scores["protocol"], scores["images"]) == (protocol, len(names))
        expected = numpy_matrix(tmp_path / name, shapes_root / "SegmentationClass", len(scores["iou"]))
        assert scores["confusion_matrix"] == expected
        assert sum(any(column) for column in zip(*expected, strict=True)) > 1, "several classes are predicted"
        matrices.append(expected)

    evaluate = ["evaluate", *checkpoint, "--json", str(tmp_path / "plain.json"), "eval.batch_size=3"]
    assert run_ranks(2, command, evaluate) == [0] * 2
    assert run_ranks(3, command, ["predict", *checkpoint, "--output", str(tmp_path / "plain"), *images]) == [0] * 3
    check("plain", "native")
    tta = ["eval.scales=[0.8,1.3]", "eval.flip=true", "eval.window=[70,80]"]
    call(["evaluate", *checkpoint, "--json", str(tmp_path / "views.json"), *tta], ALONE)
    settings = [text for view in tta for text in ("--set", view)]
    call(["predict", *checkpoint, "--output", str(tmp_path / "views"), *settings, *images], ALONE)
    check("views", "native, scales 0.8 1.3, flip, window 70x80")
    assert matrices[0] != matrices[1]
