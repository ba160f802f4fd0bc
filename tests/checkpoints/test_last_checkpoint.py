"""When the newest checkpoint is saved."""

import pytest
import yaml
from lightning.pytorch import Trainer

from lightning_vae.checkpoints.last_checkpoint import LastCheckpoint
from tests.checkpoints.linear_run import ROOT
from tests.doubles import RecordingVAE, loader, quiet_trainer


@pytest.mark.parametrize(
    ("options", "steps"),
    [({"max_epochs": 5}, [12, 24, 30]), ({"max_epochs": 4}, [12, 24]), ({"max_steps": 20}, [12, 20]),
     ({"max_epochs": 5, "limit_val_batches": 0}, [12, 24, 30]), ({"max_epochs": 2, "val_check_interval": 3}, [9, 12]),
     ({"max_epochs": 3, "val_check_interval": 4}, [10, 12, 16, 18]),
     ({"max_epochs": 5, "check_val_every_n_epoch": 3}, [12, 24, 30])],
)  # fmt: skip
def test_the_newest_is_kept_in_every_so_many_epochs_and_at_the_end(tmp_path, monkeypatch, options, steps):
    saved = []
    monkeypatch.setattr(Trainer, "save_checkpoint", lambda trainer, *_: saved.append(trainer.global_step))
    trainer = quiet_trainer(tmp_path, callbacks=[LastCheckpoint(every_n_epochs=2)], enable_checkpointing=True,
                            num_sanity_val_steps=0, **options)  # fmt: skip
    trainer.fit(RecordingVAE(), loader(), loader())
    assert saved == steps


def test_a_number_of_epochs_that_is_none_is_refused():
    with pytest.raises(ValueError, match="`every_n_epochs` must be at least 1, got 0"):
        LastCheckpoint(every_n_epochs=0)


@pytest.mark.parametrize("config", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_keeps_the_newest(config):
    callbacks = yaml.safe_load(config.read_text())["trainer"]["callbacks"]
    assert "LastCheckpoint" in [callback["class_path"] for callback in callbacks]
