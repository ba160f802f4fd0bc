"""What a finished ``fit`` leaves in its run folder for whoever goes on from there."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from . import __version__

_NAME = "fit.json"


def write(folder: Path, trainer: Trainer) -> None:
    """Write the best checkpoint, the number of steps and the versions.

    Args:
        folder: The run folder.
        trainer: What has trained.
    """
    kept = [each for each in trainer.checkpoint_callbacks if isinstance(each, ModelCheckpoint)]
    best = next((each.best_model_path for each in kept if each.best_model_path), None)
    found = {
        "checkpoint": os.path.relpath(best, folder) if best else None,
        "steps": trainer.global_step,
        "versions": {
            "lightning_vae": __version__,
            "torch": torch.__version__,
            "lightning": lightning.__version__,
            "python": platform.python_version(),
        },
    }
    whole = folder / f".{_NAME}"
    whole.write_text(json.dumps(found, indent=2))
    whole.replace(folder / _NAME)


def read(folder: Path) -> dict[str, Any] | None:
    """Read it, or return ``None`` where no ``fit`` has finished.

    Args:
        folder: The run folder.
    """
    path = folder / _NAME
    return json.loads(path.read_text()) if path.is_file() else None
