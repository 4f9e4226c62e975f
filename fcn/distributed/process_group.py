"""The process group: join it, bound its waiting, leave it. With one process there is none, and nothing here costs."""

from __future__ import annotations

import contextlib
import datetime
import gc
import os
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from fcn.distributed.environment import read_place, slurm_rendezvous, wait_for_the_message
from fcn.distributed.stragglers import CommTimer
from fcn.errors import InputError


@dataclass(frozen=True, slots=True)
class DistributedContext:
    """Which process of the run this is, and its device."""

    rank: int
    size: int
    local_rank: int
    device: torch.device
    launcher: str
    """torchrun, slurm or python."""
    job: str | None = None
    """SLURM's number of the job."""
    comm_timer: CommTimer = field(default_factory=CommTimer, compare=False)
    """Measures how long this process waits for the others."""


_current: DistributedContext | None = None
"""The context of the process group; PyTorch, too, has one default group per process."""
_patience: datetime.timedelta | None = None
"""How long a collective waits, once it is bounded."""
_alone = False
_before_stop: list[Callable[[], object]] = []


def start(timeout_s: float = 1800) -> DistributedContext:
    """Find the device and join the process group.

    NCCL carries GPU tensors, gloo carries CPU tensors. With FCN_BACKEND several processes may share a GPU: gloo then
    carries both, or NCCL is asked for it, which needs 2.30.

    Raises:
        InputError: more processes on this machine than GPUs, or FCN_BACKEND is neither.
    """
    rank, size, local_rank, launcher = read_place(os.environ)
    backend, gpus = os.environ.get("FCN_BACKEND", ""), torch.cuda.device_count()
    if backend not in ("", "gloo", "nccl"):
        raise InputError(f"FCN_BACKEND: found {backend}; accepted: gloo or nccl, for processes that share a GPU")
    if backend == "nccl" and gpus:
        _let_nccl_share_gpus()
    if gpus:
        one_gpu_a_task = launcher == "slurm" and gpus == 1  # srun --gpus-per-task=1 hides the other tasks' GPUs
        if local_rank >= gpus and not backend and not one_gpu_a_task:
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
        nccl = device.type == "cuda" and backend != "gloo"
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
    global _current
    _current = DistributedContext(rank, size, local_rank, device, launcher, os.environ.get("SLURM_JOB_ID"))
    return _current


def _let_nccl_share_gpus() -> None:
    found = torch.cuda.nccl.version()
    if found < (2, 30):
        raise InputError(
            f"FCN_BACKEND: nccl shares GPUs from NCCL 2.30 on, found {'.'.join(map(str, found))}; set FCN_BACKEND=gloo"
        )
    # It refuses duplicate GPUs by default, and a group with all of its channels would not fit beside another.
    for name, value in {"MULTI_RANK_GPU_ENABLE": "1", "NVLS_ENABLE": "0", "MAX_CTAS": "4"}.items():
        os.environ.setdefault(f"NCCL_{name}", value)


def comm_timer() -> CommTimer:
    """The timer of the process group that this process belongs to."""
    assert _current is not None
    return _current.comm_timer


def _agree_on_group(store: dist.Store, rank: int, size: int, timeout_s: float) -> str:
    """Agree on a name for this group of processes that no earlier group had in this store.

    torchrun keeps one store across restarts (seen in 2.11 and 2.14), and gloo would find addresses of dead processes
    there. Nodes share no count of restarts, so rank 0 answers every process that announces itself until all have
    taken its answer. Announcements of dead processes are answered, too, which does no harm.
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


def bound_waiting(seconds: float, context: DistributedContext, dumps: Path) -> None:
    """Let a collective that waits longer than this fail from now on.

    Under NCCL each rank then writes `dumps`/rank_N, which `torchfrtrace` reads (not tried on a GPU yet).
    """
    if not is_active():
        return
    global _patience
    _patience = datetime.timedelta(seconds=seconds)
    renamed = getattr(dist.distributed_c10d, "set_timeout", None)  # in PyTorch 2.14
    (renamed or dist.distributed_c10d._set_pg_timeout)(_patience)
    if context.device.type == "cuda" and "TORCH_FR_DUMP_DYNAMIC_FILE_NAME" in os.environ:
        dumps.mkdir(parents=True, exist_ok=True)
        os.environ["TORCH_FR_DUMP_TEMP_FILE"] = str(dumps / f"rank_{context.rank}")


class StatusStore:
    """Short strings that every rank can read and write without a collective.

    Raises RuntimeError if the process that keeps them (torchrun's, or rank 0) cannot be reached.
    """

    def __init__(self, store: dist.Store) -> None:
        # A separate connection, so that a thread that waits here does not block the main thread's.
        self._store = store.clone() if hasattr(store, "clone") else store
        self._store.set_timeout(datetime.timedelta(seconds=5))

    def put(self, key: str, text: str) -> None:
        self._store.set(f"fcn/{key}", text)

    def is_first(self, key: str) -> bool:
        """Whether this rank is the first to ask."""
        return self._store.add(f"fcn/{key}", 1) == 1

    def get(self, key: str) -> str | None:
        key = f"fcn/{key}"
        return self._store.get(key).decode() if self._store.check([key]) else None


def status_store() -> StatusStore | None:
    """The process group's store, or None with one process."""
    return StatusStore(dist.distributed_c10d._get_default_store()) if is_active() else None


def is_communication_failure(error: BaseException) -> bool:
    """Whether a collective failed because of another rank or the network (gloo: RuntimeError, NCCL: DistError)."""
    if not is_active():
        return False
    # gloo's messages name one of its files, except for this one, which follows another operation's timeout.
    if isinstance(error, RuntimeError):
        return isinstance(error, dist.DistError) or any(word in str(error).lower() for word in ("gloo", "pair closure"))
    return False


def uses_nccl() -> bool:
    """Whether NCCL carries GPU tensors."""
    return "nccl" in dist.get_backend_config()


def new_gloo_group() -> dist.ProcessGroup:
    """All ranks once more, for collectives of another thread; every rank must call it."""
    return dist.new_group(backend="gloo", timeout=_patience)


def before_stop(action: Callable[[], object]) -> None:
    """Have `stop` do something first."""
    _before_stop.append(action)


def stop() -> None:
    """Leave the process group."""
    while _before_stop:
        _before_stop.pop()()
    if dist.is_initialized():
        dist.destroy_process_group()
        # Free what a reference cycle still holds of it: a gloo thread that outlives Python aborts the process.
        gc.collect()


def is_active() -> bool:
    return not _alone and dist.is_initialized() and dist.get_world_size() > 1


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Inside, this process is as if it were the only one: what may differ from rank to rank calls no collective."""
    global _alone
    _alone = True
    try:
        yield
    finally:
        _alone = False
