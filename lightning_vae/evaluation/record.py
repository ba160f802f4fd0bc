"""Every estimate of an evaluation in one record."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from .assessment import Verdict
from .table import evaluation_table


@dataclass(frozen=True)
class Evaluation:
    """What was measured of a model on a data set, in nats per observation unless said otherwise.

    NaN stands for what could not be measured, and is null in :meth:`to_dict`.

    Attributes:
        observations: Number of observations.
        latent_dim: Number of latent dimensions k.
        beta: Weight of the rate that the model was trained with.
        elbo: ``-(distortion + rate)``, higher is better.
        rate: Mean KL of posterior and prior.
        distortion: Mean of ``-log p(x|z)`` over the data and the importance samples.
        nll: Negative importance-weighted log-likelihood.
        nll_error: Its standard error, from the spread over the observations.
        importance_samples: Number K of samples for each observation.
        effective_sample_size: Mean number of them that carry the estimate, from 1 to K.
        active_units: Number of dimensions whose posterior mean has a variance over the data above 0.01.
        nll_active_only: ``nll`` with the other dimensions removed: they are noise with the moments of the aggregate
            posterior, the same for every observation, and cost no rate.
        mutual_information_lower: Of data and latents, at most log M.
        mutual_information_upper: The smaller of two upper bounds.
        mutual_information: The lower estimate, to be read as "at least" where it is saturated.
        mutual_information_saturated: Whether it exceeds 90 % of log M.
        mutual_information_observations: Number M of posteriors that it, the marginal KL and the total correlation come
            from.
        marginal_kl: KL from the aggregate posterior to the prior; a lower bound where saturated.
        total_correlation: Of the aggregate posterior; that of a Gaussian with its moments where saturated.
        posterior_width: Mean standard deviation of the active dimensions' posteriors (of all where none is active); the
            prior's is 1.
        aggregate_mean_square: Squared mean of the aggregate posterior, mean over the dimensions; the prior's is 0.
        aggregate_variance_mean: Its variance, mean over the dimensions; the prior's is 1.
        rate_price: Nats of distortion that a nat of rate buys by narrowing the posterior; beta at an optimum.
        price_error: Its standard error, from the spread over the observations.
        calibration: Squared error over the variance that the likelihood claims; NaN where it has none.
        shuffled_gap: Distortion with the latents of other observations, less the distortion.
        sample_distance: Mean distance of decoded prior samples to their nearest observation, in units of that of
            decoded posterior samples, each to others than its own.
        interpolation_distance: The same of decoded midpoints between the posterior means of two observations.
        knn_accuracy: Share of labels that the 5 nearest other posterior means tell; NaN without labels.
        linear_probe_accuracy: The same for ridge regression on the means, each observation left out in turn.
        diagnosis: ``"over-regularised"``, ``"balanced"`` or ``"under-regularised"``.
        symptoms: What the diagnosis rests on.
        advice: What to change.
        rate_per_dimension: Of length k.
        variance_per_dimension: Variance over the data of each posterior mean, of length k.
        own: Values of the user's own metrics by name.
    """

    observations: int
    latent_dim: int
    beta: float
    elbo: float
    rate: float
    distortion: float
    nll: float
    nll_error: float
    importance_samples: int
    effective_sample_size: float
    active_units: int
    nll_active_only: float
    mutual_information_lower: float
    mutual_information_upper: float
    mutual_information: float
    mutual_information_saturated: bool
    mutual_information_observations: int
    marginal_kl: float
    total_correlation: float
    posterior_width: float
    aggregate_mean_square: float
    aggregate_variance_mean: float
    rate_price: float
    price_error: float
    calibration: float
    shuffled_gap: float
    sample_distance: float
    interpolation_distance: float
    knn_accuracy: float
    linear_probe_accuracy: float
    diagnosis: Verdict
    symptoms: tuple[str, ...]
    advice: str
    rate_per_dimension: tuple[float, ...]
    variance_per_dimension: tuple[float, ...]
    own: Mapping[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return a flat dict that JSON can hold: None for NaN and infinity, and the own metrics among the others."""
        values = asdict(self)
        values.update(values.pop("own"))
        return {name: _plain(value) for name, value in values.items()}

    def scalars(self) -> dict[str, float]:
        """Return the numbers among the values that a logger can plot."""
        items = self.to_dict().items()
        return {name: float(value) for name, value in items if isinstance(value, int | float)}

    def table(self) -> str:
        """Return a readable table with the diagnosis below it."""
        return evaluation_table(self)


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
