"""Move a number of the module along a schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from typing_extensions import override

from ..base import knobs_of
from ..schedules import Schedule
from .attribute_writer import AttributeWriter, MisconfigurationException
from .run_schedule import RunSchedule

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


class AttributeScheduler(AttributeWriter):
    """Move a number of a LightningModule along a schedule of the training step.

    The value is a function of the step only, so a resumed run continues where it was. Only the values that the step
    does not determine are saved: the module's value before the schedule changed it, and the length of the run when
    lengths in epochs or fractions were converted to steps. For the rest see
    :class:`~.attribute_writer.AttributeWriter`.

    Args:
        schedule: Value per step: one of this package's schedules, or any callable.
        attribute: Where the module keeps the number: a dotted path through submodules, objects, dict keys and list
            indices, or several such paths that get the same value. A method at its end is replaced by the value.
        setter: Writes the number instead, ``(pl_module, value) -> None``; the schedule then needs an explicit end.
        name: Logged as ``knobs/<name>``; the path's last part if not given.

    Raises:
        ValueError: If there is no path, or the schedule is not callable.
    """

    def __init__(
        self,
        schedule: Schedule | Callable[[int], float],
        attribute: str | Sequence[str] | None,
        setter: Callable[[Any, float], None] | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(attribute, setter, name)
        self.schedule = schedule
        self._schedule = RunSchedule(schedule)
        self._base: float | None = None

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"base": self._base, **self._schedule.state()}

    @override
    def _value(self, step: int) -> float:
        end = self._schedule.final
        self._has_settled = end is not None and step >= self._schedule.length
        return end if end is not None and self._has_settled else self._schedule(step)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        self._schedule.end(trainer, self._title, self.step(trainer))

    @property
    def _title(self) -> str:
        return f"{type(self).__name__}({self.name})"

    @property
    @override
    def _moves(self) -> bool:
        return self._schedule.moves

    @override
    def _prepare(
        self, trainer: Trainer, pl_module: LightningModule, current: float | None, restored: dict[str, Any]
    ) -> None:
        knobs = knobs_of(pl_module)
        configured = {path: value for path in self._paths if (value := knobs.get(path)) is not None}
        base = next(iter(configured.values()), restored.get("base") if current is None else current)
        self._base = None if base is None else float(base)
        self._schedule.begin(trainer, self._title, self._base, restored)
        end = self._base if self._schedule.final is None else self._schedule.final
        self._refuse_another_end(configured, end)
        if not set(self._paths) & set(knobs):  # a module with knobs reports a changed number itself
            self._warn_of_another_number(current, restored.get("base"), end)
        self._target = end

    def _warn_of_another_number(self, current: float | None, base: float | None, end: float | None) -> None:
        """Warn if a resumed run's module is configured with another number than the run began with."""
        # After a fit a module holds the schedule's own end.
        expected = [base] if self._schedule.is_open else [base, end]
        if base is None or current is None or end is None or any(_is_close(current, each) for each in expected):
            return
        rank_zero_warn(
            f"{self._title}: the run began with {base:g}, and the module is configured with {current:g} now; the run "
            f"continues to {end:g}."
        )

    def _refuse_another_end(self, configured: dict[str, float], end: float | None) -> None:
        for path, value in configured.items():
            if end is not None and not _is_one_number(end, value):
                raise MisconfigurationException(
                    f"{type(self).__name__}: the schedule ends at {end:g}, but the module is configured with "
                    f"`{path}={value:g}`. Configure it in one place: leave `{path}` out of the module, or "
                    "the schedule's end (`stop`) out of the callback, which then ends at the module's value."
                )


def _is_close(first: float, second: float | None) -> bool:
    return second is not None and math.isclose(first, second, rel_tol=1e-2)  # half precision keeps 8 bits


def _is_one_number(first: float, second: float) -> bool:
    """Return whether two numbers are equal in float32, the type of a knob."""
    return torch.equal(*(torch.tensor(each, dtype=torch.float32) for each in (first, second)))
