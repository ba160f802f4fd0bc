"""Likelihoods of counts: non-negative integers in their own scale."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch import distributions as td
from torch.nn import functional as F  # noqa: N812
from typing_extensions import override

from ..networks import Shape
from .base import Likelihood, check_integers


class _Counts(Likelihood):
    """Base of the likelihoods of counts; the decoder's output is the logarithm of their mean."""

    takes_mask = True

    def __init__(self, shape: Shape, levels: int | None = None, zero_inflated: bool = False) -> None:
        super().__init__(shape, levels)
        if levels is not None:
            raise ValueError(
                f"`levels` must be None for the {type(self).__name__} likelihood, whose data are counts in their own "
                f"scale, got {levels!r}. For integer levels use DiscretisedLogistic or Categorical."
            )
        self.zero_inflated = zero_inflated
        self._needs(2 if zero_inflated else 1)

    def features(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return ``log(1 + x)``, because counts cross scales, with 0 for missing numbers."""
        return super().features(x, mask).log1p()

    def forward(self, output: Tensor, x: Tensor | None = None, mask: Tensor | None = None) -> td.Distribution:  # noqa: ARG002
        """Return the distribution of counts with this log-mean, and with these logits of an extra zero."""
        if not self.zero_inflated:
            return self._independent(self._counts(output))
        log_mean, logits = self._parameters_of(output, 2)
        return self._independent(_ZeroInflated(self._counts(log_mean), logits))

    def check_values(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Refuse numbers that are no counts."""
        check_integers(f"`likelihood` {type(self).__name__}", x if mask is None else x[mask])

    def _counts(self, log_mean: Tensor) -> td.Distribution:
        raise NotImplementedError


class Poisson(_Counts):
    """Poisson distribution over counts; the decoder's output is the logarithm of the mean.

    Args:
        shape: Shape of one observation.
        levels: Must be ``None``: counts have no highest level.
        zero_inflated: Mix in further zeros. The decoder's output then has twice the entries along the first axis: first
            the log-means, then the logits of the probability of such a zero.

    Raises:
        ValueError: If there are levels.
    """

    def _counts(self, log_mean: Tensor) -> td.Distribution:
        return _Poisson(log_mean)


class NegativeBinomial(_Counts):
    r"""Negative binomial distribution over counts; the decoder's output is the logarithm of the mean.

    The variance is :math:`\mu + \mu^2 / \theta`. The inverse dispersion :math:`\theta` is learned, one for each
    dimension of the data, and starts at 1.

    Args:
        shape: Shape of one observation.
        levels: Must be ``None``: counts have no highest level.
        zero_inflated: As for :class:`Poisson`.

    Raises:
        ValueError: If there are levels.

    References:
        Lopez et al., "Deep generative modeling for single-cell transcriptomics", Nature Methods 2018.
    """

    def __init__(self, shape: Shape, levels: int | None = None, zero_inflated: bool = False) -> None:
        super().__init__(shape, levels, zero_inflated)
        self.log_inverse_dispersion = nn.Parameter(torch.zeros(self.shape))

    def _counts(self, log_mean: Tensor) -> td.Distribution:
        return negative_binomial(log_mean, self.log_inverse_dispersion)


def negative_binomial(log_mean: Tensor, log_inverse_dispersion: Tensor) -> td.NegativeBinomial:
    """Make a negative binomial of its mean and its inverse dispersion, which broadcasts to the mean.

    The inverse dispersion is kept between e^-10 and e^8. Beyond, the density's constants lose their precision in
    float32, and the distribution is nearly a Poisson distribution.
    """
    log_inverse_dispersion = log_inverse_dispersion.clamp(-10, 8)
    return td.NegativeBinomial(
        log_inverse_dispersion.exp(), logits=log_mean - log_inverse_dispersion, validate_args=False
    )


class _Poisson(td.Poisson):
    """Poisson distribution of a log-rate, which keeps its precision where the rate is nearly 0."""

    def __init__(self, log_rate: Tensor) -> None:
        self.log_rate = log_rate
        super().__init__(log_rate.exp(), validate_args=False)

    @override
    def log_prob(self, value: Tensor) -> Tensor:
        return value * self.log_rate - self.rate - (value + 1).lgamma()


class _ZeroInflated(td.Distribution):
    """Counts, of which a share is replaced by zeros: ``logits`` are those of the share."""

    def __init__(self, counts: td.Distribution, logits: Tensor) -> None:
        self.counts, self.logits = counts, logits
        super().__init__(counts.batch_shape, validate_args=False)

    @property
    def mean(self) -> Tensor:
        return torch.sigmoid(-self.logits) * self.counts.mean

    @property
    def variance(self) -> Tensor:
        zeros = torch.sigmoid(self.logits)
        return (1 - zeros) * (self.counts.variance + zeros * self.counts.mean.square())

    def log_prob(self, value: Tensor) -> Tensor:
        counted = F.logsigmoid(-self.logits) + self.counts.log_prob(value)
        return torch.where(value == 0, torch.logaddexp(F.logsigmoid(self.logits), counted), counted)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        counts = self.counts.sample(torch.Size(sample_shape))
        return counts * (torch.rand_like(counts) < torch.sigmoid(-self.logits))
