"""The rate of each latent dimension, KL(q(z_j|x) || p(z_j)), in nats."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.distributions import Distribution, Normal, kl_divergence


def kl_per_dimension(posterior: Distribution, prior: Distribution, z: Tensor | None = None) -> Tensor:
    """Compute the rate of each observation and latent dimension.

    Args:
        posterior: q(z|x), batch shape ``(B, ...)``.
        prior: p(z), which broadcasts to the posterior's batch shape, axis by axis from the last.
        z: A sample of the posterior, of its shape. It is used if this pair of distributions has no closed form: the
            rate is then the estimate ``log q(z|x) - log p(z)`` at that sample, which may be negative.

    Returns:
        Nats, in the batch shape of the posterior.

    Raises:
        NotImplementedError: If there is neither a closed form nor a sample.
        ValueError: If the prior does not broadcast to the posterior, or ``z`` has another shape.
    """
    _check_shapes(posterior, prior)
    if type(posterior) is Normal and type(prior) is Normal:
        return _normal_rate(posterior, prior)
    try:
        rate = kl_divergence(posterior, prior)
    except NotImplementedError:
        if z is None:
            raise
        shape = posterior.batch_shape + posterior.event_shape
        if z.shape != shape:
            raise ValueError(
                f"`z` must be one sample of the posterior, of shape {tuple(shape)}, got {tuple(z.shape)}."
            ) from None
        rate = posterior.log_prob(z) - prior.log_prob(z)
    if rate.shape != posterior.batch_shape:
        raise ValueError(
            f"A rate must have the posterior's batch shape, {tuple(posterior.batch_shape)}, but the prior, a "
            f"{type(prior).__name__}, gives one of shape {tuple(rate.shape)}."
        )
    return rate


@torch.no_grad()
def measured_rates(posterior: Distribution, prior: Distribution) -> Tensor:
    """Measure the rates of a batch, for a callback that watches training without changing it.

    If there is no closed form, a separate sample is used, drawn without changing the random state.

    Args:
        posterior: q(z|x), batch shape ``(B, ...)``.
        prior: p(z), which broadcasts to it.

    Returns:
        Nats, float32, shape ``(B, k)``; one column where the posterior is a distribution over whole vectors.

    Raises:
        ValueError: If the prior does not broadcast to the posterior.
    """
    try:
        rate = kl_per_dimension(posterior, prior)
    except NotImplementedError:
        with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else []):
            z = posterior.sample()
        rate = kl_per_dimension(posterior, prior, z)
    return rate.float().reshape(len(rate), -1)


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
    ratio = posterior.scale / prior.scale
    # torch's `kl_divergence` takes the logarithm of the squared ratio, which underflows for small scales.
    return 0.5 * (ratio.square() + ((posterior.loc - prior.loc) / prior.scale).square() - 1) - ratio.log()
