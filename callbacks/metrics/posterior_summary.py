"""A summary of posteriors for pictures, dimension by dimension."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, Normal

from ..reading.kl_rates import rate_parts
from ..reading.padding import mask_like
from .active_units import is_active
from .prior_units import prior_units

_COLUMNS = ("mean", "scale", "rates", "standard", "standard_scale")
_MOST_DIMENSIONS = 256  # that a picture chooses from: all, or a fixed random choice
_SEED = 0x5EED


@dataclass(frozen=True)
class PosteriorSummary:
    """The posteriors of some observations, each of shape ``(n, k)``, with all latent axes flattened into one.

    Attributes:
        mean: Posterior means.
        scale: Standard deviations; ``None`` if the posterior is not Gaussian.
        rates: KL divergences from the prior; ``None`` if they are not known for each dimension.
        standard: Means in units of the prior, which are its moments in each dimension; the means if it has none.
        standard_scale: Standard deviations in the same units.
        numbers: The dimensions' numbers in the model, if these are not all.

    A position that is padding is NaN in each of them, and counts for nothing.
    """

    mean: Tensor
    scale: Tensor | None = None
    rates: Tensor | None = None
    standard: Tensor | None = None
    standard_scale: Tensor | None = None
    numbers: tuple[int, ...] | None = None

    @classmethod
    def of(
        cls, posterior: Distribution | Tensor, prior: Any, z: Tensor | None = None, mask: Tensor | None = None
    ) -> PosteriorSummary:
        """Summarise a posterior of batch shape ``(n, ...)``, or only its means.

        Args:
            posterior: q(z|x), or its means.
            prior: p(z), as in :func:`~..reading.kl_rates.rate_parts`; ``None`` if it is not known.
            z: The module's own sample.
            mask: True where a position is real, as in :func:`~..reading.padding.mask_like`; ``None`` if all are.
        """
        if isinstance(posterior, Tensor):
            return cls(_by_row(posterior))
        mean, scale = _by_row(posterior.mean), _by_row(posterior.stddev) if isinstance(posterior, Normal) else None
        standard, standard_scale = mean, scale
        if (units := prior_units(prior, posterior.mean)) is not None:
            centre, unit = _by_row(units.loc), _by_row(units.scale)
            standard, standard_scale = (mean - centre) / unit, None if scale is None else scale / unit
        summary = cls(mean, scale, _rates(posterior, prior, z), standard, standard_scale)
        if mask is None:
            return summary
        real = mask_like(mask, posterior.mean).cpu().flatten(1)
        return summary._each(lambda column: column.where(real, math.nan))

    @classmethod
    def beside(cls, groups: Iterable[PosteriorSummary]) -> PosteriorSummary:
        """Put the dimensions of several groups of latents side by side, and choose some if there are very many."""
        groups = list(groups)
        joined = groups[0]
        if len(groups) > 1:
            columns = {name: [getattr(group, name) for group in groups] for name in _COLUMNS}
            beside: dict[str, Any] = {
                name: None if any(each is None for each in of) else torch.cat(of, 1) for name, of in columns.items()
            }
            joined = cls(**beside)
        k = joined.mean.shape[1]
        if k <= _MOST_DIMENSIONS:
            return joined
        chosen = torch.randperm(k, generator=torch.Generator().manual_seed(_SEED))[:_MOST_DIMENSIONS].sort().values
        return replace(joined._each(lambda column: column[:, chosen]), numbers=tuple(chosen.tolist()))

    @classmethod
    def joined(cls, parts: Sequence[PosteriorSummary]) -> PosteriorSummary:
        """Concatenate the rows of several summaries."""
        columns = {name: [getattr(part, name) for part in parts] for name in _COLUMNS}
        cat: dict[str, Any] = {name: None if of[0] is None else torch.cat(of) for name, of in columns.items()}
        return cls(**cat, numbers=parts[0].numbers)

    def rows(self, numbers: Sequence[int]) -> PosteriorSummary:
        """Return some rows only."""
        return self._each(lambda column: column[list(numbers)])

    @property
    def in_units_of_prior(self) -> tuple[Tensor, Tensor | None]:
        """Means and standard deviations in units of the prior; unchanged if it has none."""
        return (self.mean, self.scale) if self.standard is None else (self.standard, self.standard_scale)

    @property
    def order(self) -> list[int]:
        """The dimensions by decreasing rate, or by decreasing variance of the mean if there is no rate."""
        by = self._variances if self.rates is None else self.rates.nanmean(0)
        numbers: list[int] = by.nan_to_num().argsort(descending=True, stable=True).tolist()
        return numbers

    @property
    def active(self) -> list[int]:
        """The active dimensions, in the same order."""
        active = is_active(self._variances)
        return [number for number in self.order if active[number]]

    def name(self, number: int) -> str:
        """Return a dimension's name."""
        return f"z{number if self.numbers is None else self.numbers[number]}"

    def title(self, number: int) -> str:
        """Return a dimension's name and rate."""
        name = self.name(number)
        return name if self.rates is None else f"{name}  {float(self.rates[:, number].nanmean()):.2f} nats"

    @property
    def _variances(self) -> Tensor:
        """Variance of each dimension's mean, over the observations that have it."""
        mean = self.in_units_of_prior[0].double()
        return (mean - mean.nanmean(0)).square().nanmean(0)

    def _each(self, change: Callable[[Tensor], Tensor]) -> PosteriorSummary:
        columns: dict[str, Any] = {name: getattr(self, name) for name in _COLUMNS}
        changed: dict[str, Any] = {name: None if of is None else change(of) for name, of in columns.items()}
        return replace(self, **changed)


def _by_row(values: Tensor) -> Tensor:
    return values.detach().float().cpu().flatten(1)


def _rates(posterior: Distribution, prior: Any, z: Tensor | None) -> Tensor | None:
    if prior is None:
        return None
    try:
        rates = rate_parts(posterior, prior, z).nats
    except ValueError:  # a prior of another shape
        return None
    return _by_row(rates) if rates.shape == posterior.mean.shape else None
