"""Checks and small corrections when a run starts and when it saves.

At the start: sensible monitors, options unchanged since the save, beta with the likelihood, and gradient clipping with
fused optimizers. At a save: finite numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_utilities.core.imports import RequirementCache
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from ..likelihoods import warn_of_feedback
from .checkpoint_io import MODULE_KEY
from .exact_resume import Companion, ExactResume

_SKIPS_LAST = RequirementCache("lightning>=2.6.0")


class Guards(Companion):
    """Check a run when it starts. A :class:`lightning_vae.VAE` adds this callback itself.

    It refuses monitors that would keep the wrong model. For a resumed run it reports which options of the model and the
    optimizer, and which length of the run, differ from the saved ones. It warns of a beta that feeds back with the
    likelihood, and allows gradient clipping with fused optimizers under mixed precision.

    Raises:
        lightning.pytorch.utilities.exceptions.MisconfigurationException: If a monitor minimises the ELBO.
        ValueError: If a run is resumed with another kind of optimizer.
    """

    def __init__(self) -> None:
        super().__init__()
        self._loaded: dict[str, Any] = {}
        self._has_saved = False
        self._configured: list[list[dict[str, float]]] = []

    @override
    def _start(self, trainer: Trainer, stage: str) -> None:
        self._loaded, self._has_saved = {}, False

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if not self._has_saved:  # otherwise a tuner restores what it saved at the start of this run
            self._loaded = {name: checkpoint.get(name, {}) for name in ("hyper_parameters", MODULE_KEY)}

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        self._configured = _configured(trainer.optimizers)  # before a checkpoint or the training changes them
        if self._loaded:
            self._say_what_changed(trainer, pl_module)
            self._loaded = {}
        if trainer.gradient_clip_val:
            for optimizer in trainer.optimizers:
                # Lightning refuses to clip under mixed precision if an optimizer may unscale gradients by itself,
                # which fused ones do unless told not to.
                optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
        check_monitors(trainer)
        configured = pl_module.knobs["beta"]
        if configured is None or configured != pl_module.constructed_knobs["beta"]:  # otherwise the constructor warned
            warn_of_feedback(float(pl_module.beta), pl_module.likelihood)

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._has_saved = True
        checkpoint.setdefault(MODULE_KEY, {}).update(
            length=_length(trainer), optimizers=self._configured, optimizer_names=_names(trainer.optimizers)
        )

    def _say_what_changed(self, trainer: Trainer, pl_module: Any) -> None:
        own = self._loaded[MODULE_KEY]
        saved, names = own.get("optimizer_names"), _names(trainer.optimizers)
        if saved not in (None, names):
            raise ValueError(
                f"The checkpoint was saved with the optimizer {', '.join(saved)}, so a run with {', '.join(names)} "
                "can't be resumed from it. Configure the same optimizer, or start a new fit from its weights with "
                "`VAE.load_from_checkpoint`."
            )
        # The module itself reports changed knobs when it loads them.
        options = {name: value for name, value in pl_module.hparams.items() if name not in pl_module.knobs}
        if changed := _differences(self._loaded["hyper_parameters"], options):
            rank_zero_warn(f"The run continues with other options of the model than it was saved with: {changed}.")
        for optimizer, before, now in zip(
            trainer.optimizers, own.get("optimizers", ()), self._configured, strict=False
        ):
            changes = [_differences(*groups) for groups in zip(before, now, strict=False)]
            if any(changes):
                rank_zero_warn(
                    f"{type(optimizer).__name__} keeps the options in the checkpoint, although they have been changed "
                    f"since: {next(filter(None, changes))}."
                )
        if changed := _differences(own.get("length", {}), _length(trainer)):
            rank_zero_info(f"The run is not as long as when it was saved: {changed}.")


def missing_companions(trainer: Trainer) -> list[Callback]:
    """Return the callbacks that every run of a VAE needs and a Trainer does not have yet."""
    present: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return [kind() for kind in (ExactResume, Guards) if not any(isinstance(each, kind) for each in present)]


def warn_of_missing_companions(trainer: Trainer) -> None:
    """Warn if a subclass of the module has dropped the callbacks that every run of a VAE needs."""
    if names := ", ".join(type(each).__name__ for each in missing_companions(trainer)):
        rank_zero_warn(
            f"The run lacks {names}: `configure_callbacks` of the model does not return what `super()` does. Without "
            "ExactResume a resumed run draws different noise; without Guards neither monitors nor changed options are "
            "checked. "
            "Return `[*super().configure_callbacks(), ...]`."
        )


def check_finite(module: nn.Module, trainer: Trainer) -> None:
    """Check a module's parameters before they are saved.

    Args:
        module: The module. Of sharded parameters, this process checks its own part.
        trainer: The Trainer that saves; all processes call this together.

    Raises:
        FloatingPointError: If a parameter of any process is not finite.
    """
    found = _parameter_not_finite(module)
    if trainer.strategy.reduce_boolean_decision(found is not None, all=False):
        raise FloatingPointError(
            f"The parameter `{found or 'of another process'}` holds values that are not finite numbers, so nothing is "
            "saved; earlier checkpoints are untouched."
        )


def check_monitors(trainer: Trainer) -> None:
    """Refuse monitors that would keep the worst model, and warn if the newest model is not saved.

    Args:
        trainer: The Trainer that is about to start fitting.

    Raises:
        lightning.pytorch.utilities.exceptions.MisconfigurationException: If a monitor minimises the ELBO.
    """
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    for owner, monitor in [(each, getattr(each, "monitor", None)) for each in callbacks] + [
        (each.scheduler, each.monitor) for each in trainer.lr_scheduler_configs
    ]:
        mode = getattr(owner, "mode", None)
        if isinstance(monitor, str) and monitor.rpartition("/")[2] == "elbo" and mode == "min":
            raise MisconfigurationException(
                f"{type(owner).__name__}(monitor={monitor!r}) has `mode` 'min', which keeps the worst model: "
                "a higher ELBO is better. Use mode='max', or monitor 'val/loss'."
            )
    savers = [each for each in callbacks if isinstance(each, ModelCheckpoint)]
    if not _SKIPS_LAST or any(_saves_regardless(each) for each in savers):
        return
    for each in savers:
        if each.save_last and each.monitor and each.every_n_epochs and each.save_top_k > 0:
            rank_zero_warn(
                f"ModelCheckpoint(monitor={each.monitor!r}, save_last={each.save_last!r}): since Lightning 2.6 "
                "`last.ckpt` is written only when the model is among the best, so a run resumed from it loses all "
                "steps since then. Leave `save_last` out, and add `lightning_vae.LastCheckpoint` to the callbacks."
            )


def _saves_regardless(callback: ModelCheckpoint) -> bool:
    return callback.monitor is None and callback.save_top_k != 0 and not callback.save_weights_only


def _length(trainer: Trainer) -> dict[str, int | None]:
    return {"max_epochs": trainer.max_epochs, "max_steps": trainer.max_steps}


def _names(optimizers: Sequence[Optimizer]) -> list[str]:
    return [type(optimizer).__name__ for optimizer in optimizers]


def _configured(optimizers: Sequence[Optimizer]) -> list[list[dict[str, float]]]:
    """Return the options that a config sets, for each optimizer and parameter group."""
    names = ("lr", "weight_decay")
    return [
        [{name: float(group[name]) for name in names if name in group} for group in optimizer.param_groups]
        for optimizer in optimizers
    ]


def _differences(before: dict[str, Any], now: dict[str, Any]) -> str:
    # Compare as text, because tensors and arrays compare element by element.
    texts = {name: (repr(before[name]), repr(now[name])) for name in before if name in now and not name.startswith("_")}
    return ", ".join(f"{name} {old} -> {new}" for name, (old, new) in texts.items() if old != new)


@torch.no_grad()
def _parameter_not_finite(module: nn.Module) -> str | None:
    """Return the name of the first parameter that is not finite."""
    named = {name: _own_part(parameter) for name, parameter in module.named_parameters()}
    if not named:
        return None
    device = next(iter(named.values())).device  # one synchronisation for all parameters
    if torch.stack([part.sum().to(device) for part in named.values()]).isfinite().all():
        return None
    # A sum may overflow although each value is finite.
    return next((name for name, part in named.items() if not part.isfinite().all()), None)


def _own_part(parameter: Tensor) -> Tensor:
    part: Tensor = parameter.to_local() if hasattr(parameter, "to_local") else parameter
    return part
