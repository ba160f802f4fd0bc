"""Select the validation passes of a run to draw."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ..base import counts_optimizer_steps
from ..schedules import at_least, check_number

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


class DrawSchedule:
    """Count the validation passes of a fit and pick those to draw: the first, the last, and some evenly between them.

    If the number of passes is unknown, it picks the first, second, fourth, eighth and so on.

    Args:
        times: Number of passes to pick; all of them if there are no more.

    Attributes:
        passes: Number of passes so far.

    Raises:
        ValueError: If ``times`` is below 1.
    """

    def __init__(self, times: int) -> None:
        check_number("times", times, "at least 1", at_least(1), "It is the number of times to draw in a run.")
        self.times = times
        self.passes = 0

    def start_pass(self, trainer: Trainer) -> bool:
        """Count a validation pass that starts, and return whether to draw it.

        The sanity check is not counted, and always drawn, to try it. Passes outside a fit are neither.
        """
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return trainer.sanity_checking
        self.passes += 1
        return is_drawn(self.passes, expected_passes(trainer), self.times)


def is_drawn(number: int, total: int | None, times: int) -> bool:
    """Return whether a pass is one to draw.

    Args:
        number: Number of the pass, from 1.
        total: Number of the last pass; ``None`` if unknown.
        times: Number of passes to draw.
    """
    if total is None:
        return number & (number - 1) == 0
    if total <= times:
        return True
    later = max(times - 1, 1)
    return (number == 1 and times > 1) or number * later // total > (number - 1) * later // total


def expected_passes(trainer: Trainer) -> int | None:
    """Return the number of validation passes of a fit; ``None`` if the Trainer's options don't determine it."""
    if counts_optimizer_steps(trainer):
        return None
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
