"""Keep the logged curves in step with the checkpoints."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from typing_extensions import override


class FlushLoggers(Callback):
    """Write all pending values to the loggers, and flush them, before a checkpoint is saved.

    A killed run resumes from its checkpoint. An earlier point that was still in memory would be missing from its
    curves. TensorBoard's files are flushed to disk, as the checkpoint is.
    """

    @override
    def on_exception(self, trainer: Trainer, *_: Any) -> None:
        vars(trainer._logger_connector).pop("log_metrics", None)  # the epoch's end is never reached

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
                    with events.open("r+b") as file:  # Windows can flush only files that are open for writing
                        os.fsync(file.fileno())


def is_logging_step(trainer: Trainer, step: int) -> bool:
    """Return whether Lightning writes to the loggers after this training batch.

    Args:
        trainer: The Trainer, within ``training_step``.
        step: Number of batches that stepped before.
    """
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
    is_due = trainer.fast_dev_run or (every and (step + 1) % every == 0)  # type: ignore[attr-defined]
    return bool(is_due) and not trainer.fit_loop._should_accumulate()


def _log_epoch(trainer: Trainer) -> None:
    """Log an epoch's values so far. Lightning logs after the hooks that save, and then logs only the later values."""
    connector, loop = trainer._logger_connector, trainer.fit_loop.epoch_loop
    if "log_metrics" in vars(connector):  # set by the previous checkpoint, at the same epoch's end
        return
    written = connector.metrics["log"]
    loop._batches_that_stepped -= 1  # as Lightning does
    connector.log_metrics(written)
    loop._batches_that_stepped += 1

    def log_the_rest(metrics: dict[str, Any]) -> None:
        del vars(connector)["log_metrics"]
        connector.log_metrics({name: value for name, value in metrics.items() if name not in written})

    connector.log_metrics = log_the_rest  # type: ignore[method-assign,assignment]
