"""What the moments of the aggregate posterior say of its distance from the prior and of its dependences."""

from __future__ import annotations

import torch
from torch import Tensor

from .aggregate_posterior import aggregate_moments

_FOLDS = 10


def moment_marginal_kl(mean: Tensor, covariance: Tensor) -> Tensor:
    r"""Compute a lower bound of the marginal KL, :math:`KL(q(z) \| p(z))`, from the moments of q(z).

    .. math::
        KL(N(m, C) \,\|\, N(0, I)) = \tfrac12 \left( \operatorname{tr} C + m^T m - k - \log\det C \right)

    Among all q(z) with these moments the Gaussian is nearest to p(z). The bound is deterministic and has no cap.

    Args:
        mean: Mean m of q(z), of shape ``(k,)``.
        covariance: Covariance C of q(z), of shape ``(k, k)``.

    Returns:
        Nats, a scalar, float64.
    """
    mean, covariance = mean.double(), covariance.double()
    excess = covariance.diagonal().sum() + mean.square().sum() - len(mean)
    divergence: Tensor = 0.5 * (excess - torch.linalg.slogdet(covariance).logabsdet)
    return divergence.clamp(min=0)


def cross_fitted_marginal_kl(mean: Tensor, variance: Tensor) -> Tensor:
    r"""Estimate a lower bound of the marginal KL by moments that were not fitted to what they are tried on.

    .. math::
        KL(q \| p) \ge E_{z \sim q} [\log r(z) - \log p(z)]

    for any density r, here the Gaussian with the moments of nine tenths of the observations, tried on the last tenth;
    the mean over the ten. :func:`moment_marginal_kl` of the moments of M observations is too large by about
    :math:`k (k + 3) / 4 M`, whole nats where k is 64 and M some hundreds; this is too small by about as much.

    Args:
        mean: Means of the posteriors, of shape ``(M, k)``.
        variance: Their variances, of shape ``(M, k)``.

    Returns:
        Nats, at least 0, a scalar, float64.
    """
    mean, variance = mean.double(), variance.double()
    place = torch.arange(len(mean), device=mean.device)
    total = mean.new_zeros(())
    for fold in range(min(_FOLDS, len(mean))):
        tried = place % _FOLDS == fold
        fitted, other = (aggregate_moments(mean[part], variance[part]) for part in (~tried, tried))
        shift = other.mean - fitted.mean
        second = other.covariance + shift.outer(shift)
        log_r = -0.5 * (torch.linalg.slogdet(fitted.covariance).logabsdet
                        + torch.linalg.solve(fitted.covariance, second).diagonal().sum())  # fmt: skip
        log_p = -0.5 * (other.covariance.diagonal().sum() + other.mean.square().sum())
        total += (log_r - log_p) * tried.sum()
    return (total / len(mean)).clamp(min=0)


def gaussian_total_correlation(covariance: Tensor) -> Tensor:
    r"""Compute the total correlation of a Gaussian, :math:`-\tfrac12 \log\det` of its correlation matrix.

    Args:
        covariance: Of shape ``(k, k)``.

    Returns:
        Nats, a scalar, float64.
    """
    covariance = covariance.double()
    correlation: Tensor = 0.5 * (covariance.diagonal().log().sum() - torch.linalg.slogdet(covariance).logabsdet)
    return correlation.clamp(min=0)
