"""Sums over batches that stay on their device until somebody asks."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad


class RunningSums:
    """Add up values and counts, over the batches since the last flush and over the epoch.

    A vector of sums ends with the count. Adding is one small operation on the device and never waits for it.

    Args:
        size: How many values are added up.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self._window, self._count = torch.zeros(self.size, dtype=torch.float32), 0
        self._epoch = torch.zeros(self.size + 1, dtype=torch.float32)

    def add(self, values: Tensor, count: int) -> None:
        """Add one batch's sums, shape ``(size,)``, over ``count`` observations."""
        if self._window.device != values.device:
            self._window, self._epoch = self._window.to(values.device), self._epoch.to(values.device)
        self._window.add_(values)
        self._count += count

    def flush(self) -> Tensor:
        """Return the sums and the count since the last flush, shape ``(size + 1,)``, and start again."""
        window = self._since_flush()
        self._window, self._count = torch.zeros_like(self._window), 0
        self._epoch += window
        return window

    def epoch(self) -> Tensor:
        """Return the epoch's sums and count, shape ``(size + 1,)``, and start a new epoch; the window goes on."""
        window = self._since_flush()
        total, self._epoch = self._epoch + window, -window
        return total

    def state(self) -> dict[str, Tensor]:
        """Return what a resumed run needs to go on."""
        return {"window": self._since_flush().cpu(), "epoch": self._epoch.cpu().clone()}

    def load(self, state: dict[str, Tensor]) -> None:
        """Go on from a saved state."""
        self._window, self._count = state["window"][:-1].clone(), int(state["window"][-1])
        self._epoch = state["epoch"].clone()

    def _since_flush(self) -> Tensor:
        return pad(self._window, (0, 1), value=self._count)
