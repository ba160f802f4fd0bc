"""Curves that reach as far as the checkpoint."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from typing_extensions import override


class FlushLoggers(Callback):
    """Writes what the loggers have not been given yet, or hold back, before a checkpoint is saved.

    A run that is killed goes on behind its checkpoint: a point from before that was still in memory would be missing.
    TensorBoard's files are flushed to the disk as well, like the checkpoint itself.
    """

    @override
    def on_exception(self, trainer: Trainer, *_: Any) -> None:
        vars(trainer._logger_connector).pop("log_metrics", None)  # the epoch's end is not reached any more

    @override
    def on_save_checkpoint(self, trainer: Trainer, *_: Any) -> None:
        epochs: Any = trainer.fit_loop.epoch_progress.current
        if trainer.training and epochs.processed == epochs.completed + 1:
            _log_epoch(trainer)
        if not trainer.is_global_zero:
            return
        for logger in trainer.loggers:
            logger.save()
            if isinstance(logger, TensorBoardLogger):
                for events in Path(logger.log_dir).glob("events.out.tfevents.*"):
                    with events.open("r+b") as file:  # Windows flushes only what can be written to
                        os.fsync(file.fileno())


def _log_epoch(trainer: Trainer) -> None:
    """Log an epoch's values so far; Lightning would behind the hooks that save, and is left those that come later."""
    connector, loop = trainer._logger_connector, trainer.fit_loop.epoch_loop
    if "log_metrics" in vars(connector):  # for the checkpoint before, at the same epoch's end
        return
    written = connector.metrics["log"]
    loop._batches_that_stepped -= 1  # as Lightning does
    connector.log_metrics(written)
    loop._batches_that_stepped += 1

    def log_the_rest(metrics: dict[str, Any]) -> None:
        del vars(connector)["log_metrics"]
        connector.log_metrics({name: value for name, value in metrics.items() if name not in written})

    connector.log_metrics = log_the_rest  # type: ignore[method-assign,assignment]
