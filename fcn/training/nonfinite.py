"""Steps that must not count, because their loss or gradient is not finite."""

from __future__ import annotations

import torch
from torch import nn

FP16_SEARCH = 32
"""Most steps that fp16 skips to find its loss scale. Each halves it, from 2¹⁶ to 2⁻¹⁶."""


class NonFiniteGuard:
    """Counts non-finite steps on the device, so that no step waits for the host, and decides when there are too many.

    Every rank sees the gradient after it was summed over the ranks, so all ranks agree without communicating. After
    more than `limit` such steps in a row the guard trips: `gate` becomes NaN and makes every later step non-finite,
    too, so the weights stay as they are until the host looks.
    """

    def __init__(self, limit: int, device: torch.device) -> None:
        self.limit = limit
        self.gate = torch.ones((), device=device)
        """Factor of the loss: 1, or NaN once tripped."""
        self._streak, self._skipped, self._tripped_at = torch.zeros(3, dtype=torch.int64, device=device).unbind()

    def record(self, finite: torch.Tensor, step: int) -> None:
        """Record whether the gradient of step 0, 1, … is finite; `finite` is a bool scalar on the device."""
        bad = ~finite
        self._streak = torch.where(bad, self._streak + 1, 0)
        self._skipped = self._skipped + (bad & ~self.gate.isnan())
        trips = (self._streak > self.limit) & (self._tripped_at == 0)
        self._tripped_at = torch.where(trips, step + 1, self._tripped_at)
        self.gate = torch.where(trips, torch.nan, self.gate)

    def read(self) -> tuple[int, int, int | None]:
        """(steps skipped so far, current streak, step that tripped the guard or None); waits for the device."""
        skipped, streak, tripped_at = torch.stack([self._skipped, self._streak, self._tripped_at]).tolist()
        return skipped, streak, tripped_at - 1 if tripped_at else None

    def state(self) -> dict[str, int]:
        """What a resumed run needs to continue counting."""
        skipped, streak, _ = self.read()
        return {"streak": streak, "skipped": skipped}

    def load(self, state: dict[str, int]) -> None:
        self._streak = torch.full_like(self._streak, state["streak"])
        self._skipped = torch.full_like(self._skipped, state["skipped"])


class BufferSnapshot:
    """A network's floating-point buffers, such as running statistics, as they were before a step.

    They are copied and restored as one flat tensor, because a network has hundreds of them.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.before = self._flat(self._buffers())

    def _buffers(self) -> list[torch.Tensor]:
        """The current ones: a network may replace the tensors."""
        return [buffer for buffer in self.model.buffers() if buffer.is_floating_point()]

    @staticmethod
    def _flat(buffers: list[torch.Tensor]) -> torch.Tensor | None:
        return torch.cat([buffer.flatten() for buffer in buffers]) if buffers else None

    def restore_unless(self, finite: torch.Tensor) -> None:
        """Restore the old values if the bool scalar `finite` is False, without waiting for the device."""
        if self.before is None:
            return
        buffers = self._buffers()
        chosen = torch.where(finite, self._flat(buffers), self.before)
        parts = chosen.split([buffer.numel() for buffer in buffers])
        torch._foreach_copy_(buffers, [part.view_as(buffer) for part, buffer in zip(parts, buffers, strict=True)])
