"""Evaluation of a trained VAE: every estimate in one record, one table and one diagnosis."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields
from math import nan
from typing import Any

import torch

from ..estimators.mixture import is_saturated
from ..vae import VAE
from .assessment import Measured, diagnose
from .decoding_pass import Decoded, decode_all
from .encoding_pass import Latents, encode_all
from .generation import Generated, generate
from .observation_batches import over_processes
from .record import Evaluation as Evaluation

_LEAST = {"importance_samples": 1, "observations": 10, "samples": 10}
OwnMetric = Callable[[VAE, Iterable[Any]], float]


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
        TypeError: On another model than a VAE of this package, or an own metric that returns no number.
    """
    check_sizes(importance_samples=importance_samples, observations=observations, samples=samples)
    taken = {each.name for each in fields(Evaluation)} & set(own_metrics or {})
    if taken:
        raise ValueError(f"`own_metrics` must have names of their own, got {sorted(taken)}.")
    if isinstance(loader, Iterator):
        raise ValueError("`loader` is gone through twice and must start anew each time, got an iterator: pass a list.")

    if not isinstance(vae, VAE):
        raise TypeError(
            f"`vae` must be a lightning_vae.VAE, got {type(vae).__name__}. For another model, lightning_vae.estimators "
            "has the estimators one by one."
        )
    training = vae.training
    vae.eval()
    try:
        latents = encode_all(vae, loader, observations, samples)
        decoded = decode_all(vae, loader, importance_samples, latents.moments)
        generated = generate(vae, latents.kept)
        own = {
            name: over_processes(_as_float(name, metric(vae, loader)), latents.share, vae.device)
            for name, metric in (own_metrics or {}).items()
        }
    finally:
        vae.train(training)
    return _assembled(vae, importance_samples, latents, decoded, generated, own)


def check_sizes(**sizes: int) -> None:
    """Refuse options of :func:`evaluate` that are too small, by name."""
    for name, value in sizes.items():
        if value < _LEAST[name]:
            raise ValueError(f"`{name}` must be at least {_LEAST[name]}, got {value}.")


def _as_float(name: str, value: object) -> float:
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise TypeError(f"The metric {name!r} must return one number, got a {type(value).__name__}.") from None


def _assembled(
    vae: VAE,
    importance_samples: int,
    latents: Latents,
    decoded: Decoded,
    generated: Generated,
    own: Mapping[str, float],
) -> Evaluation:
    moments, mixture = latents.moments, latents.mixture
    active = moments.active()
    units = int(active.sum())
    rate = float(decoded.rates.sum())
    lower, upper = (float(mixture.lower), float(mixture.upper)) if mixture else (nan, nan)
    beta = float(f"{float(vae.beta):.7g}")  # as it was given: float32 holds 0.1 as 0.10000000149
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
            marginal_kl=float(mixture.rate) - upper if mixture else nan,
            posterior_width=width,
            rate_price=decoded.price,
            price_error=decoded.price_error,
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
        marginal_kl=float(mixture.marginal_kl) if mixture else nan,
        total_correlation=float(mixture.total_correlation) if mixture else nan,
        posterior_width=width,
        aggregate_mean_square=float(moments.mean.square().mean()),
        aggregate_variance_mean=float(moments.covariance.diagonal().mean()),
        rate_price=decoded.price,
        price_error=decoded.price_error,
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
