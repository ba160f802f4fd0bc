"""The observations of a loader, their latents and their importance samples in chunks, so that memory stays bounded."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from torch import distributions as td

from ..noise import sample_by_index
from ..observations import Observations
from ..vae import VAE

# Numbers of data decoded at once, for any K and batch size. Few on a CPU, so that the activations
# stay in its cache.
_NUMBERS_AT_ONCE = {"cpu": 2**17}
_ELSEWHERE = 2**22
_WEIGHTS_AT_ONCE = 2**22


def batches(vae: VAE, loader: Iterable[Any], samples: int = 1) -> Iterator[Observations]:
    """Yield each batch as the model sees it, split into :func:`parts`."""
    count = 0
    for batch in loader:
        observations = vae.observe(batch, first=count)
        count += len(observations)
        yield from parts(vae, observations, samples)


def parts(vae: VAE, observations: Observations, samples: int) -> Iterator[Observations]:
    """Yield observations in parts that are decoded at once, and whose weights of so many samples are kept at once."""
    return observations.split(min(decoded_at_once(vae), max(1, _WEIGHTS_AT_ONCE // samples)))


def importance_draws(
    vae: VAE, observations: Observations, posterior: td.Distribution, prior: td.Distribution, number: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Draw samples of the posteriors, a part of them at once, with the terms of their log-weights.

    Args:
        vae: The model.
        observations: B observations, whose indices fix the noise.
        posterior: Their posteriors.
        prior: The prior, or that of each.
        number: Number of samples for each observation.

    Yields:
        Latents, of shape ``(S, B, k)``; log p(x|z), of shape ``(S, B)``, float64; and :func:`log_ratio`. The S of all
        parts add up to ``number``.
    """
    target, chunk = Target.of(observations), max(1, decoded_at_once(vae) // len(observations))
    for start in range(0, number, chunk):
        draws = range(start, min(start + chunk, number))
        z = torch.stack([sample_by_index(posterior, observations.index, draw) for draw in draws])
        yield z, log_likelihood(vae, target, z), log_ratio(prior, posterior, z)


def log_ratio(prior: td.Distribution, posterior: td.Distribution, z: Tensor) -> Tensor:
    """Compute log p(z) - log q(z|x) at S samples of each posterior, in nats, float64.

    Returns:
        Shape ``(S, B, parts)`` where both factorise alike, else ``(S, B, 1)``.
    """
    logs = [each.log_prob(z).double() for each in (prior, posterior)]
    if logs[0].ndim != logs[1].ndim or logs[0].ndim == 2:
        logs = [each.flatten(2).sum(2, keepdim=True) if each.ndim > 2 else each[..., None] for each in logs]
    return logs[0] - logs[1]


def decoded_at_once(vae: VAE) -> int:
    """Return the number of latents that are decoded at once."""
    return max(1, _NUMBERS_AT_ONCE.get(vae.device.type, _ELSEWHERE) // math.prod(vae.likelihood.output_shape))


@dataclass(frozen=True)
class Target:
    """Observations that latents are decoded for.

    Attributes:
        observed: The data, on which the likelihood is evaluated, shape ``(B, *shape)``.
        condition: The columns of the condition, shape ``(B, columns)``; ``None`` without.
        mask: True where a number is there, shape ``(B, *shape)``; ``None`` if all are.
    """

    observed: Tensor
    condition: Tensor | None = None
    mask: Tensor | None = None

    @classmethod
    def of(cls, observations: Observations) -> Self:
        """Return the part of a record that is decoded for."""
        return cls(observations.observed, observations.condition, observations.mask)

    def __getitem__(self, rows: Tensor) -> Self:
        return type(self)(
            self.observed[rows],
            None if self.condition is None else self.condition[rows],
            None if self.mask is None else self.mask[rows],
        )

    def log_prob(self, decoded: td.Distribution) -> Tensor:
        """Compute log p(x|z) of the numbers that are there, in nats, float64, shape ``(B,)``."""
        log_prob: Any = decoded.log_prob
        value: Tensor = log_prob(self.observed) if self.mask is None else log_prob(self.observed, self.mask)
        return value.double()


def in_parts(vae: VAE, z: Tensor, target: Target) -> Iterator[tuple[td.Distribution, Target]]:
    """Decode S latents of each observation in flat chunks: p(x|z) with the part of the target that it is for."""
    flat = z.flatten(0, 1).flatten(1)
    for part in torch.arange(len(flat), device=z.device).split(decoded_at_once(vae)):
        chunk = target[part % len(target.observed)]
        yield decode(vae, flat[part], chunk.condition), chunk


def decode(vae: VAE, z: Tensor, condition: Tensor | None) -> td.Distribution:
    """Return p(x|z), or p(x|z, c)."""
    return vae.decode(z) if condition is None else vae.decode(z, condition)


def log_likelihood(vae: VAE, target: Target, z: Tensor) -> Tensor:
    """Compute log p(x|z) for each of ``(S, B)`` latents, in nats, float64."""
    return torch.cat([chunk.log_prob(decoded) for decoded, chunk in in_parts(vae, z, target)]).view(len(z), -1)


def decoded_means(vae: VAE, z: Tensor, condition: Tensor | None = None) -> list[Tensor]:
    """Decode latents of shape ``(N, k)`` to flat means, in chunks."""
    size = decoded_at_once(vae)
    conditions = [None] * len(z) if condition is None else condition.split(size)
    return [decode(vae, *pair).mean.flatten(1) for pair in zip(z.split(size), conditions, strict=False)]
