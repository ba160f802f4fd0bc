"""Stand-ins and readers that several tests of data modules share."""

import itertools
from typing import Any

import lightning.pytorch as pl
import torch

from lightning_vae.datamodules import DataModule


def whole(loader) -> dict[str, torch.Tensor]:
    batches = list(loader)
    return {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}


def ready(datamodule: DataModule, *stages: str):
    datamodule.prepare_data()
    for stage in stages or ("fit", "validate", "test", "predict"):
        datamodule.setup(stage)
    return datamodule


def splits(datamodule: DataModule) -> list[dict[str, torch.Tensor]]:
    loaders = (datamodule.train_dataloader(), datamodule.val_dataloader(), datamodule.test_dataloader())
    return [whole(loader) for loader in loaders]


class Watcher(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.epochs: list[list[int]] = []
        self.stages: dict[str, int] = {}

    def on_train_epoch_start(self):
        self.epochs.append([])

    def training_step(self, batch):
        self.epochs[-1] += batch["index"].tolist()
        return self.weight * batch["x"].float().sum()

    def count(self, stage, batch):
        self.stages[stage] = self.stages.get(stage, 0) + len(batch["x"])

    def validation_step(self, batch):
        self.count("val", batch)

    def test_step(self, batch):
        self.count("test", batch)

    def predict_step(self, batch):
        self.count("predict", batch)
        return batch["index"]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def trainer(**options) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def numbers(size: int) -> dict[str, torch.Tensor]:
    return {"x": torch.arange(size, dtype=torch.float32).view(-1, 1), "label": torch.arange(size) % 3}


def indices(loader) -> list[list[int]]:
    return [batch["index"].tolist() for batch in loader]


def flat(lists) -> list[Any]:
    return list(itertools.chain.from_iterable(lists))
