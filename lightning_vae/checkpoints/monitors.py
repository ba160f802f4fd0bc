"""Whether what a run keeps is what its user means to keep."""

from __future__ import annotations

from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_utilities.core.imports import RequirementCache
from lightning_utilities.core.rank_zero import rank_zero_warn

_SKIPS_LAST = RequirementCache("lightning>=2.6.0")


def check_monitors(trainer: Trainer) -> None:
    """Refuse monitors that would select the worst model, and warn where the newest is not saved.

    Args:
        trainer: What is about to train.

    Raises:
        lightning.pytorch.utilities.exceptions.MisconfigurationException: If an ELBO is to be made small.
    """
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    for owner, monitor in [(each, getattr(each, "monitor", None)) for each in callbacks] + [
        (each.scheduler, each.monitor) for each in trainer.lr_scheduler_configs
    ]:
        mode = getattr(owner, "mode", None)
        if isinstance(monitor, str) and monitor.rpartition("/")[2] == "elbo" and mode == "min":
            raise MisconfigurationException(
                f"{type(owner).__name__}(monitor={monitor!r}) has `mode` 'min', which keeps the worst model: "
                "the ELBO is higher when better. Use mode='max', or monitor 'val/loss'."
            )
    savers = [each for each in callbacks if isinstance(each, ModelCheckpoint)]
    if not _SKIPS_LAST or any(_saves_regardless(each) for each in savers):
        return
    for each in savers:
        if each.save_last and each.monitor and each.every_n_epochs and each.save_top_k > 0:
            rank_zero_warn(
                f"ModelCheckpoint(monitor={each.monitor!r}, save_last={each.save_last!r}): since Lightning 2.6 "
                "`last.ckpt` is written only when the model is among the best, so a run that goes on from it loses all "
                "steps since then. Leave `save_last` out, and add `lightning_vae.LastCheckpoint` to the callbacks."
            )


def _saves_regardless(callback: ModelCheckpoint) -> bool:
    return callback.monitor is None and callback.save_top_k != 0 and not callback.save_weights_only
