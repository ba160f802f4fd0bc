"""The observations and the labels in a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from .distributions import is_sequence

OBSERVATIONS = ("x", "X", "image", "images", "input", "inputs", "data")
LABELS = ("label", "labels", "y", "target", "targets", "class")


def batch_part(batch: Any, where: str | int | Callable[[Any], Any] | None, names: tuple[str, ...], place: int) -> Any:
    """Return a part of a batch; ``None`` if the batch lacks it.

    Args:
        batch: The batch as the loader yields it.
        where: Its key, its index, or a callable that takes the batch. ``None`` searches the usual places.
        names: The usual keys.
        place: The usual index; a batch that is neither a mapping nor a sequence is its own part 0.

    Raises:
        ValueError: If ``where`` is not in the batch.
    """
    if callable(where):
        return where(batch)
    if where is not None:
        try:
            return batch[where]
        except (LookupError, TypeError):
            has = ", ".join(map(repr, batch)) if isinstance(batch, Mapping) else f"a {type(batch).__name__}"
            raise ValueError(f"A batch has no {where!r}; it is or has {has}.") from None
    if isinstance(batch, Mapping):
        return next((batch[name] for name in names if name in batch), None)
    if is_sequence(batch):
        return batch[place] if len(batch) > place else None
    return batch if place == 0 else None


def index_of(batch: Any, rows: int) -> Tensor | None:
    """Return the indices of a batch's observations in their data set; ``None`` if the batch has none.

    Args:
        batch: The batch; a mapping has them under ``"index"``.
        rows: Number of observations.

    Returns:
        Integers of shape ``(rows,)``.
    """
    index = batch.get("index") if isinstance(batch, Mapping) else None
    fits = isinstance(index, Tensor) and index.shape == (rows,) and not index.is_floating_point()
    return index if fits else None
