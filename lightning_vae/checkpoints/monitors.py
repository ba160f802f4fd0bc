"""Checks of what the callbacks and schedulers of a run monitor."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import LambdaCallback, ModelCheckpoint
from lightning_utilities.core.imports import RequirementCache
from lightning_utilities.core.rank_zero import rank_zero_warn

from ..running_sums import term_names

_SKIPS_LAST = RequirementCache("lightning>=2.6.0")
_LOADER = re.compile(r"/dataloader_idx_\d+$")
_CONSTRAINED = ("val/squared_error", "train/constrained_error")  # under GECO
# The packages that log no term of the loss under another name than the module's.
_KNOWN = re.compile(rf"(lightning|pytorch_lightning|{__name__.rpartition('.checkpoints.')[0]})(\.|$)")


def check_monitors(trainer: Trainer, module: LightningModule) -> None:
    """Refuse monitors that would keep the worst model or wait in vain, and warn if the newest model is not saved.

    Args:
        trainer: The Trainer that is about to start fitting.
        module: The :class:`lightning_vae.VAE`.

    Raises:
        lightning.pytorch.utilities.exceptions.MisconfigurationException: If a monitor minimises the ELBO, or names a
            value that is never logged. The latter is known only if the user's code can't log values.
    """
    for owner, monitor, strict in _monitors(trainer):
        if _without_loader(monitor).rpartition("/")[2] == "elbo" and getattr(owner, "mode", None) == "min":
            raise MisconfigurationException(
                f"{_described(owner, monitor)} has `mode` 'min', which keeps the worst model: a higher ELBO is better. "
                "Use mode='max', or monitor 'val/loss'."
            )
        nearest = _nearest(_without_loader(monitor), module)
        if nearest and strict and _logs_known_values(trainer, module):
            raise MisconfigurationException(
                f"{_described(owner, monitor)}: this run never logs that value. The nearest are "
                f"{', '.join(map(repr, nearest))}."
            )
    savers = _savers(trainer)
    if not _SKIPS_LAST or any(_saves_regardless(each) for each in savers):
        return
    for each in savers:
        if each.save_last and each.monitor and each.every_n_epochs and each.save_top_k > 0:
            rank_zero_warn(
                f"ModelCheckpoint(monitor={each.monitor!r}, save_last={each.save_last!r}): since Lightning 2.6 "
                "`last.ckpt` is written only when the model is among the best, so a run resumed from it loses all "
                "steps since then. Leave `save_last` out, and add `lightning_vae.LastCheckpoint` to the callbacks."
            )


def check_validation(trainer: Trainer, module: LightningModule, loaders: int | None) -> None:
    """Refuse monitors of values that the validation of this run does not log.

    Args:
        trainer: The Trainer that is about to train.
        module: The :class:`lightning_vae.VAE`.
        loaders: Number of validation loaders, 0 in a run without validation; ``None`` if it is not known yet.

    Raises:
        lightning.pytorch.utilities.exceptions.MisconfigurationException: If there is no validation, unless another
            ``ModelCheckpoint`` saves without it; or if the monitor is of none of the loaders.
    """
    for owner, monitor, strict in _monitors(trainer):
        name = _without_loader(monitor)
        if name not in term_names("val") or not strict:
            continue
        if loaders == 0 and not (isinstance(owner, ModelCheckpoint) and any(map(_saves_unvalidated, _savers(trainer)))):
            raise MisconfigurationException(
                f"{_described(owner, monitor)} needs validation, and this run has none: no validation data, "
                "`limit_val_batches=0`, or `check_val_every_n_epoch` above `max_epochs`. Change that, leave it out, or "
                "monitor training, such as 'train/elbo' with mode='max'."
            )
        logged = [name] if loaders == 1 else [f"{name}/dataloader_idx_{number}" for number in range(loaders or 0)]
        if logged and monitor not in logged and _logs_known_values(trainer, module):
            raise MisconfigurationException(
                f"{_described(owner, monitor)}: from its {len(logged)} validation loader{'s' * (len(logged) > 1)} this "
                f"run logs {', '.join(map(repr, logged))}."
            )


def validation_loaders(trainer: Trainer) -> int | None:
    """Return the number of validation loaders, 0 in a run without validation; ``None`` if it is not known yet."""
    every, epochs = trainer.check_val_every_n_epoch, trainer.max_epochs
    if not trainer.enable_validation or (every is not None and epochs is not None and 0 <= epochs < every):
        return 0
    if trainer.val_dataloaders is None:
        return None
    return len(trainer.num_val_batches) if sum(trainer.num_val_batches) else 0


def _monitors(trainer: Trainer) -> Iterator[tuple[Any, str, bool]]:
    """Yield the callbacks and schedulers that monitor, the names of the values, and whether they must be logged."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    found = [(each, getattr(each, "monitor", None), getattr(each, "strict", True)) for each in callbacks]
    found += [(each.scheduler, each.monitor, each.strict) for each in trainer.lr_scheduler_configs]
    for owner, monitor, strict in found:
        if isinstance(monitor, str):
            yield owner, monitor, strict


def _described(owner: Any, monitor: str) -> str:
    return f"{type(owner).__name__}(monitor={monitor!r})"


def _without_loader(monitor: str) -> str:
    """Return a monitor without the suffix that Lightning gives the values of one of several loaders."""
    return _LOADER.sub("", monitor)


def _logs_known_values(trainer: Trainer, module: LightningModule) -> bool:
    """Return whether only this package and Lightning log values in a run."""
    authors: list[Any] = [module, *trainer.callbacks]  # type: ignore[attr-defined]
    return all(_KNOWN.match(type(each).__module__) and not isinstance(each, LambdaCallback) for each in authors)


def _nearest(monitor: str, module: LightningModule) -> list[str]:
    """Return the terms nearest to a monitor that looks like one of them but is none."""
    terms = [*term_names("val"), *term_names("train")]
    terms += [f"{stage}/term_{name}" for stage in ("val", "train") for name in getattr(module, "terms", ())]
    if monitor in (*terms, *_CONSTRAINED, "epoch", "step") or not re.match(
        r"(train|val|valid|validation|test)[/_]|\w+$", monitor
    ):
        return []
    return difflib.get_close_matches(monitor, terms, n=3, cutoff=0)


def _savers(trainer: Trainer) -> list[ModelCheckpoint]:
    return [each for each in trainer.checkpoint_callbacks if isinstance(each, ModelCheckpoint)]


def _saves_unvalidated(callback: ModelCheckpoint) -> bool:
    return callback.save_top_k != 0 and _without_loader(callback.monitor or "") not in term_names("val")


def _saves_regardless(callback: ModelCheckpoint) -> bool:
    return callback.monitor is None and callback.save_top_k != 0 and not callback.save_weights_only
