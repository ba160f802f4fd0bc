"""The checkpoint that a run goes on from."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from typing_extensions import override


class LastCheckpoint(ModelCheckpoint):
    """Keeps the newest model as ``last.ckpt``: after every validation, better or not, and when training ends.

    It stands beside the ``ModelCheckpoint`` that keeps the best. That one's ``save_last`` is not enough: since
    Lightning 2.6 it saves only when the model is among the best, and a run that is killed loses the steps since then.

    Args:
        dirpath: Folder; by default ``checkpoints`` in the run's.
        every_n_epochs: Save in every so many epochs alone. Where one takes a fraction of a second, saving each takes a
            good part of the run. In a run without validation a save comes at the epoch's end.

    Raises:
        ValueError: If ``every_n_epochs`` is below 1.

    Example::

        Trainer(callbacks=[ModelCheckpoint(monitor="val/loss", filename="best"), LastCheckpoint()])
    """

    def __init__(self, dirpath: str | Path | None = None, every_n_epochs: int = 1) -> None:
        if every_n_epochs < 1:
            raise ValueError(f"`every_n_epochs` must be at least 1, got {every_n_epochs}.")
        # Without a number behind its name: a run that goes on from another file keeps the newest here, too.
        super().__init__(dirpath, filename="last", every_n_epochs=every_n_epochs, enable_version_counter=False)

    @cached_property  # Lightning asks for it at every hook of every step
    @override
    def state_key(self) -> str:
        return super().state_key

    @property
    def path(self) -> str:
        """Where it is kept, once the Trainer is set up."""
        return self.format_checkpoint_name({})

    @override
    def on_train_batch_end(self, *_: Any) -> None:
        """Save nothing after a batch, which ``ModelCheckpoint`` would look into at every step."""

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save as ``ModelCheckpoint`` does, and where training ends, whatever ends it."""
        super().on_train_epoch_end(trainer, pl_module)
        ends = (
            trainer.should_stop
            or trainer.current_epoch + 1 == trainer.max_epochs
            or trainer.global_step >= trainer.max_steps != -1
        )
        if ends and not self._should_skip_saving_checkpoint(trainer):
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))
