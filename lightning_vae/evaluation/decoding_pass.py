"""The second pass of an evaluation: importance samples, and what the width of the posterior is worth."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch import distributions as td

from ..callbacks.metrics.running_moments import RunningMoments
from ..estimators.aggregate_posterior import AggregateMoments
from ..estimators.importance import ImportanceWeightedLikelihood, LogLikelihood
from ..noise import sample_by_index
from ..objective import kl_per_dimension
from ..vae import VAE
from .chunks import decoded_at_once, in_parts, log_likelihood
from .observation_batches import batches

_WEIGHTS_AT_ONCE = 2**22
_NAN = math.nan
_WIDTH_STEP = 0.05  # relative change of the posterior's width that its price is measured by
_WIDTH_SAMPLES = 4


@dataclass(frozen=True)
class Decoded:
    """What the decoder makes of each observation's own latents, over the whole data."""

    count: int
    likelihood: LogLikelihood
    pruned: LogLikelihood
    distortion: float
    rates: Tensor
    widths: Tensor
    price: float
    price_error: float
    calibration: float


def decode_all(vae: VAE, loader: Iterable[Any], number: int, moments: AggregateMoments) -> Decoded:
    """Weigh importance samples, and measure what the width of the posterior is worth."""
    device = vae.device
    likelihood, pruned = (ImportanceWeightedLikelihood().to(device) for _ in range(2))
    terms = RunningMoments(5 + 2 * vae.latent_dim).to(device)
    active = moments.active()
    mean, scale = (values.to(vae._working_dtype) for values in (moments.mean, moments.covariance.diagonal().sqrt()))
    for _, observed, index, _ in batches(vae, loader, max(1, _WEIGHTS_AT_ONCE // number)):
        posterior = vae._encode(observed)
        log_weights, log_pruned, distortion = [], [], torch.zeros(len(index), dtype=torch.float64, device=device)
        chunk = max(1, decoded_at_once(vae) // len(index))
        for start in range(0, number, chunk):
            draws = range(start, min(start + chunk, number))
            z = torch.stack([sample_by_index(posterior, index, draw) for draw in draws])
            likelihoods = log_likelihood(vae, observed, z)
            distortion -= likelihoods.sum(dim=0)
            ratio = (vae.prior.log_prob(z) - posterior.log_prob(z)).double()
            log_weights.append(likelihoods + ratio.sum(dim=2))
            if not active.all():
                # The same noise, but around the mean of all: the decoder gets what it knows, and nothing of this x.
                blind = mean + scale * (z - posterior.mean) / posterior.stddev
                without = log_likelihood(vae, observed, torch.where(active, z, blind))
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
    # Where all posteriors have the prior's width there is nothing to buy.
    price = -distortion_slope / rate_slope if rate_slope < -1e-3 else _NAN
    distortion_error, rate_error = averages.standard_error[1:3].tolist()
    price_error = math.hypot(distortion_error, price * rate_error) / (abs(rate_slope) or _NAN)
    if not means[0].isfinite():
        raise ValueError(
            f"The distortion is {float(means[0])}: are there NaNs in the data, or has the training diverged?"
        )
    return Decoded(
        count=int(averages.count),
        likelihood=likelihood.compute(),
        pruned=pruned.compute(),
        distortion=float(means[0]),
        rates=means[5 : 5 + vae.latent_dim],
        widths=means[5 + vae.latent_dim :],
        price=price,
        price_error=price_error,
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
    wider, narrower = log_likelihood(vae, observed, z + step), log_likelihood(vae, observed, z - step)
    yield (narrower - wider).mean(dim=0) / (2 * _WIDTH_STEP)

    narrowing = (posterior.variance.double() - 1).sum(dim=1)
    yield narrowing if isinstance(posterior, td.Normal) else torch.full_like(narrowing, _NAN)

    errors, claimed = zip(
        *(_error_and_variance(vae.decode(part), x) for part, x in in_parts(vae, z, observed)), strict=True
    )
    yield torch.cat(errors).view(len(z), -1).mean(dim=0)
    yield torch.cat(claimed).view(len(z), -1).mean(dim=0)


def _error_and_variance(decoded: td.Distribution, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return each observation's squared error and the variance that the likelihood claims, NaN where it has none."""
    error = (decoded.mean - x).double().square().flatten(1).sum(dim=1)
    try:
        return error, decoded.variance.double().expand_as(x).flatten(1).sum(dim=1)
    except NotImplementedError:
        return error, torch.full_like(error, _NAN)
