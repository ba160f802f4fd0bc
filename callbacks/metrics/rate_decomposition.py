"""The two parts of the rate: the mutual information of data and latents, and the marginal KL."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .active_units import variance_of_means
from .aggregate_posterior import aggregate_covariance
from .categorical import categorical_mutual_information, information_bound_of_groups
from .mutual_information import PosteriorSample, tenths
from .running_moments import check_posteriors

_SATURATED = 0.9  # of log M


class RateDecomposition(NamedTuple):
    """The rate's two parts, in nats.

    Attributes:
        mutual_information: Estimate of the mutual information of x and z that is a lower bound on average and at most
            log M.
        marginal_kl: KL(q(z) || p(z)); see :func:`decompose_rate`.
        saturated: Whether the mutual information is so near its cap, log M, that it only says "at least".
    """

    mutual_information: Tensor
    marginal_kl: Tensor
    saturated: bool


def decompose_rate(sample: PosteriorSample, log_mixture: Tensor, rates: Tensor | None = None) -> RateDecomposition:
    r"""Decompose the rate of M Gaussian posteriors into mutual information and marginal KL.

    .. math:: E_x KL(q(z|x) \| p(z)) = I(x; z) + KL(q(z) \| p(z))

    The marginal KL is the rate less the mutual information, and 0 where sampling noise makes that negative. If the
    mutual information is saturated, the difference is too large, and the marginal KL is a lower bound from the moments
    of q(z): the rate less an upper bound of the mutual information, which depends on no prior,

    .. math:: I(x; z) \le E_x KL(q(z|x) \| N(0, I)) - \text{cross-fitted } KL(N(m, C) \| N(0, I))

    Under N(0, I) it is :func:`cross_fitted_marginal_kl`.

    Both the detector's ``latent/marginal_kl`` and the evaluation's ``marginal_kl`` are this number.

    Args:
        sample: A sample of each posterior.
        log_mixture: Their :meth:`PosteriorSample.log_mixture`.
        rates: KL divergence of each posterior from the model's prior, or its estimate, in nats, of shape ``(M,)``; NaN
            if it is not known. ``None`` means the prior N(0, I).

    Raises:
        ValueError: If there is not one number for each sample.

    References:
        Hoffman, Johnson, "ELBO surgery: yet another way to carve up the variational evidence lower bound", 2016.
    """
    if rates is not None and rates.shape != sample.rates.shape:
        raise ValueError(
            f"`rates` must have a rate for each of the {len(sample.z)} samples, got shape {tuple(rates.shape)}."
        )
    information = sample.information(log_mixture)
    saturated = is_saturated(float(information), len(sample.z))
    at_most = information_bound(sample) if saturated else information
    rate = (sample.rates if rates is None else rates).mean()
    return RateDecomposition(information, (rate - at_most).clamp(min=0), saturated)


def decompose_categorical_rate(probs: Tensor, rates: Tensor) -> RateDecomposition:
    """Decompose the rate of M categorical posteriors as :func:`decompose_rate` does that of Gaussian ones.

    If the mutual information is saturated, its upper bound is
    :func:`~.categorical.information_bound_of_groups`.

    Args:
        probs: Probabilities of the posteriors, of shape ``(M, groups, classes)``.
        rates: KL divergence of each posterior from the prior, in nats, of shape ``(M,)``; NaN if it is not known.

    Raises:
        ValueError: If there is not one rate for each posterior.
    """
    if rates.shape != probs.shape[:1]:
        raise ValueError(
            f"`rates` must have a rate for each of the {len(probs)} posteriors, got shape {tuple(rates.shape)}."
        )
    information = categorical_mutual_information(probs).mutual_information
    saturated = is_saturated(float(information), len(probs))
    at_most = information_bound_of_groups(probs) if saturated else information
    return RateDecomposition(information, (rates.double().mean() - at_most).clamp(min=0), saturated)


def information_bound(sample: PosteriorSample) -> Tensor:
    """Estimate an upper bound on the mutual information, in nats, from the moments of q(z) alone."""
    return sample.rates.mean() - _cross_fitted_marginal_kl(sample.mean, sample.variance, sample.factor)


def is_saturated(information: float, observations: int) -> bool:
    """Return whether a mutual information estimated from M observations exceeds 90 % of its cap, log M."""
    return information > _SATURATED * math.log(max(observations, 1))


def cross_fitted_marginal_kl(mean: Tensor, variance: Tensor) -> Tensor:
    r"""Estimate a lower bound on the marginal KL with moments that are fitted and tested on different observations.

    .. math::
        KL(q \| p) \ge E_{z \sim q} [\log r(z) - \log p(z)]

    for any density r, with p standard normal. Here r is the Gaussian with the moments of nine tenths of the
    observations, tested on the last tenth, and the result is the mean over the ten folds. The KL of a Gaussian with the
    moments of all M observations is too large by about :math:`k (k + 3) / 4 M`, which is several nats if k is 64 and M
    a few hundred; this estimate is too small by about as much. With more dimensions than observations r is diagonal:
    a full covariance would be fitted to too few observations, and slow.

    Args:
        mean: Means of the posteriors, of shape ``(M, k)``.
        variance: Their variances, of shape ``(M, k)``.

    Returns:
        Nats, at least 0, a scalar, float64.

    Raises:
        ValueError: If the shapes are not these, there are fewer than two posteriors, or a variance is negative.
    """
    check_posteriors(mean, variance, least=2)
    return _cross_fitted_marginal_kl(mean.double(), variance.double())


def _cross_fitted_marginal_kl(mean: Tensor, variance: Tensor, factor: Tensor | None = None) -> Tensor:
    is_diagonal = mean.shape[1] > len(mean)
    total = mean.new_zeros(())
    for tried in tenths(len(mean), mean.device):
        of_prior = 0.5 * (mean[tried].square() + variance[tried]).sum()
        if is_diagonal:
            of_fit = _diagonal_cross_entropy(mean[~tried], variance[~tried], mean[tried], variance[tried])
        else:
            fitted, test = (
                aggregate_covariance(mean[part], variance[part], None if factor is None else factor[part])
                for part in (~tried, tried)
            )
            of_fit = _cross_entropy(fitted, test, mean[tried].mean(dim=0) - mean[~tried].mean(dim=0))
        total += of_prior - of_fit * tried.sum()
    return (total / len(mean)).clamp(min=0)


def _cross_entropy(covariance: Tensor, own: Tensor, shift: Tensor) -> Tensor:
    """Compute E_q[-log r], r the Gaussian with the moments of the fitted posteriors, without its constant."""
    square = torch.linalg.solve(covariance, own + shift.outer(shift)).diagonal().sum()
    entropy: Tensor = 0.5 * (torch.linalg.slogdet(covariance).logabsdet + square)
    return entropy


def _diagonal_cross_entropy(fitted: Tensor, fitted_variance: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """Compute the same of a diagonal r."""
    spread = variance_of_means(fitted) + fitted_variance.mean(dim=0)
    second = (mean - fitted.mean(dim=0)).square().mean(dim=0) + variance.mean(dim=0)
    return 0.5 * (spread.log() + second / spread).sum()
