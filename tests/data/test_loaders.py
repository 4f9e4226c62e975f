"""Batches hold the same bytes whoever loads them, and what all ranks are told about a step is true."""

import shutil
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from fcn.config import Data
from fcn.data import (
    EvalBatches,
    EvalSampler,
    EvalTransform,
    GlobalBatchSampler,
    LabelCounts,
    Patience,
    RankBatches,
    TrainTransform,
    batch_loader,
    build_dataset,
    device_batches,
)
from fcn.data.loaders import pad_collate
from fcn.errors import InputError

CPU = torch.device("cpu")


class Case(NamedTuple):
    crop: tuple[int, int] | None
    scale: tuple[float, float] | None
    group: int = 1


CROPPED, WHOLE, RESIZED = Case((64, 48), (0.5, 1.5)), Case(None, None), Case(None, (0.5, 1.5))
GROUPED = Case(None, (0.5, 1.5), 3)
CASES = {"crop": CROPPED, "whole": WHOLE, "resized": RESIZED}


def loader_of(root, case, *, batch=4, steps=4, start=0, rank=0, world_size=1, workers=0, skip=False, stop=None):
    """The training loader of one rank; without resize nor flip, samples are the files themselves."""
    dataset = build_dataset(Data(name="shapes", root=str(root)), "train")
    transform = TrainTransform(case.crop, case.scale, 0.5 if case.scale else 0.0)
    batches = RankBatches(dataset, transform, seed=0, skip=skip)
    sampler = GlobalBatchSampler(
        dataset,
        batch_size=batch,
        steps=steps,
        start_step=start,
        seed=0,
        rank=rank,
        world_size=world_size,
        window=case.group,
        shape=None if case.crop else batches.shape,
    )
    patience = Patience(stop_asked=stop) if stop else Patience()
    return batch_loader(batches, sampler, workers, CPU, patience)


def batches_of(root, case, **keys):
    """What that loader hands over at each step: a batch, or an InputError."""
    return [found if isinstance(found, InputError) else found.batch for found in loader_of(root, case, **keys)]


def mask(root, index):
    name = (root / "ImageSets/Segmentation/train.txt").read_text().split()[index]
    return np.array(Image.open(root / f"SegmentationClass/{name}.png"))


def assert_equal(one, other):
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.fixture
def copied(shapes_root, tmp_path):
    """A copy of the data set that a test may break."""
    return shutil.copytree(shapes_root, tmp_path / "shapes")


# --- padding collate -----------------------------------------------------------------------------------------------


def arrays(*sizes):
    return [np.full((*size, 3), 7 + i, np.uint8) for i, size in enumerate(sizes)], [
        np.full(size, 1 + i, np.uint8) for i, size in enumerate(sizes)
    ]


def test_collate_pads_at_the_bottom_and_right_with_labels_255():
    batch = pad_collate(*arrays((1, 3), (2, 1)), [5, 9])
    assert (batch.images.dtype, batch.labels.dtype) == (torch.uint8, torch.uint8)
    assert batch.labels.tolist() == [[[1, 1, 1], [255, 255, 255]], [[2, 255, 255], [2, 255, 255]]]
    assert batch.images.shape == (2, 2, 3, 3)
    assert (batch.images[0, :1] == 7).all()
    assert (batch.images[1, :, :1] == 8).all()
    assert batch.sizes.tolist() == [[1, 3], [2, 1]]
    assert batch.indices.tolist() == [5, 9]
    assert [[row[1], row[2], row[255], row.sum()] for row in batch.counts] == [[3, 0, 0, 3], [0, 2, 0, 2]]
    assert (batch.sizes.dtype, batch.indices.dtype) == (torch.int64, torch.int64)
    assert batch.padded


def test_collate_pads_to_an_explicit_size():
    batch = pad_collate(*arrays((2, 2), (2, 2)), [0, 1], (3, 4))
    assert batch.images.shape == (2, 3, 4, 3)
    expected = np.full((2, 3, 4), 255)
    expected[0, :2, :2], expected[1, :2, :2] = 1, 2
    assert np.array_equal(batch.labels, expected)
    assert batch.padded


def test_collate_of_equal_sizes_pads_nothing():
    batch = pad_collate(*arrays((2, 3), (2, 3)), [0, 1])
    assert batch.labels.tolist() == [[[1] * 3] * 2, [[2] * 3] * 2]
    assert not batch.padded


def test_collate_of_nothing_is_a_batch_without_images():
    batch = pad_collate([], [], [], (5, 7))
    assert [tuple(tensor.shape) for tensor in batch] == [(0, 5, 7, 3), (0, 5, 7), (0, 2), (0,), (0,), (0, 256)]
    assert [tensor.dtype for tensor in batch] == [torch.uint8, torch.uint8, *[torch.int64] * 4]
    assert LabelCounts.of(batch.counts) == ([0] * 256, 0)
    assert not batch.padded


def test_collate_takes_flipped_arrays():
    image = np.arange(6, dtype=np.uint8).reshape(1, 2, 3)
    batch = pad_collate([image[:, ::-1]], [np.array([[1, 2]], np.uint8)[:, ::-1]], [0])
    assert batch.images.tolist() == [[[[3, 4, 5], [0, 1, 2]]]]
    assert batch.labels.tolist() == [[[2, 1]]]


# --- training ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [*CASES.values(), GROUPED], ids=[*CASES, "grouped"])
def test_workers_do_not_change_a_batch(shapes_root, case):
    alone, shared = batches_of(shapes_root, case), batches_of(shapes_root, case, workers=2)
    assert len(alone) == len(shared) == 4
    for one, other in zip(alone, shared):
        assert_equal(one, other)


@pytest.mark.parametrize("case", [*CASES.values(), GROUPED], ids=[*CASES, "grouped"])
@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_the_batch_of_one_process(shapes_root, case, world_size):
    alone = batches_of(shapes_root, case)
    ranks = [batches_of(shapes_root, case, rank=rank, world_size=world_size) for rank in range(world_size)]
    for whole, *parts in zip(alone, *ranks):
        assert_equal(whole, [torch.cat(tensors) for tensors in zip(*parts)])


@pytest.mark.parametrize("case", [WHOLE, RESIZED, GROUPED], ids=["whole", "resized", "grouped"])
def test_padded_size_is_the_largest_of_the_global_batch_on_every_rank(shapes_root, case):
    ranks = [batches_of(shapes_root, case, rank=rank, world_size=2) for rank in range(2)]
    own_size_is_smaller = False
    for one, other in zip(*ranks):
        largest = torch.cat([one.sizes, other.sizes]).amax(0).tolist()
        assert list(one.images.shape[1:3]) == list(other.images.shape[1:3]) == largest
        own_size_is_smaller |= one.sizes.amax(0).tolist() != other.sizes.amax(0).tolist()
    assert own_size_is_smaller


def test_whole_images_arrive_unchanged_at_the_top_left(shapes_root):
    for batch in batches_of(shapes_root, WHOLE):
        for row, index in enumerate(batch.indices.tolist()):
            expected = np.full(batch.labels.shape[1:], 255)
            stored = mask(shapes_root, index)
            expected[: stored.shape[0], : stored.shape[1]] = stored
            assert batch.sizes[row].tolist() == list(stored.shape)
            assert np.array_equal(batch.labels[row], expected)


def test_a_sample_is_augmented_anew_in_each_epoch(shapes_root):
    (first,), (second,) = (batches_of(shapes_root, CROPPED, batch=24, steps=s + 1, start=s) for s in (0, 1))
    assert sorted(first.indices.tolist()) == sorted(second.indices.tolist()) == list(range(24))
    before = dict(zip(first.indices.tolist(), first.images))
    changed = [not torch.equal(before[index], image) for index, image in zip(second.indices.tolist(), second.images)]
    assert sum(changed) > 20


@pytest.mark.parametrize("case", [CROPPED, GROUPED], ids=["crop", "grouped"])
def test_resumed_loader_continues_with_the_same_bytes(shapes_root, case):
    whole, tail = batches_of(shapes_root, case), batches_of(shapes_root, case, start=2)
    assert len(tail) == 2
    for one, other in zip(whole[2:], tail):
        assert_equal(one, other)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("workers", [0, 1])
def test_broken_file_is_a_value_of_its_step_alone(copied, case, workers):
    indices = batches_of(copied, WHOLE)[0].indices.tolist()
    name = (copied / "ImageSets/Segmentation/train.txt").read_text().split()[indices[1]]
    (copied / f"JPEGImages/{name}.jpg").write_bytes(b"text")
    first, *rest = batches_of(copied, case, workers=workers)
    assert isinstance(first, InputError)
    assert f"{name}.jpg: cannot be read" in str(first)
    assert not any(isinstance(batch, InputError) for batch in rest)


def halve(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


BREAK = {
    "image": lambda root, name: halve(root / f"JPEGImages/{name}.jpg"),
    "mask": lambda root, name: halve(root / f"SegmentationClass/{name}.png"),
    "header": lambda root, name: (root / f"SegmentationClass/{name}.png").write_bytes(b"text"),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("fault", BREAK)
def test_another_image_stands_in_for_a_broken_one_whoever_loads_it(copied, case, fault):
    whole = batches_of(copied, case)
    names = (copied / "ImageSets/Segmentation/train.txt").read_text().split()
    broken = {whole[0].indices[1].item(), whole[2].indices[3].item()}
    for index in broken:
        BREAK[fault](copied, names[index])
    alone = list(loader_of(copied, case, skip=True))
    assert [len(part.replaced) for part in alone] == [1, 0, 1, 0]
    for before, (batch, replaced, _) in zip(whole, alone):
        for row, index in enumerate(before.indices.tolist()):
            height, width = batch.labels.shape[1:]
            same = torch.equal(before.labels[row, :height, :width], batch.labels[row])
            assert same == (index not in broken), "only a broken image is replaced"
            if index in broken:
                assert names[index] in replaced[0]
                assert (batch.labels[row] != 255).any(), "by one that has something to learn from"
    for world_size in (2, 4):
        ranks = [
            list(loader_of(copied, case, skip=True, rank=rank, world_size=world_size)) for rank in range(world_size)
        ]
        for (batch, replaced, _), *parts in zip(alone, *ranks):
            assert_equal(batch, [torch.cat(tensors) for tensors in zip(*(part.batch for part in parts))])
            assert list(replaced) == [fault for part in parts for fault in part.replaced]


@pytest.mark.parametrize("fault", BREAK)
def test_a_step_of_one_broken_image_has_a_stand_in(copied, fault):
    names = (copied / "ImageSets/Segmentation/train.txt").read_text().split()
    for name in names[::2]:
        BREAK[fault](copied, name)
    loaded = list(loader_of(copied, WHOLE, batch=1, steps=24, skip=True))
    assert sum(len(part.replaced) for part in loaded) == 12
    assert all((part.batch.labels != 255).any() for part in loaded)


def test_a_stand_in_may_be_broken_itself_but_not_all(copied):
    names = (copied / "ImageSets/Segmentation/train.txt").read_text().split()
    for name in names[::2]:
        halve(copied / f"JPEGImages/{name}.jpg")
    for batch, replaced, _ in loader_of(copied, CROPPED, skip=True, batch=12, steps=2):
        assert len(replaced) > 1
        assert batch.images.shape == (12, 64, 48, 3)
    for name in names[1::2]:
        halve(copied / f"JPEGImages/{name}.jpg")
    (fault,) = loader_of(copied, CROPPED, skip=True, steps=1)
    assert isinstance(fault, InputError)
    assert str(fault).endswith("and 16 images that could replace it are broken, too")


def test_images_of_similar_shape_share_a_batch_of_the_size_that_they_have(shapes_root):
    def padded(case):
        batches = batches_of(shapes_root, case, steps=6)
        assert sorted(index for batch in batches for index in batch.indices.tolist()) == list(range(24))
        held = sum(batch.labels.numel() for batch in batches)
        return 1 - sum(int(batch.sizes.prod(1).sum()) for batch in batches) / held

    assert padded(GROUPED) < 0.8 * padded(RESIZED)


@pytest.mark.parametrize("workers", [0, 1])
def test_grouping_leaves_a_broken_header_to_its_step(copied, workers):
    names = (copied / "ImageSets/Segmentation/train.txt").read_text().split()
    BREAK["header"](copied, names[7])
    stopping = batches_of(copied, GROUPED, steps=6, workers=workers)
    (bad,) = [step for step, batch in enumerate(stopping) if isinstance(batch, InputError)]
    assert f"{names[7]}.png: cannot be read" in str(stopping[bad])
    alone = list(loader_of(copied, GROUPED, steps=6, workers=workers, skip=True))
    assert [len(part.replaced) for part in alone] == [step == bad for step in range(6)]
    assert sorted(index for part in alone for index in part.batch.indices.tolist()) == list(range(24))
    ranks = [list(loader_of(copied, GROUPED, steps=6, rank=rank, world_size=2, skip=True)) for rank in range(2)]
    for part, *parts in zip(alone, *ranks, strict=True):
        assert_equal(part.batch, [torch.cat(tensors) for tensors in zip(*(part.batch for part in parts))])


# --- evaluation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_sees_every_image_once_whole_and_unpadded(shapes_root, workers):
    dataset = build_dataset(Data(name="shapes", root=str(shapes_root)), "train")
    sizes = [dataset.size(index) for index in range(len(dataset))]
    sampler = EvalSampler(sizes, batch_size=8, rank=0, world_size=1)
    seen = []
    for batch in batch_loader(EvalBatches(dataset), sampler, workers, CPU):
        assert not batch.padded
        for labels, index in zip(batch.labels, batch.indices.tolist()):
            assert np.array_equal(labels, mask(shapes_root, index))
            seen.append(index)
    assert sorted(seen) == list(range(24))


def test_evaluation_of_a_crop_cuts_image_and_labels(shapes_root):
    dataset = build_dataset(Data(name="shapes", root=str(shapes_root)), "train")
    batch = EvalBatches(dataset, EvalTransform("center_crop", (20, 30)))[[3]]
    assert batch.images.shape == (1, 20, 30, 3)
    assert batch.labels.shape == (1, 20, 30)
    assert not batch.padded


def test_broken_file_in_evaluation_is_a_value(copied):
    (copied / "SegmentationClass/000002.png").write_bytes(b"text")
    dataset = build_dataset(Data(name="shapes", root=str(copied)), "train")
    assert isinstance(EvalBatches(dataset)[[0]].images, torch.Tensor)
    fault = EvalBatches(dataset)[[2]]
    assert isinstance(fault, InputError)
    assert "000002.png: cannot be read" in str(fault)


# --- hand-over to the device ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_every_step_arrives_with_the_counts_of_its_labels(shapes_root, steps, workers):
    found = list(device_batches(loader_of(shapes_root, WHOLE, steps=steps, workers=workers), CPU))
    assert len(found) == steps
    for step, expected in zip(found, batches_of(shapes_root, WHOLE, steps=steps)):
        assert_equal(step.local, expected)
        indices = step.local.indices.tolist()
        labels = np.concatenate([mask(shapes_root, index).ravel() for index in indices])
        assert step.label_counts.pixels[:255] == [np.count_nonzero(labels == value) for value in range(255)]
        assert step.label_counts.valid == np.count_nonzero(labels != 255) < len(labels)
        assert step.label_counts.images == 4
        assert step.padded == (len({mask(shapes_root, index).shape for index in indices}) > 1)
        assert step.stop is False
        assert step.data_wait_s >= 0


def test_no_steps_left_is_no_fault(shapes_root):
    assert list(device_batches(loader_of(shapes_root, CROPPED, steps=2, start=2), CPU)) == []


def test_crop_larger_than_some_images_is_padded(shapes_root):
    for step in device_batches(loader_of(shapes_root, Case((128, 128), None)), CPU):
        assert step.local.images.shape == (4, 128, 128, 3)
        indices = step.local.indices.tolist()
        assert step.padded == any(min(mask(shapes_root, index).shape) < 128 for index in indices)


def test_images_without_valid_pixels_are_not_counted(copied):
    for path in sorted((copied / "SegmentationClass").iterdir())[::2]:
        Image.fromarray(np.full_like(np.array(Image.open(path)), 255)).save(path)
    for step in device_batches(loader_of(copied, CROPPED, batch=3), CPU):
        valid = step.local.labels != 255
        assert step.label_counts.images == sum(bool(image.any()) for image in valid)
        assert step.label_counts.valid == int(valid.sum())


def test_step_without_valid_pixels_counts_none(copied):
    for path in (copied / "SegmentationClass").iterdir():
        Image.fromarray(np.full_like(np.array(Image.open(path)), 255)).save(path)
    for step in device_batches(loader_of(copied, CROPPED), CPU):
        assert (step.label_counts.valid, step.label_counts.images) == (0, 0)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("bad", [0, 2, 3])
def test_broken_file_ends_the_run_at_its_step(copied, bad, workers):
    index = batches_of(copied, WHOLE)[bad].indices[2].item()
    name = (copied / "ImageSets/Segmentation/train.txt").read_text().split()[index]
    content = (copied / f"JPEGImages/{name}.jpg").read_bytes()
    (copied / f"JPEGImages/{name}.jpg").write_bytes(content[: len(content) // 2])
    arrived = []
    with pytest.raises(InputError, match=rf"^{copied}/JPEGImages/{name}\.jpg: broken image \([^\n]*$"):
        arrived.extend(device_batches(loader_of(copied, CROPPED, workers=workers), CPU))
    # `extend` keeps what came before the exception.
    assert len(arrived) == bad


@pytest.mark.parametrize("asked_after", [0, 1, 3])
def test_request_to_stop_shows_in_the_steps_loaded_after_it(shapes_root, asked_after):
    stops = []
    for step in device_batches(loader_of(shapes_root, CROPPED, steps=7, stop=lambda: len(stops) > asked_after), CPU):
        stops.append(step.stop)
    # When a step is used, the next one is loaded already: the one after that is the first to know.
    assert stops == [False] * (asked_after + 2) + [True] * (7 - asked_after - 2)


def test_request_to_stop_before_the_first_step(shapes_root):
    assert [step.stop for step in device_batches(loader_of(shapes_root, CROPPED, stop=lambda: True), CPU)] == [True] * 4
