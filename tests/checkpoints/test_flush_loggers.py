"""Curves that are on the disk before a checkpoint is."""

import time
import warnings
from pathlib import Path

import pytest
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins import TorchCheckpointIO
from tensorboard.summary.writer.record_writer import RecordWriter

from lightning_vae.checkpoints.flush_loggers import FlushLoggers
from tests.cli.test_vae_cli import scalars
from tests.doubles import RecordingVAE, loader, quiet_trainer

pytestmark = pytest.mark.usefixtures("own_folder")


class LogsEpochs(RecordingVAE):
    def on_train_epoch_end(self):
        super().on_train_epoch_end()
        self.log("epoch/end", 1.0)


class SavesEarly(Callback):
    def on_train_epoch_end(self, trainer, pl_module):
        trainer.save_checkpoint("early.ckpt")


@pytest.mark.parametrize("early", [[], [SavesEarly()]])
def test_the_curves_are_on_the_disk_before_a_checkpoint_is(tmp_path, early, monkeypatch):
    seen = []
    write = RecordWriter.write
    monkeypatch.setattr(RecordWriter, "write", lambda *args: (time.sleep(0.01), write(*args)))  # lags behind

    class Looks(TorchCheckpointIO):
        def save_checkpoint(self, checkpoint, path, storage_options=None):
            seen.append(
                [[step for step, _ in scalars(tmp_path / "a").get(tag, [])] for tag in ("train/loss", "epoch/end")]
            )
            super().save_checkpoint(checkpoint, path, storage_options)

    trainer = Trainer(accelerator="cpu", logger=TensorBoardLogger(tmp_path, "", "a"), max_epochs=2, log_every_n_steps=2,
                      callbacks=[*early, FlushLoggers(), ModelCheckpoint(tmp_path / "checkpoints", save_last=True)],
                      plugins=[Looks()], enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*num_workers")
        trainer.fit(LogsEpochs(), loader())
    assert seen[-1] == [[1, 3, 5, 7, 9, 11], [5] if early else [5, 11]]
    assert [step for step, _ in scalars(tmp_path / "a")["epoch/end"]] == [5, 11]


def test_a_fit_after_one_that_failed_at_an_epochs_end_logs_as_any_other(tmp_path: Path) -> None:
    """The replacement of Lightning's logging at an epoch's end is removed with the run."""

    class Fails(Callback):
        def on_save_checkpoint(self, *_: object) -> None:
            raise OSError("no space")

    saves = ModelCheckpoint(tmp_path, every_n_epochs=1, save_on_train_epoch_end=True)
    trainer = quiet_trainer(
        tmp_path, callbacks=[FlushLoggers(), saves, Fails()], max_epochs=2, enable_checkpointing=True
    )
    for _ in range(2):
        with pytest.raises(OSError, match="no space"):
            trainer.fit(RecordingVAE(), loader())
    assert "log_metrics" not in vars(trainer._logger_connector)
