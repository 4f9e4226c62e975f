import inspect

import pytest
import torch
from torch import nn

from fcn.config import MODEL_OPTIONS
from fcn.models import MODELS, build_model
from fcn.models.layers import SyncBatchNorm2d, convert_sync_batchnorm

SMALL = [
    pytest.param("unet", {"width": 4}, id="unet"),
    pytest.param("unet", {"width": 4, "norm": "none"}, id="unet-none"),
    pytest.param("linknet", {}, id="linknet"),
]


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", [(1, 1), (31, 57), (97, 33), (64, 64)], ids=str)
@pytest.mark.parametrize(("name", "options"), SMALL)
def test_logits_have_the_size_and_type_of_the_images(name, options, size, dtype):
    model = build_model(name, 5, **options).to(dtype).eval()
    with torch.no_grad():
        logits = model(torch.randn(2, 3, *size, dtype=dtype))
    assert logits.shape == (2, 5, *size)
    assert logits.dtype == dtype
    assert torch.isfinite(logits).all()


def test_unet_of_the_paper_has_34_513_410_parameters():
    layers = [  # 3×3 convolution: 9·in·out weights and out biases
        9 * 3 * 64 + 64, 9 * 64 * 64 + 64,
        9 * 64 * 128 + 128, 9 * 128 * 128 + 128,
        9 * 128 * 256 + 256, 9 * 256 * 256 + 256,
        9 * 256 * 512 + 512, 9 * 512 * 512 + 512,
        9 * 512 * 1024 + 1024, 9 * 1024 * 1024 + 1024,
        9 * 1024 * 512 + 512, 9 * 1024 * 512 + 512, 9 * 512 * 512 + 512,  # up, merge twice
        9 * 512 * 256 + 256, 9 * 512 * 256 + 256, 9 * 256 * 256 + 256,
        9 * 256 * 128 + 128, 9 * 256 * 128 + 128, 9 * 128 * 128 + 128,
        9 * 128 * 64 + 64, 9 * 128 * 64 + 64, 9 * 64 * 64 + 64,
        64 * 2 + 2,
    ]  # fmt: skip
    assert sum(layers) == 34_513_410
    assert parameters(build_model("unet", 2, width=64, norm="none")) == 34_513_410


def test_linknet_has_the_parameters_of_resnet18_and_the_papers_decoders():
    def conv(before: int, after: int, kernel: int) -> int:
        return before * after * kernel * kernel

    def norm(channels: int) -> int:
        return 2 * channels

    classes = 11
    expected = conv(3, 64, 7) + norm(64)
    expected += 4 * (conv(64, 64, 3) + norm(64))
    for before, after in ((64, 128), (128, 256), (256, 512)):
        expected += conv(before, after, 3) + 3 * conv(after, after, 3) + 4 * norm(after)
        expected += conv(before, after, 1) + norm(after)  # the shortcut of the first block
    for before, after in ((512, 256), (256, 128), (128, 64), (64, 64)):
        middle = before // 4
        expected += conv(before, middle, 1) + conv(middle, middle, 3) + conv(middle, after, 1)
        expected += 2 * norm(middle) + norm(after)
    expected += conv(64, 32, 3) + norm(32) + conv(32, 32, 3) + norm(32) + conv(32, classes, 2) + classes
    assert parameters(build_model("linknet", classes)) == expected


def test_an_unknown_name_is_refused_and_the_known_ones_are_named():
    with pytest.raises(ValueError, match=r"'segnet'.*unet.*linknet"):
        build_model("segnet", 3)


def test_an_unknown_norm_is_refused():
    with pytest.raises(ValueError, match="group"):
        build_model("unet", 3, width=2, norm="group")


@pytest.mark.parametrize("name", MODELS)
def test_the_config_knows_exactly_the_options_of_each_network(name):
    assert tuple(inspect.signature(MODELS[name]).parameters) == ("num_classes", *MODEL_OPTIONS[name])


@pytest.mark.parametrize(("name", "options"), SMALL)
def test_weights_depend_on_the_seed_alone(name, options):
    def build(seed: int) -> list[torch.Tensor]:
        torch.manual_seed(seed)
        return list(build_model(name, 3, **options).parameters())

    first, again, other = build(1), build(1), build(2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])


@pytest.mark.parametrize(("name", "options"), SMALL)
def test_channels_last_computes_the_same_logits(name, options):
    torch.manual_seed(0)
    model = build_model(name, 3, **options).double().eval()
    images = torch.randn(2, 3, 33, 47, dtype=torch.float64)
    with torch.no_grad():
        expected = model(images)
        model.to(memory_format=torch.channels_last)
        found = model(images.to(memory_format=torch.channels_last))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("name", "options"), SMALL)
def test_gradients_reach_every_parameter(name, options):
    torch.manual_seed(0)
    model = build_model(name, 3, **options).double()
    logits = model(torch.randn(2, 3, 45, 38, dtype=torch.float64))
    (logits * torch.randn_like(logits)).sum().backward()
    unreached = [key for key, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert unreached == []


@pytest.mark.parametrize(("name", "options"), SMALL)
def test_forward_and_backward_pass_under_bf16_autocast(name, options):
    model = build_model(name, 3, **options)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(torch.randn(2, 3, 33, 32))
    assert logits.dtype == torch.bfloat16
    assert logits.shape == (2, 3, 33, 32)
    logits.float().square().sum().backward()
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters())
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize(("name", "options"), SMALL)
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
