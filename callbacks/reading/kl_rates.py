"""The rate of each latent dimension, KL(q(z_j|x) || p(z_j)), in nats."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.distributions import (
    Distribution,
    Independent,
    LowRankMultivariateNormal,
    MultivariateNormal,
    Normal,
    kl_divergence,
)

from .distributions import describe

_WHOLE = (MultivariateNormal, LowRankMultivariateNormal)


def kl_per_dimension(posterior: Distribution, prior: Distribution) -> Tensor:
    """Compute the rate of each observation and latent dimension in closed form.

    Args:
        posterior: q(z|x), batch shape ``(B, ...)``.
        prior: p(z), which broadcasts to the posterior's batch shape, axis by axis from the last.

    Returns:
        Nats, in the batch shape of the posterior.

    Raises:
        NotImplementedError: If there is no closed form.
        ValueError: If the prior does not broadcast to the posterior.
    """
    _check_shapes(posterior, prior)
    if type(posterior) is Normal and type(prior) is Normal:
        return _normal_rate(posterior, prior)
    rate = kl_divergence(posterior, prior)
    if rate.shape != posterior.batch_shape:
        raise ValueError(
            f"A rate must have the posterior's batch shape, {tuple(posterior.batch_shape)}, but the prior, a "
            f"{type(prior).__name__}, gives one of shape {tuple(rate.shape)}."
        )
    return rate


class Rates(NamedTuple):
    """The rates of a batch, in parts.

    Attributes:
        nats: Rate of each observation and part, of shape ``(B, ...)``: a part for each dimension, group of classes or
            position where the posterior and the prior factorise alike, ``(B, 1)`` where one of them is joint.
        is_estimate: Whether the pair has no closed form, so that the rates are ``log q(z|x) - log p(z)`` at a sample.
    """

    nats: Tensor
    is_estimate: bool


def rate_parts(posterior: Distribution, prior: Any, z: Tensor | None = None) -> Rates:
    """Compute the rate of each observation, in as many parts as posterior and prior have in common.

    Two Gaussians, and every other pair that torch has a formula for, are in closed form. Otherwise the rate is the
    estimate at one sample, which may be negative.

    Args:
        posterior: q(z|x), with the observations along its first axis.
        prior: p(z) or p(z|c): a distribution that broadcasts to the posterior, axis by axis from the last; or an object
            with a ``log_prob(z)`` of shape ``(B,)``, ``(B, 1)`` or that of the posterior.
        z: A sample of the posterior; without it one is drawn, without changing the random state.

    Raises:
        ValueError: If the prior does not broadcast to the posterior, or ``z`` or a log-density has another shape.
    """
    posterior, prior = _aligned(posterior, prior)
    if isinstance(prior, Distribution):
        try:
            return Rates(_columns(kl_per_dimension(posterior, prior)), False)
        except NotImplementedError:
            pass
    shape = posterior.batch_shape + posterior.event_shape
    if z is None:
        with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else []), torch.no_grad():
            z = posterior.sample()
    elif z.shape != shape:
        raise ValueError(f"`z` must be one sample of the posterior, of shape {tuple(shape)}, got {tuple(z.shape)}.")
    own, under_prior = posterior.log_prob(z), prior.log_prob(z)
    if not isinstance(under_prior, Tensor) or under_prior.shape[:1] != own.shape[:1]:
        raise ValueError(
            f"The prior's `log_prob` must give one number for each of {len(own)} observations, or for each of their "
            f"dimensions, got {describe(under_prior)}."
        )
    if under_prior.shape != own.shape:  # a joint density
        if under_prior.numel() != len(own):
            raise ValueError(
                f"The prior's `log_prob` must have shape ({len(own)},) or {tuple(own.shape)}, got "
                f"{tuple(under_prior.shape)}."
            )
        own, under_prior = own.reshape(len(own), -1).sum(1), under_prior.reshape(-1)
    return Rates(_columns(own - under_prior), True)


def rates_under_floors(rates: Tensor, per: Literal["dimension", "whole"] | int, average: str) -> Tensor:
    """Compute the rates that floors are compared with.

    Args:
        rates: Rate of each observation and dimension in nats, shape ``(B, k)``.
        per: Scope of each floor: ``"dimension"``, ``"whole"`` or a number of consecutive dimensions, which divides k.
        average: ``"batch"`` compares the mean over the batch, ``"sample"`` each observation's rate.

    Returns:
        Nats, shape ``(1, G)`` or ``(B, G)`` for ``G`` floors.

    Raises:
        ValueError: If the rates have another shape, or ``per`` does not divide k.
    """
    if rates.ndim != 2:
        raise ValueError(f"`rates` must have shape (B, k), got {tuple(rates.shape)}.")
    if isinstance(per, int) and (per < 1 or rates.shape[1] % per):
        raise ValueError(f"`per` must divide the {rates.shape[1]} dimensions, got {per}.")
    size = rates.shape[1] if per == "whole" else 1 if per == "dimension" else per
    grouped: Tensor = rates.unflatten(1, (-1, size)).sum(-1)
    return grouped.mean(0, keepdim=True) if average == "batch" else grouped


def _columns(rates: Tensor) -> Tensor:
    return rates[:, None] if rates.ndim == 1 else rates


def _aligned(posterior: Distribution, prior: Any) -> tuple[Distribution, Any]:
    """Give both distributions the same event: a pair of which one is over whole vectors has joint rates."""
    if not isinstance(prior, Distribution):
        return posterior, prior
    own, other = len(posterior.event_shape), len(prior.event_shape)
    if own < other <= own + len(posterior.batch_shape) - 1:
        posterior = Independent(posterior, other - own, validate_args=False)
    elif other < own:
        try:
            prior = prior.expand(posterior.batch_shape[: max(len(prior.batch_shape) - own, 0)] + posterior.event_shape)
        except (RuntimeError, ValueError, NotImplementedError):
            return posterior, prior  # refused by its shape
        prior = Independent(prior, own - other, validate_args=False)
    if isinstance(posterior, _WHOLE) or isinstance(prior, _WHOLE):
        return _as_whole(posterior, posterior.mean), _as_whole(prior, posterior.mean)
    return posterior, prior


def _as_whole(distribution: Distribution, like: Tensor) -> Distribution:
    """Return independent Gaussians over a vector as one Gaussian, which has closed forms with a full covariance."""
    base = getattr(distribution, "base_dist", None)
    if isinstance(distribution, Independent) and isinstance(base, Normal) and distribution.event_shape[1:] == ():
        return MultivariateNormal(base.loc.to(like), scale_tril=base.scale.to(like).diag_embed(), validate_args=False)
    return distribution


def _check_shapes(posterior: Distribution, prior: Distribution) -> None:
    shape, own = prior.batch_shape, posterior.batch_shape
    broadcasts = len(shape) <= len(own) and all(
        size in (1, of) for size, of in zip(reversed(shape), reversed(own), strict=False)
    )
    if not broadcasts or prior.event_shape != posterior.event_shape:
        raise ValueError(
            f"The module's `prior` of shape {tuple(shape + prior.event_shape)} does not fit its posterior of shape "
            f"{tuple(own + posterior.event_shape)}: it must broadcast to it, axis by axis from the last."
        )


def _normal_rate(posterior: Normal, prior: Normal) -> Tensor:
    loc, scale = (each.to(posterior.loc.device) if each.ndim else each for each in (prior.loc, prior.scale))
    ratio = posterior.scale / scale
    # torch's `kl_divergence` takes the logarithm of the squared ratio, which underflows for small scales.
    return 0.5 * (ratio.square() + ((posterior.loc - loc) / scale).square() - 1) - ratio.log()
