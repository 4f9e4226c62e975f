"""One training step: forward, backward, update."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch import nn

from fcn import distributed, seeding
from fcn.data import Batch, LabelCounts, TrainingBatch
from fcn.errors import InputError
from fcn.models import SingleValueError, SyncBatchNorm2d, SynchronisedSubclass
from fcn.training.nonfinite import BufferSnapshot
from fcn.training.optim import set_learning_rate
from fcn.training.state import TrainingState


class StepResult(NamedTuple):
    """On the device, so that the host waits only when it needs a value."""

    losses: torch.Tensor
    """(parts,): what each of this rank's shards, or all its images as one part, adds to `TrainingState.step_loss`."""
    grad_norm: torch.Tensor
    """Norm of the global gradient before clipping."""


def train_step(state: TrainingState, batch: TrainingBatch) -> StepResult:
    """Train on this rank's part of a global batch, without waiting for the device.

    The gradient is that of the loss of the global batch: each micro-batch's loss is a sum over its own pixels or images
    divided by what the global batch holds of them, and `distributed.data_parallel` adds the ranks' gradients.
    """
    if state.learning_rate:
        set_learning_rate(state.optimizer, state.learning_rate(state.step))
    snapshot = BufferSnapshot(state.model) if state.nonfinite else None
    state.optimizer.zero_grad(set_to_none=True)
    losses = _accumulate_gradients(state, batch)
    state.context.comm_timer.backward_ended(losses)
    state.scaler.unscale_(state.optimizer)
    grad_norm = _gradient_norm(state)
    if state.grad_clip:
        nn.utils.clip_grads_with_norm_(state.model.parameters(), state.grad_clip, grad_norm)
    if state.nonfinite:
        finite = grad_norm.isfinite() & state.nonfinite.gate.isfinite()
        if not state.scaler.is_enabled():  # the fused optimizers skip the update on the device, as for the scaler
            state.optimizer.grad_scale, state.optimizer.found_inf = None, (~finite).float()
        snapshot.restore_unless(finite)
        state.nonfinite.record(finite, state.step)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    if state.ema:
        state.ema.update(state.step)
    return StepResult(losses, grad_norm)


def _accumulate_gradients(state: TrainingState, batch: TrainingBatch) -> torch.Tensor:
    """Forward and backward, one micro-batch after the other; returns this rank's losses."""
    found = []
    for micro, last, shards in _passes(state, batch.local):
        if shards or not found:
            # A network that draws its own random numbers draws the same ones in a resumed run, and for all shards.
            rank = 0 if shards or state.skips else state.context.rank
            seeding.seed_generators(seeding.derive(state.seed, "forward", state.step, rank))
        images, labels, sizes, _, keys, _ = micro
        if state.sample_keys is not None:
            state.sample_keys.value = keys
        with (
            nullcontext() if last else distributed.no_sync(state.network),
            state.shards.computing(shards) if state.shards else nullcontext(),
        ):
            memory = saved_on_host() if state.offload else nullcontext()
            with _naming_single_values(state.equal_parts), state.precision.autocast(), memory:
                outputs = state.network(state.precision.to_input(images, sizes if batch.padded else None))
                if not isinstance(outputs, Mapping):
                    outputs = {"out": outputs}
                losses = _losses(state, outputs["out"], labels, batch.label_counts)
                if "aux" in outputs:
                    losses = losses + state.aux_weight * _losses(state, outputs["aux"], labels, batch.label_counts)
            found.append(losses.detach())
            if state.nonfinite:
                # 1 + 0·loss is 1, but NaN if the loss is not finite, and then so is every rank's summed gradient.
                losses = losses * (state.nonfinite.gate * (1 + 0 * losses.detach()))
            state.scaler.scale(losses.sum()).backward()
    return torch.cat(found) if state.shards else torch.cat(found).sum()[None]


@contextmanager
def _naming_single_values(equal_parts: bool) -> Iterator[None]:
    """Say what to do when BatchNorm, PyTorch's or ours, gets one value, if it does so on all ranks."""
    try:
        yield
    except ValueError as error:
        everywhere = equal_parts or isinstance(error, SingleValueError)
        if "more than 1 value per channel" not in str(error) or not everywhere:
            raise
        raise InputError(
            f"train.batch_size: a BatchNorm layer gets a single value of each channel, without a variance ({error}); "
            f"use a larger batch_size or data.crop, or put that layer into evaluation mode in a network of your own"
        ) from None


def _passes(state: TrainingState, local: Batch) -> Iterator[tuple[Batch, bool, range | None]]:
    """This rank's batch as (micro-batch, whether it is the last one, its shards)."""
    images = len(local.images)  # 0 on a rank beyond the batch size
    at_once = state.micro_batch or images or 1
    if not state.shards:
        parts = max(1, math.ceil(images / at_once))
        micros = zip(*(tensor.chunk(parts) for tensor in local), strict=True)
        yield from ((Batch(*micro), part == parts, None) for part, micro in enumerate(micros, start=1))
        return
    block = state.shards.block
    size = images // len(block)
    for shards in (block[first : first + at_once // size] for first in range(0, len(block), at_once // size)):
        mine = slice((shards.start - block.start) * size, (shards.stop - block.start) * size)
        yield Batch(*(tensor[mine] for tensor in local)), shards.stop == block.stop, shards


def _losses(state: TrainingState, logits: torch.Tensor, labels: torch.Tensor, counts: LabelCounts) -> torch.Tensor:
    """(parts,): what each shard, or all images as one part, adds to the loss."""
    parts = zip(*map(state.shards.split, (logits, labels)), strict=True) if state.shards else [(logits, labels)]
    return torch.stack([state.criterion(part, mask.long(), counts) for part, mask in parts])


def _gradient_norm(state: TrainingState) -> torch.Tensor:
    gradients = [p.grad for p in state.model.parameters() if p.grad is not None]
    if state.shards:  # inside a bucket of gradients, addresses are those of no other number of processes
        gradients = list(map(distributed.aligned, gradients))
    return nn.utils.get_total_norm(gradients)


def saved_on_host() -> AbstractContextManager:
    """Inside, tensors that the backward pass needs wait in host memory.

    Parameters stay on the device, because they need no extra memory, and so do small tensors.
    """

    def pack(tensor: torch.Tensor) -> torch.Tensor | tuple[torch.device, torch.Tensor]:
        own = tensor if tensor._base is None else tensor._base  # a shard's copy is a view of its parameter
        if not tensor.is_cuda or isinstance(own, nn.Parameter) or tensor.numel() < 1 << 14:
            return tensor
        host = torch.empty_like(tensor, device="cpu", pin_memory=True)
        return tensor.device, host.copy_(tensor, non_blocking=True)

    def unpack(packed: torch.Tensor | tuple[torch.device, torch.Tensor]) -> torch.Tensor:
        return packed if isinstance(packed, torch.Tensor) else packed[1].to(packed[0], non_blocking=True)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def accumulation(model: nn.Module, micro_batch: int | None, images: int) -> tuple[int | None, bool]:
    """(images per forward pass, whether to offload) for a rank that holds `images` of a global batch.

    BatchNorm's statistics of the global batch need all of a rank's images at once.
    """
    if micro_batch and any(isinstance(module, SyncBatchNorm2d | SynchronisedSubclass) for module in model.modules()):
        return None, images > micro_batch
    return micro_batch, False
