"""A schedule with its lengths resolved for a run."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lightning_utilities.core.rank_zero import rank_zero_warn

from ..base import callbacks_of, counts_optimizer_steps
from ..schedules import Schedule

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


class RunSchedule:
    """A schedule in a run, whose length converts epochs and fractions to steps.

    The conversion happens once: a resumed run keeps the steps it began with.

    Args:
        schedule: One of this package's schedules, or any callable of the step.

    Attributes:
        length: Steps until the value no longer changes, ``math.inf`` if that is not known.
        final: The value from then on; ``None`` if the schedule is a plain callable.

    Raises:
        ValueError: If the schedule is not callable.
    """

    def __init__(self, schedule: Schedule | Callable[[int], float]) -> None:
        if not callable(schedule):
            raise ValueError(
                f"`schedule` must be a schedule or another callable of the step, got {type(schedule).__name__}."
            )
        self.schedule = schedule
        self.length: float = math.inf
        self.final: float | None = None
        self._resolved = schedule
        self._has_warned = False
        self._run: dict[str, int | None] = {}

    def begin(self, trainer: Trainer, title: str, open_end: float | None, restored: dict[str, Any]) -> None:
        """Convert the lengths to steps, and warn if the schedule does not fit the run.

        Args:
            trainer: The Trainer.
            title: Name of the callback, for warnings.
            open_end: The value that a schedule without a ``stop`` ends at.
            restored: The state of the resumed run; empty for a new run.

        Raises:
            ValueError: If a length can't be converted to steps, or the end is not known.
        """
        now = _run_length(trainer)
        self._run = {name: length if restored.get(name) is None else restored[name] for name, length in now.items()}
        self._resolved, self.length, self.final = self.schedule, math.inf, None
        self._has_warned = False
        if not isinstance(self.schedule, Schedule):
            return
        self._resolved = resolved = self.schedule.resolve(open_end, **self._run)
        self.length, self.final = resolved.length, resolved.final
        if "schedule" in restored and restored["schedule"] != repr(self.schedule):
            rank_zero_warn(
                f"{title}: the checkpoint was saved under {restored['schedule']}; the run continues under "
                f"{self.schedule!r}, evaluated at the step it resumes from."
            )
        elif _differs(self.schedule, open_end, self._run, now):
            rank_zero_warn(
                f"{title}: the run was {self._run['total_steps']} steps long when it began and is {now['total_steps']} "
                "now. The schedule keeps the steps it began with; to change them, give its length in steps."
            )
        if resolved.length > 0 and {resolved(0), resolved(int(min(resolved.length, 1e9)) // 2)} == {resolved.final}:
            rank_zero_warn(
                f"{title}: the schedule starts and ends at {resolved.final:g}, so nothing moves. Configure the module "
                "with the final value, or give the schedule a `stop`."
            )
        if self._run["total_steps"] is None and counts_optimizer_steps(trainer):
            count = max(1, len(trainer.optimizers))
            total = min(int(trainer.estimated_stepping_batches), trainer.max_steps // count)
            self._warn_if_too_short(title, total, f" if each of {count} optimizers steps once in a batch")
        elif now["total_steps"] is not None:
            self._warn_if_too_short(title, now["total_steps"])

    def end(self, trainer: Trainer, title: str, step: int) -> None:
        """Warn if `max_steps` has ended the run before the schedule, which can't always be foreseen.

        Args:
            trainer: The Trainer.
            title: Name of the callback.
            step: Number of batches that stepped.
        """
        if counts_optimizer_steps(trainer) and trainer.global_step >= trainer.max_steps:
            self._warn_if_too_short(title, step)

    def _warn_if_too_short(self, title: str, total: int, condition: str = "") -> None:
        if self._has_warned or not 0 < total < self.length < math.inf:
            return
        self._has_warned = True
        remedy = "Shorten the schedule, or give its length as a fraction of the run."
        if self._run["total_steps"] is None:
            remedy = (
                "Under manual optimization `max_steps` counts the steps of every optimizer, not batches. Shorten the "
                "schedule, or limit the run by `max_epochs`."
            )
        rank_zero_warn(
            f"{title}: the schedule takes {self.length:.0f} steps but the run stops after {total}{condition}, at "
            f"{self(max(0, total - 1)):g} instead of {self.final:g}. {remedy}"
        )

    def __call__(self, step: int) -> float:
        """Return the value at a step.

        Raises:
            ValueError: If it is not finite, or the schedule has no value there.
        """
        try:
            value = self._resolved(step)
        except LookupError as error:
            raise ValueError(
                f"The schedule must give a number for every step of the run, counted in batches that step, got "
                f"{error!r} at step {step}. Return the last value from its end on."
            ) from error
        if not math.isfinite(value):
            raise ValueError(f"The schedule must give finite numbers, got {value} at step {step}.")
        return value

    def state(self) -> dict[str, Any]:
        """Return the state for a resumed run: the lengths that it began with, and the schedule to compare with."""
        return {"schedule": repr(self.schedule), **self._run}

    @property
    def total_steps(self) -> int | None:
        """Number of steps that the run had when it began, if known."""
        return self._run.get("total_steps")

    @property
    def is_open(self) -> bool:
        """Return whether the module, and not the schedule, gives the value at the end."""
        if not isinstance(self.schedule, Schedule):
            return True
        try:
            self.schedule.resolve(None, steps_per_epoch=1, total_steps=1)
        except ValueError:
            return True
        return False

    @property
    def moves(self) -> bool:
        """Return whether its value ever changes."""
        return self.length > 0


def _run_length(trainer: Trainer) -> dict[str, int | None]:
    """Return the steps in an epoch and in the run, ``None`` if the number is infinite or unknown."""
    if any(getattr(each, "going_to_accumulate_grad_batches", bool)() for each in callbacks_of(trainer)):
        return {"steps_per_epoch": None, "total_steps": None}  # accumulation that changes between epochs
    trainer.fit_loop.setup_data()
    total = trainer.estimated_stepping_batches
    if counts_optimizer_steps(trainer):
        total = math.inf  # the number of optimizer steps in a batch is not known
    batches = trainer.num_training_batches / trainer.accumulate_grad_batches
    return {
        "steps_per_epoch": math.ceil(batches) if math.isfinite(batches) else None,
        "total_steps": int(total) if math.isfinite(total) and total >= 0 else None,
    }


def _differs(schedule: Schedule, end: float | None, saved: dict[str, int | None], now: dict[str, int | None]) -> bool:
    """Return whether the run's current length would give a different schedule from the one it began with."""
    try:
        return schedule.resolve(end, **saved) != schedule.resolve(end, **now)
    except ValueError:
        return True
