"""Posteriors q(z|x): the meaning of the encoder's output."""

from __future__ import annotations

from collections.abc import Sequence
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
    shape = (size, latent_dim)
    if isinstance(output, td.Distribution):
        if output.batch_shape == shape and not output.event_shape:
            return _widened(output)
        got = f"{tuple(output.batch_shape)} and event shape {tuple(output.event_shape)}"
    else:
        parts = output.chunk(2, dim=-1) if isinstance(output, Tensor) and output.ndim else output
        tensors = isinstance(parts, Sequence) and all(isinstance(part, Tensor) for part in parts)
        if tensors and len(parts) == 2 and parts[0].shape == parts[1].shape == shape:
            mean, log_variance = parts
            return td.Normal(widen(mean), (0.5 * widen(log_variance)).exp(), validate_args=False)
        got = " and ".join(str(tuple(part.shape)) for part in parts) if tensors else type(output).__name__
    raise ValueError(
        f"`encoder` must give a mean and a log-variance of shape {shape} each, or a distribution of that batch shape "
        f"and no event shape, got {got}."
    )


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
