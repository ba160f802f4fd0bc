"""The first pass of an evaluation: the posteriors."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from torch import distributions as td

from ..callbacks.metrics.active_units import is_active
from ..callbacks.metrics.aggregate_posterior import AggregateMoments, AggregatePosterior
from ..callbacks.metrics.observation_subset import ObservationSubset
from ..callbacks.metrics.prior_units import prior_units
from ..callbacks.metrics.running_moments import RunningMoments
from ..distributed import sum_over_processes
from ..estimators.mixture import MixtureEstimates, categorical_estimates, mixture_estimates
from ..estimators.probes import knn_accuracy, linear_probe_accuracy, linear_probe_r2
from ..noise import sample_by_index
from ..objective import rate_parts
from ..observations import Observations
from ..posteriors import FullCovariance
from ..vae import VAE
from .chunks import batches
from .record import LEAST_COMPARED, Labels, Latents

_MOST_JOINT = 64  # dimensions of a full covariance, up to which the Cholesky factors of a subset are kept


@dataclass(frozen=True)
class Kept:
    """A fixed random subset of the observations, in a random order.

    Attributes:
        index: Their indices in the data set, of shape ``(M,)``.
        mean: Posterior means, of shape ``(M, k)``.
        z: Samples of the posteriors, of shape ``(M, k)``.
        x: The data in the networks' scale, of shape ``(M, numbers)``; NaN for missing numbers.
        condition: The columns of the condition, of shape ``(M, columns)``; ``None`` without.
    """

    index: Tensor
    mean: Tensor
    z: Tensor
    x: Tensor
    condition: Tensor | None


@dataclass(frozen=True)
class Encoded:
    """The posteriors of a data set.

    Attributes:
        count: Number of observations over all processes.
        constant: Whether all of them are equal.
        share: Number of observations that this process has seen.
        moments: Moments of the aggregate posterior.
        latents: The latent space, for the record.
        labels: Accuracies of predicting the labels from the posterior means, for the record.
        kept: Some observations, to be decoded from latents other than their own.
        is_gaussian: Whether the posteriors are diagonal Gaussians.
    """

    count: int
    constant: bool
    share: float
    moments: AggregateMoments
    latents: Latents
    labels: Labels
    kept: Kept
    is_gaussian: bool


def encode_all(vae: VAE, loader: Iterable[Any], observations: int, samples: int) -> Encoded:
    """Collect the moments of all posteriors, and the posteriors of two subsets."""
    k, parts, device, size = vae.latent_dim, vae.rate_parts, vae.device, math.prod(vae.shape)
    classes = None if vae.head is None else vae.head.classes
    has_factors = isinstance(vae.head, FullCovariance) and k <= _MOST_JOINT
    kind = td.OneHotCategorical if classes else td.MultivariateNormal if has_factors else td.Normal
    spread = k * (k + 1) // 2 if has_factors else k  # numbers in a posterior's variances, or in its Cholesky factor
    columns = 0 if vae.condition is None else vae.condition.columns
    aggregate = AggregatePosterior(k).to(device)
    rates_and_widths = RunningMoments(parts + k).to(device)
    posteriors = ObservationSubset(k + spread + 2 + columns, observations).to(device)
    data = ObservationSubset(1 + 2 * k + size + columns, samples).to(device)
    is_known, is_standard, has_units, warned = True, True, True, False
    first, varies = None, torch.zeros((), dtype=torch.float64, device=device)
    for part in batches(vae, loader):
        index, posterior, prior = part.index, vae.encode(part), vae.prior_given(part.condition)
        x = part.scaled if part.mask is None else part.scaled.masked_fill(~part.mask, math.nan)
        first = x[:1] if first is None else first
        varies = varies.maximum((x != first).any())
        is_known = is_known and isinstance(posterior, kind)
        is_standard = is_standard and isinstance(prior, td.Normal)
        try:
            mean, variance = posterior.mean.flatten(1), posterior.variance.flatten(1)
        except NotImplementedError:
            name = type(posterior).__name__
            raise ValueError(f"`encoder` must give a posterior with a mean and a variance, got {name}.") from None
        z = sample_by_index(posterior, index)
        conditions = [] if part.condition is None else [part.condition]
        row = [index[:, None].double(), mean, z.flatten(1), x.flatten(1), *conditions]
        scale = torch.ones_like(mean)
        if (units := prior_units(prior, mean)) is not None:
            scale = units.scale
            mean, variance = (mean - units.loc) / scale, variance / scale.square()
        has_units = has_units and units is not None
        aggregate.update(mean, variance)
        rates = rate_parts(posterior, prior, z)
        rates_and_widths.update(torch.cat([rates.double(), variance.sqrt().double()], dim=1))
        known = _classes(part)
        if known is None and part.label is not None and not warned:
            rank_zero_warn(_no_classes(part.label))
            warned = True
        labels = torch.full_like(index, -1) if known is None else known
        rate = rates.sum(dim=1, keepdim=True).double()
        spreads = variance
        if isinstance(posterior, td.MultivariateNormal) and has_factors:
            spreads = _packed(posterior.scale_tril.double() / scale[..., None])
        summary = [mean, spreads, rate, labels[:, None].double(), *conditions]
        posteriors.update(torch.cat(summary, dim=1), index)
        data.update(torch.cat(row, dim=1), index)

    share = aggregate.state[0, 0]
    count = int(sum_over_processes(share.clone()))
    if not count:
        raise ValueError("`loader` is empty: there are no observations to evaluate.")
    flags = torch.tensor([not is_known, not is_standard, not has_units], dtype=torch.float64, device=device)
    is_known, is_standard, has_units = (not flag for flag in sum_over_processes(flags).tolist())
    moments, averages = aggregate.compute(), rates_and_widths.compute().mean
    if not (moments.mean.isfinite().all() and moments.posterior_variance.isfinite().all()):
        raise ValueError("The posteriors are not finite: are there NaNs in the data, or did training diverge?")
    mean, spreads, rate, labels, condition = posteriors.compute().split([k, spread, 1, 1, columns], dim=1)
    probes = _labels(mean, labels[:, 0].long(), None if vae.condition is None else vae.condition(condition))
    rates, widths = averages.split([parts, k])
    mixture = None
    if is_known and len(mean) >= LEAST_COMPARED:
        if classes:
            mixture = categorical_estimates(mean.unflatten(1, (-1, classes)), rate[:, 0])
        else:
            spread_of = {"scale_tril": _unpacked(spreads, k)} if has_factors else {"variance": spreads}
            mixture = mixture_estimates(mean, rates=None if is_standard else rate[:, 0], **spread_of)
    latents = _latents(moments, rates, widths if has_units else None, mixture, count, classes)
    index, *rows, condition = data.compute().split([1, k, k, size, columns], dim=1)
    means, z, x = (each.to(vae.working_dtype) for each in rows)
    kept = Kept(index[:, 0].long(), means, z, x, condition if columns else None)
    constant = not sum_over_processes(varies) and bool((x == x[:1]).all())  # within each process, and among them
    return Encoded(count, constant, float(share), moments, latents, probes, kept, is_known and kind is td.Normal)


def _packed(factors: Tensor) -> Tensor:
    """Return the lower triangles of matrices, of shape ``(B, k, k)``, row by row."""
    rows, columns = torch.tril_indices(*factors.shape[1:], device=factors.device)
    return factors[:, rows, columns]


def _unpacked(packed: Tensor, k: int) -> Tensor:
    """Return the matrices of :func:`_packed`."""
    rows, columns = torch.tril_indices(k, k, device=packed.device)
    factors = packed.new_zeros(len(packed), k, k)
    factors[:, rows, columns] = packed
    return factors


def _classes(observations: Observations) -> Tensor | None:
    """Return each observation's class, int64, shape ``(B,)``; ``None`` if the labels are neither integers nor words."""
    label, index = observations.label, observations.index
    if label is None:
        return None
    if not isinstance(label, Tensor) and all(isinstance(word, str) for word in label):
        return torch.tensor([_number(word) for word in label], dtype=torch.int64, device=index.device)
    try:
        label = torch.as_tensor(label, device=index.device)
    except (TypeError, ValueError, RuntimeError):  # neither numbers nor words
        return None
    is_class = label.numel() == len(index) and not (label.is_floating_point() or label.is_complex())
    return label.flatten().long() if is_class else None


def _number(word: str) -> int:
    """Return a number for a word, the same in all batches and processes, and exact in float64."""
    return int.from_bytes(hashlib.sha256(word.encode()).digest()[:6], "big")


def _no_classes(label: Any) -> str:
    dtype, shape = getattr(label, "dtype", None), getattr(label, "shape", None)
    given = f"a sequence of {type(label[0]).__name__}" if dtype is None else f"{dtype} of shape {tuple(shape or ())}"
    return (
        f"The labels are not classes, so they are not predicted from the posterior means: give an integer or a word "
        f"for each observation, got {given}."
    )


def _latents(
    moments: AggregateMoments,
    rates: Tensor,
    widths: Tensor | None,
    mixture: MixtureEstimates | None,
    count: int,
    classes: int | None,
) -> Latents:
    """Describe the latent space.

    Args:
        moments: Moments of the aggregate posterior, in units of the prior.
        rates: Mean of each part of the rate.
        widths: Mean standard deviation of each dimension's posterior, in units of the prior; ``None`` if it has none.
        mixture: Estimates from some posteriors; ``None`` if they are neither Gaussians nor categories, or too few.
        count: Number of observations.
        classes: Number of classes of each group of categories; ``None`` for continuous latents.
    """
    variance, active = moments.variance_of_means, moments.active()
    if classes:
        variance = variance.unflatten(0, (-1, classes)).sum(1)
    units = int(is_active(variance).sum())
    nan = math.nan
    return Latents(
        active_units=units if count > 1 else None,
        mutual_information=float(mixture.lower) if mixture else nan,
        mutual_information_upper=float(mixture.upper) if mixture else nan,
        mutual_information_saturated=mixture is not None and mixture.saturated,
        mutual_information_observations=mixture.observations if mixture else 0,
        marginal_kl=float(mixture.marginal_kl) if mixture else nan,
        marginal_kl_lower=float(mixture.rate - mixture.upper) if mixture else nan,
        total_correlation=float(mixture.total_correlation) if mixture else nan,
        posterior_width=nan if widths is None else float((widths[active] if active.any() else widths).mean()),
        aggregate_mean_square=nan if widths is None else float(moments.mean.square().mean()),
        aggregate_variance_mean=nan if widths is None else float(moments.covariance.diagonal().mean()),
        rate_per_dimension=tuple(rates.tolist()),
        variance_per_dimension=tuple(variance.tolist()) if count > 1 else (nan,) * len(variance),
    )


def _labels(means: Tensor, labels: Tensor, condition: Tensor | None) -> Labels:
    """Predict the labels, unless some are missing (-1), all are the same, or there are too few; and the condition."""
    is_known = condition is not None and len(means) >= LEAST_COMPARED
    of_condition = linear_probe_r2(means, condition) if is_known else math.nan  # type: ignore[arg-type]
    if len(labels) < LEAST_COMPARED or bool((labels < 0).any()) or bool((labels == labels[0]).all()):
        return Labels(math.nan, math.nan, of_condition)
    return Labels(knn_accuracy(means, labels), linear_probe_accuracy(means, labels), of_condition)
