"""The private names of Lightning's that this package touches, each of which fails by name if Lightning moves it."""

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loops import evaluation_loop, fit_loop, loop, progress

from tests.doubles import RecordingVAE, loader, quiet_trainer


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """Look at a Trainer amid an epoch, where all of them are in use."""
    seen: dict[str, Any] = {}

    class Keeps(RecordingVAE):
        def on_train_batch_end(self, *args: Any) -> None:
            trainer = self.trainer
            seen.update({path: _holds(trainer, path) for path in NAMES})
            super().on_train_batch_end(*args)

    trainer = quiet_trainer(tmp_path_factory.mktemp("names"), max_steps=1)
    trainer.fit(Keeps(), loader(), loader())
    trainer.seen = seen
    return trainer


NAMES = (
    # exact_resume
    "lightning_module._trainer",
    "fit_loop._can_stop_early",
    "fit_loop._combined_loader",
    "fit_loop._combined_loader_states_to_load",
    "fit_loop._combined_loader._load_state_dicts",
    "fit_loop._data_fetcher",
    "fit_loop._should_accumulate",
    "fit_loop.epoch_loop._batches_that_stepped",
    "fit_loop.epoch_loop._num_ready_batches_reached",
    "fit_loop.epoch_loop._should_check_val_fx",
    "fit_loop.epoch_loop.batch_progress.is_last_batch",
    "fit_loop.epoch_loop.on_iteration_done",
    "fit_loop.epoch_loop.restarted_on_last",
    "fit_loop.epoch_loop.update_lr_schedulers",
    "fit_loop.epoch_loop.val_loop._has_run",
    "fit_loop.epoch_loop.val_loop._restart_stage",
    "fit_loop.epoch_loop.val_loop.restarted_mid_evaluation",
    "fit_loop.update_restart_stage",
    "_logger_connector._callback_metrics",
    # exact_resume and flush_loggers
    "_logger_connector.log_metrics",
    "_logger_connector.metrics",
    "_logger_connector.should_update_logs",
)


def _holds(owner: Any, path: str) -> bool:
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    return hasattr(owner, name)


@pytest.mark.parametrize("name", NAMES)
def test_a_trainer_has(name: str, trainer: Any) -> None:
    assert trainer.seen[name], f"Lightning has moved `trainer.{name}`"


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (evaluation_loop, "RestartStage.RESTARTED_MID_EVALUATION"),
        (fit_loop, "_FitLoop"),
        (loop, "_Loop.restarting.fset"),
        (progress, "_ProcessedTracker"),
        # last_checkpoint
        (ModelCheckpoint, "_every_n_epochs"),
        (ModelCheckpoint, "_monitor_candidates"),
        (ModelCheckpoint, "_save_topk_checkpoint"),
        (ModelCheckpoint, "_should_skip_saving_checkpoint"),
    ],
    ids=str,
)
def test_lightning_has(owner: Any, name: str, tmp_path: Path) -> None:
    owner = ModelCheckpoint(tmp_path) if owner is ModelCheckpoint else owner
    assert _holds(owner, name), f"Lightning has moved `{name}`"
