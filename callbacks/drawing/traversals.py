"""Where to go in the latent space to see what a decoder has learned."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributions import Distribution

_REACH = 2.5  # standard deviations of the prior


def interpolations(latents: Tensor, paths: int, steps: int) -> Tensor:
    """Return points on straight lines between latents, from each of the first half to one of the second.

    Args:
        latents: Shape ``(n, ...)``.
        paths: How many lines; n // 2 if that is less.
        steps: How many points on each, both ends included.

    Returns:
        Shape ``(lines, steps, ...)``.
    """
    half = len(latents) // 2
    first, last = latents[:half][:paths], latents[half:][: min(half, paths)]
    ratio = torch.linspace(0, 1, steps, device=latents.device, dtype=latents.dtype)
    ratio = ratio.view(1, -1, *[1] * (latents.ndim - 1))
    return first.unsqueeze(1) * (1 - ratio) + last.unsqueeze(1) * ratio


def expanded(prior: Distribution, shape: Sequence[int]) -> Distribution:
    """Return a prior as one over latents of a shape; its own axes, a mixture's, say, are the last of them."""
    over: Distribution = prior.expand(torch.Size(shape[: len(shape) - len(prior.event_shape)]))
    return over


def traversals(latent: Tensor, dimensions: Sequence[int], prior: Distribution, steps: int) -> Tensor:
    """Return a latent with one of its dimensions moved from -2.5 to 2.5 standard deviations of the prior.

    Args:
        latent: One observation's, shape ``(...)``.
        dimensions: Which to move, one after the other; they count through all axes.
        prior: The prior, which broadcasts to the latent's shape. One without moments moves as N(0, 1) does.
        steps: How many values each takes.

    Returns:
        Shape ``(dimensions, steps, ...)``.
    """
    prior = expanded(prior, latent.shape)
    try:
        centre, unit = prior.mean.flatten(), prior.stddev.flatten()
    except NotImplementedError:
        centre, unit = torch.zeros(latent.numel()), torch.ones(latent.numel())
    points = latent.flatten().repeat(len(dimensions), steps, 1)
    for row, number in enumerate(dimensions):
        offset = torch.linspace(-_REACH, _REACH, steps, device=unit.device)
        points[row, :, number] = (centre[number] + offset * unit[number]).to(points)
    return points.view(len(dimensions), steps, *latent.shape)
