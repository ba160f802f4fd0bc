"""Evaluation of a trained VAE: every estimate in one record, with one verdict."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch

from ..checks import check_number, integer_from
from ..distributed import several_processes, sum_over_processes
from ..estimators.ex_post import ExPostDensity
from ..vae import VAE
from .assessment import FLOOR, LIMIT, TARGET, assess, unassessed, without_variance
from .decoding_pass import decode_all
from .encoding_pass import encode_all
from .generation import generate
from .record import LEAST_COMPARED, Evaluation

LEAST = {"importance_samples": 1, "observations": LEAST_COMPARED, "samples": LEAST_COMPARED}
"""The least value of each number that :func:`evaluate` takes."""
OwnMetric = Callable[[VAE, Iterable[Any]], float]


@torch.no_grad()
def evaluate(
    vae: VAE,
    loader: Iterable[Any],
    importance_samples: int = 100,
    observations: int = 2048,
    samples: int = 1000,
    own_metrics: Mapping[str, OwnMetric] | None = None,
    density: ExPostDensity | None = None,
) -> Evaluation:
    """Evaluate a model on a data set, in two passes over the loader.

    The noise of binarisation and posterior samples is fixed by the observations' indices, so batch size, order and
    number of processes do not change the result; in a distributed run every process returns the same. Memory grows only
    with the sizes of the subsets, not with K, the batch size or the data.

    Args:
        vae: The model, on the device to compute on. It is left unchanged.
        loader: Batches as the VAE accepts them, in a fixed order if they have no ``"index"``; it needs no length. The
            labels, B integers or words under ``"label"`` in a mapping or second in a sequence, are used for the
            probes. Of fewer than 10 observations only those numbers are measured that do not compare them with one
            another.
        importance_samples: Number K of samples for each observation.
        observations: Number M of observations, a fixed random subset, for mutual information, marginal KL, total
            correlation and the probes.
        samples: Maximum number of prior samples, and of observations they are compared with.
        own_metrics: The user's own metrics by name: each is called with the model and the loader. In a distributed run
            the loader is each process's share of the data, and the values are averaged over the observations.
        density: An ex-post density, to compare its samples with those of the prior.

    Raises:
        ValueError: If an option is out of range, the loader is empty or can be read only once, the name of an own
            metric is taken, or the numbers of the model are not finite.
        TypeError: If the model is not a VAE of this package, or an own metric does not return a number.
    """
    check_sizes(importance_samples=importance_samples, observations=observations, samples=samples)
    check_own_metrics(own_metrics)
    check_rereadable(loader)
    check_model(vae)
    training = vae.training
    vae.eval()
    try:
        encoded = encode_all(vae, loader, observations, samples)
        # They come before the longest pass, as they may fail.
        own = {
            name: _over_processes(_as_float(name, metric(vae, loader)), encoded.share, vae.device)
            for name, metric in (own_metrics or {}).items()
        }
        terms, likelihood = decode_all(vae, loader, importance_samples, encoded)
        generation = generate(vae, encoded.kept, density)
    finally:
        vae.train(training)
    has_capacity = vae.capacity_weight is not None  # its loss has no beta
    beta = terms.implied_beta if has_capacity else float(f"{float(vae.beta):.7g}")  # the digits of a float32
    distinct = len(encoded.kept.x)
    if distinct < LEAST_COMPARED:
        assessment = unassessed(distinct)
    elif encoded.constant:
        assessment = without_variance()
    else:
        has_target = vae.rate_limit is not None or has_capacity
        holds = [FLOOR] * bool(vae.free_bits > 0) + [TARGET] * has_target + [LIMIT] * (vae.error_limit is not None)
        assessment = assess(beta, terms, encoded.latents, generation, holds)
    return Evaluation(
        observations=encoded.count,
        latent_dim=vae.latent_dim,
        beta=beta,
        terms=terms,
        likelihood=likelihood,
        latents=encoded.latents,
        generation=generation,
        labels=encoded.labels,
        assessment=assessment,
        own=own,
    )


def check_sizes(**sizes: int) -> None:
    """Refuse options of :func:`evaluate`, given by name, that are too small or no whole numbers."""
    for name, value in sizes.items():
        check_number(name, value, f"at least {LEAST[name]}, a whole number", integer_from(LEAST[name]))


def check_own_metrics(metrics: Mapping[str, OwnMetric] | None) -> None:
    """Refuse own metrics under names that the evaluation uses itself."""
    if taken := Evaluation.names() & set(metrics or {}):
        raise ValueError(f"`own_metrics` must not use names that are already taken, got {sorted(taken)}.")


def check_model(model: object) -> None:
    """Refuse a model that is not a VAE of this package."""
    if not isinstance(model, VAE):
        raise TypeError(
            f"`vae` must be a lightning_vae.VAE, got {type(model).__name__}. For another model, "
            "lightning_vae.estimators has the individual estimators."
        )


def check_rereadable(loader: Iterable[Any]) -> None:
    """Refuse a loader that can be read only once."""
    if isinstance(loader, Iterator):
        raise ValueError("`loader` is read twice and must start over each time, got an iterator: pass a list.")


def _as_float(name: str, value: object) -> float:
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise TypeError(f"The metric {name!r} must return one number, got a {type(value).__name__}.") from None


def _over_processes(value: float, weight: float, device: torch.device) -> float:
    """Average a value over the processes, weighted by each one's share of the data."""
    if not several_processes():
        return value  # exact to the last digit
    share = [value * weight if weight else 0.0, weight]
    total, count = sum_over_processes(torch.tensor(share, dtype=torch.float64, device=device)).tolist()
    return float(total / count)
