"""Paths through the latent space, to be decoded."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributions import Distribution

_REACH = 2.5  # standard deviations of the prior


def interpolations(latents: Tensor, paths: int, steps: int) -> Tensor:
    """Return points on straight lines, each from a latent of the first half to one of the second half.

    Args:
        latents: Shape ``(n, ...)``.
        paths: Number of lines, at most n // 2.
        steps: Number of points on each, both ends included.

    Returns:
        Shape ``(lines, steps, ...)``.
    """
    half = len(latents) // 2
    first, last = latents[:half][:paths], latents[half:][: min(half, paths)]
    ratio = torch.linspace(0, 1, steps, device=latents.device, dtype=latents.dtype)
    ratio = ratio.view(1, -1, *[1] * (latents.ndim - 1))
    return first.unsqueeze(1) * (1 - ratio) + last.unsqueeze(1) * ratio


def expanded(prior: Distribution, shape: Sequence[int]) -> Distribution:
    """Expand a prior to latents of a shape, whose last axes are the prior's event, if it has one (a mixture does)."""
    expansion: Distribution = prior.expand(torch.Size(shape[: len(shape) - len(prior.event_shape)]))
    return expansion


def traversals(latent: Tensor, dimensions: Sequence[int], prior: Distribution, steps: int) -> Tensor:
    """Return copies of a latent with one dimension moved from -2.5 to 2.5 standard deviations of the prior.

    Args:
        latent: The latent of one observation, shape ``(...)``.
        dimensions: The dimensions to move, one a row, as indices into the flattened latent.
        prior: The prior, which broadcasts to the latent's shape. If it has no moments, N(0, 1) is used instead.
        steps: Number of values of each dimension.

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
