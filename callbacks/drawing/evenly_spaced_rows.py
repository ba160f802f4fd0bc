"""Choosing a few observations from all over a data set."""

from __future__ import annotations

import math


def evenly_spaced_rows(count: int, rows: int, batch_idx: int, batches: float) -> list[int]:
    """Return which rows of a batch to take, so that all batches together give ``count``, evenly spread.

    Args:
        count: How many to take in all.
        rows: Observations in this batch.
        batch_idx: Number of this batch, from 0.
        batches: Number of batches; if that is not finite, all are taken from the first.

    Returns:
        Row numbers, each once; fewer than asked for where a batch has not as many.
    """
    batches = batches if math.isfinite(batches) else 1
    places = (number * batches / count for number in range(count))
    return sorted({int((place - batch_idx) * rows) for place in places if batch_idx <= place < batch_idx + 1 and rows})
