"""Evaluation of a trained VAE: every estimate in one record, with one verdict."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch

from ..distributed import several_processes, sum_over_processes
from ..vae import VAE
from .assessment import assess
from .decoding_pass import decode_all
from .encoding_pass import encode_all
from .generation import generate
from .record import Evaluation

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
    processes do not change the result; in a distributed run every process returns the same. Memory grows with the
    subsets' sizes alone, not with K, the batch size or the data.

    Args:
        vae: The model, on the device to compute on. It is left as it was.
        loader: Batches as the VAE takes them, in a fixed order where they have no ``"index"``. A mapping's ``"label"``,
            integers of shape ``(B,)``, is used for the probes.
        importance_samples: Number K of samples for each observation.
        observations: Number M of observations, a fixed random subset, for mutual information, marginal KL, total
            correlation and the probes.
        samples: Number of prior samples, and of observations they are compared with, at most.
        own_metrics: The user's own metrics by name: each is called with the model and the loader. In a distributed run
            the loader is each process's share of the data, and the values are averaged over the observations.

    Raises:
        ValueError: On an option out of its range, a loader that can be read only once, fewer than 10
            observations, an own metric with a name that is taken, or a model whose numbers are not finite.
        TypeError: On another model than a VAE of this package, or an own metric that returns no number.
    """
    check_sizes(importance_samples=importance_samples, observations=observations, samples=samples)
    if taken := Evaluation.names() & set(own_metrics or {}):
        raise ValueError(f"`own_metrics` must have names of their own, got {sorted(taken)}.")
    if isinstance(loader, Iterator):
        raise ValueError("`loader` is read twice and must start again each time, got an iterator: pass a list.")
    if not isinstance(vae, VAE):
        raise TypeError(
            f"`vae` must be a lightning_vae.VAE, got {type(vae).__name__}. For another model, lightning_vae.estimators "
            "has the estimators one by one."
        )
    training = vae.training
    vae.eval()
    try:
        encoded = encode_all(vae, loader, observations, samples)
        terms, likelihood = decode_all(vae, loader, importance_samples, encoded)
        generation = generate(vae, encoded.kept)
        own = {
            name: _over_processes(_as_float(name, metric(vae, loader)), encoded.share, vae.device)
            for name, metric in (own_metrics or {}).items()
        }
    finally:
        vae.train(training)
    beta = float(f"{float(vae.beta):.7g}")  # the digits that a float32 has
    return Evaluation(
        observations=encoded.count,
        latent_dim=vae.latent_dim,
        beta=beta,
        terms=terms,
        likelihood=likelihood,
        latents=encoded.latents,
        generation=generation,
        labels=encoded.labels,
        assessment=assess(beta, terms, encoded.latents, generation),
        own=own,
    )


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


def _over_processes(value: float, weight: float, device: torch.device) -> float:
    """Average what each process measured on its share of the data, weighted by its size."""
    if not several_processes():
        return value  # to the last digit
    share = [value * weight if weight else 0.0, weight]
    total, count = sum_over_processes(torch.tensor(share, dtype=torch.float64, device=device)).tolist()
    return float(total / count)
