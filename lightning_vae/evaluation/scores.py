"""Scores of single observations: the terms of the ELBO, and the log-likelihood by importance sampling."""

from __future__ import annotations

import torch
from torch import Tensor

from ..estimators.importance import effective_sample_size, importance_weighted_bound
from ..noise import sample_by_index
from ..objective import rate_parts
from ..observations import Observations
from ..vae import VAE
from .chunks import importance_draws, parts
from .measure import check_model, check_sizes

TERMS = ("elbo", "rate", "distortion")
SAMPLED = ("nll", "effective_sample_size")
"""The scores that need a number of importance samples."""


@torch.no_grad()
def score(vae: VAE, observations: Observations, importance_samples: int | None = None) -> dict[str, Tensor]:
    """Score each observation under a model, for example to find anomalies.

    The mean of a score over a data set is the number of the same name that :func:`lightning_vae.evaluate` gives with as
    many importance samples. The noise is fixed by the observations' indices, so batch size, order and number of
    processes do not change a score. Memory grows neither with K nor with the batch.

    Args:
        vae: The model, on the device to compute on. It is left unchanged.
        observations: A batch as the model sees it: ``vae.observe(batch)``.
        importance_samples: Number K of samples for each observation. ``None``, the default, estimates the distortion
            with one sample, as validation does, and leaves out the last two scores.

    Returns:
        Of each observation, in nats, shape ``(B,)``, float64: ``"elbo"``, higher is better; ``"rate"``;
        ``"distortion"``, the mean over the samples; with K also ``"nll"``, the importance-weighted negative
        log-likelihood, and ``"effective_sample_size"``, the effective number of the K samples, from 1 to K, no nats.

    Raises:
        ValueError: If ``importance_samples`` is not an integer of at least 1.
        TypeError: If the model is not a VAE of this package.

    References:
        Burda, Grosse and Salakhutdinov, "Importance Weighted Autoencoders", 2015, equation 8.

    Example::

        >>> vae = VAE((2,), latent_dim=1)
        >>> sorted(score(vae, vae.observe(torch.zeros(3, 2)), importance_samples=10))
        ['distortion', 'effective_sample_size', 'elbo', 'nll', 'rate']
    """
    check_model(vae)
    if importance_samples is not None:
        check_sizes(importance_samples=importance_samples)
    number, names = (1, TERMS) if importance_samples is None else (importance_samples, TERMS + SAMPLED)
    training = vae.training
    vae.eval()
    try:
        columns = [_score(vae, part, number)[: len(names)] for part in parts(vae, observations, number)]
    finally:
        vae.train(training)
    none = observations.index.new_empty(len(names), 0, dtype=torch.float64)  # a process's share may be empty
    return dict(zip(names, torch.cat([none, *columns], dim=1), strict=True))


def _score(vae: VAE, observations: Observations, number: int) -> Tensor:
    """Compute all scores of observations that fit in memory with their weights, of shape ``(5, B)``."""
    posterior, prior = vae.encode(observations), vae.prior_given(observations.condition)
    rate = rate_parts(posterior, prior, sample_by_index(posterior, observations.index)).double().sum(dim=1)
    distortion, log_weights = torch.zeros_like(rate), []
    for _, likelihoods, ratio in importance_draws(vae, observations, posterior, prior, number):
        distortion -= likelihoods.sum(dim=0) / number
        log_weights.append(likelihoods + ratio.sum(dim=2))
    weights = torch.cat(log_weights)
    nll = -importance_weighted_bound(weights)
    return torch.stack([-(distortion + rate), rate, distortion, nll, effective_sample_size(weights)])
