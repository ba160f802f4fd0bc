"""A summary of posteriors for pictures, dimension by dimension."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import Distribution, Normal

from ..reading.kl_rates import kl_per_dimension
from .active_units import is_active, variance_of_means


@dataclass(frozen=True)
class PosteriorSummary:
    """The posteriors of some observations, each of shape ``(n, k)``, with all latent axes flattened into one.

    Attributes:
        mean: Posterior means.
        scale: Standard deviations; ``None`` if the posterior is not Gaussian.
        rates: KL divergences from the prior; ``None`` if they have no closed form.
    """

    mean: Tensor
    scale: Tensor | None = None
    rates: Tensor | None = None

    @classmethod
    def of(cls, posterior: Distribution | Tensor, prior: Distribution) -> PosteriorSummary:
        """Summarise a posterior of batch shape ``(n, ...)``, or only its means."""
        if isinstance(posterior, Tensor):
            return cls(_by_row(posterior))
        scale = _by_row(posterior.stddev) if isinstance(posterior, Normal) else None
        return cls(_by_row(posterior.mean), scale, _rates(posterior, prior))

    @classmethod
    def joined(cls, parts: Sequence[PosteriorSummary]) -> PosteriorSummary:
        """Concatenate the rows of several summaries."""
        columns = ([part.mean for part in parts], [part.scale for part in parts], [part.rates for part in parts])
        return cls(*(torch.cat(column) if column[0] is not None else None for column in columns))  # type: ignore[arg-type]

    def rows(self, numbers: Sequence[int]) -> PosteriorSummary:
        """Return some rows only."""
        columns = (self.mean, self.scale, self.rates)
        return PosteriorSummary(*(None if column is None else column[list(numbers)] for column in columns))  # type: ignore[arg-type]

    @property
    def order(self) -> list[int]:
        """The dimensions by decreasing rate, or by decreasing variance of the mean if there is no rate."""
        by = variance_of_means(self.mean) if self.rates is None else self.rates.mean(0)
        numbers: list[int] = by.nan_to_num().argsort(descending=True, stable=True).tolist()
        return numbers

    @property
    def active(self) -> list[int]:
        """The active dimensions, in the same order."""
        active = is_active(variance_of_means(self.mean))
        return [number for number in self.order if active[number]]

    def title(self, number: int) -> str:
        """Return a dimension's name and rate."""
        return f"z{number}" if self.rates is None else f"z{number}  {float(self.rates[:, number].mean()):.2f} nats"


def _by_row(values: Tensor) -> Tensor:
    return values.detach().float().cpu().flatten(1)


def _rates(posterior: Distribution, prior: Distribution) -> Tensor | None:
    try:
        rates = kl_per_dimension(posterior, prior)
    except (NotImplementedError, ValueError):  # no closed form, or a prior of another shape
        return None
    return _by_row(rates) if rates.shape == posterior.mean.shape else None
