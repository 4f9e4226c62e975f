"""Processes: who we are, and everything that crosses between us.

The only module that imports `torch.distributed` or reads RANK, SLURM_PROCID and their like. With one process
there is no process group and every function here does nothing, at no cost.
"""

from __future__ import annotations

import contextlib
import datetime
import gc
import inspect
import json
import os
import re
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from fcn.errors import InputError
from fcn.stragglers import WAITS

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class World:
    """This process's place in the run."""

    rank: int
    size: int
    local_rank: int
    device: torch.device
    launcher: str
    """torchrun, slurm or python."""
    job: str | None = None
    """SLURM's number of the job."""


def read_place(environ: Mapping[str, str]) -> tuple[int, int, int, str]:
    """(rank, world size, local rank, launcher) from the variables that torchrun or `srun` sets; else one process."""
    if "RANK" in environ and "WORLD_SIZE" in environ:
        return int(environ["RANK"]), int(environ["WORLD_SIZE"]), int(environ.get("LOCAL_RANK", 0)), "torchrun"
    # An sbatch script itself has SLURM_PROCID=0 and SLURM_NTASKS=N; only `srun` sets the step's variables.
    if "SLURM_STEP_NUM_TASKS" in environ and "SLURM_PROCID" in environ:
        place = [int(environ[key]) for key in ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")]
        return place[0], place[1], place[2], "slurm"
    return 0, 1, 0, "python"


def slurm_rendezvous(environ: Mapping[str, str]) -> tuple[str, str]:
    """(address, port) on which the tasks of a SLURM step meet: the step's first host, and a port of its own.

    MASTER_ADDR and MASTER_PORT win where the site needs another address.
    """
    if environ.get("SLURM_STEP_NUM_NODES") == "1":
        address = "127.0.0.1"
    else:  # "gpu[07-09,12],big3" → "gpu07"
        first = re.match(r"(?:\[[^\]]*\]|[^,\[])+", environ.get("SLURM_STEP_NODELIST", "127.0.0.1"))
        address = re.sub(r"\[(\w+)[^\]]*\]", r"\1", first.group() if first else "127.0.0.1")
    # Steps of one job, and jobs that share a node, must not meet on one port; the kernel gives away 32768 and up.
    job, step = (int(environ.get(key, "0")) for key in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    port = 20000 + (job * 101 + step) % 12000
    return environ.get("MASTER_ADDR", address), environ.get("MASTER_PORT", str(port))


def start(timeout_s: float = 1800) -> World:
    """Find the device and join the process group.

    NCCL carries GPU tensors and gloo CPU tensors. FCN_BACKEND=gloo puts both on gloo, so that several
    processes can share one GPU, which NCCL refuses.

    Raises:
        InputError: more processes on this machine than GPUs.
    """
    rank, size, local_rank, launcher = read_place(os.environ)
    gloo_only = os.environ.get("FCN_BACKEND") == "gloo"
    gpus = torch.cuda.device_count()
    if gpus:
        one_gpu_a_task = launcher == "slurm" and gpus == 1  # srun --gpus-per-task=1 hides the other tasks' GPUs
        if local_rank >= gpus and not gloo_only and not one_gpu_a_task:
            if local_rank == gpus:
                raise InputError(
                    f"found more processes here than the {gpus} GPUs; start torchrun with --nproc_per_node={gpus}"
                )
            wait_for_the_message()
        device = torch.device("cuda", local_rank % gpus)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    if size > 1:
        if launcher == "slurm":
            os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = slurm_rendezvous(os.environ)
        nccl = device.type == "cuda" and not gloo_only
        if nccl:  # NCCL's flight recorder: what each rank did last, written to a file when a collective times out
            os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
            os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
            os.environ.setdefault("TORCH_FR_DUMP_DYNAMIC_FILE_NAME", "1")  # the name is read when it is written
        store = next(rendezvous("env://", rank, size, timeout=datetime.timedelta(seconds=timeout_s)))[0]
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if nccl else "gloo",
            store=dist.PrefixStore(_agree_on_group(store, rank, size, timeout_s), store),
            rank=rank,
            world_size=size,
            timeout=datetime.timedelta(seconds=timeout_s),
            device_id=device if nccl else None,
        )
    return World(rank, size, local_rank, device, launcher, os.environ.get("SLURM_JOB_ID"))


def _agree_on_group(store: dist.Store, rank: int, size: int, timeout_s: float) -> str:
    """A name for this group of processes that no group before it had in this store.

    torchrun keeps one store over its restarts (seen in 2.11 and 2.14), and gloo would look there for the addresses of
    processes that are gone. Restarts have no number that all nodes agree on, so rank 0 answers every process that
    announces itself, until all have taken the answer; announcements of the dead are answered in vain.
    """
    me, deadline = uuid.uuid4().hex, time.monotonic() + timeout_s
    if rank:
        store.set(f"fcn/here/{rank}", me)
        store.wait([f"fcn/group/{me}"], datetime.timedelta(seconds=timeout_s))
        group = store.get(f"fcn/group/{me}").decode()
        store.set(f"fcn/joined/{group}/{rank}", me)
        return group
    missing, answered = set(range(1, size)), set()
    while missing:
        for other in sorted(missing):
            if store.check([f"fcn/here/{other}"]) and (name := store.get(f"fcn/here/{other}")) not in answered:
                store.set(f"fcn/group/{name.decode()}", me)
                answered.add(name)
            if store.check([f"fcn/joined/{me}/{other}"]):
                missing.discard(other)
        if missing and time.monotonic() > deadline:
            raise RuntimeError(f"ranks {sorted(missing)} did not start within {timeout_s:.0f} s")
        time.sleep(0.005)
    return me


def bound_waiting(seconds: float, world: World, dumps: Path) -> None:
    """From now on a collective that waits longer fails.

    Under NCCL each rank then leaves `dumps`/rank_N, which `torchfrtrace` reads (not tried on a GPU yet).
    """
    if not is_active():
        return
    renamed = getattr(dist.distributed_c10d, "set_timeout", None)  # in PyTorch 2.14
    (renamed or dist.distributed_c10d._set_pg_timeout)(datetime.timedelta(seconds=seconds))
    if world.device.type == "cuda" and "TORCH_FR_DUMP_DYNAMIC_FILE_NAME" in os.environ:
        dumps.mkdir(parents=True, exist_ok=True)
        os.environ["TORCH_FR_DUMP_TEMP_FILE"] = str(dumps / f"rank_{world.rank}")


class Blackboard:
    """Short texts that every rank can read, outside of any collective.

    Raises RuntimeError where the process that keeps it (torchrun's, or rank 0) cannot be reached.
    """

    def __init__(self, store: dist.Store) -> None:
        # A connection of its own: a thread that waits here must not keep the main thread from the group's.
        self._store = store.clone() if hasattr(store, "clone") else store
        self._store.set_timeout(datetime.timedelta(seconds=5))

    def put(self, key: str, text: str) -> None:
        self._store.set(f"fcn/{key}", text)

    def is_first(self, key: str) -> bool:
        """Whether no other rank has asked this before."""
        return self._store.add(f"fcn/{key}", 1) == 1

    def get(self, key: str) -> str | None:
        key = f"fcn/{key}"
        return self._store.get(key).decode() if self._store.check([key]) else None


def blackboard() -> Blackboard | None:
    """The group's, or None with one process."""
    return Blackboard(dist.distributed_c10d._get_default_store()) if is_active() else None


def is_communication_failure(error: BaseException) -> bool:
    """Whether a collective failed because of another rank or the network; gloo raises RuntimeError, NCCL DistError."""
    if not is_active():
        return False
    # gloo's messages begin with a file of its own, but for this one, after another operation has timed out.
    return isinstance(error, dist.DistError) or any(word in str(error).lower() for word in ("gloo", "pair closure"))


def stop() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()
        # What a reference cycle holds of it has to go now: a thread of gloo that outlives Python aborts the process.
        gc.collect()


def is_active() -> bool:
    return dist.is_initialized() and dist.get_world_size() > 1


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum over all ranks, in place; every rank must call it."""
    if is_active():
        dist.all_reduce(tensor)
    return tensor


def stack_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """The small tensor of every rank, (world size, *shape), in rank order; every rank must call it.

    One round of messages, where gloo's all-reduce takes several: a quarter to a half less waiting for small tensors.
    """
    if not is_active():
        return tensor[None]
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    with WAITS.counting(tensor):
        dist.all_gather(parts, tensor)
    return torch.stack(parts)


def all_reduce_sum_later(tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Start summing a CPU tensor over all ranks, in place; the returned function waits for the result."""
    work = dist.all_reduce(tensor, async_op=True) if is_active() else None

    def wait() -> torch.Tensor:
        if work is not None:
            work.wait()
        return tensor

    return wait


def gather(value: T) -> list[T]:
    """`value` of every rank, in rank order, on every rank. For small plain objects, not for a step's data."""
    if not is_active():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def barrier() -> None:
    if is_active():
        gather(None)


def together(action: Callable[[], T]) -> T:
    """Run `action` on every rank; if it finds the input at fault anywhere, every rank raises that InputError.

    Without the agreement, a rank that cannot read a file leaves the others waiting in the next collective.
    """
    result, fault = None, None
    try:
        result = action()
    except InputError as error:
        fault = str(error)
    raise_together(fault)
    return result  # type: ignore[return-value]


def raise_together(fault: str | None) -> None:
    """Raise InputError on every rank if any rank has a fault: each different one once, with its ranks if not all."""
    faults = gather(fault)
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


def data_parallel(model: nn.Module, world: World, sync_bn: bool, wire_type: torch.dtype | None = None) -> nn.Module:
    """The model under DistributedDataParallel, which adds the ranks' gradients; itself with one process.

    Gradients travel as `wire_type`, and by default as they are.

    Adds, where the default averages: a loss multiplied by the world size to make up for that would leave the range of
    half precision at other places on other numbers of processes.
    """
    if not is_active():
        return model
    # Synchronised statistics are equal on all ranks already; per-rank ones would drift apart without the broadcast.
    known = inspect.signature(DistributedDataParallel).parameters
    sync_buffers = (
        "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    )  # renamed in PyTorch 2.14
    devices = [world.device.index] if world.device.type == "cuda" else None
    parallel = DistributedDataParallel(
        model, device_ids=devices, gradient_as_bucket_view=True, **{sync_buffers: not sync_bn}
    )
    parallel.register_comm_hook(wire_type, _sum_gradients)
    return parallel


def _sum_gradients(wire_type, bucket):  # without annotations: DistributedDataParallel refuses those that are texts
    gradient = bucket.buffer()
    WAITS.gradients_are_ready(gradient)
    sent = gradient if wire_type is None else gradient.to(wire_type)
    future = dist.all_reduce(sent, async_op=True).get_future()
    return future.then(lambda done: done.value()[0] if wire_type is None else gradient.copy_(done.value()[0]))


def copy_from_rank_0(tensors: Iterable[torch.Tensor]) -> None:
    """Give every rank rank 0's values, in place."""
    if is_active():
        with torch.no_grad():
            for tensor in tensors:
                dense = tensor.contiguous()  # messages have no memory format
                dist.broadcast(dense, src=0)
                tensor.copy_(dense)


def local_gradients(model: nn.Module) -> contextlib.AbstractContextManager:
    """Inside, gradients accumulate on this rank and are not exchanged."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) else contextlib.nullcontext()


def report_failure(message: str) -> None:
    """Leave the message where torchrun looks for the cause, so that its own report ends with it."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        failure = {"message": message, "extraInfo": {"timestamp": str(int(time.time()))}}
        Path(path).write_text(json.dumps({"message": failure}), encoding="utf-8")


def wait_for_the_message(seconds: float = 15) -> None:
    """Give the rank that prints the message time to do so: torchrun ends all ranks as soon as one exits."""
    time.sleep(seconds)
    raise SystemExit(2)
