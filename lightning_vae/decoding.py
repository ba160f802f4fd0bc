"""Decoding many latents, some at a time."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .vae import VAE

# Pixels: what bounds the memory, whatever K and the batch size. Few on a CPU, so that what the layers make of them
# stays in its cache.
_NUMBERS_AT_ONCE = {"cpu": 2**17}
_ELSEWHERE = 2**22


def decoded_at_once(vae: VAE) -> int:
    """Return how many latents are decoded at a time."""
    return max(1, _NUMBERS_AT_ONCE.get(vae.device.type, _ELSEWHERE) // math.prod(vae.shape))


def log_likelihood(vae: VAE, observed: Tensor, z: Tensor) -> Tensor:
    """Compute log p(x|z) of each of ``(S, B)`` latents, z of shape ``(S, B, k)``, in nats, float64."""
    flat = z.flatten(0, 1)
    places = torch.arange(len(flat), device=z.device).split(decoded_at_once(vae))
    parts = [vae.decode(flat[part]).log_prob(observed[part % len(observed)]).double() for part in places]
    return torch.cat(parts).view(len(z), -1)


def decoded_means(vae: VAE, z: Tensor) -> list[Tensor]:
    """Decode latents of shape ``(N, k)`` to flat means, some at a time."""
    return [vae.decode(part).mean.flatten(1) for part in z.split(decoded_at_once(vae))]
