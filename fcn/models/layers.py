"""Layers that networks share: BatchNorm over all processes, dropout keyed by sample, bilinear upsampling."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from fcn import distributed
from fcn.distributed import Shards

if TYPE_CHECKING:
    from torchvision.models import ResNet


class SyncBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d whose training statistics are those of all ranks' batches together, on any backend.

    It has the parameters, buffers and numbers of `nn.BatchNorm2d` on the whole batch, also for unequal and empty parts.
    `nn.SyncBatchNorm` refuses CPU tensors.
    """

    shards: Shards | None = None
    """Where the network computes shard by shard; see `sharded.convert_shards`."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        shards = self.shards if self.shards and self.shards.now else None
        if shards and not self.training:  # its network keeps it so; it does not mix images
            own = [None if p is None else shards.copies(p) for p in (self.weight, self.bias)]
            outputs = []
            for number, part in enumerate(shards.split(images)):
                weight, bias = (None if copies is None else copies[number] for copies in own)
                outputs.append(
                    F.batch_norm(part, self.running_mean, self.running_var, weight, bias, False, 0.0, self.eps)
                )
            return torch.cat(outputs)
        if not (self.training and (shards or distributed.is_active())):
            return super().forward(images)
        momentum = 0.0
        if self.track_running_stats:
            with torch.no_grad():
                self.num_batches_tracked += 1
            momentum = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        return sync_batch_norm(
            images, self.running_mean, self.running_var, self.weight, self.bias, momentum, self.eps, shards
        )


class SingleValueError(ValueError):
    """What PyTorch calls a ValueError in one process, about the values of all ranks together."""


def sync_batch_norm(
    images: torch.Tensor,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    momentum: float,
    eps: float,
    shards: Shards | None = None,
) -> torch.Tensor:
    """`F.batch_norm` in training, of all ranks' batches together; every rank must call it.

    Raises:
        SingleValueError: on every rank, if a channel has a single value, of which there is no variance.
    """
    if weight is None:  # affine=False
        wide = torch.promote_types(images.dtype, torch.float32)
        weight, bias = (torch.full((images.shape[1],), x, dtype=wide, device=images.device) for x in (1, 0))
    parts = shards.copies if shards else lambda parameter: [parameter]
    output, mean, variance, count = _SyncBatchNorm.apply(
        images, torch.stack(parts(weight)), torch.stack(parts(bias)), eps, shards.gather if shards else _gather
    )
    if running_mean is not None and running_var is not None:
        with torch.no_grad():
            unbiased = variance * (count / (count - 1).clamp_min(1))
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_(unbiased.to(running_var.dtype), momentum)
    return output


class SynchronisedSubclass:
    """Before a subclass of BatchNorm2d: what its forward asks of `F.batch_norm` in training is of all ranks' batches.

    With shards it is not: `sharded.ShardBatchNorm` computes each of them by itself.
    """

    calls: int | None = None
    """Of `F.batch_norm` in the first training pass. Unless there is one, ranks could call it at different times."""

    def forward(self, *inputs: Any, **options: Any) -> Any:
        counted = self.calls is not None and not distributed.is_active()
        if counted or not self.training or "shards" in self.__dict__:  # type: ignore[attr-defined]
            return super().forward(*inputs, **options)  # type: ignore[misc]
        intercepted = _SyncedCalls()
        with intercepted:  # the compiler of PyTorch 2.11 loses what `as` would name
            output = super().forward(*inputs, **options)  # type: ignore[misc]
        if self.calls is None:
            self.calls = intercepted.count
        return output

    def restore(self) -> None:
        """Become the subclass itself again."""
        self.__class__ = type(self).__bases__[1]  # type: ignore[assignment]


class _SyncedCalls(TorchFunctionMode):
    count = 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is F.batch_norm:
            call = inspect.signature(F.batch_norm).bind(*args, **kwargs)
            call.apply_defaults()
            images, mean, variance, weight, bias, training, momentum, eps = call.arguments.values()
            self.count += training
            if training and distributed.is_active():
                if self.count > 1:  # other ranks may have fewer calls, and would wait
                    raise RuntimeError(
                        "a subclass of BatchNorm2d calls F.batch_norm more than once; set train.sync_bn=false"
                    )
                return sync_batch_norm(images, mean, variance, weight, bias, momentum, eps)
        return function(*args, **kwargs)


@functools.cache
def _synchronised(cls: type[nn.BatchNorm2d]) -> type[nn.BatchNorm2d]:
    return type(cls.__name__, (SynchronisedSubclass, cls), {"__module__": cls.__module__})


def _gather(mine: torch.Tensor) -> torch.Tensor:
    """The one part (1, *shape) of each rank → (ranks, *shape)."""
    return distributed.all_gather(mine[0])


class _SyncBatchNorm(torch.autograd.Function):
    """Ioffe and Szegedy 2015, forward and backward, with every sum taken over the parts of the global batch.

    Statistics travel in float64, so that the split of the batch changes only the last bits.

    Args:
        x: (N, C, H, W), the parts of this rank.
        weight, bias: (parts of this rank, C); the rows are equal, and each part gets its own gradient.
        gather: a row for each part of this rank → the rows of all ranks' parts.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        eps: float,
        gather: Callable[[torch.Tensor], torch.Tensor],
    ) -> tuple[torch.Tensor, ...]:
        parts, weight, bias = len(weight), weight[0], bias[0]
        local = x.numel() // x.shape[1] // parts
        if local:
            # One fused pass over each part: its mean and (biased) variance of each channel.
            found = [
                torch.stack(torch.batch_norm_update_stats(distributed.aligned(part), None, None, 0.0))
                for part in x.chunk(parts)
            ]
            mine = torch.stack(found).double()
        else:
            mine = torch.zeros(1, 2, x.shape[1], dtype=torch.float64, device=x.device)
        everywhere = gather(torch.cat([mine, torch.full_like(mine[:, :1], local)], dim=1))  # (parts of all, 3, C)
        means, variances, counts = everywhere.unbind(1)
        count = counts[:, 0].sum()
        if local <= 1 and count <= 1:  # so no rank has more, and every rank raises
            raise SingleValueError(f"Expected more than 1 value per channel, got input size {list(x.shape)}")
        mean = (means * counts).sum(0) / count
        # Chan, Golub, LeVeque 1979: no difference of large numbers, so the parts' rounding stays the only one.
        variance = ((variances + (means - mean).square()) * counts).sum(0) / count
        dtype = torch.promote_types(x.dtype, weight.dtype)
        wide_mean, wide_variance = mean.to(dtype), variance.to(dtype)
        output = (
            F.batch_norm(x, wide_mean, wide_variance, weight, bias, False, 0.0, eps) if local else torch.empty_like(x)
        )
        ctx.save_for_backward(x, weight, wide_mean, wide_variance, count)
        ctx.parts, ctx.eps, ctx.gather = parts, eps, gather
        ctx.mark_non_differentiable(mean, variance, count)
        return output, mean, variance, count

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, *_: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, mean, variance, count = ctx.saved_tensors
        invstd = torch.rsqrt(variance + ctx.eps)
        if x.numel():  # of each part: Σ g·x̂ and Σ g, with x̂ = (x − mean)/σ
            found = [
                torch.ops.aten.native_batch_norm_backward(
                    distributed.aligned(grad_part),
                    distributed.aligned(part),
                    weight,
                    mean,
                    variance,
                    None,
                    None,
                    False,
                    ctx.eps,
                    [False, True, True],
                )[1:]
                for grad_part, part in zip(grad.chunk(ctx.parts), x.chunk(ctx.parts), strict=True)
            ]
            grad_weight, grad_bias = (torch.stack(column) for column in zip(*found, strict=True))
        else:
            grad_weight = grad_bias = torch.zeros_like(weight)[None]
        sums = ctx.gather(torch.cat([grad_weight.double(), grad_bias.double()], dim=1)).sum(0)
        total_weight, total_bias = (sums / count).to(weight.dtype).chunk(2)
        # dx = w/σ · (g − Σg/n − x̂·Σgx̂/n) = scale·g + slope·x + offset: two passes over the pixels, in the wider type
        scale = weight * invstd
        slope = -scale * invstd * total_weight
        offset = -scale * total_bias - slope * mean
        scale, slope, offset = (channel[:, None, None] for channel in (scale, slope, offset))
        grad_input = torch.addcmul(offset, x, slope).addcmul_(grad, scale)
        return grad_input.to(grad.dtype), grad_weight, grad_bias, None, None


def convert_sync_batchnorm(model: nn.Module) -> nn.Module:
    """Turn every BatchNorm2d and SyncBatchNorm into a SyncBatchNorm2d, in place; the state_dict keys stay the same.

    On GPUs, too, because `nn.SyncBatchNorm` waits for the device in every layer and step. A subclass of BatchNorm2d
    (timm has one with an activation) keeps its own forward.
    """
    for module in model.modules():
        if type(module) in (nn.BatchNorm2d, nn.SyncBatchNorm):
            module.__class__ = SyncBatchNorm2d
        elif isinstance(module, nn.BatchNorm2d) and not isinstance(module, SyncBatchNorm2d | SynchronisedSubclass):
            module.__class__ = _synchronised(type(module))
    return model


def init_he(model: nn.Module) -> None:
    """He et al. 2015: normal weights with variance 2 / fan-in for layers followed by ReLU, zero biases."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        elif isinstance(module, nn.ConvTranspose2d):
            # Each output pixel of a strided transposed convolution sees kernel area / stride area of the weights, and
            # PyTorch counts the output channels as fan-in there.
            area = module.kernel_size[0] * module.kernel_size[1] / (module.stride[0] * module.stride[1])
            nn.init.normal_(module.weight, std=(2 / (module.in_channels * max(1.0, area))) ** 0.5)
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d) and module.bias is not None:
            nn.init.zeros_(module.bias)


class SampleKeys:
    """The keys of the samples in the current forward pass, (N,) int64 from 0 to 2³¹ - 1, or None for no keys.

    All dropout layers of a network share one object, and the training step sets it before each forward pass.
    """

    def __init__(self) -> None:
        self.value: torch.Tensor | None = None


class KeyedDropout(nn.Dropout):
    """Dropout (Srivastava et al. 2014) whose mask is a pure function of (sample key, layer, element).

    So it depends neither on the number of processes nor on the micro-batches, and a resumed run draws the same masks.
    Without keys, or if the first dimension is not that of the samples, it is `nn.Dropout`. A layer that is called twice
    in a forward pass draws the same mask twice.
    """

    keys: SampleKeys
    layer: int

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _keyed_dropout(self, x, x.shape[1:], super().forward)


class KeyedDropout2d(nn.Dropout2d):
    """Dropout of whole channels (Tompson et al. 2015), otherwise like `KeyedDropout`."""

    keys: SampleKeys
    layer: int

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _keyed_dropout(self, x, (x.shape[1], *(1 for _ in x.shape[2:])), super().forward)


def _keyed_dropout(
    layer: KeyedDropout | KeyedDropout2d, x: torch.Tensor, mask_shape: Any, unkeyed: Any
) -> torch.Tensor:
    keys = layer.keys.value
    if not layer.training or keys is None or x.ndim < 2 or len(keys) != len(x):
        return unkeyed(x)
    if layer.p == 1:
        return x * 0
    count = 1
    for size in mask_shape:
        count *= size
    elements = _scramble(torch.arange(count, device=x.device) ^ _scramble(layer.layer + 1))
    draws = _scramble(elements ^ keys[:, None])  # (N, count), uniform in 0 … 2³¹ - 1
    kept = (draws >= round(layer.p * _DRAWS)).reshape(len(x), *mask_shape)
    return x * kept.to(x.dtype) / (1 - layer.p)


_DRAWS = 1 << 31


def _scramble(numbers: Any) -> Any:
    """Hash integers to 31 bits, with the shifts and factors of C. Wellons' "lowbias32".

    In 31 bits no product overflows int64, so CPU and GPU give the same bits.
    """
    mask = _DRAWS - 1
    numbers = numbers & mask
    numbers = (numbers ^ (numbers >> 16)) * 0x7FEB352D & mask
    numbers = (numbers ^ (numbers >> 15)) * 0x846CA68B & mask
    return numbers ^ (numbers >> 16)


def convert_dropout(model: nn.Module) -> SampleKeys:
    """Turn every Dropout and Dropout2d into a keyed one, in place; returns the object that holds their keys."""
    keys = SampleKeys()
    kinds = {nn.Dropout: KeyedDropout, nn.Dropout2d: KeyedDropout2d}
    for number, module in enumerate(m for m in model.modules() if type(m) in kinds):
        module.__class__ = kinds[type(module)]
        module.keys, module.layer = keys, number
    return keys


def bilinear_upsampling(channels: int, factor: int, padding: int = 0) -> nn.ConvTranspose2d:
    """A trainable transposed convolution, initialised as bilinear interpolation of each channel, without bias.

    Kernel 2·factor, stride `factor` (Long, Shelhamer, Darrell 2015, section 3.3). With padding factor / 2 the output is
    `factor` times as large, and away from the border equals `F.interpolate(mode="bilinear", align_corners=False)`.
    """
    layer = nn.ConvTranspose2d(channels, channels, 2 * factor, stride=factor, padding=padding, bias=False)
    with torch.no_grad():
        # Distance of each kernel element from the kernel's centre, in units of the input's pixels.
        distance = (torch.arange(2 * factor, dtype=torch.float64) - (factor - 0.5)).abs() / factor
        ramp = 1 - distance
        layer.weight.zero_()
        diagonal = torch.arange(channels)
        layer.weight[diagonal, diagonal] = (ramp[:, None] * ramp).to(layer.weight.dtype)
    return layer


class HalvingMaxPool(nn.Module):
    """Maximum over 2×2 pixels, (N, C, H, W) → (N, C, ⌈H/2⌉, ⌈W/2⌉): the last row and column of odd sizes are kept."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_exporting():
            # A symbolic size does not prove by itself that the last window begins inside.
            for side in x.shape[-2:]:
                torch._check(2 * ((side - 1) // 2) < side)
        return F.max_pool2d(x, 2, ceil_mode=True)


def crop(x: torch.Tensor, size: Sequence[int], offset: int = 0) -> torch.Tensor:
    """The window of x (N, C, h, w) of height and width `size` that starts at row and column `offset`."""
    if not torch.compiler.is_compiling() and tuple(x.shape[-2:]) == tuple(size):
        return x  # the backward pass of a window fills a tensor of the whole size
    return x.narrow(-2, offset, size[0]).narrow(-1, offset, size[1])


class DoublingConv2d(nn.ConvTranspose2d):
    """A 3×3 transposed convolution of stride 2, which restores sizes that were halved and rounded up."""

    constant_padding = False
    """Compute the larger of both sizes and crop it, for export formats whose layers have no variable size. The numbers
    are the same except for rounding."""

    def __init__(self, before: int, after: int, bias: bool = True) -> None:
        super().__init__(before, after, 3, stride=2, padding=1, bias=bias)

    def forward(self, x: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
        """x (N, before, ⌈H/2⌉, ⌈W/2⌉) → (N, after, H, W), for size (H, W)."""
        if not torch.compiler.is_exporting():
            return super().forward(x, size)
        extra = [1, 1]
        if not self.constant_padding:
            # `forward` branches on it, which a symbolic size cannot decide.
            extra = [wanted - (2 * side - 1) for wanted, side in zip(size, x.shape[-2:], strict=True)]
            for padding in extra:
                torch._check(padding >= 0)
                torch._check(padding < 2)
        return crop(F.conv_transpose2d(x, self.weight, self.bias, 2, 1, extra), size)


class ResNetTrunk(nn.Module):
    """The convolutional part of a torchvision ResNet under torchvision's names: all but `avgpool` and `fc`."""

    def __init__(self, resnet: ResNet) -> None:
        super().__init__()
        for name in ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4"):
            setattr(self, name, getattr(resnet, name))

    @classmethod
    def of(cls, name: str) -> ResNetTrunk:
        """The trunk of torchvision's ResNet of this name, with fresh weights."""
        from torchvision import models  # here, because other networks do not need it, and it takes as long as PyTorch

        return cls(getattr(models, name)(weights=None))

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        """images (N, 3, H, W) → [stem, layer1, …, layer4], at 1/4, 1/4, 1/8, 1/16 and 1/32 of the size, rounded up."""
        features = [self.maxpool(self.relu(self.bn1(self.conv1(images))))]
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            features.append(layer(features[-1]))
        return features
