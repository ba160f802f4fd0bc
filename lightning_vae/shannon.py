"""Shannon's rate-distortion function of a Gaussian source, the bound that a sweep on Gaussian data is held against."""

from __future__ import annotations

import math
from collections.abc import Sequence


def shannon_distortion(eigenvalues: Sequence[float], variance: float, rate: float) -> float:
    r"""Compute the least distortion that a rate allows on Gaussian data, in nats.

    Reverse water-filling: with the water level :math:`s` at which
    :math:`\sum_i \max(0, \tfrac12 \log(\lambda_i / s))` is the rate, the squared error is
    :math:`\sum_i \min(s, \lambda_i)`, and the distortion is that of a Gaussian likelihood of this variance:

    .. math:: D^*(R) = \tfrac{d}{2} \log(2 \pi \sigma^2) + \frac{1}{2 \sigma^2} \sum_i \min(s, \lambda_i)

    Args:
        eigenvalues: Eigenvalues of the data's covariance.
        variance: Variance of the likelihood.
        rate: Rate in nats per observation.

    Raises:
        ValueError: If the rate is negative.

    References:
        Cover and Thomas, "Elements of Information Theory", theorem 10.3.3.

    Example::

        >>> round(shannon_distortion([5, 3, 1.5, 0.8], variance=0.4, rate=0.0), 4)  # half of the trace over 0.4
        14.7183
    """
    if rate < 0:
        raise ValueError(f"`rate` must be at least 0, got {rate}.")
    spectrum = sorted(eigenvalues, reverse=True)
    for count in range(1, len(spectrum) + 1):  # directions above the water
        level = math.exp((sum(math.log(each) for each in spectrum[:count]) - 2 * rate) / count)
        if count == len(spectrum) or level >= spectrum[count]:
            break
    squared_error = sum(min(level, each) for each in spectrum)
    return len(spectrum) / 2 * math.log(2 * math.pi * variance) + squared_error / (2 * variance)
