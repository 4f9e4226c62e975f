"""BatchNorm over all processes (here: of one), dropout keyed by sample, transposed convolutions that interpolate."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fcn.models import SyncBatchNorm2d, build_model, convert_dropout, convert_sync_batchnorm
from fcn.models.layers import KeyedDropout, KeyedDropout2d, SynchronisedSubclass, bilinear_upsampling

KINDS = [pytest.param(nn.Dropout, id="Dropout"), pytest.param(nn.Dropout2d, id="Dropout2d")]
KEYS = torch.tensor([7, 2**31 - 1, 0, 123_456_789])


def keyed(*layers: nn.Module) -> nn.ModuleList:
    """The layers, converted together; `.keys` takes the samples' keys."""
    network = nn.ModuleList(layers)
    network.keys = convert_dropout(network)
    return network


def masks(layer: nn.Module, keys: torch.Tensor, *shape: int) -> torch.Tensor:
    """What the layer lets through of each sample: (len(keys), *shape) of bool."""
    layer.keys.value = keys
    return layer(torch.ones(len(keys), *shape)) != 0


# ---------------------------------------------------------------------------------------------------- BatchNorm


@pytest.mark.parametrize(("name", "options"), [("unet", {"width": 4}), ("fcn_resnet18", {}), ("linknet", {})])
def test_converting_to_sync_batchnorm_keeps_the_state_dict(name, options):
    model = build_model(name, 3, **options)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    after = convert_sync_batchnorm(model).state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_every_batchnorm_is_converted():
    converted = convert_sync_batchnorm(build_model("linknet", 3))
    kinds = [type(module) for module in converted.modules() if isinstance(module, nn.BatchNorm2d)]
    # ResNet-18: 1 + 4·4 + 3 shortcuts; decoders: 4·3; head: 2
    assert kinds == [SyncBatchNorm2d] * (1 + 16 + 3 + 12 + 2)


def test_only_batchnorm2d_its_subclasses_and_pytorch_s_synchronised_one_are_converted():
    kinds = [nn.BatchNorm1d, nn.BatchNorm3d, nn.InstanceNorm2d]
    converted = convert_sync_batchnorm(nn.ModuleList(kind(2) for kind in kinds))
    assert [type(module) for module in converted] == kinds
    assert type(convert_sync_batchnorm(nn.Sequential(nn.SyncBatchNorm(2)))[0]) is SyncBatchNorm2d

    class Own(nn.BatchNorm2d):
        pass

    own = convert_sync_batchnorm(convert_sync_batchnorm(nn.Sequential(Own(2))))[0]
    assert isinstance(own, Own)
    assert isinstance(own, SynchronisedSubclass)
    assert type(copy.deepcopy(own)) is type(own), "one class, however often it is converted or copied"


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_sync_batchnorm_of_one_process_is_batchnorm_bit_for_bit(training, momentum):
    torch.manual_seed(0)
    plain, sync = nn.BatchNorm2d(4, momentum=momentum), SyncBatchNorm2d(4, momentum=momentum)
    with torch.no_grad():
        plain.weight.uniform_(0.5, 2)
        plain.bias.uniform_(-1, 1)
        plain.running_var.uniform_(0.5, 2)
    sync.load_state_dict(plain.state_dict())
    results = []
    for layer in (plain, sync):
        layer.train(training)
        images = torch.linspace(-3, 5, 3 * 4 * 5 * 7).reshape(3, 4, 5, 7).requires_grad_()
        layer(images).pow(3).sum().backward()
        output = layer(images)
        results.append([output, images.grad, layer.weight.grad, layer.bias.grad, *layer.buffers()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# ------------------------------------------------------------------------------------- keyed dropout: the mask


@pytest.mark.parametrize("kind", KINDS)
def test_a_samples_mask_depends_neither_on_its_place_nor_on_the_batch(kind):
    (layer,) = network = keyed(kind(0.4))
    images = torch.rand(4, 6, 5, 7) + 1
    network.keys.value = KEYS
    run_on_all_ranks = layer(images)
    order = [2, 0, 3, 1]
    network.keys.value = KEYS[order]
    assert torch.equal(layer(images[order]), run_on_all_ranks[order])
    for place in range(4):
        network.keys.value = KEYS[place : place + 1]
        assert torch.equal(layer(images[place : place + 1]), run_on_all_ranks[place : place + 1])


@pytest.mark.parametrize("kind", KINDS)
def test_the_mask_depends_on_neither_type_nor_memory_format_nor_values_nor_the_generator(kind):
    (layer,) = keyed(kind(0.4))
    expected = masks(layer, KEYS, 6, 5, 7)
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        assert torch.equal(layer(torch.ones(4, 6, 5, 7, dtype=dtype)) != 0, expected)
    images = torch.rand(4, 6, 5, 7) + 1
    torch.manual_seed(99)
    output = layer(images)
    assert torch.equal(output != 0, expected)
    strided = layer(images.to(memory_format=torch.channels_last))
    assert torch.equal(strided, output)
    assert strided.is_contiguous(memory_format=torch.channels_last)
    state = torch.get_rng_state()
    layer(images)
    assert torch.equal(torch.get_rng_state(), state)  # nothing else that is drawn depends on how often this is


def test_two_networks_built_alike_draw_alike():
    """A resumed run, and every rank, draws what the first one did."""
    one, other = keyed(nn.Dropout(0.5), nn.Dropout2d(0.5)), keyed(nn.Dropout(0.5), nn.Dropout2d(0.5))
    for a, b in zip(one, other, strict=True):
        assert torch.equal(masks(a, KEYS, 8, 3, 3), masks(b, KEYS, 8, 3, 3))


@pytest.mark.parametrize("kind", KINDS)
def test_other_keys_and_other_layers_draw_other_masks(kind):
    layers = keyed(*(kind(0.5) for _ in range(12)))
    keys = torch.cat([torch.arange(32), 2 ** torch.arange(5, 31), KEYS[1:2]])
    shape = (512, 1, 1)
    drawn = torch.cat([masks(layer, keys, *shape) for layer in layers]).flatten(1)
    assert len(drawn.unique(dim=0)) == 12 * (32 + 26 + 1)


def test_no_two_of_forty_layers_draw_alike():
    layers = keyed(*(nn.Dropout(0.5) for _ in range(40)))
    drawn = torch.stack([masks(layer, KEYS, 1000) for layer in layers]).flatten(1)
    assert len(drawn.unique(dim=0)) == 40


def test_masks_of_samples_and_of_layers_are_uncorrelated():
    layers = keyed(*(nn.Dropout(0.5) for _ in range(4)))
    n = 20_000
    drawn = torch.cat([masks(layer, torch.arange(1000, 1064), n) for layer in layers]).double()  # (4·64, n)
    correlation = torch.corrcoef(drawn).fill_diagonal_(0)
    # Without dependence each of the 32 640 pairs is normal with σ = 1/√n: 6 σ has a chance of 7e-5 over all.
    assert correlation.abs().max() < 6 / math.sqrt(n)
    # Their squares tell a small dependence of many pairs: the mean of n·r² is 1 ± √(2 / pairs).
    pairs = 256 * 255 / 2
    assert abs(float(n * correlation.square().sum() / (2 * pairs)) - 1) < 6 * math.sqrt(2 / pairs)


def test_elements_of_one_mask_are_uncorrelated():
    """Neighbours along a row, a column and the channels, and what one bit of an index apart might share."""
    (layer,) = keyed(nn.Dropout(0.5))
    n = 1 << 16
    drawn = masks(layer, torch.arange(16), n).double() * 2 - 1
    for shift in (1, 2, 3, 32, 64, 256, 4096, 1 << 15):
        products = drawn * drawn.roll(shift, dims=1)
        assert abs(float(products.mean())) < 5 / math.sqrt(products.numel()), shift


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("kind", KINDS)
def test_the_rate_of_drops_is_the_one_asked_for(kind, p):
    (layer,) = keyed(kind(p))
    dropped = ~masks(layer, torch.arange(50) * 7919, 4000, 1)
    n = dropped.numel()
    assert abs(int(dropped.sum()) - p * n) < 5 * math.sqrt(n * p * (1 - p))
    rates = dropped.double().mean(dim=(1, 2))  # of each sample
    assert (rates - p).abs().max() < 5 * math.sqrt(p * (1 - p) / 4000)


@pytest.mark.parametrize("p", [0.25, 0.5, 0.75])  # powers of two, so that the scale is exact
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_kept_and_its_gradient_are_divided_by_the_rate_of_keeping(kind, p):
    (layer,) = network = keyed(kind(p))
    kept = masks(layer, KEYS, 16, 3, 3)
    assert kept.any()
    assert not kept.all()
    images = torch.randn(4, 16, 3, 3, requires_grad=True)
    network.keys.value = KEYS
    output = layer(images)
    output.sum().backward()
    assert torch.allclose(output, torch.where(kept, images / (1 - p), 0.0), rtol=1e-6, atol=0)
    assert torch.allclose(images.grad, torch.where(kept, 1 / (1 - p), 0.0), rtol=1e-6, atol=0)


def test_dropout2d_drops_whole_channels_and_dropout_single_elements():
    channels, elements = keyed(nn.Dropout2d(0.5), nn.Dropout(0.5))
    whole = masks(channels, KEYS, 64, 4, 4).flatten(2)
    assert torch.equal(whole.any(2), whole.all(2))
    assert whole.any()
    assert not whole.all()
    single = masks(elements, KEYS, 64, 4, 4).flatten(2)
    assert not torch.equal(single.any(2), single.all(2))


def test_the_mask_of_a_channel_does_not_depend_on_the_size_of_the_image():
    (layer,) = keyed(nn.Dropout2d(0.5))
    assert torch.equal(masks(layer, KEYS, 64, 4, 4)[..., 0, 0], masks(layer, KEYS, 64, 9, 2)[..., 0, 0])


# ------------------------------------------------------------------------------- keyed dropout: where it is plain


@pytest.mark.parametrize("kind", KINDS)
def test_rate_zero_keeps_every_bit_and_rate_one_nothing(kind):
    none, everything = network = keyed(kind(0.0), kind(1.0))
    images = torch.randn(4, 6, 5, 7, requires_grad=True)
    network.keys.value = KEYS
    assert torch.equal(none(images), images)
    output = everything(images)
    assert not output.any()
    output.sum().backward()
    assert torch.isfinite(images.grad).all()
    assert not images.grad.any()


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_is_the_identity(kind):
    (layer,) = network = keyed(kind(0.5)).eval()
    images = torch.randn(4, 6, 5, 7)
    for keys in (None, KEYS):
        network.keys.value = keys
        assert torch.equal(layer(images), images)


@pytest.mark.parametrize("keys", [None, KEYS[:3], KEYS[:1]], ids=["none", "fewer", "one"])
@pytest.mark.parametrize("kind", KINDS)
def test_without_a_key_for_each_sample_it_is_the_plain_layer(kind, keys):
    (layer,) = network = keyed(kind(0.5))
    network.keys.value = keys
    images = torch.randn(4, 6, 5, 7)
    torch.manual_seed(3)
    expected = kind(0.5)(images)
    torch.manual_seed(3)
    assert torch.equal(layer(images), expected)


# ------------------------------------------------------------------------------------------------ convert_dropout


def test_converting_takes_dropout_and_dropout2d_once_each_and_nothing_else():
    class Own(nn.Dropout):
        pass

    shared = nn.Dropout(0.3)
    others = [nn.Dropout3d(), nn.AlphaDropout(), nn.Dropout1d(), Own(), nn.ReLU()]
    kinds = [type(module) for module in others]
    network = nn.Sequential(shared, nn.Sequential(nn.Dropout2d(0.7), shared, nn.Dropout()), *others)
    keys = convert_dropout(network)
    converted = [network[0], network[1][0], network[1][2]]
    assert [type(layer) for layer in converted] == [KeyedDropout, KeyedDropout2d, KeyedDropout]
    assert [layer.p for layer in converted] == [0.3, 0.7, 0.5]
    assert network[1][1] is network[0]
    assert len({layer.layer for layer in converted}) == 3
    assert all(layer.keys is keys for layer in converted)
    assert keys.value is None
    assert [type(module) for module in others] == kinds


@pytest.mark.parametrize(
    ("name", "options", "kind", "count"),
    [
        ("fcn8s", {"width": 2}, KeyedDropout2d, 2),
        ("fcn8_kitti", {"width": 2}, KeyedDropout, 2),
        ("fcn_resnet50", {}, KeyedDropout, 2),
        ("fcn_resnet50", {"aux": False}, KeyedDropout, 1),
    ],
)
def test_the_networks_dropout_is_converted(name, options, kind, count):
    with torch.device("meta"):
        network = build_model(name, 3, **options)
    convert_dropout(network)
    found = [type(module) for module in network.modules() if "Dropout" in type(module).__name__]
    assert found == [kind] * count


def test_converting_keeps_the_state_dict_and_what_evaluation_computes():
    network = build_model("fcn8s", 3, width=2).eval()
    before, images = copy.deepcopy(network.state_dict()), torch.rand(1, 3, 20, 20)
    expected = network(images)
    convert_dropout(network)
    assert list(network.state_dict()) == list(before)
    assert torch.equal(network(images), expected)


def test_a_copy_shares_keys_with_itself_and_not_with_the_original():
    network = keyed(nn.Dropout(0.5), nn.Dropout2d(0.5))
    twin = copy.deepcopy(network)
    twin.keys.value = KEYS
    assert all(layer.keys is twin.keys for layer in twin)
    assert network.keys.value is None
    assert all(layer.keys is network.keys for layer in network)


# ------------------------------------------------------------------------------------- bilinear transposed convolution


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("factor", [2, 8, 16, 32])
def test_a_fresh_transposed_convolution_is_bilinear_interpolation(factor, padded):
    """Each channel for itself, and away from the border: beyond it a convolution sees zeros, interpolation the edge."""
    torch.manual_seed(0)
    layer = bilinear_upsampling(3, factor, padding=factor // 2 if padded else 0)
    images = torch.randn(2, 3, 5, 4)
    output = layer(images)
    if not padded:  # the whole of what the kernels reach: half a factor more on each side
        assert output.shape == (2, 3, 6 * factor, 5 * factor)
        output = output[..., factor // 2 : -(factor // 2), factor // 2 : -(factor // 2)]
    expected = F.interpolate(images, scale_factor=factor, mode="bilinear", align_corners=False)
    assert output.shape == expected.shape
    inner = slice(factor // 2, -(factor // 2))
    torch.testing.assert_close(output[..., inner, inner], expected[..., inner, inner], rtol=0, atol=1e-6)
    assert layer.bias is None
    assert layer.weight.requires_grad
