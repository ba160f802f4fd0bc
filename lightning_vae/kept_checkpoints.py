"""Which of a run's checkpoints is the best, and which the newest."""

from __future__ import annotations

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

# Lightning lets any callback monitor the step and the epoch, whose largest is always the newest. Beside one that does
# so there can be another without a monitor.
_GROWS = ("step", "epoch")


def keeper_of_best(trainer: Trainer) -> ModelCheckpoint | None:
    """Return the callback that has kept the best checkpoint; where none selects, the newest.

    Args:
        trainer: What has trained.
    """
    kept = [each for each in trainer.checkpoint_callbacks if isinstance(each, ModelCheckpoint) and each.best_model_path]
    return min(kept, key=keeps_newest, default=None)


def keeps_newest(callback: ModelCheckpoint) -> bool:
    """Whether a callback saves a model that is no better, too.

    Args:
        callback: Of a Trainer.
    """
    return callback.monitor is None or (callback.monitor in _GROWS and callback.mode == "max")


def path_of_newest(callback: ModelCheckpoint) -> str:
    """Return the one path under which a callback keeps the newest checkpoint; empty where it keeps none under one.

    Args:
        callback: Of a Trainer that has trained.
    """
    if keeps_newest(callback) and callback.filename and "{" not in callback.filename:
        return callback.format_checkpoint_name({})
    return callback.last_model_path
