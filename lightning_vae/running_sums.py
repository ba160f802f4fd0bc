"""Sums over batches that stay on their device until somebody asks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_BLOCK = 64  # batches that are added up at once


class RunningSums:
    """Add up values and counts, over the batches since the last flush and over the epoch.

    A vector of sums ends with the count. Adding costs next to nothing and never waits for the device.

    Args:
        size: How many values are added up.
    """

    _window: Tensor
    _finite: Tensor  # in how many batches each value was
    _latest: list[Tensor]
    _count: float | Tensor
    _batches: int

    def __init__(self, size: int) -> None:
        self.size = size
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self._epoch = torch.zeros(self.size + 1, dtype=torch.float32)
        self._start_window()

    def add(self, values: Tensor, count: int | Tensor) -> None:
        """Add one batch's sums, shape ``(size,)``, over ``count`` observations."""
        self._latest.append(values)
        self._count += count
        self._batches += 1
        if self._batches % _BLOCK == 0:
            self._window, self._finite = self._with_latest()
            self._latest = []

    def flush(self) -> Tensor:
        """Return the sums and the count since the last flush, shape ``(size + 1,)``, and start again."""
        window = self._since_flush()
        self._epoch = self._epoch.to(window.device) + window
        self._start_window()
        return window

    def epoch(self, has_ended: bool = True) -> Tensor:
        """Return the epoch's sums and count, shape ``(size + 1,)``, and start a new epoch; the window goes on.

        Args:
            has_ended: Whether it has; one that the end of the run cuts short goes on when the run does.
        """
        window = self._since_flush()
        total = self._epoch.to(window.device) + window
        if has_ended:
            self._epoch = -window
        return total

    def first_not_finite(self) -> tuple[int, int] | None:
        """Look for the first value since the last flush that was not finite.

        Returns:
            Which of the values it was, and how many batches ago, 0 being the latest; ``None`` if there was none.
        """
        # From then on none is, as a rule, so that the batches before it are those that were.
        finite = self._with_latest()[1].tolist()
        first = min(range(self.size), key=finite.__getitem__)
        return None if finite[first] == self._batches else (first, self._batches - 1 - int(finite[first]))

    def state(self) -> dict[str, Any]:
        """Return what a resumed run needs to go on."""
        latest = torch.stack(self._latest).cpu() if self._latest else torch.zeros(0, self.size)
        tensors = {"window": self._window, "finite": self._finite, "epoch": self._epoch}
        copies = {name: tensor.cpu().clone() for name, tensor in tensors.items()}
        return {**copies, "latest": latest, "count": float(self._count), "batches": self._batches}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""
        self._window, self._finite, self._epoch = (state[name].clone() for name in ("window", "finite", "epoch"))
        self._latest = list(state["latest"])
        self._count, self._batches = state["count"], state["batches"]

    def _start_window(self) -> None:
        self._window, self._finite = torch.zeros(2, self.size, dtype=torch.float32).unbind()
        self._latest, self._count, self._batches = [], 0, 0

    def _with_latest(self) -> tuple[Tensor, Tensor]:
        if not self._latest:
            return self._window, self._finite
        device = self._latest[-1].device
        latest = torch.stack([values.to(device, non_blocking=True) for values in self._latest])
        window, finite = (sums.to(device, non_blocking=True) for sums in (self._window, self._finite))
        return window + latest.sum(0), finite + latest.isfinite().sum(0)

    def _since_flush(self) -> Tensor:
        window = self._with_latest()[0]
        return torch.cat([window, window.new_ones(1) * self._count])
