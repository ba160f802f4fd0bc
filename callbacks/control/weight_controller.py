"""Base of the callbacks that find a weight by feedback."""

from __future__ import annotations

import math
import re
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from ..base import callbacks_of, knobs_of, sum_over_processes
from ..schedules import Constant, Schedule, at_least, check_number, is_positive
from .attribute_writer import AttributeWriter, MisconfigurationException, monitors
from .pi_controller import ControllerState, PIController
from .run_schedule import RunSchedule

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

_VALIDATION_LOSS = re.compile(r"val(id|idation)?[/_]loss(_epoch)?")


class WeightController(AttributeWriter):
    """Move the weight of the rate until a number that is measured in each step reaches its target.

    A subclass measures the number (:meth:`_measure`), gives the unit of its errors (:meth:`_scale`), tells a module
    with knobs what to select models by (:meth:`_set_limit`), and describes what can go wrong (:meth:`_problems`).

    Args:
        target: The target: a number, a schedule of the training step with an explicit end, or another function of it,
            which ends with the run.
        attribute: Where the module keeps the weight: a dotted path, or several.
        setter: Writes the weight instead, ``(pl_module, value) -> None``; needs a ``start``.
        name: Logged as ``knobs/<name>``; the path's last part if not given.
        measured: Names of the logged target and of the logged average of the measurements.
        start: The weight to start from; the module's configured weight if not given.
        min_beta: The smallest weight; a hundredth of the first if not given.
        max_beta: The largest weight; a hundred times the first if not given.
        proportional: Gain of the error.
        integral: Gain of its sum, per step.
        smoothing: Weight of the previous average in the moving average, from 0 to below 1.
        tolerance: Error, in units of the scale, up to which the target counts as met.
        price: Price of each unit beyond the target and its tolerance, in the module's validation loss.
        patience: Number of steps at a bound, with the target not met, before that is reported.

    Raises:
        ValueError: If an option is out of range.
    """

    sign = 1.0
    """Direction of the weight when the number is above its target: 1 raises it, -1 lowers it."""
    _nan_remedy: str
    _monitor_remedy: str

    def __init__(
        self,
        target: float | Schedule | Callable[[int], float],
        attribute: str | Sequence[str],
        setter: Callable[[Any, float], None] | None,
        name: str | None,
        measured: tuple[str, str],
        start: float | None,
        min_beta: float | None,
        max_beta: float | None,
        proportional: float,
        integral: float,
        smoothing: float,
        tolerance: float,
        price: float | None,
        patience: int,
    ) -> None:
        if isinstance(target, Schedule):
            target.resolve(None, steps_per_epoch=1, total_steps=1)  # raises if its end is left open
        positive = {"start": start, "min_beta": min_beta, "max_beta": max_beta, "integral": integral}
        for option, value in {**positive, "price": price, "patience": patience}.items():
            if value is not None:
                check_number(option, value, "a finite number above 0", is_positive)
        for option, value in {"proportional": proportional, "tolerance": tolerance}.items():
            check_number(option, value, "a finite number of at least 0", at_least(0))
        if min_beta is not None and max_beta is not None and not min_beta < max_beta:
            raise ValueError(f"`min_beta` must be below `max_beta`, got {min_beta} and {max_beta}.")
        check_number("smoothing", smoothing, "at least 0 and below 1", lambda share: 0 <= share < 1)
        if setter is not None and start is None:
            raise ValueError("`start` must be given with a `setter`: the weight to start from is not known otherwise.")
        super().__init__(attribute, setter, name)
        self.schedule = target if callable(target) else Constant(float(target))
        self.start = start
        self.min_beta = min_beta
        self.max_beta = max_beta
        self.proportional = proportional
        self.integral = integral
        self.smoothing = smoothing
        self.tolerance = tolerance
        self.patience = patience
        self._target_key, self._average_key = (key if name is None else f"{key}_{name}" for key in measured)
        self._schedule = RunSchedule(self.schedule)
        self._first: float | None = None  # the weight that the run began with
        self._controller: PIController | None = None
        self._state: ControllerState | None = None
        self._measured: Tensor | None = None  # sum and number of the measurements since the last step
        self._sets_limit = False  # True if the module's validation loss uses the target
        self._reported: set[str] = set()

    # ---- for a subclass

    @abstractmethod
    def _measure(self, pl_module: LightningModule, batch: Any) -> Tensor:
        """Return the sum of the observations' numbers and their count, float32, shape ``(2,)``."""

    @abstractmethod
    def _scale(self, target: float) -> float:
        """Return the unit of errors."""

    @abstractmethod
    def _set_limit(self, pl_module: Any, end: float) -> None:
        """Pass the target's end to a module with knobs, as the constraint on its validation loss."""

    @abstractmethod
    def _problems(self, average: float, weight: float, steps: float, target: float) -> Iterator[tuple[str, str]]:
        """Yield the kind of each problem, and a text with its remedy.

        Args:
            average: The moving average of the measurements.
            weight: The weight.
            steps: Number of steps at a bound with the target missed: positive at the largest weight, negative at the
                smallest.
            target: The target.
        """

    def target(self, step: int) -> float:
        """Return the target of a step."""
        return self._schedule(step)

    # ---- hooks

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._reported, self._measured = set(), None
        super().on_fit_start(trainer, pl_module)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        try:
            measured = self._measure(pl_module, batch)
        except ValueError as error:
            raise ValueError(f"{self._title}: {error}") from None
        self._measured = measured if self._measured is None else self._measured + measured
        if not self.accumulates(trainer):
            self._steer(trainer)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        self._report(self.target(max(0, self.step(trainer) - 1)))  # for runs that rarely log
        self._schedule.end(trainer, self._title, self.step(trainer))

    @override
    def state_dict(self) -> dict[str, Any]:
        state = {} if self._state is None else {name: value.cpu() for name, value in self._state._asdict().items()}
        return {"base": self._first, **self._schedule.state(), **state}

    @property
    def weight(self) -> Tensor | None:
        """The weight of the next step, a 0-dim tensor; ``None`` before the first fit."""
        return None if self._state is None else (self.sign * self._state.output).exp()

    # ---- helpers

    @property
    def _title(self) -> str:
        return f"{type(self).__name__}({self.name})"

    @override
    def _value(self, step: int) -> Tensor:
        assert isinstance(self._target, Tensor)
        return self._target

    @property
    @override
    def _moves(self) -> bool:
        return True

    def _steer(self, trainer: Trainer) -> None:
        """Update the controller with the step that has just been taken."""
        assert self._controller is not None
        assert self._state is not None
        assert self._measured is not None
        measured, self._measured = sum_over_processes(trainer, self._measured), None
        target = self.target(self.step(trainer))
        self._state = self._controller(self._state, measured[0] / measured[1], target, self._scale(target))
        self._target = self.weight

    @override
    def _log(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        super()._log(trainer, pl_module, batch)
        assert self._state is not None
        target = self.target(self.step(trainer))
        self.log_now(pl_module, {self._target_key: target, self._average_key: self._state.average})
        self._report(target)

    def _report(self, target: float) -> None:
        """Report each problem once. Synchronises with the device."""
        assert self._state is not None
        average, _, output, steps = (float(value) for value in self._state)
        if math.isnan(average):
            found = iter([("nan", f"`{self._average_key}` is not a number. {self._nan_remedy}")])
        else:
            found = self._problems(average, math.exp(self.sign * output), self.sign * steps, target)
        for kind, text in found:
            if kind not in self._reported:
                self._reported.add(kind)
                rank_zero_warn(f"{self._title}: {text}")

    @override
    def _prepare(
        self, trainer: Trainer, pl_module: LightningModule, current: float | None, restored: dict[str, Any]
    ) -> None:
        first = self.start if self.start is not None else restored.get("base") or current
        if first is None or not first > 0:
            raise ValueError(
                f"{self._title}: the weight to start from must be above 0, got {first}. Configure the module with "
                "another weight, or give `start`."
            )
        self._first = float(first)
        self._schedule.begin(trainer, self._title, None, restored)
        self._controller = self._bounded(self._first)
        self._state = ControllerState.start(self.sign * math.log(self._first), pl_module.device)
        if all(name in restored for name in ControllerState._fields):
            saved = (torch.as_tensor(restored[name]) for name in ControllerState._fields)
            self._state = ControllerState(*(value.to(pl_module.device) for value in saved))
        elif "steps_at_bound" in restored:
            rank_zero_warn(
                f"{self._title}: the checkpoint's state of the controller is that of an earlier version, so the weight "
                f"starts over at {first:g}."
            )
        self._set_limits(pl_module)
        self._target = self.weight

    def _bounded(self, first: float) -> PIController:
        smallest = self._smallest(first)
        largest = first * 100 if self.max_beta is None else self.max_beta
        if not smallest <= first <= largest:
            raise ValueError(
                f"{self._title}: the weight starts at {first:g}, which must be within `min_beta` and `max_beta`, "
                f"{smallest:g} to {largest:g}. Change them or `start`."
            )
        lower, upper = sorted(self.sign * math.log(bound) for bound in (smallest, largest))
        return PIController(lower, upper, self.proportional, self.integral, self.smoothing, self.tolerance)

    def _smallest(self, first: float) -> float:
        """Return the smallest weight, where the run begins with ``first``."""
        return first / 100 if self.min_beta is None else self.min_beta

    def _set_limits(self, pl_module: Any) -> None:
        """Pass the constraint for model selection to a module with knobs."""
        end = self._schedule.final
        if end is None:  # a plain callable, which ends with the run
            last = self._schedule.total_steps or 10**9
            try:
                end = self.schedule(last)
            except LookupError:  # a table with a target for each step
                end = self._schedule(last - 1)
        steered = tuple(path for path in self._paths if path in knobs_of(pl_module))
        self._sets_limit = bool(steered)
        self._set_limit(pl_module, end)
        if self._sets_limit:
            pl_module.steered_knobs = steered

    @override
    def _refuse_moving_monitor(self, trainer: Trainer) -> None:
        super()._refuse_moving_monitor(trainer)
        for owner, monitor in () if self._sets_limit else monitors(trainer):
            if _VALIDATION_LOSS.fullmatch(monitor):
                rank_zero_warn(
                    f"{self._title}: {owner} monitors {monitor!r}. If that contains `{self.name}`, it moves with the "
                    f"controller and is lowest where the weight is. {self._monitor_remedy}"
                )

    @override
    def _refuse_unread(self, pl_module: Any) -> None:
        super()._refuse_unread(pl_module)
        knobs = knobs_of(pl_module)
        others = [path for path in self._paths if path in knobs and path != "beta"] if "beta" in knobs else []
        if others:  # its direction may be another, and two controllers would set one limit
            raise MisconfigurationException(
                f"{self._title}: of the knobs of {type(pl_module).__name__} it moves `beta` alone, the weight of the "
                f"rate, got attribute={self.attribute!r}. Leave it out, or move `{others[0]}` along a schedule."
            )

    @override
    def _refuse_twins(self, trainer: Trainer) -> None:
        super()._refuse_twins(trainer)
        for each in callbacks_of(trainer):
            if isinstance(each, WeightController) and each is not self and each._target_key == self._target_key:
                raise MisconfigurationException(
                    f"Two callbacks log `{self._target_key}`. Distinguish them with `name=`."
                )
