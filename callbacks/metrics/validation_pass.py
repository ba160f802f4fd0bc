"""The posteriors of one pass over the data, in memory that does not grow with the data."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .active_units import ActiveUnits
from .mutual_information import PosteriorSample
from .observation_subset import ObservationSubset
from .rate_decomposition import decompose_rate

_MOST_KEPT = 2**20  # means and variances kept between passes, 16 MiB; above that the memory is freed for the model


@dataclass(frozen=True)
class Measurements:
    """The measurements of one pass over the data; ``None`` marks values without a closed form.

    Attributes:
        variance: Variance over the data of each dimension's posterior mean, of shape ``(k,)``.
        rate: Mean rate of each dimension in nats, of shape ``(k,)``.
        mutual_information: Mutual information of data and latents, in nats; see
            :func:`~.mutual_information.mutual_information`.
        marginal_kl: The part of the rate that moves all posteriors together, in nats; see
            :func:`~.rate_decomposition.decompose_rate`.
        observations: Number of observations that the mutual information comes from.
    """

    variance: Tensor
    rate: Tensor | None
    mutual_information: float | None
    marginal_kl: float | None
    observations: int


class ValidationPass:
    """Collect the posteriors of one pass: kept by batch, and folded into moments every ``observations`` rows.

    Args:
        observations: Number of observations that the mutual information is estimated from.
        rank: Number of this process.
        world_size: Number of processes.
    """

    def __init__(self, observations: int, rank: int = 0, world_size: int = 1) -> None:
        self.observations = observations
        self.rank = rank
        self.world_size = world_size
        self._batches: list[tuple[Tensor, ...]] = []
        self._rows = 0
        self._shape: torch.Size | None = None
        self._dim = 0
        self._units: ActiveUnits
        self._posteriors: ObservationSubset
        self._rate_sum: Tensor

    @property
    def has_begun(self) -> bool:
        """Return whether the pass has seen a batch."""
        return bool(self._batches or self._rows)

    def restart(self) -> None:
        """Start another pass."""
        self._batches, self._rows, self._shape = [], 0, None
        if 2 * self._dim * self.observations > _MOST_KEPT:
            self._dim = 0
            del self._units, self._posteriors, self._rate_sum
        elif self._dim:
            self._units.reset()
            self._posteriors.reset()
            self._rate_sum.zero_()

    def append(
        self, mean: Tensor, variance: Tensor | None = None, rate: Tensor | None = None, index: Tensor | None = None
    ) -> None:
        """Keep the posteriors of a batch.

        Args:
            mean: Posterior means, of shape ``(N, ...)``; each position is a dimension.
            variance: Posterior variances, of the same shape; ``None`` unless the posterior is a diagonal Gaussian.
            rate: Rates in nats, of the same shape; ``None`` where they have no closed form.
            index: Indices of the observations, of shape ``(N,)``. ``None`` counts them in the order in which
                DistributedSampler assigns them.

        Raises:
            ValueError: If the shape of an observation's latents changes from batch to batch, or the variances, rates or
                indices do not match the means.
        """
        for name, values in (("variance", variance), ("rate", rate)):
            if values is not None and values.shape != mean.shape:
                raise ValueError(
                    f"`{name}` must have the shape of the means, {tuple(mean.shape)}, got {tuple(values.shape)}."
                )
        if index is not None and index.shape != mean.shape[:1]:
            raise ValueError(f"`index` must have shape ({len(mean)},), got {tuple(index.shape)}.")
        self._shape = self._shape or mean.shape[1:]
        if mean.shape[1:] != self._shape:
            raise ValueError(
                f"The latents of an observation have the shape {tuple(self._shape)} in one step and "
                f"{tuple(mean.shape[1:])} in another, so their positions can't be measured as dimensions. Average over "
                "the axis that changes, with CollapseDetector in a callable `posterior=lambda pl_module, batch: ...`; "
                "for posteriors of different sizes use one pass or detector each, detectors distinguished with `name=`."
            )
        mean = by_row(mean)
        if index is None:
            place = torch.arange(self._rows, self._rows + len(mean), device=mean.device)
            index = self.rank + self.world_size * place
        unknown = torch.full_like(mean, -math.inf)  # NaN would hide a scale that is negative
        variance, rate = (unknown if values is None else by_row(values) for values in (variance, rate))
        self._batches.append((index.to(mean.device), mean, variance, rate))
        blocks = self._rows // self.observations
        self._rows += len(mean)
        if self._rows // self.observations > blocks:
            self._fold()

    def measure(self, reduce: Callable[..., Tensor], device: torch.device) -> Measurements | None:
        """Merge the moments of all processes.

        Args:
            reduce: Function ``(tensor, reduce_op)`` that reduces over all processes, such as a strategy's ``reduce``.
            device: Device on which this process computes.

        Returns:
            The measurements; ``None`` if there were no observations at all.
        """
        self._fold()
        # A process without a batch doesn't know the number of dimensions, but must take part in the merge.
        dim = int(reduce(torch.tensor(self._dim, device=device), reduce_op="max"))
        if dim == 0:
            return None
        self._open(dim, exact_device(device))
        self._units.sync()
        self._posteriors.sync()
        rate = reduce(self._rate_sum, reduce_op="sum") / self._units.count
        if not self._units.count:
            return None
        rows = self._posteriors.rows
        mean, variance, rates = rows.masked_fill(rows.isneginf(), math.nan).split([dim, dim, 1], dim=1)
        sample = PosteriorSample.draw(mean, variance)
        information, marginal_kl, _ = decompose_rate(sample, sample.log_mixture(), rates[:, 0])
        return Measurements(
            variance=self._units.variance,
            rate=None if rate.isneginf().all() else rate,
            mutual_information=_known(float(information)),
            marginal_kl=_known(float(marginal_kl)),
            observations=len(mean),
        )

    def state(self) -> dict[str, Any]:
        """Return the state from which a resumed run continues the pass."""
        has_folded = self._rows >= self.observations
        moments = (self._units.moments, self._posteriors.state, self._rate_sum) if has_folded else ()
        return {"batches": list(self._batches), "rows": self._rows, "shape": self._shape, "moments": moments}

    def load(self, state: dict[str, Any], device: torch.device) -> bool:
        """Continue from a saved state, if there is one.

        Returns:
            Whether this version can read the state; if it can't, the pass begins with what comes.
        """
        if not state:
            return True
        if not _is_readable(state):
            return False
        device = exact_device(device)
        self._batches = [tuple(column.to(device) for column in batch) for batch in state["batches"]]
        self._rows, self._shape = state["rows"], state["shape"]
        if state["moments"]:
            units, rows, rate_sum = (moment.to(device) for moment in state["moments"])
            self._open(len(rate_sum), device)
            self._units.moments, self._posteriors.state, self._rate_sum = units, rows, rate_sum
        return True

    def _fold(self) -> None:
        if not self._batches:
            return
        index, mean, variance, rate = (torch.cat(column) for column in zip(*self._batches, strict=True))
        self._batches = []
        self._open(mean.shape[1], mean.device)
        self._units.update(mean)
        self._posteriors.update(torch.cat([mean, variance, rate.sum(dim=1, keepdim=True)], dim=1), index)
        self._rate_sum += rate.sum(dim=0)

    def _open(self, dim: int, device: torch.device) -> None:
        """Create the moments once the number of dimensions is known, unless an earlier pass has created them."""
        if self._dim != dim:
            self._dim = dim
            # Without validation this happens within an epoch, where no step should wait for a copy to the device.
            self._units = ActiveUnits(dim).to(device, non_blocking=True)
            self._posteriors = ObservationSubset(_columns(dim), self.observations).to(device, non_blocking=True)
            self._rate_sum = torch.zeros(dim, dtype=torch.float64, device=device)


def _is_readable(state: dict[str, Any]) -> bool:
    """Return whether a saved pass has this version's columns; older versions saved no rates."""
    if any(len(batch) != 4 for batch in state["batches"]):
        return False
    if not state["moments"]:
        return True
    _, rows, rate_sum = state["moments"]
    return bool(rows.shape[1] == 1 + _columns(len(rate_sum)))


def _columns(dim: int) -> int:
    """Return how many numbers are kept of an observation: means, variances, and the rate."""
    return 2 * dim + 1


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def exact(values: Tensor) -> Tensor:
    """Return values in float64, detached."""
    return values.detach().to(exact_device(values.device)).double()


def exact_device(device: torch.device) -> torch.device:
    """Return the device for float64 values: the same one, but the CPU for Apple's GPUs, which lack float64."""
    return torch.device("cpu") if device.type == "mps" else device


def by_row(values: Tensor) -> Tensor:
    """Flatten latents of any shape to one row of float64 values per observation."""
    return exact(values).reshape(len(values), math.prod(values.shape[1:]))
