"""Watching for posterior collapse while a model trains."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.distributions import Distribution, Normal, kl_divergence
from typing_extensions import override

from .base import Callback
from .control.attribute_writer import MisconfigurationException
from .drawing.colours import heat_map
from .drawing.media_logger import MediaLogger
from .metrics.active_units import ActiveUnits
from .metrics.collapse_state import Diagnosis, diagnose
from .metrics.mutual_information import MutualInformation, mutual_information
from .reading.distribution_reader import DistributionReader, read_prior, same_shape

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

_MOST_ROWS = 256  # passes in a picture, and in a checkpoint
_MOST_PICTURES = 8  # drawn until the run is twice as long
_MOST_KEPT = 2**20  # means and variances between passes: 16 MiB, and the memory is the model's where it is more


class CollapseDetector(Callback):
    """Tell when a VAE's posterior collapses, and what to do about it.

    After each validation pass it knows, over all of the validation data and all processes, each latent dimension's rate
    and the variance of its posterior mean, and the mutual information of data and latents. From these it tells a
    collapsed posterior from one that only has dimensions to spare (see :func:`~.collapse.diagnose`). It reads the
    posteriors that the module computes anyway and runs no forward pass of its own. Where the run has no validation, a
    pass is a training epoch; its posteriors are then those of each step, as the model was at that step.

    Logged are ``latent/active_units``, ``latent/active_fraction``, ``latent/mutual_information``,
    ``latent/marginal_kl`` (rate minus mutual information) and ``collapse/alarm`` (1 while an alarm is on). TensorBoard
    also gets the pictures ``latent/rate_per_dimension`` and ``latent/variance_per_dimension``, with a column for each
    pass (for each second, fourth and so on of a long run), and the alarm's text as ``collapse/message``. The mutual
    information can't exceed the logarithm of the number of observations it comes from (7.6 nats for 2048): above 90 %
    of that read it as "at least". For a posterior that is not a diagonal Gaussian there are only the active units;
    with a prior that is not one there is no rate.

    Latents with several axes, ``(N, k, H, W)``, have a dimension at each position. A step may have several posteriors,
    one for each view, say: each counts as that of an observation of its own.

    In ``trainer.validate`` it measures and logs too, and reports an alarm at once.

    Args:
        posterior: Where the posterior is: ``None`` for the module's own attribute ``posterior``, the path of a
            submodule that outputs it (``"encoder"``) or of a part of its output (``"vae:latent_dist.mean"``), a pair of
            paths for its two parameters, or a callable ``(pl_module, batch) -> q(z|x)``. See
            :class:`~.reading.distribution_reader.DistributionReader`.
        second: What stands beside the mean where the posterior is a pair of tensors: ``"log_variance"``,
            ``"variance"``, ``"scale"`` or ``"log_scale"``.
        chunk: Where the posterior is one tensor: the axis along which it is split into halves, the mean and the second
            parameter. 1 for ``(N, 2k)`` and ``(N, 2k, H, W)``, -1 for ``(N, T, 2k)`` and ``(N, k, 2)``.
        min_rate: Rate in nats below which the active dimensions together count as collapsed.
        threshold: Variance of the posterior mean that an active dimension exceeds.
        observations: Number of observations that the mutual information is estimated from: the first by ``"index"``
            where the batch is a dict with that key, otherwise by position.
        patience: Number of passes in a row that must look alarming before there is an alarm.
        warmup: Number of passes at the start of training that never count. With an annealed KL weight, make it as many
            as the schedule takes to reach its end.
        on_alarm: What to do on an alarm, once for each state: ``"warn"``, ``"stop"`` (warn and stop training), or a
            callable ``(trainer, pl_module, diagnosis)`` that takes over. It runs on every process.
        name: Tells several detectors apart, of two encoders, say: its keys are ``latent_<name>/active_units``,
            ``collapse_<name>/alarm`` and so on.

    Raises:
        ValueError: If an option is out of its range, the posterior is not found where it should be, it has no mean, or
            its shape changes from batch to batch.
        lightning.pytorch.utilities.exceptions.MisconfigurationException: When a run starts, if two detectors have the
            same ``name``.

    Example::

        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[CollapseDetector(posterior=("encoder.mean", "encoder.log_variance"))])
    """

    def __init__(
        self,
        posterior: str | tuple[str, str] | Callable[[LightningModule, Any], Any] | None = None,
        second: Literal["log_variance", "variance", "scale", "log_scale"] = "log_variance",
        chunk: int | None = None,
        min_rate: float = 0.5,
        threshold: float = 0.01,
        observations: int = 2048,
        patience: int = 3,
        warmup: int = 10,
        on_alarm: Literal["warn", "stop"] | Callable[[Trainer, LightningModule, Diagnosis], Any] = "warn",
        name: str | None = None,
    ) -> None:
        for option, value, least in (
            ("min_rate", min_rate, 0),
            ("threshold", threshold, 0),
            ("observations", observations, 2),
            ("patience", patience, 1),
            ("warmup", warmup, 0),
        ):
            if not least <= value < math.inf:
                raise ValueError(f"`{option}` must be a finite number of at least {least}, got {value}.")
        if not (on_alarm in ("warn", "stop") or callable(on_alarm)):
            raise ValueError(
                f"`on_alarm` must be 'warn', 'stop' or a callable `(trainer, pl_module, diagnosis)`, got {on_alarm!r}."
            )
        self.posterior = posterior
        self.min_rate = min_rate
        self.threshold = threshold
        self.observations = observations
        self.patience = patience
        self.warmup = warmup
        self.on_alarm = on_alarm
        self.name = name
        self._title = f"CollapseDetector({name})" if name else "CollapseDetector"
        self._reader = DistributionReader(posterior, second, chunk)
        self._pass: _Pass | None = None
        self._watches_training = False
        self._passes = 0
        self._alarming_passes = 0
        self._reported = ""
        self._rates: list[Tensor] = []
        self._variances: list[Tensor] = []
        self._begun: dict[str, Any] = {}
        self._goes_on = False

    @cached_property  # Lightning asks for it at every hook of every step
    @override
    def state_key(self) -> str:
        """Key of the saved state: detectors of different posteriors stand side by side."""
        posterior = getattr(self.posterior, "__qualname__", self.posterior)
        return self._generate_state_key(posterior=posterior, name=self.name)

    @override
    def on_fit_start(self, trainer: Trainer, *_: Any) -> None:
        """See that no other detector is in the way, and that nothing of this run outlives it."""
        self._start(trainer)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Watch the training epochs where there is no validation; the first may have begun in the run that goes on."""
        self._watches_training = not _validates(trainer)
        # Of several processes a checkpoint holds one's share: the rest of the epoch is measured then.
        self._goes_on = self._watches_training and trainer.world_size == 1
        if self._watches_training:
            self._pass = _Pass(self.observations)
            self._pass.load(self._begun, _exact_device(pl_module.device))
            self._begun = {}
            rank_zero_info(f"{self._title}: this run has no validation, so each training epoch is measured instead.")

    @override
    def on_train_epoch_start(self, *_: Any) -> None:
        """Begin a pass where there is no validation."""
        if self._watches_training:
            self._begin()

    @override
    def on_train_batch_start(self, _trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Begin a step where there is no validation."""
        if self._watches_training:
            self._reader.listen(pl_module)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, _outputs: Any, batch: Any, *_: Any
    ) -> None:
        """Take the batch's posterior where there is no validation."""
        if self._watches_training:
            self._take(trainer, pl_module, batch)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Judge the pass where there is no validation."""
        if self._watches_training:
            self._finish(trainer, pl_module)

    @override
    def on_validation_start(self, trainer: Trainer, *_: Any) -> None:
        """See to the same where validating is all of the run."""
        if trainer.state.fn != "fit":
            self._start(trainer)

    @override
    def on_validation_epoch_start(self, *_: Any) -> None:
        """Begin a pass."""
        self._begin()

    @override
    def on_validation_batch_start(self, _trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Begin a step."""
        self._reader.listen(pl_module)

    @override
    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, _outputs: Any, batch: Any, *_: Any
    ) -> None:
        """Take the batch's posterior; in the sanity check too, so that a wrong ``posterior`` shows at once."""
        self._take(trainer, pl_module, batch)

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Judge the pass, unless it was the sanity check."""
        if not trainer.sanity_checking:
            self._finish(trainer, pl_module)

    @override
    def on_train_end(self, trainer: Trainer, *_: Any) -> None:
        """Draw the whole run, if the last pass was not drawn."""
        if self._passes and (self._passes - 1) % _stride(self._passes, _MOST_PICTURES):
            self._draw(trainer)

    @override
    def on_save_checkpoint(self, *_: Any) -> None:
        """Leave no hook in what is saved."""
        self._reader.unhook()

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return the history: numbers, and one row of each picture's values per pass."""
        return {
            "passes": self._passes,
            "alarming_passes": self._alarming_passes,
            "reported": self._reported,
            "rates": torch.stack(self._rates) if self._rates else torch.empty(0),
            "variances": torch.stack(self._variances) if self._variances else torch.empty(0),
            "begun": self._pass.state() if self._goes_on and self._pass is not None else {},
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the history."""
        self._passes = state_dict["passes"]
        self._alarming_passes = state_dict["alarming_passes"]
        self._reported = state_dict["reported"]
        self._rates = list(state_dict["rates"])
        self._variances = list(state_dict["variances"])
        self._begun = state_dict.get("begun", {})

    def _start(self, trainer: Trainer) -> None:
        detectors = [each for each in trainer.callbacks if isinstance(each, CollapseDetector)]  # type: ignore[attr-defined]
        if [each.name for each in detectors].count(self.name) > 1:
            raise MisconfigurationException(
                f"Two CollapseDetectors log `{self._key('latent/active_units')}`. Tell them apart with `name=`."
            )
        self.at_end(trainer, self._discard)

    def _begin(self) -> None:
        if self._pass is None:
            self._pass = _Pass(self.observations)
        elif self._pass.has_begun:  # the sanity check, or an epoch cut short
            self._pass.restart()

    @torch.no_grad()
    def _take(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        assert self._pass is not None
        if self.posterior is None and getattr(pl_module, "posterior", self) is None:
            return  # this process's share of the batch was empty
        posteriors = self._reader.read(pl_module, batch)
        self._pass.append(posteriors, read_prior(pl_module), batch, trainer.global_rank, trainer.world_size)

    def _discard(self) -> None:
        """Leave no hook behind."""
        self._reader.detach()
        self._pass = None

    def _key(self, key: str) -> str:
        """Return the key to log under: ``latent/...``, or ``latent_<name>/...``."""
        group, _, rest = key.partition("/")
        return f"{group}_{self.name}/{rest}" if self.name else key

    def _finish(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self._pass is not None
        measured = self._pass.measure(trainer, pl_module)
        self._pass.restart()
        if measured is None:
            rank_zero_warn(
                f"{self._title}: the module offered no posterior in this pass. Set `self.posterior` in each step, or "
                "say where it is with `posterior=`."
            )
            return
        if measured.observations < 2:
            rank_zero_warn(f"{self._title}: a variance over the data needs two observations, and this pass had one.")
            return
        if not measured.variance.isfinite().all():
            rank_zero_warn(f"{self._title}: the posterior's means are not finite, so nothing can be said of them.")
            return
        diagnosis = diagnose(
            measured.rate,
            measured.variance,
            measured.mutual_information,
            measured.observations,
            self.min_rate,
            self.threshold,
        )
        fitting = trainer.state.fn == "fit"
        alarm = self._count(diagnosis) if fitting else diagnosis.alarm
        self._log(trainer, pl_module, measured, alarm)
        if fitting:
            self._keep(measured)
            if (self._passes - 1) % _stride(self._passes, _MOST_PICTURES) == 0:
                self._draw(trainer)
        if trainer.strategy.reduce_boolean_decision(alarm and diagnosis.state != self._reported, all=False):
            self._raise_alarm(trainer, pl_module, diagnosis)
        if fitting and self._reported and not alarm:
            rank_zero_info(f"{self._title}: the alarm has ended, the posterior is {diagnosis.state}.")
        if fitting:
            self._reported = diagnosis.state if alarm else ""

    def _count(self, diagnosis: Diagnosis) -> bool:
        """Count one pass of training; return whether there is an alarm."""
        self._passes += 1
        counts = diagnosis.alarm and self._passes > self.warmup
        self._alarming_passes = self._alarming_passes + 1 if counts else 0
        return self._alarming_passes >= self.patience

    def _log(self, trainer: Trainer, pl_module: LightningModule, measured: _Measured, alarm: bool) -> None:
        units = int((measured.variance > self.threshold).sum())
        values: dict[str, Tensor | float] = {
            "latent/active_fraction": units / measured.variance.numel(),
            "collapse/alarm": float(alarm),
        }
        if measured.mutual_information is not None:
            values["latent/mutual_information"] = measured.mutual_information
            if measured.rate is not None:
                values["latent/marginal_kl"] = float(measured.rate.sum()) - measured.mutual_information
        sync = trainer.world_size > 1
        self.log_now(pl_module, {self._key("latent/active_units"): float(units)}, prog_bar=True, sync=sync)
        self.log_now(pl_module, {self._key(key): value for key, value in values.items()}, sync=sync)

    def _keep(self, measured: _Measured) -> None:
        """Add a row to the pictures, unless a long run has come to keep each second, fourth, ... pass alone."""
        if (self._passes - 1) % _stride(self._passes, _MOST_ROWS):
            return
        for rows, values in ((self._variances, measured.variance), (self._rates, measured.rate)):
            if len(rows) == _MOST_ROWS:
                del rows[1::2]
            if values is not None:
                rows.append(values.float().cpu())

    def _draw(self, trainer: Trainer) -> None:
        for tag, rows in (("variance", self._variances), ("rate", self._rates)):
            if rows:
                picture = heat_map(torch.stack(rows))
                MediaLogger(trainer).image(self._key(f"latent/{tag}_per_dimension"), picture, self.step(trainer))

    def _raise_alarm(self, trainer: Trainer, pl_module: LightningModule, diagnosis: Diagnosis) -> None:
        message = _message(self._title, diagnosis)
        MediaLogger(trainer).text(self._key("collapse/message"), message, self.step(trainer))
        if callable(self.on_alarm):
            self.on_alarm(trainer, pl_module, diagnosis)
            return
        rank_zero_warn(message, category=UserWarning)
        trainer.should_stop = trainer.should_stop or self.on_alarm == "stop"


def _stride(passes: int, most: int) -> int:
    """Return the power of two at which no more than ``most`` of the passes are taken."""
    return 1 << ((passes - 1) // most).bit_length()


@dataclass(frozen=True)
class _Measured:
    """What one pass over the data showed; ``None`` stands for what has no closed form."""

    variance: Tensor
    rate: Tensor | None
    mutual_information: float | None
    observations: int


class _Pass:
    """The posteriors of one pass over the data: kept by batch, and folded into moments every ``observations`` rows."""

    def __init__(self, observations: int) -> None:
        self._observations = observations
        self._batches: list[tuple[Tensor, ...]] = []
        self._rows = 0
        self._shape: torch.Size | None = None
        self._dim = 0
        self._units: ActiveUnits
        self._information: MutualInformation
        self._rate_sum: Tensor

    @property
    def has_begun(self) -> bool:
        """Whether it has seen a batch."""
        return bool(self._batches or self._rows)

    def restart(self) -> None:
        """Begin another pass."""
        self._batches, self._rows, self._shape = [], 0, None
        if 2 * self._dim * self._observations > _MOST_KEPT:
            self._dim = 0
            del self._units, self._information, self._rate_sum
        elif self._dim:
            self._units.reset()
            self._information.reset()
            self._rate_sum.zero_()

    def append(
        self, posteriors: list[Distribution], prior: Distribution, batch: Any, rank: int, world_size: int
    ) -> None:
        """Keep what is needed of one batch; NaN stands for what has no closed form."""
        for view, posterior in enumerate(posteriors):
            mean = _by_row(self._mean(posterior))
            variance = rate = torch.full_like(mean, math.nan)
            if isinstance(posterior, Normal):
                variance = _by_row(posterior.variance)
                rate = _rate(posterior, prior) if isinstance(prior, Normal) else rate
            index = _index(batch, len(mean))
            if index is None:  # as DistributedSampler deals
                index = rank + world_size * torch.arange(self._rows, self._rows + len(mean), device=mean.device)
            else:  # two views of an observation are two observations
                index = index * len(posteriors) + view
            self._batches.append((index.to(mean.device), mean, variance, rate))
            blocks = self._rows // self._observations
            self._rows += len(mean)
            if self._rows // self._observations > blocks:
                self._fold()

    def measure(self, trainer: Trainer, pl_module: LightningModule) -> _Measured | None:
        """Merge the moments of all processes; ``None`` if there was no observation at all."""
        self._fold()
        # A process without a batch doesn't know the number of dimensions, and must take part in the merging.
        dim = int(trainer.strategy.reduce(torch.tensor(self._dim, device=pl_module.device), reduce_op="max"))
        if dim == 0:
            return None
        self._open(dim, _exact_device(pl_module.device))
        self._units.sync()
        self._information.sync()
        rate = trainer.strategy.reduce(self._rate_sum, reduce_op="sum") / self._units.count
        if not self._units.count:
            return None
        mean, variance = self._information.posteriors
        information = float(mutual_information(mean, variance))
        return _Measured(
            variance=self._units.variance,
            rate=None if rate.isnan().all() else rate,
            mutual_information=None if math.isnan(information) else information,
            observations=len(mean),
        )

    def state(self) -> dict[str, Any]:
        """Return what a resumed run needs to go on amid the pass."""
        has_folded = self._rows >= self._observations
        moments = (self._units.moments, self._information.rows, self._rate_sum) if has_folded else ()
        return {"batches": list(self._batches), "rows": self._rows, "shape": self._shape, "moments": moments}

    def load(self, state: dict[str, Any], device: torch.device) -> None:
        """Go on from a saved state, if there is one."""
        if not state:
            return
        self._batches = [tuple(column.to(device) for column in batch) for batch in state["batches"]]
        self._rows, self._shape = state["rows"], state["shape"]
        if state["moments"]:
            units, rows, rate_sum = (moment.to(device) for moment in state["moments"])
            self._open(len(rate_sum), device)
            self._units.moments, self._information.rows, self._rate_sum = units, rows, rate_sum

    def _mean(self, posterior: Distribution) -> Tensor:
        try:
            mean = posterior.mean
        except NotImplementedError:
            raise ValueError(
                f"CollapseDetector: the posterior, a {type(posterior).__name__}, has no `mean`, whose variance the "
                "active units are. Pass a callable `posterior=lambda pl_module, batch: ...` that returns a Normal, or "
                "another distribution with a mean."
            ) from None
        self._shape = self._shape or mean.shape[1:]
        if mean.shape[1:] != self._shape:
            raise ValueError(
                f"CollapseDetector: the latents of an observation have the shape {tuple(self._shape)} in one step and "
                f"{tuple(mean.shape[1:])} in another, so that their positions are no dimensions to measure. Average "
                "over the axis that changes, in a callable `posterior=lambda pl_module, batch: ...`; give posteriors "
                "of different sizes a detector each, told apart with `name=`."
            )
        return mean

    def _fold(self) -> None:
        if not self._batches:
            return
        index, mean, variance, rate = (torch.cat(column) for column in zip(*self._batches, strict=True))
        self._batches = []
        self._open(mean.shape[1], mean.device)
        self._units.update(mean)
        self._information.update(mean, variance, index)
        self._rate_sum += rate.sum(dim=0)

    def _open(self, dim: int, device: torch.device) -> None:
        """Make the moments as soon as the number of dimensions is known, if the pass before has left none of it."""
        if self._dim != dim:
            self._dim = dim
            # Without validation this comes amid an epoch, where no step is to wait for a copy to the device.
            self._units = ActiveUnits(dim).to(device, non_blocking=True)
            self._information = MutualInformation(dim, self._observations).to(device, non_blocking=True)
            self._rate_sum = torch.zeros(dim, dtype=torch.float64, device=device)


def _exact_device(device: torch.device) -> torch.device:
    """Where float64 exists: on the device itself, but for Apple's."""
    return torch.device("cpu") if device.type == "mps" else device


def _exact(values: Tensor) -> Tensor:
    return values.detach().to(_exact_device(values.device)).double()


def _by_row(values: Tensor) -> Tensor:
    """Give every observation one row of float64 values, whatever the shape of the latents."""
    return _exact(values).reshape(len(values), math.prod(values.shape[1:]))


def _rate(posterior: Normal, prior: Normal) -> Tensor:
    """Compute the KL divergence of posterior and prior of each observation and dimension, in float64."""
    posterior = Normal(_exact(posterior.loc), _exact(posterior.scale), validate_args=False)
    # Where the module has no prior, N(0, I) is made on the CPU: its copy is not waited for either.
    loc, scale = (_exact(each).to(posterior.loc.device, non_blocking=True) for each in (prior.loc, prior.scale))
    prior = Normal(loc, scale, validate_args=False)  # looking at them would wait for the device
    return _by_row(same_shape(kl_divergence(posterior, prior), posterior, prior))


def _index(batch: Any, rows: int) -> Tensor | None:
    """Return what identifies the observations of a batch, if the batch says so."""
    index = batch.get("index") if isinstance(batch, Mapping) else None
    fits = isinstance(index, Tensor) and index.shape == (rows,) and not index.is_floating_point()
    return index if fits else None


def _validates(trainer: Trainer) -> bool:
    """Whether the run has validation passes. Their loaders may not be known yet; if they are, are they empty?"""
    every, epochs = trainer.check_val_every_n_epoch, trainer.max_epochs
    if every is not None and epochs is not None and 0 <= epochs < every:
        return False
    return trainer.enable_validation and (trainer.val_dataloaders is None or sum(trainer.num_val_batches) > 0)


def _message(title: str, diagnosis: Diagnosis) -> str:
    return "\n".join(
        [
            f"{title}: the posterior is {diagnosis.state}.",
            textwrap.fill(diagnosis.reason, 110, initial_indent="  Measured: ", subsequent_indent="    "),
            textwrap.fill(diagnosis.remedy, 110, initial_indent="  Try next: ", subsequent_indent="    "),
        ]
    )
