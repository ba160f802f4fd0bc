"""Find the run to resume and its newest valid checkpoint, and write and read the record of a finished fit."""

from __future__ import annotations

import json
import os
import platform
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import lightning
import torch
from jsonargparse import Namespace
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_utilities.core.rank_zero import rank_zero_warn

from ..version import __version__
from .atomic_write import atomic_write
from .checkpoint_io import read
from .last_checkpoint import LastCheckpoint

_CONFIG = "config.yaml"
_FINISHED = "fit.json"


def of(trainer: Namespace) -> list[Path]:
    """List the folders of a config's runs, the newest first.

    Args:
        trainer: The Trainer's options in the config.

    Raises:
        ValueError: If they can't be found, because the logger is not TensorBoard's or the checkpoints lie elsewhere.
    """
    callbacks = trainer["callbacks"] or []
    for callback in callbacks if isinstance(callbacks, list) else [callbacks]:
        if (callback.get("init_args") or {}).get("dirpath"):
            raise ValueError("`last` searches the run's folder, but a checkpoint callback has another `dirpath`.")
    options = _logger(trainer).get("init_args") or {}
    root = Path(options.get("save_dir") or trainer["default_root_dir"] or ".", options.get("name") or "")
    version = options.get("version")
    if version is not None:
        run = root / (version if isinstance(version, str) else f"version_{version}")
        return [run] if run.is_dir() else []
    numbered = {int(path.name[8:]): path for path in root.glob("version_*") if path.name[8:].isdigit()}
    return [numbered[number] for number in sorted(numbered, reverse=True) if _is_of_fit(numbered[number])]


def of_checkpoint(path: Path, checkpoint: Mapping[str, Any]) -> Path:
    """Return the folder of a checkpoint's run, relative or absolute as the run itself named it.

    ModelCheckpoint restores its state only under the same name.

    Args:
        path: The checkpoint's file.
        checkpoint: Its content.

    Raises:
        ValueError: If it is not in a run's folder.
    """
    folders = [Path(state["dirpath"]) for state in checkpoint["callbacks"].values() if "dirpath" in state]
    run = next((folder for folder in folders if folder.resolve() == path.resolve().parent), path.parent).parent
    if not (run / _CONFIG).is_file():
        raise ValueError(f"{path} is not in a run's folder: there is no {_CONFIG} in {run}.")
    return run


def go_on_in(run: Path, step: int, trainer: Namespace) -> None:
    """Make a config's TensorBoardLogger continue in a run's folder, without duplicate points in its curves.

    Args:
        run: The folder.
        step: The first step to log. Values that the run logged from there on are dropped.
        trainer: The Trainer's options in the config. Changed in place.

    Raises:
        ValueError: If the logger is not a TensorBoardLogger.
    """
    while list(run.glob(f"events.out.tfevents.{int(time.time())}.*")):
        time.sleep(0.05)  # TensorBoard reads the files in the order of the timestamps (in seconds) in their names
    described = _logger(trainer)
    place = {"save_dir": str(run.parent.parent), "name": run.parent.name, "version": run.name}
    trainer["logger"] = {
        "class_path": described["class_path"],
        "init_args": {**described["init_args"], **place},
        "dict_kwargs": {**(described.get("dict_kwargs") or {}), "purge_step": step},
    }


def newest_checkpoint(folder: Path, resumes: bool) -> Path | None:
    """Return the valid checkpoint with the most steps; ``None`` if there is none. Warn about damaged ones.

    Args:
        folder: The folder of a run, or of its checkpoints.
        resumes: Skip checkpoints that hold only weights.

    Raises:
        OSError: If there are checkpoints, but none is valid.
    """
    damaged = []
    for path in sorted(_checkpoints(folder), key=_age):
        try:
            checkpoint = read(path)
        except OSError as error:
            damaged.append(str(path))
            rank_zero_warn(f"{error} It is skipped.")
            continue
        if ("loops" in checkpoint and "optimizer_states" in checkpoint) or not resumes:
            return path
    if damaged:
        raise OSError(f"No checkpoint in {folder} can be read: {', '.join(damaged)}.")
    return None


def write_finished(folder: Path, trainer: Trainer, limits: Mapping[str, Any]) -> None:
    """Write the record of a finished fit: its best checkpoint, steps, limits and versions.

    Args:
        folder: The run's folder.
        trainer: The Trainer of the fit.
        limits: The limits of the run, by the names of the Trainer's options.
    """
    best = best_keeper(trainer)
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
    with atomic_write(folder / _FINISHED) as file:
        file.write(json.dumps(found, indent=2).encode())


def read_finished(folder: Path) -> dict[str, Any] | None:
    """Read the record of a finished fit in a run's folder; ``None`` if no fit has finished."""
    path = folder / _FINISHED
    return json.loads(path.read_text()) if path.is_file() else None


def best_keeper(trainer: Trainer) -> ModelCheckpoint | None:
    """Return the first callback that has kept a best checkpoint; if none monitors, the one that keeps the last."""
    kept = [each for each in trainer.checkpoint_callbacks if isinstance(each, ModelCheckpoint) and each.best_model_path]
    return min(kept, key=lambda each: (each.monitor is None, not isinstance(each, LastCheckpoint)), default=None)


def _logger(trainer: Namespace) -> dict[str, Any]:
    logger = trainer["logger"]
    if logger in (None, True):  # Lightning's default
        place = {"save_dir": trainer["default_root_dir"] or ".", "name": "lightning_logs"}
        return {"class_path": "lightning.pytorch.loggers.TensorBoardLogger", "init_args": place}
    described: dict[str, Any] = logger.as_dict() if isinstance(logger, Namespace) else {"class_path": str(logger)}
    if not described["class_path"].endswith("TensorBoardLogger"):
        raise ValueError(f"`last` finds and resumes only runs of TensorBoardLogger, got {described['class_path']}.")
    return described


def _checkpoints(folder: Path) -> Iterator[Path]:
    for place in (folder, folder / "checkpoints"):
        yield from (path for path in place.glob("*.ckpt") if path.is_file())  # a link may lead nowhere


def _age(path: Path) -> tuple[float, float]:
    """Return a key that sorts by steps, the most first, then by time. Unreadable files come first, to be reported."""
    try:
        step = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["global_step"]  # reads no tensor
    except Exception:  # unpickling arbitrary bytes may raise anything
        step = float("inf")
    return -step, -os.stat(path).st_mtime


def _is_of_fit(run: Path) -> bool:
    """Return whether a folder belongs to a fit. An evaluation's config has options that a fit's lacks."""
    config = run / _CONFIG  # missing if the run was killed at once
    return not (config.is_file() and re.search(r"^(verbose|return_predictions):", config.read_text(), re.MULTILINE))
