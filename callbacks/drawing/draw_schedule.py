"""At which of a run's validation passes pictures are drawn."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


class DrawSchedule:
    """Counts the validation passes of a run, and picks those to draw: the first, the last, and evenly between them.

    Where nobody knows how many there will be, the first, second, fourth, eighth and so on.

    Args:
        times: How many to pick; all of them if there are not more.

    Attributes:
        passes: Number of passes so far.

    Raises:
        ValueError: If ``times`` is below 1.
    """

    def __init__(self, times: int) -> None:
        if times < 1:
            raise ValueError(f"`times` must be at least 1, got {times}. It is how often in a run pictures are drawn.")
        self.times = times
        self.passes = 0

    def next(self, trainer: Trainer) -> bool:
        """Count a pass that begins, and return whether it is one to draw."""
        self.passes += 1
        return is_moment(self.passes, expected_passes(trainer), self.times)


def is_moment(number: int, total: int | None, times: int) -> bool:
    """Return whether the pass of this number, from 1, is one to draw.

    Args:
        number: Number of the pass.
        total: Number of the last pass, ``None`` if unknown.
        times: How many to pick.
    """
    if total is None:
        return number & (number - 1) == 0
    if total <= times:
        return True
    later = max(times - 1, 1)
    return (number == 1 and times > 1) or number * later // total > (number - 1) * later // total


def expected_passes(trainer: Trainer) -> int | None:
    """Return how many validation passes a fit will have, if its options tell."""
    batches, between = trainer.num_training_batches, trainer.val_check_batch
    limits = []
    if trainer.max_epochs is not None and trainer.max_epochs >= 0:
        limits.append(trainer.max_epochs * batches)
    if trainer.max_steps >= 0:
        limits.append(trainer.max_steps * trainer.accumulate_grad_batches)
    total = min(limits, default=math.inf)
    if not isinstance(between, int | float) or not math.isfinite(total) or not math.isfinite(between) or not batches:
        return None
    if trainer.check_val_every_n_epoch is None:
        return int(total // between)
    return int(total / batches // trainer.check_val_every_n_epoch * (batches // between))
