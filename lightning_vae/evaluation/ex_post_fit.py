"""The ex-post density of a trained model, fitted to the latents of its training data."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from ..callbacks.metrics.observation_subset import ObservationSubset
from ..estimators.ex_post import ExPostDensity
from ..noise import sample_by_index
from ..vae import VAE
from .chunks import batches

_OBSERVATIONS = 10_000


@torch.no_grad()
def fit_density(vae: VAE, loader: Iterable[Any], components: int = 10) -> ExPostDensity:
    """Fit a density to the aggregate posterior, from one sample of each posterior.

    Args:
        vae: The trained model. It is left unchanged.
        loader: The training data, in batches as the VAE accepts them. Of more than 10,000 observations a fixed random
            subset is used.
        components: Number of Gaussians of the mixture.

    Returns:
        The density, the same in every process. ``vae.sample(n, density=density.distribution())`` decodes samples of it.

    Raises:
        ValueError: If the latents are categories, too few or not finite, or lie on a plane.
    """
    if vae.head is not None and vae.head.classes:
        raise ValueError("An ex-post density is one of real latents, and those of the model are categories.")
    latents = ObservationSubset(vae.latent_dim, _OBSERVATIONS).to(vae.device)
    training = vae.training
    vae.eval()
    try:
        for part in batches(vae, loader):
            latents.update(sample_by_index(vae.encode(part), part.index).double(), part.index)
    finally:
        vae.train(training)
    z = latents.compute()
    if len(z) <= max(components, vae.latent_dim):
        most = f"Set at most {len(z) - 1}" if len(z) > vae.latent_dim + 1 else "Give more training data"
        raise ValueError(
            "`components`, the number of Gaussians of `--evaluation.ex_post`, must be below the number of latents that "
            f"they are fitted to, as must the number of dimensions, {vae.latent_dim}; got {components} for the "
            f"{len(z)} latents of the training data. {most}, or leave the option out."
        )
    return ExPostDensity.fit(z, components)
