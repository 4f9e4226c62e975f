"""`python -m fcn export`: what the file computes in a process that has no fcn, beside what `predict` writes."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from fcn.__main__ import main
from fcn.checkpoint import save_checkpoint
from fcn.distributed import World
from fcn.errors import InputError
from fcn.inference import infer, load_trained
from fcn.models import build_model

CPU = torch.device("cpu")
ALONE = World(0, 1, 0, CPU, "python")
CLASSES = ["sky", "road", "tree", "car", "person"]
PALETTE = [[10, 20, 30], [200, 100, 50], [90, 250, 70], [1, 2, 3], [0, 0, 255]]
SIZES = [(1, 1), (37, 53), (64, 96), (75, 50)]
HAS_ONNX = all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime"))

OUTSIDER = """
import sys

import numpy as np
import torch

programs = {}
for line in sys.stdin:
    file, images, result = line.split()
    if file not in programs:
        programs[file] = torch.export.load(file).module()
    np.save(result, programs[file](torch.from_numpy(np.load(images))).numpy())
    assert not {"fcn", "torchvision"} & set(sys.modules)
    print(flush=True)
"""
"""A program of someone who has PyTorch alone."""

Run = Callable[[Path, np.ndarray], np.ndarray]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """`run(program, images)`: what it returns in a process of its own."""
    folder = tmp_path_factory.mktemp("elsewhere")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-W", "ignore", "-c", OUTSIDER]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=folder, env=environment, stdin=pipe, stdout=pipe, text=True) as process:

        def run(program: Path, images: np.ndarray) -> np.ndarray:
            np.save(folder / "images.npy", images)
            process.stdin.write(f"{program} images.npy result.npy\n")
            process.stdin.flush()
            assert process.stdout.readline() == "\n", "it has failed, see its standard error"
            return np.load(folder / "result.npy")

        yield run
        process.stdin.close()


def checkpoint(folder: Path, name: str, settings: dict[str, Any] | None = None, **options: Any) -> Path:
    """A checkpoint of a network with random weights, none of them zero."""
    torch.manual_seed(0)
    model = build_model(name, len(CLASSES), **({} if ":" in name else options))
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    config = {
        "run_dir": "gone",
        "data": {"name": "gone:Data", "root": "gone", "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.25], "workers": 0},
        "model": {"name": name, **options},
        "train": {"batch_size": 1, "steps": 1, **(settings or {})},
    }
    state = {"model": model.state_dict(), "step": 7, "config": config, "classes": CLASSES, "palette": PALETTE}
    save_checkpoint(folder / "c.pt", state)
    return folder / "c.pt"


def export(source: Path, output: Path, *arguments: str) -> Path:
    assert main(["export", "--checkpoint", str(source), "--output", str(output), *arguments], ALONE) == 0
    return output


def pictures(count: int, height: int, width: int) -> np.ndarray:
    """(N, H, W, 3) uint8 of all colours, in patches."""
    rng = np.random.default_rng(height)
    coarse = rng.integers(0, 256, (count, height // 9 + 1, width // 9 + 1, 3), np.uint8)
    return coarse.repeat(9, axis=1).repeat(9, axis=2)[:, :height, :width]


def predicted(source: Path, images: np.ndarray, folder: Path, *arguments: str) -> np.ndarray:
    """(N, H, W): what `fcn predict` writes for (N, H, W, 3)."""
    folder.mkdir()
    for number, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{number}.png")
    output = folder.with_name(f"{folder.name}-out")
    command = ["predict", "--checkpoint", source, "--output", output, "--no-overlays", *arguments, folder]
    assert main([str(word) for word in command], ALONE) == 0
    return np.stack([np.asarray(Image.open(output / f"{number}.png")) for number in range(len(images))])


def planar(images: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2))


def refusal(source: Path, output: Path | str, *arguments: str, world: World = ALONE) -> str:
    """The one line that an export ends with."""
    with pytest.raises(InputError) as raised:
        main(["export", "--checkpoint", str(source), "--output", str(output), *arguments], world)
    (line,) = str(raised.value).splitlines()
    return line


# --- equal classes -------------------------------------------------------------------------------------------------

MODELS = [
    ("fcn32s", {"width": 4}),
    ("fcn16s", {"width": 4, "layout": "same"}),
    ("fcn8s", {"width": 4}),
    ("fcn8s", {"width": 4, "layout": "same"}),
    ("fcn8_kitti", {"width": 4}),
    ("fcn_resnet18", {}),
    ("fcn_resnet50", {}),
    ("unet", {"width": 4}),
    ("unet", {"width": 4, "norm": "none"}),
    ("linknet", {}),
    ("linknet", {"encoder": "plain"}),
]
REST = [
    ("fcn32s", {"width": 4, "layout": "same"}),
    ("fcn16s", {"width": 4}),
    ("fcn_resnet50", {"aux": False}),
    ("fcn_resnet101", {}),
]


@pytest.mark.parametrize(
    ("name", "options"), [*MODELS, *(pytest.param(*case, marks=pytest.mark.campaign) for case in REST)]
)
def test_a_file_gives_the_classes_of_predict_for_images_of_any_size(
    tmp_path: Path, run: Run, name: str, options: dict[str, Any]
) -> None:
    source = checkpoint(tmp_path, name, **options)
    program = export(source, tmp_path / "p.pt2")
    seen = set()
    for size in SIZES:
        images = pictures(2, *size)
        expected = predicted(source, images, tmp_path / f"{size[0]}", "--set", "train.precision=fp32")
        together, alone = run(program, planar(images)), run(program, planar(images[1:]))
        assert together.dtype == np.uint8
        assert np.array_equal(together, expected)
        assert np.array_equal(alone, expected[1:])
        seen |= set(expected.flat)
    assert len(seen) > 1  # or any two networks would agree
