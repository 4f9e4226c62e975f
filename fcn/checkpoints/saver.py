"""Save checkpoints in the background."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from fcn.checkpoints.folder import STEP_NAME, find_newest, prune, remove_leftovers
from fcn.checkpoints.format import save_checkpoint


class BackgroundSaver:
    """Saves the checkpoints of a folder in a thread, one after the other; the caller waits only for a copy of the
    state.

    A failed save is reported through `warn`, from that thread, with path, cause and remedy, and training continues.
    `unsaved` mentions it until a later save of the same kind succeeds. At most one save waits behind the current one,
    so a slow disk costs time but not unlimited memory.

    Training never returns to the weights of best.pt. So if that cannot be written, its state is kept and written after
    the next step_*.pt that can be written.
    """

    def __init__(self, folder: Path, keep: int, warn: Callable[[str], None]) -> None:
        self.folder, self.keep, self.warn = folder, keep, warn
        self.unsaved: dict[str, str] = {}
        """Why the last save of a kind ("step" or "best.pt") failed, for kinds whose last save failed."""
        self._begun = False
        self._had_folder = folder.is_dir()
        self._kept: dict[str, dict[str, Any]] = {}
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._running: deque[Future[None]] = deque()

    def save(self, name: str, state: dict[str, Any]) -> None:
        """Start to write the current `state` to the file `name`; after step_*.pt, old checkpoints are deleted."""
        while self._running and (self._running[0].done() or len(self._running) > 1):
            self._running.popleft().result()
        copy, copied = to_host(state)
        self._running.append(self._thread.submit(self._write, name, copy, copied))

    def wait(self) -> None:
        """Wait until everything is written."""
        while self._running:
            self._running.popleft().result()

    def _write(self, name: str, state: dict[str, Any], copied: Callable[[], None]) -> None:
        path = self.folder / name
        kind = "step" if STEP_NAME.fullmatch(name) else name
        self._kept.pop(kind, None)
        try:
            copied()
            if self._had_folder and not self.folder.is_dir():
                self.warn(f"{self.folder} has vanished, with the older checkpoints; making it again")
            if not self._begun:
                remove_leftovers(self.folder)  # they may be what fills the disk
                self._begun = True
            save_checkpoint(path, state)
            self._had_folder = True
        except OSError as error:
            self._report(kind, path, error)
            if kind != "step":
                self._kept[kind] = state
            return
        self.unsaved.pop(kind, None)
        if kind == "step":
            self._prune()
            for kept in list(self._kept):
                self._write(kept, self._kept[kept], lambda: None)

    def _report(self, kind: str, path: Path, error: OSError) -> None:
        left = None
        with contextlib.suppress(OSError):  # a disk that cannot be written may not be listable either
            left = find_newest(self.folder)
        newest = f"the newest checkpoint is {left}" if left else "there is no other checkpoint"
        self.unsaved[kind] = f"{path}: cannot be written ({_reason(error)})"
        self.warn(
            f"{self.unsaved[kind]}; training does not stop for that, {newest}; "
            "free space there or make it writable, the next save tries again"
        )

    def _prune(self) -> None:
        try:
            prune(self.folder, self.keep)
        except OSError as error:
            self.warn(
                f"{self.folder}: older checkpoints cannot be deleted ({_reason(error)}); the next save tries again"
            )


def to_host(state: dict[str, Any]) -> tuple[dict[str, Any], Callable[[], None]]:
    """Copy the state to host memory; also returns a function that waits until the copy is complete.

    GPU tensors go to pinned memory, in copies queued behind the step that produced them. Neither the caller nor the
    next steps wait for them.
    """
    on_gpu = False

    def copy(value: Any) -> Any:
        nonlocal on_gpu
        if isinstance(value, dict):
            return {key: copy(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [copy(item) for item in value] if isinstance(value, list) else tuple(map(copy, value))
        if not isinstance(value, torch.Tensor):
            return value
        if not value.is_cuda:
            return value.detach().clone()
        on_gpu = True
        host = torch.empty_like(value, device="cpu", pin_memory=True)
        return host.copy_(value.detach(), non_blocking=True)

    copied = copy(state)
    if not on_gpu:
        return copied, lambda: None
    event = torch.cuda.Event()
    event.record()
    return copied, event.synchronize


def _reason(error: OSError) -> str:
    return error.strerror or str(error)
