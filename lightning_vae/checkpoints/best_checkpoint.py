"""The checkpoint of the best model."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from typing_extensions import override

from .last_checkpoint import is_last


class BestCheckpoint(ModelCheckpoint):
    """Keeps the best model of a run as ``best.ckpt``, by what its validations say.

    It does what ``ModelCheckpoint(monitor="val/loss", filename="best")`` does, and takes nothing at the steps between,
    where that looks whether it is time, and makes its key anew for each hook. One stands in a run; beside it a
    ``ModelCheckpoint`` may watch something else.

    Args:
        dirpath: Folder; by default ``checkpoints`` in the run's.
        monitor: What tells which model is better.
        mode: Whether that is the one with less of it, ``"min"``, or with more, ``"max"``.
        every_n_epochs: Look once in so many epochs, and in the last one. The first model is kept in any case. Where an
            epoch takes a fraction of a second and most are better than those before, saving each takes a good part of
            the run.

    Raises:
        ValueError: If ``every_n_epochs`` is below 1.

    Example::

        Trainer(callbacks=[BestCheckpoint(), LastCheckpoint()])
    """

    def __init__(
        self,
        dirpath: str | Path | None = None,
        monitor: str = "val/loss",
        mode: Literal["min", "max"] = "min",
        every_n_epochs: int = 1,
    ) -> None:
        if every_n_epochs < 1:
            raise ValueError(f"`every_n_epochs` must be at least 1, got {every_n_epochs}.")
        super().__init__(dirpath, filename="best", monitor=monitor, mode=mode)
        self._looks_every = every_n_epochs
        self._looked = 0  # the epoch it last looked in, from 1
        self._validated: int | None = None  # at which step

    @cached_property  # Lightning asks for it at every hook of every step
    @override
    def state_key(self) -> str:
        """Key of the saved state: a run that goes on by another monitor has no best model yet."""
        return super().state_key

    @property
    @override
    def every_n_epochs(self) -> int:
        """Once in how many epochs it looks."""
        return self._looks_every

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the validations of another run."""
        self._validated = None
        super().on_train_start(trainer, pl_module)

    @override
    def on_train_batch_end(self, *_: Any) -> None:
        """Save nothing after a batch."""

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note of which model the validation was."""
        self._validated = trainer.global_step
        super().on_validation_end(trainer, pl_module)

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return what is known of the best, and when it last looked."""
        return {**super().state_dict(), "looked": self._looked}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a saved state."""
        super().load_state_dict(state_dict)
        self._looked = state_dict.get("looked", 0)

    @override
    def _save_topk_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Any]) -> None:
        if self._is_due(trainer):
            self._looked = trainer.current_epoch + 1
            super()._save_topk_checkpoint(trainer, monitor_candidates)

    def _is_due(self, trainer: Trainer) -> bool:
        if self._validated not in (None, trainer.global_step):
            return False  # the run ends behind its last validation, which was of another model
        epoch, every = trainer.current_epoch + 1, self._looks_every
        in_turn = epoch // every != self._looked // every  # also where not each is validated, and in another run
        return in_turn or epoch == self._looked or not self.best_model_path or is_last(trainer)
