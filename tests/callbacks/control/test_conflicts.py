from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import LambdaCallback, ModelCheckpoint
from torch import nn

from lightning_vae.callbacks import FreeBits, KLAnnealing, Linear
from lightning_vae.callbacks.control.conflicts import remedy, suspects
from tests.doubles import quiet_trainer

RANGE = {"min_kl_weight": 0.0, "max_kl_weight": 1.0}
WARM_UP = {"n_epochs_kl_warmup": 400, "n_steps_kl_warmup": None}
ENDS = "write the ends of its range too, `min_kl_weight` and `max_kl_weight`."


@pytest.mark.parametrize(
    ("own", "written", "line"),
    [
        ({}, ["beta"], ""),
        (
            {"kl_warmup_epochs": 10, "kl_warmed_up": None, "warmup": 1000},  # of the adversarial phase
            ["beta"],
            "Switch off the module's own schedule, perhaps `kl_warmup_epochs=10`.",
        ),
        ({"kl_minibatches": 3, "beta_administered": 2, "min_lr": 0.1}, ["beta"], ""),
        (
            RANGE | WARM_UP,
            ["loss_kwargs.kl_weight"],
            f"Switch off the module's own schedule, perhaps `n_epochs_kl_warmup=400`, or {ENDS}",
        ),
        (RANGE, ["loss_kwargs.kl_weight"], ENDS.capitalize()),
        (RANGE, ["max_kl_weight", "loss_kwargs.kl_weight"], ENDS.capitalize()),
        (RANGE, [*RANGE], ""),
        ({"remove_schedule": max}, ["beta"], "Remove the module's own schedule with its method `remove_schedule`."),
    ],
)
def test_the_line_that_ends_the_conflict(own: dict[str, Any], written: list[str], line: str) -> None:
    model = LightningModule()
    vars(model).update(own)
    assert remedy(model, written) == line


def test_the_ends_of_a_range_are_named_with_their_paths() -> None:
    model: Any = LightningModule()
    model.sub = nn.Module()
    model.sub.min_beta, model.sub.max_beta = 0.0, 1.0
    assert remedy(model, ["beta"]) == "Write the ends of its range too, `sub.min_beta` and `sub.max_beta`."


class Sets(Callback):
    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        pl_module.loss.beta = 0.5


class SetsByName(Callback):
    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        setattr(pl_module, "beta", 0.5)  # noqa: B010


class Inherits(Sets):
    pass


class Unrelated(Callback):
    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        pl_module.gamma = 0.5


@pytest.mark.parametrize("kind", [Sets, SetsByName, Inherits])
def test_a_projects_callback_that_names_the_attribute_is_suspected(tmp_path: Path, kind: type[Callback]) -> None:
    ours = [KLAnnealing(Linear(steps=2), "loss.beta"), FreeBits(0.5)]
    trainer = quiet_trainer(
        tmp_path, callbacks=[*ours, kind(), Unrelated(), ModelCheckpoint(tmp_path)], enable_checkpointing=True
    )
    assert suspects(trainer, "beta") == [kind.__name__]


def test_functions_that_a_callback_was_given_are_suspected(tmp_path: Path) -> None:
    def start(trainer: Any, pl_module: Any, *_: Any) -> None:
        pl_module.beta = 0.5

    setter = KLAnnealing(
        Linear(stop=1.0, steps=2), setter=lambda module, value: setattr(module, "beta", value), name="other"
    )
    trainer = quiet_trainer(tmp_path, callbacks=[LambdaCallback(on_train_batch_start=start), setter])
    assert suspects(trainer, "beta") == ["LambdaCallback", "KLAnnealing"]
