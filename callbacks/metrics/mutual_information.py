"""Mutual information between data and latents, from the posteriors of some observations."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import Normal

from ..reading.kl_rates import kl_per_dimension
from ..schedules import check_number, integer_from
from .running_moments import check_rows

# Unlikely to be a seed of the data: the same noise in data and samples would look like information.
SEED = 0x5EED
_NUMBERS = 2**22  # whitened numbers at a time, of Gaussians with full covariances
_ROWS = 64  # rows of the matrix at a time: they stay in the processor's cache, which is three times as fast


def mutual_information(mean: Tensor, variance: Tensor, seed: int = SEED) -> Tensor:
    r"""Estimate the mutual information of data and latents from M diagonal Gaussian posteriors.

    .. math::
        I = \frac{1}{M} \sum_n \left[ \log q(z_n|x_n) - \log \frac{1}{M} \sum_m q(z_n|x_m) \right],
        \qquad z_n \sim q(z|x_n)

    Both terms use the same sample, and the mixture includes the sample's own component. So the estimate is 0 if all
    posteriors are equal, is on average a lower bound on the true value, and is at most about :math:`\log M`. Above
    :math:`0.9 \log M`, read it as "at least". Part of the sampling noise is removed: see
    :meth:`PosteriorSample.average`. Where noise would make the estimate negative, it is 0.

    Both the detector's ``latent/mutual_information`` and the evaluation's ``mutual_information`` are this estimate.

    The noise is drawn on the CPU from a separate generator: the result is deterministic and the same on any device.

    Args:
        mean: Means of the posteriors, of shape ``(M, k)``.
        variance: Their variances, of shape ``(M, k)``.
        seed: Seed of the noise.

    Returns:
        The estimate in nats, float64; NaN if M is 0.

    Raises:
        ValueError: If the shapes are not these, or a variance is not positive.

    References:
        Hoffman, Johnson, "ELBO surgery: yet another way to carve up the variational evidence lower bound", 2016.
        Poole et al., "On Variational Bounds of Mutual Information", 2019, section 2.

    Example::

        >>> mutual_information(torch.tensor([[-9.0], [9.0]]), torch.ones(2, 1))  # log 2
        tensor(0.6931, dtype=torch.float64)
    """
    if not (variance > 0).all():
        raise ValueError(f"`variance` must be positive, got values down to {float(variance.min()):.4g}.")
    sample = PosteriorSample.draw(mean, variance, seed)
    return sample.information(sample.log_mixture())


class PosteriorSample(NamedTuple):
    r"""One sample :math:`z_n \sim q(z|x_n)` of each of M Gaussian posteriors, all in float64.

    Log-densities leave out the constant :math:`-\tfrac{k}{2} \log 2 \pi`, which all of them share.

    Attributes:
        z: The samples, of shape ``(M, k)``.
        mean: Means of the posteriors, of shape ``(M, k)``.
        variance: Their variances, of shape ``(M, k)``.
        log_own: ``log q(z_n|x_n)``, of shape ``(M,)``.
        rates: KL divergence of each posterior from N(0, I), of shape ``(M,)``.
        factor: The Cholesky factor of each covariance, of shape ``(M, k, k)``; ``None`` if all are diagonal.
    """

    z: Tensor
    mean: Tensor
    variance: Tensor
    log_own: Tensor
    rates: Tensor
    factor: Tensor | None = None

    @classmethod
    def draw(cls, mean: Tensor, variance: Tensor, seed: int = SEED) -> PosteriorSample:
        """Draw the samples of diagonal Gaussians from a separate generator, on the CPU.

        Raises:
            ValueError: If ``mean`` and ``variance`` do not have the same shape ``(M, k)``, or the seed is no integer.
        """
        check_rows(mean=mean, variance=variance)
        noise, mean, variance = _noise(mean, seed), mean.double(), variance.double()
        log_own = -0.5 * (noise.square() + variance.log()).sum(dim=1)
        scale = variance.sqrt()
        rates = kl_per_dimension(Normal(mean, scale, validate_args=False), Normal(0.0, 1.0)).sum(dim=1)
        return cls(mean + scale * noise, mean, variance, log_own, rates)

    @classmethod
    def draw_joint(cls, mean: Tensor, factor: Tensor, seed: int = SEED) -> PosteriorSample:
        """Draw the samples of Gaussians with full covariances, given their Cholesky factors, likewise.

        Raises:
            ValueError: If the factors do not have shape ``(M, k, k)``, are not lower triangular, or have a diagonal
                that is not positive; or the seed is no integer.
        """
        check_rows(mean=mean)
        shape = (*mean.shape, mean.shape[1])
        if factor.shape != shape or not (factor == factor.tril()).all() or not (_diagonal(factor) > 0).all():
            raise ValueError(
                f"`scale_tril` must be lower triangular factors of shape {shape} with positive diagonals, as those of "
                f"a MultivariateNormal, got others or shape {tuple(factor.shape)}."
            )
        noise, mean, factor = _noise(mean, seed), mean.double(), factor.double()
        log_scale = _diagonal(factor).log().sum(dim=1)
        variance = factor.square().sum(dim=2)
        rates = 0.5 * (variance + mean.square() - 1).sum(dim=1) - log_scale
        z = mean + (factor @ noise[..., None]).squeeze(-1)
        return cls(z, mean, variance, -0.5 * noise.square().sum(dim=1) - log_scale, rates, factor)

    def log_mixture(self, leave_one_out: bool = False) -> Tensor:
        r"""Compute :math:`\log \frac1M \sum_m q(z_n|x_m)`.

        Args:
            leave_one_out: Leave the sample's own component out, and average over the other M - 1.

        Returns:
            Of shape ``(M,)``.
        """
        (count, k), centre = self.z.shape, self.mean.mean(dim=0)
        mean, z = self.mean - centre, self.z - centre
        if self.factor is None:
            densities, at_once = _diagonal_densities(mean, self.variance), _ROWS
        else:
            densities, at_once = _joint_densities(mean, self.factor), max(1, _NUMBERS // max(count * k, 1))
        log_own = torch.full_like(self.log_own, -math.inf) if leave_one_out else self.log_own
        results = []
        for first in range(0, max(count, 1), at_once):
            rows = slice(first, first + at_once)
            joint = densities(z[rows])  # [n, m]: log q(z_n|x_m)
            joint.diagonal(first).copy_(log_own[rows])
            results.append(joint.logsumexp(dim=1))
        return torch.cat(results) - math.log(max(count - leave_one_out, 1))

    def information(self, log_mixture: Tensor) -> Tensor:
        r"""Average :math:`\log q(z_n|x_n) - \log q(z_n)`, with the log-density of the mixture, of shape ``(M,)``.

        An information is never negative, so an average that is, by sampling noise, is returned as 0.
        """
        self._check(log_mixture)
        return self.average(self.log_own - log_mixture).clamp(min=0)

    def average(self, terms: Tensor) -> Tensor:
        r"""Average terms of the samples, with less noise than in their plain mean.

        :math:`\log q(z_n|x_n) - \log p(z_n)`, p standard normal, has a known mean, the rate. Its sampling error is
        removed from the terms by regression (a control variate). If q(z) is p(z), no noise is left in the mutual
        information.

        Args:
            terms: One for each sample, of shape ``(M,)``.

        Returns:
            A scalar.

        Raises:
            ValueError: If the terms have another shape.
        """
        self._check(terms)
        return controlled_mean(terms, self.log_own + 0.5 * self.z.square().sum(dim=1) - self.rates)

    def _check(self, terms: Tensor) -> None:
        if terms.shape != self.log_own.shape:
            raise ValueError(
                f"There must be a term for each of the {len(self.log_own)} samples, got shape {tuple(terms.shape)}."
            )


def _noise(mean: Tensor, seed: int) -> Tensor:
    check_number("seed", seed, "an integer", integer_from())
    noise = torch.randn(mean.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return noise.to(mean.device)


def _diagonal(matrices: Tensor) -> Tensor:
    return matrices.diagonal(dim1=1, dim2=2)


def _diagonal_densities(mean: Tensor, variance: Tensor) -> Callable[[Tensor], Tensor]:
    """Return the log-densities of M Gaussians as a function of points: from ``(n, k)`` to ``(n, M)``."""
    # (z - m)^2 / v is the sum of z^2 / v, -2 z m / v and m^2 / v, which makes the densities a product of matrices.
    # In double precision nothing is lost near the origin, to which all are shifted alike.
    precision = 1 / variance
    slopes = torch.cat([-0.5 * precision, mean * precision], dim=1).T
    offset = -0.5 * (mean.square() * precision + variance.log()).sum(dim=1)
    return lambda z: torch.addmm(offset, torch.cat([z.square(), z], dim=1), slopes)


def _joint_densities(mean: Tensor, factor: Tensor) -> Callable[[Tensor], Tensor]:
    """Return the same of Gaussians with full covariances."""
    # Whitened by the inverse factors, which are as well conditioned as the factors; precisions are not.
    count, k = mean.shape
    unit = torch.eye(k, dtype=mean.dtype, device=mean.device).expand(count, k, k)
    inverse = torch.linalg.solve_triangular(factor, unit, upper=False)
    shift, stacked = (inverse @ mean[..., None]).flatten(), inverse.flatten(0, 1).T
    log_scale = _diagonal(factor).log().sum(dim=1)
    return lambda z: -0.5 * (z @ stacked - shift).view(len(z), count, k).square().sum(dim=2) - log_scale


def tenths(count: int, device: torch.device) -> Iterator[Tensor]:
    """Yield a mask of each tenth of M observations, which is tried on what the others were fitted to."""
    place = torch.arange(count, device=device)
    for fold in range(min(10, count)):
        yield place % 10 == fold


def controlled_mean(terms: Tensor, control: Tensor) -> Tensor:
    """Average terms with less noise than in their plain mean: what a control variate explains of them is removed.

    Args:
        terms: One for each sample, of shape ``(M,)``.
        control: A quantity of each sample whose expectation is 0, of shape ``(M,)``.

    Returns:
        A scalar.
    """
    power = control.square().sum()
    slope = ((terms - terms.mean()) @ control) / power if power > 0 else power
    return (terms - slope * control).mean()
