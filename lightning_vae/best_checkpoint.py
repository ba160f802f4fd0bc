"""The checkpoint of the best model."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from typing_extensions import override

from .last_checkpoint import is_due


class BestCheckpoint(ModelCheckpoint):
    """Keeps the best model of a run as ``best.ckpt``, by what its validations say.

    It is ``ModelCheckpoint(monitor="val/loss", filename="best")`` without what that one takes at each step, where it
    has nothing to save: it makes its key anew for each hook, and looks whether it is time.

    Args:
        dirpath: Folder; by default ``checkpoints`` in the run's.
        monitor: What tells which model is better.
        mode: Whether that is the one with less of it, ``"min"``, or with more, ``"max"``.
        every_n_epochs: Look in every so many epochs alone, and in the last. Where an epoch takes a fraction of a
            second and most are better than those before, saving each takes a good part of the run.

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
        self._due_every = every_n_epochs  # its own `every_n_epochs` would pass over a last epoch between

    @cached_property
    @override
    def state_key(self) -> str:
        """Key of the saved state: a run that goes on by another monitor has no best model yet."""
        return super().state_key

    @override
    def on_train_batch_end(self, *_: Any) -> None:
        """Save nothing after a batch."""

    @override
    def _should_skip_saving_checkpoint(self, trainer: Trainer) -> bool:
        return not is_due(trainer, self._due_every) or super()._should_skip_saving_checkpoint(trainer)
