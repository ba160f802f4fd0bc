"""Averages over a stream of observations, with their standard errors."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric


class Averages(NamedTuple):
    """Averages of several quantities over observations.

    Attributes:
        count: Number of observations, a scalar.
        mean: Of shape ``(columns,)``, a scalar for one column.
        standard_error: Of each mean, from the spread over the observations, of the same shape.
    """

    count: Tensor  # type: ignore[assignment]  # hides a method of tuples, which nobody needs
    mean: Tensor
    standard_error: Tensor


class RunningMoments(Metric):
    """Averages several quantities over observations, with the standard error of each average.

    As input to ``forward`` and ``update`` the metric accepts ``values`` of shape ``(N, columns)``, one row an
    observation; N may be 0. As output of ``forward`` and ``compute`` it returns
    :class:`Averages`.

    Args:
        columns: Number of quantities.
        kwargs: Options of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If ``columns`` is not positive, or values of another shape arrive.
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False

    state: Tensor

    def __init__(self, columns: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if columns < 1:
            raise ValueError(f"`columns` must be at least 1, got {columns}.")
        self.columns = columns
        empty = torch.zeros(3, columns, dtype=torch.float64)
        self.add_state("state", empty, dist_reduce_fx=merge_columns)

    def update(self, values: Tensor) -> None:
        """Add the rows of a batch."""
        if values.ndim != 2 or values.shape[1] != self.columns:
            raise ValueError(f"`values` must have shape (N, {self.columns}), got {tuple(values.shape)}.")
        self.state = merge_columns(torch.stack([self.state, column_moments(values.detach())]))

    def compute(self) -> Averages:
        """Return the averages."""
        return Averages(self.state[0, 0], self.state[1].clone(), standard_error(self.state))


def column_moments(values: Tensor) -> Tensor:
    """Summarise values of shape ``(N, columns)`` as count, mean and sum of squared deviations."""
    values = values.double()
    mean = values.sum(dim=0) / max(len(values), 1)
    return torch.stack([torch.full_like(mean, len(values)), mean, (values - mean).square().sum(dim=0)])


def merge_columns(states: Tensor) -> Tensor:
    """Merge counts, means and sums of squared deviations of several sets, of shape ``(sets, 3, columns)``."""
    counts, means, deviations = states.unbind(dim=1)
    count = counts.sum(dim=0)
    mean = (counts * means).sum(dim=0) / count.clamp(min=1)
    return torch.stack([count, mean, (deviations + counts * (means - mean).square()).sum(dim=0)])


def standard_error(state: Tensor) -> Tensor:
    """Compute the standard error of each mean from counts, means and sums of squared deviations."""
    count, _, deviations = state.unbind()
    return (deviations / (count - 1).clamp(min=1) / count.clamp(min=1)).sqrt()
