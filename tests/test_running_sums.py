"""The means of a run's training terms, and the sums behind them."""

from collections import defaultdict

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from lightning_vae import VAE
from lightning_vae.running_sums import RunningSums
from tests.image_vae import LEVELS, SHAPE, loader, rows, small, trainer


def test_training_terms_are_means_since_they_were_last_logged(tmp_path):
    losses = defaultdict(list)

    class Recorder(VAE):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            losses[self.current_epoch].append((loss.item(), len(batch["x"])))
            return loss

        def on_train_epoch_end(self):
            super().on_train_epoch_end()
            seen = losses[self.current_epoch]
            expected = sum(value * count for value, count in seen) / sum(count for _, count in seen)
            assert self.trainer.callback_metrics["train/loss"] == pytest.approx(expected, rel=1e-5)

    logger = CSVLogger(tmp_path, name="run", version=0)
    trainer(tmp_path, max_epochs=3, logger=logger, log_every_n_steps=4).fit(
        Recorder(SHAPE, LEVELS, latent_dim=3), loader()
    )

    flat = [entry for epoch in range(3) for entry in losses[epoch]]  # 15 batches of 16, 16, 16, 16, 6
    logged = [(int(row["step"]), float(row["train/loss"])) for row in rows(tmp_path / "run" / "version_0")]
    assert [step for step, _ in logged] == [3, 7, 11]
    for start, (_, value) in zip((0, 4, 8), logged, strict=True):
        window = flat[start : start + 4]
        expected = sum(loss * count for loss, count in window) / sum(count for _, count in window)
        assert value == pytest.approx(expected, rel=1e-5)


def test_an_epoch_mean_can_be_monitored(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, monitor="train/elbo", mode="max", save_on_train_epoch_end=True)
    trainer(tmp_path, callbacks=[checkpoint], enable_checkpointing=True, log_every_n_steps=1000).fit(small(), loader())
    assert checkpoint.best_model_score is not None


def test_running_sums_are_those_of_all_batches_however_they_are_asked_for() -> None:
    values = torch.rand(150, 2, generator=torch.Generator().manual_seed(0))
    sums = RunningSums(2)
    for number, row in enumerate(values):
        sums.add(row, count=number)
        if number in (10, 70):
            copy = RunningSums(2)
            copy.load(sums.state())
            sums = copy
        if number == 99:
            torch.testing.assert_close(sums.epoch(), torch.cat([values[:100].sum(0), torch.tensor([4950.0])]))
    assert sums.first_not_finite() is None
    torch.testing.assert_close(sums.flush(), torch.cat([values.sum(0), torch.tensor([11175.0])]))
    torch.testing.assert_close(sums.epoch(), torch.cat([values[100:].sum(0), torch.tensor([6225.0])]))
