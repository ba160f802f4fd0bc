"""The aggregate posterior q(z) = E_x q(z|x), by its first two moments."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from ..schedules import check_number, integer_from
from .active_units import ACTIVE, is_active
from .running_moments import check_posteriors, check_rows, pooled_mean


class AggregateMoments:
    """First two moments of the aggregate posterior q(z) = E_x q(z|x), and the parts of its covariance.

    Attributes:
        mean: Of shape ``(k,)``.
        covariance_of_means: Covariance over the data of the posterior means, of shape ``(k, k)``. Its diagonal
            determines the active units.
        posterior_variance: Mean over the data of the posterior variances, of shape ``(k,)``.
    """

    # Neither a tuple nor a dataclass: torchmetrics would squeeze their one-element tensors if k is 1.
    def __init__(self, mean: Tensor, covariance_of_means: Tensor, posterior_variance: Tensor) -> None:
        self.mean = mean
        self.covariance_of_means = covariance_of_means
        self.posterior_variance = posterior_variance

    @property
    def covariance(self) -> Tensor:
        """Covariance of q(z), of shape ``(k, k)``."""
        return self.covariance_of_means + self.posterior_variance.diag()

    @property
    def variance_of_means(self) -> Tensor:
        """Variance over the data of each dimension's posterior mean, of shape ``(k,)``."""
        return self.covariance_of_means.diagonal()

    def active(self, threshold: float = ACTIVE) -> Tensor:
        """Return a mask of the active dimensions (Burda et al. 2015), bool, of shape ``(k,)``."""
        return is_active(self.variance_of_means, threshold)


def aggregate_moments(mean: Tensor, variance: Tensor) -> AggregateMoments:
    """Compute the moments of the aggregate posterior.

    Args:
        mean: Means of the posteriors, of shape ``(N, k)``.
        variance: Their variances, of shape ``(N, k)``.

    Raises:
        ValueError: If the shapes are not these, there are no posteriors, or a variance is negative.
    """
    check_posteriors(mean, variance)
    return _unpacked(_moments(mean, variance))


def aggregate_covariance(mean: Tensor, variance: Tensor, factor: Tensor | None = None) -> Tensor:
    """Compute the covariance of the aggregate posterior: that of the means, and the mean of the posteriors' own.

    Args:
        mean: Means of the posteriors, of shape ``(N, k)``.
        variance: Their variances, of shape ``(N, k)``.
        factor: The Cholesky factors of their covariances, of shape ``(N, k, k)``; ``None`` if these are diagonal.

    Returns:
        Of shape ``(k, k)``.
    """
    centred = mean - mean.mean(dim=0)
    within = variance.mean(dim=0).diag() if factor is None else torch.einsum("nij,nkj->ik", factor, factor) / len(mean)
    return centred.T @ centred / len(mean) + within


class AggregatePosterior(Metric):
    """Collect the moments of the aggregate posterior over a stream of batches.

    As input to ``forward`` and ``update`` the metric accepts ``mean`` and ``variance`` of the posteriors, of shape
    ``(N, dim)``; N may be 0. As output of ``forward`` and ``compute`` it returns :class:`AggregateMoments`.

    Args:
        dim: Number of latent dimensions.
        kwargs: Options of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If ``dim`` is not positive, or posteriors of another shape arrive.
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False

    state: Tensor

    def __init__(self, dim: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_number("dim", dim, "at least 1", integer_from(1))
        self.dim = dim
        empty = torch.zeros(dim + 3, dim, dtype=torch.float64)
        self.add_state("state", empty, dist_reduce_fx=merge_aggregates)

    def update(self, mean: Tensor, variance: Tensor) -> None:
        """Add the posteriors of a batch."""
        check_rows(self.dim, mean=mean, variance=variance)
        self.state = merge_aggregates(torch.stack([self.state, _moments(mean.detach(), variance.detach())]))

    def compute(self) -> AggregateMoments:
        """Return the moments."""
        return _unpacked(self.state)


def merge_aggregates(states: Tensor) -> Tensor:
    r"""Merge counts, means, mean variances and co-deviations of several sets of posteriors.

    .. math:: S = \sum_i S_i + \sum_i n_i (m_i - m)(m_i - m)^T

    Args:
        states: For each set, of shape ``(sets, 3 + k, k)``: count, mean, mean variance, and the sum S of products of
            deviations of the means. Empty sets are fine.

    Returns:
        The same for the union, of shape ``(3 + k, k)``.

    References:
        Chan, Golub and LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances", 1979.
    """
    counts, means, variances = states[:, 0], states[:, 1], states[:, 2]
    count, mean = pooled_mean(counts, means)
    _, variance = pooled_mean(counts, variances)
    shift = means - mean
    products = states[:, 3:].sum(dim=0) + (counts * shift).T @ shift
    return torch.cat([torch.stack([count, mean, variance]), products])


def _moments(mean: Tensor, variance: Tensor) -> Tensor:
    mean, variance = mean.double(), variance.double()
    number = max(len(mean), 1)
    centre = mean.sum(dim=0) / number
    products = (mean - centre).T @ (mean - centre)
    count = torch.full_like(centre, len(mean))
    return torch.cat([torch.stack([count, centre, variance.sum(dim=0) / number]), products])


def _unpacked(state: Tensor) -> AggregateMoments:
    count, mean, variance = state[:3]
    return AggregateMoments(mean, state[3:] / count.clamp(min=1), variance)
