"""Sums over a stream of posteriors, position by position, exact over batches and processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from .running_moments import merge_moments


class LatentSums(Metric):
    """Moments of the posteriors' means, and sums of their variances and rates, over a stream of rows.

    As input ``update`` accepts rows of latents of shape ``(N, columns)``; N may be 0. The states are float64.

    Args:
        columns: Length of a row.
        parts: Number of parts of a rate.
        kwargs: Options of :class:`torchmetrics.Metric`.

    Attributes:
        standard: Count, mean and sum of squared deviations of the means in units of the prior, ``(3, columns)``.
        raw: The same of the means as they are.
        variances: Sum of the variances, in units of the prior and as they are, ``(2, columns)``.
        rates: Number of observations, and sum of each part of their rates, ``(1 + parts,)``.
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False

    standard: Tensor
    raw: Tensor
    variances: Tensor
    rates: Tensor

    def __init__(self, columns: int, parts: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("standard", torch.zeros(3, columns, dtype=torch.float64), dist_reduce_fx=merge_moments)
        self.add_state("raw", torch.zeros(3, columns, dtype=torch.float64), dist_reduce_fx=merge_moments)
        self.add_state("variances", torch.zeros(2, columns, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("rates", torch.zeros(1 + parts, dtype=torch.float64), dist_reduce_fx="sum")

    def update(
        self,
        standard: tuple[Tensor, Tensor],
        raw: tuple[Tensor, Tensor] | None,
        rates: Tensor,
        mask: Tensor | None,
    ) -> None:
        """Add rows.

        Args:
            standard: Means and variances in units of the prior, each of shape ``(N, columns)``.
            raw: Means and variances as they are; ``None`` if they are the same.
            rates: Of shape ``(N, parts)``, 0 where masked.
            mask: Which positions count, of shape ``(N, columns)``; ``None`` for all.
        """
        moments = masked_moments(standard[0], mask)
        self.standard = merge_moments(torch.stack([self.standard, moments]))
        raw_moments = moments if raw is None else masked_moments(raw[0], mask)
        self.raw = merge_moments(torch.stack([self.raw, raw_moments]))
        sums = [
            variance.sum(0) if mask is None else (variance * mask).sum(0) for _, variance in (standard, raw or standard)
        ]
        self.variances = self.variances + torch.stack(sums)
        self.rates = self.rates + torch.cat([rates.new_full((1,), len(rates)), rates.sum(0)])

    @property
    def moments(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """All states, in their order."""
        return self.standard, self.raw, self.variances, self.rates

    @moments.setter
    def moments(self, states: Sequence[Tensor]) -> None:
        self.standard, self.raw, self.variances, self.rates = states

    def compute(self) -> Tensor:
        """Return the sums of the rates; the moments are read as attributes."""
        return self.rates


def masked_moments(values: Tensor, mask: Tensor | None) -> Tensor:
    """Summarise the values of each column that count: count, mean and sum of squared deviations, ``(3, columns)``."""
    if mask is None:
        mean = values.sum(0) / max(len(values), 1)
        return torch.stack([torch.full_like(mean, len(values)), mean, (values - mean).square().sum(0)])
    count = mask.sum(0).to(values.dtype)
    mean = (values * mask).sum(0) / count.clamp(min=1)
    return torch.stack([count, mean, ((values - mean).square() * mask).sum(0)])
