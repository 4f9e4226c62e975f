"""A fault in the input ends every rank with status 2 and one clear line, from the command line."""

from __future__ import annotations

import shutil
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from tests.dist.ranks import CHECKOUT, TIMEOUT_S, command, complaints, environment, run, started


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
    "missing folder": (edit("root: ", "root: /no/such/place"), ["data.root: /no/such/place", "no such folder"]),
    "image without mask": (in_data(remove_mask), ["SegmentationClass/", "no such file", "take the image out"]),
    "mask of another size": (in_data(resize_mask), ["SegmentationClass/", "found a mask of", "equal sizes"]),
    "label above the classes": (in_data(spoil_label), ["found label 42", "0 to 6 (7 classes)"]),
    "weights of other classes": (
        edit("ignore_index: 255", "weights: [1, 2]"),
        ["loss.weights: found 2 numbers", "7 classes", "one number per class"],
    ),
    "unreadable JPEG": (in_data(spoil_jpeg), ["JPEGImages/", "broken image", "leave it out"]),
}

CONFIG_FAULTS = {
    "warmup: ": ("warmupp: ", ["optim.warmupp: unknown key; did you mean optim.warmup?"]),
    "seed: 0": ("seed: 0\nseed: 1", ["seed: found twice", "keep one"]),
    "lr: 0.02": ("lr: 1e-3", ["optim.lr: found the text '1e-3'", "a number above 0", "write 0.001"]),
    "batch_size: 12": ("batch_size: 13", ["found 13", "2 processes", "12 or 14"]),
    "crop:\n  - 48": ("crop:\n  - -48", ["data.crop: found [-48, 48]", "1 or more"]),
}


ALIKE = ("mask of another size", "label above the classes", "weights of other classes")
"""They take the ways of the others to the ranks; `tests/commands/test_mistakes.py` has what is said of such."""


@pytest.mark.parametrize(
    "fault", [pytest.param(fault, marks=pytest.mark.campaign) if fault in ALIKE else fault for fault in FAULTS]
)
def test_one_line_and_every_rank_gone(tiny, shapes_root: Path, tmp_path: Path, fault: str) -> None:
    change, expected = FAULTS[fault]
    root = tmp_path / "data"
    shutil.copytree(shapes_root, root)
    config = Path(tiny(data__root=str(root), data__workers=1))
    change(config, root)
    lines = complaints_about(config)
    assert 1 <= len(lines) <= 2, "ranks that met different files name each"
    assert all(words in line for words in expected for line in lines)


def test_every_fault_of_a_config_has_its_line(tiny) -> None:
    config = Path(tiny())
    for old, (new, _) in CONFIG_FAULTS.items():
        edit(old, new)(config, config)
    lines = complaints_about(config)
    assert len(lines) == len(CONFIG_FAULTS)
    for _, expected in CONFIG_FAULTS.values():
        assert sum(all(words in line for words in expected) for line in lines) == 1


def complaints_about(config: Path) -> list[str]:
    """The lines that a run on two processes leaves, which must be all that it leaves."""
    with started(2, "train_ddp.py", "--config", str(config), stderr=subprocess.PIPE) as process:
        too_late = threading.Timer(TIMEOUT_S, process.kill_all)
        too_late.start()
        errors = process.stderr.read()
        process.wait()
        assert too_late.is_alive(), f"everybody is gone within {TIMEOUT_S} s"
        too_late.cancel()
        assert not process.family(), "nobody is left"
    assert errors.count("Traceback") == 1, "torchrun's own"
    assert errors.count("exitcode  : 2 ") == 2, "torchrun reports the ranks' own status"
    return complaints(errors)


def test_what_is_said_before_restarts_is_said_once(tiny) -> None:
    done = run(2, "--max-restarts=2", "train_ddp.py", "--config", tiny(), "optim.lr=-1", "eval.foo=3", status=1)
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert [line.partition(": found")[0] for line in lines if "found" in line] == ["error: command line: 'optim.lr=-1': optim.lr"]
    first, _, rest = done.stderr.partition("attempt_2/")
    assert [first.count(line.removeprefix("error: ")) for line in lines] == [1, 1], "at the first start"
    assert complaints(rest) == [line.removeprefix("error: ") for line in lines], "and at the end"


def test_a_terminal_gets_no_control_characters_from_torchruns_report(tiny) -> None:
    done = run(2, "train_ddp.py", "--config", tiny(), 'data.root="a\\e[31m"', status=1)
    assert "\x1b" not in done.stderr
    (line,) = complaints(done.stderr)
    assert line.startswith("data.root: a\\x1b[31m: no such folder")


def test_the_log_of_a_run_says_why_its_next_start_failed(tiny, tmp_path: Path) -> None:
    config = tiny()
    run(2, "train_ddp.py", "--config", config)
    done = run(2, "train_ddp.py", "--config", config, "data.root=/no/such/place", status=1)
    (line,) = complaints(done.stderr)
    log = (tmp_path / "run" / "log.txt").read_text().splitlines()
    assert log[-1].endswith(f" error: {line}")
    assert sum(line in one for one in log) == 1


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
