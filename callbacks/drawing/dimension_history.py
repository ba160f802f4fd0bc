"""Values of each latent dimension over the passes of a run, as a picture of bounded size."""

from __future__ import annotations

import torch
from torch import Tensor

from .colours import heat_map

_MOST_ROWS = 256  # passes in a picture, and in a checkpoint
_MOST_PICTURES = 8  # pictures drawn before the stride first doubles


class DimensionHistory:
    """Keep one row of values for each pass; in a long run, for every second, fourth, ... pass.

    The memory, the checkpoints and the cost of a pass therefore do not grow with the number of passes.
    """

    def __init__(self) -> None:
        self._rows: list[Tensor] = []

    def add(self, values: Tensor | None, number: int) -> None:
        """Add the values of pass ``number``, counted from 1, of shape ``(k,)``; ``None`` adds nothing."""
        if values is None or (number - 1) % _stride(number, _MOST_ROWS):
            return
        if len(self._rows) == _MOST_ROWS:
            del self._rows[1::2]
        self._rows.append(values.float().cpu())

    def picture(self) -> Tensor | None:
        """Draw a column for each pass; ``None`` if there are no passes."""
        return heat_map(torch.stack(self._rows)) if self._rows else None

    def state(self) -> Tensor:
        """Return the rows, of shape ``(rows, k)``."""
        return torch.stack(self._rows) if self._rows else torch.empty(0)

    def load(self, state: Tensor) -> None:
        """Continue from saved rows."""
        self._rows = list(state)


def is_drawn(number: int) -> bool:
    """Return whether a picture is drawn after pass ``number``, counted from 1."""
    return number > 0 and (number - 1) % _stride(number, _MOST_PICTURES) == 0


def _stride(passes: int, most: int) -> int:
    """Return the smallest power of two as a stride that keeps at most ``most`` of the passes."""
    return 1 << ((passes - 1) // most).bit_length()
