"""Closed forms of Gaussians: the total correlation, and Shannon's rate-distortion function."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..checks import at_least, check_number, is_positive

_ROUNDING = 1e-6  # of an eigenvalue, relative to the largest


def gaussian_total_correlation(covariance: Tensor) -> Tensor:
    r"""Compute the total correlation of a Gaussian, :math:`-\tfrac12 \log\det` of its correlation matrix.

    Args:
        covariance: Of shape ``(k, k)``.

    Returns:
        Nats, a scalar, float64.

    Raises:
        ValueError: If it is not a covariance: square, symmetric, positive semidefinite, with positive variances.
    """
    shape, covariance = tuple(covariance.shape), covariance.double()
    if len(shape) != 2 or shape[0] != shape[1] or not shape[0]:
        raise ValueError(f"`covariance` must have shape (k, k), got {shape}.")
    if not (torch.allclose(covariance, covariance.T) and (covariance.diagonal() > 0).all()):
        raise ValueError("`covariance` must be symmetric, with positive variances and finite numbers.")
    low, high = torch.linalg.eigvalsh(covariance)[[0, -1]].tolist()
    if low < -_ROUNDING * high:
        raise ValueError(f"`covariance` must be positive semidefinite, got an eigenvalue of {low:.4g}.")
    correlation: Tensor = 0.5 * (covariance.diagonal().log().sum() - torch.linalg.slogdet(covariance).logabsdet)
    return correlation.clamp(min=0)


def shannon_distortion(eigenvalues: Sequence[float], variance: float, rate: float) -> float:
    r"""Compute the least distortion at a given rate on Gaussian data, in nats.

    Reverse water-filling: with the water level :math:`s` at which
    :math:`\sum_i \max(0, \tfrac12 \log(\lambda_i / s))` is the rate, the squared error is
    :math:`\sum_i \min(s, \lambda_i)`, and the distortion is that of a Gaussian likelihood of this variance:

    .. math:: D^*(R) = \tfrac{d}{2} \log(2 \pi \sigma^2) + \frac{1}{2 \sigma^2} \sum_i \min(s, \lambda_i)

    Args:
        eigenvalues: Eigenvalues of the data's covariance.
        variance: Variance of the likelihood.
        rate: Rate in nats per observation.

    Raises:
        ValueError: If an eigenvalue or the rate is negative, all eigenvalues are 0, or the variance is not positive.

    References:
        Cover and Thomas, "Elements of Information Theory", theorem 10.3.3.

    Example::

        >>> round(shannon_distortion([5, 3, 1.5, 0.8], variance=0.4, rate=0.0), 4)  # half of the trace over 0.4
        14.7183
    """
    check_number("rate", rate, "at least 0 and finite", at_least(0))
    check_number("variance", variance, "positive and finite", is_positive)
    allowed = "at least 0 and finite, and not all 0"
    check_number("eigenvalues", list(eigenvalues), allowed, lambda all_: all(map(at_least(0), all_)) and any(all_))
    spectrum = sorted(map(float, eigenvalues), reverse=True)
    for count in range(1, len(spectrum) + 1):  # directions above the water
        level = math.exp((sum(math.log(each) for each in spectrum[:count]) - 2 * rate) / count)
        if count == len(spectrum) or level >= spectrum[count]:
            break
    squared_error = sum(min(level, each) for each in spectrum)
    return len(spectrum) / 2 * math.log(2 * math.pi * variance) + squared_error / (2 * variance)
