"""Posteriors q(z|x): the meaning of the encoder's output."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch import distributions as td


def posterior_of(output: Any, size: int, latent_dim: int) -> td.Distribution:
    """Turn an encoder's output into a posterior, in at least float32.

    Args:
        output: A factorised distribution; or the mean and log-variance of a Gaussian, each of shape ``(B, k)``, as a
            pair or as one tensor of ``2k`` columns.
        size: Number of observations B.
        latent_dim: Number of latent dimensions k.

    Returns:
        A distribution of batch shape ``(B, k)``.

    Raises:
        ValueError: If the output has another shape.
    """
    if isinstance(output, td.Distribution):
        posterior = _widened(output)
    else:
        mean, log_variance = output if isinstance(output, tuple | list) else output.chunk(2, dim=-1)
        posterior = td.Normal(widen(mean), (0.5 * widen(log_variance)).exp(), validate_args=False)
    if posterior.batch_shape != (size, latent_dim) or posterior.event_shape:
        raise ValueError(
            f"`encoder` must give a mean and a log-variance of shape {(size, latent_dim)} each, or a distribution of "
            f"that batch shape and no event shape, got {tuple(posterior.batch_shape)} and event shape "
            f"{tuple(posterior.event_shape)}."
        )
    return posterior


def widen(tensor: Tensor) -> Tensor:
    """Cast half precision to float32, in which rates and likelihoods are computed."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def _widened(distribution: td.Distribution) -> td.Distribution:
    """Return the distribution with parameters in half precision cast to float32."""
    parameters: dict[str, Any] = {
        name: value for name, value in vars(distribution).items() if name in distribution.arg_constraints
    }
    if all(widen(value) is value for value in parameters.values()):
        return distribution
    make: Any = type(distribution)
    widened: td.Distribution = make(**{name: widen(value) for name, value in parameters.items()}, validate_args=False)
    return widened
