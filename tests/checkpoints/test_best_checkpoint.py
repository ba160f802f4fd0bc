"""The best model is the one that Lightning's own callback keeps."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_vae import BestCheckpoint
from tests.doubles import loader, quiet_trainer

VALUES = [3.0, 1.0, 2.0, 0.5, 4.0]


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


def fit(root: Path, keeps: ModelCheckpoint, epochs: int, resume: bool = False) -> Trainer:
    trainer = quiet_trainer(root, callbacks=[keeps], max_epochs=epochs, enable_checkpointing=True)
    trainer.fit(Varying(), loader(), loader(), ckpt_path=root / "best.ckpt" if resume else None)
    return trainer


@pytest.mark.parametrize(("mode", "epoch"), [("min", 4), ("max", 5)])
def test_it_keeps_what_lightnings_keeps(tmp_path: Path, mode: str, epoch: int) -> None:
    ours = BestCheckpoint(tmp_path / "ours", mode=mode)  # type: ignore[arg-type]
    theirs = ModelCheckpoint(tmp_path / "theirs", monitor="val/loss", filename="best", mode=mode)
    for keeps in (ours, theirs):
        fit(tmp_path, keeps, 5)
        assert [path.name for path in Path(str(keeps.dirpath)).iterdir()] == ["best.ckpt"]
        assert torch.load(keeps.best_model_path, weights_only=True)["global_step"] == epoch * 6
    assert ours.best_model_score == theirs.best_model_score == VALUES[epoch - 1]
    assert ours.state_key == theirs.state_key.replace("ModelCheckpoint", "BestCheckpoint")


class Improving(Varying):
    """Each of its validations is better than those before."""

    def validation_step(self, *_: object) -> None:
        self.log("val/loss", -1.0 * self.global_step)


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"max_epochs": 4}, [6, 12, 24]),  # the first, every second
        ({"max_epochs": 5}, [6, 12, 24, 30]),  # and the last
        ({"max_steps": 18}, [6, 12, 18]),
        ({"max_steps": 20}, [6, 12]),  # whose last steps are not validated
        ({"max_epochs": 3, "val_check_interval": 3}, [3, 6, 9, 12, 15, 18]),
        ({"max_epochs": 9, "check_val_every_n_epoch": 3}, [18, 36, 54]),
        ({"max_epochs": 11, "check_val_every_n_epoch": 3}, [18, 36, 54]),
        ({"max_steps": 40, "check_val_every_n_epoch": None, "val_check_interval": 8}, [8, 24, 32, 40]),
    ],
)
def test_it_looks_every_so_many_epochs(
    tmp_path: Path, options: dict[str, Any], steps: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[int] = []
    monkeypatch.setattr(Trainer, "save_checkpoint", lambda trainer, *_: saved.append(trainer.global_step))
    keeps = BestCheckpoint(tmp_path, every_n_epochs=2)
    assert keeps.every_n_epochs == 2
    quiet_trainer(tmp_path, callbacks=[keeps], enable_checkpointing=True, **options).fit(
        Improving(), loader(), loader()
    )
    assert saved == steps


def test_without_validation_it_goes_by_the_training(tmp_path: Path) -> None:
    class Logs(Varying):
        def training_step(self, *_: object) -> torch.Tensor:
            self.log("loss", self.weight, on_epoch=True)
            return self.weight - 1

    keeps = BestCheckpoint(tmp_path, monitor="loss", every_n_epochs=2)
    quiet_trainer(tmp_path, callbacks=[keeps], enable_checkpointing=True, max_steps=20).fit(Logs(), loader())
    assert torch.load(tmp_path / "best.ckpt", weights_only=True)["global_step"] == 20


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_it_serves_another_run(tmp_path: Path) -> None:
    """As Lightning's does, and with what it knows of the first."""
    keeps = BestCheckpoint(tmp_path)
    fit(tmp_path, keeps, 4)
    VALUES[1] = 0.25
    try:
        fit(tmp_path, keeps, 4)
    finally:
        VALUES[1] = 1.0
    assert keeps.best_model_score == 0.25
    assert torch.load(keeps.best_model_path, weights_only=True)["global_step"] == 12


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_a_run_without_validation_may_follow_one_with(tmp_path: Path) -> None:
    class Logs(Varying):
        def training_step(self, *_: object) -> torch.Tensor:
            self.log("loss", self.weight, on_epoch=True)
            return self.weight - 1

    keeps, saved = BestCheckpoint(tmp_path, monitor="loss"), []
    for validation, epochs in ((loader(), 2), (None, 3)):
        trainer = quiet_trainer(tmp_path, callbacks=[keeps], enable_checkpointing=True, max_epochs=epochs)
        trainer.fit(Logs(), loader(), validation)
        saved.append(keeps._last_global_step_saved)
        keeps.best_model_score = torch.tensor(torch.inf)
        keeps.best_k_models = dict.fromkeys(keeps.best_k_models, torch.tensor(torch.inf))
    assert saved == [12, 18]


def test_options_are_checked() -> None:
    with pytest.raises(ValueError, match="`every_n_epochs` must be at least 1, got 0"):
        BestCheckpoint(every_n_epochs=0)


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_a_run_that_goes_on_knows_its_best(tmp_path: Path) -> None:
    fit(tmp_path, BestCheckpoint(tmp_path), 2)
    keeps = BestCheckpoint(tmp_path)
    assert fit(tmp_path, keeps, 3, resume=True).global_step == 18  # its third epoch is worse
    assert keeps.best_model_score == VALUES[1]
    assert [path.name for path in tmp_path.glob("*.ckpt")] == ["best.ckpt"]
    assert torch.load(tmp_path / "best.ckpt", weights_only=True)["global_step"] == 12


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_a_run_that_goes_on_knows_when_it_looked(tmp_path: Path) -> None:
    fit(tmp_path, BestCheckpoint(tmp_path, every_n_epochs=3), 3)  # looks in its first and third
    keeps = BestCheckpoint(tmp_path, every_n_epochs=3)
    keeps.load_state_dict(torch.load(tmp_path / "best.ckpt", weights_only=True)["callbacks"][keeps.state_key])
    assert keeps.state_dict()["looked"] == 3
