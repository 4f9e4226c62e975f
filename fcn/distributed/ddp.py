"""DistributedDataParallel that adds the ranks' gradients instead of averaging them."""

from __future__ import annotations

import contextlib
import inspect
import queue
import threading
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fcn.distributed.process_group import DistributedContext, before_stop, is_active, new_gloo_group, uses_nccl
from fcn.distributed.shards import Shards, TreeSum, subtrees
from fcn.distributed.stragglers import CommTimer


def data_parallel(
    model: nn.Module,
    context: DistributedContext,
    sync_bn: bool,
    comm_dtype: torch.dtype | None = None,
    shards: Shards | None = None,
    *,
    find_unused: bool = False,
) -> nn.Module:
    """Wrap the model in DistributedDataParallel that adds the ranks' gradients; with one process, return it unchanged.

    Gradients travel in `comm_dtype`, or by default in their own type. With `shards` they are added along their tree.
    With `find_unused` a step need not reach every parameter.

    The default of DistributedDataParallel is to average. A loss multiplied by the world size would compensate for that,
    but would leave the range of half precision at different values on different numbers of processes.
    """
    if not is_active():
        return model
    # Synchronised statistics are already equal on all ranks; per-rank ones would drift apart without the broadcast.
    known = inspect.signature(DistributedDataParallel).parameters
    sync_buffers = (
        "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    )  # renamed in PyTorch 2.14
    devices = [context.device.index] if context.device.type == "cuda" else None
    parallel = DistributedDataParallel(
        model,
        device_ids=devices,
        gradient_as_bucket_view=True,
        find_unused_parameters=find_unused,
        **{sync_buffers: not sync_bn},
    )
    if shards:
        parallel.register_comm_hook(_TreeExchange(shards, context), _sum_along_the_tree)
    else:
        parallel.register_comm_hook(_Exchange(comm_dtype, context.comm_timer), _sum_gradients)
    return parallel


class _Exchange(NamedTuple):
    """The state of the communication hook."""

    comm_dtype: torch.dtype | None
    comm_timer: CommTimer


def _sum_gradients(exchange, bucket):  # no annotations: DistributedDataParallel refuses string annotations
    gradient, comm_dtype = bucket.buffer(), exchange.comm_dtype
    exchange.comm_timer.gradients_are_ready(gradient)
    sent = gradient if comm_dtype is None else gradient.to(comm_dtype)
    future = dist.all_reduce(sent, async_op=True).get_future()
    return future.then(lambda done: done.value()[0] if comm_dtype is None else gradient.copy_(done.value()[0]))


class _TreeExchange:
    """Adds the gradients of all shards along their tree: all to all, the tree on a piece, a broadcast of each piece.

    Each rank adds one piece of a bucket, for which it gets the sums of every rank's subtrees, and sends the result to
    all. With one subtree a rank that is what a ring's all-reduce sends: 2(W - 1)/W of the bucket.

    The exchange runs beside the backward pass: under NCCL in a stream, otherwise in a thread, with a process group of
    its own, because the order of collectives in a group must be the same on all ranks.
    """

    def __init__(self, shards: Shards, context: DistributedContext) -> None:
        self.shards, self.comm_timer, self.device = shards, context.comm_timer, context.device
        self.rank, self.size = context.rank, context.size
        self.subtrees = [subtrees(block, shards.count) for block in shards.blocks]
        self.stream = torch.cuda.Stream(context.device) if uses_nccl() else None
        self.group = None if uses_nccl() else new_gloo_group()
        if self.group:
            self._waiting: queue.SimpleQueue = queue.SimpleQueue()
            thread = threading.Thread(target=self._work, name="exchange of gradients", daemon=True)
            thread.start()
            before_stop(lambda: (self._waiting.put(None), thread.join(5)))

    def start(self, bucket: dist.GradBucket) -> torch.futures.Future:
        buffer = bucket.buffer()
        self.comm_timer.gradients_are_ready(buffer)
        rows = self._rows(bucket)
        if self.stream is None:
            future = torch.futures.Future(devices=[self.device] if buffer.is_cuda else [])
            self._waiting.put((rows, buffer, future))
            return future
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            for tensor in (rows, buffer):
                tensor.record_stream(self.stream)
            self._exchange(rows, buffer)
            future = torch.futures.Future(devices=[self.device])
            future.set_result(buffer)
        return future

    def _work(self) -> None:
        while (job := self._waiting.get()) is not None:
            rows, buffer, future = job
            try:
                if not self.shards.failure:
                    self._exchange(rows, buffer)
            except Exception as error:  # PyTorch would call an error in a future a tensor of the wrong type
                self.shards.failure = error
            future.set_result(buffer)
            del job, rows, buffer, future

    def _rows(self, bucket: dist.GradBucket) -> torch.Tensor:
        """A row for each subtree of this rank, laid out as the bucket; a single one may be the bucket's own memory.

        A gradient has its parameter's strides in the bucket, which `bucket.gradients()` does not say.
        """
        buffer = bucket.buffer()
        first = buffer.to(self.shards.comm_dtype or buffer.dtype)[None]
        further = len(self.subtrees[self.rank]) - 1
        if not further:
            return first
        rows = torch.cat([first, first.new_zeros(further, len(buffer))])
        for parameter, gradient in zip(bucket.parameters(), bucket.gradients(), strict=True):
            place = gradient.storage_offset() - buffer.storage_offset()
            for row, value in zip(rows[1:], self.shards.further_sums(parameter), strict=True):
                row.as_strided(parameter.shape, parameter.stride(), row.storage_offset() + place).copy_(value)
        return rows

    def _exchange(self, rows: torch.Tensor, buffer: torch.Tensor) -> None:
        if rows.is_cuda and self.stream is None:  # gloo carries no GPU tensors all to all
            rows = rows.cpu()
        pieces = rows[0].tensor_split(self.size)
        mine = pieces[self.rank]
        # By destination, and there by subtree.
        sent = torch.cat([part.flatten() for part in rows.tensor_split(self.size, 1)]) if len(rows) > 1 else rows[0]
        counts = [len(ranges) for ranges in self.subtrees]
        received = sent.new_empty(sum(counts), len(mine))
        dist.all_to_all_single(
            _bytes(received.flatten()), _bytes(sent), _byte_counts([count * len(mine) for count in counts], sent),
            _byte_counts([len(rows) * len(piece) for piece in pieces], sent), group=self.group,
        )  # fmt: skip
        tree = TreeSum(self.shards.count)
        for shards, value in zip([one for ranges in self.subtrees for one in ranges], received, strict=True):
            tree.push(shards, value)
        mine.copy_(tree.nodes[0][1])
        # In place. An all-gather of gloo would copy everything twice.
        works = [
            dist.broadcast(_bytes(piece), rank, self.group, async_op=True)
            for rank, piece in enumerate(pieces)
            if len(piece)
        ]
        for work in works:
            work.wait()
        if rows.data_ptr() != buffer.data_ptr():
            buffer.copy_(rows[0])


def _sum_along_the_tree(exchange, bucket):
    return exchange.start(bucket)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as uint8, which every backend carries."""
    return tensor.view(torch.uint8)


def _byte_counts(counts: list[int], tensor: torch.Tensor) -> list[int]:
    return [count * tensor.element_size() for count in counts]


def no_sync(model: nn.Module) -> contextlib.AbstractContextManager:
    """Inside, gradients accumulate on this rank without being exchanged."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) else contextlib.nullcontext()
