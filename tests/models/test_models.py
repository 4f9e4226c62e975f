"""Every network: its size and parameters, its types, its gradients, its compilation, and that it learns."""

import copy
import inspect
import itertools
import math
from collections.abc import Mapping

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.models import resnet18, segmentation

from fcn.config.keys import Model, options_of
from fcn.evaluation.confusion_matrix import ConfusionMatrix
from fcn.models import MODELS, build_model, convert_dropout
from fcn.training.losses import cross_entropy

VARIANTS = {  # narrow where a network has a width: what is tested here does not depend on it
    "fcn32s": ("fcn32s", {"width": 4}),
    "fcn16s": ("fcn16s", {"width": 4}),
    "fcn8s": ("fcn8s", {"width": 4}),
    "fcn32s-same": ("fcn32s", {"width": 4, "layout": "same"}),
    "fcn16s-same": ("fcn16s", {"width": 4, "layout": "same"}),
    "fcn8s-same": ("fcn8s", {"width": 4, "layout": "same"}),
    "fcn8_kitti": ("fcn8_kitti", {"width": 4}),
    "fcn_resnet18": ("fcn_resnet18", {}),
    "fcn_resnet50": ("fcn_resnet50", {}),
    "fcn_resnet101": ("fcn_resnet101", {}),
    "unet": ("unet", {"width": 4}),
    "unet-none": ("unet", {"width": 4, "norm": "none"}),
    "linknet": ("linknet", {}),
    "linknet-plain": ("linknet", {"encoder": "plain"}),
}
every_variant = pytest.mark.parametrize("variant", VARIANTS)


def build(variant: str, num_classes: int = 3, *, woken: bool = False) -> nn.Module:
    """A variant with seeded weights; `woken`: random also where fresh weights and biases are zero."""
    torch.manual_seed(0)
    name, options = VARIANTS[variant]
    model = build_model(name, num_classes, **options)
    if woken:
        for parameter in model.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=0.1)
    return model


def heads(output: torch.Tensor | Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return dict(output) if isinstance(output, Mapping) else {"out": output}


def test_the_variants_are_of_all_networks():
    assert {name for name, _ in VARIANTS.values()} == set(MODELS)


# ------------------------------------------------------------------------------------------------------ build_model


def test_an_unknown_name_is_refused_and_the_known_ones_are_named():
    with pytest.raises(ValueError, match="'segnet'") as caught:
        build_model("segnet", 3)
    assert [name for name in MODELS if name not in str(caught.value)] == []
    assert "package.module:function" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "options", "known"),
    [
        ("unet", {"norm": "group"}, "'group'; known: batch, none"),
        ("linknet", {"encoder": "vgg"}, "'vgg'; known: resnet18, plain"),
        *((name, {"layout": "caffe"}, "'caffe'; known: classic, same") for name in ("fcn32s", "fcn16s", "fcn8s")),
    ],
)
def test_an_unknown_choice_is_refused_and_the_known_ones_are_named(name, options, known):
    with pytest.raises(ValueError, match=known):
        build_model(name, 3, **options)


@pytest.mark.parametrize("name", MODELS)
def test_the_config_knows_exactly_the_options_of_each_network(name):
    assert set(inspect.signature(MODELS[name]).parameters) == {"num_classes", *options_of(Model, name)}


@every_variant
def test_weights_depend_on_the_seed_alone(variant):
    name, options = VARIANTS[variant]

    def weights(seed: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(seed)
        return build_model(name, 3, **options).state_dict()

    first, again, other = weights(1), weights(1), weights(2)
    assert all(torch.equal(first[key], again[key]) for key in first)
    drawn = [key for key, value in first.items() if value.ndim == 4 and not key.startswith(("score", "upscore"))]
    assert len(drawn) >= 15
    assert [key for key in drawn if torch.equal(first[key], other[key])] == []


# -------------------------------------------------------------------------------------------------------- parameters


def conv(before: int, after: int, kernel: int, *, bias: bool = True) -> int:
    return before * after * kernel * kernel + bias * after


def norm(channels: int) -> int:
    return 2 * channels


def vgg16_convolutions() -> int:
    widths = [3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]
    return sum(conv(before, after, 3) for before, after in itertools.pairwise(widths))


def fcn_trunk() -> int:
    return vgg16_convolutions() + conv(512, 4096, 7) + conv(4096, 4096, 1)


def fcn_vgg(stride: int, classes: int) -> int:
    count = fcn_trunk() + conv(4096, classes, 1)
    if stride <= 16:
        count += conv(512, classes, 1) + conv(classes, classes, 4, bias=False)
    if stride == 8:
        count += conv(256, classes, 1) + conv(classes, classes, 4, bias=False)
    return count + conv(classes, classes, 2 * stride, bias=False)


def fcn8_kitti(classes: int) -> int:
    decoder = conv(classes, 512, 4) + conv(512, 256, 4) + conv(256, classes, 16)
    return fcn_trunk() + conv(4096, classes, 1) + decoder


def resnet18_trunk() -> int:
    count = conv(3, 64, 7, bias=False) + norm(64)
    count += 4 * (conv(64, 64, 3, bias=False) + norm(64))
    for before, after in ((64, 128), (128, 256), (256, 512)):
        count += conv(before, after, 3, bias=False) + 3 * conv(after, after, 3, bias=False) + 4 * norm(after)
        count += conv(before, after, 1, bias=False) + norm(after)  # the shortcut of the first block
    return count


def fcn_resnet18(classes: int) -> int:
    return resnet18_trunk() + conv(512, classes, 1) + conv(classes, classes, 64, bias=False)


def bottlenecks(before: int, middle: int, blocks: int) -> int:
    """One layer of ResNet-50 or -101: 1×1 down, 3×3, 1×1 to four times as many, and one 1×1 shortcut."""
    count = conv(before, 4 * middle, 1, bias=False) + norm(4 * middle)
    for block in range(blocks):
        count += conv(4 * middle if block else before, middle, 1, bias=False) + norm(middle)
        count += conv(middle, middle, 3, bias=False) + norm(middle)
        count += conv(middle, 4 * middle, 1, bias=False) + norm(4 * middle)
    return count


def fcn_dilated(blocks: tuple[int, int, int, int], classes: int, *, aux: bool) -> int:
    count = conv(3, 64, 7, bias=False) + norm(64)
    for before, middle, number in zip((64, 256, 512, 1024), (64, 128, 256, 512), blocks, strict=True):
        count += bottlenecks(before, middle, number)
    for channels in (2048, 1024) if aux else (2048,):
        count += conv(channels, channels // 4, 3, bias=False) + norm(channels // 4) + conv(channels // 4, classes, 1)
    return count


def unet(classes: int, *, normalised: bool) -> int:
    """`normalised`: a BatchNorm after each 3×3 convolution of the double ones, which then have no bias."""
    doubles = [(3, 64), (64, 128), (128, 256), (256, 512), (512, 1024)]
    doubles += [(1024, 512), (512, 256), (256, 128), (128, 64)]
    ups = [(1024, 512), (512, 256), (256, 128), (128, 64)]
    count = sum(conv(before, after, 3) for before, after in ups) + conv(64, classes, 1)
    for before, after in doubles:
        for channels in (before, after):
            count += conv(channels, after, 3, bias=not normalised) + (norm(after) if normalised else 0)
    return count


def linknet_decoder(before: int, after: int, *, bias: bool) -> int:
    middle = before // 4
    count = conv(before, middle, 1, bias=bias) + conv(middle, middle, 3, bias=bias) + conv(middle, after, 1, bias=bias)
    return count + 2 * norm(middle) + norm(after)


def linknet(classes: int, *, plain: bool) -> int:
    count = resnet18_trunk()
    if plain:
        count = conv(3, 64, 7) + norm(64)
        for before, after in ((64, 64), (64, 128), (128, 256), (256, 512)):
            count += 2 * (conv(before, after, 3) + norm(after))  # the strided one and the shortcut beside it
            count += 3 * (conv(after, after, 3) + norm(after))
    for before, after in ((512, 256), (256, 128), (128, 64), (64, 64)):
        count += linknet_decoder(before, after, bias=plain)
    count += conv(64, 32, 3, bias=plain) + norm(32) + conv(32, 32, 3, bias=plain) + norm(32)
    return count + conv(32, classes, 2)


@pytest.mark.parametrize(
    ("name", "classes", "options", "arithmetic", "published"),
    [
        ("fcn8s", 21, {}, fcn_vgg(8, 21), 134_489_759),
        ("fcn8s", 21, {"layout": "same"}, fcn_vgg(8, 21), 134_489_759),
        ("fcn16s", 21, {}, fcn_vgg(16, 21), None),
        ("fcn32s", 21, {}, fcn_vgg(32, 21), None),
        ("fcn32s", 5, {"layout": "same"}, fcn_vgg(32, 5), None),
        ("fcn8_kitti", 2, {}, fcn8_kitti(2), 136_514_116),
        ("fcn_resnet18", 21, {}, fcn_resnet18(21), 12_993_621),
        ("fcn_resnet50", 21, {}, fcn_dilated((3, 4, 6, 3), 21, aux=True), 35_322_218),
        ("fcn_resnet50", 21, {"aux": False}, fcn_dilated((3, 4, 6, 3), 21, aux=False), None),
        ("fcn_resnet101", 21, {}, fcn_dilated((3, 4, 23, 3), 21, aux=True), None),
        ("unet", 2, {"norm": "none"}, unet(2, normalised=False), 34_513_410),
        ("unet", 11, {}, unet(11, normalised=True), None),
        ("linknet", 2, {"encoder": "plain"}, linknet(2, plain=True), 12_952_610),
        ("linknet", 11, {}, linknet(11, plain=False), None),
    ],
)
def test_parameters_are_those_of_the_paper_layer_by_layer(name, classes, options, arithmetic, published):
    if published:
        assert arithmetic == published
    with torch.device("meta"):
        model = build_model(name, classes, **options)
    assert sum(parameter.numel() for parameter in model.parameters()) == arithmetic
    assert all(parameter.requires_grad for parameter in model.parameters())


# --------------------------------------------------------------------------------------------------- fresh weights


@pytest.mark.parametrize(
    ("variant", "upsamplings"),
    [
        ("fcn32s", [32]),
        ("fcn16s", [2, 16]),
        ("fcn8s", [2, 2, 8]),
        ("fcn32s-same", [32]),
        ("fcn16s-same", [2, 16]),
        ("fcn8s-same", [2, 2, 8]),
        ("fcn_resnet18", [32]),
    ],
)
def test_every_transposed_convolution_to_the_classes_starts_as_bilinear_interpolation(variant, upsamplings):
    found = [module for module in build(variant).modules() if isinstance(module, nn.ConvTranspose2d)]
    assert [layer.stride for layer in found] == [(factor, factor) for factor in upsamplings]
    for layer, factor in zip(found, upsamplings, strict=True):
        scores = torch.randn(1, 3, 6, 5)
        expected = F.interpolate(scores, scale_factor=factor, mode="bilinear", align_corners=False)
        cut = factor // 2 - layer.padding[0]
        output = layer(scores)[..., cut : cut + 6 * factor, cut : cut + 5 * factor]
        inner = slice(factor // 2, -(factor // 2))
        torch.testing.assert_close(output[..., inner, inner], expected[..., inner, inner], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "variant", [key for key, (name, _) in VARIANTS.items() if name in ("fcn32s", "fcn16s", "fcn8s")]
)
def test_score_heads_start_at_zero(variant):
    model = build(variant)
    scores = {key: value for key, value in model.state_dict().items() if key.startswith("score")}
    assert len(scores) == 2 * {"fcn32s": 1, "fcn16s": 2, "fcn8s": 3}[VARIANTS[variant][0]]
    assert not any(value.any() for value in scores.values())
    assert not model(torch.randn(1, 3, 20, 30)).any()


def test_the_score_of_fcn_resnet18_starts_as_xavier_says():
    score = build("fcn_resnet18", 21).score
    bound = math.sqrt(6 / (512 + 21))  # Glorot, Bengio 2010, for fan-in 512 and fan-out 21
    sizes = score.weight.detach().abs()
    assert sizes.max() <= bound
    assert sizes.max() > 0.99 * bound  # of 10 752 uniform numbers
    assert abs(float(sizes.mean()) / bound - 0.5) < 5 * math.sqrt(1 / 12 / 10_752)
    assert not score.bias.any()


# ------------------------------------------------------------------------------------ the same network, written plainly


def vgg_by_hand(weights: Mapping[str, torch.Tensor], images: torch.Tensor, image_padding: int, fc6_padding: int):
    """pool3, pool4 and fc7 of VGG16: Caffe's pools round up, which is a floor after one more row and column of -inf."""

    def layer(x: torch.Tensor, name: str, padding: int) -> torch.Tensor:
        x = F.pad(x, (padding,) * 4)
        return F.relu(F.conv2d(x, weights[f"trunk.{name}.weight"], weights[f"trunk.{name}.bias"]))

    x, pools = images, []
    for stage, convolutions in enumerate((2, 2, 3, 3, 3), start=1):
        for number in range(1, convolutions + 1):
            first = stage == number == 1
            x = layer(x, f"stages.{stage - 1}.conv{stage}_{number}", image_padding if first else 1)
        x = F.pad(x, (0, x.shape[-1] % 2, 0, x.shape[-2] % 2), value=-math.inf)
        x = F.max_pool2d(x, 2)
        pools.append(x)
    return pools[2], pools[3], layer(layer(x, "fc6", fc6_padding), "fc7", 0)


def window(x: torch.Tensor, offset: int, like: torch.Tensor) -> torch.Tensor:
    """Caffe's Crop layer."""
    return x[..., offset : offset + like.shape[-2], offset : offset + like.shape[-1]]


def fcn_by_hand(
    stride: int, weights: Mapping[str, torch.Tensor], images: torch.Tensor, *, classic: bool
) -> torch.Tensor:
    """`voc-fcn32s`, `-16s` and `-8s` of the reference code; or, not classic, the same with aligned strides.

    Aligned: a transposed convolution of kernel 2f reaches f/2 above and to the left of its input's first pixel. Leaving
    those out puts the top left corner of pixel (0, 0) on that of the image, on every level.
    """
    pool3, pool4, fc7 = vgg_by_hand(weights, images, *((100, 0) if classic else (1, 3)))

    def score(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.conv2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def up(x: torch.Tensor, name: str, factor: int) -> torch.Tensor:
        return F.conv_transpose2d(x, weights[f"{name}.weight"], stride=factor)

    def fuse(x: torch.Tensor, skip: torch.Tensor, offset: int) -> torch.Tensor:
        return x + window(skip, offset, x) if classic else window(x, 1, skip) + skip

    x = score(fc7, "score_fr")
    if stride <= 16:
        x = fuse(up(x, "upscore_fr", 2), score(pool4, "score_pool4"), 5)
    if stride == 8:
        x = fuse(up(x, "upscore_pool4", 2), score(pool3, "score_pool3"), 9)
    offset = {32: 19, 16: 27, 8: 31}[stride] if classic else stride // 2
    return window(up(x, "upscore", stride), offset, images)


def randomised(model: nn.Module) -> nn.Module:
    """Random weights everywhere, of a size that keeps every layer's contribution visible in the logits."""
    with torch.no_grad():
        for parameter in model.parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 1
            nn.init.normal_(parameter, std=math.sqrt(2 / fan_in) if parameter.ndim > 1 else 0.3)
    return model


@pytest.mark.parametrize("size", [(61, 83), (64, 32), (1, 1)], ids=str)
@pytest.mark.parametrize("layout", ["classic", "same"])
@pytest.mark.parametrize("stride", [32, 16, 8])
def test_fcn_on_vgg_computes_the_reference_recipe(stride, layout, size):
    torch.manual_seed(stride)
    model = randomised(build_model(f"fcn{stride}s", 5, width=3, layout=layout).double()).eval()
    images = torch.randn(2, 3, *size, dtype=torch.float64)
    with torch.no_grad():
        expected = fcn_by_hand(stride, model.state_dict(), images, classic=layout == "classic")
        found = model(images)
    assert expected.shape == (2, 5, *size)
    assert expected.std() > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_fcn8_kitti_computes_its_recipe():
    torch.manual_seed(0)
    model = randomised(build_model("fcn8_kitti", 2, width=3).double()).eval()
    weights = model.state_dict()

    def up(x: torch.Tensor, name: str, factor: int, like: torch.Tensor) -> torch.Tensor:
        x = F.conv_transpose2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], stride=factor)
        return window(x, factor // 2, like)

    images = torch.randn(2, 3, 61, 83, dtype=torch.float64)
    with torch.no_grad():
        pool3, pool4, fc7 = vgg_by_hand(weights, images, 1, 3)
        x = F.conv2d(fc7, weights["score_fr.weight"], weights["score_fr.bias"])
        x = up(x, "up_pool4", 2, pool4) + pool4
        x = up(x, "up_pool3", 2, pool3) + pool3
        expected = up(x, "up", 8, images)
        assert expected.std() > 1e-3
        torch.testing.assert_close(model(images), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["fcn32s", "fcn16s", "fcn8s"])
def test_weights_fit_both_layouts(name):
    torch.manual_seed(0)
    classic, same = (randomised(build_model(name, 4, width=3, layout=layout)) for layout in ("classic", "same"))
    for source, target in ((classic, same), (same, classic)):
        target.load_state_dict(source.state_dict())  # strict
        loaded = target.state_dict()
        assert all(torch.equal(loaded[key], value) for key, value in source.state_dict().items())


@pytest.mark.parametrize("name", ["fcn_resnet50", "fcn_resnet101"])
def test_the_dilated_networks_are_torchvisions_under_its_names(name):
    theirs = getattr(segmentation, name)(weights=None, weights_backbone=None, num_classes=4, aux_loss=True)
    ours = build_model(name, 4)
    ours.load_state_dict(theirs.state_dict())  # strict: all names are torchvision's
    images = torch.randn(2, 3, 33, 40)
    with torch.no_grad():
        assert torch.equal(ours.eval()(images), theirs.eval()(images)["out"])
        # Dropout draws in the same order: the main head first.
        for model in (ours.train(), theirs.train()):
            torch.manual_seed(5)
            model.outputs = heads(model(images))
    assert ours.outputs.keys() == theirs.outputs.keys() == {"out", "aux"}
    assert all(torch.equal(ours.outputs[key], theirs.outputs[key]) for key in ours.outputs)


def test_fcn_resnet18_is_the_network_of_dive_into_deep_learning():
    """Section 14.11: ResNet-18 without its last two layers, a 1×1 convolution, one transposed one of kernel 64."""
    torch.manual_seed(0)
    trunk = nn.Sequential(*list(resnet18(weights=None).children())[:-2])
    book = nn.Sequential(trunk, nn.Conv2d(512, 5, 1), nn.ConvTranspose2d(5, 5, 64, padding=16, stride=32, bias=False))
    ours = build_model("fcn_resnet18", 5)
    ours.load_state_dict(dict(zip(ours.state_dict(), book.state_dict().values(), strict=True)))
    images = torch.randn(2, 3, 64, 96)  # multiples of 32: the book's network knows no other sizes
    with torch.no_grad():
        assert torch.equal(ours.eval()(images), book.eval()(images))


# ------------------------------------------------------------------------------------------- sizes, types, gradients

SMALL_SIZES = [(1, 1), (31, 57), (97, 33)]


@every_variant
def test_evaluation_returns_logits_of_the_size_of_the_images(variant):
    model = build(variant, 5, woken=True).eval()
    large = [(224, 224), (375, 500)]
    if variant in ("fcn_resnet50", "fcn_resnet101"):
        large.pop()  # many seconds; without numbers, below
    for size in [*SMALL_SIZES, *large]:
        with torch.no_grad():
            logits = model(torch.randn(2, 3, *size))
        assert isinstance(logits, torch.Tensor)
        assert logits.shape == (2, 5, *size)
        assert logits.dtype == torch.float32
        assert torch.isfinite(logits).all()
        assert size == (1, 1) or not torch.equal(logits[0], logits[1])


@pytest.mark.parametrize("name", MODELS)
def test_full_width_networks_return_logits_of_the_size_of_the_images(name):
    """At 375×500, on the device that computes shapes alone."""
    with torch.device("meta"):
        model = build_model(name, 21)
    for logits in heads(model(torch.empty(2, 3, 375, 500, device="meta"))).values():
        assert logits.shape == (2, 21, 375, 500)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp64"])
@every_variant
def test_training_passes_forward_and_backward_in_every_precision(variant, precision):
    torch.manual_seed(0)
    model = build(variant, 5, woken=True)
    dtype = torch.float64 if precision == "fp64" else torch.float32
    model.to(dtype)
    for size in SMALL_SIZES[:2] if variant == "fcn_resnet101" else SMALL_SIZES:
        model.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            outputs = heads(model(torch.randn(2, 3, *size, dtype=dtype)))
        for logits in outputs.values():
            assert logits.shape == (2, 5, *size)
            assert logits.dtype == (torch.bfloat16 if precision == "bf16" else dtype)
            assert torch.isfinite(logits).all()
        sum(logits.to(dtype).square().mean() for logits in outputs.values()).backward()
        assert all(p.grad.dtype == p.dtype == dtype for p in model.parameters())
        if precision != "fp64" and size == (1, 1):
            # BatchNorm sees two values a channel: where these are close its gradient grows up to 300-fold, in every
            # layer. And PyTorch 2.14's bf16 kernels were seen to leave elements of such small gradients unwritten.
            continue
        assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("name", ["fcn_resnet50", "fcn_resnet101"])
def test_only_training_with_the_auxiliary_head_returns_two_outputs(name):
    images = torch.empty(2, 3, 32, 48, device="meta")
    with torch.device("meta"):  # nothing is computed: types and shapes alone
        two, one = build_model(name, 4), build_model(name, 4, aux=False)
    output = two.train()(images)
    assert isinstance(output, Mapping)
    assert {key: tuple(logits.shape) for key, logits in output.items()} == {
        "out": (2, 4, 32, 48),
        "aux": (2, 4, 32, 48),
    }
    for logits in (two.eval()(images), one.train()(images), one.eval()(images)):
        assert isinstance(logits, torch.Tensor)
        assert logits.shape == (2, 4, 32, 48)


@every_variant
def test_channels_last_computes_the_same_logits(variant):
    model = build(variant, woken=True).double().eval()
    images = torch.randn(2, 3, 33, 47, dtype=torch.float64)
    with torch.no_grad():
        expected = model(images)
        model.to(memory_format=torch.channels_last)
        found = model(images.to(memory_format=torch.channels_last))
    assert expected.std() > 0
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@every_variant
def test_gradients_reach_every_parameter(variant):
    model = build(variant, woken=True).double().train()
    for module in model.modules():
        # With the statistics of the batch the gradient of a bias below it is zero, but for rounding.
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    outputs = heads(model(torch.randn(2, 3, 45, 38, dtype=torch.float64)))
    sum((logits * torch.randn_like(logits)).sum() for logits in outputs.values()).backward()
    unreached = [key for key, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert unreached == []


@pytest.mark.parametrize("variant", [key for key in VARIANTS if not key.endswith(("-same", "-none"))])
def test_the_compiler_traces_the_whole_network_and_computes_the_same(variant):
    """Forward and backward in training, with dropout as in training; a graph break is an error."""
    torch._dynamo.reset()
    eager = build(variant, woken=True).double()
    if variant in ("fcn_resnet50", "fcn_resnet101"):
        for number in (1, 2, 3, 4):  # the first block of a layer has a shortcut, and all others are of one kind
            del eager.backbone[f"layer{number}"][2:]
    convert_dropout(eager).value = torch.tensor([11, 12])
    model = copy.deepcopy(eager)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    images = torch.randn(2, 3, 33, 40, dtype=torch.float64)
    results = []
    for network in (eager, compiled):
        outputs = heads(network(images))
        sum(logits.square().sum() for logits in outputs.values()).backward()
        results.append(outputs)
    expected, found = results
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    gradients = [{key: p.grad for key, p in network.named_parameters()} for network in (eager, model)]
    largest = max(float(gradient.abs().max()) for gradient in gradients[0].values())
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-7, atol=1e-9 * largest)
    torch.testing.assert_close(dict(model.named_buffers()), dict(eager.named_buffers()), rtol=1e-9, atol=1e-9)


# ------------------------------------------------------------------------------------------------------- they learn


def four_images(side: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Each of four quarters is of one class, which its colour tells; a ring of `ignore` around the inner borders.

    Every class is in every image, but in another place, so neither the place nor the share tells it.
    """
    layouts = torch.tensor([[[0, 1], [2, 0]], [[1, 2], [0, 1]], [[2, 0], [1, 2]], [[0, 2], [1, 1]]])
    labels = layouts.repeat_interleave(side // 2, 1).repeat_interleave(side // 2, 2)  # (4, side, side)
    colours = torch.tensor([[1.0, -1.0, 0.0], [-1.0, 0.0, 1.0], [0.0, 1.0, -1.0]])
    images = colours[labels].permute(0, 3, 1, 2) + 0.2 * torch.randn(4, 3, side, side)
    border = slice(side // 2 - side // 16, side // 2 + side // 16)
    labels[:, border] = 255
    labels[:, :, border] = 255
    return images, labels


MOST_STEPS = 200
LEARNING = {  # side of the images and learning rate, where another one learns in fewer steps
    "fcn32s": (64, 2e-3),
    "fcn_resnet18": (64, 1e-3),
    "fcn_resnet50": (64, 3e-4),
    "fcn_resnet101": (32, 3e-4),
}


def miou(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    model.eval()
    with torch.no_grad():
        predictions = model(images).argmax(1)
    model.train()
    matrix = ConfusionMatrix(3)
    matrix.update(labels, predictions)
    return matrix.scores("abc")["miou"]


@pytest.mark.parametrize("variant", [key for key in VARIANTS if not key.endswith("-same")])
def test_it_learns_four_images_by_heart(variant):
    model = build(variant).to(memory_format=torch.channels_last)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.5  # so that evaluation knows the statistics of the last few steps, not of a hundred
    side, lr = LEARNING.get(variant, (64, 3e-3))
    images, labels = four_images(side)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, fused=True)
    assert miou(model, images, labels) < 0.7
    reached = 0.0
    for step in range(1, MOST_STEPS + 1):
        optimizer.zero_grad(set_to_none=True)
        outputs = heads(model(images))
        loss = sum(cross_entropy(logits, labels) for logits in outputs.values()) / (labels != 255).sum()
        loss.backward()
        optimizer.step()
        if step % 2 == 0 and loss < 0.5:  # no use in looking before
            reached = miou(model, images, labels)
            if reached >= 0.9:
                return
    pytest.fail(f"mIoU {reached:.3f} and loss {float(loss.detach()):.3f} after {MOST_STEPS} steps")
