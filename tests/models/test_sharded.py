"""Layers that compute shard by shard: the numbers of PyTorch's own, and the same bits on any number of processes."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from torch import nn
from torchvision.models.segmentation import deeplabv3_resnet50

from fcn import distributed
from fcn.distributed import DistributedContext, Shards
from fcn.errors import InputError
from fcn.models import build_model, convert_dropout, convert_shards, convert_sync_batchnorm, examine_shards
from fcn.models.layers import DoublingConv2d
from tests.dist.ranks import run_ranks

SHARDS, OF_ONE, SIDE = 6, 2, 11


class Doubled(nn.Module):
    """A layer whose forward takes more than a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.up = DoublingConv2d(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.up(x, (2 * SIDE - 1, 2 * SIDE))


class Tied(nn.Module):
    """One layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(self.conv(x).relu())


class Scale(nn.Module):
    """Somebody's own layer with a parameter."""

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(channels, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.gamma.exp()


class PerPixel(nn.Module):
    """nn.Linear on rows of pixels, as transformers have it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(4), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.norm(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)


LAYERS = {
    "convolution": lambda: nn.Conv2d(4, 3, 3),
    "strided, dilated, grouped": lambda: nn.Conv2d(4, 6, 3, stride=2, dilation=2, groups=2, padding=2),
    "depthwise": lambda: nn.Sequential(nn.Conv2d(4, 4, 3, groups=4, bias=False), nn.Conv2d(4, 3, 1)),
    "transposed": lambda: nn.ConvTranspose2d(4, 3, 4, stride=2),
    "transposed, grouped": lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2, bias=False),
    "with a size": Doubled,
    "called twice": Tied,
    "per pixel": PerPixel,
    "group norm": lambda: nn.Sequential(nn.Conv2d(4, 4, 1), nn.GroupNorm(2, 4), nn.PReLU(4)),
    "instance norm": lambda: nn.Sequential(nn.Conv2d(4, 4, 1), nn.InstanceNorm2d(4, affine=True), nn.GELU()),
    "batch norm": lambda: nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4)),
    "batch norm without weights": lambda: nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4, affine=False)),
    "somebody's own": Scale,
    "frozen": lambda: nn.Sequential(nn.Conv2d(4, 4, 1).requires_grad_(False), nn.Conv2d(4, 2, 3)),
    "pooled": lambda: nn.Sequential(nn.Conv2d(4, 4, 3), nn.AvgPool2d(2), nn.Upsample(scale_factor=2, mode="bilinear")),
}


def make(name: str) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """(layer, the samples of all shards, random factors of the output)."""
    torch.manual_seed(0)
    layer = LAYERS[name]()
    inputs = torch.randn(SHARDS * OF_ONE, 4, SIDE, SIDE)
    with torch.no_grad():
        factors = torch.randn(layer(inputs).shape)
        for buffer in layer.buffers():  # which that forward has changed
            buffer.zero_()
    return layer, inputs, factors


def computed(
    context: DistributedContext, name: str, precision: str, channels_last: bool, at_once: int = SHARDS
) -> dict[str, tuple]:
    """What a step gives on this rank: "output", gradients of parameters and input, buffers, as bytes."""
    layer, inputs, factors = make(name)
    layer = convert_sync_batchnorm(layer)
    dtype = torch.float64 if precision == "fp64" else torch.float32
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    layer.to(dtype=dtype, memory_format=memory_format)
    inputs = inputs.to(dtype=dtype, memory_format=memory_format)
    shards = Shards(SHARDS, context.rank, context.size)
    convert_shards(layer, shards)
    network = distributed.data_parallel(layer, context, True, None, shards).train()
    outputs, input_gradients = [], []
    for start in range(shards.block.start, shards.block.stop, at_once):
        now = range(start, min(start + at_once, shards.block.stop))
        mine = slice(now.start * OF_ONE, now.stop * OF_ONE)
        x = inputs[mine].clone(memory_format=torch.preserve_format).requires_grad_()
        last = now.stop == shards.block.stop
        with contextlib.nullcontext() if last else distributed.no_sync(network), shards.computing(now):
            with torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else contextlib.nullcontext():
                output = network(x)
            losses = [(a.to(dtype) * b).sum() for a, b in zip(*map(shards.split, (output, factors[mine].to(dtype))))]
            torch.stack(losses).sum().backward()
        outputs.append(output.detach())
        input_gradients.append(x.grad)
    found = {"output": torch.cat(outputs), "input": torch.cat(input_gradients)}
    found |= {key: parameter.grad for key, parameter in layer.named_parameters() if parameter.requires_grad}
    found |= dict(layer.named_buffers())
    return {key: value.double().contiguous().numpy() for key, value in found.items()}


def joined(ranks: list[dict]) -> dict[str, bytes]:
    """One dict for the run: each rank's own rows one after the other, and what must be equal on all ranks."""
    own = ("output", "input")
    for key in ranks[0].keys() - set(own):
        assert len({rank[key].tobytes() for rank in ranks}) == 1, key
    whole = {key: b"".join(rank[key].tobytes() for rank in ranks) for key in own}
    return whole | {key: value.tobytes() for key, value in ranks[0].items() if key not in own}


ALONE = DistributedContext(0, 1, 0, torch.device("cpu"), "python")


@pytest.mark.parametrize("name", LAYERS)
def test_the_numbers_are_those_of_the_whole_batch(name):
    layer, inputs, factors = make(name)
    layer, inputs = layer.double().train(), inputs.double().requires_grad_()
    output = layer(inputs)
    (output * factors).sum().backward()
    expected = {"output": output.detach(), "input": inputs.grad, **dict(layer.named_buffers())}
    expected |= {key: parameter.grad for key, parameter in layer.named_parameters() if parameter.requires_grad}
    found = computed(ALONE, name, "fp64", False)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(torch.from_numpy(found[key]), value.double(), rtol=1e-11, atol=1e-12)


NETWORKS = {
    "unet": lambda: build_model("unet", 5, width=6),
    "linknet": lambda: build_model("linknet", 5),
    "fcn_resnet18": lambda: build_model("fcn_resnet18", 5),
    "fcn8s": lambda: build_model("fcn8s", 5, width=6),
    "fcn8_kitti": lambda: build_model("fcn8_kitti", 5, width=6),
    "deeplab": lambda: deeplabv3_resnet50(weights=None, weights_backbone=None, num_classes=5, aux_loss=True),
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("size", [(49, 53), (61, 67)])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_whole_networks_of_odd_sizes_and_widths(name, size, layout):
    """Where a shard begins at an address that kernels like less than that of the first one."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    network = NETWORKS[name]().to(memory_format=layout)
    keys = convert_dropout(network)
    convert_sync_batchnorm(network)
    convert_shards(network, Shards(4))
    examine_shards(network, keys, size, 1, contextlib.nullcontext())


def every_layer(context: DistributedContext) -> dict[tuple, dict]:
    torch.use_deterministic_algorithms(True)
    found = {}
    for name in LAYERS:
        for precision, channels_last in (("fp32", True), ("bf16", False)):
            found[name, precision] = computed(context, name, precision, channels_last)
    return found


def test_every_layer_gives_the_same_bits_on_any_number_of_ranks():
    torch.set_num_threads(1)
    alone = every_layer(ALONE)
    torch.use_deterministic_algorithms(False)
    for world_size in (2, 4):
        ranks = run_ranks(world_size, every_layer)
        for case, expected in alone.items():
            assert joined([rank[case] for rank in ranks]) == joined([expected]), (case, world_size)


@pytest.mark.parametrize("name", [name for name in LAYERS if "batch norm" not in name])
def test_the_number_of_passes_changes_no_bit(name):
    expected = joined([computed(ALONE, name, "fp32", True)])
    for at_once in (1, 2, 4):
        assert joined([computed(ALONE, name, "fp32", True, at_once)]) == expected, at_once


@pytest.mark.parametrize("name", LAYERS)
def test_outside_a_step_a_converted_layer_is_the_layer(name):
    layer, inputs, _ = make(name)
    with torch.no_grad():
        expected = layer.eval()(inputs[:3])
        trained = copy.deepcopy(layer).train()(inputs)
        convert_shards(convert_sync_batchnorm(layer), Shards(SHARDS))
        assert torch.equal(layer(inputs[:3]), expected)
        assert torch.equal(layer.train()(inputs), trained)


def test_without_sync_bn_each_shard_has_its_own_statistics_and_the_first_ones_are_kept():
    torch.manual_seed(0)
    inputs = torch.randn(SHARDS * OF_ONE, 4, 5, 5)
    plain = [nn.BatchNorm2d(4) for _ in range(SHARDS)]
    expected = [norm(part) for norm, part in zip(plain, inputs.split(OF_ONE), strict=True)]
    norm, shards = nn.Sequential(nn.BatchNorm2d(4)), Shards(SHARDS)
    convert_shards(norm, shards)
    with shards.computing(shards.block):
        assert torch.equal(norm(inputs), torch.cat(expected))
    assert torch.equal(norm[0].running_mean, plain[0].running_mean)
    assert torch.equal(norm[0].running_var, plain[0].running_var)
    assert norm[0].num_batches_tracked == 1


def test_state_dict_keys_stay():
    layer, _, _ = make("batch norm")
    before = list(layer.state_dict())
    convert_shards(layer, Shards(2))
    assert list(layer.state_dict()) == before


# --- what is refused -----------------------------------------------------------------------------------------------


class Network(nn.Module):
    """A convolution with something before it."""

    def __init__(self, first: nn.Module | None = None) -> None:
        super().__init__()
        self.first, self.conv = first or nn.Identity(), nn.Conv2d(3, 2, 3, padding=1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.conv(self.first(images))


class Centred(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x - x.mean(0)


class CentredInside(Network):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.conv(images - images.mean())


class OwnParameter(Network):
    def __init__(self) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.zeros(3, 1, 1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.conv(images + self.offset)


class Counting(nn.Module):
    """Keeps a mean of what it has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.lerp_(x.detach().mean(), 0.1)
        return x


class Borrowing(Network):
    """Reads a parameter of a layer inside."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.conv(images) * self.conv.weight.sum()


class StoppedFirst(Network):
    """Runs its layer without gradients before it runs it with them."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            weight = self.conv(images).sigmoid()
        return self.conv(images) * weight.round()


class Keyword(Network):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.conv(input=self.first(images))


class FrozenNorm(Network):
    """Keeps its BatchNorm in evaluation mode, as detectors do."""

    def __init__(self) -> None:
        super().__init__(nn.BatchNorm2d(3))

    def train(self, mode: bool = True) -> FrozenNorm:
        super().train(mode)
        self.first.eval()
        return self


class OwnReLU(nn.ReLU):
    """A subclass of a layer that needs no shards, with a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.rand(3, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.slope.exp()


class Noisy(Network):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.conv(images + torch.rand_like(images))


class ChannelsFirst(Network):
    """A layer that gets another dimension first."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(1, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.conv(self.linear(images.transpose(0, 1)[..., None])[..., 0].transpose(0, 1))


class Pair(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x, x


class Unpacked(Network):
    def __init__(self) -> None:
        super().__init__(Pair())

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.conv(self.first(images)[0])


def examined(network: nn.Module, sync_bn: bool = True) -> None:
    keys = convert_dropout(network)
    if sync_bn:
        convert_sync_batchnorm(network)
    convert_shards(network, Shards(4))
    examine_shards(network, keys, (16, 16), 2, contextlib.nullcontext())


@pytest.mark.parametrize(
    ("network", "named"),
    [
        (lambda: CentredInside(), "the network itself (CentredInside) computes different bits"),
        (lambda: nn.Sequential(nn.Conv2d(3, 3, 1), CentredInside()), "1 (CentredInside) computes different bits"),
        (lambda: OwnParameter(), "the parameter offset belongs to the network itself (OwnParameter)"),
        (lambda: nn.Sequential(OwnParameter()), "the parameter 0.offset belongs to 0 (OwnParameter)"),
        (lambda: Network(Counting()), "the buffer first.seen gets different bits"),
        (lambda: Borrowing(), "the parameter conv.weight "),
        (lambda: Noisy(), "computes different bits"),
        (lambda: ChannelsFirst(), "a Linear got a tensor whose first dimension is not that of the batch"),
        (lambda: Unpacked(), "a Pair returns tuple, not a tensor"),
        (lambda: Network(nn.InstanceNorm2d(3, track_running_stats=True)), "the buffer first.running_mean"),
    ],
)
def test_what_mixes_samples_is_refused_by_name(network, named):
    with pytest.raises(InputError, match=r"train\.shards") as refused:
        examined(network())
    assert named in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "network",
    [
        lambda: Network(),
        lambda: Network(Centred()),  # alone in a layer it sees one shard
        lambda: Network(nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Dropout(0.5), nn.GELU())),
        lambda: Network(Scale(3)),
        lambda: StoppedFirst(),
        lambda: Keyword(),
        lambda: FrozenNorm(),
        lambda: Network(OwnReLU()),
    ],
)
@pytest.mark.parametrize("sync_bn", [True, False])
def test_what_treats_each_shard_by_itself_is_accepted(network, sync_bn):
    network = network()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    examined(network, sync_bn)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
