"""What was changed between a run's save and its resumption."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Trainer
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch.optim import Optimizer


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
    own = checkpoint.get("lightning_vae", {})
    for optimizer, before, now in zip(
        trainer.optimizers, own.get("optimizers", ()), configured(trainer.optimizers), strict=False
    ):
        changes = [_differences(*groups) for groups in zip(before, now, strict=False)]
        if any(changes):
            rank_zero_warn(
                f"{type(optimizer).__name__} keeps the options in the checkpoint, although they were changed since: "
                f"{next(filter(None, changes))}."
            )
    if changed := _differences(own.get("length", {}), length(trainer)):
        rank_zero_info(f"The run is not as long as when it was saved: {changed}.")


def length(trainer: Trainer) -> dict[str, int | None]:
    """Return what ends a run.

    Args:
        trainer: What runs.
    """
    return {"max_epochs": trainer.max_epochs, "max_steps": trainer.max_steps}


def configured(optimizers: Sequence[Optimizer]) -> list[list[dict[str, Any]]]:
    """Return of optimizers that have not stepped yet, for each group of parameters, what a config gives.

    Args:
        optimizers: As they were made; training may move their options.
    """
    names = ("lr", "weight_decay")
    return [
        [{name: float(group[name]) for name in names if name in group} for group in optimizer.param_groups]
        for optimizer in optimizers
    ]


def _differences(before: dict[str, Any], now: dict[str, Any]) -> str:
    # By their texts: tensors and arrays have no single answer to whether they differ.
    texts = {name: (repr(before[name]), repr(now[name])) for name in before if name in now and not name.startswith("_")}
    return ", ".join(f"{name} {old} -> {new}" for name, (old, new) in texts.items() if old != new)
