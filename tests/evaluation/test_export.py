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

from fcn.checkpoints.format import save_checkpoint
from fcn.distributed import DistributedContext
from fcn.errors import InputError
from fcn.evaluation import load_trained
from fcn.evaluation.export import Segmenter, trace
from fcn.evaluation.inference import infer
from fcn.models import build_model
from tests.cli import ALONE, call

pytest.importorskip("torch.fx.experimental.dynamic_spec", reason="export needs PyTorch 2.14")
CPU = torch.device("cpu")
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


TRUST = [f"--trust-code=networks_to_export:{name}" for name in ("tiny", "branching", "eighths", "other")]


def export(source: Path, output: Path, *arguments: str) -> Path:
    assert call(["export", "--checkpoint", str(source), "--output", str(output), *TRUST, *arguments], ALONE) == 0
    return output


def pictures(count: int, height: int, width: int) -> np.ndarray:
    """(N, H, W, 3) uint8 of all colours, in patches."""
    rng = np.random.default_rng(height)
    coarse = rng.integers(0, 256, (count, height // 9 + 1, width // 9 + 1, 3), np.uint8)
    return coarse.repeat(9, axis=1).repeat(9, axis=2)[:, :height, :width]


def predicted(source: Path, folder: Path, batches: list[np.ndarray], *arguments: str) -> list[np.ndarray]:
    """(N, H, W) for each (N, H, W, 3): what `fcn predict` writes for these images."""
    (folder / "in").mkdir()
    for place, images in enumerate(batches):
        for number, image in enumerate(images):
            Image.fromarray(image).save(folder / f"in/{place}-{number}.png")
    command = [
        "predict",
        "--checkpoint",
        source,
        "--output",
        folder / "out",
        "--no-overlays",
        *TRUST,
        *arguments,
        folder / "in",
    ]
    assert call([str(word) for word in command], ALONE) == 0
    return [
        np.stack([np.asarray(Image.open(folder / f"out/{place}-{number}.png")) for number in range(len(images))])
        for place, images in enumerate(batches)
    ]


def planar(images: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2))


def refusal(source: Path, output: Path | str, *arguments: str, context: DistributedContext = ALONE) -> str:
    """The one line that an export ends with."""
    with pytest.raises(InputError) as raised:
        call(["export", "--checkpoint", str(source), "--output", str(output), *TRUST, *arguments], context)
    (line,) = str(raised.value).splitlines()
    return line


# --- equal classes -------------------------------------------------------------------------------------------------

MODELS = [
    ("fcn8s", {"width": 4}),
    ("fcn8s", {"width": 4, "layout": "same"}),
    ("fcn_resnet18", {}),
]
SLOW = [("fcn_resnet50", {}), ("linknet", {})]
"""To read back; it takes PyTorch ten seconds each."""
REST = [
    ("fcn32s", {"width": 4}),
    ("fcn32s", {"width": 4, "layout": "same"}),
    ("fcn16s", {"width": 4}),
    ("fcn16s", {"width": 4, "layout": "same"}),
    ("fcn8_kitti", {"width": 4}),
    ("fcn_resnet50", {"aux": False}),
    ("fcn_resnet101", {}),
    ("unet", {"width": 4}),
    ("unet", {"width": 4, "norm": "none"}),
    ("linknet", {"encoder": "plain"}),
]


@pytest.mark.parametrize(
    ("name", "options"), [*MODELS, *(pytest.param(*case, marks=pytest.mark.campaign) for case in SLOW + REST)]
)
def test_a_file_gives_the_classes_of_predict_for_images_of_any_size(
    tmp_path: Path, run: Run, name: str, options: dict[str, Any]
) -> None:
    source = checkpoint(tmp_path, name, **options)
    program = export(source, tmp_path / "p.pt2")
    batches = [pictures(2, *size) for size in SIZES]
    expected = predicted(source, tmp_path, batches, "--set", "train.precision=fp32")
    assert len({value for classes in expected for value in classes.flat}) > 1  # or any two networks would agree
    for images, classes in zip(batches, expected, strict=True):
        for part in (slice(2), slice(1, 2)):
            found = run(program, planar(images[part]))
            assert found.dtype == np.uint8
            assert np.array_equal(found, classes[part])


@pytest.mark.parametrize(("name", "options"), SLOW)
def test_a_program_gives_the_network_s_logits(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    segmenter = Segmenter(load_trained(checkpoint(tmp_path, name, **options), [], CPU), logits=True).eval()
    with torch.no_grad():
        program = trace(segmenter).module()
        for size in SIZES:
            images = torch.from_numpy(planar(pictures(2, *size)))
            assert torch.equal(program(images), segmenter(images))


@pytest.mark.parametrize("settings", [{"precision": "fp64"}, {"precision": "fp32", "channels_last": False}], ids=str)
def test_precision_and_memory_format_are_the_run_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run, settings: dict[str, Any]
) -> None:
    source = own(tmp_path, monkeypatch, "tiny", settings)
    images = pictures(1, 37, 53)
    found = run(export(source, tmp_path / "p.pt2", "--logits"), planar(images))
    assert found.dtype == (np.float64 if settings["precision"] == "fp64" else np.float32)
    assert np.array_equal(found, network_s_logits(source, images))
    assert np.array_equal(found.argmax(1), predicted(source, tmp_path, [images])[0])


def network_s_logits(source: Path, images: np.ndarray) -> np.ndarray:
    """(N, C, H, W), in the precision that its config names."""
    trained = load_trained(source, [], CPU, [word.partition("=")[2] for word in TRUST])
    with torch.inference_mode():
        return infer(trained.model, torch.from_numpy(images), images.shape[1:3], trained.precision).numpy()


def test_logits_are_the_network_s_to_the_last_bit(tmp_path: Path, run: Run) -> None:
    source = checkpoint(tmp_path, "unet", {"precision": "fp32"}, width=2)
    program = export(source, tmp_path / "p.pt2", "--logits")
    for size in ((37, 53), (97, 131)):  # a transposed convolution that computes a row too much gives other bits here
        images = pictures(1, *size)
        found = run(program, planar(images))
        assert found.shape == (1, len(CLASSES), *size)
        assert np.array_equal(found, network_s_logits(source, images))


@pytest.mark.skipif(not HAS_ONNX, reason="needs onnx, onnxscript and onnxruntime")
@pytest.mark.parametrize(("name", "options"), [*MODELS, *SLOW, ("unet", {"width": 4})])
def test_an_onnx_file_gives_the_classes_of_predict(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    import onnx
    import onnxruntime

    source = checkpoint(tmp_path, name, **options)
    file = export(source, tmp_path / "p.onnx")
    batches = [pictures(2, *size) for size in SIZES]
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    expected = predicted(source, tmp_path, batches, "--set", "train.precision=fp32")
    for images, classes in zip(batches, expected, strict=True):
        (found,) = session.run(["classes"], {"images": planar(images)})
        assert (found != classes).mean() < 1e-3  # sums of another engine
    information = {entry.key: entry.value for entry in onnx.load(file).metadata_props}
    assert json.loads(information["classes"]) == CLASSES
    assert [size.name for size in session.get_inputs()] == ["images"]
    assert session.get_inputs()[0].shape == ["batch", 3, "height", "width"]


# --- what else is in the file --------------------------------------------------------------------------------------


def test_classes_and_colours_travel_in_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    file = export(own(tmp_path, monkeypatch, "tiny"), tmp_path / "p.pt2")
    extra = {"fcn.json": ""}
    torch.export.load(file, extra_files=extra)
    information = json.loads(extra["fcn.json"])
    assert information == {
        "input": "images (uint8 RGB N, 3, H, W), of any N, H and W from 1 up",
        "output": "classes (uint8 N, H, W)",
        "classes": CLASSES,
        "palette": PALETTE,
        "model": "networks_to_export:tiny",
        "step": 7,
    }
    assert str(tmp_path).encode() not in file.read_bytes()  # nor where it was made
    assert capsys.readouterr().out.splitlines()[-1] == (
        "compared on images of 1×1×1, 1×97×131, 2×64×96, 3×33×50 (N×H×W): equal to the checkpoint's"
    )


# --- networks of the user's own ------------------------------------------------------------------------------------

NETWORKS = """
import torch
from torch import nn
from torch.nn import functional as F


def tiny(num_classes):
    return nn.Conv2d(3, num_classes, 3, padding=1)


class Branching(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) if x.shape[-1] % 2 else -super().forward(x)


def branching(num_classes):
    return Branching(3, num_classes, 1)


class Eighths(nn.Conv2d):
    def forward(self, x):
        x = super().forward(x)
        return x + F.interpolate(F.avg_pool2d(x, 8), scale_factor=8)


def eighths(num_classes):
    return Eighths(3, num_classes, 1)


class Other(nn.Conv2d):
    def forward(self, x):
        x = super().forward(x)
        return x.flip(1) if torch.compiler.is_exporting() else x


def other(num_classes):
    return Other(3, num_classes, 1)
"""


def own(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, settings: dict[str, Any] | None = None) -> Path:
    """A checkpoint of one of `NETWORKS`."""
    (folder / "networks_to_export.py").write_text(NETWORKS)
    monkeypatch.syspath_prepend(folder)
    return checkpoint(folder, f"networks_to_export:{name}", settings)


def test_sizes_that_the_network_itself_refuses_are_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, run: Run
) -> None:
    source = own(tmp_path, monkeypatch, "eighths")
    file = export(source, tmp_path / "p.pt2")
    assert "2×64×96 (N×H×W): equal to the checkpoint's; 3 other sizes the network itself" in capsys.readouterr().out
    images = pictures(3, 40, 56)
    expected = predicted(source, tmp_path, [images], "--set", "train.precision=fp32")[0]
    assert np.array_equal(run(file, planar(images)), expected)


def test_a_network_that_branches_on_a_size_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = own(tmp_path, monkeypatch, "branching")
    line = refusal(source, tmp_path / "p.pt2")
    assert line.startswith(f"{source}: model.name=networks_to_export:branching cannot be exported for images of every")
    assert "no branch on sizes" in line
    assert not list(tmp_path.glob("*p.pt2*"))


def test_a_program_that_does_something_else_gets_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "p.pt2").write_text("old")
    line = refusal(own(tmp_path, monkeypatch, "other"), tmp_path / "p.pt2", "--force")
    assert "the program does not do what the network does" in line
    assert [path.read_text() for path in tmp_path.glob("*p.pt2*")] == ["old"]


# --- input at fault ------------------------------------------------------------------------------------------------


def test_a_file_is_replaced_only_with_force(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, output = own(tmp_path, monkeypatch, "tiny"), tmp_path / "p.pt2"
    output.write_text("old")
    assert refusal(source, output) == f"--output {output}: exists; choose another name, or overwrite with --force"
    assert output.read_text() == "old"
    torch.export.load(export(source, output, "--force"))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("p.pth", "found the type '.pth'; accepted: a name that ends in .pt2 or .onnx"),
        ("p", "found the type ''; accepted: a name that ends in .pt2 or .onnx"),
        ("gone/p.pt2", "no such folder; make it first"),
        ("folder.pt2", "cannot be written; give a file in a folder that you may write to"),
    ],
)
def test_an_output_that_cannot_be_is_named(tmp_path: Path, name: str, said: str) -> None:
    (tmp_path / "folder.pt2").mkdir()
    assert refusal(tmp_path / "not even looked at", tmp_path / name) == f"--output {tmp_path / name}: {said}"


@pytest.mark.skipif(HAS_ONNX, reason="the packages are installed")
def test_missing_packages_are_named(tmp_path: Path) -> None:
    line = refusal(tmp_path / "not even looked at", tmp_path / "p.onnx")
    assert "pip install onnx onnxscript, or choose .pt2" in line


def test_a_broken_checkpoint_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = own(tmp_path, monkeypatch, "tiny")
    source.write_bytes(source.read_bytes()[:-100])
    assert str(source) in refusal(source, tmp_path / "p.pt2")
    assert not (tmp_path / "p.pt2").exists()


def test_one_process_is_enough(tmp_path: Path) -> None:
    line = refusal(tmp_path / "c.pt", tmp_path / "p.pt2", context=DistributedContext(0, 2, 0, CPU, "torchrun"))
    assert line == "found 2 processes; export needs one: python -m fcn export …"
