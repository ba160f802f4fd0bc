"""A logger whose files are those of Lightning's."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from lightning_vae import QuickTensorBoardLogger
from tests.doubles import loader, quiet_trainer


class Logs(LightningModule):
    """Logs of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)
        self.save_hyperparameters({"width": 2})

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss: Tensor = self.layer(batch).square().mean()
        self.log_dict({"loss": loss, "index": float(batch_idx), "none": torch.tensor(float("nan"))}, on_epoch=True)
        return loss

    def validation_step(self, batch: Tensor, _: int) -> None:
        self.log("val", self.layer(batch).mean())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def scalars(folder: str) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(folder, size_guidance={"scalars": 0}).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def values_in_events(folder: str) -> list[int]:
    [path] = Path(folder).glob("events*")
    return [len(event.summary.value) for event in EventFileLoader(str(path)).Load()][1:]  # the first says the format


def test_curves_and_options_are_those_of_lightnings(tmp_path: Path) -> None:
    quick, lightnings = (
        each(tmp_path / each.__name__, "runs", version=3, default_hp_metric=False)
        for each in (QuickTensorBoardLogger, TensorBoardLogger)
    )
    trainer = quiet_trainer(tmp_path, logger=[quick, lightnings], max_epochs=2, log_every_n_steps=2)
    trainer.fit(Logs(), loader(), loader())
    expected = scalars(lightnings.log_dir)
    assert set(expected) == {"loss_step", "loss_epoch", "index_step", "index_epoch", "none_step", "none_epoch",
                             "val", "epoch"}  # fmt: skip
    np.testing.assert_equal(scalars(quick.log_dir), expected)
    assert Path(quick.log_dir, "hparams.yaml").read_text() == Path(lightnings.log_dir, "hparams.yaml").read_text()
    assert values_in_events(lightnings.log_dir) == [1] * 36
    assert values_in_events(quick.log_dir) == [4, 4, 4, 2, 4] * 2  # steps; validation; epoch


def test_a_logging_step_waits_for_no_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushes: Counter[str] = Counter()
    flush = SummaryWriter.flush

    def counted(writer: SummaryWriter) -> None:
        flushes[Path(writer.log_dir).parts[-2]] += 1
        flush(writer)

    monkeypatch.setattr(SummaryWriter, "flush", counted)
    loggers = [QuickTensorBoardLogger(tmp_path, "quick"), TensorBoardLogger(tmp_path, "lightnings")]
    quiet_trainer(tmp_path, logger=loggers, max_epochs=3, log_every_n_steps=1).fit(Logs(), loader(), loader())
    assert flushes["lightnings"] > 18
    assert flushes["quick"] == 2  # when it begins, with what describes the run, and at the end


@pytest.mark.parametrize("options", [{}, {"prefix": "a"}])
@pytest.mark.parametrize("metrics", [{"x": 1, "y": torch.tensor(2.0)}, {"x": {"one": np.float32(1), "two": 2.0}}])
def test_prefixes_and_groups_are_as_lightnings(
    tmp_path: Path, options: dict[str, Any], metrics: dict[str, Any]
) -> None:
    found = []
    for each in (QuickTensorBoardLogger, TensorBoardLogger):
        logger = each(tmp_path / each.__name__, "", version="", **options)
        logger.log_metrics(metrics, 5)
        logger.finalize("success")
        found.append({str(path.parent.relative_to(logger.log_dir)): scalars(str(path.parent))
                      for path in Path(logger.log_dir).rglob("events*")})  # fmt: skip
    assert found[0] == found[1]
    assert [value for curves in found[0].values() for [(_, value)] in curves.values()] == [1, 2]


def test_what_is_no_number_is_refused_as_by_lightnings(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not supported"):
        QuickTensorBoardLogger(tmp_path).log_metrics({"x": "word"}, 0)
