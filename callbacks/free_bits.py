"""Set a floor under the rate."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from typing_extensions import override

from .control.attribute_path import PathError, paths_to
from .control.attribute_scheduler import AttributeScheduler
from .control.attribute_writer import MisconfigurationException
from .control.tied_attributes import NumberPlace
from .reading.distributions import Second
from .reading.kl_rates import rates_under_floors
from .reading.latent_reader import LatentReader, Places, is_joint, measured_rates, real_parts
from .schedules import Constant, Schedule, at_least, check_number, integer_from

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

_LINE = "loss = reconstruction + beta * free_bits(kl_per_dimension, self.free_bits)"
# A floor may be called `free_nats` or `min_kl`, but not `min_kl_weight`. A `lambda` is more often a weight.
_FLOOR = re.compile(r"(?!.*(weight|coef|scale|beta|warm|anneal)).*(free_?(bits|nats)|floor|min_?(kl|rate)|kl_?min)")
_NEAR = 1.05  # a rate within 5 % of its floor counts as at the floor: nothing pulls it up, but noise moves it


class FreeBits(AttributeScheduler):
    """Set a floor under the rate, in nats, so that giving up a latent dimension saves nothing.

    The module's loss has to read the floor. ``lightning_vae.VAE`` does; your own loss needs one line,

        loss = reconstruction + beta * free_bits(kl_per_dimension, self.free_bits)

    with ``lightning_vae.free_bits``. Logged on logging steps: ``knobs/free_bits``, and ``latent/at_floor``, the number
    of floored dimensions (or groups) at the floor, if the posterior and the prior can be read. In the second half of
    the run the callback warns once if the floors together exceed the measured rate or hold more than 90 % of the
    dimensions: the floor, and not the data, then determines the model. A single floor under the whole rate is meant to
    do that, and gives no warning.

    With ``accumulate_grad_batches`` each accumulated batch has a floor under its own mean. The mean of the floored
    rates is at least the floored rate of the mean.

    Choose a threshold of 0.1 to 2 nats per dimension and start with 0.5. If it is too high, all dimensions sit at the
    floor, the rate is about threshold times dimensions, the mutual information is well below that and the ELBO is
    worse. If it is too low, dimensions stay inactive as they would without it. The floor guarantees a rate, not
    information: watch ``latent/mutual_information`` beside it.

    Args:
        threshold: The floor in nats: a number, or a schedule of the training step.
        attribute: Where the module keeps the threshold: a dotted path, or several.
        per: Scope of each floor: ``"dimension"``, ``"whole"`` (the total rate), or a number of consecutive dimensions;
            ``None`` keeps the module's own choice, ``free_bits_per``.
        average: ``"batch"`` floors the batch's mean rate (Kingma et al.), ``"sample"`` each observation's; ``None``
            keeps the module's own choice, ``free_bits_average``.
        posterior: Where to read the posterior for ``latent/at_floor``, as in :class:`CollapseDetector`; ``None`` is the
            module's own ``posterior``, if it has one.
        prior: Where the prior is, as in :class:`CollapseDetector`; ``None`` is the module's own ``prior``.
        z: Where the module's own sample is, at which a rate without a closed form is estimated.
        second: Meaning of the second parameter if the posterior is a pair of tensors.
        chunk: Axis along which the posterior is split into halves, if it is one tensor.
        setter: Writes the threshold instead, ``(pl_module, value) -> None``.
        name: Logged as ``knobs/<name>``; the path's last part if not given.
        mask: Where the batch has a mask of the latents' positions, True where one is real: a key, an index or a
            callable. In ``latent/at_floor`` padding then counts for nothing: a position's rate is the mean over the
            observations that have it.

    Raises:
        ValueError: If the threshold is negative, or, when fitting starts, if a path leads nowhere.
        lightning.pytorch.utilities.exceptions.MisconfigurationException: When fitting starts, as for
            :class:`KLAnnealing`; or if ``per`` or ``average`` is given for a module that has no such choice.

    References:
        Kingma et al., "Improved Variational Inference with Inverse Autoregressive Flow", NeurIPS 2016, appendix C.8.
    """

    _reader: LatentReader

    def __init__(
        self,
        threshold: float | Schedule | Callable[[int], float],
        attribute: str | Sequence[str] = "free_bits",
        per: Literal["dimension", "whole"] | int | None = None,
        average: Literal["batch", "sample"] | None = None,
        posterior: Places = None,
        prior: Places = None,
        z: Places = None,
        second: Second = "log_variance",
        chunk: int | None = None,
        setter: Callable[[Any, float], None] | None = None,
        name: str | None = None,
        mask: int | str | Callable[[Any], Any] | None = None,
    ) -> None:
        super().__init__(checked_floor(threshold, per, average, None), attribute, setter, name)
        self.per = per
        self.average = average
        self._reader = LatentReader(posterior, prior, z, second, chunk, f"{type(self).__name__}({self.name})", mask)
        self._warned = False
        self._latest: _AtFloor | None = None

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._choose_variant(pl_module)
        super().on_fit_start(trainer, pl_module)
        self._warned, self._latest = False, None
        if trainer.accumulate_grad_batches > 1 and getattr(pl_module, "free_bits_average", "batch") == "batch":
            rank_zero_info(
                f"FreeBits: gradients are accumulated over {trainer.accumulate_grad_batches} batches, and the floor "
                "applies to the mean of each batch, which is slightly stricter than a floor under the mean of all."
            )

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if self.logs_now(trainer) and self._reader.can_read(pl_module):  # only then are the rates read
            super().on_before_optimizer_step(trainer, pl_module)

    @override
    def _log(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        super()._log(trainer, pl_module, batch)
        measured = self._rates(pl_module, batch)
        if measured is not None:
            threshold = float(self._current)
            per = getattr(pl_module, "free_bits_per", self.per or "dimension")
            average = getattr(pl_module, "free_bits_average", self.average or "batch")
            self._latest = count_at_floor(measured[0], threshold, per, average, measured[1])
            self.log_now(pl_module, {"latent/at_floor": self._latest.at_floor})

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        latest, total = self._latest, self._schedule.total_steps
        if latest is None or self._warned or getattr(trainer, "fast_dev_run", False):
            return
        if latest.sets_the_model and (total is None or self.step(trainer) >= total / 2):
            self._warned = True
            rank_zero_warn(
                f"FreeBits: {latest.at_floor:.0f} of {latest.groups:.0f} floors hold their dimension; together they "
                f"are {latest.floors:.2f} nats, the measured rate is {latest.rate:.2f}. The threshold determines the "
                "model, and its rate need not be information: lower `threshold`, or use fewer latent dimensions. Or "
                "the run is too short for the rates to rise above the floor, or the loss does not read it."
            )

    @override
    def _find(self, pl_module: LightningModule) -> NumberPlace:
        try:
            return super()._find(pl_module)
        except ValueError as error:
            reason = error.reason if isinstance(error, PathError) else str(error)
            floors = " or ".join(map(repr, paths_to(pl_module, lambda name, _: _FLOOR.match(name))))
            hint = f" Did you mean {floors}?" if floors else ""
            raise ValueError(
                f"FreeBits: {reason}{hint} The module's own loss has to read the floor: `{_LINE}`. For a module that "
                "can't be changed, use `EnforcedFreeBits`, which needs the paths of its posterior and of its KL weight."
            ) from error

    def _rates(self, pl_module: LightningModule, batch: Any) -> tuple[Tensor, Tensor | None] | None:
        """Compute the rate of each observation and dimension, over all posteriors, and which of them are not padding.

        ``None`` if there is no posterior.
        """
        if not self._reader.can_read(pl_module):
            return None
        views = self._reader.read(pl_module, batch)
        if not views or any(each.prior is None for latents in views for each in latents.values()):
            return None  # a step without a posterior, or one whose prior is not known
        shapes = {", ".join(str(tuple(each.posterior.batch_shape[1:])) for each in view.values()) for view in views}
        if len(shapes) > 1:
            raise ValueError(
                f"FreeBits: the posteriors of a step have latents of different shapes, {' and '.join(sorted(shapes))}. "
                "Select those that the floor applies to, in a callable `posterior=lambda pl_module, batch: ...`."
            )
        per = getattr(pl_module, "free_bits_per", self.per or "dimension")
        if per != "whole" and any(is_joint(each) for view in views for each in view.values()):
            return None  # a joint posterior or prior has no rate per dimension
        rates = torch.cat([torch.cat([measured_rates(each) for each in view.values()], dim=1) for view in views])
        masks = [[real for each in view.values() if (real := real_parts(each)) is not None] for view in views]
        return rates, torch.cat([torch.cat(each, dim=1) for each in masks]) if any(masks) else None

    def _choose_variant(self, pl_module: LightningModule) -> None:
        for option, value in (("per", self.per), ("average", self.average)):
            if value is None:
                continue
            if not hasattr(pl_module, f"free_bits_{option}"):
                raise MisconfigurationException(
                    f"FreeBits: `{option}={value!r}` can't be set on {type(pl_module).__name__}, whose own loss "
                    f"decides. Leave it out and choose in the loss: `{_LINE[:-1]}, {option}={value!r})`."
                )
            setattr(pl_module, f"free_bits_{option}", value)
        kind = type(pl_module).__name__
        if self.per != "whole" and getattr(pl_module, "has_joint_rate", False) and pl_module.free_bits_per != "whole":
            raise MisconfigurationException(
                f"FreeBits: the rate of {kind} has no parts for the dimensions, because its prior or posterior is "
                "joint. Set `per='whole'`."
            )


def checked_floor(
    threshold: float | Schedule | Callable[[int], float], per: Any, average: Any, *others: None
) -> Schedule | Callable[[int], float]:
    """Return a floor as a schedule, after checking it and its variant.

    Args:
        threshold: As in :class:`FreeBits`.
        per: As in :class:`FreeBits`.
        average: As in :class:`FreeBits`.
        others: Values that ``per`` and ``average`` may have besides the variants.

    Raises:
        ValueError: If an option is out of range.
    """
    if per not in ("dimension", "whole", *others):
        check_number("per", per, "'dimension', 'whole' or a number of dimensions", integer_from(1))
    if average not in ("batch", "sample", *others):
        raise ValueError(f"`average` must be 'batch' or 'sample', got {average!r}.")
    if callable(threshold):
        return threshold
    check_number("threshold", threshold, "at least 0 nats and finite, or a schedule", at_least(0), "Start with 0.5.")
    return Constant(threshold)


class _AtFloor(NamedTuple):
    """Counts and sums of one batch's rates and their floors."""

    at_floor: float
    groups: float  # that hold a real position
    floors: float
    rate: float

    @property
    def sets_the_model(self) -> bool:
        """Return whether the floors determine the model; a single floor under the whole rate is meant to."""
        return self.floors > 0 and self.groups > 1 and (self.floors > self.rate or self.at_floor > 0.9 * self.groups)


def count_at_floor(
    rates: Tensor,
    threshold: float,
    per: Literal["dimension", "whole"] | int,
    average: str,
    mask: Tensor | None = None,
) -> _AtFloor:
    """Count the dimensions, or groups of them, whose rate is at its floor.

    Args:
        rates: Rate of each observation and dimension in nats, shape ``(B, k)``; 0 where a position is padding.
        threshold: The floor in nats.
        per: Scope of each floor, as in :class:`FreeBits`.
        average: ``"batch"`` counts groups by their mean rate; ``"sample"`` counts per observation, and averages.
        mask: True where a position is real, in the shape of the rates; ``None`` if all are.
    """
    real = torch.ones_like(rates) if mask is None else mask.to(rates)
    real = (rates_under_floors(real, per, "sample") > 0).to(rates)  # a group with a real position
    grouped = rates_under_floors(rates, per, "sample")
    if average == "batch":
        grouped, real = (grouped.sum(0) / real.sum(0).clamp(min=1))[None], real.amax(0, keepdim=True)
    near = torch.where(grouped.isnan(), grouped, (grouped <= threshold * _NEAR) * real)
    at_floor = near.sum(-1).mean() if threshold > 0 else grouped.new_zeros(())
    groups = float(real.sum(-1).mean())
    return _AtFloor(float(at_floor), groups, threshold * groups, float(rates.sum(-1).mean()))
