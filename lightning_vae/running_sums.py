"""Sums and means over batches that stay on their device until they are read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_TERMS = ("distortion", "rate", "floored_rate", "loss")
_BLOCK = 64  # batches that are added up at once


def term_names(stage: str) -> list[str]:
    """Return the names under which the terms of the loss and the ELBO are logged.

    Args:
        stage: ``"train"``, ``"val"`` or ``"test"``.
    """
    return [f"{stage}/{name}" for name in (*_TERMS, "elbo")]


def named_terms(stage: str, terms: Tensor, added: Sequence[str] = ()) -> dict[str, Tensor]:
    """Return the terms of the loss by the names they are logged under, with the ELBO.

    Args:
        stage: ``"train"``, ``"val"`` or ``"test"``.
        terms: Distortion, rate, floored rate and loss, then the terms that a model adds.
        added: Names of those.
    """
    distortion, rate, floored, loss, *others = terms
    named = dict(zip(term_names(stage), (distortion, rate, floored, loss, -(distortion + rate)), strict=True))
    return named | {f"{stage}/term_{name}": value for name, value in zip(added, others, strict=True)}


class TrainingMeans:
    """Keep the means of the loss terms during training: since they were last logged, and over the epoch.

    A non-finite term is detected when the means are read, so the steps in between pay nothing for it.

    Args:
        added: Names of the terms that a model adds to the loss.
    """

    def __init__(self, added: Sequence[str] = ()) -> None:
        self._added = tuple(added)
        self._sums = RunningSums(len(_TERMS) + len(self._added))
        self._step = 0

    def add(self, terms: Tensor, count: int | Tensor, step: int) -> None:
        """Add one batch.

        Args:
            terms: Means of distortion, rate, floored rate, loss, and the added terms.
            count: Number of observations.
            step: Number of batches that stepped before.
        """
        self._step = step
        self._sums.add(terms * count, count)

    def since_last_logged(self) -> dict[str, Tensor]:
        """Return the means since the last call by the names they are logged under, on the CPU."""
        return named_terms("train", mean(self._sums.flush()).cpu(), self._added)

    def epoch(self, has_ended: bool) -> dict[str, Tensor]:
        """Return the epoch's means by the names they are logged under; see :meth:`RunningSums.epoch`."""
        return named_terms("train", mean(self._sums.epoch(has_ended)), self._added)

    def check_finite(self, batches_per_step: int) -> None:
        """Check that the terms since the last logging are finite.

        Args:
            batches_per_step: Number of batches whose gradients are accumulated.

        Raises:
            FloatingPointError: If a term is not finite.
        """
        if found := self._sums.first_not_finite():
            term, batches = found
            name = (*_TERMS, *(f"term_{each}" for each in self._added))[term]
            first = self._step - batches // batches_per_step
            remedy = (
                "A run resumed from the last checkpoint will fail here again unless something changes: set "
                "`gradient_clip_val`, or start over with a lower learning rate."
                if first
                else "No step had been made before, so the learning rate is not the cause: check the scale of the "
                "data, which the networks and most likelihoods want near 1, and the model."
            )
            raise FloatingPointError(
                f"`train/{name}` is not a finite number since step {first}, so training ends at step {self._step}; "
                f"nothing has been saved since. {remedy}"
            )

    def reset(self) -> None:
        """Forget all batches."""
        self._sums.reset()

    def state(self) -> dict[str, Any]:
        """Return the state from which a resumed run continues."""
        return self._sums.state()

    def load(self, state: dict[str, Any]) -> None:
        """Continue from a saved state."""
        self._sums.load(state)


class RunningSums:
    """Sum values and counts, over the batches since the last flush and over the epoch.

    A vector of sums ends with the count. Adding costs almost nothing and never waits for the device.

    Args:
        size: Number of values to sum.
    """

    _window: Tensor
    _finite: Tensor  # number of batches in which each value was finite
    _latest: list[Tensor]
    _count: float | Tensor
    _batches: int

    def __init__(self, size: int) -> None:
        self.size = size
        self.reset()

    def reset(self) -> None:
        """Forget all batches."""
        self._epoch = torch.zeros(self.size + 1, dtype=torch.float32)
        self._start_window()

    def add(self, values: Tensor, count: int | Tensor) -> None:
        """Add one batch's sums, shape ``(size,)``, over ``count`` observations."""
        self._latest.append(values)
        self._count += count
        self._batches += 1
        if self._batches % _BLOCK == 0:
            self._window, self._finite = self._with_latest()
            self._latest = []

    def flush(self) -> Tensor:
        """Return the sums and the count since the last flush, shape ``(size + 1,)``, and start a new window."""
        window = self._since_flush()
        self._epoch = self._epoch.to(window.device) + window
        self._start_window()
        return window

    def epoch(self, has_ended: bool = True) -> Tensor:
        """Return the epoch's sums and count, shape ``(size + 1,)``; the window stays open.

        Args:
            has_ended: Start a new epoch. An epoch that the end of the run cuts short continues when the run does.
        """
        window = self._since_flush()
        total = self._epoch.to(window.device) + window
        if has_ended:
            self._epoch = -window
        return total

    def first_not_finite(self) -> tuple[int, int] | None:
        """Find the first value since the last flush that was not finite.

        Returns:
            The position of the value, and how many batches ago it was (0 is the latest); ``None`` if there was none.
        """
        # A run seldom recovers, so the number of finite batches is the position of the first non-finite one.
        finite = self._with_latest()[1].tolist()
        first = min(range(self.size), key=finite.__getitem__)
        return None if finite[first] == self._batches else (first, self._batches - 1 - int(finite[first]))

    def state(self) -> dict[str, Any]:
        """Return the state from which a resumed run continues."""
        latest = torch.stack(self._latest).cpu() if self._latest else torch.zeros(0, self.size)
        tensors = {"window": self._window, "finite": self._finite, "epoch": self._epoch}
        copies = {name: tensor.cpu().clone() for name, tensor in tensors.items()}
        return {**copies, "latest": latest, "count": float(self._count), "batches": self._batches}

    def load(self, state: dict[str, Any]) -> None:
        """Continue from a saved state."""
        self._window, self._finite, self._epoch = (state[name].clone() for name in ("window", "finite", "epoch"))
        self._latest = list(state["latest"])
        self._count, self._batches = state["count"], state["batches"]

    def _start_window(self) -> None:
        self._window, self._finite = torch.zeros(2, self.size, dtype=torch.float32).unbind()
        self._latest, self._count, self._batches = [], 0, 0

    def _with_latest(self) -> tuple[Tensor, Tensor]:
        if not self._latest:
            return self._window, self._finite
        device = self._latest[-1].device
        latest = torch.stack([values.to(device, non_blocking=True) for values in self._latest])
        window, finite = (sums.to(device, non_blocking=True) for sums in (self._window, self._finite))
        return window + latest.sum(0), finite + latest.isfinite().sum(0)

    def _since_flush(self) -> Tensor:
        window = self._with_latest()[0]
        return torch.cat([window, window.new_ones(1) * self._count])


def mean(sums: Tensor) -> Tensor:
    """Divide sums by the count at their end."""
    return sums[:-1] / sums[-1]
