"""A fixed random subset of a stream of observations."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


class ObservationSubset(Metric):
    """Keeps the rows of a fixed random subset of the observations, chosen by their indices alone.

    So neither the batches nor their order nor the number of processes decides what is kept, an observation that is seen
    twice counts once, and data that are sorted by class still give all classes.

    As input to ``forward`` and ``update`` the metric accepts ``rows`` of shape ``(N, columns)`` and ``keys`` of shape
    ``(N,)``, distinct for distinct observations: those with the smallest are kept. As output of ``forward`` and
    ``compute`` it returns the kept rows in the order of their keys, of shape ``(M, columns)``, M at most ``size``.

    Args:
        columns: Length of a row.
        size: Number of rows kept.
        kwargs: Options of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If ``columns`` or ``size`` is not positive.
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False

    state: Tensor

    def __init__(self, columns: int, size: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name, value in (("columns", columns), ("size", size)):
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        self.size = size
        empty = torch.full((size, 1 + columns), math.inf, dtype=torch.float64)
        self.add_state("state", empty, dist_reduce_fx=partial(smallest_keys, number=size))

    def update(self, rows: Tensor, keys: Tensor) -> None:
        """Add the rows of a batch."""
        kept = keys < self.state[-1, 0]  # after the first batches few are, and none need be copied
        if not kept.any():
            return
        rows, keys = rows[kept], keys[kept]
        added = torch.cat([keys.double().unsqueeze(1), rows.detach().double()], dim=1)
        self.state = smallest_keys(torch.cat([self.state, added]), self.size)

    def compute(self) -> Tensor:
        """Return the rows kept."""
        return self.state[self.state[:, 0].isfinite(), 1:]


def smallest_keys(rows: Tensor, number: int) -> Tensor:
    """Keep the rows with the smallest distinct keys, in their order.

    Args:
        rows: Rows that start with their key, of shape ``(N, columns)`` or, from several processes,
            ``(processes, N, columns)``. An infinite key marks an empty row.
        number: Number of rows to keep.

    Returns:
        The rows, of shape ``(number, columns)``.
    """
    rows = rows.flatten(end_dim=-2)
    keys, order = rows[:, 0].sort(stable=True)
    repeated = torch.zeros_like(keys, dtype=torch.bool)
    repeated[1:] = keys[1:] == keys[:-1]
    keys, kept = keys.masked_fill(repeated, math.inf).sort(stable=True)
    return torch.cat([keys[:number, None], rows[order[kept[:number]], 1:]], dim=1)
