"""Decode latents that do not come from an observation's own posterior."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..estimators.ex_post import ExPostDensity
from ..estimators.probes import nearest_distance
from ..noise import sample_by_index
from ..vae import VAE
from .chunks import Target, decoded_means, log_likelihood
from .encoding_pass import Kept
from .record import LEAST_COMPARED, Generation

_PRIOR_SEED = 0x9A10
_SHIFTS = 5  # number of other observations from whose latents each one is decoded


def generate(vae: VAE, kept: Kept, density: ExPostDensity | None = None) -> Generation:
    """Decode shuffled latents, prior samples and midpoints between posterior means; NaN for too few observations.

    Args:
        vae: The model.
        kept: Observations.
        density: An ex-post density, whose samples are decoded too.
    """
    number = len(kept.x)
    if number < 2:
        return Generation(math.nan, math.nan, math.nan, math.nan)
    there = ~kept.x.isnan()
    is_whole = bool(there.all())
    mask = None if is_whole else there.view(number, *vae.shape)
    observed = vae.likelihood.observe(kept.x.nan_to_num(nan=0.0).view(number, *vae.shape), kept.index)
    target = Target(observed, kept.condition, mask)
    distortion = -log_likelihood(vae, target, kept.z[None]).mean()
    # The subset is in random order, so neighbours in it have nothing in common.
    others = torch.stack([kept.z.roll(shift, dims=0) for shift in range(1, min(_SHIFTS, number - 1) + 1)])
    shuffled = -log_likelihood(vae, target, others).mean()

    # Equal observations count once: an observation's own reconstruction would lie too close to its duplicate.
    first = _first_of_each(kept.x)
    data, z_own, mean = kept.x[first], kept.z[first], kept.mean[first]
    condition = None if kept.condition is None else kept.condition[first]
    if number < LEAST_COMPARED or len(data) < 3 or not is_whole:  # distances need whole observations
        return Generation(float(shuffled - distortion), math.nan, math.nan, math.nan)
    place = torch.arange(len(data), device=data.device)
    beside = (place + 1) % len(data)
    prior = prior_sample(vae, place, condition, _PRIOR_SEED)
    midpoints = (mean + mean[beside]) / 2
    # Each is compared with the same number of observations: all but the two that a midpoint came from.
    excluded = torch.stack([place, beside], dim=1)
    latents = [z_own, prior, midpoints]
    if density is not None:
        latents.append(sample_by_index(density.distribution(), place.cpu(), seed=_PRIOR_SEED).to(z_own))
    own, *distances = (
        float(nearest_distance(torch.cat(decoded_means(vae, z, condition)), data, excluded).mean()) for z in latents
    )
    return Generation(float(shuffled - distortion), *(distance / own for distance in distances))


def prior_sample(vae: VAE, place: Tensor, condition: Tensor | None, seed: int) -> Tensor:
    """Draw a latent from the prior for each place, the same ones each time.

    Args:
        vae: The model.
        place: Numbers of the samples, int64, shape ``(N,)``.
        condition: The columns of the condition, shape ``(N, columns)``; ``None`` without.
        seed: Seed of the draw.

    Returns:
        Shape ``(N, k)``.
    """
    return sample_by_index(vae.prior_given(condition), place, seed=seed).flatten(1)


def _first_of_each(rows: Tensor) -> Tensor:
    """Return the positions of the rows that differ from all earlier rows, in order."""
    which = rows.unique(dim=0, return_inverse=True)[1]
    first = torch.full_like(which[: int(which.max()) + 1], len(rows))
    place = torch.arange(len(rows), device=rows.device)
    return first.scatter_reduce(0, which, place, "amin").sort().values
