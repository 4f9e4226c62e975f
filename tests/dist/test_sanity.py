"""A run whose labels or predictions show that it learns nothing useful says so once, and a healthy one never does."""

from __future__ import annotations

import textwrap
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.dist.ranks import run
from tests.dist.test_run import records


@pytest.fixture
def folder(tiny, tmp_path: Path):
    """`folder(draw)` writes images whose brightness shows the masks `draw()`, and returns the config of a short run on them."""

    def write(draw, classes=("background", "person"), values=None, **changes) -> str:
        rng = np.random.default_rng(0)
        for split in ("train", "val"):
            for kind in ("images", "masks"):
                (tmp_path / "data" / kind / split).mkdir(parents=True)
            for number in range(12):
                mask = draw()
                image = (rng.integers(0, 60, (48, 48, 3)) + 60 * (mask[..., None] % 4)).astype(np.uint8)
                Image.fromarray(image).save(tmp_path / "data" / "images" / split / f"{number}.png")
                Image.fromarray(mask).save(tmp_path / "data" / "masks" / split / f"{number}.png")
        data = {"name": "folder", "root": str(tmp_path / "data"), "train": "train", "val": "val", "crop": [48, 48]}
        data |= {"images": "images/{split}", "masks": "masks/{split}", "classes": list(classes), "values": values}
        short = {"train__steps": 26, "train__batch_size": 12, "eval__every": 26, "checkpoint__every": 26}
        return tiny(**short | {"data": data | {"workers": 0}} | changes)

    return write


def striped(*values: int):
    """Masks of equal stripes of these values."""
    return lambda: np.repeat(np.array(values, np.uint8), 48 * 48 // len(values)).reshape(48, 48)


def warnings_of(tmp_path: Path) -> list[str]:
    """Without those about slow ranks, which a busy machine has."""
    found = [record["text"] for record in records(tmp_path / "run", "warning")]
    return [text for text in found if " is slow" not in text]


REMEDY = (
    "; if that is not meant, say in data.values what each value of a mask means, and count them with python -m fcn check"
)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_class_that_is_drawn_as_255(folder, tmp_path: Path, processes) -> None:
    run(processes, "train_ddp.py", "--config", folder(striped(0, 0, 255)))
    (said,) = warnings_of(tmp_path)
    assert said == (
        "data: in the 264 images so far, every labelled pixel is 'background' and 33% of the pixels are ignored" + REMEDY
    )


def test_a_short_run_says_it_at_its_end(folder, tmp_path: Path) -> None:
    run(1, "train_ddp.py", "--config", folder(striped(0, 0, 255), train__steps=4))
    (said,) = warnings_of(tmp_path)
    assert said.startswith("data: in the 48 images so far, every labelled pixel is 'background'")


def test_a_class_without_pixels_among_others(folder, tmp_path: Path) -> None:
    run(1, "train_ddp.py", "--config", folder(striped(0, 2), classes=("background", "cat", "dog")))
    (said,) = warnings_of(tmp_path)
    assert said == "data: in the 264 images so far, no pixel is labelled 'cat'" + REMEDY


def test_mostly_ignored(folder, tmp_path: Path) -> None:
    run(1, "train_ddp.py", "--config", folder(striped(0, 1, 255, 255, 255, 255)))
    (said,) = warnings_of(tmp_path)
    assert said == "data: in the 264 images so far, 67% of the pixels are ignored" + REMEDY


@pytest.mark.parametrize(
    ("draw", "changes"),
    [
        (striped(0, 1, 1), {}),
        (striped(0, 1, 255, 255, 255, 255), {"values": {"background": 0, "person": 1, "ignore": 255}}),
        (striped(0, 1, 2), {"classes": ("background", "cat", "dog"), "loss__ignore_index": 0}),
        (striped(0, 1), {"train__batch_size": 4, "train__steps": 30}),
    ],
    ids=["all labelled", "ignored on purpose", "a class ignored on purpose", "too few images to tell"],
)
def test_healthy_labels(folder, tmp_path: Path, draw, changes) -> None:
    run(1, "train_ddp.py", "--config", folder(draw, **changes))
    assert not warnings_of(tmp_path)


def test_padding_is_not_ignored_on_purpose_or_otherwise(folder, tmp_path: Path) -> None:
    config = folder(striped(0, 1), train__steps=26)
    run(1, "train_ddp.py", "--config", config, "data.crop=[96, 96]")  # three quarters of a batch are padding
    assert not warnings_of(tmp_path)


CONSTANT = """
    import torch
    from torch import nn

    class Constant(nn.Conv2d):
        '''Class 1 everywhere, whatever the image.'''

        def __init__(self, num_classes):
            super().__init__(3, num_classes, 1)
            nn.init.zeros_(self.weight)
            self.bias.data = torch.eye(num_classes)[1] * 9
"""


@pytest.mark.parametrize(("every", "steps", "said"), [(110, 110, 1), (55, 165, 1), (5, 60, 0)])
def test_one_class_for_everything(
    folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int, steps: int, said: int
) -> None:
    (tmp_path / "constant.py").write_text(textwrap.dedent(CONSTANT))
    monkeypatch.setattr("tests.dist.ranks.IMPORTS", (str(tmp_path),))
    config = folder(striped(0, 1), model={"name": "constant:Constant"}, optim__lr=1e-9)
    run(2, "train_ddp.py", "--config", config, f"train.steps={steps}", f"eval.every={every}")
    found = warnings_of(tmp_path)
    assert len(found) == said
    assert all(line.startswith("the network predicts 'person' for every pixel of 'val'; ") for line in found)
