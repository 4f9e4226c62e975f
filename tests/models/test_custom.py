"""Networks of the user's own: found by import path, tried before training, and every mistake named."""

import contextlib
import copy
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.ops import FrozenBatchNorm2d

from fcn.errors import InputError
from fcn.models import SampleKeys, build_model, convert_dropout, convert_sync_batchnorm, examine

SIZE = (12, 10)

MODULE = """
    from torch import nn

    LIMIT = 3

    def build(num_classes, width=4, deep=False):
        layers = [nn.Conv2d(3, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, num_classes, 1)]
        return nn.Sequential(*layers, nn.Identity()) if deep else nn.Sequential(*layers)

    def positional(classes):
        return build(classes)

    def nothing(num_classes):
        build(num_classes)
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty current directory; what is imported from it is forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    known = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - known:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.fixture
def mine(here: Path) -> Path:
    (here / "mine.py").write_text(textwrap.dedent(MODULE))
    return here


# ------------------------------------------------------------------------------------------------- by import path


def test_a_module_in_the_current_directory_builds_the_network(mine):
    network = build_model("mine:build", 7, width=6, deep=True)
    assert [type(layer) for layer in network] == [nn.Conv2d, nn.ReLU, nn.Conv2d, nn.Identity]
    assert network[0].out_channels == 6
    assert network(torch.rand(2, 3, *SIZE)).shape == (2, 7, *SIZE)
    assert len(build_model("mine:build", 7)) == 3


def test_a_module_in_a_package_builds_the_network(here):
    (here / "nets" / "small").mkdir(parents=True)
    (here / "nets" / "__init__.py").touch()
    (here / "nets" / "small" / "__init__.py").write_text("from nets.small.build import Network")
    (here / "nets" / "small" / "build.py").write_text(
        textwrap.dedent("""
            from torch import nn
            class Network(nn.Conv2d):
                def __init__(self, *, num_classes, **options):
                    super().__init__(3, num_classes, **options)
        """)
    )
    network = build_model("nets.small:Network", 5, kernel_size=3, padding=1)  # a class is a function that returns one
    assert network(torch.rand(2, 3, *SIZE)).shape == (2, 5, *SIZE)


@pytest.mark.parametrize("aux", [False, True])
def test_a_network_of_torchvision_returns_logits_in_evaluation_and_its_mapping_in_training(aux):
    options = {"weights": None, "weights_backbone": None, "aux_loss": aux}
    network = build_model("torchvision.models.segmentation:deeplabv3_resnet50", 4, **options)
    images = torch.rand(2, 3, 33, 40)
    assert set(network.train()(images)) == ({"out", "aux"} if aux else {"out"})
    logits = network.eval()(images)
    assert isinstance(logits, torch.Tensor)
    assert logits.shape == (2, 4, 33, 40)
    torch.testing.assert_close(logits, type(network).forward(network, images)["out"], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("path", "missing"),
    [("nowhere:build", "nowhere"), ("nowhere.nets:build", "nowhere"), ("pack.nowhere.nets:build", "pack.nowhere")],
)
def test_a_module_that_does_not_exist_is_named_with_the_place_that_was_searched(here, path, missing):
    (here / "pack").mkdir()
    (here / "pack" / "__init__.py").touch()
    with pytest.raises(InputError) as caught:
        build_model(path, 3)
    message = str(caught.value)
    assert f"'{path}'" in message
    assert f"no module {missing};" in message
    assert str(here) in message
    assert "\n" not in message


def test_a_module_below_one_that_is_no_package_does_not_exist(mine):
    with pytest.raises(InputError, match=r"no module mine\.build"):
        build_model("mine.build:build", 3)


@pytest.mark.parametrize("inner", ["not_installed", "not_installed.part", "broken_too", "brok"])
def test_an_import_that_fails_inside_the_module_keeps_its_traceback(here, inner):
    """The path is right, so the message must not say that it is wrong."""
    (here / "broken.py").write_text(f"import {inner}\n")
    with pytest.raises(ModuleNotFoundError, match=inner.split(".")[0]):
        build_model("broken:build", 3)


def test_any_other_error_of_the_module_or_the_function_keeps_its_traceback(here):
    (here / "failing.py").write_text("def build(num_classes):\n    raise TypeError('mine')\n")
    (here / "dividing.py").write_text("1 / 0\n")
    with pytest.raises(TypeError, match="mine"):
        build_model("failing:build", 3)
    with pytest.raises(ZeroDivisionError):
        build_model("dividing:build", 3)


@pytest.mark.parametrize("function", ["missing", "LIMIT", ""])
def test_what_is_no_function_of_the_module_is_refused(mine, function):
    with pytest.raises(InputError) as caught:
        build_model(f"mine:{function}", 3)
    assert str(mine / "mine.py") in str(caught.value)
    assert f"'mine:{function}'" in str(caught.value)


@pytest.mark.parametrize(
    ("function", "options", "words"),
    [
        ("build", {"depth": 9}, ["depth", "width=4"]),
        ("positional", {}, ["num_classes=3", "classes", "no options"]),
    ],
)
def test_arguments_that_the_function_does_not_take_are_named_with_those_it_takes(mine, function, options, words):
    with pytest.raises(InputError, match=r"model\.options") as caught:
        build_model(f"mine:{function}", 3, **options)
    assert [word for word in words if word not in str(caught.value)] == []


def test_a_function_that_returns_no_network_is_refused(mine):
    with pytest.raises(InputError, match=r"mine:nothing returned NoneType.*nn\.Module"):
        build_model("mine:nothing", 3)


# ------------------------------------------------------------------------------------------------------- examine


class Net(nn.Module):
    """Two convolutions with something of the test's between or after them."""

    def __init__(self, inner=None, outer=None, *, channels: int = 3) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, channels, 1)
        self.inner, self.outer = inner or nn.Identity(), outer

    def forward(self, images):
        logits = self.last(self.inner(self.first(images)))
        return logits if self.outer is None else self.outer(self, logits)


def tried(network: nn.Module, *, sync_bn: bool = True, autocast=None) -> list[str]:
    """What is said about a network that is prepared as for training."""
    keys = convert_dropout(network)
    if sync_bn:
        convert_sync_batchnorm(network)
    found = examine(network, keys, 3, SIZE, autocast or contextlib.nullcontext(), sync_bn=sync_bn)
    return found.warnings + found.notes


@pytest.mark.parametrize(
    "network",
    [
        pytest.param(lambda: Net(), id="tensor"),
        pytest.param(lambda: Net(nn.Sequential(nn.BatchNorm2d(8), nn.Dropout(0.5), nn.Dropout2d(0.5))), id="layers"),
        pytest.param(lambda: Net(outer=lambda self, x: {"out": x} if self.training else x), id="out"),
        pytest.param(lambda: Net(outer=lambda self, x: {"out": x, "aux": 2 * x} if self.training else x), id="aux"),
        pytest.param(lambda: build_model("fcn8s", 3, width=2), id="fcn8s"),
        pytest.param(lambda: build_model("linknet", 3), id="linknet"),
    ],
)
def test_a_network_that_keeps_all_promises_gets_no_note(network):
    torch.manual_seed(0)
    assert tried(network()) == []


def test_a_mapping_from_a_network_built_by_path_is_accepted(here):
    (here / "pair.py").write_text(
        textwrap.dedent("""
            from torch import nn
            class Pair(nn.Conv2d):
                def forward(self, images):
                    logits = super().forward(images)
                    return {"out": logits, "aux": -logits}
            def build(num_classes):
                return Pair(3, num_classes, 1)
        """)
    )
    assert tried(build_model("pair:build", 3)) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_it_is_tried_in_the_precision_of_the_run(dtype):
    kinds = []
    network = Net(outer=lambda self, x: kinds.append(x.dtype) or x)
    if dtype == torch.bfloat16:
        assert tried(network, autocast=torch.autocast("cpu", dtype)) == []
    else:
        assert tried(network.to(dtype)) == []
    assert set(kinds) == {dtype}


class Unused(Net):
    """Six parameters that no loss depends on, and one that was frozen before."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.Conv2d(3, 3, 1) for _ in range(3))
        self.pinned = nn.Parameter(torch.zeros(2), requires_grad=False)


def test_parameters_that_no_loss_depends_on_are_frozen_and_named():
    network = Unused()
    (note,) = tried(network)
    assert note == (
        "the loss does not depend on branches.0.weight, branches.0.bias, branches.1.weight, branches.1.bias "
        "and 2 more, 12.5% of the weights: they stay untrained"
    )
    frozen = {name for name, parameter in network.named_parameters() if not parameter.requires_grad}
    assert frozen == {f"branches.{k}.{part}" for k in range(3) for part in ("weight", "bias")} | {"pinned"}


@pytest.mark.parametrize(
    ("outer", "words"),
    [
        pytest.param(lambda self, x: x[..., ::2, ::2], ["in evaluation", "(2, 3, 6, 5)", "upsample"], id="smaller"),
        pytest.param(lambda self, x: x[:, :2], ["in evaluation", "(2, 2, 12, 10)", "(2, 3, 12, 10)"], id="channels"),
        pytest.param(lambda self, x: [x], ["in evaluation", "list"], id="list"),
        pytest.param(lambda self, x: x[..., 1:] if self.training else x, ["in training", "(2, 3, 12, 9)"], id="train"),
        pytest.param(
            lambda self, x: {"out": x, "aux": x[..., ::2]} if self.training else x, ["'aux'", "(2, 3, 12, 5)"], id="aux"
        ),
        pytest.param(lambda self, x: {"out": None} if self.training else x, ["'out'", "NoneType"], id="none"),
        pytest.param(lambda self, x: {"logits": x} if self.training else x, ["returns 'logits'", "'out'"], id="key"),
        pytest.param(lambda self, x: {"aux": x} if self.training else x, ["returns 'aux'", "'out'"], id="no-out"),
        pytest.param(
            lambda self, x: {"out": x, "aux": x, "edge": x} if self.training else x, ["'edge'"], id="third-head"
        ),
        pytest.param(lambda self, x: {} if self.training else x, ["returns nothing"], id="empty"),
    ],
)
def test_an_output_that_training_or_evaluation_cannot_use_is_refused(outer, words):
    with pytest.raises(InputError, match=r"^model\.name: ") as caught:
        tried(Net(outer=outer))
    assert [word for word in words if word not in str(caught.value)] == []


def test_a_network_without_parameters_is_refused():
    with pytest.raises(InputError, match="no parameters"):
        tried(nn.Identity())


class FunctionalDropout(nn.Module):
    def forward(self, x):
        return F.dropout(x, 0.5, self.training)


class Tokens(nn.Module):
    """Dropout on (N·H·W, C), as in some transformers: its rows are not samples, so they have no keys."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        n, c, h, w = x.shape
        rows = self.dropout(x.permute(0, 2, 3, 1).reshape(n * h * w, c))
        return rows.reshape(n, h, w, c).permute(0, 3, 1, 2)


@pytest.mark.parametrize("layer", [FunctionalDropout, Tokens, nn.Dropout3d, nn.AlphaDropout])
def test_random_numbers_without_keys_are_noted(layer):
    (note,) = tried(Net(layer()))
    assert "draws random numbers" in note


@pytest.mark.parametrize("layer", [lambda: nn.Dropout(0.5), lambda: nn.Dropout2d(0.5)], ids=["Dropout", "Dropout2d"])
def test_dropout_is_noted_only_where_it_was_not_converted(layer):
    network = Net(layer())
    (note,) = examine(network, SampleKeys(), 3, SIZE, contextlib.nullcontext(), sync_bn=True).notes
    assert "draws random numbers" in note
    assert tried(network) == []


class Volume(nn.BatchNorm3d):
    def forward(self, x):
        return super().forward(x[:, :, None])[:, :, 0]


class Line(nn.BatchNorm1d):
    def forward(self, x):
        return super().forward(x.flatten(2)).reshape(x.shape)


@pytest.mark.parametrize("norm", [Volume, Line])
def test_batch_statistics_that_stay_each_process_own_are_noted_where_they_matter(norm):
    (note,) = tried(Net(nn.Sequential(nn.ReLU(), norm(8))))
    assert "batch statistics of inner.1 are not those of the global batch" in note
    assert tried(Net(norm(8)), sync_bn=False) == []


def test_batchnorm_that_was_not_converted_is_noted():
    network = Net(nn.BatchNorm2d(8))
    (note,) = examine(network, SampleKeys(), 3, SIZE, contextlib.nullcontext(), sync_bn=True).notes
    assert "batch statistics of inner " in note


@pytest.mark.parametrize(
    "norm",
    [
        lambda: FrozenBatchNorm2d(8),
        lambda: nn.BatchNorm2d(8),
        lambda: nn.GroupNorm(2, 8),
        lambda: nn.InstanceNorm2d(8),
        lambda: nn.InstanceNorm2d(8, affine=True, track_running_stats=True),
    ],
    ids=["Frozen", "BatchNorm2d", "GroupNorm", "InstanceNorm", "InstanceNorm-tracking"],
)
def test_statistics_that_no_other_process_can_change_are_not_noted(norm):
    assert tried(Net(norm())) == []


@pytest.mark.parametrize("training", [True, False])
def test_the_trial_leaves_the_network_as_it_was_bit_for_bit(training):
    network = Net(nn.Sequential(nn.BatchNorm2d(8), nn.Dropout(0.5), FunctionalDropout())).train(training)
    network.inner[2].train(not training)  # a part in another mode than the rest
    keys = convert_dropout(convert_sync_batchnorm(network))
    before = copy.deepcopy(network.state_dict())
    modes = [module.training for module in network.modules()]
    examine(network, keys, 3, SIZE, torch.autocast("cpu", torch.bfloat16), sync_bn=True)
    after = network.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert [module.training for module in network.modules()] == modes
    assert all(parameter.grad is None for parameter in network.parameters())
    assert all(parameter.requires_grad for parameter in network.parameters())
    assert keys.value is None
    assert network.inner[1].keys is keys


# --------------------------------------------------------------------------- found by trying to break it


def test_a_mapping_without_out_is_named_before_training(here):
    (here / "odd.py").write_text(
        textwrap.dedent("""
            from torch import nn
            class Odd(nn.Conv2d):
                def forward(self, images):
                    return {"logits": super().forward(images)}
            def build(num_classes):
                return Odd(3, num_classes, 1)
        """)
    )
    with pytest.raises(InputError, match=r"a mapping with 'logits'.*accepted: logits"):
        tried(build_model("odd:build", 3))


def test_a_network_with_nothing_to_train_is_refused():
    with pytest.raises(InputError, match="nothing to train"):
        tried(nn.Conv2d(3, 3, 1).requires_grad_(False))


def test_an_output_without_a_gradient_is_refused():
    class Detached(nn.Conv2d):
        def forward(self, images):
            return super().forward(images).detach()

    with pytest.raises(InputError, match="'out' has no gradient"):
        tried(Detached(3, 3, 1))


@pytest.mark.parametrize("path", ["sys:nothing", "space:nothing"], ids=["built in", "a folder without __init__.py"])
def test_a_module_without_a_file_is_named_all_the_same(here, path):
    (here / "space").mkdir()
    with pytest.raises(InputError, match=f"module {path.partition(':')[0]} has no function nothing"):
        build_model(path, 3)


def test_a_callable_without_a_signature_is_called(here):
    with pytest.raises(InputError, match="returned dict"):
        build_model("builtins:dict", 3)


def test_randomness_that_seldom_shows_is_found():
    class Seldom(nn.Conv2d):
        def forward(self, images):
            return super().forward(images) * (1 + float(torch.rand(()) < 1e-9))

    assert any("draws random numbers" in note for note in tried(Seldom(3, 3, 1)))
