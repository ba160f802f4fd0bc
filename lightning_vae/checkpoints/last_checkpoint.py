"""The checkpoint from which a run is resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from typing_extensions import override

from ..checks import check_number, integer_from
from .exact_resume import is_stopping


class LastCheckpoint(ModelCheckpoint):
    """Keep the newest model as ``last.ckpt``, better or not: after each epoch, and after each validation within one.

    Use it beside the ``ModelCheckpoint`` that keeps the best. That callback's ``save_last`` is not enough: since
    Lightning 2.6 it saves only when the model is among the best, and a killed run loses the steps since then.

    Args:
        dirpath: Folder; by default ``checkpoints`` in the run's folder.
        every_n_epochs: Save only in every n-th epoch, and when the run reaches a limit or is told to stop. If an epoch
            takes a fraction of a second, saving after each one takes a good part of the run.

    Raises:
        ValueError: If ``every_n_epochs`` is below 1.

    Example::

        Trainer(callbacks=[ModelCheckpoint(monitor="val/loss", filename="best"), LastCheckpoint()])
    """

    state_key = "LastCheckpoint"  # independent of the options: a run may continue with others

    def __init__(self, dirpath: str | Path | None = None, every_n_epochs: int = 1) -> None:
        check_number("every_n_epochs", every_n_epochs, "at least 1", integer_from(1))
        # No version number in the name: a run resumed from another file also keeps its newest model here.
        super().__init__(dirpath, filename="last", every_n_epochs=every_n_epochs, enable_version_counter=False)

    @property
    def path(self) -> str:
        """Path of the checkpoint, once the Trainer is set up."""
        return self.format_checkpoint_name({})

    @override
    def on_train_batch_end(self, *_: Any) -> None:
        """Save nothing after a batch, and skip the checks that ``ModelCheckpoint`` makes at every step."""

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save after a validation within an epoch."""
        if not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch and not is_stopping(trainer):
            self._save(trainer)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save after an epoch, including one that the end of the run cuts short."""
        self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        is_due = (trainer.current_epoch + 1) % self._every_n_epochs == 0 or _is_last(trainer)
        if is_due and not self._should_skip_saving_checkpoint(trainer):
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))


def _is_last(trainer: Trainer) -> bool:
    """Return whether the run ends with this epoch."""
    return trainer.current_epoch + 1 == trainer.max_epochs or is_stopping(trainer)
