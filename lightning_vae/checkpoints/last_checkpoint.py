"""The checkpoint that a run goes on from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from typing_extensions import override

from .exact_resume import is_stopping


class LastCheckpoint(ModelCheckpoint):
    """Keeps the newest model as ``last.ckpt``, better or not: after each epoch, and each validation amid one.

    It stands beside the ``ModelCheckpoint`` that keeps the best. That one's ``save_last`` is not enough: since
    Lightning 2.6 it saves only when the model is among the best, and a run that is killed loses the steps since then.

    Args:
        dirpath: Folder; by default ``checkpoints`` in the run's.
        every_n_epochs: Save in every so many epochs alone, and when a limit of the run is reached or it is told to
            stop. Where an epoch takes a fraction of a second, saving each takes a good part of the run.

    Raises:
        ValueError: If ``every_n_epochs`` is below 1.

    Example::

        Trainer(callbacks=[ModelCheckpoint(monitor="val/loss", filename="best"), LastCheckpoint()])
    """

    state_key = "LastCheckpoint"  # whatever the options: a run may go on with others

    def __init__(self, dirpath: str | Path | None = None, every_n_epochs: int = 1) -> None:
        if every_n_epochs < 1:
            raise ValueError(f"`every_n_epochs` must be at least 1, got {every_n_epochs}.")
        # Without a number behind its name: a run that goes on from another file keeps the newest here, too.
        super().__init__(dirpath, filename="last", every_n_epochs=every_n_epochs, enable_version_counter=False)

    @property
    def path(self) -> str:
        """Where it is kept, once the Trainer is set up."""
        return self.format_checkpoint_name({})

    @override
    def on_train_batch_end(self, *_: Any) -> None:
        """Save nothing after a batch, which ``ModelCheckpoint`` would look into at every step."""

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save after a validation amid an epoch."""
        if not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch and not is_stopping(trainer):
            self._save(trainer)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save after an epoch, also one that the end of the run cuts short."""
        self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        is_due = (trainer.current_epoch + 1) % self._every_n_epochs == 0 or _is_last(trainer)
        if is_due and not self._should_skip_saving_checkpoint(trainer):
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))


def _is_last(trainer: Trainer) -> bool:
    """Tell whether the run ends with this epoch."""
    return trainer.current_epoch + 1 == trainer.max_epochs or is_stopping(trainer)
