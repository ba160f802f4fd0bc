"""The best model is the one that Lightning's own callback keeps."""

from pathlib import Path

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


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"max_epochs": 4}, [12, 24]),
        ({"max_epochs": 3}, [12, 18]),  # the last epoch is the third
        ({"max_steps": 18}, [12, 18]),
        ({"max_epochs": 3, "val_check_interval": 3}, [9, 12, 15, 18]),
    ],
)
def test_it_looks_every_so_many_epochs_and_at_the_end(
    tmp_path: Path, options: dict[str, int], steps: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Varying, "validation_step", lambda self, *_: self.log("val/loss", -1.0 * self.global_step))
    saved: list[int] = []
    monkeypatch.setattr(Trainer, "save_checkpoint", lambda trainer, *_: saved.append(trainer.global_step))
    trainer = quiet_trainer(
        tmp_path, callbacks=[BestCheckpoint(tmp_path, every_n_epochs=2)], enable_checkpointing=True, **options
    )
    trainer.fit(Varying(), loader(), loader())
    assert saved == steps
    with pytest.raises(ValueError, match="`every_n_epochs` must be at least 1, got 0"):
        BestCheckpoint(every_n_epochs=0)


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_a_run_that_goes_on_knows_its_best(tmp_path: Path) -> None:
    fit(tmp_path, BestCheckpoint(tmp_path), 2)
    trainer = fit(tmp_path, BestCheckpoint(tmp_path), 3, resume=True)  # whose third epoch is worse
    assert trainer.global_step == 18
    assert torch.load(tmp_path / "best.ckpt", weights_only=True)["global_step"] == 12
