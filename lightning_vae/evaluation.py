"""Evaluation of a trained VAE: every estimate in one record, one table and one diagnosis."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
from torch import Tensor
from torch import distributions as td

from .diagnosis import Measured, Verdict, diagnose
from .estimators import (
    AggregateMoments,
    AggregatePosterior,
    ImportanceWeightedLikelihood,
    LogLikelihood,
    MixtureEstimates,
    ObservationSubset,
    RunningMoments,
    is_saturated,
    mixture_estimates,
)
from .noise import sample_by_index, uniform_by_index
from .objective import kl_per_dimension
from .probes import knn_accuracy, linear_probe_accuracy, nearest_distance
from .vae import VAE

OwnMetric = Callable[[VAE, Iterable[Any]], float]

_SUBSET_SEED, _PRIOR_SEED = 0x5B5E7, 0x9A10
_NUMBERS_AT_ONCE = {"cpu": 2**17}  # pixels decoded: what bounds the memory, whatever K and the batch size; and a CPU's
_ELSEWHERE = 2**22  # cache holds what few images make of themselves in the layers
_WEIGHTS_AT_ONCE = 2**22
_WIDTH_STEP = 0.05  # relative change of the posterior's width that its price is measured by
_WIDTH_SAMPLES = 4
_SHIFTS = 5  # other observations whose latents each one is decoded from
_FEW = 10  # effective samples, below which the NLL depends on their number
_NAN = float("nan")


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
        cap = f"log M = {math.log(max(self.mutual_information_observations, 1)):.2f}"
        saturated = self.mutual_information_saturated
        pruned = self.latent_dim - self.active_units
        few = ": more would lower it" if self.effective_sample_size < min(_FEW, self.importance_samples / 2) else ""
        sections: dict[str, list[tuple[str, str, str]]] = {
            "likelihood, nats per observation": [
                ("ELBO", _number(self.elbo), ""),
                ("rate", _number(self.rate), f"beta {self.beta:g}"),
                ("distortion", _number(self.distortion), ""),
                (
                    "NLL",
                    f"{_number(self.nll)} +- {_number(self.nll_error)}",
                    f"{self.importance_samples} importance samples, {self.effective_sample_size:.1f} effective{few}",
                ),
                ("NLL, active units only", _number(self.nll_active_only), f"{pruned} inactive ones removed"),
            ],
            "latent space": [
                ("active units", f"{self.active_units} of {self.latent_dim}", ""),
                (
                    "mutual information",
                    f">= {cap}" if saturated else _number(self.mutual_information),
                    "saturated: more observations would show more"
                    if saturated
                    else f"bounds {_number(self.mutual_information_lower)}, {_number(self.mutual_information_upper)}",
                ),
                ("marginal KL", f"{'>= ' if saturated else ''}{_number(self.marginal_kl)}", "0: as the prior"),
                (
                    "total correlation",
                    f"{'~ ' if saturated else ''}{_number(self.total_correlation)}",
                    "of a Gaussian with the same moments" if saturated else "0: independent",
                ),
                ("aggregate mean squared", _number(self.aggregate_mean_square), "prior 0"),
                ("aggregate variance", _number(self.aggregate_variance_mean), "prior 1"),
                ("posterior width", _number(self.posterior_width), "of active units; prior 1"),
                ("price of a nat of rate", _number(self.rate_price), "nats of distortion; the ELBO pays 1"),
            ],
            "decoder": [
                ("z shuffled", f"{self.shuffled_gap:+.4g}", "nats of distortion; 0: z is not read"),
                ("error / claimed variance", _number(self.calibration), "1: calibrated"),
                ("prior samples", _number(self.sample_distance), "distance to the data; reconstructions 1"),
                ("interpolations", _number(self.interpolation_distance), "distance to the data; reconstructions 1"),
            ],
            "labels, from posterior means": [
                ("5 nearest neighbours", _number(self.knn_accuracy), "accuracy"),
                ("linear probe", _number(self.linear_probe_accuracy), "accuracy"),
            ],
            "own": [(name, _number(value), "") for name, value in self.own.items()],
        }
        lines = [f"{self.observations} observations"]
        for title, rows in sections.items():
            shown = [row for row in rows if row[1] != "-"]
            if shown:
                lines += ["", title, *(f"  {name:<26}{value:<20}{remark}".rstrip() for name, value, remark in shown)]
        lines += ["", f"Diagnosis: {self.diagnosis}"]
        for text in (*self.symptoms, f"-> {self.advice}"):
            lines += textwrap.wrap(text, 100, initial_indent="  ", subsequent_indent="    ")
        return "\n".join(lines)


@torch.no_grad()
def evaluate(
    vae: VAE,
    loader: Iterable[Any],
    importance_samples: int = 100,
    observations: int = 2048,
    samples: int = 1000,
    own_metrics: Mapping[str, OwnMetric] | None = None,
) -> Evaluation:
    """Measure a model on a data set, in two passes over the loader.

    Binarisation and posterior samples are drawn by the observations' indices, so that batch size, order and number of
    processes do not change the result; in a distributed run every process returns the same. The subsets' sizes alone
    decide the memory, not K, the batch size or the data.

    Args:
        vae: The model, on the device to compute on. It is left as it was.
        loader: Batches as the VAE takes them, with a fixed order where they have no ``"index"``; a mapping's
            ``"label"``, integers of shape ``(B,)``, is used for the probes.
        importance_samples: Number K of samples for each observation.
        observations: Number M of observations, a fixed random subset, for mutual information, marginal KL, total
            correlation and the probes.
        samples: Number of prior samples, and of observations they are compared with, at most.
        own_metrics: The user's own metrics by name: each is called with the model and the loader. In a distributed run
            that is each process's share of the data, and what they return is averaged over the observations.

    Raises:
        ValueError: On an option out of its range, a loader that can be gone through only once, fewer than 10
            observations, an own metric with a name that is taken, or a model whose numbers are not finite.
    """
    options = {"importance_samples": importance_samples, "observations": observations, "samples": samples}
    for (name, value), least in zip(options.items(), (1, 10, 10), strict=True):
        if value < least:
            raise ValueError(f"`{name}` must be at least {least}, got {value}.")
    taken = {each.name for each in fields(Evaluation)} & set(own_metrics or {})
    if taken:
        raise ValueError(f"`own_metrics` must have names of their own, got {sorted(taken)}.")
    if isinstance(loader, Iterator):
        raise ValueError("`loader` is gone through twice and must start anew each time, got an iterator: pass a list.")

    training = vae.training
    vae.eval()
    try:
        latents = _encode_all(vae, loader, observations, samples)
        decoded = _decode_all(vae, loader, importance_samples, latents.moments)
        generated = _generate(vae, latents.kept)
        own = {
            name: _over_processes(float(metric(vae, loader)), latents.share, vae.device)
            for name, metric in (own_metrics or {}).items()
        }
    finally:
        vae.train(training)
    return _evaluation(vae, importance_samples, latents, decoded, generated, own)


# ---- the passes


@dataclass(frozen=True)
class _Kept:
    """A fixed random subset of the observations."""

    index: Tensor
    mean: Tensor
    z: Tensor
    x: Tensor


@dataclass(frozen=True)
class _Latents:
    share: float  # observations that this process has seen
    moments: AggregateMoments
    mixture: MixtureEstimates | None
    probes: tuple[float, float]
    kept: _Kept


@dataclass(frozen=True)
class _Decoded:
    count: int
    likelihood: LogLikelihood
    pruned: LogLikelihood
    distortion: float
    rates: Tensor
    widths: Tensor
    price: float
    calibration: float


@dataclass(frozen=True)
class _Generated:
    shuffled_gap: float
    sample_distance: float
    interpolation_distance: float


def _encode_all(vae: VAE, loader: Iterable[Any], observations: int, samples: int) -> _Latents:
    """Collect the posteriors: their moments, and those of two subsets."""
    k, device = vae.latent_dim, vae.device
    size = math.prod(vae.shape)
    aggregate = AggregatePosterior(k).to(device)
    posteriors = ObservationSubset(2 * k + 1, observations).to(device)
    data = ObservationSubset(1 + 2 * k + size, samples).to(device)
    gaussian = True
    for x, observed, index, label in _batches(vae, loader):
        posterior = vae._encode(observed)
        gaussian = gaussian and isinstance(posterior, td.Normal)
        try:
            mean, variance = posterior.mean, posterior.variance
        except NotImplementedError:
            kind = type(posterior).__name__
            raise ValueError(f"`encoder` must give a posterior with a mean and a variance, got {kind}.") from None
        aggregate.update(mean, variance)
        keys = _keys(index)
        labels = torch.full_like(index, -1) if label is None else label
        posteriors.update(torch.cat([mean, variance, labels[:, None].double()], dim=1), keys)
        z = sample_by_index(posterior, index)
        data.update(torch.cat([index[:, None].double(), mean, z, x.flatten(1)], dim=1), keys)

    share, moments = float(aggregate.state[0, 0]), aggregate.compute()
    if not (moments.mean.isfinite().all() and moments.posterior_variance.isfinite().all()):
        raise ValueError("The posteriors are not finite: are there NaNs in the data, or has the training diverged?")
    mean, variance, labels = posteriors.compute().split([k, k, 1], dim=1)
    if len(mean) < 10:
        raise ValueError(f"`loader` must hold at least 10 observations, got {len(mean)} of distinct indices.")
    labels = labels[:, 0].long()
    probed = bool((labels >= 0).all()) and bool((labels != labels[0]).any())
    probes = (knn_accuracy(mean, labels), linear_probe_accuracy(mean, labels)) if probed else (_NAN, _NAN)
    index, means, z, x = data.compute().split([1, k, k, size], dim=1)
    dtype = vae._working_dtype
    kept = _Kept(index[:, 0].long(), means.to(dtype), z.to(dtype), x.to(dtype))
    mixture = mixture_estimates(mean, variance) if gaussian else None
    return _Latents(share, moments, mixture, probes, kept)


def _decode_all(vae: VAE, loader: Iterable[Any], number: int, moments: AggregateMoments) -> _Decoded:
    """Weigh importance samples, and measure what the width of the posterior is worth."""
    device = vae.device
    likelihood, pruned = (ImportanceWeightedLikelihood().to(device) for _ in range(2))
    terms = RunningMoments(5 + 2 * vae.latent_dim).to(device)
    active = moments.active()
    mean, scale = (values.to(vae._working_dtype) for values in (moments.mean, moments.covariance.diagonal().sqrt()))
    for _, observed, index, _ in _batches(vae, loader, max(1, _WEIGHTS_AT_ONCE // number)):
        posterior = vae._encode(observed)
        log_weights, log_pruned, distortion = [], [], torch.zeros(len(index), dtype=torch.float64, device=device)
        chunk = max(1, _decoded_at_once(vae) // len(index))
        for start in range(0, number, chunk):
            draws = range(start, min(start + chunk, number))
            z = torch.stack([sample_by_index(posterior, index, draw) for draw in draws])
            log_likelihood = _log_likelihood(vae, observed, z)
            distortion -= log_likelihood.sum(dim=0)
            ratio = (vae.prior.log_prob(z) - posterior.log_prob(z)).double()
            log_weights.append(log_likelihood + ratio.sum(dim=2))
            if not active.all():
                # The same noise, but around the mean of all: the decoder gets what it knows, and nothing of this x.
                blind = mean + scale * (z - posterior.mean) / posterior.stddev
                without = _log_likelihood(vae, observed, torch.where(active, z, blind))
                log_pruned.append(without + (ratio * active).sum(dim=2))
        likelihood.update(torch.cat(log_weights))
        pruned.update(torch.cat(log_pruned or log_weights))
        first = sample_by_index(posterior, index)
        rates = kl_per_dimension(posterior, vae.prior, first).double()
        columns = [distortion / number, *_worth_of_width(vae, observed, posterior, index)]
        terms.update(torch.cat([torch.stack(columns, dim=1), rates, posterior.stddev.double()], dim=1))

    averages = terms.compute()
    means = averages.mean
    distortion_slope, rate_slope, error, claimed = means[1:5].tolist()
    if not means[0].isfinite():
        raise ValueError(
            f"The distortion is {float(means[0])}: are there NaNs in the data, or has the training diverged?"
        )
    return _Decoded(
        count=int(averages.count),
        likelihood=likelihood.compute(),
        pruned=pruned.compute(),
        distortion=float(means[0]),
        rates=means[5 : 5 + vae.latent_dim],
        widths=means[5 + vae.latent_dim :],
        # Where all posteriors have the prior's width there is nothing to buy.
        price=-distortion_slope / rate_slope if rate_slope < -1e-3 else _NAN,
        calibration=error / claimed if claimed > 0 else _NAN,
    )


def _worth_of_width(vae: VAE, observed: Tensor, posterior: td.Distribution, index: Tensor) -> Iterator[Tensor]:
    r"""Measure what happens to distortion and rate as each posterior's standard deviations grow by a factor c.

    At an optimum of ``distortion + beta * rate`` in the posterior's width, the ratio of the two derivatives is
    ``-beta``. The rate's is in closed form, ``sum_j (variance_j - 1)``, for a Gaussian posterior and NaN for others;
    the distortion's is a central difference with common noise.

    Yields:
        Of each observation: the derivatives of distortion and rate by log c at c = 1, in nats; the squared error; and
        the variance that the likelihood claims, NaN where it has none. Each of shape ``(B,)``, float64.
    """
    z = torch.stack([sample_by_index(posterior, index, draw) for draw in range(_WIDTH_SAMPLES)])
    step = _WIDTH_STEP * (z - posterior.mean)
    wider, narrower = _log_likelihood(vae, observed, z + step), _log_likelihood(vae, observed, z - step)
    yield (narrower - wider).mean(dim=0) / (2 * _WIDTH_STEP)

    narrowing = (posterior.variance.double() - 1).sum(dim=1)
    yield narrowing if isinstance(posterior, td.Normal) else torch.full_like(narrowing, _NAN)

    decoded = vae.decode(z.flatten(0, 1))
    error = (decoded.mean.view(len(z), *observed.shape) - observed).double().square()
    yield error.flatten(2).sum(dim=2).mean(dim=0)
    try:
        yield decoded.variance.double().view(len(z), len(index), -1).sum(dim=2).mean(dim=0)
    except NotImplementedError:
        yield torch.full_like(narrowing, _NAN)


def _generate(vae: VAE, kept: _Kept) -> _Generated:
    """Decode what no observation's own posterior gave: shuffled latents, prior samples, midpoints."""
    number = len(kept.x)
    observed = vae.likelihood.observe(kept.x.view(number, *vae.shape), kept.index)
    distortion = -_log_likelihood(vae, observed, kept.z[None]).mean()
    # The subset is in random order, so that its neighbours are strangers.
    others = torch.stack([kept.z.roll(shift, dims=0) for shift in range(1, _SHIFTS + 1)])
    shuffled = -_log_likelihood(vae, observed, others).mean()

    # Of equal observations one counts: nothing new comes as near to one as its twin does.
    first = _first_of_each(kept.x)
    data, z_own, mean = kept.x[first], kept.z[first], kept.mean[first]
    if len(data) < 3:
        return _Generated(float(shuffled - distortion), _NAN, _NAN)
    place = torch.arange(len(data), device=data.device)
    beside = (place + 1) % len(data)
    prior = vae.prior.icdf(uniform_by_index(place, vae.latent_dim, seed=_PRIOR_SEED))
    midpoints = (mean + mean[beside]) / 2
    # Each is compared with as many observations: all but the two that a midpoint came from.
    excluded = torch.stack([place, beside], dim=1)
    own, samples, between = (
        nearest_distance(torch.cat(_decoded_means(vae, z)), data, excluded).mean() for z in (z_own, prior, midpoints)
    )
    return _Generated(float(shuffled - distortion), float(samples / own), float(between / own))


def _evaluation(
    vae: VAE,
    importance_samples: int,
    latents: _Latents,
    decoded: _Decoded,
    generated: _Generated,
    own: Mapping[str, float],
) -> Evaluation:
    moments, mixture = latents.moments, latents.mixture
    active = moments.active()
    units = int(active.sum())
    rate = float(decoded.rates.sum())
    lower, upper = (float(mixture.lower), float(mixture.upper)) if mixture else (_NAN, _NAN)
    beta = vae.knob_targets["beta"]
    width = float((decoded.widths[active] if units else decoded.widths).mean())
    diagnosis = diagnose(
        Measured(
            beta=beta,
            rate=rate,
            active_rate=float(decoded.rates[active].sum()),
            active_units=units,
            latent_dim=vae.latent_dim,
            mutual_information=lower,
            mutual_information_upper=upper,
            marginal_kl=float(mixture.rate) - upper if mixture else _NAN,
            posterior_width=width,
            rate_price=decoded.price,
            calibration=decoded.calibration,
            shuffled_gap=generated.shuffled_gap,
            sample_distance=generated.sample_distance,
        )
    )
    return Evaluation(
        observations=decoded.count,
        latent_dim=vae.latent_dim,
        beta=beta,
        elbo=-(decoded.distortion + rate),
        rate=rate,
        distortion=decoded.distortion,
        nll=-float(decoded.likelihood.value),
        nll_error=float(decoded.likelihood.standard_error),
        importance_samples=importance_samples,
        effective_sample_size=float(decoded.likelihood.effective_sample_size),
        active_units=units,
        nll_active_only=-float(decoded.pruned.value),
        mutual_information_lower=lower,
        mutual_information_upper=upper,
        mutual_information=lower,
        mutual_information_saturated=mixture is not None and is_saturated(lower, mixture.observations),
        mutual_information_observations=mixture.observations if mixture else 0,
        marginal_kl=float(mixture.marginal_kl) if mixture else _NAN,
        total_correlation=float(mixture.total_correlation) if mixture else _NAN,
        posterior_width=width,
        aggregate_mean_square=float(moments.mean.square().mean()),
        aggregate_variance_mean=float(moments.covariance.diagonal().mean()),
        rate_price=decoded.price,
        calibration=decoded.calibration,
        shuffled_gap=generated.shuffled_gap,
        sample_distance=generated.sample_distance,
        interpolation_distance=generated.interpolation_distance,
        knn_accuracy=latents.probes[0],
        linear_probe_accuracy=latents.probes[1],
        diagnosis=diagnosis.verdict,
        symptoms=diagnosis.symptoms,
        advice=diagnosis.advice,
        rate_per_dimension=tuple(decoded.rates.tolist()),
        variance_per_dimension=tuple(moments.variance_of_means.tolist()),
        own=own,
    )


# ---- helpers


def _batches(
    vae: VAE, loader: Iterable[Any], most: int | None = None
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor | None]]:
    """Yield the data in the networks' scale, what is observed of them, the indices and the labels, on the device.

    Batches of more observations than are decoded at once, or than `most`, come in parts.
    """
    rows = min(_decoded_at_once(vae), most or _ELSEWHERE)
    position = 0
    rank, processes = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if _distributed() else (0, 1)
    for number, batch in enumerate(loader):
        x = vae._observations(batch, check=number == 0)
        given = batch if isinstance(batch, Mapping) else {}
        label = given.get("label")
        # Without an index, in the order they come, as DistributedSampler deals them.
        index = given["index"] if "index" in given else torch.arange(position, position + len(x)) * processes + rank
        position += len(x)
        if not isinstance(label, Tensor) or label.ndim != 1 or label.is_floating_point():  # no classes
            label = None
        for start in range(0, len(x), rows):
            part = slice(start, start + rows)
            data, indices = vae._to_network_scale(x[part].to(vae.device)), index[part].to(vae.device).long()
            observed = vae.likelihood.observe(data, indices)
            yield data, observed, indices, None if label is None else label[part].to(vae.device)


def _keys(index: Tensor) -> Tensor:
    """Put observations in a random order that depends on their index alone: 23 random bits, then 30 of the index."""
    random = uniform_by_index(index, 1, seed=_SUBSET_SEED)[:, 0].double()
    return (random * 2**23).floor() * 2**30 + index.remainder(2**30).double()


def _first_of_each(rows: Tensor) -> Tensor:
    """Return the places at which rows come first that differ from all before them, in order."""
    which = rows.unique(dim=0, return_inverse=True)[1]
    return torch.tensor(sorted(dict(zip(reversed(which.tolist()), range(len(rows) - 1, -1, -1), strict=True)).values()))


def _over_processes(value: float, weight: float, device: torch.device) -> float:
    """Average what each process measured on its share of the data, weighted by its size."""
    if not _distributed():
        return value
    sums = torch.tensor([value * weight if weight else 0.0, weight], dtype=torch.float64, device=device)
    torch.distributed.all_reduce(sums)
    return float(sums[0] / sums[1])


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _log_likelihood(vae: VAE, observed: Tensor, z: Tensor) -> Tensor:
    """Compute log p(x|z) of each of ``(S, B)`` latents, z of shape ``(S, B, k)``, in nats, float64."""
    rows = max(1, _decoded_at_once(vae) // len(observed))
    parts = []
    for part in z.split(rows):
        repeated = observed.expand(len(part), *observed.shape).flatten(0, 1)
        parts.append(vae.decode(part.flatten(0, 1)).log_prob(repeated).double().view(len(part), -1))
    return torch.cat(parts)


def _decoded_at_once(vae: VAE) -> int:
    return max(1, _NUMBERS_AT_ONCE.get(vae.device.type, _ELSEWHERE) // math.prod(vae.shape))


def _decoded_means(vae: VAE, z: Tensor) -> list[Tensor]:
    """Decode latents of shape ``(N, k)`` to flat means, some at a time."""
    return [vae.decode(part).mean.flatten(1) for part in z.split(_decoded_at_once(vae))]


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.4g}"
