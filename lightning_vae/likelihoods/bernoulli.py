"""Likelihoods of data in [0, 1]: binarised, or as they are."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch import distributions as td
from torch.distributions.utils import broadcast_all
from torch.nn import functional as F  # noqa: N812
from typing_extensions import override

from ..checks import check_number, integer_from
from ..distributed import sum_over_processes
from ..networks import Shape
from ..noise import uniform_by_index
from .base import IndependentNumbers, Likelihood


class Bernoulli(Likelihood):
    """Bernoulli over dynamically binarised data; the decoder's output is the logit.

    A grey level in [0, 1] is the probability that the pixel is on. Training draws the pixel again at each use (Burda et
    al. 2015, section 5); at evaluation the seed and the index fix the draw. Cross-entropy on the grey levels themselves
    is not a likelihood.

    Args:
        shape: Shape of one observation.
        levels: Number of integer levels of the raw data, ``None`` for data in [0, 1].
        seed: Seed of the binarisation at evaluation.
        start_at_mean: Add the logits of each pixel's mean over the first training batch to the decoder's output. The
            decoder then does not have to learn them first, while the pressure on the rate already shuts latents down.
            (Burda et al.'s code initialises its output bias this way.)
    """

    offset: Tensor

    unit_interval = True
    takes_mask = True

    def __init__(self, shape: Shape, levels: int | None = None, seed: int = 0, start_at_mean: bool = False) -> None:
        super().__init__(shape, levels)
        check_number("seed", seed, "an integer", integer_from())
        self.seed = seed
        self.start_at_mean = start_at_mean
        if start_at_mean:
            self.register_buffer("offset", torch.zeros(self.shape))
            self._start_with_data("offset")

    def observe(self, x: Tensor, index: Tensor | None) -> Tensor:
        """Return ``x`` binarised, with each observation's own noise if ``index`` is given."""
        noise = torch.rand_like(x) if index is None else uniform_by_index(index, math.prod(self.shape), self.seed)
        return noise.view_as(x).lt_(x).to(x.dtype)  # in place, as 0 or 1: saves a conversion from bool

    def forward(self, output: Tensor, x: Tensor | None = None, mask: Tensor | None = None) -> td.Distribution:
        """Return the Bernoulli distribution with these logits."""
        if self._is_first(x):
            self.offset.copy_(_mean_logits(x, mask))
        logits = output + self.offset if self.start_at_mean else output
        bernoulli = td.Bernoulli(logits=logits, validate_args=False)
        return _IndependentBernoulli(bernoulli, len(self.shape), validate_args=False)


class _IndependentBernoulli(IndependentNumbers):
    """Independent Bernoullis that negate the sum and not each term, which saves two passes in the gradient."""

    @override
    def _log_prob(self, value: Tensor) -> Tensor:
        logits, value = broadcast_all(self.base_dist.logits, value)
        cross_entropy = F.binary_cross_entropy_with_logits(logits, value, reduction="none")
        return -self._sum(cross_entropy)


class ContinuousBernoulli(Likelihood):
    """Continuous Bernoulli over data in [0, 1]; the decoder's output is the logit.

    References:
        Loaiza-Ganem and Cunningham, "The continuous Bernoulli: fixing a pervasive error in variational autoencoders",
        NeurIPS 2019.
    """

    unit_interval = True
    takes_mask = True

    def forward(self, output: Tensor, x: Tensor | None = None, mask: Tensor | None = None) -> td.Distribution:  # noqa: ARG002
        """Return the continuous Bernoulli distribution with these logits."""
        return self._independent(td.ContinuousBernoulli(logits=output, validate_args=False))


def _mean_logits(x: Tensor, mask: Tensor | None) -> Tensor:
    """Compute the logits of the global batch's mean, with half a count added on both sides for constant pixels."""
    there = torch.ones_like(x) if mask is None else mask.expand_as(x).to(x.dtype)
    on, count = sum_over_processes(
        torch.stack([(x if mask is None else x.where(mask, 0)).sum(dim=0), there.sum(dim=0)])
    )
    return torch.logit((on + 0.5) / (count + 1))
