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


def prior_samples(prior: Distribution, shape: Sequence[int]) -> Tensor:
    """Draw latents of a shape, whose last axes are those of the prior. Only axes of size 1 need a prior that expands.

    Raises:
        ValueError: If the prior does not fit the shape.
    """
    own = prior.batch_shape + prior.event_shape
    drawn = torch.Size(shape[: len(shape) - len(own)])
    samples = prior.sample(drawn) if drawn + own == torch.Size(shape) else None
    if samples is None:
        samples = prior.expand(torch.Size(shape[: len(shape) - len(prior.event_shape)])).sample()
    if samples.shape != torch.Size(shape):
        raise ValueError(f"A sample of the prior has shape {tuple(samples.shape)}, and the latents {tuple(shape)}.")
    return samples


def traversals(latent: Tensor, dimensions: Sequence[int], prior: Distribution, steps: int) -> Tensor:
    """Return copies of a latent with one dimension moved from -2.5 to 2.5 standard deviations of the prior.

    Args:
        latent: The latent of one observation, shape ``(...)``.
        dimensions: The dimensions to move, one a row, as indices into the flattened latent.
        prior: The prior, whose moments broadcast to the latent's shape. If it has none, N(0, 1) is used instead.
        steps: Number of values of each dimension.

    Returns:
        Shape ``(dimensions, steps, ...)``.
    """
    try:
        centre, unit = (each.expand(latent.shape).flatten() for each in (prior.mean, prior.stddev))
    except NotImplementedError:
        centre, unit = torch.zeros(latent.numel()), torch.ones(latent.numel())
    points = latent.flatten().repeat(len(dimensions), steps, 1)
    for row, number in enumerate(dimensions):
        offset = torch.linspace(-_REACH, _REACH, steps, device=unit.device)
        points[row, :, number] = (centre[number] + offset * unit[number]).to(points)
    return points.view(len(dimensions), steps, *latent.shape)
