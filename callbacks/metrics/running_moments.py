"""Moments of a stream of observations, merged exactly over batches and processes."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

from ..schedules import check_number, integer_from


def check_rows(columns: int | None = None, **rows: Tensor) -> None:
    """Check that tensors have a row for each observation, all of the same shape ``(N, columns)``.

    Args:
        columns: Number of columns; any if ``None``.
        rows: The tensors by name.

    Raises:
        ValueError: If a tensor has another shape.
    """
    (first, *_), shapes = rows, {name: tuple(each.shape) for name, each in rows.items()}
    for name, shape in shapes.items():
        if len(shape) != 2 or (columns is not None and shape[1] != columns):
            raise ValueError(f"`{name}` must have shape (N, {'k' if columns is None else columns}), got {shape}.")
        if shape != shapes[first]:
            raise ValueError(f"`{first}` and `{name}` must have the same shape, got {shapes[first]} and {shape}.")


def check_posteriors(mean: Tensor, variance: Tensor, least: int = 1) -> None:
    """Check that tensors are the means and variances of posteriors. This synchronises with the device.

    Args:
        mean: The means.
        variance: The variances.
        least: The least number of posteriors.

    Raises:
        ValueError: If they have another shape than ``(N, k)``, are too few, or a variance is negative or NaN.
    """
    check_rows(mean=mean, variance=variance)
    if len(mean) < least:
        raise ValueError(f"`mean` must have at least {least} rows, one for each posterior, got {len(mean)}.")
    if not (variance >= 0).all():
        raise ValueError(f"`variance` must be at least 0, got values down to {float(variance.min()):.4g}.")


def moments(values: Tensor) -> Tensor:
    """Summarise values of shape ``(N, k)`` as count, mean and sum of squared deviations, of shape ``(3, k)``.

    Raises:
        ValueError: If the values have another shape.
    """
    check_rows(values=values)
    values = values.double()
    mean = values.sum(dim=0) / max(len(values), 1)
    return torch.stack([torch.full_like(mean, len(values)), mean, (values - mean).square().sum(dim=0)])


def pooled_mean(counts: Tensor, means: Tensor) -> tuple[Tensor, Tensor]:
    """Merge the means of several sets.

    Args:
        counts: Number of observations of each set, of shape ``(sets, k)``. Empty sets are fine.
        means: Their means, of shape ``(sets, k)``.

    Returns:
        Count and mean of the union, each of shape ``(k,)``.

    Raises:
        ValueError: If the shapes are not these.
    """
    check_rows(counts=counts, means=means)
    count = counts.sum(dim=0)
    return count, (counts * means).sum(dim=0) / count.clamp(min=1)


def merge_moments(states: Tensor) -> Tensor:
    r"""Merge the moments of several sets of values into the moments of their union.

    .. math::
        n = \sum_i n_i \qquad m = \frac{1}{n} \sum_i n_i m_i \qquad
        M_2 = \sum_i M_{2,i} + \sum_i n_i (m_i - m)^2

    No raw value is squared, so a small variance with a large mean keeps its precision.

    Args:
        states: Count, mean and sum of squared deviations of each set, of shape ``(sets, 3, k)``. Empty sets are fine.

    Returns:
        The same three for the union, of shape ``(3, k)``.

    References:
        Chan, Golub and LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances", 1979.
    """
    counts, means, deviations = states.unbind(dim=1)
    count, mean = pooled_mean(counts, means)
    return torch.stack([count, mean, (deviations + counts * (means - mean).square()).sum(dim=0)])


def standard_error(state: Tensor) -> Tensor:
    """Compute the standard error of each mean from count, mean and sum of squared deviations, of shape ``(3, k)``.

    It is NaN for fewer than two values.
    """
    count, _, deviations = state.unbind()
    return (deviations / (count - 1) / count).sqrt()


class Averages(NamedTuple):
    """Averages of several quantities over observations.

    Attributes:
        count: Number of observations, a scalar.
        mean: Mean of each quantity, of shape ``(columns,)``.
        standard_error: Standard error of each mean, from the spread over the observations, of the same shape.
    """

    count: Tensor  # type: ignore[assignment]  # hides `tuple.count`, which is not needed
    mean: Tensor
    standard_error: Tensor


class RunningMoments(Metric):
    """Average several quantities over observations, with the standard error of each average.

    As input to ``forward`` and ``update`` the metric accepts ``values`` of shape ``(N, columns)``, one row for each
    observation; N may be 0. As output of ``forward`` and ``compute`` it returns :class:`Averages`.

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
        check_number("columns", columns, "at least 1", integer_from(1))
        self.columns = columns
        # One packed state: torchmetrics merges each state separately, but the mean and the deviations need the counts.
        self.add_state("state", torch.zeros(3, columns, dtype=torch.float64), dist_reduce_fx=merge_moments)

    def update(self, values: Tensor) -> None:
        """Add the rows of a batch."""
        check_rows(self.columns, values=values)
        self.state = merge_moments(torch.stack([self.state, moments(values.detach())]))

    def compute(self) -> Averages:
        """Return the averages."""
        return Averages(self.state[0, 0], self.state[1].clone(), standard_error(self.state))
