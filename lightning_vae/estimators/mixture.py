"""The aggregate posterior as the mixture of M posteriors: mutual information, marginal KL, total correlation."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..callbacks.metrics.aggregate_posterior import aggregate_covariance
from ..callbacks.metrics.categorical import (
    information_bound_of_groups,
    information_of_groups,
    leave_one_out_information,
)
from ..callbacks.metrics.mutual_information import SEED, PosteriorSample
from ..callbacks.metrics.rate_decomposition import (
    decompose_categorical_rate,
    decompose_rate,
    information_bound,
    is_saturated,
)
from .closed_forms import gaussian_total_correlation

_AT_ONCE = 2**20  # pairs of observations


class MixtureEstimates(NamedTuple):
    """Estimates from M posteriors: the information in z and the shape of q(z), in nats.

    Attributes:
        lower: Estimate of the mutual information of x and z that is a lower bound on average and at most log M.
        upper_leave_one_out: Upper bound on average, without the sample's own component in the mixture. Far too large
            if posteriors hardly overlap, and infinite if categories don't.
        upper_moments: Upper bound from the moments of q(z); of categories from each group's usage of its classes. Not
            capped by M.
        rate: Mean KL of those posteriors to the prior.
        marginal_kl: KL(q(z) || p(z)), the rate minus the lower estimate. If that is saturated, a lower bound: the rate
            minus ``upper_moments``.
        total_correlation: KL(q(z) || prod_j q(z_j)), of categories among their groups. If the mutual information is
            saturated, that of the Gaussian with the moments of q(z), and NaN of categories.
        observations: Number of posteriors M.
    """

    lower: Tensor
    upper_leave_one_out: Tensor
    upper_moments: Tensor
    rate: Tensor
    marginal_kl: Tensor
    total_correlation: Tensor
    observations: int

    @property
    def upper(self) -> Tensor:
        """The tighter upper bound; near the cap the one from the moments, as equal observations also cap the other.

        It is never below the lower bound: only sampling noise could make the two cross.
        """
        capped = is_saturated(float(self.upper_leave_one_out), self.observations)
        upper = self.upper_moments if capped else torch.minimum(self.upper_leave_one_out, self.upper_moments)
        return torch.maximum(self.lower, upper)

    @property
    def saturated(self) -> bool:
        """Return whether the lower bound is so close to its cap, log M, that it only means "at least"."""
        return is_saturated(float(self.lower), self.observations)


def mixture_estimates(
    mean: Tensor,
    variance: Tensor | None = None,
    seed: int = SEED,
    rates: Tensor | None = None,
    scale_tril: Tensor | None = None,
) -> MixtureEstimates:
    r"""Estimate mutual information, marginal KL and total correlation from M Gaussian posteriors.

    With one sample :math:`z_n \sim q(z|x_n)` of each:

    .. math::
        I_{lower} &= \frac1M \sum_n \left[ \log q(z_n|x_n) - \log \frac1M \sum_m q(z_n|x_m) \right] \\
        I_{upper} &= \frac1M \sum_n \left[ \log q(z_n|x_n) - \log \frac1{M-1} \sum_{m \ne n} q(z_n|x_m) \right] \\
        I_{moments} &= E_x KL(q(z|x) \| N(0, I)) - \text{cross-fitted } KL(N(m, C) \| N(0, I)) \\
        TC &= \frac1M \sum_n \left[ \log \frac1M \sum_m q(z_n|x_m)
              - \sum_j \log \frac1M \sum_m q(z_{nj}|x_m) \right]

    The information depends on no prior, so each bound holds under any. An estimate that noise would make negative is 0.
    Every term uses the same sample, so the lower bound is 0 if all posteriors are equal. It is
    :func:`~lightning_vae.callbacks.mutual_information`. That and the marginal KL are the numbers that
    ``CollapseDetector`` logs. A control variate removes part of the noise from every estimate.

    Args:
        mean: Means of the posteriors, of shape ``(M, k)``, M at least 2.
        variance: Their variances, of shape ``(M, k)``, if they are diagonal.
        seed: Seed of the samples, which are drawn on the CPU.
        rates: Rate of each posterior under a prior other than N(0, I), in nats, of shape ``(M,)``.
        scale_tril: Cholesky factors of their covariances instead, lower triangular, of shape ``(M, k, k)``, as those of
            a ``MultivariateNormal``.

    Raises:
        ValueError: If there are fewer than two posteriors, the shapes are not these, a variance is not positive, or a
            factor not lower triangular with a positive diagonal.

    References:
        Hoffman and Johnson, "ELBO surgery", 2016; Poole et al., "On Variational Bounds of Mutual Information", ICML
        2019, for the two sample bounds; Chen et al., "Isolating Sources of Disentanglement", NeurIPS 2018, for the
        total correlation, here over all pairs of the M observations instead of a minibatch.

    Example::

        >>> estimates = mixture_estimates(torch.tensor([[-9.0], [9.0]]), torch.ones(2, 1))
        >>> estimates.lower, estimates.saturated  # log 2
        (tensor(0.6931, dtype=torch.float64), True)
    """
    if (variance is None) == (scale_tril is None):
        raise ValueError("`variance` must be given, or `scale_tril` in its place, and not both.")
    if mean.ndim != 2 or len(mean) < 2 or (variance is not None and mean.shape != variance.shape):
        raise ValueError(
            f"`mean` and `variance` must both have shape (M, k) with M at least 2, got {tuple(mean.shape)} and "
            f"{None if variance is None else tuple(variance.shape)}."
        )
    if scale_tril is not None:
        sample = PosteriorSample.draw_joint(mean, scale_tril, seed)
    else:
        assert variance is not None
        if not (variance > 0).all():
            raise ValueError(f"`variance` must be positive, got values down to {float(variance.min()):.4g}.")
        sample = PosteriorSample.draw(mean, variance, seed)
    log_mixture = sample.log_mixture()
    lower, marginal_kl, saturated = decompose_rate(sample, log_mixture, rates)
    rate = (sample.rates if rates is None else rates).mean()
    if saturated:
        total_correlation = gaussian_total_correlation(
            aggregate_covariance(sample.mean, sample.variance, sample.factor)
        )
    else:
        total_correlation = sample.average(log_mixture - _log_marginals(sample)).clamp(min=0)
    return MixtureEstimates(
        lower=lower,
        upper_leave_one_out=sample.information(sample.log_mixture(leave_one_out=True)),
        upper_moments=information_bound(sample),
        rate=rate,
        marginal_kl=marginal_kl,
        total_correlation=total_correlation,
        observations=len(mean),
    )


def categorical_estimates(probs: Tensor, rates: Tensor) -> MixtureEstimates:
    r"""Estimate mutual information, marginal KL and total correlation from M posteriors over groups of categories.

    .. math:: TC = \sum_g I(x; z_g) - I(x; z)

    The lower bound is :func:`~lightning_vae.callbacks.categorical_mutual_information`: exact for the M observations
    up to 4096 joint classes. That and the marginal KL are the numbers that ``CollapseDetector`` logs.

    Args:
        probs: Probabilities of the posteriors, of shape ``(M, groups, classes)``, M at least 2.
        rates: Rate of each posterior, in nats, of shape ``(M,)``.

    Raises:
        ValueError: If the shapes are not these, there are fewer than two posteriors, or the values are not
            probabilities.

    Example::

        >>> estimates = categorical_estimates(torch.eye(2)[:, None], torch.full((2,), math.log(2)))
        >>> estimates.lower, estimates.marginal_kl  # log 2
        (tensor(0.6931, dtype=torch.float64), tensor(0., dtype=torch.float64))
    """
    if len(probs) < 2:
        raise ValueError(f"`probs` must have at least 2 rows, one for each posterior, got {len(probs)}.")
    lower, marginal_kl, saturated = decompose_categorical_rate(probs, rates)
    excess = information_of_groups(probs).sum() - lower
    return MixtureEstimates(
        lower=lower,
        upper_leave_one_out=leave_one_out_information(probs),
        upper_moments=information_bound_of_groups(probs),
        rate=rates.double().mean(),
        marginal_kl=marginal_kl,
        total_correlation=torch.full_like(excess, math.nan) if saturated else excess.clamp(min=0),
        observations=len(probs),
    )


def _log_marginals(sample: PosteriorSample) -> Tensor:
    """Compute the sum over j of log q(z_nj), q the mixture of all posteriors, without its constant, of shape (M,)."""
    number, k = sample.mean.shape
    mean, variance = sample.mean, sample.variance
    total = torch.zeros_like(sample.log_own)
    for chunk in torch.arange(number, device=mean.device).split(max(1, _AT_ONCE // number)):
        for j in range(k):
            each = -0.5 * ((sample.z[chunk, j, None] - mean[:, j]).square() / variance[:, j] + variance[:, j].log())
            total[chunk] += each.logsumexp(dim=1) - math.log(number)
    return total
