"""The units of a prior, in which latents are measured: its mean and its standard deviation in each dimension."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, MixtureSameFamily, MultivariateNormal, Normal, OneHotCategorical


def prior_units(prior: Any, mean: Tensor) -> Normal | None:
    """Return the moments of a prior, joint or not, in each dimension.

    A dimension whose moments are not finite is left in its own units.

    Args:
        prior: p(z) or p(z|c).
        mean: Means of the posteriors, to whose shape the moments are expanded, and on whose device they are.

    Returns:
        A Gaussian of the shape of the means; ``None`` for categories, for a prior without known moments, and for one of
        another shape.
    """
    base = getattr(prior, "base_dist", prior)
    if not isinstance(prior, Distribution) or isinstance(base, OneHotCategorical):
        return None
    try:
        loc, scale = prior.mean.detach().to(mean.device), prior.stddev.detach().to(mean.device)
        loc, scale = loc.expand(mean.shape), scale.expand(mean.shape)
    except (NotImplementedError, RuntimeError):
        return None
    if not isinstance(prior, Normal):
        is_known = loc.isfinite() & scale.isfinite() & (scale > 0)
        loc, scale = loc.where(is_known, 0.0), scale.where(is_known, 1.0)
    return Normal(loc, scale, validate_args=False)


def marginal_densities(prior: Any, mean: Tensor, grid: Tensor) -> Tensor | None:
    """Compute the density of each dimension of a prior, in its own units.

    Args:
        prior: p(z) or p(z|c). Over several conditions the densities are averaged.
        mean: Means of the posteriors, shape ``(n, ...)``, as in :func:`prior_units`.
        grid: Points in units of the prior, shape ``(points,)``.

    Returns:
        Shape ``(points, dimensions)``, on the CPU; ``None`` where the marginals of a joint prior are not known.
    """
    units = prior_units(prior, mean)
    if units is None:
        return None
    if isinstance(prior, MixtureSameFamily) and prior.event_shape:
        parts: Any = prior.component_distribution
        is_gaussian = isinstance(getattr(parts, "base_dist", parts), Normal | MultivariateNormal)
        if not is_gaussian or prior.batch_shape or prior.event_shape != mean.shape[1:]:
            return None
        loc, scale = units.loc[0], units.scale[0]
        each = Normal((parts.mean - loc) / scale, (parts.stddev / scale).clamp(min=1e-3), validate_args=False)
        weights = prior.mixture_distribution.probs
        densities = [torch.tensordot(weights, each.log_prob(point).exp(), 1).flatten() for point in grid.to(loc)]
    elif isinstance(prior, Normal | MultivariateNormal):
        densities = [Normal(torch.zeros(mean[0].numel()), 1.0).log_prob(point).exp() for point in grid]
    elif prior.event_shape:
        return None
    else:
        densities = [
            (prior.log_prob(units.loc + units.scale * point).exp() * units.scale).flatten(1).mean(0)
            for point in grid.to(units.loc)
        ]
    return torch.stack(densities).detach().float().cpu()
