"""Mutual information between data and latents, from the posteriors of some observations."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..schedules import check_number, integer_from
from .running_moments import check_rows, variances_of

# Unlikely to be a seed of the data: the same noise in data and samples would look like information.
SEED = 0x5EED
_ROWS = 64  # rows of the matrix at a time: they stay in the processor's cache, which is three times as fast


def mutual_information(mean: Tensor, variance: Tensor, seed: int = SEED) -> Tensor:
    r"""Estimate the mutual information of data and latents from M Gaussian posteriors.

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
        variance: Their variances, of shape ``(M, k)``, or covariances, of shape ``(M, k, k)``.
        seed: Seed of the noise.

    Returns:
        The estimate in nats, float64; NaN if M is 0.

    Raises:
        ValueError: If the shapes are not these, or a variance is not positive or a covariance not positive definite.

    References:
        Hoffman, Johnson, "ELBO surgery: yet another way to carve up the variational evidence lower bound", 2016.
        Poole et al., "On Variational Bounds of Mutual Information", 2019, section 2.

    Example::

        >>> mutual_information(torch.tensor([[-9.0], [9.0]]), torch.ones(2, 1))  # log 2
        tensor(0.6931, dtype=torch.float64)
    """
    if not (variances_of(variance) > 0).all():
        raise ValueError(f"`variance` must be positive, got values down to {float(variances_of(variance).min()):.4g}.")
    sample = PosteriorSample.draw(mean, variance, seed)
    return sample.information(sample.log_mixture())


class PosteriorSample(NamedTuple):
    r"""One sample :math:`z_n \sim q(z|x_n)` of each of M Gaussian posteriors, all in float64.

    Log-densities leave out the constant :math:`-\tfrac{k}{2} \log 2 \pi`, which all of them share.

    Attributes:
        z: The samples, of shape ``(M, k)``.
        mean: Means of the posteriors, of shape ``(M, k)``.
        variance: Their variances, of shape ``(M, k)``, or covariances, of shape ``(M, k, k)``.
        precision: The inverse of each, of the same shape.
        log_determinant: Logarithm of each one's determinant, of shape ``(M,)``.
        log_own: ``log q(z_n|x_n)``, of shape ``(M,)``.
        rates: KL divergence of each posterior from N(0, I), of shape ``(M,)``.
    """

    z: Tensor
    mean: Tensor
    variance: Tensor
    precision: Tensor
    log_determinant: Tensor
    log_own: Tensor
    rates: Tensor

    @classmethod
    def draw(cls, mean: Tensor, variance: Tensor, seed: int = SEED) -> PosteriorSample:
        """Draw the samples from a separate generator, on the CPU.

        Raises:
            ValueError: If ``mean`` and ``variance`` have other shapes than these, a covariance is not positive
                definite, or the seed is no integer.
        """
        check_rows(mean=mean, variance=variances_of(variance))
        check_number("seed", seed, "an integer", integer_from())
        mean, variance = mean.double(), variance.double()
        noise = torch.randn(mean.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        noise = noise.to(mean.device)
        if variance.ndim == 2:
            precision, shift = 1 / variance, variance.sqrt() * noise
            log_determinant = variance.log().sum(dim=1)
        else:
            factor, failed = torch.linalg.cholesky_ex(variance)
            if failed.any():
                count = int(failed.count_nonzero())
                raise ValueError(f"`variance` must have positive definite covariances, but {count} are not.")
            precision, shift = torch.cholesky_inverse(factor), (factor @ noise[..., None]).squeeze(-1)
            log_determinant = 2 * factor.diagonal(dim1=1, dim2=2).log().sum(dim=1)
        log_own = -0.5 * (noise.square().sum(dim=1) + log_determinant)
        excess = variances_of(variance) + mean.square() - 1
        rates = 0.5 * (excess.sum(dim=1) - log_determinant)
        return cls(mean + shift, mean, variance, precision, log_determinant, log_own, rates)

    def log_mixture(self, leave_one_out: bool = False) -> Tensor:
        r"""Compute :math:`\log \frac1M \sum_m q(z_n|x_m)`.

        Args:
            leave_one_out: Leave the sample's own component out, and average over the other M - 1.

        Returns:
            Of shape ``(M,)``.
        """
        count = len(self.z)
        # (z - m)^2 / v is the sum of z^2 / v, -2 z m / v and m^2 / v, which makes the densities a product of matrices.
        # In double precision nothing is lost near the origin, to which all are shifted alike.
        centre, precision = self.mean.mean(dim=0), self.precision
        mean, z = self.mean - centre, self.z - centre
        is_diagonal = precision.ndim == 2
        slope = precision * mean if is_diagonal else (precision @ mean[..., None]).squeeze(-1)
        slopes = torch.cat([-0.5 * precision.flatten(1), slope], dim=1).T
        offset = -0.5 * ((mean * slope).sum(dim=1) + self.log_determinant)
        log_own = torch.full_like(self.log_own, -math.inf) if leave_one_out else self.log_own
        results = []
        for first in range(0, max(count, 1), _ROWS):
            rows = slice(first, first + _ROWS)
            squares = z[rows].square() if is_diagonal else (z[rows, :, None] * z[rows, None]).flatten(1)
            joint = torch.addmm(offset, torch.cat([squares, z[rows]], dim=1), slopes)  # [n, m]: log q(z_n|x_m)
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
