"""What the callbacks that move a knob along a schedule have in common."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from typing_extensions import override

from .attribute import writer
from .base import Callback
from .schedules import Schedule

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


class ScheduledKnob(Callback):
    """Move a number of a LightningModule along a schedule of the training step.

    The value is a function of the step alone, so a resumed run goes on where it was. What is saved is what the step
    can't tell: the module's value before the schedule touched it, and how long the run was when lengths in epochs or
    fractions were turned into steps.

    Args:
        schedule: Value per step: one of this package's schedules, or any callable.
        attribute: Where the module keeps the number: a dotted path through submodules, objects, dict keys and list
            indices, or several such paths that get the same value.
        setter: Writes the number instead, ``(pl_module, value) -> None``; the schedule then needs an explicit end.
        name: Logged as ``knobs/<name>``; the path's last part if not given.

    Raises:
        ValueError: If there is no path.
    """

    def __init__(
        self,
        schedule: Schedule | Callable[[int], float],
        attribute: str | Sequence[str],
        setter: Callable[[Any, float], None] | None = None,
        name: str | None = None,
    ) -> None:
        paths = [attribute] if isinstance(attribute, str) else list(attribute)
        if not paths or not all(isinstance(path, str) and all(path.split(".")) for path in paths):
            raise ValueError(f"`attribute` must be a dotted path such as 'model.beta', or several, got {attribute!r}.")
        if not callable(schedule):
            raise ValueError(
                f"`schedule` must be a schedule or another callable of the step, got {type(schedule).__name__}."
            )
        self.schedule = schedule
        self.attribute = attribute
        self.setter = setter
        self.name = name or paths[-1].rpartition(".")[2]
        self._knob = paths[-1]
        self._resolved: Callable[[int], float] = schedule
        self._restored: dict[str, Any] = {}
        self._base: float | None = None
        self._run: dict[str, int | None] = {}
        self._target: float | None = None
        self._write: Callable[[float], None] | None = None

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(attribute=self.attribute, name=self.name)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._refuse_twins(trainer)
        self._write, current = writer(pl_module, self.attribute, self.setter)
        configured = getattr(pl_module, "knob_targets", {}).get(self._knob, current)
        restored, self._restored = self._restored, {}
        self._base = restored.get("base", configured)
        self._resolve(trainer, restored)
        self._agree_on_target(pl_module)
        self._refuse_moving_monitor(trainer)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        assert self._write is not None
        self._write(self._resolved(self.step(trainer)))

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if self.logs_now(trainer):
            self.log_now(pl_module, {f"knobs/{self.name}": self._resolved(self.step(trainer))}, prog_bar=True)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._leave_at_target()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._leave_at_target()

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"base": self._base, "schedule": repr(self.schedule), **self._run}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = dict(state_dict)

    def _leave_at_target(self) -> None:
        """End a fit, also one that was interrupted, with the value that the knob is meant to have."""
        if self._write is not None and self._target is not None:
            self._write(self._target)
        self._write = None

    def _resolve(self, trainer: Trainer, restored: dict[str, Any]) -> None:
        """Turn the schedule's lengths into steps, once: a resumed run keeps the ones it began with."""
        if not isinstance(self.schedule, Schedule):
            return
        now = _run_length(trainer)
        self._run = {name: restored.get(name, length) for name, length in now.items()}
        self._resolved = resolved = self.schedule.resolve(self._base, **self._run)
        title = f"{type(self).__name__}({self.name})"
        if "schedule" in restored and restored["schedule"] != repr(self.schedule):
            rank_zero_warn(
                f"{title}: the checkpoint was saved under {restored['schedule']}; the run goes on under "
                f"{self.schedule!r}, evaluated at the step it resumes from."
            )
        elif _differs(self.schedule, self._base, self._run, now):
            rank_zero_warn(
                f"{title}: the run was {self._run['total_steps']} steps long when it began and is {now['total_steps']} "
                "now. The schedule keeps the steps it began with; give its length in steps to choose another."
            )
        total = now["total_steps"]
        if total is not None and math.isfinite(resolved.length) and resolved.length > total:
            rank_zero_warn(
                f"{title}: the schedule takes {resolved.length:.0f} steps but the run stops after {total}, at "
                f"{resolved(total - 1):g} instead of {resolved.final:g}. Shorten the schedule, or give its length as a "
                "fraction of the run."
            )

    def _agree_on_target(self, pl_module: LightningModule) -> None:
        """Make the schedule's end the module's target, unless the module was configured with another."""
        final = self._resolved.final if isinstance(self._resolved, Schedule) else self._base
        self._target = final
        targets = getattr(pl_module, "knob_targets", {})
        if self._knob not in targets or final is None:
            return
        if self._knob in getattr(pl_module, "configured_knobs", ()) and final != self._base:
            raise MisconfigurationException(
                f"{type(self).__name__}: the schedule ends at {final:g}, but the module is configured with "
                f"`{self._knob}={self._base:g}`. Leave the schedule's end (`stop`) out to end at the configured value, "
                f"or leave `{self._knob}` at its default."
            )
        targets[self._knob] = final

    def _refuse_twins(self, trainer: Trainer) -> None:
        others = [each for each in trainer.callbacks if isinstance(each, ScheduledKnob) and each is not self]
        if any(each.attribute == self.attribute and each.setter is self.setter for each in others):
            raise MisconfigurationException(
                f"Two callbacks move `{self.attribute}`. Remove one, or join their schedules with `Join`."
            )
        if any(each.name == self.name for each in others):
            raise MisconfigurationException(
                f"Two callbacks log `knobs/{self.name}`. Tell them apart with `name=`."
            )

    def _refuse_moving_monitor(self, trainer: Trainer) -> None:
        if isinstance(self._resolved, Schedule) and self._resolved.length == 0:
            return
        monitors = [(type(each).__name__, getattr(each, "monitor", None)) for each in trainer.callbacks]
        monitors += [("The learning rate scheduler", config.monitor) for config in trainer.lr_scheduler_configs]
        for owner, monitor in monitors:
            if monitor == "train/loss":
                raise MisconfigurationException(
                    f"{owner} monitors 'train/loss', which moves with `{self.name}`: it would follow the schedule and "
                    "not the model. Monitor 'val/loss' (the loss at the target) or 'train/elbo' with mode 'max'."
                )


def _run_length(trainer: Trainer) -> dict[str, int | None]:
    """Return the steps in an epoch and in the run, ``None`` where the run has no end or none is known."""
    try:
        total = trainer.estimated_stepping_batches
    except MisconfigurationException:  # accumulation that changes between epochs
        total = math.inf
    batches = trainer.num_training_batches / trainer.accumulate_grad_batches
    return {
        "steps_per_epoch": math.ceil(batches) if math.isfinite(batches) else None,
        "total_steps": int(total) if math.isfinite(total) and total >= 0 else None,
    }


def _differs(
    schedule: Schedule, base: float | None, saved: dict[str, int | None], now: dict[str, int | None]
) -> bool:
    """Whether the run's length as it is now would give another schedule than the one it began with."""
    try:
        return schedule.resolve(base, **saved) != schedule.resolve(base, **now)
    except ValueError:
        return True

