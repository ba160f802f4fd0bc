"""Lightning's ModelCheckpoint as the configs use it: ``best.ckpt`` is the best of the validated models."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from tests.doubles import loader, quiet_trainer

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
VALUES = dict(enumerate([3.0, 1.0, 2.0, 0.5, 4.0]))  # by epoch


class Varying(LightningModule):
    """Its validations say what they are told to."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, *_: object) -> torch.Tensor:
        return self.weight - 1

    def validation_step(self, *_: object) -> None:
        self.log("val/loss", VALUES[self.current_epoch])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class LogsItsTraining(Varying):
    """It logs a loss that falls, with or without validation."""

    def training_step(self, *_: object) -> torch.Tensor:
        self.log("loss", self.weight, on_epoch=True)
        return self.weight - 1


def best(root: Path, **options: Any) -> ModelCheckpoint:
    """Make the callback as the configs do."""
    return ModelCheckpoint(root, **{"monitor": "val/loss", "filename": "best", **options})


def fit(root: Path, keeps: ModelCheckpoint, epochs: int, resume: bool = False) -> Trainer:
    trainer = quiet_trainer(root, callbacks=[keeps], max_epochs=epochs, enable_checkpointing=True)
    trainer.fit(Varying(), loader(), loader(), ckpt_path=root / "best.ckpt" if resume else None)
    return trainer


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_the_configs_keep_the_best_as_these_tests_do(config: Path) -> None:
    callbacks = yaml.safe_load(config.read_text())["trainer"]["callbacks"]
    kept = [each["init_args"] for each in callbacks if each["class_path"] == "ModelCheckpoint"]
    # The paper's run is evaluated at its end.
    assert kept == ([] if config.stem == "mnist_burda" else [{"monitor": "val/loss", "filename": "best"}])


@pytest.mark.parametrize(("mode", "epoch"), [("min", 4), ("max", 5)])
def test_it_keeps_the_best_alone(tmp_path: Path, mode: str, epoch: int) -> None:
    keeps = best(tmp_path, mode=mode)
    fit(tmp_path, keeps, 5)
    assert [path.name for path in tmp_path.iterdir()] == ["best.ckpt"]
    assert torch.load(keeps.best_model_path, weights_only=True)["global_step"] == epoch * 6
    assert keeps.best_model_score == VALUES[epoch - 1]


class Improving(Varying):
    """Each of its validations is better than those before."""

    def validation_step(self, *_: object) -> None:
        self.log("val/loss", -1.0 * self.global_step)


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"max_epochs": 1}, [6]),
        ({"max_epochs": 4}, [6, 12, 18, 24]),
        ({"max_steps": 20}, [6, 12, 18]),  # the last two steps are not validated
        ({"max_epochs": 2, "val_check_interval": 3}, [3, 6, 9, 12]),
        ({"max_epochs": 11, "check_val_every_n_epoch": 3}, [18, 36, 54]),
        ({"max_steps": 40, "check_val_every_n_epoch": None, "val_check_interval": 8}, [8, 16, 24, 32, 40]),
    ],
)
def test_it_looks_at_every_validated_model_and_at_no_other(
    tmp_path: Path, options: dict[str, Any], steps: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[int] = []
    monkeypatch.setattr(Trainer, "save_checkpoint", lambda trainer, *_: saved.append(trainer.global_step))
    trainer = quiet_trainer(tmp_path, callbacks=[best(tmp_path)], enable_checkpointing=True, **options)
    trainer.fit(Improving(), loader(), loader())
    assert saved == steps


def test_without_validation_it_goes_by_the_training(tmp_path: Path) -> None:
    keeps = best(tmp_path, monitor="loss")
    trainer = quiet_trainer(tmp_path, callbacks=[keeps], enable_checkpointing=True, max_steps=20)
    trainer.fit(LogsItsTraining(), loader())
    assert torch.load(tmp_path / "best.ckpt", weights_only=True)["global_step"] == 20


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_it_serves_another_run_and_remembers_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keeps = best(tmp_path)
    fit(tmp_path, keeps, 4)
    monkeypatch.setitem(VALUES, 1, 0.25)
    fit(tmp_path, keeps, 4)
    assert keeps.best_model_score == 0.25
    assert torch.load(keeps.best_model_path, weights_only=True)["global_step"] == 12


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_a_run_without_validation_may_follow_one_with(tmp_path: Path) -> None:
    keeps, saved = best(tmp_path, monitor="loss"), []
    for validation, epochs in ((loader(), 2), (None, 3)):
        trainer = quiet_trainer(tmp_path, callbacks=[keeps], enable_checkpointing=True, max_epochs=epochs)
        trainer.fit(LogsItsTraining(), loader(), validation)
        saved.append(torch.load(keeps.best_model_path, weights_only=True)["global_step"])
    assert saved == [12, 18]


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_a_run_that_goes_on_knows_its_best(tmp_path: Path) -> None:
    fit(tmp_path, best(tmp_path), 2)
    keeps = best(tmp_path)
    assert fit(tmp_path, keeps, 3, resume=True).global_step == 18  # its third epoch is worse
    assert keeps.best_model_score == VALUES[1]
    assert [path.name for path in tmp_path.glob("*.ckpt")] == ["best.ckpt"]
    assert torch.load(tmp_path / "best.ckpt", weights_only=True)["global_step"] == 12
