"""Priors p(z) and p(z|c)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn
from torch import distributions as td

from .likelihoods.base import at_least_float32


class Prior(nn.Module):
    """Base class of the priors: p(z), or p(z|c) of a condition.

    Args:
        latent_dim: Number of latent dimensions k.
        condition_dim: Size of the condition c, 0 without.
    """

    is_joint = False
    """True if the rate has no parts for the dimensions, as of a mixture."""
    wants = 0
    """Number of observations that :meth:`start` needs."""

    def __init__(self, latent_dim: int, condition_dim: int = 0) -> None:
        super().__init__()
        self.latent_dim, self.condition_dim = latent_dim, condition_dim

    def connect(self, shape: tuple[int, ...], encode: Callable[[Tensor], td.Distribution]) -> None:
        """Take what a prior needs that is made from posteriors: the shape of the data, and the encoder."""

    def start(self, x: Tensor) -> None:
        """Take the first observations, in the networks' scale, before the first step."""

    def forward(self, condition: Tensor | None = None) -> td.Distribution:
        """Return p(z), or p(z|c)."""
        raise NotImplementedError

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # Under `bf16-true`, rounding would undo each optimizer step.
        super()._apply(at_least_float32(fn), recurse)  # type: ignore[no-untyped-call]
        return self


class StandardNormal(Prior):
    """The standard normal distribution N(0, I)."""

    parameters_: Tensor

    def __init__(self, latent_dim: int, condition_dim: int = 0) -> None:
        super().__init__(latent_dim, condition_dim)
        self.register_buffer("parameters_", torch.tensor([0.0, 1.0]), persistent=False)

    def forward(self, condition: Tensor | None = None) -> td.Normal:  # noqa: ARG002
        """Return N(0, I), batch shape ``(k,)``."""
        loc, scale = self.parameters_.unbind()
        return td.Normal(loc.expand(self.latent_dim), scale.expand(self.latent_dim), validate_args=False)
