"""The record of an evaluation, and the table that ``test`` prints of it."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from itertools import compress
from typing import Any, Literal, get_type_hints

import torch

from ..callbacks.metrics.active_units import is_active

Verdict = Literal["over-regularised", "balanced", "under-regularised"]
_FEW = 10  # effective samples below which the NLL still depends on their number
LEAST_COMPARED = 10
"""Number of observations below which the estimates that compare observations with one another are not made."""


@dataclass(frozen=True)
class Terms:
    """The terms of the ELBO, and the exchange rate between them.

    Attributes:
        elbo: ``-(distortion + rate)``, higher is better.
        rate: Mean KL of posterior and prior.
        distortion: Mean of ``-log p(x|z)`` over the data and the importance samples.
        implied_beta: The beta at which posteriors of this width are optimal: the nats of distortion that a nat of rate
            buys if all posteriors get slightly narrower. At an optimum of ``distortion + beta * rate`` it equals beta,
            for any model; the ELBO's is 1.
        implied_beta_error: Its standard error, from the spread over the observations.
        calibration: Squared error over the variance that the likelihood claims; NaN if it claims none.
    """

    elbo: float
    rate: float
    distortion: float
    implied_beta: float
    implied_beta_error: float
    calibration: float


@dataclass(frozen=True)
class LikelihoodEstimate:
    """The log-likelihood, estimated by importance sampling.

    Attributes:
        nll: Negative importance-weighted log-likelihood.
        nll_error: Its standard error, from the spread over the observations.
        importance_samples: Number K of samples for each observation.
        effective_sample_size: Mean number of them that carry the estimate, from 1 to K.
        nll_active_only: ``nll`` with the inactive dimensions removed: they are replaced by noise with the moments of
            the aggregate posterior, the same for every observation, and cost no rate.
    """

    nll: float
    nll_error: float
    importance_samples: int
    effective_sample_size: float
    nll_active_only: float


@dataclass(frozen=True)
class Latents:
    """The latent space as seen in the posteriors.

    Attributes:
        active_units: Number of dimensions, or groups of categories, whose posterior mean has a variance over the data
            above 0.01, in units of the prior's variance; ``None`` for a single observation.
        mutual_information: Mutual information of data and latents: a lower bound on average, at most log M. If it is
            saturated, read it as "at least".
        mutual_information_upper: The smaller of two upper bounds.
        mutual_information_saturated: Whether the lower bound exceeds 90 % of log M.
        mutual_information_observations: Number M of posteriors behind the mutual information, the marginal KL and the
            total correlation.
        marginal_kl: KL from the aggregate posterior to the prior; a lower bound if saturated.
        marginal_kl_lower: A lower bound on it: the rate minus the upper bound of the mutual information.
        total_correlation: Total correlation of the aggregate posterior; that of a Gaussian with its moments if
            saturated, and NaN of saturated categories.
        posterior_width: Mean standard deviation of the active dimensions' posteriors (of all if none is active), in
            units of the prior's. This and the next two are NaN for categories and for a prior without known moments.
        aggregate_mean_square: Squared mean of the aggregate posterior in the same units, averaged over the dimensions;
            the prior's is 0.
        aggregate_variance_mean: Its variance, averaged over the dimensions; the prior's is 1.
        rate_per_dimension: Rate of each dimension, of length k; of each group of categories; or of length 1, the whole,
            if the prior or the posterior is joint.
        variance_per_dimension: Variance over the data of each posterior mean, of length k; of categories the sum over
            each group's classes.
    """

    active_units: int | None
    mutual_information: float
    mutual_information_upper: float
    mutual_information_saturated: bool
    mutual_information_observations: int
    marginal_kl: float
    marginal_kl_lower: float
    total_correlation: float
    posterior_width: float
    aggregate_mean_square: float
    aggregate_variance_mean: float
    rate_per_dimension: tuple[float, ...]
    variance_per_dimension: tuple[float, ...]

    @property
    def active_rate(self) -> float:
        """Rate of the active dimensions; the whole rate if it is joint and some are active."""
        active = is_active(torch.tensor(self.variance_per_dimension, dtype=torch.float64))
        if len(self.rate_per_dimension) != len(active):
            return sum(self.rate_per_dimension) if active.any() else 0.0
        return sum(compress(self.rate_per_dimension, active))


@dataclass(frozen=True)
class Generation:
    """Decodings of latents that do not come from an observation's own posterior.

    Attributes:
        shuffled_gap: Distortion with the latents of other observations, minus the distortion.
        sample_distance: Mean distance of decoded prior samples to their nearest observation. The unit is the mean
            distance of decoded posterior samples to the nearest observation other than their own.
        interpolation_distance: The same for decoded midpoints between the posterior means of two observations.
        ex_post_distance: The same for decoded samples of an ex-post density; NaN without one.
    """

    shuffled_gap: float
    sample_distance: float
    interpolation_distance: float
    ex_post_distance: float = math.nan


@dataclass(frozen=True)
class Labels:
    """Accuracies of predicting the labels from the posterior means; NaN without labels.

    Attributes:
        knn_accuracy: Accuracy of the 5 nearest other posterior means.
        linear_probe_accuracy: Accuracy of ridge regression on the other means.
        condition_r2: Share of the variance of the condition c that ridge regression on the other means predicts: what
            the latents of a conditional model hold of it a second time. NaN for a model without one.
    """

    knn_accuracy: float
    linear_probe_accuracy: float
    condition_r2: float = math.nan


@dataclass(frozen=True)
class Assessment:
    """The verdict on a trained model, the symptoms behind it, and advice.

    It needs the decoder and the test data, and is made once, after training. For a posterior that collapses *during*
    training see :class:`~lightning_vae.callbacks.CollapseState`.

    Attributes:
        verdict: ``"over-regularised"``, ``"balanced"`` or ``"under-regularised"``; ``None`` for too few
            observations, or if all are equal.
        symptoms: Symptoms in words and numbers, each beginning with its place: posterior width, latent space,
            generation or reconstruction. Never empty.
        advice: The suggested change.
    """

    verdict: Verdict | None
    symptoms: tuple[str, ...]
    advice: str


@dataclass(frozen=True)
class Evaluation:
    """All estimates for a model on a data set, in nats per observation unless stated otherwise.

    NaN marks values that could not be measured. The values of the parts are also attributes by their own names:
    ``result.nll`` is ``result.likelihood.nll``.

    Attributes:
        observations: Number of observations.
        latent_dim: Number of latent dimensions k.
        beta: Weight of the rate that the model was trained with; under a capacity the implied beta.
        terms: The terms of the ELBO.
        likelihood: The log-likelihood by importance sampling.
        latents: The latent space.
        generation: Decoded prior samples, midpoints and shuffled latents.
        labels: Accuracies of predicting the labels from the posterior means.
        assessment: The verdict, symptoms and advice.
        own: Values of the user's own metrics by name.
    """

    observations: int
    latent_dim: int
    beta: float
    terms: Terms
    likelihood: LikelihoodEstimate
    latents: Latents
    generation: Generation
    labels: Labels
    assessment: Assessment
    own: Mapping[str, float] = field(default_factory=dict)

    def __getattr__(self, name: str) -> Any:
        """Return a value of one of the parts, by its name in :meth:`to_dict`."""
        for part in vars(self).values():
            if is_dataclass(part) and name in vars(part):
                return getattr(part, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @classmethod
    def names(cls) -> set[str]:
        """Return the keys of :meth:`to_dict`, without those of the user's own metrics."""
        types = get_type_hints(cls)
        parts = [part.name for part in fields(cls) if part.name != "own"]
        return {name for part in parts for name in _names(part, types[part])}

    def to_dict(self) -> dict[str, Any]:
        """Return a flat dict for JSON: the fields of all parts and the own metrics; None for NaN and infinity.

        It is flat because its keys are the columns of a sweep's table and, prefixed with ``test/``, the tags in
        TensorBoard.
        """
        flat: dict[str, Any] = {}
        for name, value in asdict(self).items():
            flat.update(value if isinstance(value, dict) else {name: value})
        return {name: _plain(value) for name, value in flat.items()}

    def scalars(self) -> dict[str, float]:
        """Return the values that a logger can plot."""
        items = self.to_dict().items()
        return {name: float(value) for name, value in items if isinstance(value, int | float)}

    def table(self) -> str:
        """Return a readable table with the verdict below it."""
        lines = [f"{self.observations} observations"]
        for title, rows in self._sections().items():
            shown = [row for row in rows if row[1] != "-"]
            if shown:
                lines += ["", title, *(f"  {name:<26}{value:<20}{remark}".rstrip() for name, value, remark in shown)]
        lines += ["", f"Verdict: {self.assessment.verdict or 'none'}"]
        for text in (*self.assessment.symptoms, f"-> {self.assessment.advice}"):
            lines += textwrap.wrap(text, 100, initial_indent="  ", subsequent_indent="    ")
        return "\n".join(lines)

    def _sections(self) -> dict[str, list[tuple[str, str, str]]]:
        """Return the table's rows by section: name, value and remark."""
        terms, likelihood, latents, generation = self.terms, self.likelihood, self.latents, self.generation
        samples, effective = likelihood.importance_samples, likelihood.effective_sample_size
        few = ": more would lower it" if effective < min(_FEW, samples / 2) else ""
        saturated, correlation = latents.mutual_information_saturated, _number(latents.total_correlation)
        bounds = f"bounds {_number(latents.mutual_information)}, {_number(latents.mutual_information_upper)}"
        units, dimensions = latents.active_units, len(latents.variance_per_dimension)
        is_compared = self.assessment.verdict is not None and not math.isnan(generation.shuffled_gap)
        lacks_distances = is_compared and math.isnan(generation.sample_distance)
        cap = f">= log M = {math.log(max(latents.mutual_information_observations, 1)):.2f}"
        return {
            "likelihood, nats per observation": [
                ("ELBO", _number(terms.elbo), ""),
                ("rate", _number(terms.rate), f"beta {self.beta:g}"),
                ("distortion", _number(terms.distortion), ""),
                (
                    "NLL",
                    _with_error(likelihood.nll, f"{likelihood.nll_error:.4g}"),
                    f"{samples} importance samples, {effective:.1f} effective{few}",
                ),
                (
                    "NLL, active units only",
                    _number(likelihood.nll_active_only),
                    "" if units is None else f"{dimensions - units} inactive ones removed",
                ),
            ],
            "latent space": [
                ("active units", "-" if units is None else f"{units} of {dimensions}", ""),
                (
                    "mutual information",
                    cap if saturated else _number(latents.mutual_information),
                    "saturated: more observations would show more" if saturated else bounds,
                ),
                ("marginal KL", f"{'>= ' if saturated else ''}{_number(latents.marginal_kl)}", "0: as the prior"),
                (
                    "total correlation",
                    f"~ {correlation}" if saturated and correlation != "-" else correlation,
                    "of a Gaussian with the same moments" if saturated else "0: independent",
                ),
                ("aggregate mean squared", _number(latents.aggregate_mean_square), "prior 0"),
                ("aggregate variance", _number(latents.aggregate_variance_mean), "prior 1"),
                ("posterior width", _number(latents.posterior_width), "of active units; prior 1"),
                (
                    "implied beta",
                    _with_error(terms.implied_beta, f"{terms.implied_beta_error:.1g}"),
                    "nats of distortion that a nat of rate buys; the ELBO's is 1",
                ),
            ],
            "decoder": [
                ("z shuffled", _number(generation.shuffled_gap, "+"), "nats of distortion; 0: z is not read"),
                ("error / claimed variance", _number(terms.calibration), "1: calibrated"),
                ("prior samples", _number(generation.sample_distance), "distance to the data; reconstructions 1"),
                (
                    "ex-post samples",
                    _number(generation.ex_post_distance),
                    "distance to the data, of a mixture fitted to q(z)",
                ),
                (
                    "interpolations",
                    _number(generation.interpolation_distance),
                    "distance to the data; reconstructions 1",
                ),
                (
                    "distances of samples",
                    "none" if lacks_distances else "-",
                    "numbers are missing in the data, or fewer than 3 observations differ",
                ),
            ],
            "labels, from posterior means": [
                ("5 nearest neighbours", _number(self.labels.knn_accuracy), "accuracy"),
                ("linear probe", _number(self.labels.linear_probe_accuracy), "accuracy"),
                ("condition, linear probe", _number(self.labels.condition_r2), "R2; 0: z holds nothing of it"),
            ],
            "own": [(name, _number(value), "") for name, value in self.own.items()],
        }


def _names(part: str, kind: type) -> list[str]:
    return [each.name for each in fields(kind)] if is_dataclass(kind) else [part]


def _number(value: float, sign: str = "") -> str:
    return "-" if math.isnan(value) else f"{value:{sign}.4g}"


def _with_error(value: float, error: str) -> str:
    return _number(value) + ("" if math.isnan(value) or error == "nan" else f" +- {error}")


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
