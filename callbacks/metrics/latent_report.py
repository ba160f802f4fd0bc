"""The measurements of one pass over the data, and the verdict on them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from .active_units import is_active
from .categorical import dead_classes, perplexity
from .collapse_state import CollapseState, collapse_state
from .latent_layout import LatentLayout
from .latent_sums import LatentSums
from .mutual_information import PosteriorSample
from .rate_decomposition import decompose_categorical_rate, decompose_rate

_FEW = 1024  # positions that are also reported one by one


class Thresholds(NamedTuple):
    """The options of :class:`~.latent_monitor.LatentMonitor` that the verdict depends on."""

    min_rate: float
    threshold: float
    min_width: float
    max_marginal_kl: float


@dataclass(frozen=True)
class Positions:
    """Statistics of each position of pooled latents, of shape ``(positions,)``: of all channels, one after another."""

    variance: Tensor
    rate: Tensor | None


@dataclass(frozen=True)
class LatentReport:
    """The measurements of one pass over the data, and the verdict. All are in nats, float64.

    A dimension is a latent dimension, a channel with ``pool``, or a group of categories; groups of latents stand one
    after another.

    Attributes:
        count: Number of observations.
        active: Which dimensions are active, of shape ``(k,)``.
        variance: Variance over the data of each dimension's posterior mean, in units of a Gaussian prior, ``(k,)``.
        rate: Mean rate, a scalar; ``None`` if some rate was never known.
        rate_per_dimension: Mean rate of each dimension, of shape ``(k,)``; ``None`` if the rate is joint.
        is_estimate: Whether the rates are estimates at samples, for want of a closed form.
        mutual_information: Mutual information of data and latents; see
            :func:`~.mutual_information.mutual_information`. ``None`` if it is not known for this kind of posterior.
        marginal_kl: The part of the rate that moves all posteriors together; see
            :func:`~.rate_decomposition.decompose_rate`, and for categories
            :func:`~.rate_decomposition.decompose_categorical_rate`. With ``chosen``, that of the chosen dimensions, a
            lower bound.
        observations: Number of observations that the mutual information comes from.
        chosen: Number of positions that it comes from; ``None`` for all.
        shift: Mean of the aggregate posterior in each dimension, in the latents' own units; ``None`` for categories.
        scale: Its standard deviation. ``(z - shift) / scale`` is what a model of the latents is trained on.
        width: Ratio of the posteriors' mean variance to that of the aggregate posterior, of shape ``(k,)``.
        perplexity: Effective number of classes that each group uses, of shape ``(k,)``; ``None`` unless categorical.
        dead_classes: Number of classes that each group hardly ever uses, of shape ``(k,)``.
        positions: Statistics of each position, if dimensions are pooled and there are at most 1024.
        collapse: The verdict.
    """

    count: int
    active: Tensor
    variance: Tensor
    rate: float | None
    rate_per_dimension: Tensor | None
    is_estimate: bool
    mutual_information: float | None
    marginal_kl: float | None
    observations: int
    chosen: int | None
    shift: Tensor | None
    scale: Tensor | None
    width: Tensor | None
    perplexity: Tensor | None
    dead_classes: Tensor | None
    positions: Positions | None
    collapse: CollapseState

    @property
    def active_units(self) -> int:
        """Number of active dimensions."""
        return int(self.active.sum())

    @property
    def state(self) -> str:
        """The verdict in a word; see :class:`~.collapse_state.CollapseState`."""
        return self.collapse.name

    @property
    def reason(self) -> str:
        """The measurements that led to it."""
        return self.collapse.reason

    @property
    def remedy(self) -> str:
        """The remedy to try next."""
        return self.collapse.remedy

    @property
    def text(self) -> str:
        """Shift and scale as one line of text."""
        if self.shift is None or self.scale is None:
            return ""
        numbers = [" ".join(f"{value:.4g}" for value in each[:16].tolist()) for each in (self.shift, self.scale)]
        more = f" ... ({len(self.shift)} in all)" if len(self.shift) > 16 else ""
        return f"shift {numbers[0]}{more}; scale {numbers[1]}{more}"


def report(
    layout: LatentLayout,
    sums: LatentSums,
    kept: Tensor | None,
    chosen: Tensor | None,
    classes: int,
    unimix: float,
    is_estimate: bool,
    thresholds: Thresholds,
) -> LatentReport:
    """Turn the sums of a pass over all processes into its report.

    Args:
        layout: The arrangement of the latents in a row.
        sums: The sums.
        kept: The kept observations: means, variances and the rate, or probabilities and the rate; ``None`` if the
            mutual information can't be estimated from them.
        chosen: The columns that they have; ``None`` for all.
        classes: Number of classes of each categorical group, 1 for other latents.
        unimix: Share of the uniform distribution in categorical posteriors.
        is_estimate: Whether rates are estimates.
        thresholds: The thresholds of the verdict.
    """
    count, rates, standard = sums.rates[0], sums.rates[1:] / sums.rates[0], sums.standard
    each = standard[0].clamp(min=1)
    of_means, of_posteriors = standard[2] / each, sums.variances[0] / each
    shift = scale = width = positions = None
    if classes > 1:
        variance = of_means.unflatten(0, (-1, classes)).sum(1)
        usage = (standard[1] * standard[0]).unflatten(0, (-1, classes))
        usage = usage / usage.sum(1, keepdim=True)
    else:
        weight = layout.pooled(standard[0]).clamp(min=1)

        def mean_of(values: Tensor) -> Tensor:
            return layout.pooled(standard[0] * values) / weight if layout.pool else values

        variance, shift = mean_of(of_means), mean_of(sums.raw[1])
        if not of_posteriors.isneginf().all():
            around = (sums.raw[1] - layout.spread(shift)).square() if layout.pool else 0.0
            scale = mean_of(sums.raw[2] / each + sums.variances[1] / each + around).sqrt()
            width = mean_of(of_posteriors)
            width = width / (width + variance)
    parts: Tensor | None = rates
    if rates.isneginf().all():
        parts = None
    elif len(rates) == layout.columns and classes == 1:
        parts = layout.pooled(rates)
        if layout.pool and layout.columns <= _FEW:
            positions = Positions(of_means, rates)
    information = _Information.of(kept, classes)
    considered = of_means if chosen is None else of_means[chosen]
    units = int(is_active(considered, thresholds.threshold).sum()) if classes == 1 else 0
    is_per_dimension = parts is not None and parts.shape == variance.shape
    marginal_kl = information.marginal_kl if chosen is None or len(rates) == layout.columns else None
    collapse = collapse_state(
        parts if is_per_dimension or parts is None else parts.sum()[None],
        variance,
        information.mutual_information,
        information.observations,
        thresholds.min_rate,
        thresholds.threshold,
        information_rate=information.rate if chosen is not None else None,
        width=width,
        marginal_kl_per_unit=marginal_kl / units if marginal_kl is not None and units else None,
        min_width=thresholds.min_width,
        max_marginal_kl=thresholds.max_marginal_kl,
    )
    return LatentReport(
        count=int(count),
        active=is_active(variance, thresholds.threshold),
        variance=variance,
        rate=None if parts is None else float(parts.sum()),
        rate_per_dimension=parts if is_per_dimension else None,
        is_estimate=is_estimate,
        mutual_information=information.mutual_information,
        marginal_kl=marginal_kl,
        observations=information.observations,
        chosen=None if chosen is None else len(chosen),
        shift=shift,
        scale=scale,
        width=width,
        perplexity=perplexity(usage) if classes > 1 else None,
        dead_classes=dead_classes(usage, share=unimix) if classes > 1 else None,
        positions=positions,
        collapse=collapse,
    )


class _Information(NamedTuple):
    """The two parts of the rate, estimated from the kept observations; ``None`` where there is no estimate."""

    mutual_information: float | None
    marginal_kl: float | None
    rate: float | None
    observations: int

    @classmethod
    def of(cls, kept: Tensor | None, classes: int) -> _Information:
        if kept is None or not len(kept):
            return cls(None, None, None, 0)
        columns, rates = kept[:, :-1], kept[:, -1].masked_fill(kept[:, -1].isneginf(), math.nan)
        if classes > 1:
            nats, marginal_kl, _ = decompose_categorical_rate(columns.unflatten(1, (-1, classes)), rates)
        else:
            mean, variance = columns.chunk(2, dim=1)
            sample = PosteriorSample.draw(mean, variance)
            nats, marginal_kl, _ = decompose_rate(sample, sample.log_mixture(), rates)
        return cls(_known(nats), _known(marginal_kl), _known(rates.mean()), len(kept))


def _known(value: Tensor) -> float | None:
    return None if value.isnan() or value.isinf() else float(value)
