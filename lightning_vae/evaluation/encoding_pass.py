"""The first pass of an evaluation: the posteriors."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch import distributions as td

from ..callbacks.metrics.observation_subset import ObservationSubset
from ..estimators.aggregate_posterior import AggregateMoments, AggregatePosterior
from ..estimators.mixture import MixtureEstimates, mixture_estimates
from ..estimators.probes import knn_accuracy, linear_probe_accuracy
from ..noise import sample_by_index, uniform_by_index
from ..vae import VAE
from .observation_batches import batches

_SUBSET_SEED = 0x5B5E7


@dataclass(frozen=True)
class Kept:
    """A fixed random subset of the observations."""

    index: Tensor
    mean: Tensor
    z: Tensor
    x: Tensor


@dataclass(frozen=True)
class Latents:
    """What the posteriors say without the decoder, and the observations that are kept for it."""

    share: float  # observations that this process has seen
    moments: AggregateMoments
    mixture: MixtureEstimates | None
    probes: tuple[float, float]
    kept: Kept


def encode_all(vae: VAE, loader: Iterable[Any], observations: int, samples: int) -> Latents:
    """Collect the posteriors: their moments, and those of two subsets."""
    k, device = vae.latent_dim, vae.device
    size = math.prod(vae.shape)
    aggregate = AggregatePosterior(k).to(device)
    posteriors = ObservationSubset(2 * k + 1, observations).to(device)
    data = ObservationSubset(1 + 2 * k + size, samples).to(device)
    gaussian = True
    for x, observed, index, label in batches(vae, loader):
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
    probes = (
        (knn_accuracy(mean, labels), linear_probe_accuracy(mean, labels)) if probed else (float("nan"), float("nan"))
    )
    index, means, z, x = data.compute().split([1, k, k, size], dim=1)
    dtype = vae._working_dtype
    kept = Kept(index[:, 0].long(), means.to(dtype), z.to(dtype), x.to(dtype))
    mixture = mixture_estimates(mean, variance) if gaussian else None
    return Latents(share, moments, mixture, probes, kept)


def _keys(index: Tensor) -> Tensor:
    """Put observations in a random order that depends on their index alone: 23 random bits, then 30 of the index."""
    random = uniform_by_index(index, 1, seed=_SUBSET_SEED)[:, 0].double()
    return (random * 2**23).floor() * 2**30 + index.remainder(2**30).double()
