"""Move the capacity at which a loss holds the rate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from lightning_utilities.core.rank_zero import rank_zero_warn
from typing_extensions import override

from .control.attribute_path import PathError
from .control.attribute_scheduler import AttributeScheduler
from .control.tied_attributes import NumberPlace
from .reading.distributions import Second
from .reading.latent_reader import LatentReader, Places
from .schedules import Constant, Schedule, at_least, check_number, is_positive
from .target_rate import sum_and_count

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

_LINE = "loss = distortion + gamma * (rate - self.capacity).abs()"
_TOLERANCE = 0.05  # of the capacity, or of 1 nat: the noise of a batch's rate, near its capacity, exceeds it at times


class Capacity(AttributeScheduler):
    """Move the capacity, the rate in nats at which the loss holds the rate, along a schedule.

    The module's loss has to read the capacity. ``lightning_vae.VAE`` does if it has a ``capacity_weight``; your own
    loss needs one line,

        loss = distortion + gamma * (rate - self.capacity).abs()

    with the mean rate of the batch. Validation, checkpoints and the finished module have the schedule's end. Logged as
    ``knobs/capacity``, or the path's last part.

    The term holds the rate at the capacity if gamma is at least the ``beta`` that leads to this rate. If gamma is
    smaller, the rate stays above the capacity, where gamma is nothing but a constant ``beta``. On logging steps the
    callback measures the rate, if the posterior and the prior can be read. A rate that stays above the capacity, or
    below, for ``patience`` steps after the schedule's end is reported once.

    Args:
        schedule: The capacity in nats: a number, or a schedule of the training step. A schedule whose ``stop`` is left
            out ends at the module's own capacity.
        attribute: Where the module keeps the capacity: a dotted path, or several.
        posterior: Where to read the posterior, as in :class:`CollapseDetector`; ``None`` is the module's own
            ``posterior``, if it has one.
        prior: Where the prior is, as in :class:`CollapseDetector`; ``None`` is the module's own ``prior``.
        z: Where the module's own sample is, at which a rate without a closed form is estimated.
        second: Meaning of the second parameter if the posterior is a pair of tensors.
        chunk: Axis along which the posterior is split into halves, if it is one tensor.
        patience: Number of steps on one side of the capacity before that is reported.
        setter: Writes the capacity instead, ``(pl_module, value) -> None``.
        name: Logged as ``knobs/<name>``; the path's last part if not given.

    Raises:
        ValueError: If the capacity is negative (of a schedule: when fitting starts, or at that step), or, when fitting
            starts, if a path leads nowhere.
        lightning.pytorch.utilities.exceptions.MisconfigurationException: When fitting starts, as for
            :class:`KLAnnealing`. A callback that moves ``beta`` or ``free_bits`` is an error with a
            ``capacity_weight``, as the loss does not read them.

    References:
        Burgess et al., "Understanding disentangling in beta-VAE", 2018, section 5.

    Example::

        >>> from lightning_vae.callbacks import Linear
        >>> Capacity(Linear(start=0.5, stop=25.0, fraction=0.8)).state_key
        "Capacity{'attribute': 'capacity', 'name': 'capacity'}"
    """

    _reader: LatentReader

    def __init__(
        self,
        schedule: float | Schedule | Callable[[int], float],
        attribute: str | Sequence[str] = "capacity",
        posterior: Places = None,
        prior: Places = None,
        z: Places = None,
        second: Second = "log_variance",
        chunk: int | None = None,
        patience: int = 500,
        setter: Callable[[Any, float], None] | None = None,
        name: str | None = None,
    ) -> None:
        if not callable(schedule):
            check_number("schedule", schedule, "a finite rate of at least 0, or a schedule", at_least(0))
            schedule = Constant(float(schedule))
        check_number("patience", patience, "a finite number above 0", is_positive)
        super().__init__(schedule, attribute, setter, name)
        self.patience = patience
        self._reader = LatentReader(posterior, prior, z, second, chunk, who=self._title)
        self._side = 0  # where the rate is: 1 above the capacity, -1 below, 0 at it
        self._since: int | None = None  # the step from which it has been there
        self._warned = False

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        self._warned = False

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if self.logs_now(trainer) and self._reader.can_read(pl_module):  # only then is the rate read
            super().on_before_optimizer_step(trainer, pl_module)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "side": self._side, "since": self._since}

    @override
    def _value(self, step: int) -> float:
        capacity = super()._value(step)
        self._check(capacity, step)
        return capacity

    def _check(self, capacity: float | None, step: float) -> None:
        if capacity is not None and capacity < 0:
            raise ValueError(
                f"{self._title}: the capacity must be a rate of at least 0 at each step, got {capacity:g} at step "
                f"{step:.0f}. Change the `schedule`."
            )

    @override
    def _prepare(
        self, trainer: Trainer, pl_module: LightningModule, current: float | None, restored: dict[str, Any]
    ) -> None:
        super()._prepare(trainer, pl_module, current, restored)
        for step, capacity in ((0, self._schedule(0)), (self._schedule.length, self._schedule.final)):
            self._check(capacity, step)
        self._side, self._since = restored.get("side", 0), restored.get("since")

    @override
    def _log(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        super()._log(trainer, pl_module, batch)
        is_moving = self._schedule.final is not None and not self._has_settled
        if self._warned or is_moving or not self._reader.can_read(pl_module):
            return
        total, count = sum_and_count(self._reader.read(pl_module, batch), pl_module.device).tolist()
        if count:
            self._compare(total / count, float(self._current), self.step(trainer))

    def _compare(self, rate: float, capacity: float, step: int) -> None:
        """Warn once if the rate has been on one side of the capacity for long."""
        margin = _TOLERANCE * max(capacity, 1.0)
        side = (rate > capacity + margin) - (rate < capacity - margin)
        if side != self._side or self._since is None:
            self._side, self._since = side, step
        if not side or step - self._since < self.patience:
            return
        self._warned = True
        where, remedy = (
            ("above", "The weight is too small to hold it: the weight acts as a constant beta. Raise it")
            if side > 0
            else ("below", "The run is too short, or the model can't use more: train for longer")
        )
        rank_zero_warn(
            f"{self._title}: the rate has been {where} the capacity since step {self._since}, and is {rate:.4g} nats "
            f"instead of {capacity:.4g}. {remedy}, or {'raise' if side > 0 else 'lower'} the capacity."
        )

    @override
    def _find(self, pl_module: LightningModule) -> NumberPlace:
        try:
            return super()._find(pl_module)
        except ValueError as error:
            reason = error.reason if isinstance(error, PathError) else str(error)
            raise ValueError(
                f"{self._title}: {reason} The loss has to read the capacity: give `lightning_vae.VAE` a "
                f"`capacity_weight`, or your own module the line `{_LINE}`."
            ) from error
