"""Detect posterior collapse during training."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from typing_extensions import override

from .base import Callback, callbacks_of, several_processes, validates
from .control.attribute_writer import MisconfigurationException
from .drawing.best_effort import BestEffort
from .drawing.dimension_history import DimensionHistory, is_drawn
from .drawing.media_logger import MediaLogger
from .enforced_free_bits import EnforcedFreeBits
from .free_bits import FreeBits
from .kl_annealing import KLAnnealing
from .metrics.active_units import ACTIVE
from .metrics.collapse_state import MAX_MARGINAL_KL, MIN_WIDTH, CollapseState
from .metrics.latent_monitor import LatentMonitor
from .metrics.latent_report import LatentReport
from .reading.batch_fields import index_of
from .reading.distributions import Second
from .reading.latent_reader import LatentReader, Places
from .schedules import at_least, check_number
from .target_rate import TargetRate

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

_MOST_LOGGED = 32  # dimensions whose shift and scale are logged one by one
_MOST_DRAWN = 2048  # dimensions whose history is drawn


class CollapseDetector(Callback):
    """Detect posterior collapse, and suggest a remedy.

    After each validation pass it knows, over all validation data and all processes, each latent dimension's rate, the
    variance of its posterior mean, and the mutual information of data and latents. From these it distinguishes a
    collapsed posterior from one that only has dimensions to spare; see
    :func:`~.metrics.collapse_state.collapse_state`. It reads the posteriors that the module computes anyway and runs no
    forward pass of its own. In a run without validation a pass is a training epoch, in which each step contributes the
    posteriors of the model at that step.

    Logged are ``latent/active_units``, ``latent/active_fraction``, ``latent/rate`` (the mean over all the data, in
    nats), ``latent/mutual_information``, ``latent/marginal_kl`` (rate minus mutual information) and ``collapse/alarm``
    (1 while an alarm is on). TensorBoard also gets the pictures ``latent/rate_per_dimension`` and
    ``latent/variance_per_dimension``, with a column for each pass (every second, fourth and so on in a long run), and
    the alarm's text as ``collapse/message``. The mutual information and the marginal KL are the estimates that ``test``
    prints. The former can't exceed the logarithm of the number of observations it comes from (7.6 nats for 2048). Above
    90 % of that, read it as "at least"; the marginal KL is then a lower bound from the moments of q(z), or, of
    categories, from the usage of each group's classes.

    TensorBoard also gets the shift and scale of q(z) in each dimension, at most 32, as ``latent_shift/0`` and
    ``latent_scale/0``; they are printed when training ends. Categorical posteriors, one-hot with a group in each row,
    have a dimension for each group, and log ``latent/perplexity`` (the mean over the groups) and
    ``latent/dead_classes`` (their sum). For other posteriors that are not diagonal Gaussians there is no mutual
    information.

    Latents with several axes, ``(N, k, H, W)``, have a dimension at each position. A step may have several posteriors,
    for example one for each view: each counts as a separate observation.

    In ``trainer.validate`` it also measures and logs, and reports an alarm immediately.

    Args:
        posterior: Where the posterior is: ``None`` for the module's own attribute ``posterior``, the path of a
            submodule that outputs it (``"encoder"``) or of a part of its output (``"vae:latent_dist.mean"``), a pair of
            paths for its two parameters, or a callable ``(pl_module, batch) -> q(z|x)``, which is called before the
            optimizer's step and changes nothing in the run. See
            :class:`~.reading.distribution_reader.DistributionReader`. A dict of them names several groups of latents.
        prior: Where the prior is, in the same forms as the posterior, or a fixed distribution; ``None`` for the
            module's own attribute ``prior``. See :class:`~.reading.latent_reader.LatentReader`.
        z: Where the module's own sample is, at which a rate without a closed form is estimated.
        second: Meaning of the second parameter where the posterior is a pair of tensors: ``"log_variance"``,
            ``"variance"``, ``"scale"`` or ``"log_scale"``, or a function that turns it into the scale.
        chunk: Where the posterior is one tensor: the axis along which it is split into halves, the mean and the second
            parameter. 1 for ``(N, 2k)`` and ``(N, 2k, H, W)``, -1 for ``(N, T, 2k)`` and ``(N, k, 2)``.
        min_rate: Rate in nats below which the active dimensions together count as collapsed.
        threshold: Variance of the posterior mean that an active dimension exceeds.
        observations: Number of observations that the mutual information is estimated from: a fixed random subset, by
            ``"index"`` where the batch is a dict with that key, otherwise by position.
        patience: Number of alarming passes in a row before there is an alarm.
        warmup: Number of passes at the start of training that never count. With an annealed KL weight, make it as many
            as the schedule takes to reach its end.
        on_alarm: Action on an alarm, once for each state: ``"warn"``, ``"stop"`` (warn and stop training), or a
            callable ``(trainer, pl_module, state)`` that takes over. It runs on every process.
        name: Distinguishes several detectors, for example of two encoders: the keys become
            ``latent_<name>/active_units``, ``collapse_<name>/alarm`` and so on.
        pool: Axes of the latents ``(N, ...)`` over which a dimension extends, such as ``(2, 3)`` for ``(N, C, H, W)``;
            see :class:`~.metrics.latent_monitor.LatentMonitor`.
        mask: Where the batch has a mask of the latents' positions, True where one is real: a key, an index or a
            callable. Padding then counts for nothing.
        min_width: Ratio of the posteriors' variance to that of q(z) below which a posterior is *deterministic*...
        max_marginal_kl: ...if q(z) is also more than this number of nats per active dimension from the prior.
        unimix: Share of the uniform distribution that the module mixes into categorical posteriors.

    Attributes:
        report: The measurements of the latest pass, a :class:`~.metrics.latent_report.LatentReport`.
        shift: Mean of q(z) in each dimension or channel, of shape ``(k,)``, float64, saved with the callback's state.
        scale: Its standard deviation. Train a second model on ``(z - shift) / scale``.

    Raises:
        ValueError: If an option is out of range, the posterior is not found where it should be, it has no mean, or its
            shape changes from batch to batch.
        lightning.pytorch.utilities.exceptions.MisconfigurationException: When a run starts, if two detectors have the
            same ``name``.

    Example::

        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[CollapseDetector(posterior=("encoder.mean", "encoder.log_variance"))])
    """

    def __init__(
        self,
        posterior: Places = None,
        prior: Places = None,
        z: Places = None,
        second: Second = "log_variance",
        chunk: int | None = None,
        min_rate: float = 0.5,
        threshold: float = ACTIVE,
        observations: int = 2048,
        patience: int = 3,
        warmup: int = 10,
        on_alarm: Literal["warn", "stop"] | Callable[[Trainer, LightningModule, CollapseState], Any] = "warn",
        name: str | None = None,
        pool: int | Sequence[int] | None = None,
        mask: int | str | Callable[[Any], Any] | None = None,
        min_width: float = MIN_WIDTH,
        max_marginal_kl: float = MAX_MARGINAL_KL,
        unimix: float = 0.0,
    ) -> None:
        for option, value, least in (("patience", patience, 1), ("warmup", warmup, 0)):
            check_number(option, value, f"a finite number of at least {least}", at_least(least))
        if not (on_alarm in ("warn", "stop") or callable(on_alarm)):
            raise ValueError(
                f"`on_alarm` must be 'warn', 'stop' or a callable `(trainer, pl_module, state)`, got {on_alarm!r}."
            )
        self.posterior = posterior
        self.min_rate = min_rate
        self.threshold = threshold
        self.observations = observations
        self.patience = patience
        self.warmup = warmup
        self.on_alarm = on_alarm
        self.name = name
        self.pool = pool
        self.mask = mask
        self.min_width = min_width
        self.max_marginal_kl = max_marginal_kl
        self.unimix = unimix
        self._monitor()  # refuses what is out of range
        self._title = f"CollapseDetector({name})" if name else "CollapseDetector"
        self._reader = LatentReader(posterior, prior, z, second, chunk, self._title, mask)
        self._attempt = BestEffort(self._title)
        self._pass: LatentMonitor | None = None
        self.report: LatentReport | None = None
        self.shift: Tensor | None = None
        self.scale: Tensor | None = None
        self._watches_training = False
        self._passes = 0
        self._alarming_passes = 0
        self._reported = ""
        self._said: set[str] = set()  # reasons why a pass can't be judged
        self._rates, self._variances = DimensionHistory(), DimensionHistory()
        self._saved_pass: dict[str, Any] = {}
        self._saves_pass = False

    @cached_property  # Lightning reads it at every hook of every step
    @override
    def state_key(self) -> str:
        return self.keyed_by(posterior=self._reader.key, name=self.name)

    @override
    def on_fit_start(self, trainer: Trainer, *_: Any) -> None:
        self._start(trainer)

    @override
    def on_validation_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.state.fn != "fit":
            self._start(trainer)

    # ---- a pass over the validation data

    @override
    def on_validation_epoch_start(self, trainer: Trainer, *_: Any) -> None:
        self._begin_pass(trainer)

    @override
    def on_validation_batch_start(self, _trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self._reader.listen(pl_module)

    @override
    def on_validation_batch_end(
        self, _trainer: Trainer, pl_module: LightningModule, _outputs: Any, batch: Any, *_: Any
    ) -> None:
        self._append(pl_module, batch)  # in the sanity check too, so that a wrong `posterior` shows at once

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._end_pass(trainer, pl_module)

    # ---- a pass is a training epoch if there is no validation

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._watches_training = not validates(trainer)
        # With several processes a checkpoint holds one process's share: then only the rest of the epoch is measured.
        self._saves_pass = self._watches_training and not several_processes(trainer)
        if self._watches_training:
            rank_zero_info(f"{self._title}: this run has no validation, so each training epoch is measured instead.")
            if not self._begin_pass(trainer).load_pass(self._saved_pass, pl_module.device):
                rank_zero_warn(
                    f"{self._title}: the checkpoint holds the begun pass of another version, which can't be read. This "
                    "epoch's measurements cover the rest of it."
                )
            self._saved_pass = {}

    @override
    def on_train_epoch_start(self, trainer: Trainer, *_: Any) -> None:
        if self._watches_training:
            self._begin_pass(trainer)

    @override
    def on_train_batch_start(self, _trainer: Trainer, pl_module: LightningModule, batch: Any, *_: Any) -> None:
        if self._watches_training:
            self._reader.listen(pl_module, batch)

    @override
    def on_before_optimizer_step(self, _trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if self._watches_training:
            self._reader.capture(pl_module)

    @override
    def on_train_batch_end(
        self, _trainer: Trainer, pl_module: LightningModule, _outputs: Any, batch: Any, *_: Any
    ) -> None:
        if self._watches_training:
            self._append(pl_module, batch)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._watches_training:
            self._end_pass(trainer, pl_module)

    # ---- the end of a run, and what is saved

    @override
    def on_train_end(self, trainer: Trainer, *_: Any) -> None:
        if self._passes and not is_drawn(self._passes):
            self._draw(trainer)
        if self.report is not None and (text := self.report.text):
            rank_zero_info(f"{self._title}: over the last pass q(z) has {text}.")

    @override
    def on_save_checkpoint(self, *_: Any) -> None:
        self._reader.unhook()  # a saved module must not contain the hooks

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "passes": self._passes,
            "alarming_passes": self._alarming_passes,
            "reported": self._reported,
            "rates": self._rates.state(),
            "variances": self._variances.state(),
            "begun": self._pass.pass_state() if self._saves_pass and self._pass is not None else {},
            "shift": self.shift,
            "scale": self.scale,
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._passes = state_dict["passes"]
        self._alarming_passes = state_dict["alarming_passes"]
        self._reported = state_dict["reported"]
        self._rates.load(state_dict["rates"])
        self._variances.load(state_dict["variances"])
        self._saved_pass = state_dict.get("begun", {})
        self.shift, self.scale = state_dict.get("shift"), state_dict.get("scale")

    # ---- a pass: begin, append, end

    def _start(self, trainer: Trainer) -> None:
        """Refuse a second detector with the same keys, and register the cleanup for the end of the run."""
        self._said = set()
        detectors = [each for each in callbacks_of(trainer) if isinstance(each, CollapseDetector)]
        if [each.name for each in detectors].count(self.name) > 1:
            raise MisconfigurationException(
                f"Two CollapseDetectors log `{self._key('latent/active_units')}`. Distinguish them with `name=`."
            )
        self.at_end(trainer, self._discard)

    def _monitor(self) -> LatentMonitor:
        options = ("observations", "pool", "min_rate", "threshold", "min_width", "max_marginal_kl", "unimix")
        return LatentMonitor(**{name: getattr(self, name) for name in options})

    def _discard(self) -> None:
        self._reader.detach()
        self._pass = None

    def _begin_pass(self, trainer: Trainer) -> LatentMonitor:
        if self._pass is None:
            self._pass = self._monitor().to(trainer.strategy.root_device)
        elif self._pass.has_begun:  # the sanity check, or an epoch cut short
            self._pass.reset()
        return self._pass

    def _append(self, pl_module: LightningModule, batch: Any) -> None:
        assert self._pass is not None
        if self._reader.offers_none(pl_module):
            return  # this process's share of the batch was empty
        views = self._reader.read(pl_module, batch)
        for view, latents in enumerate(views):
            index = index_of(batch, next(iter(latents.values())).posterior.batch_shape[0])
            if index is not None:  # two views of an observation count as two observations
                index = index * len(views) + view
            self._pass.add(latents, index)

    def _end_pass(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self._pass is not None
        try:
            measured = self._pass.compute()
            reason = _unusable(measured)
        except ValueError as error:
            measured, reason = None, f"the posteriors of this pass can't be judged ({error}). Training continues."
        self._pass.reset()
        if reason or measured is None:
            kind = reason.partition(" (")[0]  # the numbers in an error differ from pass to pass
            if kind not in self._said:
                self._said.add(kind)
                rank_zero_warn(f"{self._title}: {reason}")
            return
        self.report, self.shift, self.scale = measured, measured.shift, measured.scale
        anneals, floors = _measures_taken(trainer, pl_module)
        state = replace(measured.collapse, anneals=anneals, floors=floors)
        is_fitting = trainer.state.fn == "fit"
        alarm = self._count(state) if is_fitting else state.alarm
        self._log(trainer, pl_module, measured, alarm)
        if is_fitting:
            self._say_how(measured)
            if len(measured.variance) <= _MOST_DRAWN:
                self._variances.add(measured.variance, self._passes)
                self._rates.add(measured.rate_per_dimension, self._passes)
            if is_drawn(self._passes):
                self._draw(trainer)
        self._report(trainer, pl_module, state, alarm)
        if is_fitting:
            self._reported = state.name if alarm else ""

    # ---- from the measurements to alarms, logs and pictures

    def _count(self, state: CollapseState) -> bool:
        """Count one pass of training; return whether there is an alarm."""
        self._passes += 1
        counts = state.alarm and self._passes > self.warmup
        self._alarming_passes = self._alarming_passes + 1 if counts else 0
        return self._alarming_passes >= self.patience

    def _report(self, trainer: Trainer, pl_module: LightningModule, state: CollapseState, alarm: bool) -> None:
        """Raise an alarm that is new in some process, or report that one has ended."""
        if trainer.strategy.reduce_boolean_decision(alarm and state.name != self._reported, all=False):
            message = _message(self._title, state)
            with self._attempt("the message"):
                MediaLogger(trainer).text(self._key("collapse/message"), message, self._point(trainer))
            if callable(self.on_alarm):
                self.on_alarm(trainer, pl_module, state)
                return
            rank_zero_warn(message, category=UserWarning)
            trainer.should_stop = trainer.should_stop or self.on_alarm == "stop"
        elif trainer.state.fn == "fit" and self._reported and not alarm:
            rank_zero_info(f"{self._title}: the alarm has ended, the posterior is {state.name}.")

    def _say_how(self, measured: LatentReport) -> None:
        """Say once what a number is, where that can't be told from its name."""
        if self._passes > 1:
            return
        if measured.is_estimate:
            rank_zero_info(
                f"{self._title}: the rate has no closed form for this posterior and prior, so `latent/rate` is the "
                "estimate log q(z|x) - log p(z) at one sample of each observation."
            )
        if measured.chosen is not None:
            rank_zero_info(
                f"{self._title}: `latent/mutual_information` and `latent/marginal_kl` are those of {measured.chosen} "
                "latent positions, a fixed random choice, and so lower bounds."
            )
        if len(measured.variance) > _MOST_DRAWN:
            rank_zero_info(
                f"{self._title}: {len(measured.variance)} dimensions are too many to draw one by one. Pool the axes of "
                "positions, `pool=(2, 3)` for (N, C, H, W)."
            )

    def _log(self, trainer: Trainer, pl_module: LightningModule, measured: LatentReport, alarm: bool) -> None:
        units = measured.active_units
        optional = {
            "latent/rate": measured.rate,
            "latent/mutual_information": measured.mutual_information,
            "latent/marginal_kl": measured.marginal_kl,
            "latent/perplexity": None if measured.perplexity is None else float(measured.perplexity.mean()),
            "latent/dead_classes": None if measured.dead_classes is None else float(measured.dead_classes.sum()),
        }
        values: dict[str, Tensor | float] = {
            "latent/active_fraction": units / measured.variance.numel(),
            "collapse/alarm": float(alarm),
            **{key: value for key, value in optional.items() if value is not None},
        }
        sync = several_processes(trainer)
        self.log_now(pl_module, {self._key("latent/active_units"): float(units)}, prog_bar=True, sync=sync)
        self.log_now(pl_module, {self._key(key): value for key, value in values.items()}, sync=sync)
        with self._attempt("the shift and scale"):
            logger, step = MediaLogger(trainer), self._point(trainer)
            for name in ("shift", "scale") if logger else ():
                numbers = getattr(measured, name)
                for dimension, value in enumerate(() if numbers is None else numbers[:_MOST_LOGGED].tolist()):
                    logger.scalar(self._key(f"latent_{name}/{dimension}"), value, step)

    def _draw(self, trainer: Trainer) -> None:
        for tag, history in (("variance", self._variances), ("rate", self._rates)):
            with self._attempt(f"the {tag} per dimension"):
                if (picture := history.picture()) is not None:
                    MediaLogger(trainer).image(self._key(f"latent/{tag}_per_dimension"), picture, self._point(trainer))

    def _point(self, trainer: Trainer) -> int:
        """Return the step to draw at: for a training epoch its last one, so that a resumed run doesn't purge it."""
        return self.step(trainer) - self._watches_training

    def _key(self, key: str) -> str:
        """Return the key to log under: ``latent/...``, or ``latent_<name>/...``."""
        group, _, rest = key.partition("/")
        return f"{group}_{self.name}/{rest}" if self.name else key


def _unusable(measured: LatentReport | None) -> str:
    """Return the reason why a pass can't be judged; empty if it can."""
    if measured is None:
        return (
            "this pass had no observations, or the module offered no posterior. Check that the loader gives batches in "
            "each epoch. If it does, set `self.posterior` in each step, or give its path with `posterior=`."
        )
    if measured.count < 2:
        return "a variance over the data needs two observations, and this pass had one."
    if measured.rate is not None and math.isnan(measured.rate):
        return (
            "the rate is not a number, so the posterior can't be judged: a scale or a variance was negative or zero. "
            'If that number is the log-variance, set `second="log_variance"`.'
        )
    return ""


def _measures_taken(trainer: Trainer, pl_module: LightningModule) -> tuple[bool, bool]:
    """Return whether a callback moves the weight of the KL, and whether the rate has a floor."""
    callbacks = callbacks_of(trainer)
    floor = getattr(pl_module, "free_bits", None)
    has_floor = isinstance(floor, int | float | Tensor) and bool(torch.as_tensor(floor).gt(0).any())
    return (
        any(isinstance(each, KLAnnealing | TargetRate) for each in callbacks),
        has_floor or any(isinstance(each, FreeBits | EnforcedFreeBits) for each in callbacks),
    )


def _message(title: str, state: CollapseState) -> str:
    return "\n".join(
        [
            f"{title}: the posterior is {state.name}.",
            textwrap.fill(state.reason, 110, initial_indent="  Measured: ", subsequent_indent="    "),
            textwrap.fill(state.remedy, 110, initial_indent="  Try next: ", subsequent_indent="    "),
        ]
    )
