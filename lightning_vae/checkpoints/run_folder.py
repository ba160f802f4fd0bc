"""Find the run to go on with, and the newest of its checkpoints that is whole."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from lightning_utilities.core.rank_zero import rank_zero_warn

from .checkpoint_io import read

_CONFIG = "config.yaml"


def of(trainer: Namespace) -> list[Path]:
    """List the folders of the runs that a config has made, the newest first.

    Args:
        trainer: The Trainer's options in the config.

    Raises:
        ValueError: If they can't be found: the logger is not TensorBoard's, or the checkpoints lie elsewhere.
    """
    callbacks = trainer["callbacks"] or []
    for callback in callbacks if isinstance(callbacks, list) else [callbacks]:
        if (callback.get("init_args") or {}).get("dirpath"):
            raise ValueError("`last` looks in the run's folder, but `dirpath` of a checkpoint callback is another.")
    options = _logger(trainer).get("init_args") or {}
    root = Path(options.get("save_dir") or trainer["default_root_dir"] or ".", options.get("name") or "")
    version = options.get("version")
    if version is not None:
        run = root / (version if isinstance(version, str) else f"version_{version}")
        return [run] if run.is_dir() else []
    numbered = {int(path.name[8:]): path for path in root.glob("version_*") if path.name[8:].isdigit()}
    return [numbered[number] for number in sorted(numbered, reverse=True) if _is_of_fit(numbered[number])]


def of_checkpoint(path: Path, checkpoint: Mapping[str, Any]) -> Path:
    """Return the folder of a checkpoint's run as the run itself named it, relative or not.

    ModelCheckpoint goes on only where it finds itself.

    Args:
        path: Where the checkpoint lies.
        checkpoint: What it holds.

    Raises:
        ValueError: If it lies in no run's folder.
    """
    folders = [Path(state["dirpath"]) for state in checkpoint["callbacks"].values() if "dirpath" in state]
    run = next((folder for folder in folders if folder.resolve() == path.resolve().parent), path.parent).parent
    if not (run / _CONFIG).is_file():
        raise ValueError(f"{path} lies in no run's folder: there is no {_CONFIG} in {run}.")
    return run


def go_on_in(run: Path, step: int, trainer: Namespace) -> None:
    """Let a TensorBoardLogger go on in a run's folder, without doubling its curves.

    Args:
        run: The folder.
        step: Where it goes on; what was logged from there on is dropped.
        trainer: The Trainer's options in the config, which are changed.

    Raises:
        ValueError: If the logger is another.
    """
    while list(run.glob(f"events.out.tfevents.{int(time.time())}.*")):
        time.sleep(0.05)  # TensorBoard reads the files in the order of the seconds in their names
    described = _logger(trainer)
    place = {"save_dir": str(run.parent.parent), "name": run.parent.name, "version": run.name}
    trainer["logger"] = {
        "class_path": described["class_path"],
        "init_args": {**described["init_args"], **place},
        "dict_kwargs": {**(described.get("dict_kwargs") or {}), "purge_step": step},
    }


def newest_checkpoint(folder: Path, resumes: bool) -> Path | None:
    """Return the checkpoint of the most steps that is whole, or ``None``; warn of those that are not whole.

    Args:
        folder: A run's, or that of its checkpoints.
        resumes: Pass over those that hold weights alone.

    Raises:
        OSError: If there are checkpoints, but none that is whole.
    """
    damaged = []
    for path in sorted(_checkpoints(folder), key=_age):
        try:
            checkpoint = read(path)
        except OSError as error:
            damaged.append(str(path))
            rank_zero_warn(f"{error} It is passed over.")
            continue
        if ("loops" in checkpoint and "optimizer_states" in checkpoint) or not resumes:
            return path
    if damaged:
        raise OSError(f"No checkpoint in {folder} can be read: {', '.join(damaged)}.")
    return None


def _logger(trainer: Namespace) -> dict[str, Any]:
    logger = trainer["logger"]
    if logger in (None, True):  # Lightning's default
        place = {"save_dir": trainer["default_root_dir"] or ".", "name": "lightning_logs"}
        return {"class_path": "lightning.pytorch.loggers.TensorBoardLogger", "init_args": place}
    described: dict[str, Any] = logger.as_dict() if isinstance(logger, Namespace) else {"class_path": str(logger)}
    if not described["class_path"].endswith("TensorBoardLogger"):
        raise ValueError(f"a run is found and gone on with by TensorBoardLogger alone, got {described['class_path']}.")
    return described


def _checkpoints(folder: Path) -> Iterator[Path]:
    for place in (folder, folder / "checkpoints"):
        yield from (path for path in place.glob("*.ckpt") if path.is_file())  # a link may lead nowhere


def _age(path: Path) -> tuple[float, float]:
    """Sort by steps, the most first, then by time; what can't be read comes first, so that it is named."""
    try:
        step = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["global_step"]  # reads no tensor
    except Exception:  # an unpickler on bytes that are no pickle may raise anything
        step = float("inf")
    return -step, -os.stat(path).st_mtime


def _is_of_fit(run: Path) -> bool:
    """Tell a run from the folder of an evaluation, whose config has options that ``fit`` has not."""
    config = run / _CONFIG  # not there if the run was killed at once
    return not (config.is_file() and re.search(r"^(verbose|return_predictions):", config.read_text(), re.MULTILINE))
