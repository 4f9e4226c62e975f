"""Layers that several networks share, and BatchNorm over all processes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from fcn import distributed


class SyncBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d whose training statistics are those of the union of all ranks' batches, on any backend.

    Same parameters, buffers and numbers as `nn.BatchNorm2d` on the whole batch, for unequal and empty parts too.
    `nn.SyncBatchNorm` refuses CPU tensors; this one needs only a sum over the ranks.
    """

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if not (self.training and distributed.is_active()):
            return super().forward(images)
        output, mean, variance, count = _SyncBatchNorm.apply(images, self.weight, self.bias, self.eps)
        if self.track_running_stats:
            with torch.no_grad():
                self.num_batches_tracked += 1
                momentum = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
                unbiased = variance * (count / (count - 1).clamp_min(1))
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
                self.running_var.lerp_(unbiased.to(self.running_var.dtype), momentum)
        return output


class _SyncBatchNorm(torch.autograd.Function):
    """Ioffe and Szegedy 2015, forward and backward, with every sum taken over all ranks.

    Statistics cross in float64, so that how the batch is shared changes no more than the last bits.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, ...]:
        local = x.numel() // x.shape[1]
        if local:
            # One fused pass: the local mean and (biased) variance of each channel.
            mine = torch.stack(torch.batch_norm_update_stats(x, None, None, 0.0)).double()
        else:
            mine = torch.zeros(2, x.shape[1], dtype=torch.float64, device=x.device)
        parts = distributed.stack_ranks(torch.cat([mine, torch.full_like(mine[:1], local)]))  # (ranks, 3, C)
        means, variances, counts = parts.unbind(1)
        count = counts[:, 0].sum()
        mean = (means * counts).sum(0) / count
        # Chan, Golub, LeVeque 1979: no difference of large numbers, so the ranks' rounding stays the only one.
        variance = ((variances + (means - mean).square()) * counts).sum(0) / count
        dtype = torch.promote_types(x.dtype, weight.dtype)
        wide_mean, wide_variance = mean.to(dtype), variance.to(dtype)
        output = (
            F.batch_norm(x, wide_mean, wide_variance, weight, bias, False, 0.0, eps) if local else torch.empty_like(x)
        )
        ctx.save_for_backward(x, weight, wide_mean, wide_variance, count)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, variance, count)
        return output, mean, variance, count

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, *_: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, mean, variance, count = ctx.saved_tensors
        invstd = torch.rsqrt(variance + ctx.eps)
        if x.numel():
            # The gradient with mean and variance held fixed, and the two sums that correct it: Σ g·x̂ and Σ g.
            grad_input, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
                grad, x, weight, mean, variance, None, None, False, ctx.eps, [True, True, True]
            )
        else:
            grad_input, grad_weight, grad_bias = torch.empty_like(x), torch.zeros_like(weight), torch.zeros_like(weight)
        sums = distributed.stack_ranks(torch.cat([grad_weight.double(), grad_bias.double()])).sum(0)
        total_weight, total_bias = (sums / count).chunk(2)
        # dx = w/σ · (g − Σg/n − x̂·Σgx̂/n) = fixed-statistics gradient + slope·x + offset, with x̂ = (x − mean)/σ
        slope = -(weight * invstd * invstd * total_weight).to(weight.dtype)
        offset = -(weight * invstd * total_bias).to(weight.dtype) - slope * mean
        # Under autocast x has fewer digits than slope and offset: the product is formed in theirs.
        grad_input += (x * slope[:, None, None]).add_(offset[:, None, None])
        return grad_input, grad_weight, grad_bias, None


def convert_sync_batchnorm(model: nn.Module) -> nn.Module:
    """Make every BatchNorm2d one over all processes, in place; the state_dict keys stay the same.

    On GPUs, too: `nn.SyncBatchNorm` waits for the device in every layer and step.
    """
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = SyncBatchNorm2d
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
