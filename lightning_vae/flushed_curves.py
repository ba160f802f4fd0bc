"""Curves that reach as far as the checkpoint."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from typing_extensions import override


class FlushedCurves(Callback):
    """Writes what the loggers hold back before a checkpoint is saved.

    A run that is killed goes on behind its checkpoint: a point from before that was still in memory would be missing.
    TensorBoard's is flushed to the disk as well, like the checkpoint itself.
    """

    @override
    def on_save_checkpoint(self, trainer: Trainer, *_: Any) -> None:
        if not trainer.is_global_zero:
            return
        for logger in trainer.loggers:
            logger.save()
            if isinstance(logger, TensorBoardLogger):
                for events in Path(logger.log_dir).glob("events.out.tfevents.*"):
                    with events.open("rb") as file:
                        os.fsync(file.fileno())
