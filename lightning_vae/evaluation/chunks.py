"""The observations of a loader and their latents in chunks, so that memory stays bounded."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..observations import Observations
from ..vae import VAE

# Numbers of data decoded at once, for any K and batch size. Few on a CPU, so that the activations
# stay in its cache.
_NUMBERS_AT_ONCE = {"cpu": 2**17}
_ELSEWHERE = 2**22


def batches(vae: VAE, loader: Iterable[Any], most: float = math.inf) -> Iterator[Observations]:
    """Yield each batch as the model sees it.

    Batches with more observations than are decoded at once, or than `most`, are split.
    """
    rows = int(min(decoded_at_once(vae), most))
    count = 0
    for batch in loader:
        observations = vae.observe(batch, first=count)
        count += len(observations)
        yield from observations.split(rows)


def decoded_at_once(vae: VAE) -> int:
    """Return the number of latents that are decoded at once."""
    return max(1, _NUMBERS_AT_ONCE.get(vae.device.type, _ELSEWHERE) // math.prod(vae.shape))


def in_parts(vae: VAE, z: Tensor, observed: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield latents of shape ``(S, B, k)`` in flat chunks, each latent with its observation of the B."""
    flat = z.flatten(0, 1)
    for part in torch.arange(len(flat), device=z.device).split(decoded_at_once(vae)):
        yield flat[part], observed[part % len(observed)]


def log_likelihood(vae: VAE, observed: Tensor, z: Tensor) -> Tensor:
    """Compute log p(x|z) for each of ``(S, B)`` latents, z of shape ``(S, B, k)``, in nats, float64."""
    parts = [vae.decode(part).log_prob(x).double() for part, x in in_parts(vae, z, observed)]
    return torch.cat(parts).view(len(z), -1)


def decoded_means(vae: VAE, z: Tensor) -> list[Tensor]:
    """Decode latents of shape ``(N, k)`` to flat means, in chunks."""
    return [vae.decode(part).mean.flatten(1) for part in z.split(decoded_at_once(vae))]
