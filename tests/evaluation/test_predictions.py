"""`python -m fcn predict` on real files, with a network whose classes one sees: the strongest of red, green, blue."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fcn.checkpoints.format import save_checkpoint
from fcn.errors import InputError
from fcn.evaluation import plan_files
from tests.cli import ALONE, call

PALETTE = [[10, 20, 30], [200, 100, 50], [90, 250, 70]]
NETWORK = """
from torch import nn

def build(num_classes):
    return nn.Conv2d(3, num_classes, 1, bias=False)
"""


TRUST = ("--trust-code", "strongest:build")


@pytest.fixture
def predict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """`predict(*arguments)` with a checkpoint whose data set is not here; returns the output folder."""
    (tmp_path / "strongest.py").write_text(NETWORK)
    monkeypatch.syspath_prepend(tmp_path)
    config = {
        "run_dir": "gone",
        "data": {"name": "gone:Data", "root": "gone", "mean": [0.5] * 3, "std": [0.5] * 3, "workers": 0},
        "model": {"name": "strongest:build"},
        "train": {"batch_size": 1, "steps": 1, "precision": "fp32"},
        "eval": {"preset": "short520"},
    }
    state = {"model": {"weight": torch.eye(3).reshape(3, 3, 1, 1)}, "step": 7, "config": config}
    checkpoint, output = tmp_path / "c.pt", tmp_path / "out"
    save_checkpoint(checkpoint, state | {"classes": ["red", "green", "blue"], "palette": PALETTE})

    def predict(*arguments: str | Path) -> Path:
        given = [] if "--output" in arguments else ["--output", output]
        assert call([str(a) for a in ("predict", "--checkpoint", checkpoint, *TRUST, *given, *arguments)], ALONE) == 0
        return output

    return predict


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """(height, width, 3) uint8; the strongest channel is clear, but another one is with another normalisation."""
    rng = np.random.default_rng(seed)
    return rng.permuted(np.broadcast_to(np.array([120, 124, 128], np.uint8), (height, width, 3)), axis=2)


def save(path: Path, pixels: np.ndarray | None = None, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture(5, 7) if pixels is None else pixels).save(path, **options)
    return path


def classes_of(path: Path) -> list:
    return np.asarray(Image.open(path)).tolist()


def under(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


# --- what is written -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tta", [[], ["eval.flip=true", "eval.window=[4,6]", "eval.batch_size=2"]], ids=str)
def test_every_pixel_of_images_of_mixed_sizes_is_the_network_s(predict, tmp_path: Path, tta: Sequence[str]) -> None:
    sizes = [(5, 7), (7, 5), (1, 1), (5, 7), (30, 9), (5, 7), (1, 640)]
    for number, size in enumerate(sizes):
        save(tmp_path / f"in/{number}.png", picture(*size, seed=number))
    output = predict(tmp_path / "in", *(text for view in tta for text in ("--set", view)))
    for number, size in enumerate(sizes):
        assert classes_of(output / f"{number}.png") == picture(*size, seed=number).argmax(2).tolist()


def test_masks_are_palette_pngs_of_8_bits_in_the_checkpoint_s_colours(predict, tmp_path: Path) -> None:
    mask = predict(save(tmp_path / "a.png")) / "a.png"
    assert mask.read_bytes()[24:26] == bytes([8, 3])  # bit depth and colour type in the PNG's header
    colours = np.asarray(Image.open(mask).convert("RGB"))
    assert np.array_equal(colours, np.array(PALETTE)[picture(5, 7).argmax(2)])


def test_overlays_are_half_image_half_colours(predict, tmp_path: Path) -> None:
    image = save(tmp_path / "a.png")
    overlay = np.asarray(Image.open(predict(image) / "overlays/a.png")).astype(float)
    expected = (picture(5, 7).astype(float) + np.array(PALETTE)[picture(5, 7).argmax(2)]) / 2
    assert np.abs(overlay - expected).max() <= 1
    predict("--output", tmp_path / "masks", "--no-overlays", image)
    assert under(tmp_path / "masks") == ["a.png"]


@pytest.mark.parametrize(
    ("convert", "suffix"),
    [
        (lambda image: image.convert("RGBA"), "png"),
        (lambda image: image.quantize(64), "gif"),
        (lambda image: image, "webp"),
        (lambda image: image, "TIFF"),
    ],
)
def test_any_mode_and_type(predict, tmp_path: Path, convert, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    convert(Image.fromarray(picture(12, 9))).save(path, **({"lossless": True} if suffix == "webp" else {}))
    assert classes_of(predict(path) / "a.png") == picture(12, 9).argmax(2).tolist()


def test_image_that_lies_on_its_side_is_predicted_upright_beside_others_of_that_size(predict, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90° clockwise
    for number in range(4):
        save(tmp_path / f"in/{number}.tiff", picture(5, 7, number), **({"exif": exif} if number % 2 else {}))
    output = predict(tmp_path / "in", "--set", "eval.batch_size=4")
    for number in range(4):
        expected = np.rot90(picture(5, 7, number).argmax(2), -(number % 2))
        assert classes_of(output / f"{number}.png") == expected.tolist()


def test_images_are_taken_as_they_are_stored_if_the_network_s_config_says_so(predict, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    image = save(tmp_path / "a.png", picture(5, 7), exif=exif)
    save(tmp_path / "labels/a.png", np.ones((5, 7), np.uint8))
    output = predict("--set", "data.exif_orientation=false", "--labels", tmp_path / "labels", image)
    assert classes_of(output / "a.png") == picture(5, 7).argmax(2).tolist()
    assert (np.asarray(Image.open(output / "panels/a.png"))[60:200, 400:700] == PALETTE[1]).all()
    with pytest.raises(InputError, match=r"labels/a.png: found a mask of 7x5 [^\n]* set data.exif_orientation=false$"):
        predict("--force", "--labels", tmp_path / "labels", image)


def test_panels_of_the_images_that_have_labels(predict, tmp_path: Path) -> None:
    for name in ("a", "sub/b", "c"):
        save(tmp_path / f"in/{name}.png", picture(5, 7))
    for name in ("a", "sub/b"):
        save(tmp_path / f"labels/{name}.png", np.ones((5, 7), np.uint8))
    output = predict("--labels", tmp_path / "labels", tmp_path / "in")
    assert under(output / "panels") == ["a.png", "sub/b.png"]
    label = np.asarray(Image.open(output / "panels/a.png"))[60:200, 400:700]
    assert (label == PALETTE[1]).all()


# --- which files ---------------------------------------------------------------------------------------------------


def test_masks_beside_their_images_are_no_images(tmp_path: Path) -> None:
    for name in ("1", "1_matte", "2_matte"):
        save(tmp_path / "in" / f"{name}.png")
    options = {"overlays": False, "labels": str(tmp_path / "in"), "mask_suffix": "_matte", "force": False}
    files = plan_files([str(tmp_path / "in")], tmp_path / "out", **options)
    assert [(file.image.name, file.label and file.label.name) for file in files] == [
        ("1.png", "1_matte.png"),
        ("2_matte.png", None),
    ]


def test_scores_need_a_file_that_can_be_written(predict, tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "no" / "scores.json"):
        with pytest.raises(InputError, match=r"^--json [^\n]*$"):
            call(["evaluate", "--checkpoint", str(tmp_path / "c.pt"), "--json", str(path)], ALONE)


def test_folders_keep_their_shape_and_hidden_files_and_the_output_are_left_out(predict, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    for name in ("a.png", "sub/a.jpg", "sub/deep/b.c.png", ".hidden.png", ".hidden/a.png"):
        save(folder / name)
    (folder / "notes.txt").write_text("no image")
    (folder / "loop").symlink_to(folder)
    lone = save(tmp_path / "elsewhere/z.png")
    results = ["a.png", "overlays/a.png", "overlays/sub/a.png", "overlays/sub/deep/b.c.png", "overlays/z.png",
               "sub/a.png", "sub/deep/b.c.png", "z.png"]  # fmt: skip
    for again in ([], ["--force"]):
        predict("--output", folder / "results", *again, folder, folder / ".", lone, lone)
        assert under(folder / "results") == results


def test_broken_images_are_named_after_the_others_are_predicted(predict, tmp_path: Path, capsys) -> None:
    for number in range(5):
        save(tmp_path / f"in/{number}.png", picture(40, 40, number))
    content = (tmp_path / "in/1.png").read_bytes()
    (tmp_path / "in/1.png").write_bytes(content[: len(content) // 2])
    (tmp_path / "in/3.png").write_bytes(b"text")
    with pytest.raises(InputError) as caught:
        predict(tmp_path / "in")
    first, second = str(caught.value).splitlines()
    assert first.startswith(f"{tmp_path}/in/1.png: broken image")
    assert second.startswith(f"{tmp_path}/in/3.png: cannot be read (not an image)")
    assert [name for name in under(tmp_path / "out") if "/" not in name] == ["0.png", "2.png", "4.png"]
    assert f"3 of 5 images predicted into {tmp_path}/out (native)" in capsys.readouterr().out


def test_mask_that_does_not_fit_is_named_and_the_image_predicted(predict, tmp_path: Path) -> None:
    save(tmp_path / "in/a.png", picture(5, 7))
    save(tmp_path / "in/b.png", picture(5, 7))
    save(tmp_path / "labels/a.png", np.zeros((7, 5), np.uint8))
    save(tmp_path / "labels/b.png", np.full((5, 7), 3, np.uint8))
    with pytest.raises(InputError) as caught:
        predict("--labels", tmp_path / "labels", tmp_path / "in")
    first, second = str(caught.value).splitlines()
    assert first.startswith(f"{tmp_path}/labels/a.png: found a mask of 5x7 pixels for the image a.png of 7x5")
    assert second.startswith(f"{tmp_path}/labels/b.png: found label 3; accepted: 0 to 2")
    assert under(tmp_path / "out") == ["a.png", "b.png", "overlays/a.png", "overlays/b.png"]


def test_progress_is_plain_lines_where_there_is_no_terminal(predict, tmp_path: Path, capsys) -> None:
    predict(save(tmp_path / "a.png"), save(tmp_path / "b.png"))
    shown = capsys.readouterr().err
    assert "2/2" in shown.splitlines()[-1]
    assert "\r" not in shown


# --- what is refused, before anything is written -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("in/a.png missing.png", "{tmp}/missing.png: no such file or folder; give images"),
        ("empty", "{tmp}/empty: found no images; give images"),
        ("in in2", "{tmp}/in2/a.jpg: its result would be {tmp}/out/a.png, and so would that of {tmp}/in/a.png; rename"),
        ("tree", "{tmp}/tree/overlays/a.png: its result would be {tmp}/out/overlays/a.png, and so would"),
        ("in --output in", "--output {tmp}/in: is an input folder itself; choose another folder"),
        ("in/a.png --output in --force", "{tmp}/in/a.png: is an input, and would be overwritten; choose another"),
        ("in --output in/a.png", "--output {tmp}/in/a.png: cannot be made"),
        ("in --labels missing", "--labels {tmp}/missing: no such folder; accepted: a folder of masks"),
        ("in --labels in2/sub", "--labels {tmp}/in2/sub: found no mask of these images; accepted: names such as a.png"),
        ("in --set optim.lr=1", "--set optim.lr=1: accepted: KEY=VALUE with one of the keys eval.batch_size"),
        ("in --set eval.flip=1", "command line: 'eval.flip=1': eval.flip: found 1; accepted: true or false"),
        ("in --checkpoint missing", "{tmp}/missing: no such file"),
    ],
)
def test_bad_input_is_one_line(predict, tmp_path: Path, arguments: str, message: str) -> None:
    for name in ("in/a.png", "in2/a.jpg", "in2/sub/z.png", "tree/a.png", "tree/overlays/a.png"):
        save(tmp_path / name)
    (tmp_path / "empty").mkdir()
    before = under(tmp_path)
    words = [text if text.startswith("-") or "=" in text else tmp_path / text for text in arguments.split()]
    with pytest.raises(InputError) as caught:
        predict(*words)
    assert str(caught.value).startswith(message.format(tmp=tmp_path))
    assert "\n" not in str(caught.value)
    assert under(tmp_path) == before


def test_results_are_overwritten_only_by_force(predict, tmp_path: Path) -> None:
    image = save(tmp_path / "in/a.png", picture(5, 7, 1))
    output = predict(tmp_path / "in")
    save(tmp_path / "in/b.png")
    save(image, picture(9, 9, 2))
    with pytest.raises(InputError) as caught:
        predict(tmp_path / "in")
    assert str(caught.value) == (
        f"{output}/a.png: exists (and 1 more results); choose another --output, or overwrite with --force"
    )
    assert under(output) == ["a.png", "overlays/a.png"]
    predict("--force", tmp_path / "in")
    assert classes_of(output / "a.png") == picture(9, 9, 2).argmax(2).tolist()
    assert under(output) == ["a.png", "b.png", "overlays/a.png", "overlays/b.png"]
