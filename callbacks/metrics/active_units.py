"""Active units: the number of latent dimensions that carry information about the data."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from ..schedules import at_least, check_number, integer_from
from .running_moments import check_rows, merge_moments, moments

ACTIVE = 0.01
"""Variance of the posterior mean that an active dimension exceeds (Burda et al. 2015, section 5.2)."""


def is_active(variance_of_means: Tensor, threshold: float = ACTIVE) -> Tensor:
    """Return a mask of the active dimensions: those whose posterior mean's variance over the data exceeds a threshold.

    Args:
        variance_of_means: Variance over the data of each dimension's posterior mean, of shape ``(k,)``.
        threshold: Variance that an active dimension exceeds.

    Returns:
        Bool, of shape ``(k,)``.

    Raises:
        ValueError: If the threshold is negative.

    References:
        Burda, Grosse, Salakhutdinov, "Importance Weighted Autoencoders", 2015, section 5.2.
    """
    check_number("threshold", threshold, "a finite number of at least 0", at_least(0))
    return variance_of_means > threshold


def variance_of_means(means: Tensor) -> Tensor:
    r"""Compute the variance over the data of each dimension's posterior mean.

    .. math:: A_j = \operatorname{Var}_x \left( E_{q(z|x)}[z_j] \right)

    It is the population variance (divided by N), in float64.

    Args:
        means: Posterior means, of shape ``(N, k)``.

    Returns:
        The variances, of shape ``(k,)``.

    Raises:
        ValueError: If the means have another shape, or there are none.
    """
    check_rows(means=means)
    if not len(means):
        raise ValueError(f"A variance over the data needs observations, got `means` of shape {tuple(means.shape)}.")
    return means.double().var(dim=0, correction=0)


def active_units(means: Tensor, threshold: float = ACTIVE) -> Tensor:
    """Count the active units of a set of posterior means.

    A latent dimension is active if the variance of its posterior mean over the data is larger than ``threshold``.

    Args:
        means: Posterior means, of shape ``(N, k)``.
        threshold: Variance that an active dimension exceeds.

    Returns:
        The number of active dimensions.

    Raises:
        ValueError: If the means have another shape, there are none, or some are not finite.

    References:
        Burda, Grosse, Salakhutdinov, "Importance Weighted Autoencoders", 2015, section 5.2.

    Example::

        >>> active_units(torch.tensor([[-1.0, 5.0], [1.0, 5.0]]))
        tensor(1)
    """
    variance = variance_of_means(means)
    if not variance.isfinite().all():
        raise ValueError("`means` must be finite, but some are not. A NaN would count as an inactive unit.")
    return is_active(variance, threshold).sum()


class ActiveUnits(Metric):
    """Count the active units over a stream of batches, in constant memory, exactly over any number of processes.

    A latent dimension is active if the variance of its posterior mean over the data is larger than ``threshold``
    (Burda et al. 2015). The moments are float64 and merged rather than summed: see
    :func:`~.running_moments.merge_moments`.

    As input to ``forward`` and ``update`` the metric accepts posterior means of shape ``(N, dim)``; N may be 0.
    As output of ``forward`` and ``compute`` it returns the number of active dimensions.

    Args:
        dim: Number of latent dimensions.
        threshold: Variance that an active dimension exceeds.
        kwargs: Options of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If ``dim`` is not positive, ``threshold`` is negative, or means of another shape arrive.

    Example::

        >>> metric = ActiveUnits(dim=2)
        >>> metric.update(torch.tensor([[-1.0, 5.0]]))
        >>> metric.update(torch.tensor([[1.0, 5.0]]))
        >>> metric.compute()
        tensor(1)
        >>> metric.variance
        tensor([1., 0.], dtype=torch.float64)
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False

    moments: Tensor

    def __init__(self, dim: int, threshold: float = ACTIVE, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_number("dim", dim, "at least 1", integer_from(1))
        check_number("threshold", threshold, "a finite number of at least 0", at_least(0))
        self.dim = dim
        self.threshold = threshold
        # One packed state: torchmetrics merges each state separately, but the mean and the deviations need the counts.
        self.add_state("moments", torch.zeros(3, dim, dtype=torch.float64), dist_reduce_fx=merge_moments)

    @property
    def count(self) -> Tensor:
        """Number of observations so far."""
        return self.moments[0, 0]

    @property
    def variance(self) -> Tensor:
        """Variance of each dimension's posterior mean over the observations so far, of shape ``(dim,)``."""
        return self.moments[2] / self.moments[0].clamp(min=1)

    def update(self, means: Tensor) -> None:
        """Add the posterior means of a batch."""
        check_rows(self.dim, means=means)
        self.moments = merge_moments(torch.stack([self.moments, moments(means.detach())]))

    def compute(self) -> Tensor:
        """Count the active dimensions."""
        return is_active(self.variance, self.threshold).sum()
