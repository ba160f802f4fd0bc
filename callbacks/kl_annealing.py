"""Anneal the weight of the KL term."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from typing_extensions import override

from .base import callbacks_of, knobs_of
from .control.attribute_scheduler import AttributeScheduler
from .control.conflicts import remedy
from .probing.effective_beta import Gaussian, WeightEffect, weight_effect
from .probing.loss_probe import LossProbe
from .probing.validation_weight import StaleWeight, stale_weight
from .reading.latent_reader import LatentReader
from .schedules import Schedule

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


class KLAnnealing(AttributeScheduler):
    """Anneal the weight of the KL term along a schedule, to prevent a collapse early in training.

    A schedule whose ``stop`` is left out ends at the value the module is configured with, so one config serves every
    ``beta``. Validation, checkpoints and the module after fitting have that value. Logged as ``knobs/beta``, or the
    path's last part.

    At the first batch the callback reports how the loss depends on the weight. If it recognises the terms of the loss,
    it gives the *effective beta*: the weight in an ELBO that would have the same effect. The report reveals a weight
    that the loss ignores or applies twice. To measure this, the callback evaluates the loss of this batch on copies of
    the module, with the same random state, at weight 0 and at others. If that is expensive or has side effects (a
    setter, several processes, compiled or large modules, hooks), it reports the reason instead;
    ``Trainer(fast_dev_run=True)`` copies large modules too. It can't detect steps with effects outside Lightning;
    switch the reports off for such steps with ``probe=False``. If the first batch is too early, as for a lazy module or
    one that begins with its discriminator, the second is measured. Of the losses that a training step under manual
    optimization passes to ``manual_backward``, the first that the weight changes is reported; the copies' optimizers
    move nothing. ``lightning_vae.VAE`` needs no report.

    At the first validation during the schedule the callback measures in the same way which weight the module's
    ``validation_step`` uses, and warns if it is a copy that the training step has left, and not the target.

    Args:
        schedule: Weight per step: ``Linear``, ``Sigmoid``, ``Cosine``, ``Cyclical``, ``Staged``, ``Constant``, ``Join``
            or any callable of the step.
        attribute: Where the module keeps the weight: a dotted path through submodules, objects, dict keys and list
            indices (``"beta"``, ``"model.kld_weight"``, ``"params.beta"``), or several that get the same value.
        setter: Writes the weight instead, ``(pl_module, value) -> None``; the schedule then needs a ``stop``.
        name: Logged as ``knobs/<name>``; the path's last part if not given.
        probe: Whether to evaluate the first batches for the reports.

    Raises:
        ValueError: If there is no path, or, when fitting starts, if it leads nowhere or a length can't be converted to
            steps.
        lightning.pytorch.utilities.exceptions.MisconfigurationException: When fitting starts, if the schedule does not
            end at the value that the module is configured with, if two callbacks move one number, or if a monitor
            watches ``train/loss``, which moves.

    References:
        Bowman et al., "Generating Sentences from a Continuous Space", CoNLL 2016; Fu et al., "Cyclical Annealing
        Schedule", NAACL 2019.

    Example::

        >>> from lightning_vae.callbacks import Linear
        >>> KLAnnealing(Linear(fraction=0.3)).state_key
        "KLAnnealing{'attribute': 'beta', 'name': 'beta'}"
    """

    def __init__(
        self,
        schedule: Schedule | Callable[[int], float],
        attribute: str | Sequence[str] = "beta",
        setter: Callable[[Any, float], None] | None = None,
        name: str | None = None,
        probe: bool = True,
    ) -> None:
        super().__init__(schedule, attribute, setter, name)
        self.probe = probe
        self._unmeasured: str | None = None  # why the first batch could not be measured
        self._has_measured = False  # whether a training batch was
        self._validation_is_due = False  # whether the weight in validation is still to be measured

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        self._has_measured, self._validation_is_due = False, self._can_probe(pl_module) and self.setter is None

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        is_second = self._unmeasured is not None
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if is_second:
            self._unmeasured = None
            self._report(trainer, pl_module, batch, batch_idx, "second")
            self._tell_unmeasured()

    @override
    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        super().on_validation_batch_start(trainer, pl_module, batch, batch_idx, dataloader_idx)
        if self._validation_is_due and batch_idx == 0 and self._target is not None:
            trained, target = float(self._current), float(self._target)
            if abs(trained - target) > 0:  # a step was taken, and at another weight
                self._validation_is_due = False
                self._report_validation(trainer, pl_module, batch, trained, target)

    @override
    def _probe(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        if self._can_probe(pl_module):
            self._report(trainer, pl_module, batch, 0, "first")

    def _can_probe(self, pl_module: LightningModule) -> bool:
        return self.probe and not set(self._paths) & set(knobs_of(pl_module))

    @override
    def _release(self) -> None:
        super()._release()
        self._validation_is_due = False
        self._tell_unmeasured()  # the run had a single batch

    def _tell_unmeasured(self) -> None:
        reason, self._unmeasured = self._unmeasured, None
        if reason is not None:
            rank_zero_info(f"{type(self).__name__}({self.name}): the effect on the loss can't be measured ({reason}).")

    def _report(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, ordinal: str) -> None:
        others = [each for each in callbacks_of(trainer) if isinstance(each, KLAnnealing) and each is not self]
        # The loss may multiply two weights, and the other one may be 0 at this step.
        held = {tuple(each._paths): float(each._target) for each in others if each._paths and each._target is not None}
        target = None if self._target is None else float(self._target)
        probe = LossProbe(trainer, pl_module, batch, batch_idx)
        try:
            if self.setter is not None:
                raise LossProbe.NotPossible("a setter may have side effects")
            effect = weight_effect(probe, tuple(self._paths), held, batch, target or 1.0)
            if effect.is_ignored and ordinal == "first" and not pl_module.automatic_optimization:
                raise LossProbe.NotPossible("no loss of the first batch changes with it")  # perhaps a discriminator's
        except Exception as reason:  # a failed report must not end a training run
            self._unmeasured = str(reason) or repr(reason)
            return
        self._has_measured = True
        is_wrong = effect.is_ignored or not effect.is_linear or effect.is_counted_twice
        say = rank_zero_warn if is_wrong else rank_zero_info
        text = f"{type(self).__name__}({self.name}): {describe(effect, self.name, target, ordinal)}"
        if effect.is_ignored:
            text += " " + remedy(pl_module, self._paths)
        say(textwrap.fill(text.strip(), 110, subsequent_indent="  "))
        if effect.rate is not None and effect.rate.gaussian is not None:
            _report_other_forms(trainer, effect.rate.gaussian, ordinal)

    def _report_validation(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, trained: float, target: float
    ) -> None:
        title = f"{type(self).__name__}({self.name})"
        try:
            stale = stale_weight(LossProbe(trainer, pl_module, batch, 0), tuple(self._paths), trained, target)
        except Exception as reason:  # a failed report must not end a training run
            if self._has_measured:  # otherwise the reason is likely the one that was given
                rank_zero_info(f"{title}: the weight in validation can't be measured ({str(reason) or repr(reason)}).")
            return
        if stale is not None:
            rank_zero_warn(f"{title}: {describe_stale(stale, self._paths, trained, target)}")


def describe(effect: WeightEffect, name: str, target: float | None, ordinal: str = "first") -> str:
    """Describe the effect of a weight on a loss.

    Args:
        effect: The measured effect.
        name: Name of the weight.
        target: The value it ends at, if known.
        ordinal: Which batch was measured: ``"first"`` or ``"second"``.
    """
    zero, half, full = effect.losses
    several = effect.count > 1
    loss = (
        f"loss {effect.number} of {effect.count} of the {ordinal} batch"
        if several
        else f"the loss of the {ordinal} batch"
    )
    if effect.is_ignored:
        others = ", and no other loss changes with it" if several else ""
        return (
            f"{loss} is {zero:.6g} whatever `{name}` is{others}. In this batch the loss doesn't read the number that "
            "is written, or sets it itself, or multiplies it by 0, or the KL is exactly 0."
        )
    if not effect.is_linear:
        text = (
            f"{loss} is {zero:.6g} at `{name}` = 0, {half:.6g} at {effect.weight / 2:g} and "
            f"{full:.6g} at {effect.weight:g}"
        )
        if effect.is_squared:
            return f"{text}: it grows with the square of `{name}`, which is applied twice. Remove one of the two."
        return f"{text}: it is not linear in it."
    found = [f"{loss} is {zero:.6g} {effect.slope:+.6g} * `{name}`".replace(" +", " + ", 1)]
    if effect.rate is not None:
        found.append(f"its slope is {effect.rate.what}")
    if effect.distortion is not None:
        found.append(f"at 0 it is {effect.distortion.what}")
    text = "; ".join(found) + "."
    if effect.is_counted_twice:
        text += " Is the weight applied twice, or does the KL lack its factor of 1/2?"
    if effect.effective_beta is not None:
        would_be = f"{target:g} is" if target else "1 would be"
        text += f" `{name}` = {would_be} an effective beta of {(target or 1.0) * effect.effective_beta:.4g}."
    return text


def _report_other_forms(trainer: Trainer, gaussian: Gaussian, ordinal: str) -> None:
    """Warn of callbacks that take the posterior's second parameter for something else than the loss does."""
    for each in callbacks_of(trainer):
        reader = getattr(each, "_reader", None)
        taken = reader.second_of(gaussian.paths) if isinstance(reader, LatentReader) and gaussian.second else None
        if taken is not None and not callable(taken) and taken != gaussian.second:
            rank_zero_warn(
                f"{type(each).__name__} reads {gaussian.what.rpartition(', ')[0]} with `second={taken!r}`, but the KL "
                f"of the {ordinal} batch takes it for {gaussian.second!r}. Set `second={gaussian.second!r}`."
            )


def describe_stale(stale: StaleWeight, paths: Sequence[str], trained: float, target: float) -> str:
    """Describe a validation that uses another weight than the module holds.

    Args:
        stale: The measured weight.
        paths: Where the module keeps the weight.
        trained: The weight of the last training step.
        target: The weight that the module holds in validation.
    """
    if stale.places:
        advice = f"Write the copy too: `attribute={[*paths, *stale.places]}`."
    else:
        advice = "Name its place in `attribute` too, or monitor a number without the weight."
    return (
        f"validation should use the target, {target:g}, but `{stale.name}` uses {stale.weight:.4g}: in the first batch "
        f"it is {stale.value:.6g}, and would be {stale.meant:.6g}. The training step, whose weight was {trained:.4g}, "
        f"leaves a copy of its weight that validation reads. {advice}"
    )
