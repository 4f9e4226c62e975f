"""The procedural data set is complete, labelled as drawn, and the same bytes for the same seed."""

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fcn.data import shapes
from fcn.data.shapes import write_shapes
from fcn.errors import InputError


def files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def masks(root: Path) -> list[np.ndarray]:
    return [np.array(Image.open(path)) for path in sorted((root / "SegmentationClass").iterdir())]


def test_files_are_complete_and_nothing_else_is_left(shapes_root):
    lists = {
        split: (shapes_root / f"ImageSets/Segmentation/{split}.txt").read_text().split() for split in ("train", "val")
    }
    assert [len(names) for names in lists.values()] == [24, 10]
    names = [*lists["train"], *lists["val"]]
    assert len(set(names)) == 34
    assert set(files(shapes_root)) == {
        *(f"JPEGImages/{name}.jpg" for name in names),
        *(f"SegmentationClass/{name}.png" for name in names),
        "ImageSets/Segmentation/train.txt",
        "ImageSets/Segmentation/val.txt",
    }
    assert os.listdir(shapes_root.parent) == [shapes_root.name]


def test_images_and_masks_have_equal_sizes_that_vary(shapes_root):
    sizes = set()
    for path in (shapes_root / "JPEGImages").iterdir():
        with Image.open(path) as image, Image.open(shapes_root / "SegmentationClass" / f"{path.stem}.png") as mask:
            assert image.mode == "RGB"
            assert image.size == mask.size
            sizes.add(image.size)
    assert len(sizes) > 5


def test_at_least_five_foreground_classes_occur(shapes_root):
    found = set(np.unique(np.concatenate([mask.ravel() for mask in masks(shapes_root)])).tolist())
    assert found <= {*range(7), 255}
    assert len(found - {0, 255}) >= 5


def test_a_border_of_255_separates_different_labels(shapes_root):
    for mask in masks(shapes_root):
        assert (mask == 255).any()
        for one, other in ((mask[1:], mask[:-1]), (mask[:, 1:], mask[:, :-1])):
            assert not ((one != other) & (one != 255) & (other != 255)).any()


def test_masks_carry_the_voc_palette(shapes_root):
    published = [(0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0), (0, 0, 128), (128, 0, 128), (0, 128, 128)]
    for path in (shapes_root / "SegmentationClass").iterdir():
        with Image.open(path) as mask:
            assert mask.mode == "P"
            palette = np.array(mask.getpalette()).reshape(-1, 3)
        assert np.array_equal(palette[:7], published)
        assert np.array_equal(palette[255], (224, 224, 192))


def test_an_object_looks_different_from_its_surroundings(shapes_root):
    """Labels lie where the objects are: inside and outside colours differ by more than the noise."""
    differences = []
    for path in (shapes_root / "JPEGImages").iterdir():
        image = np.asarray(Image.open(path), np.float64)
        mask = np.array(Image.open(shapes_root / "SegmentationClass" / f"{path.stem}.png"))
        for label in set(np.unique(mask).tolist()) - {0, 255}:
            differences.append(np.abs(image[mask == label].mean(0) - image[mask == 0].mean(0)).max())
    assert np.median(differences) > 30


def test_second_call_changes_nothing(tmp_path):
    assert write_shapes(tmp_path / "s", train=2, val=1)
    before = files(tmp_path / "s")
    assert not write_shapes(tmp_path / "s", train=3, val=2, seed=5)
    assert files(tmp_path / "s") == before


@pytest.mark.parametrize("content", [[], ["mine.txt"]])
def test_foreign_folder_is_refused_and_left_alone(tmp_path, content):
    (tmp_path / "s").mkdir()
    for name in content:
        (tmp_path / "s" / name).write_text("mine")
    with pytest.raises(InputError, match="is no shapes data set; give a new folder"):
        write_shapes(tmp_path / "s", train=2, val=1)
    assert os.listdir(tmp_path / "s") == content
    assert os.listdir(tmp_path) == ["s"]


def test_seed_decides_every_byte(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_shapes(tmp_path / name, train=3, val=1, seed=seed)
    first, same, other = (files(tmp_path / name) for name in "abc")
    assert first == same
    assert first.keys() == other.keys()
    assert all(first[path] != other[path] for path in first if path.endswith((".jpg", ".png")))


def test_all_samples_differ(shapes_root):
    images = [content for path, content in files(shapes_root).items() if path.endswith(".jpg")]
    assert len(set(images)) == len(images)


def test_what_a_killed_writer_left_is_no_obstacle(tmp_path):
    # In a container the next start often has the same process id.
    (tmp_path / f".s.{os.getpid()}.tmp" / "JPEGImages").mkdir(parents=True)
    assert write_shapes(tmp_path / "s", train=2, val=1)


def test_of_several_writers_one_wins(tmp_path):
    write = partial(write_shapes, train=3, val=1)
    with ProcessPoolExecutor(3, multiprocessing.get_context("fork")) as pool:
        written = list(pool.map(write, [tmp_path / "s"] * 3))
    assert sum(written) == 1
    assert os.listdir(tmp_path) == ["s"]
    assert len(files(tmp_path / "s")) == 10


def test_command_writes_and_says_so(tmp_path, capsys):
    arguments = [str(tmp_path / "s"), "--train", "2", "--val", "1", "--seed", "3"]
    assert shapes.main(arguments) == 0
    assert "written, 2 + 1 images" in capsys.readouterr().out
    assert shapes.main(arguments) == 0
    assert "exists already" in capsys.readouterr().out
    for wrong in ("many", "0"):
        assert shapes.main([str(tmp_path / "t"), "--train", wrong]) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: python -m fcn.data.shapes: ")
        assert "--train" in said
        assert said.count("\n") == 1
    assert not (tmp_path / "t").exists()
    (tmp_path / "t").mkdir()
    assert shapes.main([str(tmp_path / "t")]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path / 't'}: exists, but is no shapes data set; give a new folder\n"
