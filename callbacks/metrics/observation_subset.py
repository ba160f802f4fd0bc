"""A fixed subset of a stream of observations, random or evenly spaced."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from ..schedules import check_number, integer_from
from .running_moments import check_rows

_SEED = 0xF1376E7B  # of the order; any number would do
_GOLDEN = 0x9E3779B9


class ObservationSubset(Metric):
    """Keep the rows of a fixed random subset of the observations, chosen only by their indices.

    So batching, order and the number of processes do not change the subset, an observation seen twice counts once, and
    data sorted by class still give all classes.

    As input to ``forward`` and ``update`` the metric accepts ``rows`` of shape ``(N, columns)`` and the ``index`` of
    each observation, integers of shape ``(N,)``; N may be 0. As output of ``forward`` and ``compute`` it returns the
    kept rows in the order of :func:`random_keys`, of shape ``(M, columns)``, M at most ``size``.

    Args:
        columns: Length of a row.
        size: Number of rows kept.
        kwargs: Options of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If ``columns`` or ``size`` is not positive, or rows or indices of another shape or kind arrive.
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False

    state: Tensor

    def __init__(self, columns: int, size: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name, value in (("columns", columns), ("size", size)):
            check_number(name, value, "at least 1", integer_from(1))
        self.columns = columns
        self.size = size
        empty = torch.full((size, 1 + columns), math.inf, dtype=torch.float64)
        self.add_state("state", empty, dist_reduce_fx=partial(smallest_keys, number=size))

    @property
    def rows(self) -> Tensor:
        """The rows kept so far, of shape ``(M, columns)``."""
        return self.state[self.state[:, 0].isfinite(), 1:]

    def update(self, rows: Tensor, index: Tensor) -> None:
        """Add the rows of a batch, without waiting for their device."""
        check_rows(self.columns, rows=rows)
        if index.shape != rows.shape[:1]:
            raise ValueError(f"`index` must have shape ({len(rows)},), one for each row, got {tuple(index.shape)}.")
        added = torch.cat([random_keys(index).unsqueeze(1), rows.detach().double()], dim=1)
        self.state = smallest_keys(torch.cat([self.state, added]), self.size)

    def compute(self) -> Tensor:
        """Return the rows kept."""
        return self.rows


def evenly_spaced_rows(count: int, rows: int, batch_idx: float, batches: float) -> list[int]:
    """Return the rows of a batch to take, so that all batches together give ``count`` evenly spaced observations.

    Args:
        count: Number of observations to take from all batches.
        rows: Observations in this batch.
        batch_idx: Number of this batch, from 0.
        batches: Number of batches. If it is infinite, all observations come from the first batch.

    Returns:
        Distinct row numbers in ascending order, fewer if the batch is too small.
    """
    batches = batches if math.isfinite(batches) else 1
    places = (number * batches / count for number in range(count))
    return sorted({int((place - batch_idx) * rows) for place in places if batch_idx <= place < batch_idx + 1 and rows})


def random_keys(index: Tensor) -> Tensor:
    """Put observations in a fixed random order that depends only on their index.

    Args:
        index: Integers of shape ``(N,)``.

    Returns:
        Keys to sort by, float64, of shape ``(N,)``: 23 random bits and, for equal ones, 30 bits of the index.

    Raises:
        ValueError: If the indices are not integers.
    """
    if index.is_floating_point() or index.is_complex() or index.dtype == torch.bool:
        raise ValueError(f"`index` must be integers, got {index.dtype}.")
    index = index.long()
    bits = _scrambled(_scrambled((index & 0xFFFFFFFF) * _GOLDEN + (index >> 32) + _SEED) + _GOLDEN) >> 9
    return ((bits << 30) + index.remainder(2**30)).double()


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


def _scrambled(keys: Tensor) -> Tensor:
    """Scramble the lower 32 bits of int64 keys with the finaliser of MurmurHash3."""
    keys = keys & 0xFFFFFFFF
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        keys = ((keys ^ (keys >> shift)) * factor) & 0xFFFFFFFF
    return keys ^ (keys >> 16)
