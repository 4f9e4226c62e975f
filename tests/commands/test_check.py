"""`python -m fcn check` names every fault of a config in a line, and says what data, network and memory are like."""

import contextlib
import io
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from fcn.config import load_config
from fcn.data import build_dataset, inspect_split
from fcn.distributed import DistributedContext
from fcn.errors import InputError
from fcn.training import GB, Memory, Trial, build_run, states
from fcn.training.memory import saved_for_backward
from tests.cli import call

CONFIG = "configs/quickstart.yaml"
CONTEXT = DistributedContext(0, 1, 0, torch.device("cpu"), "python")
NETWORK = ("model.width=null", "model.norm=null", f"model.name={__name__}:tiny", "train.batch_size=4")
SMALL = ("model.width=2", "data.crop=[32,32]", "train.batch_size=4")


def tiny(num_classes):
    return nn.Conv2d(3, num_classes, 1)


def check(root, *overrides, arguments=(), config=CONFIG):
    """(exit status, lines of the report)."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        status = call(["check", "--config", config, *arguments, f"data.root={root}", *overrides], CONTEXT)
    return status, printed.getvalue().splitlines()


def of_kind(kind, lines):
    return [line.removeprefix(f"{kind}: ") for line in lines if line.startswith(f"{kind}: ")]


# --- twenty planted faults -----------------------------------------------------------------------------------------

FOLDER = ("data.name=folder", "data.classes=[ground,road,tree]")

PLANTED = {
    "images/no_image.png": "no such file, but the split 'train' needs it",
    "masks/no_mask.png": "no such file, but the split 'train' needs it",
    "images/nothing.png": "no such file, nor its mask nothing.png",
    "images/empty.jpg": "cannot be read (not an image)",
    "images/text.jpg": "cannot be read (not an image)",
    "images/truncated.jpg": "broken image (image file is truncated",
    "masks/cut.png": "broken image (",
    "images/damaged.jpg": "opens, but is damaged (Corrupt JPEG data",
    "masks/size.png": "found a mask of 10x10 pixels for the image size.jpg of 48x32",
    "masks/turned.png": "turned by its EXIF orientation",
    "masks/label.png": "found label 7, 9; accepted: 0 to 2 (3 classes)",
    "masks/colour.png": "found colour #123456",
    "images/float.tif": "found an image in mode F",
    "masks/ignored.png": "all its pixels are ignored",
    "images/twice.jpg": "found 2 times in the split 'train'",
    "images/shared.jpg": "is in the splits 'train' and 'val'",
    "images/copy.jpg": "has the same content as",
    "images/twin.png": "has the name of twin.jpg",
    "masks/orphan.png": "no image has this mask's name",
    "masks/deep.png": "found label 300",
    "masks/a_folder.png": "cannot be read (Is a directory)",
    "masks/checksum.png": "opens, but is damaged (broken PNG file",
}
SOUND = ("sound", "twin", "twice", "shared", "original")


def write_pair(root, name, seed=None, exif=None):
    """A smooth image, different for every name, and a mask with all classes."""
    seed = sum(name.encode()) if seed is None else seed
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), np.uint8)
    image = Image.fromarray(coarse).resize((48, 32), Image.Resampling.BICUBIC)
    image.save(root / f"images/{name}.jpg", quality=95, exif=exif or Image.Exif())
    labels = np.arange(32 * 48).reshape(32, 48) % 3
    Image.fromarray(labels.astype(np.uint8)).save(root / f"masks/{name}.png")


def truncate(path, kept):
    path.write_bytes(path.read_bytes()[: round(path.stat().st_size * kept)])


def damage(path, place, length):
    content = bytearray(path.read_bytes())
    content[place : place + length] = bytes(length)
    path.write_bytes(content)


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """(folder with the planted faults, exit status, lines of the report)."""
    root = tmp_path_factory.mktemp("planted")
    (root / "images").mkdir()
    (root / "masks").mkdir()
    stems = {re.split(r"[/.]", path)[1] for path in PLANTED} | set(SOUND)
    for name in stems - {"nothing", "turned", "copy"}:
        write_pair(root, name)
    exif = Image.Exif()
    exif[0x0112] = 6
    write_pair(root, "turned", exif=exif)
    write_pair(root, "original")
    write_pair(root, "copy", seed=sum(b"original"))
    images, masks = root / "images", root / "masks"

    (images / "no_image.jpg").unlink()
    (masks / "no_mask.png").unlink()
    (images / "empty.jpg").write_bytes(b"")
    (images / "text.jpg").write_text("not a picture\n")
    truncate(images / "truncated.jpg", 0.8)
    truncate(masks / "cut.png", 0.5)
    damage(images / "damaged.jpg", (images / "damaged.jpg").stat().st_size * 2 // 3, 16)
    Image.new("L", (10, 10)).save(masks / "size.png")
    Image.fromarray(np.array([[7, 9, 0] * 16] * 32, np.uint8)).save(masks / "label.png")
    Image.new("RGB", (48, 32), (0x12, 0x34, 0x56)).save(masks / "colour.png")
    (images / "float.jpg").unlink()
    Image.fromarray(np.zeros((32, 48), np.float32)).save(images / "float.tif")
    Image.new("L", (48, 32), 255).save(masks / "ignored.png")
    Image.new("RGB", (48, 32)).save(images / "twin.png")
    (images / "orphan.jpg").unlink()
    Image.fromarray(np.full((32, 48), 300, np.uint16)).save(masks / "deep.png")
    (masks / "a_folder.png").unlink()
    (masks / "a_folder.png").mkdir()
    damage(masks / "checksum.png", (masks / "checksum.png").read_bytes().index(b"IEND") - 8, 4)

    train = [*sorted(stems - {"orphan", "copy"}), "twice"]
    (root / "train.txt").write_text("\n".join(train) + "\n")
    (root / "val.txt").write_text("sound_too\nshared\ncopy\n")
    write_pair(root, "sound_too")
    return root, *check(root, *FOLDER, *SMALL)


@pytest.mark.parametrize("path", PLANTED)
def test_a_planted_fault_is_named_in_exactly_one_line(planted, path):
    root, _, lines = planted
    (line,) = (fault for fault in of_kind("fault", lines) if fault.startswith(f"{root / path}: "))
    assert PLANTED[path] in line


def test_nothing_else_is_a_fault(planted):
    _, status, lines = planted
    assert len(of_kind("fault", lines)) == len(PLANTED) == 22
    assert of_kind("warning", lines) == []
    assert (status, lines[-1]) == (2, "22 faults, no warnings")


def test_faults_are_the_end_of_the_report_and_the_rest_is_there(planted):
    _, _, lines = planted
    assert all(line.startswith("fault: ") for line in lines[-1 - len(PLANTED) : -1])
    text = "\n".join(lines)
    assert re.search(r"^train +23 +5 +1 +48x32 +48x32 +48x32$", text, re.MULTILINE)
    assert "A step on two images of 32x32" in text


# --- what is sound -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clean(shapes_root):
    return check(shapes_root, *SMALL)


def test_sound_data_give_status_0(clean):
    status, lines = clean
    assert (status, of_kind("fault", lines), lines[-1]) == (0, [], "no faults, no warnings")


def test_report_fits_80_columns(clean, shapes_root):
    paste = "loss.weights="
    lines = [line.replace(str(shapes_root), "root") for line in clean[1] if not line.startswith(paste)]
    assert [line for line in lines if len(line) > 80] == []


def test_histogram_is_numpys(clean, shapes_root):
    dataset = build_dataset(load_config(CONFIG, [f"data.root={shapes_root}"]).data, "train")
    labels = np.concatenate([np.asarray(dataset.read(index)[1]).ravel() for index in range(len(dataset))])
    valid = labels[labels != 255]
    for label, name in enumerate(dataset.classes.names):
        pixels = int((labels == label).sum())
        (line,) = (line for line in clean[1] if line.startswith(f"{name} "))
        assert line.split()[1:3] == [f"{pixels:,}", f"{100 * pixels / len(valid):.2f}"]


def test_suggested_weights_are_those_of_the_table(clean):
    (line,) = (line for line in clean[1] if line.startswith("loss.weights=["))
    rows = [line.split() for line in clean[1] if line.count("%") == 2]
    assert line == f"loss.weights=[{','.join(row[-1] for row in rows if row[0] != 'ignored')}]"


def test_real_camvid_and_its_memory(camvid_root):
    overrides = ("data.train=val", "data.val=test", "data.test=null", "data.workers=2", "data.crop=[64,64]")
    status, lines = check(camvid_root, *overrides, arguments=["--headers"], config="configs/linknet_camvid.yaml")
    stored = np.concatenate([np.asarray(Image.open(path)).ravel() for path in camvid_root.glob("valannot/*.png")])
    (car,) = (line for line in lines if line.startswith("car "))
    assert (status, car.split()[1]) == (0, f"{(stored == 8).sum():,}")


def test_masks_that_may_lie_otherwise_than_their_images_are_one_warning(tmp_path):
    """Of each orientation an image of 48x32 whose mask has none, or the same; 5 to 8 fit only if drawn upright."""
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    for number in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = number
        write_pair(tmp_path, f"none{number}", exif=exif)
        write_pair(tmp_path, f"same{number}", exif=exif)
        with Image.open(tmp_path / f"masks/same{number}.png") as mask:
            mask.load()
        mask.save(tmp_path / f"masks/same{number}.png", exif=exif)
        if number > 4:
            mask.transpose(Image.Transpose.ROTATE_90).save(tmp_path / f"masks/none{number}.png")
    exif[0x0112] = 3
    write_pair(tmp_path, "only_mask")
    with Image.open(tmp_path / "masks/only_mask.png") as mask:
        mask.save(tmp_path / "masks/only_mask.png", exif=exif)
    exif[0x0112] = 6
    Image.new("RGB", (32, 32), "red").save(tmp_path / "images/square.jpg", exif=exif)
    Image.fromarray(np.eye(32, dtype=np.uint8) * 2).save(tmp_path / "masks/square.png")
    names = sorted(path.stem for path in (tmp_path / "images").iterdir())
    (tmp_path / "train.txt").write_text("\n".join(names[:10]) + "\n")
    (tmp_path / "val.txt").write_text("\n".join(names[10:]) + "\n")
    for arguments in ([], ["--headers"]):
        status, lines = check(tmp_path, *FOLDER, *SMALL, arguments=arguments)
        (warning,) = (line for line in of_kind("warning", lines) if "EXIF" in line)
        assert warning == (
            f"{tmp_path}/images/none2.jpg: its EXIF orientation is not its mask's (5 such images); each file is turned "
            f"by its own; if masks were drawn on the pixels as stored, set data.exif_orientation=false"
        )
        assert (status, of_kind("fault", lines)) == (0, [])
    _, lines = check(tmp_path, *FOLDER, *SMALL, "data.exif_orientation=false")
    assert not [line for line in of_kind("warning", lines) if "EXIF" in line]
    assert len(of_kind("fault", lines)) == 4
    assert all("set data.exif_orientation=true" in fault for fault in of_kind("fault", lines))


# --- memory --------------------------------------------------------------------------------------------------------


def test_bytes_saved_for_backward_worked_out_by_hand():
    conv = nn.Conv2d(3, 5, 1, bias=False)
    images = torch.rand(2, 3, 4, 4)
    with saved_for_backward(conv.parameters()) as saved:
        # Kept: the images, by the convolution; its output cut at 0, by the ReLU and again by the square.
        conv(images).relu().square().sum()
    assert sum(saved.values()) == 4 * (2 * 3 * 4 * 4 + 2 * 5 * 4 * 4)


def test_views_of_one_tensor_are_counted_once():
    x = torch.rand(8, 8, requires_grad=True)
    with saved_for_backward([]) as saved:
        (x[:4] * x[4:]).sum()
    assert list(saved.values()) == [8 * 8 * 4]


def test_states_worked_out_by_hand(shapes_root):
    config = load_config(CONFIG, [f"data.root={shapes_root}", *NETWORK, "train.ema=0.9"])
    report = inspect_split(config.data, "train")
    run, _ = build_run(config, CONTEXT, {"train": report.dataset})
    Trial(run, report).step(2)
    weights = (7 * 3 + 7) * 4
    # AdamW: two moments, and for each of the two tensors a count of steps.
    assert states(run) == {
        "parameters and buffers": weights,
        "gradients": weights,
        "optimizer": 2 * weights + 2 * 4,
        "average of the weights": weights,
    }


def test_memory_is_a_line_and_leaves_a_tenth_free():
    memory = Memory(fixed=2 * GB, per_image=GB)
    assert memory.of(3) == 5 * GB
    assert [memory.images(size * GB) for size in (1, 10, 20, 40)] == [0, 7, 16, 34]


def memory_rows(lines):
    start = next(place for place, line in enumerate(lines) if line.startswith("processes "))
    return [line.split() for line in lines[start + 1 : start + 5]]


def test_each_image_of_a_tiny_network_worked_out_by_hand(shapes_root):
    """The convolution keeps its input, the cross-entropy log-probabilities of 7 classes and 64-bit labels."""
    _, lines = check(shapes_root, *NETWORK, "data.crop=[512,1024]")
    (line,) = (line for line in lines if line.startswith("each image of 1024x512 "))
    assert line.split()[-2:] == [f"{(3 * 4 + 7 * 4 + 8) * 512 * 1024 / 2**20:.1f}", "MB"]


def test_micro_batches_count_where_there_is_no_batchnorm(shapes_root):
    overrides = (*SMALL, "train.batch_size=12", "train.micro_batch=2")
    _, lines = check(shapes_root, *overrides, "model.norm=none")
    assert [row[:3] for row in memory_rows(lines)] == [
        ["1", "12", "2"], ["2", "6", "2"], ["4", "3", "2"], ["8", "needs", "train.uneven=true"],
    ]  # fmt: skip
    _, lines = check(shapes_root, *overrides)
    rows = memory_rows(lines)
    assert [row[2] for row in rows[:3]] == ["12", "6", "3"]
    assert "host" in rows[0]


def test_shards_bound_the_number_of_processes_not_the_shares(shapes_root):
    _, lines = check(shapes_root, *SMALL, "train.batch_size=12", "train.shards=6")
    assert [row[:2] for row in memory_rows(lines)] == [["1", "12"], ["2", "6"], ["4", "4"], ["8", "needs"]]
    assert memory_rows(lines)[3] == ["8", "needs", "train.shards=8", "or", "more"]


def test_whole_images_are_tried_at_the_worst_size(tmp_path):
    root = tmp_path
    (root / "images").mkdir()
    (root / "masks").mkdir()
    for name, size in (("wide", (40, 16)), ("high", (20, 30)), ("small", (8, 8))):
        Image.new("RGB", size, name and (len(name), *size)).save(root / f"images/{name}.png")
        Image.new("L", size).save(root / f"masks/{name}.png")
    for split in ("train", "val"):
        (root / f"{split}.txt").write_text("wide\nhigh\nsmall\n")
    _, lines = check(root, *FOLDER, *SMALL, "data.crop=null", "data.scale=[0.5,2.0]", "data.val=train")
    assert any("A step on two images of 80x60," in line for line in lines)


def test_batchnorm_that_cannot_do_with_one_image(shapes_root):
    _, lines = check(shapes_root, "data.crop=[16,16]", "model.width=2", "train.batch_size=4")
    assert any(line.startswith("each image of 16x16") for line in lines)


# --- bad input -----------------------------------------------------------------------------------------------------


def fault(*arguments, context=CONTEXT):
    with pytest.raises(InputError) as caught:
        call(["check", *arguments], context)
    return str(caught.value)


@pytest.mark.parametrize("config", ["quickstart", "fcn8s", "linknet_camvid", "fcn_resnet50_voc"])
def test_missing_data_are_one_line(tmp_path, config):
    message = fault("--config", f"configs/{config}.yaml", f"data.root={tmp_path / 'none'}")
    assert message.startswith(f"data.root: {tmp_path / 'none'}: no such folder; ")
    assert "\n" not in message


def test_missing_data_and_missing_weights_are_both_named(tmp_path):
    message = fault("--config", CONFIG, f"data.root={tmp_path / 'none'}", "model.weights=w.pt", "resume=r.pt")
    assert [line.split(":")[0] for line in message.splitlines()] == ["data.root", "model.weights", "resume"]


def test_wrong_config_is_named_before_anything_is_read():
    assert "modle" in fault("--config", CONFIG, "modle.name=unet")


def test_config_is_needed():
    assert "--config" in fault()


def test_one_process_is_enough(shapes_root):
    context = DistributedContext(0, 2, 0, torch.device("cpu"), "torchrun")
    assert "found 2 processes" in fault("--config", CONFIG, f"data.root={shapes_root}", context=context)


def test_a_split_that_cannot_be_opened_leaves_the_others(shapes_root):
    status, lines = check(shapes_root, *SMALL, "data.test=tset")
    (line,) = of_kind("fault", lines)
    assert (status, "tset.txt: no such list" in line) == (2, True)
    assert any(line.startswith("each image of") for line in lines)


def test_without_a_training_split_no_weights_are_suggested(shapes_root):
    status, lines = check(shapes_root, *SMALL, "data.train=trian")
    assert (status, len(of_kind("fault", lines))) == (2, 1)
    assert any(line.startswith("disc ") for line in lines)
    assert not any("weight" in line for line in lines)


def test_weights_file_that_is_not_there(shapes_root):
    status, lines = check(shapes_root, *SMALL, "model.weights=weights/none.pt")
    assert status == 2
    assert of_kind("fault", lines) == ["model.weights: weights/none.pt: no such file; correct the path"]


def test_wrong_number_of_classes_is_one_fault_and_all_is_read(shapes_root):
    status, lines = check(shapes_root, *SMALL, "data.num_classes=9")
    (line,) = of_kind("fault", lines)
    assert (status, line.startswith("data.num_classes: found 9, but shapes has 7 classes")) == (2, True)


def two_channels(num_classes):
    return nn.Conv2d(3, 2, 1)


def test_network_that_is_none_is_a_fault(shapes_root):
    status, lines = check(shapes_root, *NETWORK, f"model.name={__name__}:two_channels")
    (line,) = of_kind("fault", lines)
    assert (status, line.startswith("model.name: in evaluation the network returns (2, 2, 96, 96)")) == (2, True)


def test_without_a_readable_image_the_network_is_not_tried(tmp_path):
    root = tmp_path
    (root / "images").mkdir()
    (root / "masks").mkdir()
    for split in ("train", "val"):
        (root / f"{split}.txt").write_text("a\n")
        write_pair(root, "a")
    (root / "images/a.jpg").write_bytes(b"text")
    status, lines = check(root, *FOLDER, *SMALL)
    assert "The network was not tried: no image of the split 'train' can be read." in lines
    assert (status, len(of_kind("fault", lines))) == (2, 1)


def test_advice_is_no_fault(shapes_root, tmp_path):
    root = shutil.copytree(shapes_root, tmp_path / "shapes")
    for path in (root / "SegmentationClass").iterdir():
        labels = np.asarray(Image.open(path))
        Image.fromarray(np.where(labels == 3, np.uint8(0), labels)).save(path)
    status, lines = check(root, *SMALL, "data.crop=[200,300]", "data.val=train")
    warnings = of_kind("warning", lines)
    assert [warning.partition(":")[0] for warning in warnings] == ["data.val", "split 'train'", "data.crop"]
    assert "no pixel of square;" in warnings[1]
    assert "300x200 (width x height) is higher or wider than 24 of 24 images" in warnings[2]
    assert (status, lines[-1]) == (0, "no faults, 3 warnings")


def test_a_class_that_is_ignored_is_not_missed(shapes_root):
    status, lines = check(shapes_root, *SMALL, "loss.ignore_index=3")
    assert any(line.startswith("square 0") for line in (" ".join(line.split()) for line in lines))
    assert (status, lines[-1]) == (0, "no faults, no warnings")
