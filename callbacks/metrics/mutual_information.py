"""Mutual information between data and latents, from the posteriors of some observations."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

# Unlike a seed that data are drawn with: the same noise in data and samples would look like information.
_SEED = 0x5EED
_ROWS = 64  # of the matrix at a time: they stay in the processor's cache, which is three times as fast


def mutual_information(mean: Tensor, variance: Tensor, seed: int = _SEED) -> Tensor:
    r"""Estimate the mutual information of data and latents from M diagonal Gaussian posteriors.

    .. math::
        I = \frac{1}{M} \sum_n \left[ \log q(z_n|x_n) - \log \frac{1}{M} \sum_m q(z_n|x_m) \right],
        \qquad z_n \sim q(z|x_n)

    The same sample stands in both terms and its own component in the mixture. So the estimate is 0 where all posteriors
    are equal, never exceeds :math:`\log M`, and is on average a lower bound of the true value. Above
    :math:`0.9 \log M` read it as "at least this".

    The noise is drawn on the CPU from a generator of its own: the result is deterministic and the same on any device.

    Args:
        mean: Means of the posteriors, of shape ``(M, k)``.
        variance: Their variances, of shape ``(M, k)``.
        seed: Seed of the noise.

    Returns:
        The estimate in nats, float64.

    References:
        Hoffman, Johnson, "ELBO surgery: yet another way to carve up the variational evidence lower bound", 2016.
        Poole et al., "On Variational Bounds of Mutual Information", 2019, section 2.

    Example::

        >>> mutual_information(torch.tensor([[-9.0], [9.0]]), torch.ones(2, 1))  # log 2
        tensor(0.6931, dtype=torch.float64)
    """
    mean, variance = mean.double(), variance.double()
    mean = mean - mean.mean(dim=0)  # moves all posteriors alike; keeps the products below small
    noise = torch.randn(mean.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    sample = mean + variance.sqrt() * noise.to(mean.device)
    precision = 1 / variance
    # log q(z|x_m) is linear in (z^2, z); its constant is the same for all.
    rows, slopes = torch.cat([sample.square(), sample], dim=1), torch.cat([-0.5 * precision, mean * precision], dim=1)
    offset = -0.5 * (mean.square() * precision + variance.log()).sum(dim=1)
    excess = []
    for block, first in zip(rows.split(_ROWS), range(0, len(mean) + 1, _ROWS), strict=False):
        log_density = torch.addmm(offset, block, slopes.T)  # [n, m]: log q(z_n|x_m)
        excess.append(log_density.sub_(log_density.diagonal(first).clone().unsqueeze(1)).logsumexp(dim=1))
    return (math.log(max(len(mean), 1)) - torch.cat(excess)).mean()


def first_rows(rows: Tensor, number: int) -> Tensor:
    """Keep the rows with the smallest distinct indices, in their order.

    Args:
        rows: Rows that start with their index, of shape ``(N, columns)`` or, from several processes,
            ``(processes, N, columns)``. An infinite index marks an empty row.
        number: Number of rows to keep.

    Returns:
        The rows, of shape ``(number, columns)``.
    """
    rows = rows.flatten(end_dim=-2)
    index, order = rows[:, 0].sort(stable=True)
    repeated = torch.zeros_like(index, dtype=torch.bool)
    repeated[1:] = index[1:] == index[:-1]
    index, kept = index.masked_fill(repeated, math.inf).sort(stable=True)
    return torch.cat([index[:number, None], rows[order[kept[:number]], 1:]], dim=1)


class MutualInformation(Metric):
    """Estimates the mutual information of data and latents from the first observations by index.

    It keeps the posteriors of the ``observations`` smallest indices, so that neither the size of the batches nor their
    order nor the number of processes changes the result, and an observation seen twice counts once. See
    :func:`mutual_information` for the estimate and its cap.

    As input to ``forward`` and ``update`` the metric accepts ``mean`` and ``variance`` of diagonal Gaussian posteriors,
    of shape ``(N, dim)``, and the ``index`` of each observation, of shape ``(N,)``; N may be 0.
    As output of ``forward`` and ``compute`` it returns the estimate in nats; NaN before the first observation.

    Args:
        dim: Number of latent dimensions.
        observations: Number of observations kept.
        kwargs: Options of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If ``dim`` or ``observations`` is not positive.

    Example::

        >>> metric = MutualInformation(dim=1)
        >>> metric.update(torch.tensor([[-9.0]]), torch.ones(1, 1), torch.tensor([0]))
        >>> metric.update(torch.tensor([[9.0]]), torch.ones(1, 1), torch.tensor([1]))
        >>> metric.compute()
        tensor(0.6931, dtype=torch.float64)
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False

    rows: Tensor

    def __init__(self, dim: int, observations: int = 2048, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if dim < 1:
            raise ValueError(f"`dim` must be at least 1, got {dim}.")
        if observations < 1:
            raise ValueError(f"`observations` must be at least 1, got {observations}.")
        self.dim = dim
        self.observations = observations
        empty = torch.full((observations, 1 + 2 * dim), math.inf, dtype=torch.float64)
        self.add_state("rows", empty, dist_reduce_fx=partial(first_rows, number=observations))

    @property
    def posteriors(self) -> tuple[Tensor, Tensor]:
        """Means and variances of the distinct observations kept so far, each of shape ``(M, dim)``."""
        kept = self.rows[self.rows[:, 0].isfinite(), 1:]
        return kept[:, : self.dim], kept[:, self.dim :]

    def update(self, mean: Tensor, variance: Tensor, index: Tensor) -> None:
        """Add the posteriors of a batch."""
        rows = torch.cat([index.unsqueeze(1).double(), mean.detach().double(), variance.detach().double()], dim=1)
        self.rows = first_rows(torch.cat([self.rows, rows]), self.observations)

    def compute(self) -> Tensor:
        """Estimate the mutual information of the observations kept."""
        return mutual_information(*self.posteriors)
