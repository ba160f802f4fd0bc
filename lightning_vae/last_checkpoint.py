"""The checkpoint that a run goes on from."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

from lightning.pytorch.callbacks import ModelCheckpoint
from typing_extensions import override


class LastCheckpoint(ModelCheckpoint):
    """Keeps the newest model as ``last.ckpt``, after every validation, better or not; without one after every epoch.

    It stands beside the ``ModelCheckpoint`` that keeps the best. That one's ``save_last`` is not enough: since
    Lightning 2.6 it saves only when the model is among the best, and a run that is killed loses the steps since then.

    Args:
        dirpath: Folder; by default ``checkpoints`` in the run's.

    Example::

        Trainer(callbacks=[ModelCheckpoint(monitor="val/loss", filename="best"), LastCheckpoint()])
    """

    def __init__(self, dirpath: str | Path | None = None) -> None:
        # Without a number behind its name: a run that goes on from another file keeps the newest here, too.
        super().__init__(dirpath, filename="last", enable_version_counter=False)

    @cached_property  # Lightning asks for it at every hook of every step
    @override
    def state_key(self) -> str:
        return super().state_key

    @property
    def path(self) -> str:
        """Where it is kept, once the Trainer is set up."""
        return self.format_checkpoint_name({})
