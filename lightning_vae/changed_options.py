"""What was changed between a run's save and its resumption."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn


def say_what_changed(trainer: Trainer, options: dict[str, Any]) -> None:
    """Say which of the model's options, the optimizer's and the run's length differ from those of the checkpoint.

    From ``on_fit_start``: the optimizer still has the options that it was made with, which the checkpoint's replace.

    Args:
        trainer: What resumes, or begins, of which there is nothing to say.
        options: The model's, as it has them now.
    """
    checkpoint = trainer._checkpoint_connector._loaded_checkpoint
    if not checkpoint:
        return
    if changed := _differences(checkpoint.get("hyper_parameters", {}), options):
        rank_zero_warn(f"The run goes on with other options of the model than it was saved with: {changed}.")
    moved = ("lr",) if any(each.reduce_on_plateau for each in trainer.lr_scheduler_configs) else ()
    for optimizer, saved in zip(trainer.optimizers, checkpoint["optimizer_states"], strict=False):
        groups = zip(saved["param_groups"], optimizer.param_groups, strict=False)
        changes = [_differences(_configured(kept, moved), _configured(given, moved)) for kept, given in groups]
        if any(changes):
            rank_zero_warn(
                f"{type(optimizer).__name__} keeps the options in the checkpoint, although they were changed since: "
                f"{next(filter(None, changes))}."
            )
    if changed := _differences(checkpoint.get("lightning_vae", {}).get("length", {}), length(trainer)):
        rank_zero_info(f"The run is not as long as when it was saved: {changed}.")


def length(trainer: Trainer) -> dict[str, int | None]:
    """Return what ends a run.

    Args:
        trainer: What runs.
    """
    return {"max_epochs": trainer.max_epochs, "max_steps": trainer.max_steps}


def _configured(group: dict[str, Any], moved: tuple[str, ...]) -> dict[str, Any]:
    """Return of a group of parameters what a config gives and nothing moves in training."""
    options = {"lr": group.get("initial_lr", group["lr"]), "weight_decay": group.get("weight_decay")}
    return {name: value for name, value in options.items() if name not in moved}


def _differences(before: dict[str, Any], now: dict[str, Any]) -> str:
    names = [name for name in before if not name.startswith("_") and name in now and before[name] != now[name]]
    return ", ".join(f"{name} {before[name]!r} -> {now[name]!r}" for name in names)
