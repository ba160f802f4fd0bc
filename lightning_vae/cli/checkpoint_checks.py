"""Find the checkpoint that a command names, and check it before it is used."""

from __future__ import annotations

import os
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from lightning_utilities.core.rank_zero import rank_zero_only, rank_zero_warn

from ..checkpoints import run_folder
from ..checkpoints.checkpoint_io import read
from ..checkpoints.class_paths import check_descriptions

FROM_DATA = ("shape", "levels", "kinds")
"""Options of the model that are set from the data."""

KNOBS = ("beta", "free_bits")
"""Options of the model that win over a checkpoint's if they are given."""

_PARTS = {"global_step": int, "epoch": int, "state_dict": dict, "hyper_parameters": dict}


def find_checkpoint(config: Namespace, resumes: bool) -> None:
    """Replace a ``ckpt_path`` that is ``last`` or a folder by the newest valid checkpoint there.

    If the run to continue has not saved a checkpoint yet, it starts over in its folder. If it has finished, the process
    ends with exit code 0.

    Args:
        config: The config of a subcommand. Changed in place.
        resumes: True if the subcommand is ``fit``, which needs more than weights.

    Raises:
        ValueError: If there is no checkpoint.
        OSError: If there are checkpoints, but none can be read.
    """
    path = config.get("ckpt_path")
    if path != "last" and not os.path.isdir(path or ""):
        return
    same_run = resumes and config["same_run"]
    runs = run_folder.of(config["trainer"]) if path == "last" else [Path(path)]
    if same_run:
        runs = runs[:1]
    for run in runs:
        finished = run_folder.read_finished(run)
        if same_run and finished and finished.get("limits") == run_limits(config["trainer"]):
            _say(
                f"{run} has finished after {finished['steps']} steps: nothing is left to do. Raise the "
                "limit that ended it, such as `--trainer.max_epochs`, to continue it, or leave out `--ckpt_path` to "
                "start another run."
            )
            raise SystemExit(0)
        if found := run_folder.newest_checkpoint(run, resumes):
            config["ckpt_path"] = str(found)
            _say(f"The newest checkpoint is {found}.")
            return
    if not (same_run and path == "last"):
        raise ValueError(f"there is no checkpoint in {', '.join(map(str, runs)) or 'any run of this config'}.")
    config["ckpt_path"] = None
    if runs:
        _say(f"{runs[0]} has saved no checkpoint yet: it starts over.")
        run_folder.go_on_in(runs[0], 0, config["trainer"])


def run_limits(trainer: Namespace) -> dict[str, Any]:
    """Return the limits of a run as they would come back from JSON."""
    return {name: trainer[name] and str(trainer[name]) for name in ("max_epochs", "max_steps", "max_time")}


def read_checkpoint(path: str, resumes: bool) -> dict[str, Any]:
    """Read a checkpoint and check it without trusting it.

    Args:
        path: Its file.
        resumes: True if a run is to continue from it, which needs more than weights.

    Raises:
        ValueError: If it is missing, damaged, incomplete or not a checkpoint of a Lightning Trainer, if its weights are
            not finite, or if it names a class that is not a network.
    """
    try:
        checkpoint = read(path)
    except FileNotFoundError:
        raise ValueError(f"there is no file {path!r}.") from None
    except OSError as error:
        raise ValueError(f"{error}{_alternative(path, resumes)}") from None
    if not isinstance(checkpoint, dict) or "pytorch-lightning_version" not in checkpoint:
        raise ValueError(f"{path!r} is not a checkpoint of a Lightning Trainer.")
    if resumes and not (checkpoint.get("loops") and checkpoint.get("optimizer_states")):
        raise ValueError(f"{path!r} holds only weights, without the state needed to resume a run.")
    for name, kind in _PARTS.items():
        if not isinstance(found := checkpoint.get(name), kind):
            raise ValueError(f"{path!r} is damaged: `{name}` must be a {kind.__name__}, got {found!r}.")
    if "lightning_vae" in checkpoint and not checkpoint["hyper_parameters"]:
        raise ValueError(f"{path!r} is damaged: it lacks the model's options (`hyper_parameters`).")
    for name, weight in checkpoint["state_dict"].items():
        if isinstance(weight, torch.Tensor) and not weight.isfinite().all():
            raise ValueError(f"{path!r} holds weights that are not finite, {name} first. Take an earlier one.")
    for name, value in checkpoint["hyper_parameters"].items():
        check_descriptions(name, value)
    if resumes:
        _check_counts("loops", checkpoint["loops"])
    return checkpoint


def warn_of_replaced_options(given: dict[str, Any], used: dict[str, Any]) -> None:
    """Warn which of the model's options the checkpoint has replaced, because Lightning does not.

    Args:
        given: The model's options in the config.
        used: The options after the checkpoint's have replaced them.
    """
    changed = [
        f"{name} {given[name]!r} -> {used[name]!r}"
        for name in given
        if name not in FROM_DATA and name in used and given[name] != used[name]
    ]
    if changed:
        rank_zero_warn(
            "`--ckpt_path`: the model comes from the checkpoint, so these options of the config are not used: "
            + ", ".join(changed)
        )


def warn_of_other_data_set(checkpoint: dict[str, Any], data: str) -> None:
    """Warn if a checkpoint was trained on another data set: Lightning gives a data module only its own class's state.

    Args:
        checkpoint: The checkpoint.
        data: Class path of the data module in the config.
    """
    name = data.rpartition(".")[2]
    trained = [key for key, state in checkpoint.items() if isinstance(state, dict) and "fingerprint" in state]
    if trained and name not in trained:
        rank_zero_warn(f"`--ckpt_path`: the checkpoint was trained on {trained[0]}, but the data are {name}.")


def _check_counts(name: str, state: dict[str, Any]) -> None:
    """Refuse impossible counts of steps, batches and epochs: Lightning would continue counting from them."""
    for key, item in state.items():
        if key in ("total", "current", "epoch_loop.state_dict"):
            counts = item.values() if isinstance(item, dict) else ()
            if not counts or not all(type(count) is int and count >= 0 for count in counts):
                raise ValueError(f"the checkpoint is damaged: `{name}.{key}` must hold counts, got {item!r}.")
        elif isinstance(item, dict):
            _check_counts(f"{name}.{key}", item)


def _alternative(path: str, resumes: bool) -> str:
    """Return a hint at a valid checkpoint in the same folder as a damaged one."""
    with warnings.catch_warnings(), suppress(OSError):
        warnings.simplefilter("ignore")  # the damaged one is among those skipped
        if whole := run_folder.newest_checkpoint(Path(path).parent, resumes):
            return f" The newest valid one in the same folder is {whole}."
    return ""


def _say(text: str) -> None:
    rank_zero_only(print)(text)
