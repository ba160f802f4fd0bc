"""Observations: a batch as a model sees it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor

from .likelihoods import Likelihood
from .networks import Shape


@dataclass(frozen=True, eq=False)
class Observations:
    """One batch as a model sees it, made by :meth:`lightning_vae.VAE.observe`.

    Attributes:
        x: The data in their own scale, shape ``(B, *shape)``.
        scaled: The data in the networks' scale, shape ``(B, *shape)``.
        observed: The encoder's input, on which the likelihood is also evaluated: ``scaled``, binarised for a Bernoulli.
        index: Index of each observation in its data set, int64, shape ``(B,)``. It fixes the observation's noise.
        label: Class or attributes of each observation as the batch holds them, a tensor or a sequence of length B;
            ``None`` if it has none.
    """

    x: Tensor
    scaled: Tensor
    observed: Tensor
    index: Tensor
    label: Any = None

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, rows: slice) -> Self:
        label = None if self.label is None else self.label[rows]
        return type(self)(self.x[rows], self.scaled[rows], self.observed[rows], self.index[rows], label)

    def split(self, size: int) -> Iterator[Self]:
        """Yield the observations in parts of at most ``size``."""
        for start in range(0, len(self), size):
            yield self[start : start + size]


def data_of(batch: Any, shape: Shape) -> Tensor:
    """Return the data in a batch, in their own scale.

    Args:
        batch: A tensor, a sequence that starts with one, or a mapping with the key ``"x"``.
        shape: Shape of one observation.

    Returns:
        Shape ``(B, *shape)``.

    Raises:
        ValueError: If the batch holds no tensor of such observations.
    """
    is_mapping = type(batch) is dict or isinstance(batch, Mapping)  # the check for a `Mapping` is slower
    x = batch["x"] if is_mapping else batch[0] if isinstance(batch, tuple | list) else batch
    if not isinstance(x, Tensor) or x.shape[1:] != shape:
        raise ValueError(
            f"`shape` is {shape}, but a batch holds "
            f"{tuple(x.shape[1:]) if isinstance(x, Tensor) else type(x).__name__} per observation. A batch must be "
            "a tensor, a sequence that starts with one, or a mapping with the key 'x'."
        )
    return x


def index_and_label_of(batch: Any, size: int) -> tuple[Tensor | None, Any]:
    """Return the indices and the labels in a batch, ``None`` for either that it lacks.

    A mapping has them under ``"index"`` and ``"label"``; the label must be a tensor or a sequence with one item per
    observation. The second item of a sequence is the label if it is a tensor with one number per observation.
    """
    if isinstance(batch, Mapping):
        label = batch.get("label")
        return batch.get("index"), label if _has_items(label, size) else None
    second = batch[1] if isinstance(batch, tuple | list) and len(batch) > 1 else None
    return None, second if isinstance(second, Tensor) and second.shape == (size,) else None


def _has_items(label: Any, size: int) -> bool:
    if hasattr(label, "shape"):  # a tensor or an array
        return tuple(label.shape[:1]) == (size,)
    return isinstance(label, Sequence) and not isinstance(label, str | bytes) and len(label) == size


def check_scale(x: Tensor, levels: int | None, likelihood: Likelihood) -> None:
    """Check that data are in the scale that a model expects. This synchronises with the device.

    Args:
        x: The data in their own scale.
        levels: Number of integer levels of the raw data, ``None`` for data in the networks' scale.
        likelihood: The model's.

    Raises:
        ValueError: If they are not finite, already scaled, or outside the likelihood's range.
    """
    if not len(x):
        return
    low, high = x.min().item(), x.max().item()
    if not math.isfinite(low + high):
        raise ValueError(f"The data must be finite, but a batch holds values from {low:g} to {high:g}. Fix the data.")
    if levels is not None and x.is_floating_point() and high <= 1 < levels - 1:
        raise ValueError(
            f"`levels` is {levels}, so the data should be integers from 0 to {levels - 1}, but a batch holds fractions "
            f"from {low:g} to {high:g}, as if already scaled. Pass levels=None for data in [0, 1]."
        )
    top = 1 if levels is None else levels - 1
    if likelihood.unit_interval and not 0 <= low <= high <= top:
        raise ValueError(
            f"`likelihood` {type(likelihood).__name__} needs data from 0 to {top}, but a batch holds values from "
            f"{low:g} to {high:g}. Rescale the data, set `levels`, or use the Gaussian likelihood."
        )
