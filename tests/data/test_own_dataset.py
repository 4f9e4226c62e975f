"""A data set of the user's own, by import path: whatever its items are, the network gets the same pixels."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image

from fcn.config import Data
from fcn.data import build_dataset
from fcn.errors import InputError

IMAGE = np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8)
MASK = np.array([[0, 1, 2, 0, 1, 255]] * 4, np.uint8)
SOURCE = """
import numpy as np, torch
from PIL import Image

class Tiny:
    classes = ["a", "b", "c"]

    def __init__(self, root, split, items=2, **rest):
        self.root, self.split, self.items = root, split, items
        vars(self).update(rest)

    def __len__(self):
        return self.items

    def __getitem__(self, index):
        return self.make(index)

def sizes(root, split):
    data = Tiny(root, split)
    data.size = lambda index: (10 * index, 7)
    data.name = lambda index: f"scan {index}"
    data.palette = [(1, 2, 3), (4, 5, 6), (7, 8, 9)]
    return data

def nothing(root, split):
    return None

def no_names(root, split):
    data = Tiny(root, split)
    data.classes = None
    return data
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """The module `mine_N` in the current directory, by a name that no other test has imported."""
    name = f"mine_{abs(hash(tmp_path))}"
    (tmp_path / f"{name}.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield name
    sys.modules.pop(name, None)


def build(mine: str, function: str = "Tiny", item=None, **keys):
    dataset = build_dataset(Data(name=f"{mine}:{function}", root="somewhere", **keys), "train")
    if item is not None:
        dataset.samples.make = lambda index: item
    return dataset


@pytest.mark.parametrize(
    "item",
    [
        (Image.fromarray(IMAGE), Image.fromarray(MASK)),
        (IMAGE, MASK),
        (IMAGE, MASK.astype(np.int64)),
        (torch.from_numpy(IMAGE).permute(2, 0, 1), torch.from_numpy(MASK)),
        [torch.from_numpy(IMAGE).permute(2, 0, 1), torch.from_numpy(MASK).long()[None]],
        (Image.fromarray(IMAGE).convert("RGBA"), MASK[..., None]),
    ],
    ids=["pillow", "arrays", "int64", "tensors", "list", "alpha"],
)
def test_items_of_every_kind(mine, item):
    dataset = build(mine, item=item)
    image, labels = dataset.read(1)
    assert (len(dataset), dataset.size(0), dataset.name(1)) == (2, (4, 6), "000001")
    assert np.array_equal(image, IMAGE)
    assert np.array_equal(labels, MASK)


def test_it_is_built_from_the_root_the_split_and_the_options(mine):
    samples = build(mine, options={"items": 5, "flag": True}).samples
    assert (samples.root, samples.split, samples.items, samples.flag) == ("somewhere", "train", 5, True)


def test_its_own_sizes_names_and_colours_are_used(mine):
    dataset = build(mine, "sizes")
    assert (dataset.size(3), dataset.name(3)) == ((30, 7), "scan 3")
    assert dataset.classes.palette == ((1, 2, 3), (4, 5, 6), (7, 8, 9))


def test_class_names_may_come_from_the_config(mine):
    dataset = build(mine, "no_names", classes=("x", "y", "z"))
    assert dataset.classes.names == ("x", "y", "z")
    assert len(set(dataset.classes.palette)) == 3


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (IMAGE, "sample 0 of MINE: found ndarray; accepted: a pair (image, mask)"),
        ((IMAGE,), "sample 0 of MINE: found tuple; accepted: a pair (image, mask)"),
        ((IMAGE, MASK[:2]), "sample 0 of MINE: found a mask of 6x2 pixels for an image of 6x4; accepted: equal sizes"),
        ((IMAGE / 255, MASK), "the image of sample 0 of MINE: found float64 of shape (4, 6, 3)"),
        ((IMAGE, np.where(MASK == 2, 3, MASK)), "the mask of sample 0 of MINE: found label 3; accepted: 0 to 2"),
        ((IMAGE, np.where(MASK == 2, -1, MASK.astype(int))), "the mask of sample 0 of MINE: found label -1"),
        ((IMAGE, torch.zeros(3, 4, 6)), "the mask of sample 0 of MINE: found float32 of shape (4, 6, 3)"),
        ((np.zeros((0, 6, 3), np.uint8), MASK), "the image of sample 0 of MINE: found uint8 of shape (0, 6, 3)"),
    ],
)  # fmt: skip
def test_items_that_are_no_samples_are_named(mine, item, message):
    with pytest.raises(InputError) as caught:
        build(mine, item=item).read(0)
    assert str(caught.value).startswith(message.replace("MINE", f"{mine}:Tiny"))


def test_a_truncated_file_that_pillow_reads_late_is_named(mine, tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:3000])
    with pytest.raises(InputError, match=f"^sample 0 of {mine}:Tiny: cannot be read .*truncated"):
        build(mine, item=(Image.open(tmp_path / "cut.png"), MASK)).read(0)


def test_a_size_that_is_width_and_height_is_named(mine):
    dataset = build(mine, item=(IMAGE, MASK))
    dataset.samples.size = lambda index: (6, 4)
    assert dataset.size(0) == (6, 4)
    with pytest.raises(InputError, match=r"size\(0\) said \(6, 4\), and the image is \(4, 6\); accepted: its \(height"):
        dataset.read(0)


def test_attributes_that_are_no_methods_are_left_alone(mine):
    dataset = build(mine, options={"size": 256, "name": "tiny", "palette": np.zeros((3, 3), np.uint8)})
    dataset.samples.make = lambda index: (IMAGE, MASK)
    assert (dataset.size(0), dataset.name(0), dataset.classes.palette[2]) == ((4, 6), "000000", (0, 0, 0))


def test_a_broken_file_of_its_own_is_named(mine, tmp_path):
    def make(index):
        return Image.open(tmp_path / "gone.png"), MASK

    dataset = build(mine)
    dataset.samples.make = make
    with pytest.raises(InputError, match=f"^sample 0 of {mine}:Tiny: cannot be read .*gone.png"):
        dataset.read(0)


@pytest.mark.parametrize(
    ("function", "keys", "message"),
    [
        ("Absent", {}, "data.name: found 'MINE:Absent', but"),
        ("nothing", {}, "data.name: MINE:nothing returned NoneType; accepted: a map-style data set"),
        ("no_names", {}, "data.classes: missing, and MINE:no_names has no attribute `classes`"),
        ("Tiny", {"options": {"items": 0}}, "data: the split 'train' of MINE:Tiny is empty"),
        ("sizes", {"options": {"colour": 1}}, "data.options: MINE:sizes cannot be called with root=somewhere"),
        ("Tiny", {"num_classes": 4}, "data.num_classes: found 4, but MINE:Tiny has 3 classes (a, b, c); set"),
        (
            "Tiny",
            {"options": {"palette": [(0, 0, 0)]}},
            "data.name: MINE:Tiny has 1 colours in `palette` for 3 classes",
        ),
    ],
)
def test_what_is_no_data_set_is_refused(mine, function, keys, message):
    with pytest.raises(InputError) as caught:
        build(mine, function, **keys)
    assert str(caught.value).startswith(message.replace("MINE", mine))
    assert "\n" not in str(caught.value)


def test_a_missing_module_is_named():
    with pytest.raises(
        InputError, match=r"^data.name: found 'no_such_mod:X', but there is no module no_such_mod; accepted"
    ):
        build_dataset(Data(name="no_such_mod:X", root="."), "train")
