"""A fault in the input ends every rank with status 2 and one clear line, from the command line."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from tests.dist.ranks import CHECKOUT, command, environment, started

GONE_WITHIN_S = 20


def edit(old: str, new: str) -> Callable[[Path, Path], None]:
    """Change one text of the config file."""

    def apply(config: Path, root: Path) -> None:
        text = config.read_text()
        assert old in text
        config.write_text(text.replace(old, new))

    return apply


def in_data(change: Callable[[Path, str], None]) -> Callable[[Path, Path], None]:
    """Change the files of every training image, so that the first step meets the fault on every rank."""

    def apply(config: Path, root: Path) -> None:
        for name in (root / "ImageSets/Segmentation/train.txt").read_text().split():
            change(root, name)

    return apply


def remove_mask(root: Path, name: str) -> None:
    (root / "SegmentationClass" / f"{name}.png").unlink()


def resize_mask(root: Path, name: str) -> None:
    path = root / "SegmentationClass" / f"{name}.png"
    mask = Image.open(path)
    mask.resize((mask.width + 1, mask.height)).save(path)


def spoil_label(root: Path, name: str) -> None:
    path = root / "SegmentationClass" / f"{name}.png"
    mask = Image.open(path)
    mask.putpixel((3, 3), 42)
    mask.save(path)


def spoil_jpeg(root: Path, name: str) -> None:
    path = root / "JPEGImages" / f"{name}.jpg"
    path.write_bytes(path.read_bytes()[:-300])


FAULTS = {
    "unknown key": (edit("lr: ", "lrr: "), ["optim.lrr: unknown key; did you mean optim.lr?"]),
    "duplicate key": (edit("seed: 0", "seed: 0\nseed: 1"), ["seed: found twice", "keep one"]),
    "1e-3": (edit("lr: 0.02", "lr: 1e-3"), ["optim.lr: found the text '1e-3'", "a number above 0", "write 0.001"]),
    "batch not divisible": (edit("batch_size: 12", "batch_size: 13"), ["found 13", "2 processes", "12 or 14"]),
    "missing folder": (edit("root: ", "root: /no/such/place"), ["data.root: /no/such/place", "no such folder"]),
    "image without mask": (in_data(remove_mask), ["SegmentationClass/", "no such file", "remove the entry"]),
    "mask of another size": (in_data(resize_mask), ["SegmentationClass/", "found a mask of", "equal sizes"]),
    "label above the classes": (in_data(spoil_label), ["found label 42", "0 to 6 (7 classes)"]),
    "unreadable JPEG": (in_data(spoil_jpeg), ["JPEGImages/", "broken image", "remove it from the split"]),
    "negative crop": (edit("crop:\n  - 48", "crop:\n  - -48"), ["data.crop: found [-48, 48]", "1 or more"]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_one_line_and_every_rank_gone(tiny, shapes_root: Path, tmp_path: Path, fault: str) -> None:
    change, expected = FAULTS[fault]
    root = tmp_path / "data"
    shutil.copytree(shapes_root, root)
    config = Path(tiny(data__root=str(root), data__workers=1))
    change(config, root)
    with started(2, "train_ddp.py", "--config", str(config), stderr=subprocess.PIPE) as process:
        complaint = next(line for line in process.stderr if line.startswith("error: "))
        rest = process.communicate(timeout=GONE_WITHIN_S)[1]
        assert not process.family(), "nobody is left"
    for words in expected:
        assert words in complaint
    ours = rest.partition("torch/distributed/")[0]  # torchrun's own report follows
    assert "Traceback" not in ours
    assert "exitcode  : 2 " in rest, "torchrun reports the ranks' own status"
    assert complaint.removeprefix("error: ").split(" [rank")[0].strip() in rest, "and the cause"


def test_plain_python_exits_with_2_and_all_problems_at_once(tiny) -> None:
    config = Path(tiny())
    edit("seed: 0", "sede: 0")(config, config)
    edit("hflip: 0.5", "hflip: 1.5")(config, config)
    arguments = ("train_ddp.py", "--config", str(config), "eval.evry=3")
    done = subprocess.run(command(1, *arguments), cwd=CHECKOUT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 2
    lines = done.stderr.splitlines()
    assert len(lines) == 3, done.stderr
    assert all(line.startswith("error: ") for line in lines)
    for words in ("sede: unknown key; did you mean seed?", "data.hflip: found 1.5", "eval.evry: unknown key"):
        assert words in done.stderr
