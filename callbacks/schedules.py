"""Schedules: pure functions of the step, for the weight of the KL term or for any other knob.

A schedule maps a step, counted from 0, to a value. It has no counter, so a resumed run continues where it was. It is
exact at both ends, rises or falls, and is defined for every step >= 0; past its end it holds its last value.

A length is given in exactly one unit: steps, epochs or a fraction of the run. With ``stop=None`` a schedule ends at the
value that the module is configured with. :meth:`Schedule.resolve` converts both to numbers. A schedule with a length in
steps and a ``stop`` does not need resolving, so it works in any training loop:

>>> warm_up = Linear(start=0.0, stop=1.0, steps=4)
>>> [warm_up(step) for step in range(6)]
[0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
>>> Linear(epochs=2).resolve(target=4.0, steps_per_epoch=100)
Linear(start=0.0, stop=4.0, steps=200, epochs=None, fraction=None)
"""

from __future__ import annotations

import math
import operator
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import KW_ONLY, dataclass, replace
from itertools import pairwise
from typing import Any, Literal, Self, TypeVar

from typing_extensions import override

_T = TypeVar("_T")


def check_number(name: str, value: Any, allowed: str, fits: Callable[[Any], bool], remedy: str = "") -> None:
    """Check the number that an option is given, or several. A boolean is none, nor is a text.

    Args:
        name: Name of the option.
        value: The number, or a sequence of numbers.
        allowed: Description of the numbers that fit.
        fits: Returns whether a number fits.
        remedy: A sentence for the error.

    Raises:
        ValueError: If it does not fit.
    """
    numbers = value if isinstance(value, Sequence) else [value]
    with suppress(TypeError, ValueError):  # of a comparison with something else
        if not isinstance(value, str) and not any(map(_is_boolean, numbers)) and fits(value):
            return
    raise ValueError(f"`{name}` must be {allowed}, got {value!r}. {remedy}".rstrip())


def at_least(least: float) -> Callable[[float], bool]:
    """Return a function that returns whether a number is finite and at least this one."""
    return lambda value: least <= value < math.inf


def is_positive(value: float) -> bool:
    """Return whether a number is finite and above 0."""
    return 0 < value < math.inf


def integer_from(least: float = -math.inf) -> Callable[[Any], bool]:
    """Return a function that returns whether a number is an integer, and at least this one."""
    return lambda value: operator.index(value) >= least


def _is_boolean(value: Any) -> bool:
    """Return whether a value is a boolean, also one of NumPy or torch."""
    return isinstance(value, bool) or "bool" in str(getattr(value, "dtype", ""))


def cosine_ramp(ratio: float) -> float:
    """Return the half wave ``(1 - cos(pi ratio)) / 2``, which goes from 0 to 1.

    Args:
        ratio: Fraction of the way, from 0 to 1.
    """
    return 0.5 * (1.0 - math.cos(math.pi * ratio))


def sigmoid_ramp(ratio: float, steepness: float = 12.0) -> float:
    """Return the logistic function, shifted and scaled to go from exactly 0 to exactly 1.

    With ``s`` the logistic function and ``k`` the steepness: ``(s(k (ratio - 1/2)) - s(-k/2)) / (s(k/2) - s(-k/2))``,
    written with ``tanh``, which can't overflow.

    Args:
        ratio: Fraction of the way, from 0 to 1.
        steepness: Above 0; a large value makes the curve jump in the middle.
    """
    return 0.5 * (1.0 + math.tanh(steepness / 4 * (2 * ratio - 1)) / math.tanh(steepness / 4))


def interpolate(start: float, stop: float, ratio: float) -> float:
    """Return the value at ``ratio`` of the way from ``start`` to ``stop``, exact at both ends.

    Args:
        start: Value at ratio 0.
        stop: Value at ratio 1 and beyond.
        ratio: Fraction of the way, at least 0.
    """
    return stop if ratio >= 1 else start + (stop - start) * ratio


class Schedule(ABC):
    """Base of the schedules: a value per step, a length and an end."""

    def __call__(self, step: int) -> float:
        """Return the value at ``step``, which counts from 0."""
        if step < 0:
            raise ValueError(f"`step` must be >= 0, got {step}. Count steps from the start of the schedule.")
        return self._value(step)

    @abstractmethod
    def _value(self, step: int) -> float: ...

    @abstractmethod
    def resolve(
        self, target: float | None = None, steps_per_epoch: int | None = None, total_steps: int | None = None
    ) -> Self:
        """Return the same schedule with its lengths in steps and its open end filled in.

        Lengths are rounded down, but to at least one step, so fractions that sum to 1 fit into the run.

        Args:
            target: The value that ``None`` stands for as the end of a schedule.
            steps_per_epoch: Steps in one epoch, if known.
            total_steps: Steps in the whole run, if known.

        Raises:
            ValueError: If the schedule needs an argument that is ``None``.
        """

    @property
    @abstractmethod
    def length(self) -> float:
        """Steps until the value no longer changes; ``math.inf`` if it never stops changing.

        From then on callbacks use :attr:`final`.
        """

    @property
    @abstractmethod
    def final(self) -> float:
        """The value held at the end; for endless cycles, the value at which each cycle ends."""

    @property
    def endless(self) -> bool:
        """Return whether the schedule never ends, so that nothing can follow it in a :class:`Join`."""
        return False


@dataclass(frozen=True)
class Constant(Schedule):
    """Hold one value.

    It needs no length, except inside a :class:`Join` that continues with another schedule.

    Args:
        value: The value.
        steps: Length in steps.
        epochs: Length in epochs, instead of ``steps``.
        fraction: Length as a fraction of the run, instead of ``steps``.
    """

    value: float
    _: KW_ONLY
    steps: int | None = None
    epochs: float | None = None
    fraction: float | None = None

    def __post_init__(self) -> None:
        _check_finite("value", self.value)
        if not self.endless:
            _check_length(*self._duration)

    @property
    def _duration(self) -> tuple[str, float]:
        return _only_one(steps=self.steps, epochs=self.epochs, fraction=self.fraction)

    @override
    def _value(self, step: int) -> float:
        return self.value

    @override
    def resolve(
        self, target: float | None = None, steps_per_epoch: int | None = None, total_steps: int | None = None
    ) -> Self:
        if self.endless:
            return self
        steps = _in_steps(*self._duration, steps_per_epoch, total_steps)
        return replace(self, steps=steps, epochs=None, fraction=None)

    @property
    @override
    def length(self) -> float:
        return 0 if self.endless else _known("steps", self.steps)

    @property
    @override
    def final(self) -> float:
        return self.value

    @property
    @override
    def endless(self) -> bool:
        return self.steps is None and self.epochs is None and self.fraction is None


@dataclass(frozen=True, kw_only=True)
class _Ramp(Schedule):
    """Go from ``start`` to ``stop`` once, along the curve from (0, 0) to (1, 1) that a subclass gives."""

    start: float = 0.0
    stop: float | None = None
    steps: int | None = None
    epochs: float | None = None
    fraction: float | None = None

    def __post_init__(self) -> None:
        _check_finite("start", self.start)
        _check_finite("stop", self.stop)
        _check_length(*self._duration)

    @property
    def _duration(self) -> tuple[str, float]:
        return _only_one(steps=self.steps, epochs=self.epochs, fraction=self.fraction)

    @abstractmethod
    def _curve(self, ratio: float) -> float: ...

    @override
    def _value(self, step: int) -> float:
        steps, stop = _known("steps", self.steps), _known("stop", self.stop)
        return interpolate(self.start, stop, self._curve(min(1.0, step / steps)))

    @override
    def resolve(
        self, target: float | None = None, steps_per_epoch: int | None = None, total_steps: int | None = None
    ) -> Self:
        steps = _in_steps(*self._duration, steps_per_epoch, total_steps)
        return replace(self, stop=_end_at(self.stop, target), steps=steps, epochs=None, fraction=None)

    @property
    @override
    def length(self) -> float:
        return _known("steps", self.steps)

    @property
    @override
    def final(self) -> float:
        return _known("stop", self.stop)


@dataclass(frozen=True, kw_only=True)
class Linear(_Ramp):
    """Go from ``start`` to ``stop`` in a straight line: the "warm-up" of Sonderby et al. 2016, arXiv:1602.02282.

    ``start + (stop - start) * min(1, step / steps)``

    Args:
        start: Value at step 0.
        stop: Value at the end, held from then on; ``None`` is the value the module is configured with.
        steps: Length in steps.
        epochs: Length in epochs, instead of ``steps``.
        fraction: Length as a fraction of the run, instead of ``steps``.
    """

    @override
    def _curve(self, ratio: float) -> float:
        return ratio


@dataclass(frozen=True, kw_only=True)
class Cosine(_Ramp):
    """Go from ``start`` to ``stop`` along half a cosine wave, flat at both ends.

    ``start + (stop - start) * (1 - cos(pi * min(1, step / steps))) / 2``

    Args:
        start: Value at step 0.
        stop: Value at the end, held from then on; ``None`` is the value the module is configured with.
        steps: Length in steps.
        epochs: Length in epochs, instead of ``steps``.
        fraction: Length as a fraction of the run, instead of ``steps``.
    """

    @override
    def _curve(self, ratio: float) -> float:
        return cosine_ramp(ratio)


@dataclass(frozen=True, kw_only=True)
class Sigmoid(_Ramp):
    """Go from ``start`` to ``stop`` along a logistic curve, as in Bowman et al. 2016, arXiv:1511.06349.

    ``start + (stop - start) * sigmoid_ramp(min(1, step / steps), steepness)``

    :func:`sigmoid_ramp` is shifted and scaled to be exact at both ends, which the textbook's curve never reaches. Over
    a length of ``T`` steps, the textbook's ``sigmoid((step - T/2) / tau)`` has ``steepness = T / tau``, and Bowman's
    ``1 / (1 + exp(-a (step - t0)))`` has ``T = 2 t0`` and ``steepness = a T``.

    Args:
        start: Value at step 0.
        stop: Value at the end, held from then on; ``None`` is the value the module is configured with.
        steps: Length in steps.
        epochs: Length in epochs, instead of ``steps``.
        fraction: Length as a fraction of the run, instead of ``steps``.
        steepness: Near 0 the curve is a straight line; a large value makes it jump at half the length.
    """

    steepness: float = 12.0

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("steepness", self.steepness, "a finite number > 0", is_positive, "Start with 12.")

    @override
    def _curve(self, ratio: float) -> float:
        return sigmoid_ramp(ratio, self.steepness)


@dataclass(frozen=True, kw_only=True)
class Cyclical(Schedule):
    """Repeat a ramp from ``start`` to ``stop`` that then holds ``stop``: Fu et al. 2019, arXiv:1903.10145.

    With a period of ``P`` steps, ``tau = (step mod P) / P`` and ``f`` the curve:
    ``start + (stop - start) * f(min(1, tau / ratio))``. After the last cycle ``stop`` is held.

    ``ratio=0.5`` is the paper's; ``ratio=1`` is the sawtooth ``(step mod P) / P``, which never reaches ``stop`` within
    a cycle. A phase at ``start`` before each ramp, as in Optimus, is a :class:`Join` of constants and single cycles.

    Args:
        start: Value at the first step of each cycle.
        stop: Value at the end of each ramp; ``None`` is the value the module is configured with.
        period_steps: Length of one cycle in steps.
        period_epochs: Length of one cycle in epochs, instead of ``period_steps``.
        period_fraction: Length of one cycle as a fraction of the run, instead of ``period_steps``.
        cycles: Number of cycles; ``None`` repeats them forever.
        ratio: The fraction of a cycle taken by the ramp.
        shape: The curve of the ramp; ``"sigmoid"`` has steepness 12.
    """

    start: float = 0.0
    stop: float | None = None
    period_steps: int | None = None
    period_epochs: float | None = None
    period_fraction: float | None = None
    cycles: int | None = None
    ratio: float = 0.5
    shape: Literal["linear", "cosine", "sigmoid"] = "linear"

    def __post_init__(self) -> None:
        _check_finite("start", self.start)
        _check_finite("stop", self.stop)
        _check_length(*self._duration)
        if self.cycles is not None:
            check_number("cycles", self.cycles, "an integer >= 1, or None to repeat forever", integer_from(1))
        check_number("ratio", self.ratio, "in (0, 1]", lambda ratio: 0 < ratio <= 1, "Start with 0.5.")
        if self.shape not in _CURVES:
            raise ValueError(f"`shape` must be one of {', '.join(_CURVES)}, got {self.shape!r}.")

    @property
    def _duration(self) -> tuple[str, float]:
        return _only_one(
            period_steps=self.period_steps, period_epochs=self.period_epochs, period_fraction=self.period_fraction
        )

    @override
    def _value(self, step: int) -> float:
        period = _known("period_steps", self.period_steps)
        ratio = 1.0 if step >= self.length else min(1.0, step % period / (period * self.ratio))
        return interpolate(self.start, self.final, _CURVES[self.shape](ratio))

    @override
    def resolve(
        self, target: float | None = None, steps_per_epoch: int | None = None, total_steps: int | None = None
    ) -> Self:
        period = _in_steps(*self._duration, steps_per_epoch, total_steps)
        stop = _end_at(self.stop, target)
        return replace(self, stop=stop, period_steps=period, period_epochs=None, period_fraction=None)

    @property
    @override
    def length(self) -> float:
        return math.inf if self.cycles is None else self.cycles * _known("period_steps", self.period_steps)

    @property
    @override
    def final(self) -> float:
        return _known("stop", self.stop)

    @property
    @override
    def endless(self) -> bool:
        return self.cycles is None


@dataclass(frozen=True)
class Staged(Schedule):
    """Hold a sequence of values: ``values[i]`` from the i-th boundary on.

    Args:
        values: The values; the last may be ``None``, the value the module is configured with.
        at_steps: The step at which each value but the first begins.
        at_epochs: The same in epochs, instead of ``at_steps``.
        at_fractions: The same as fractions of the run, instead of ``at_steps``.
    """

    values: Sequence[float | None]
    _: KW_ONLY
    at_steps: Sequence[int] | None = None
    at_epochs: Sequence[float] | None = None
    at_fractions: Sequence[float] | None = None

    def __post_init__(self) -> None:
        for field in ("values", "at_steps", "at_epochs", "at_fractions"):
            if getattr(self, field) is not None:
                object.__setattr__(self, field, tuple(getattr(self, field)))
        name, boundaries = self._boundaries
        if len(self.values) != len(boundaries) + 1:
            raise ValueError(
                f"`{name}` must have one boundary fewer than there are `values`, "
                f"got {len(boundaries)} for {len(self.values)}. Leave out the boundary of the first value."
            )
        for boundary in boundaries:
            _check_length(name, boundary)
        if any(later < earlier for earlier, later in pairwise(boundaries)):
            raise ValueError(f"`{name}` must not decrease, got {list(boundaries)}. Sort the boundaries.")
        if None in self.values[:-1]:
            raise ValueError(f"Only the last of `values` may be None, got {list(self.values)}. Give the others.")
        for value in self.values:
            _check_finite("values", value)

    @property
    def _boundaries(self) -> tuple[str, Sequence[float]]:
        return _only_one(at_steps=self.at_steps, at_epochs=self.at_epochs, at_fractions=self.at_fractions)

    @override
    def _value(self, step: int) -> float:
        return _known("values", self.values[bisect_right(_known("at_steps", self.at_steps), step)])

    @override
    def resolve(
        self, target: float | None = None, steps_per_epoch: int | None = None, total_steps: int | None = None
    ) -> Self:
        name, boundaries = self._boundaries
        at_steps = [_in_steps(name, boundary, steps_per_epoch, total_steps) for boundary in boundaries]
        values = [*self.values[:-1], _end_at(self.values[-1], target)]
        return replace(self, values=values, at_steps=at_steps, at_epochs=None, at_fractions=None)

    @property
    @override
    def length(self) -> float:
        return max(_known("at_steps", self.at_steps), default=0)

    @property
    @override
    def final(self) -> float:
        return _known("values", self.values[-1])


@dataclass(frozen=True)
class Join(Schedule):
    """Run schedules one after another, each counting from its own start.

    The next schedule begins after the length of the previous one, at the step at which that one would first return its
    last value.

    Args:
        schedules: The schedules; each but the last needs an end.
    """

    schedules: Sequence[Schedule]

    def __post_init__(self) -> None:
        object.__setattr__(self, "schedules", tuple(self.schedules))
        if not self.schedules:
            raise ValueError("`schedules` must hold at least one schedule, got none.")
        for schedule in self.schedules:
            if not isinstance(schedule, Schedule):
                raise ValueError(f"`schedules` must hold `Schedule` objects, got {schedule!r}. Make it a `Schedule`.")
        for schedule in self.schedules[:-1]:
            if schedule.endless:
                raise ValueError(
                    f"`schedules` must all end except the last, got {schedule}. "
                    "Give a Constant a length, or a Cyclical a number of `cycles`."
                )

    @override
    def _value(self, step: int) -> float:
        *others, last = self.schedules
        for schedule in others:
            if step < schedule.length:
                return schedule(step)
            step -= int(schedule.length)
        return last(step)

    @override
    def resolve(
        self, target: float | None = None, steps_per_epoch: int | None = None, total_steps: int | None = None
    ) -> Self:
        return replace(self, schedules=[each.resolve(target, steps_per_epoch, total_steps) for each in self.schedules])

    @property
    @override
    def length(self) -> float:
        return sum(schedule.length for schedule in self.schedules)

    @property
    @override
    def final(self) -> float:
        return self.schedules[-1].final

    @property
    @override
    def endless(self) -> bool:
        return self.schedules[-1].endless


_CURVES: dict[str, Callable[[float], float]] = {"linear": float, "cosine": cosine_ramp, "sigmoid": sigmoid_ramp}


def _check_finite(name: str, value: float | None) -> None:
    if value is not None:
        check_number(name, value, "finite", math.isfinite, "Give a number.")


def _only_one(**options: _T | None) -> tuple[str, _T]:
    """Return the name and value of the only option that is given."""
    given = {name: value for name, value in options.items() if value is not None}
    if len(given) != 1:
        allowed = ", ".join(f"`{name}`" for name in options)
        got = ", ".join(f"{name}={value}" for name, value in given.items()) or "none of them"
        raise ValueError(f"A length must be given as exactly one of {allowed}, got {got}. Give one.")
    return next(iter(given.items()))


def _check_length(name: str, length: float) -> None:
    remedy = "Give lengths in steps, epochs or fractions."
    if name.endswith("steps"):
        check_number(name, length, "an integer >= 1", integer_from(1), remedy)
    elif name.endswith("epochs"):
        check_number(name, length, "a finite number > 0", is_positive, remedy)
    else:
        check_number(name, length, "a fraction of the run, in (0, 1]", lambda fraction: 0 < fraction <= 1, remedy)


def _in_steps(name: str, length: float, steps_per_epoch: int | None, total_steps: int | None) -> int:
    """Return a length in steps; the option's name gives its unit."""
    if name.endswith("steps"):
        return int(length)
    unit = steps_per_epoch if name.endswith("epochs") else total_steps
    if unit is None:
        whole, hint = "an epoch", ""
        if not name.endswith("epochs"):
            whole = "the run"
            hint = (
                " (Under manual optimization `max_steps` counts the steps of every optimizer, and not batches: limit "
                "the run by `max_epochs` alone, or give steps.)"
            )
        raise ValueError(
            f"`{name}` must be given in steps here, got {name}={length}: the number of steps in {whole} is not known. "
            f"Give the length in steps.{hint}"
        )
    return max(1, math.floor(round(length * unit, 6)))  # 0.29 * 100 is 28.999999999999996 and should give 29


def _end_at(stop: float | None, target: float | None) -> float:
    """Return the end of a schedule: its own, or else the configured value."""
    end = target if stop is None else stop
    if end is None:
        raise ValueError("The end of a schedule must be a number, got None and no configured value. Give it a `stop`.")
    return end


def _known(name: str, value: _T | None) -> _T:
    if value is None:
        raise ValueError(
            f"`{name}` must be a number to compute with, got None. "
            "Give it, or use the result of `resolve(target, steps_per_epoch, total_steps)`."
        )
    return value
