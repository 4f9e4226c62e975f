"""Steps that must not count: those without a finite loss and gradient."""

from __future__ import annotations

import torch
from torch import nn

FP16_SEARCH = 32
"""Steps that fp16's loss scale may take to be found, at most: each halves it, from 2¹⁶ to 2⁻¹⁶."""


class NonFiniteGuard:
    """Counts non-finite steps on the device, so that no step waits for the host, and decides when they are too many.

    Every rank sees the gradient after it was summed over the ranks, so every rank comes to the same result without
    asking. After more than `limit` such steps in a row the guard is tripped: `gate` is NaN from then on and makes every
    later step a non-finite one, so that the weights stay as they were until the host looks.
    """

    def __init__(self, limit: int, device: torch.device) -> None:
        self.limit = limit
        self.gate = torch.ones((), device=device)
        """Factor of the loss: 1, or NaN once tripped."""
        self._streak, self._skipped, self._tripped_at = torch.zeros(3, dtype=torch.int64, device=device).unbind()

    def record(self, finite: torch.Tensor, step: int) -> None:
        """Note whether the gradient of a step (0, 1, …) is finite; `finite` is a bool scalar on the device."""
        bad = ~finite
        self._streak = torch.where(bad, self._streak + 1, 0)
        self._skipped = self._skipped + (bad & ~self.gate.isnan())
        trips = (self._streak > self.limit) & (self._tripped_at == 0)
        self._tripped_at = torch.where(trips, step + 1, self._tripped_at)
        self.gate = torch.where(trips, torch.nan, self.gate)

    def read(self) -> tuple[int, int, int | None]:
        """(steps skipped so far, the last ones in a row, step at which it tripped or None); waits for the device."""
        skipped, streak, tripped_at = torch.stack([self._skipped, self._streak, self._tripped_at]).tolist()
        return skipped, streak, tripped_at - 1 if tripped_at else None

    def state(self) -> dict[str, int]:
        """What a resumed run needs to count on."""
        skipped, streak, _ = self.read()
        return {"streak": streak, "skipped": skipped}

    def load(self, state: dict[str, int]) -> None:
        self._streak = torch.full_like(self._streak, state["streak"])
        self._skipped = torch.full_like(self._skipped, state["skipped"])


class KeptBuffers:
    """Floating-point buffers, such as running statistics, as they were before a step, to be put back after a bad one.

    One copy and one selection for all, because a network has hundreds.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.before = self._flat(self._buffers())

    def _buffers(self) -> list[torch.Tensor]:
        """As they are now: a network may put new tensors in their place."""
        return [buffer for buffer in self.model.buffers() if buffer.is_floating_point()]

    @staticmethod
    def _flat(buffers: list[torch.Tensor]) -> torch.Tensor | None:
        return torch.cat([buffer.flatten() for buffer in buffers]) if buffers else None

    def restore_unless(self, finite: torch.Tensor) -> None:
        """Put the old values back where the bool scalar `finite` is False, without asking the device for it."""
        if self.before is None:
            return
        buffers = self._buffers()
        chosen = torch.where(finite, self._flat(buffers), self.before)
        parts = chosen.split([buffer.numel() for buffer in buffers])
        torch._foreach_copy_(buffers, [part.view_as(buffer) for part, buffer in zip(parts, buffers, strict=True)])
