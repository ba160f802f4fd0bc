"""Hold the rate at a target."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from .base import callbacks_of, knobs_of, sum_over_processes
from .control.attribute_writer import AttributeWriter, MisconfigurationException, monitors
from .control.rate_controller import ControllerState, RateController, rate_scale
from .control.run_schedule import RunSchedule
from .reading.distributions import Second
from .reading.latent_reader import Latent, LatentReader, Places, measured_rates
from .schedules import Constant, Schedule, at_least, check_number, is_positive

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

_VALIDATION_LOSS = re.compile(r"val(id|idation)?[/_]loss(_epoch)?")


class TargetRate(AttributeWriter):
    r"""Hold the rate at a target number of nats or bits by moving the weight of the KL term.

    ControlVAE's PI controller, in the logarithm of the weight,

    .. math::
        e = \frac{R - C}{\max(C, 1)}, \quad \log \beta = K_p e + I, \quad I \leftarrow I + K_i e

    where R is the moving average of the training batches' rates and C the target, each in nats per observation. The
    error is clamped to -1 and 1 and the weight to its bounds, where the integral stops. Apart from the proportional
    term, a step moves :math:`\log \beta` by at most :math:`K_i`.

    The weight starts at the module's configured value. Validation, checkpoints and the finished module have the weight
    that the controller has found. The controller's state is saved, so a resumed run continues from it. Logged on
    logging steps: ``knobs/beta`` (or the path's last part), ``knobs/target_rate`` and ``latent/controlled_rate``, the
    moving average, both in nats. A target that no weight within the bounds reaches is reported once.

    The ``val/loss`` and ``test/loss`` of ``lightning_vae.VAE`` then refer to the target at the schedule's end: they are
    the distortion, plus ``price`` for each nat of rate above the target and its tolerance. The validation loss of any
    other module contains the current weight: monitor something without it.

    Args:
        nats: The target in nats per observation: a number, a schedule of the training step with an explicit end, or
            another function of it, which ends with the run.
        bits: The same in bits, instead of ``nats``.
        attribute: Where the module keeps the weight: a dotted path as in :class:`KLAnnealing`, or several.
        posterior: Where to read the posterior, as in :class:`CollapseDetector`; ``None`` is the module's own
            ``posterior``. Several posteriors in a step count as that many observations; the rates of named groups add
            up.
        prior: Where the prior is, as in :class:`CollapseDetector`; ``None`` is the module's own ``prior``.
        z: Where the module's own sample is, at which a rate without a closed form is estimated.
        second: Meaning of the second parameter if the posterior is a pair of tensors.
        chunk: Axis along which the posterior is split into halves, if it is one tensor.
        start: The weight to start from; the module's configured weight if not given.
        min_beta: The smallest weight; a hundredth of the first if not given.
        max_beta: The largest weight; a hundred times the first if not given.
        proportional: Gain :math:`K_p`.
        integral: Gain :math:`K_i` per step. Lower it if rate and weight oscillate, in runs of very many steps.
        smoothing: Weight of the previous average in the moving average, from 0 to below 1.
        tolerance: Amount by which the rate may exceed the target in ``val/loss``, and may miss the target before it
            counts as not met: a fraction of the target, or of 1 nat for smaller targets.
        price: Price in ``val/loss`` of each nat above that. It must be more than the weight that holds the target,
            or exceeding the target would pay; if it turns out to be less, that is reported.
        patience: Number of steps at a bound, with the target not met, before that is reported.
        setter: Writes the weight instead, ``(pl_module, value) -> None``; needs a ``start``.
        name: Logged as ``knobs/<name>``; the path's last part if not given.
        mask: Where the batch has a mask of the latents' positions, True where one is real: a key, an index or a
            callable. Padding then counts for nothing.

    Raises:
        ValueError: If an option is out of range, or, when fitting starts, if a path leads nowhere, there is no
            positive weight to start from, or the target does not end at a valid rate.
        lightning.pytorch.utilities.exceptions.MisconfigurationException: When fitting starts, if another callback moves
            the same weight, or a monitor watches ``train/loss``, which moves.

    References:
        Shao et al., "ControlVAE: Controllable Variational Autoencoder", ICML 2020, section 3.2; Burgess et al.,
        "Understanding disentangling in beta-VAE", 2018, for a target that moves.

    Example::

        >>> TargetRate(bits=8).state_key
        "TargetRate{'attribute': 'beta', 'name': 'beta'}"
    """

    _reader: LatentReader

    def __init__(
        self,
        nats: float | Schedule | Callable[[int], float] | None = None,
        bits: float | Schedule | Callable[[int], float] | None = None,
        attribute: str | Sequence[str] = "beta",
        posterior: Places = None,
        prior: Places = None,
        z: Places = None,
        second: Second = "log_variance",
        chunk: int | None = None,
        start: float | None = None,
        min_beta: float | None = None,
        max_beta: float | None = None,
        proportional: float = 1.0,
        integral: float = 0.03,
        smoothing: float = 0.95,
        tolerance: float = 0.05,
        price: float = 10.0,
        patience: int = 500,
        setter: Callable[[Any, float], None] | None = None,
        name: str | None = None,
        mask: int | str | Callable[[Any], Any] | None = None,
    ) -> None:
        if (nats is None) == (bits is None):
            raise ValueError(
                f"The target must be given as `nats` or as `bits`, got nats={nats}, bits={bits}. Give one."
            )
        target = bits if nats is None else nats
        if not callable(target):
            unit = "nats" if bits is None else "bits"
            check_number(unit, target, "a finite rate of at least 0, or a schedule", at_least(0))
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
        self.schedule = target if callable(target) else Constant(float(target or 0.0))
        self.nats = nats
        self.bits = bits
        self.start = start
        self.min_beta = min_beta
        self.max_beta = max_beta
        self.proportional = proportional
        self.integral = integral
        self.smoothing = smoothing
        self.tolerance = tolerance
        self.price = price
        self.patience = patience
        self._log_key = "knobs/target_rate" if name is None else f"knobs/target_rate_{name}"
        self._rate_key = "latent/controlled_rate" if name is None else f"latent/controlled_rate_{name}"
        self._reader = LatentReader(posterior, prior, z, second, chunk, f"{type(self).__name__}({self.name})", mask)
        self._schedule = RunSchedule(self.schedule)
        self._first: float | None = None  # the weight that the run began with
        self._controller: RateController | None = None
        self._state: ControllerState | None = None
        self._measured: Tensor | None = None  # sum of the rates and number of observations since the last step
        self._sets_limit = False  # True if the module's validation loss uses the target
        self._reported: set[str] = set()

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._reported, self._measured = set(), None
        super().on_fit_start(trainer, pl_module)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        measured = self._measure(pl_module, batch)
        self._measured = measured if self._measured is None else self._measured + measured
        if not self.accumulates(trainer):
            self._steer(trainer)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        self._report(self.target(max(0, self.step(trainer) - 1)))  # for runs that rarely log
        self._schedule.end(trainer, f"{type(self).__name__}({self.name})", self.step(trainer))

    @override
    def state_dict(self) -> dict[str, Any]:
        state = {} if self._state is None else {name: value.cpu() for name, value in self._state._asdict().items()}
        return {"base": self._first, **self._schedule.state(), **state}

    @property
    def weight(self) -> Tensor | None:
        """The weight of the next step, a 0-dim tensor; ``None`` before the first fit."""
        return None if self._state is None else self._state.log_weight.exp()

    def target(self, step: int) -> float:
        """Return the target of a step, in nats."""
        return self._in_nats(self._schedule(step))

    @override
    def _value(self, step: int) -> Tensor:
        assert isinstance(self._target, Tensor)
        return self._target

    @property
    @override
    def _moves(self) -> bool:
        return True

    def _in_nats(self, value: float) -> float:
        return value if self.bits is None else value * math.log(2)

    def _measure(self, pl_module: LightningModule, batch: Any) -> Tensor:
        try:
            return sum_and_count(self._reader.read(pl_module, batch), pl_module.device)
        except ValueError as error:
            raise ValueError(f"{type(self).__name__}({self.name}): {error}") from None

    def _steer(self, trainer: Trainer) -> None:
        """Update the controller with the step that has just been taken."""
        assert self._controller is not None
        assert self._state is not None
        assert self._measured is not None
        measured, self._measured = sum_over_processes(trainer, self._measured), None
        self._state = self._controller(self._state, measured[0] / measured[1], self.target(self.step(trainer)))
        self._target = self.weight

    @override
    def _log(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        super()._log(trainer, pl_module, batch)
        assert self._state is not None
        target = self.target(self.step(trainer))
        self.log_now(pl_module, {self._log_key: target, self._rate_key: self._state.rate})
        self._report(target)

    def _report(self, target: float) -> None:
        for kind, text in self._problems(target):
            if kind not in self._reported:
                self._reported.add(kind)
                rank_zero_warn(f"{type(self).__name__}({self.name}): {text}")

    def _problems(self, target: float) -> Iterator[tuple[str, str]]:
        """Yield each problem with the options, and its remedy. Synchronises with the device."""
        assert self._state is not None
        rate, _, log_weight, steps = (float(value) for value in self._state)
        if math.isnan(rate):
            yield "nan", "the measured rate is not a number. Check the posterior: scales and variances are positive."
            return
        weight = f"`{self.name}` has been at its {{}}, {math.exp(log_weight):.4g}, for {abs(steps):.0f} steps"
        missed = f", and the rate is {rate:.4g} nats instead of {target:.4g}."
        if steps >= self.patience:
            remedy = "Raise `max_beta` or the target. If no weight lowers the rate, the loss does not read it."
            yield "high", f"{weight.format('largest')}{missed} {remedy}"
        elif steps <= -self.patience:
            remedy = "Lower `min_beta` or the target, or give the model more latent dimensions."
            yield "low", f"{weight.format('smallest')}{missed} {remedy}"
        met = abs(rate - target) <= self.tolerance * rate_scale(target)
        if met and self._sets_limit and math.exp(log_weight) > self.price:
            yield (
                "price",
                f"it takes `{self.name}` = {math.exp(log_weight):.4g} to hold the rate, and `val/loss` charges "
                f"{self.price:g} for a nat above the target: exceeding it would pay. Raise `price`.",
            )

    @override
    def _prepare(
        self, trainer: Trainer, pl_module: LightningModule, current: float | None, restored: dict[str, Any]
    ) -> None:
        first = self.start if self.start is not None else restored.get("base") or current
        if first is None or not first > 0:
            raise ValueError(
                f"{type(self).__name__}({self.name}): the weight to start from must be above 0, got {first}. Configure "
                "the module with another weight, or give `start`."
            )
        self._first = float(first)
        self._schedule.begin(trainer, f"{type(self).__name__}({self.name})", None, restored)
        self._controller = self._bounded(self._first)
        self._state = ControllerState.start(math.log(self._first), pl_module.device)
        if all(name in restored for name in ControllerState._fields):
            saved = (torch.as_tensor(restored[name]) for name in ControllerState._fields)
            self._state = ControllerState(*(value.to(pl_module.device) for value in saved))
        self._set_limit(pl_module)
        self._target = self.weight

    def _bounded(self, first: float) -> RateController:
        lower = first / 100 if self.min_beta is None else self.min_beta
        upper = first * 100 if self.max_beta is None else self.max_beta
        if not lower <= first <= upper:
            raise ValueError(
                f"{type(self).__name__}({self.name}): the weight starts at {first:g}, which must be within "
                f"`min_beta` and `max_beta`, {lower:g} to {upper:g}. Change them or `start`."
            )
        return RateController(
            math.log(lower), math.log(upper), self.proportional, self.integral, self.smoothing, self.tolerance
        )

    def _set_limit(self, pl_module: Any) -> None:
        """Pass the rate limit for model selection, and the price of exceeding it, to a module with knobs."""
        end = self._schedule.final
        if end is None:  # a plain callable, which ends with the run
            last = self._schedule.total_steps or 10**9
            try:
                end = self.schedule(last)
            except LookupError:  # a table with a target for each step
                end = self._schedule(last - 1)
        limit = self._in_nats(end)
        if not 0 <= limit < math.inf:
            raise ValueError(
                f"{type(self).__name__}({self.name}): the target must end at a finite rate of at least 0, got {limit}."
            )
        steered = tuple(path for path in self._paths if path in knobs_of(pl_module))
        self._sets_limit = bool(steered)
        if self._sets_limit:
            pl_module.steered_knobs = steered
            pl_module.rate_limit = (limit + self.tolerance * rate_scale(limit), self.price)

    @override
    def _refuse_moving_monitor(self, trainer: Trainer) -> None:
        super()._refuse_moving_monitor(trainer)
        for owner, monitor in () if self._sets_limit else monitors(trainer):
            if _VALIDATION_LOSS.fullmatch(monitor):
                rank_zero_warn(
                    f"{type(self).__name__}({self.name}): {owner} monitors {monitor!r}. If that contains "
                    f"`{self.name}`, it moves with the controller and is lowest where the weight is. Monitor a "
                    "reconstruction error, or an ELBO without the weight once the rate is at its target."
                )

    @override
    def _refuse_twins(self, trainer: Trainer) -> None:
        super()._refuse_twins(trainer)
        for each in callbacks_of(trainer):
            if isinstance(each, TargetRate) and each is not self and each._log_key == self._log_key:
                raise MisconfigurationException(f"Two callbacks log `{self._log_key}`. Distinguish them with `name=`.")


def sum_and_count(views: Sequence[Mapping[str, Latent]], device: torch.device) -> Tensor:
    """Sum the rates of all observations, and count them.

    Args:
        views: The groups of latents of each view; the rates of the groups of an observation add up.
        device: Where to return them.

    Returns:
        Nats and a number, float32, shape ``(2,)``.
    """
    rates = [torch.stack([measured_rates(each).sum(1) for each in latents.values()]).sum(0) for latents in views]
    total = sum((each.sum() for each in rates), start=torch.zeros((), device=device))
    count = torch.full((), float(sum(len(each) for each in rates)), device=device)
    return torch.stack([total.to(device), count])
