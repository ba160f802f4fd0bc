"""What a finished ``fit`` leaves in its run folder for whoever goes on from there."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from .. import __version__
from .atomic_write import atomic_write
from .last_checkpoint import LastCheckpoint

_NAME = "fit.json"


def write(folder: Path, trainer: Trainer, limits: Mapping[str, Any]) -> None:
    """Write the best checkpoint, the number of steps, the limits that it ran under and the versions.

    Args:
        folder: The run folder.
        trainer: What has trained.
        limits: By the Trainer's names.
    """
    best = keeper_of_best(trainer)
    found = {
        "checkpoint": os.path.relpath(best.best_model_path, folder) if best else None,
        "steps": trainer.global_step,
        "limits": dict(limits),
        "versions": {
            "lightning_vae": __version__,
            "torch": torch.__version__,
            "lightning": lightning.__version__,
            "python": platform.python_version(),
        },
    }
    with atomic_write(folder / _NAME) as file:
        file.write(json.dumps(found, indent=2).encode())


def keeper_of_best(trainer: Trainer) -> ModelCheckpoint | None:
    """Return the first callback that has kept the best checkpoint; where none monitors, the one that keeps the last.

    Args:
        trainer: What has trained.
    """
    kept = [each for each in trainer.checkpoint_callbacks if isinstance(each, ModelCheckpoint) and each.best_model_path]
    return min(kept, key=lambda each: (each.monitor is None, not isinstance(each, LastCheckpoint)), default=None)


def read(folder: Path) -> dict[str, Any] | None:
    """Read it, or return ``None`` where no ``fit`` has finished.

    Args:
        folder: The run folder.
    """
    path = folder / _NAME
    return json.loads(path.read_text()) if path.is_file() else None
