"""Pretrained weights land where they belong, bit for bit, or the file is refused and the network left as it was."""

from __future__ import annotations

import functools
import hashlib
import http.server
import os
import pickle
import threading
import urllib.request
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models import get_weight, resnet18, resnet50, resnet101, segmentation
from torchvision.models.vgg import make_layers

from fcn.checkpoints import load_pretrained
from fcn.checkpoints.format import save_checkpoint
from fcn.config import PRETRAINED
from fcn.errors import InputError
from fcn.models import build_model
from fcn.models.layers import ResNetTrunk

Tensors = dict[str, torch.Tensor]
WIDTH = 2
VGG16 = [1, 1, "M", 2, 2, "M", 4, 4, 4, "M", 8, 8, 8, "M", 8, 8, 8, "M"]
VGG11 = [1, "M", 2, "M", 4, 4, "M", 8, 8, "M", 8, 8, "M"]
VGG_FCNS = ["fcn32s", "fcn16s", "fcn8s", "fcn8_kitti"]


def randomised(model: nn.Module) -> nn.Module:
    """Every tensor random, biases, running statistics and counters too: no value is one that a fresh network has."""
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand_like(tensor) + 0.5 if tensor.ndim == 1 else tensor + 0.01 * torch.rand_like(tensor))
        else:
            tensor.fill_(int(torch.randint(100, 1000, ())))
    return model


def narrow_vgg(plan: list = VGG16, batch_norm: bool = False) -> nn.Module:
    """torchvision's VGG in its naming, as narrow as `width=WIDTH` makes ours."""
    model = nn.Module()
    model.features = make_layers([x if x == "M" else x * WIDTH for x in plan], batch_norm=batch_norm)
    fc = 64 * WIDTH
    model.classifier = nn.Sequential(
        nn.Linear(8 * WIDTH * 49, fc), nn.ReLU(), nn.Dropout(), nn.Linear(fc, fc), nn.ReLU(), nn.Dropout(),
        nn.Linear(fc, 10),
    )  # fmt: skip
    return randomised(model)


def copied(model: nn.Module) -> Tensors:
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}


def assert_equal(found: Tensors, expected: Tensors) -> None:
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key


def line_about(lines: list[str], start: str) -> str:
    (line,) = [line for line in lines if line.startswith(start)]
    return line


FRESH, LEFT_OUT, HEAD = "not in the file, freshly initialised: ", "in the file, not in the network: ", "head re-init"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Tensors], Path]:
    """`hub(weights, tensors)` puts a file where torchvision would have downloaded these weights to."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))

    def put(enum: str, tensors: Tensors) -> Path:
        path = tmp_path / "torch/hub/checkpoints" / Path(get_weight(enum).url).name
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(tensors, path)
        return path

    return put


@pytest.fixture
def save(tmp_path: Path) -> Callable[[object], str]:
    def save(content: object) -> str:
        path = tmp_path / "weights.pt"
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        return str(path)

    return save


def refusal(model: nn.Module, name: str, weights: str, num_classes: int) -> str:
    """The one line that refuses the weights; the network stays bit for bit what it was."""
    before = copied(model)
    with pytest.raises(InputError) as caught:
        load_pretrained(model, name, weights, num_classes)
    assert_equal(model.state_dict(), before)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("model.weights: ")
    return message


def unet(num_classes: int = 3) -> nn.Module:
    return build_model("unet", num_classes, width=WIDTH)


# --- VGG16 ---------------------------------------------------------------------------------------------------------


def fc7_of(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """(N, channels) after fc7's ReLU, without the padding that makes the network fully convolutional."""
    model.trunk.stages[0].conv1_1.padding = (1, 1)
    model.trunk.fc6.padding = (0, 0)
    with torch.no_grad():
        fc7 = model.eval().trunk(images)[2]
    assert fc7.shape[2:] == (1, 1)
    return fc7[..., 0, 0]


def fc7_of_torchvision(vgg: nn.Module, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return vgg.eval().classifier[:5](vgg.features(images).flatten(1))


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert expected.std() > 1e-3, "not a vector of zeros"
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * min(1.0, float(expected.max())))


def test_full_vgg16_cut_at_fc7_computes_what_torchvisions_does(hub) -> None:
    torch.manual_seed(0)
    vgg = torchvision.models.vgg16(weights=None, init_weights=False)
    for name, parameter in vgg.named_parameters():
        if name.endswith("bias"):  # zeros would be right in any order
            nn.init.uniform_(parameter, -0.1, 0.1)
    images = torch.randn(1, 3, 224, 224)
    expected = fc7_of_torchvision(vgg, images)
    path = hub("VGG16_Weights.IMAGENET1K_V1", vgg.state_dict())
    del vgg
    for layout in ("classic", "same"):
        model = build_model("fcn8s", 21, layout=layout)
        lines = load_pretrained(model, "fcn8s", "imagenet", 21)
        assert lines[0] == f"weights from VGG16_Weights.IMAGENET1K_V1 ({path}): 30 of 39 tensors"
        assert_close(fc7_of(model, images), expected)
    path.unlink()  # half a gigabyte


@pytest.mark.parametrize("options", [{"layout": "classic"}, {"layout": "same"}, {}], ids=str)
@pytest.mark.parametrize("name", VGG_FCNS)
def test_narrow_vgg16_cut_at_fc7_computes_what_torchvisions_does(hub, name: str, options: dict) -> None:
    if name == "fcn8_kitti":
        options = {}
    torch.manual_seed(0)
    vgg = narrow_vgg()
    path = hub("VGG16_Weights.IMAGENET1K_V1", vgg.state_dict())
    model = build_model(name, 5, width=WIDTH, **options)
    before = copied(model)
    lines = load_pretrained(model, name, "imagenet", 5)
    images = torch.randn(2, 3, 224, 224)
    assert_close(fc7_of(model, images), fc7_of_torchvision(vgg, images))

    heads = {key: tensor for key, tensor in before.items() if not key.startswith("trunk.")}
    assert heads
    after = copied(model)
    assert_equal({key: after[key] for key in heads}, heads)
    assert lines == [
        f"weights from VGG16_Weights.IMAGENET1K_V1 ({path}): 30 of {len(before)} tensors",
        FRESH + ", ".join(f"{key} {tuple(tensor.shape)}" for key, tensor in heads.items()),
        LEFT_OUT + "classifier.6.weight (10, 128), classifier.6.bias (10,)",
    ]


@pytest.mark.parametrize("options", [{"plan": VGG11}, {"batch_norm": True}, {"plan": [3, *VGG16]}], ids=str)
def test_another_vgg_is_refused(save, options: dict) -> None:
    model = build_model("fcn8s", 5, width=WIDTH)
    refusal(model, "fcn8s", save(narrow_vgg(**options).state_dict()), 5)


def test_vgg16_of_another_width_is_refused_with_the_shapes(save) -> None:
    message = refusal(build_model("fcn8s", 5, width=WIDTH + 1), "fcn8s", save(narrow_vgg().state_dict()), 5)
    assert "trunk.stages.0.conv1_1.weight (2, 3, 3, 3) instead of (3, 3, 3, 3)" in message


# --- ResNets -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "resnet", "prefix", "fresh", "local"),
    [
        ("linknet", resnet18, "encoder.", "classifier.weight (32, 5, 2, 2)", False),
        ("linknet", resnet18, "encoder.", "classifier.weight (32, 5, 2, 2)", True),
        ("fcn_resnet18", resnet18, "backbone.", "score.weight (5, 512, 1, 1)", False),
        ("fcn_resnet18", resnet18, "backbone.", "score.weight (5, 512, 1, 1)", True),
        ("fcn_resnet50", resnet50, "backbone.", "aux_classifier.4.weight (5, 256, 1, 1)", False),
        ("fcn_resnet101", resnet101, "backbone.", "classifier.4.weight (5, 512, 1, 1)", False),
    ],
)
def test_resnet_fills_the_trunk_bit_for_bit(hub, save, name: str, resnet, prefix: str, fresh: str, local: bool) -> None:
    torch.manual_seed(0)
    file = copied(randomised(resnet(weights=None)))
    model = build_model(name, 5)
    before = copied(model)
    weights = save(file) if local else "imagenet"
    enum = PRETRAINED["imagenet"][name]
    source = weights if local else f"{enum} ({hub(enum, file)})"
    lines = load_pretrained(model, name, weights, 5)

    fc = {key: file.pop(key) for key in ("fc.weight", "fc.bias")}
    after = copied(model)
    assert_equal(
        {key: after.pop(key) for key in before if key.startswith(prefix)}, {prefix + k: t for k, t in file.items()}
    )
    assert_equal(after, {key: before[key] for key in after})
    assert lines[0] == f"weights from {source}: {len(file)} of {len(before)} tensors"
    assert fresh in line_about(lines, FRESH)
    assert line_about(lines, FRESH).count(" (") == len(after)
    assert line_about(lines, LEFT_OUT) == f"{LEFT_OUT}fc.weight {tuple(fc['fc.weight'].shape)}, fc.bias (1000,)"
    assert len(lines) == 3


def test_resnet_of_another_depth_is_refused(save) -> None:
    message = refusal(build_model("fcn_resnet18", 5), "fcn_resnet18", save(resnet50(weights=None).state_dict()), 5)
    assert "unexpected: backbone.layer1.0.conv3.weight (256, 64, 1, 1)" in message


class OnResNet(nn.Module):
    """A user's own network around torchvision's trunk."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.body = ResNetTrunk(resnet18(weights=None))
        self.head = nn.Conv2d(512, num_classes, 1)


def test_resnet_fills_the_trunk_of_a_network_of_ones_own(save) -> None:
    file = copied(randomised(resnet18(weights=None)))
    model = OnResNet(5)
    lines = load_pretrained(model, "mine:net", save(file), 5)
    assert torch.equal(model.body.layer4[1].conv2.weight, file["layer4.1.conv2.weight"])
    assert line_about(lines, FRESH) == FRESH + "head.weight (5, 512, 1, 1), head.bias (5,)"


# --- torchvision's FCNs --------------------------------------------------------------------------------------------

COCO = "FCN_ResNet50_Weights.COCO_WITH_VOC_LABELS_V1"


@pytest.fixture(scope="module")
def coco() -> Tensors:
    torch.manual_seed(0)
    build = segmentation.fcn_resnet50
    return copied(randomised(build(weights=None, weights_backbone=None, num_classes=21, aux_loss=True)))


def test_coco_weights_with_their_21_classes_are_loaded_completely(hub, coco: Tensors) -> None:
    path = hub(COCO, coco)
    model = build_model("fcn_resnet50", 21)
    assert load_pretrained(model, "fcn_resnet50", "coco", 21) == [
        f"weights from {COCO} ({path}): {len(coco)} of {len(coco)} tensors"
    ]
    assert_equal(model.state_dict(), coco)


def test_coco_weights_with_other_classes_leave_the_last_layers_of_both_heads_fresh(hub, coco: Tensors) -> None:
    hub(COCO, coco)
    model = build_model("fcn_resnet50", 5)
    last = ["classifier.4.weight", "classifier.4.bias", "aux_classifier.4.weight", "aux_classifier.4.bias"]
    fresh = {key: copied(model)[key] for key in last}
    lines = load_pretrained(model, "fcn_resnet50", "coco", 5)
    assert_equal(model.state_dict(), coco | fresh)
    assert lines[1:] == [
        "head re-initialised for 5 classes, the file has 21: "
        + ", ".join(f"{key} {tuple(fresh[key].shape)}" for key in last)
    ]


def test_coco_weights_without_auxiliary_head_in_the_network_leave_theirs_out(hub, coco: Tensors) -> None:
    hub(COCO, coco)
    model = build_model("fcn_resnet50", 21, aux=False)
    lines = load_pretrained(model, "fcn_resnet50", "coco", 21)
    aux = {key: tensor for key, tensor in coco.items() if key.startswith("aux_classifier.")}
    assert len(aux) == 8
    assert_equal(model.state_dict() | aux, coco)
    assert lines[1:] == [LEFT_OUT + ", ".join(f"{key} {tuple(tensor.shape)}" for key, tensor in aux.items())]


def test_file_without_auxiliary_head_leaves_it_fresh(save, coco: Tensors) -> None:
    file = {key: tensor for key, tensor in coco.items() if not key.startswith("aux_classifier.")}
    model = build_model("fcn_resnet50", 21)
    aux = {key: tensor for key, tensor in copied(model).items() if key.startswith("aux_classifier.")}
    lines = load_pretrained(model, "fcn_resnet50", save(file), 21)
    assert_equal(model.state_dict(), file | aux)
    assert lines[1:] == [FRESH + ", ".join(f"{key} {tuple(tensor.shape)}" for key, tensor in aux.items())]


# --- files of the network itself -----------------------------------------------------------------------------------

WRAPPINGS = {
    "as it is": lambda state: state,
    "under model": lambda state: {"model": state, "epoch": 7},
    **{
        f"under {key}": lambda state, key=key: {"epoch": 7, key: state, "optimizer": {"state": {}}}
        for key in ("state_dict", "model_state_dict", "net", "network", "params")
    },
    "twice wrapped": lambda state: {"state_dict": {"model": {f"module.{k}": t for k, t in state.items()}}},
    "DistributedDataParallel": lambda state: {f"module.{key}": tensor for key, tensor in state.items()},
    "torch.compile": lambda state: {f"_orig_mod.{key}": tensor for key, tensor in state.items()},
    "DistributedDataParallel of torch.compile": lambda state: {f"module._orig_mod.{k}": t for k, t in state.items()},
    "torch.compile of DistributedDataParallel": lambda state: {f"_orig_mod.module.{k}": t for k, t in state.items()},
    "under model, DistributedDataParallel": lambda state: {"model": {f"module.{k}": t for k, t in state.items()}},
}


@pytest.mark.parametrize("wrap", WRAPPINGS.values(), ids=WRAPPINGS)
def test_file_of_the_same_network_is_loaded_completely(save, wrap) -> None:
    file = copied(randomised(unet()))
    model, path = unet(), save(wrap(file))
    first, *rest = load_pretrained(model, "unet", path, 3)
    assert first == f"weights from {path}: {len(file)} of {len(file)} tensors"
    assert len(rest) == (wrap is not WRAPPINGS["as it is"])
    assert all(line.startswith("taken from the file's ") for line in rest)
    assert_equal(model.state_dict(), file)


def test_a_line_says_what_was_unwrapped(save) -> None:
    path = save(WRAPPINGS["twice wrapped"](copied(randomised(unet()))))
    assert load_pretrained(unet(), "unet", path, 3)[1] == (
        "taken from the file's 'state_dict', 'model', names without 'module.'"
    )


def test_a_dict_that_contains_itself_ends(save) -> None:
    endless: dict = {"epoch": 7}
    endless["model"] = endless
    with pytest.raises(InputError, match="holds no weights"):
        load_pretrained(unet(), "unet", save(endless), 3)


class Wrapped(nn.Module):
    """A user's own network whose names begin as DistributedDataParallel's do."""

    def __init__(self) -> None:
        super().__init__()
        self.module = unet()


def test_names_that_begin_with_a_prefix_by_themselves_are_kept(save) -> None:
    file = copied(randomised(Wrapped()))
    model = Wrapped()
    load_pretrained(model, "mine:net", save(file), 3)
    assert_equal(model.state_dict(), file)


def checkpoint(path: Path, model: nn.Module) -> Path:
    save_checkpoint(path, {"step": 3, "model": model.state_dict(), "optimizer": {"state": {}}, "classes": ["a", "b"]})
    return path


def test_checkpoint_of_this_program_is_loaded(tmp_path: Path) -> None:
    source, model = randomised(unet()), unet()
    path = checkpoint(tmp_path / "best.pt", source)
    load_pretrained(model, "unet", str(path), 3)
    assert_equal(model.state_dict(), source.state_dict())


def test_checkpoint_with_a_flipped_bit_is_refused(tmp_path: Path) -> None:
    source = randomised(unet())
    path = checkpoint(tmp_path / "best.pt", source)
    data = bytearray(path.read_bytes())
    # In the numbers of a tensor: the file is still one that PyTorch reads, with another weight.
    data[data.index(source.up[0].weight.detach().numpy().tobytes()) + 2] ^= 1
    path.write_bytes(data)
    torch.load(path, weights_only=True)
    assert "SHA-256" in refusal(unet(), "unet", str(path), 3)


class Trap:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_a_file_that_runs_code_is_refused_before_it_runs(tmp_path: Path) -> None:
    path, proof = tmp_path / "weights.pth", tmp_path / "it_ran"
    torch.save({"up.0.weight": Trap(proof)}, path)
    assert "refused: not a file of tensors and plain data" in refusal(unet(), "unet", str(path), 3)
    assert not proof.exists()


def test_checkpoint_without_its_checksum_is_refused(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "best.pt", unet())
    (tmp_path / "best.pt.sha256").unlink()
    assert "best.pt.sha256 is missing" in refusal(unet(), "unet", str(path), 3)


@pytest.mark.parametrize(
    ("name", "options", "heads"),
    [
        ("fcn32s", {"width": WIDTH}, ["score_fr.weight", "score_fr.bias", "upscore.weight"]),
        ("fcn8s", {"width": WIDTH}, [
            "score_fr.weight", "score_fr.bias", "score_pool4.weight", "score_pool4.bias", "score_pool3.weight",
            "score_pool3.bias", "upscore_fr.weight", "upscore_pool4.weight", "upscore.weight",
        ]),
        ("fcn8_kitti", {"width": WIDTH}, [
            "score_fr.weight", "score_fr.bias", "up_pool4.weight", "up.weight", "up.bias",
        ]),
        ("fcn_resnet18", {}, ["score.weight", "score.bias", "upscore.weight"]),
        ("unet", {"width": WIDTH}, ["classifier.weight", "classifier.bias"]),
        ("linknet", {}, ["classifier.weight", "classifier.bias"]),
        ("linknet", {"encoder": "plain"}, ["classifier.weight", "classifier.bias"]),
    ],
)  # fmt: skip
def test_another_number_of_classes_leaves_only_the_head_fresh(save, name: str, options: dict, heads: list[str]) -> None:
    torch.manual_seed(0)
    file = copied(randomised(build_model(name, 21, **options)))
    model = build_model(name, 5, **options)
    fresh = {key: copied(model)[key] for key in heads}
    path = save(file)
    lines = load_pretrained(model, name, path, 5)
    assert_equal(model.state_dict(), file | fresh)
    named = line_about(lines, HEAD).partition(": ")
    assert named[0] == "head re-initialised for 5 classes, the file has 21"
    assert all(f"{key} {tuple(fresh[key].shape)}" in named[2] for key in heads)
    assert lines == [f"weights from {path}: {len(file) - len(heads)} of {len(file)} tensors", line_about(lines, HEAD)]


def test_first_layer_for_other_images_is_no_head(save) -> None:
    """Four channels in the file, three in the network, which has three classes."""
    file = copied(unet())
    file["down.0.0.weight"] = torch.rand(WIDTH, 4, 3, 3)
    assert "down.0.0.weight (2, 4, 3, 3) instead of (2, 3, 3, 3)" in refusal(unet(), "unet", save(file), 3)


def test_width_that_is_the_number_of_classes_is_no_head(save) -> None:
    file = build_model("unet", 4, width=8).state_dict()
    message = refusal(build_model("unet", 4, width=4), "unet", save(file), 4)
    assert "down.1.0.weight (16, 8, 3, 3) instead of (8, 4, 3, 3)" in message


def test_values_are_taken_in_the_networks_type_and_memory_format(save) -> None:
    file = copied(randomised(unet()))
    model = unet().to(torch.float64, memory_format=torch.channels_last)
    load_pretrained(model, "unet", save(file), 3)
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, file[key].to(tensor.dtype)), key
    weight = model.down[1][0].weight
    assert weight.dtype == torch.float64
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert not weight.is_contiguous()


def test_gradients_are_still_asked_for(save) -> None:
    model = unet()
    load_pretrained(model, "unet", save(unet().state_dict()), 3)
    assert all(p.requires_grad and p.is_leaf and p.grad_fn is None for p in model.parameters())


def test_old_file_without_batchnorms_counters_is_loaded(save) -> None:
    file = {key: tensor for key, tensor in copied(randomised(unet())).items() if "num_batches_tracked" not in key}
    model = unet()
    counters = {key: tensor for key, tensor in copied(model).items() if key not in file}
    assert counters
    load_pretrained(model, "unet", save(file), 3)
    assert_equal(model.state_dict(), file | counters)


# --- files that do not fit -----------------------------------------------------------------------------------------


def remove(key: str) -> Callable[[Tensors], Tensors]:
    return lambda state: {name: tensor for name, tensor in state.items() if name != key}


MISFITS = {
    "missing": (remove("merge.0.3.weight"), ["missing: merge.0.3.weight (16, 16, 3, 3)"]),
    "missing statistics": (remove("down.2.1.running_var"), ["missing: down.2.1.running_var (8,)"]),
    "missing head": (remove("classifier.bias"), ["missing: classifier.bias (3,)"]),
    "unexpected": (lambda s: s | {"extra.weight": torch.ones(3, 7)}, ["unexpected: extra.weight (3, 7)"]),
    "another shape": (
        lambda s: s | {"up.0.weight": torch.ones(32, 16, 2, 2)},
        ["of another shape: up.0.weight (32, 16, 2, 2) instead of (32, 16, 3, 3)"],
    ),
    "another shape with as many numbers": (
        lambda s: s | {"up.0.weight": s["up.0.weight"].transpose(0, 1)},
        ["of another shape: up.0.weight (16, 32, 3, 3) instead of (32, 16, 3, 3)"],
    ),
    "another shape that would broadcast": (
        lambda s: s | {"up.0.bias": torch.ones(1)},
        ["of another shape: up.0.bias (1,) instead of (16,)"],
    ),
    "another number of dimensions": (
        lambda s: s | {"classifier.weight": s["classifier.weight"][..., 0]},
        ["of another shape: classifier.weight (3, 2, 1) instead of (3, 2, 1, 1)"],
    ),
    "two numbers of classes": (
        lambda s: s | {"classifier.weight": torch.ones(7, 2, 1, 1), "classifier.bias": torch.ones(9)},
        ["classifier.weight (7, 2, 1, 1) instead of (3, 2, 1, 1)", "classifier.bias (9,) instead of (3,)"],
    ),
    "renamed": (
        lambda s: {key.replace("up.0.bias", "up.0.b"): tensor for key, tensor in s.items()},
        ["missing: up.0.bias (16,)", "unexpected: up.0.b (16,)"],
    ),
    "everything at once": (
        lambda s: remove("up.1.bias")(s) | {"extra": torch.ones(()), "up.0.bias": torch.ones(5)},
        ["missing: up.1.bias (8,)", "unexpected: extra ()", "of another shape: up.0.bias (5,) instead of (16,)"],
    ),
    "more than one wants to read": (
        lambda s: s | {f"extra.{number}": torch.ones(()) for number in range(7)},
        ["unexpected: extra.0 (), ", "extra.4 () and 2 more"],
    ),
    "a prefix on some names only": (
        lambda s: {(f"module.{key}" if key.startswith("up.") else key): tensor for key, tensor in s.items()},
        ["missing: up.0.weight (32, 16, 3, 3)", "unexpected: module.up.0.weight (32, 16, 3, 3)"],
    ),
    "nothing in common": (
        lambda s: {"a": torch.ones(2), "b": torch.ones(3, 1)},
        ["none of its 2 tensors", "a (2,), b (3, 1)", "down.0.0.weight (2, 3, 3, 3)"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("misfit", MISFITS)
def test_file_that_does_not_fit_is_refused_with_names_and_shapes(save, misfit: str) -> None:
    change, expected = MISFITS[misfit]
    path = save(change(copied(randomised(unet()))))
    message = refusal(unet(), "unet", path, 3)
    assert path in message
    for words in expected:
        assert words in message


def test_a_weight_missing_from_a_trunk_is_refused(save) -> None:
    file = remove("layer3.1.bn2.running_mean")(copied(resnet18(weights=None)))
    message = refusal(build_model("linknet", 5), "linknet", save(file), 5)
    assert "missing: encoder.layer3.1.bn2.running_mean (256,)" in message


UNUSABLE = {
    "without data": lambda tensor: tensor.to("meta"),
    "sparse": lambda tensor: tensor.to_sparse(),
    "complex": lambda tensor: tensor.to(torch.complex64),
}


@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants")
@pytest.mark.parametrize("change", UNUSABLE.values(), ids=UNUSABLE)
def test_tensor_that_cannot_be_copied_is_refused_before_any_other_is(save, change) -> None:
    file = copied(randomised(unet()))
    file["classifier.weight"] = change(file["classifier.weight"])
    assert "classifier.weight" in refusal(unet(), "unet", save(file), 3)


# --- files that are no weights -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"hello\n",
        b"PK\x03\x04 no archive",
        [torch.ones(2)],
        torch.ones(2),
        {},
        {"model": {}},
        {"epoch": 3},
        {"a": 1.0},
        {0: torch.ones(2)},
        {"model": [torch.ones(2)]},
    ],
    ids=repr,
)
def test_file_without_weights_is_refused(save, content: object) -> None:
    path = save(content)
    assert path in refusal(unet(), "unet", path, 3)


def test_truncated_file_is_refused(save) -> None:
    path = save(unet().state_dict())
    os.truncate(path, os.path.getsize(path) // 2)  # noqa: PTH202
    assert path in refusal(unet(), "unet", path, 3)


def test_missing_file_and_folder_are_refused(tmp_path: Path) -> None:
    assert "no such file" in refusal(unet(), "unet", str(tmp_path / "none.pt"), 3)
    message = refusal(unet(), "unet", str(tmp_path), 3)
    assert "is a folder" in message
    assert f"{tmp_path}/checkpoints/best.pt" in message


class Armed:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.path,)


@pytest.mark.parametrize(
    "write",
    [
        lambda content, path: torch.save(content, path),
        lambda content, path: torch.save(content, path, _use_new_zipfile_serialization=False),
        lambda content, path: path.write_bytes(pickle.dumps(content)),
    ],
    ids=["archive", "old format", "bare pickle"],
)
def test_file_that_runs_code_is_refused_and_its_code_has_not_run(tmp_path: Path, write) -> None:
    path, made = tmp_path / "weights.pt", tmp_path / "made"
    write({"model": copied(unet()), "armed": Armed(made)}, path)
    assert "could run code" in refusal(unet(), "unet", str(path), 3)
    assert not made.exists()
    with path.open("rb") as file:  # and it was armed
        pickle.load(file) if write(None, tmp_path / "x") else torch.load(file, weights_only=False)
    assert made.exists()


# --- download ------------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    """urllib keeps the proxies that it found first."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setattr(urllib.request, "_opener", None)


@pytest.mark.parametrize(("name", "weights"), [("linknet", "imagenet"), ("fcn_resnet50", "coco")])
def test_without_network_one_line_says_what_to_put_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_proxies: None, name: str, weights: str
) -> None:
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nobody listens, whatever network this machine has
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    enum = PRETRAINED[weights][name]
    url = get_weight(enum).url
    message = refusal(build_model(name, 5), name, weights, 5)
    for words in (enum, url, str(tmp_path / "hub/checkpoints" / Path(url).name), "TORCH_HOME"):
        assert words in message
    assert not any((tmp_path / "hub/checkpoints").iterdir())


class Server(http.server.SimpleHTTPRequestHandler):
    """Serves a folder, and faults by name."""

    def do_GET(self) -> None:
        if self.path.startswith("/babble"):
            self.wfile.write(b"no HTTP at all\r\n\r\n")
        elif self.path.startswith("/short"):
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b"x" * 10)
        elif self.path.startswith("/silent"):
            self.close_connection = True
        else:
            super().do_GET()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_proxies: None):
    """(folder, base address) of a server on this machine, in place of torchvision's."""
    folder = tmp_path / "served"
    folder.mkdir()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    handler = functools.partial(Server, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield folder, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def serve_as_torchvisions(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setattr(torchvision.models, "get_weight", lambda _: SimpleNamespace(url=url))


def test_download_is_verified_and_kept_for_the_next_time(served, tmp_path: Path, monkeypatch) -> None:
    folder, address = served
    file = copied(randomised(resnet18(weights=None)))
    torch.save(file, folder / "new")
    digest = hashlib.sha256((folder / "new").read_bytes()).hexdigest()[:8]
    path = (folder / "new").rename(folder / f"resnet18-{digest}.pth")
    serve_as_torchvisions(monkeypatch, f"{address}/{path.name}")
    for _ in range(2):
        model = build_model("linknet", 5)
        load_pretrained(model, "linknet", "imagenet", 5)
        assert torch.equal(model.encoder.layer4[1].conv2.weight, file["layer4.1.conv2.weight"])
        path.unlink(missing_ok=True)
    assert [path.name for path in (tmp_path / "torch/hub/checkpoints").iterdir()] == [path.name]


@pytest.mark.parametrize("name", ["other", "absent", "short", "silent", "babble"])
def test_download_that_fails_leaves_no_file(served, tmp_path: Path, monkeypatch, name: str) -> None:
    folder, address = served
    (folder / "other-00000000.pth").write_bytes(b"not what its name says")
    url = f"{address}/{name}-00000000.pth"
    serve_as_torchvisions(monkeypatch, url)
    assert url in refusal(OnResNet(5), "linknet", "imagenet", 5)
    assert not any((tmp_path / "torch/hub/checkpoints").iterdir())
