"""What processes exchange. With one process every function returns immediately."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from fcn.distributed.process_group import comm_timer, is_active
from fcn.errors import InputError

T = TypeVar("T")


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum over all ranks, in place; every rank must call it."""
    if is_active():
        dist.all_reduce(tensor)
    return tensor


def all_gather(tensor: torch.Tensor) -> torch.Tensor:
    """The small tensor of every rank, (world size, *shape), in rank order; every rank must call it.

    One round of messages, where gloo's all-reduce needs several: small tensors wait a quarter to a half less.
    """
    if not is_active():
        return tensor[None]
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    with comm_timer().counting(tensor):
        dist.all_gather(parts, tensor)
    return torch.stack(parts)


def all_reduce_sum_async(tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Start summing a CPU tensor over all ranks, in place; the returned function waits for the result."""
    work = dist.all_reduce(tensor, async_op=True) if is_active() else None

    def wait() -> torch.Tensor:
        if work is not None:
            work.wait()
        return tensor

    return wait


def all_gather_object(value: T) -> list[T]:
    """The `value` of every rank, in rank order, on every rank. For small plain objects, not for a step's data."""
    if not is_active():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast_object(value: T) -> T:
    """Rank 0's `value` on every rank. For plain data of any size."""
    if not is_active():
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0, device=torch.device("cpu"))
    return values[0]


def barrier() -> None:
    if is_active():
        all_gather_object(None)


def run_on_all_ranks(action: Callable[[], T]) -> T:
    """Run `action` on every rank; if it raises InputError on any rank, every rank raises it.

    Otherwise a rank that cannot read a file would leave the others waiting in the next collective.
    """
    result, fault = None, None
    try:
        result = action()
    except InputError as error:
        fault = str(error)
    raise_on_all_ranks(fault)
    return result  # type: ignore[return-value]


def raise_on_all_ranks(fault: str | None) -> None:
    """Raise InputError on every rank if any rank has a fault; names each different fault once, with its ranks if not
    all."""
    faults = all_gather_object(fault)
    ranks: dict[str, list[int]] = {}
    for rank, message in enumerate(faults):
        if message:
            ranks.setdefault(message, []).append(rank)
    if ranks:
        raise InputError(
            "\n".join(
                message if len(where) == len(faults) else f"{message} [rank {', '.join(map(str, where))}]"
                for message, where in ranks.items()
            )
        )


def require_equal(facts: Mapping[str, object] | None, remedy: str) -> None:
    """Raise InputError on every rank if ranks have different facts; it names each fact with its values and where.

    Args:
        facts: title → value, or None on a rank that has nothing to add.
        remedy: what to do about a difference.
    """
    everywhere = all_gather_object((socket.gethostname(), facts))
    titles = dict.fromkeys(title for _, found in everywhere for title in found or ())
    lines = []
    for title in titles:
        places: dict[str, list[str]] = {}
        for rank, (host, found) in enumerate(everywhere):
            if found is not None:
                places.setdefault(repr(found.get(title)), []).append(f"rank {rank} on {host}")
        if len(places) > 1:
            having = "; ".join(
                f"{value} on {', '.join(where[:3])}{f' and {len(where) - 3} more' if len(where) > 3 else ''}"
                for value, where in list(places.items())[:4]
            )
            lines.append(f"{title}: the processes disagree, found {having}; {remedy}")
    if lines:
        raise InputError("\n".join(lines))


def broadcast(tensors: Iterable[torch.Tensor]) -> None:
    """Copy rank 0's values to every rank, in place."""
    if is_active():
        with torch.no_grad():
            for tensor in tensors:
                dense = tensor.contiguous()  # messages have no memory format
                dist.broadcast(dense, src=0)
                tensor.copy_(dense)
