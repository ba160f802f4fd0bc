"""The second pass of an evaluation: importance samples, and the beta that the posteriors' width implies."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch import distributions as td

from ..callbacks.metrics.prior_units import prior_units
from ..callbacks.metrics.running_moments import RunningMoments
from ..distributed import sum_over_processes
from ..estimators.importance import ImportanceWeightedLikelihood
from ..noise import sample_by_index
from ..objective import JOINT_GAUSSIANS
from ..priors import Prior
from ..vae import VAE
from .chunks import Target, batches, importance_draws, in_parts, log_likelihood
from .encoding_pass import Encoded
from .record import LikelihoodEstimate, Terms

_WIDTH_STEP = 0.05  # relative change of the posterior's width
_WIDTH_SAMPLES = 4


def decode_all(vae: VAE, loader: Iterable[Any], number: int, encoded: Encoded) -> tuple[Terms, LikelihoodEstimate]:
    """Compute the importance-weighted likelihood, and vary the width of the posteriors.

    Args:
        vae: The model.
        loader: The same batches as in the first pass.
        number: Number of importance samples for each observation.
        encoded: The result of the first pass.
    """
    device, moments = vae.device, encoded.moments
    likelihood, pruned = (ImportanceWeightedLikelihood().to(device) for _ in range(2))
    averages = RunningMoments(5).to(device)
    active = moments.active()
    mean, scale = (values.to(vae.working_dtype) for values in (moments.mean, moments.covariance.diagonal().sqrt()))
    prunes = not active.all() and encoded.is_gaussian and not vae.has_joint_rate
    for observations in batches(vae, loader, number):
        target, index, posterior = Target.of(observations), observations.index, vae.encode(observations)
        prior = vae.prior_given(observations.condition)
        units = prior_units(prior, posterior.mean)
        log_weights, log_pruned, distortion = [], [], torch.zeros(len(index), dtype=torch.float64, device=device)
        for z, likelihoods, ratio in importance_draws(vae, observations, posterior, prior, number):
            distortion -= likelihoods.sum(dim=0)
            log_weights.append(likelihoods + ratio.sum(dim=2))
            if prunes:
                # The same noise, but around the mean over the data: it carries no information about this x.
                blind = mean + scale * (z - posterior.mean) / posterior.stddev
                blind = blind if units is None else units.loc + units.scale * blind
                without = log_likelihood(vae, target, torch.where(active, z, blind))
                log_pruned.append(without + (ratio * active).sum(dim=2))
        likelihood.update(torch.cat(log_weights))
        pruned.update(torch.cat(log_pruned or log_weights))
        columns = [distortion / number, *_slopes(vae, target, posterior, prior, index)]
        averages.update(torch.stack(columns, dim=1))
    if (again := int(sum_over_processes(averages.state[0, 0].clone()))) != encoded.count:
        raise ValueError(
            f"`loader` gave {encoded.count} observations at the first reading and {again} at the second: it must start "
            "over each time it is iterated."
        )
    whole, without_inactive = likelihood.compute(), pruned.compute()
    return _terms(averages, sum(encoded.latents.rate_per_dimension)), LikelihoodEstimate(
        nll=-float(whole.value),
        nll_error=float(whole.standard_error),
        importance_samples=number,
        effective_sample_size=float(whole.effective_sample_size),
        nll_active_only=-float(without_inactive.value) if encoded.count > 1 and (prunes or active.all()) else math.nan,
    )


def _terms(averages: RunningMoments, rate: float) -> Terms:
    """Assemble the terms from averages of the distortion and of the values from :func:`_slopes`."""
    _, means, errors = (values.tolist() for values in averages.compute())
    distortion, distortion_slope, rate_slope, squared_error, claimed = means
    if not math.isfinite(distortion):
        raise ValueError(f"The distortion is {distortion}: are there NaNs in the data, or did training diverge?")
    # If all posteriors have the prior's width, the slope of the rate is 0 and the ratio is undefined.
    implied_beta = -distortion_slope / rate_slope if rate_slope < -1e-3 else math.nan
    return Terms(
        elbo=-(distortion + rate),
        rate=rate,
        distortion=distortion,
        implied_beta=implied_beta,
        implied_beta_error=math.hypot(errors[1], implied_beta * errors[2]) / (abs(rate_slope) or math.nan),
        calibration=squared_error / claimed if claimed > 0 else math.nan,
    )


def _slopes(
    vae: VAE, target: Target, posterior: td.Distribution, prior: td.Distribution, index: Tensor
) -> Iterator[Tensor]:
    r"""Differentiate distortion and rate by the log of a factor c by which each posterior is wider around its mean.

    At an optimum of ``distortion + beta * rate`` in the posterior's width, the ratio of the two derivatives is
    ``-beta``. The rate's is in closed form for a Gaussian posterior and prior, ``sum_j (variance_j - 1)`` in units of
    the prior. For another prior, and for the distortion, it is a central difference with common noise. It is NaN for
    other posteriors, and for a prior that the encoder makes, as a VampPrior, which would widen with the posteriors.

    Yields:
        For each observation: the derivatives of distortion and rate by log c at c = 1, in nats; the squared error; and
        the variance that the likelihood claims, NaN if it has none. Each of shape ``(B,)``, float64.
    """
    z = torch.stack([sample_by_index(posterior, index, draw) for draw in range(_WIDTH_SAMPLES)])
    unknown = torch.full(index.shape, math.nan, dtype=torch.float64, device=index.device)
    if isinstance(posterior, td.OneHotCategorical):
        yield unknown
    else:
        step = _WIDTH_STEP * (z - posterior.mean)
        wider, narrower = log_likelihood(vae, target, z + step), log_likelihood(vae, target, z - step)
        yield (narrower - wider).mean(dim=0) / (2 * _WIDTH_STEP)

    uses_encoder = type(vae.prior_module).connect is not Prior.connect
    if not isinstance(posterior, (td.Normal, *JOINT_GAUSSIANS)) or uses_encoder:
        yield unknown
    elif isinstance(prior, td.Normal):
        yield ((posterior.variance / prior.variance).double() - 1).sum(dim=1)
    else:
        narrower, wider = (prior.log_prob(each).double() for each in (z - step, z + step))
        slope = (narrower - wider).flatten(1).view(*z.shape[:2], -1).sum(2).mean(dim=0) / (2 * _WIDTH_STEP)
        yield slope - z[0, 0].numel()  # the entropy's part

    errors, claimed = zip(*(_error_and_variance(*pair) for pair in in_parts(vae, z, target)), strict=True)
    yield torch.cat(errors).view(len(z), -1).mean(dim=0)
    yield torch.cat(claimed).view(len(z), -1).mean(dim=0)


def _error_and_variance(decoded: td.Distribution, target: Target) -> tuple[Tensor, Tensor]:
    """Return each observation's squared error and the variance that the likelihood claims, NaN if it has none."""
    x, there = target.observed, 1 if target.mask is None else target.mask
    error = ((decoded.mean - x).double().square() * there).flatten(1).sum(dim=1)
    try:
        return error, (decoded.variance.double().expand_as(x) * there).flatten(1).sum(dim=1)
    except NotImplementedError:
        return error, torch.full_like(error, math.nan)
