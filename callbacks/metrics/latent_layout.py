"""The arrangement of latents of any shape in one row of numbers, and their statistics per channel."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812


class LatentLayout:
    """The shapes of the groups of latents that stand side by side in a row, and the axes that are pooled.

    Args:
        pool: Axes of the latents ``(N, ...)`` over which a dimension extends: ``(2, 3)`` for ``(N, C, H, W)``, 1 for
            ``(N, T, C)``. Without any, each position is a dimension.

    Raises:
        ValueError: If an axis is that of the observations, or not an integer.
    """

    def __init__(self, pool: int | Sequence[int] | None = None) -> None:
        axes = () if pool is None else (pool,) if isinstance(pool, int) else tuple(pool)
        if any(isinstance(axis, bool) or not isinstance(axis, int) or axis == 0 for axis in axes):
            raise ValueError(
                "`pool` must be axes of the latents (N, ...) after the first, that of the observations, such as (2, 3) "
                f"for (N, C, H, W), got {pool!r}."
            )
        self.pool = axes
        self.shapes: tuple[tuple[int, ...], ...] = ()

    @property
    def columns(self) -> int:
        """Length of a row."""
        return sum(math.prod(shape) for shape in self.shapes)

    def fit(self, shapes: Sequence[Sequence[int]]) -> None:
        """Make room for latents of these shapes, each without the axis of the observations.

        Pooled axes may grow from batch to batch, like the length of a sequence.

        Raises:
            ValueError: If an axis that is not pooled changes, or a pooled one does not exist.
        """
        new = tuple(tuple(shape) for shape in shapes)
        for shape in new:
            self._pooled(shape)
        old = self.shapes or new
        if len(new) != len(old) or not all(self._may_become(*pair) for pair in zip(old, new, strict=True)):
            raise ValueError(
                f"The latents of an observation have the shape {_said(old)} in one step and {_said(new)} in another, "
                "so their positions can't be measured as dimensions. Pool the axis that changes, `pool=1` for "
                "(N, T, C), and leave padding out with `mask=`; name the groups of a hierarchy in a dict, "
                "`posterior={'top': ..., 'bottom': ...}`; for other posteriors of different sizes use one pass or "
                "detector each, detectors distinguished with `name=`."
            )
        self.shapes = tuple(tuple(map(max, *pair)) for pair in zip(old, new, strict=True))

    def rows(self, groups: Sequence[Tensor], fill: float = 0.0) -> Tensor:
        """Arrange latents of shapes ``(N, ...)`` as rows, ``(N, columns)``, and fill the missing positions."""
        shaped = []
        for values, shape in zip(groups, self.shapes, strict=True):
            if tuple(values.shape[1:]) != shape:
                values = _padded(values, shape, fill)
            shaped.append(values.reshape(len(values), math.prod(shape)))
        return shaped[0] if len(shaped) == 1 else torch.cat(shaped, dim=1)

    def moved(self, values: Tensor, before: Sequence[Sequence[int]], fill: float = 0.0) -> Tensor:
        """Arrange rows of earlier shapes as rows of the present ones."""
        parts = values.split([math.prod(shape) for shape in before], dim=-1)
        moved = [
            _padded(part.unflatten(-1, old), new, fill).flatten(-len(new))
            for part, old, new in zip(parts, before, self.shapes, strict=True)
        ]
        return torch.cat(moved, dim=-1)

    def pooled(self, values: Tensor) -> Tensor:
        """Sum a row over the pooled axes: one number for each channel of each group."""
        if not self.pool:
            return values
        parts = values.split([math.prod(shape) for shape in self.shapes], dim=-1)
        sums = []
        for part, shape in zip(parts, self.shapes, strict=True):
            axes = [axis - len(shape) for axis in self._pooled(shape)]
            sums.append(part.unflatten(-1, shape).sum(axes).flatten() if axes else part)
        return torch.cat(sums, dim=-1)

    def spread(self, values: Tensor) -> Tensor:
        """Repeat a number for each channel at all its positions, as a row."""
        if not self.pool:
            return values
        rows, first = [], 0
        for shape in self.shapes:
            axes = self._pooled(shape)
            kept = [1 if axis in axes else size for axis, size in enumerate(shape)]
            channels = math.prod(kept)
            rows.append(values[first : first + channels].reshape(kept).expand(shape).flatten())
            first += channels
        return torch.cat(rows)

    def _pooled(self, shape: Sequence[int]) -> set[int]:
        """Return the pooled axes of a shape without the axis of the observations."""
        axes = {axis - 1 if axis > 0 else axis + len(shape) for axis in self.pool}
        if not all(0 <= axis < len(shape) for axis in axes) or len(axes) == len(shape) > 0:
            raise ValueError(
                f"`pool={self.pool}` must leave an axis of the latents after that of the observations and be among "
                f"them, got latents of shape (N, {', '.join(map(str, shape))})."
            )
        return axes

    def _may_become(self, old: Sequence[int], new: Sequence[int]) -> bool:
        if len(old) != len(new):
            return False
        pooled = self._pooled(old)
        return all(axis in pooled or a == b for axis, (a, b) in enumerate(zip(old, new, strict=True)))


def _padded(values: Tensor, shape: Sequence[int], fill: float) -> Tensor:
    missing = [new - old for old, new in zip(values.shape[-len(shape) :], shape, strict=True)]
    return F.pad(values, [width for size in reversed(missing) for width in (0, size)], value=fill)


def _said(shapes: Sequence[Sequence[int]]) -> str:
    return " and ".join(str(tuple(shape)) for shape in shapes)
