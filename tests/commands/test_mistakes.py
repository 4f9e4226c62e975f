"""The most likely mistakes of a new user, and what each of them is told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import train_ddp
from fcn.commands import cli
from fcn.data.shapes import write_shapes

ROOT = Path(__file__).parents[2]
TRAIN, CONFIG = "train_ddp.py", "--config configs/quickstart.yaml data.root={data} run_dir={folder}/run"
AGAIN = CONFIG.replace("{folder}/run", "{run}")
TINY = (
    "data.workers=0 data.crop=[32,32] model.width=2 train.batch_size=2 train.steps=1 eval.every=100 eval.pictures=0 "
    "wandb.mode=disabled"
)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a user works: a data set, a run that is finished, and an empty folder."""

    data: Path
    run: Path
    folder: Path

    def words(self, line: str) -> list[str]:
        return self.fill(line).split()

    def fill(self, text: str) -> str:
        return text.format(data=self.data, run=self.run, folder=self.folder)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A data set, and the folder of a run on it."""
    folder = tmp_path_factory.mktemp("mistakes")
    write_shapes(folder / "shapes", train=8, val=2)
    words = f"--config configs/quickstart.yaml data.root={folder}/shapes run_dir={folder}/run {TINY}".split()
    assert train_ddp.main(words) == 0
    return folder / "shapes", folder / "run"


@pytest.fixture
def place(finished: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.chdir(ROOT)
    return Place(*finished, tmp_path)


# --- what goes wrong on the disk


def nothing(place: Place) -> None:
    pass


def my_masks(change: Callable[[Path], None]) -> Callable[[Place], None]:
    """A folder of four images and masks of a user's own, in which `change` goes wrong."""

    def prepare(place: Place) -> None:
        rng = np.random.default_rng(0)
        for name in "abcd":
            for part, shape in (("images", (40, 50, 3)), ("masks", (40, 50))):
                (place.folder / "mine" / part).mkdir(parents=True, exist_ok=True)
                pixels = rng.integers(0, 2 if part == "masks" else 256, shape, np.uint8)
                Image.fromarray(pixels).save(place.folder / "mine" / part / f"{name}.png")
        change(place.folder / "mine")

    return prepare


def label_seven(mine: Path) -> None:
    Image.fromarray(np.full((40, 50), 7, np.uint8)).save(mine / "masks" / "b.png")


def jpeg_masks(mine: Path) -> None:
    colours = np.array([(128, 64, 128), (70, 130, 180)], np.uint8)
    for path in list((mine / "masks").iterdir()):
        Image.fromarray(colours[np.asarray(Image.open(path))]).save(path.with_suffix(".jpg"), quality=70)
        path.unlink()


def smaller_mask(mine: Path) -> None:
    Image.fromarray(np.zeros((20, 25), np.uint8)).save(mine / "masks" / "c.png")


def lost_mask(mine: Path) -> None:
    (mine / "masks" / "d.png").unlink()


def equal_keys(place: Place) -> None:
    text = (ROOT / "configs" / "quickstart.yaml").read_text()
    (place.folder / "mine.yaml").write_text(text + "seed: 1\n")


MINE = (
    "--config configs/quickstart.yaml data.name=folder data.root={folder}/mine data.classes=[road,sky] "
    "data.val_fraction=0.5 run_dir={folder}/run " + TINY
)

MISTAKES = {
    "the config's name is misspelt": (
        nothing, TRAIN, "--config configs/quikstart.yaml",
        "configs/quikstart.yaml: no such config file; give a YAML file, did you mean configs/quickstart.yaml?",
    ),
    "--config is forgotten": (
        nothing, TRAIN, "configs/quickstart.yaml",
        "train_ddp.py: the following arguments are required: --config; see train_ddp.py --help",
    ),
    "a key is misspelt": (
        nothing, TRAIN, CONFIG + " train.batchsize=8",
        "command line: 'train.batchsize=8': train.batchsize: unknown key; did you mean train.batch_size?",
    ),
    "a key without its section": (
        nothing, TRAIN, CONFIG + " lr=0.1", "command line: 'lr=0.1': lr: unknown key; did you mean optim.lr?",
    ),
    "a space instead of =": (
        nothing, TRAIN, CONFIG + " optim.lr 0.1",
        "command line: 'optim.lr': found no '='; write KEY=VALUE, such as optim.lr=0.01\n"
        "command line: '0.1': found no '='; write KEY=VALUE, such as optim.lr=0.01",
    ),
    "a word instead of a number": (
        nothing, TRAIN, CONFIG + " optim.lr=fast",
        "command line: 'optim.lr=fast': optim.lr: found the text 'fast'; accepted: a number above 0",
    ),
    "one number instead of two": (
        nothing, TRAIN, CONFIG + " data.crop=96",
        "command line: 'data.crop=96': data.crop: found 96; accepted: [height, width], two whole numbers, 1 or more, "
        "or null",
    ),
    "PyTorch's name of a precision": (
        nothing, TRAIN, CONFIG + " train.precision=float16",
        "command line: 'train.precision=float16': train.precision: found the text 'float16'; accepted: one of fp32, "
        "bf16, fp16, fp64; did you mean fp16?",
    ),
    "steps and epochs": (
        nothing, TRAIN, CONFIG + " train.epochs=5",
        "configs/quickstart.yaml: train.steps, train.epochs: both are set; accepted: exactly one of them, the other "
        "null or absent",
    ),
    "a key twice": (
        equal_keys, TRAIN, "--config {folder}/mine.yaml",
        "{folder}/mine.yaml:35: seed: found twice (first at {folder}/mine.yaml:2); keep one",
    ),
    "a model that is not there": (
        nothing, TRAIN, CONFIG + " model.name=fcn8",
        "command line: 'model.name=fcn8': model.name: found the text 'fcn8'; accepted: one of fcn32s, fcn16s, fcn8s, "
        "fcn8_kitti, fcn_resnet18, fcn_resnet50, fcn_resnet101, unet, linknet, or package.module:function of your own; "
        "did you mean fcn8s?",
    ),
    "an option of another model": (
        nothing, TRAIN, CONFIG + " model.encoder=resnet18",
        "configs/quickstart.yaml: model.encoder: unet has no such option; remove it (an option of linknet)",
    ),
    "the data were never downloaded": (
        nothing, TRAIN, "--config configs/linknet_camvid.yaml data.root={folder}/camvid",
        "data.root: {folder}/camvid: no such folder; set data.root to the data set's folder",
    ),
    "a folder too high": (
        nothing, TRAIN, "--config configs/quickstart.yaml data.root={data}/..",
        "{data}/../ImageSets/Segmentation/train.txt: no such list, so there is no split 'train'; found no split lists "
        "there; is data.root the right folder?",
    ),
    "a split that is not there": (
        nothing, TRAIN, CONFIG + " data.val=test",
        "{data}/ImageSets/Segmentation/test.txt: no such list, so there is no split 'test'; found the splits train, "
        "val",
    ),
    "weights that are not there": (
        nothing, TRAIN, CONFIG + " model.weights=vgg.pth",
        "model.weights: vgg.pth: no such file; give one that torch.save wrote",
    ),
    "more classes in a mask than in the config": (
        my_masks(label_seven), TRAIN, MINE,
        "{folder}/mine/masks/b.png: found label 7; accepted: 0 to 1 (2 classes) and 255 for ignore; correct the mask, "
        "or data.name or data.values",
    ),
    "masks as JPEG": (
        my_masks(jpeg_masks), TRAIN, MINE + ' data.values={{"road":"#804080","sky":"#4682b4"}}',
        "; JPEG does not keep labels, export masks as PNG",
    ),
    "a mask of another size": (
        my_masks(smaller_mask), TRAIN, MINE,
        "{folder}/mine/masks/c.png: found a mask of 25x20 pixels for the image c.png of 50x40; accepted: equal sizes; "
        "export the mask again at the image's size",
    ),
    "an image without a mask": (
        my_masks(lost_mask), TRAIN, MINE,
        "{folder}/mine/masks/d.png: no such file, but the split 'val' needs it; add it, or take the image out",
    ),
    "another model in the same folder": (
        nothing, TRAIN, f"{AGAIN} {TINY} model.width=4",
        "{run}/checkpoints/step_00000001.pt: this checkpoint belongs to another run: model.width: 2 → 4; set these "
        "back to resume, or give the new run its own run_dir",
    ),
    "a second run where one is": (
        nothing, TRAIN, AGAIN + " resume=never",
        "{run}: resume=never, but a run is there; choose another run_dir or delete this one",
    ),
    "a run that never began": (
        nothing, "fcn", "evaluate --checkpoint {folder}",
        "{folder}: found no checkpoint that verifies in its checkpoints/; give a run directory or a .pt file",
    ),
    "a folder instead of a run": (
        nothing, "fcn", "status {data}",
        "{data}: no run is there (no config.yaml); give a directory that training wrote",
    ),
    "an image that is not there": (
        nothing, "fcn", "predict --checkpoint {run} --output {folder}/out x.jpg",
        "x.jpg: no such file or folder; give images, or folders of images",
    ),
    "a setting where predict expects an image": (
        nothing, "fcn", "predict --checkpoint {run} --output {folder}/out {data} eval.flip=true",
        "eval.flip=true: no such file or folder; give images, or folders of images; settings go behind --set: --set "
        "eval.flip=true",
    ),
    "a training key while predicting": (
        nothing, "fcn", "predict --checkpoint {run} --output {folder}/out --set optim.lr=1 {data}",
        "--set optim.lr=1: accepted: KEY=VALUE with one of the keys eval.batch_size, eval.scales, eval.flip, "
        "eval.window, train.precision, data.workers, data.exif_orientation",
    ),
}  # fmt: skip
"""What goes wrong → what was there before, the program, the user's words, and the message: all of it, or its end."""


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_a_new_user_is_told(mistake: str, place: Place, capfd: pytest.CaptureFixture[str]) -> None:
    prepare, program, line, message = MISTAKES[mistake]
    prepare(place)
    main = train_ddp.main if program == TRAIN else cli.main
    assert main(place.words(line)) == 2
    said = capfd.readouterr().err
    expected = place.fill(message)
    if expected.startswith("; "):
        assert said.endswith(f"{expected}\n")
        assert said.count("\n") == 1
    else:
        assert said == "".join(f"error: {one}\n" for one in expected.split("\n"))
