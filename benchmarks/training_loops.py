"""The training loops that `speed.py` compares: each trains the same VAE and returns the seconds of one epoch."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

from lightning_vae import (
    VAE,
    AtomicCheckpointIO,
    FlushLoggers,
    LastCheckpoint,
)
from lightning_vae.callbacks import CollapseDetector, FreeBits, KLAnnealing, Linear
from lightning_vae.datamodules.base import DataModule

FREE_BITS = 0.05


class Clock:
    """Time a fit: its epochs with their validation and saving, without the setup before them."""

    def on_train_start(self) -> None:
        self.started = time.perf_counter()

    def on_train_end(self) -> None:
        self.seconds = time.perf_counter() - self.started


class TimedVAE(Clock, VAE):
    """The VAE of this package, timed."""


@dataclass(frozen=True)
class Case:
    """A model, its data and the length of its training."""

    data: DataModule
    model: Callable[..., TimedVAE]  # called with the data's shape and levels, and options
    epochs: int = 1
    log_every_n_steps: int = 50
    keep_every_n_epochs: int = 1

    def module(self, **options: Any) -> TimedVAE:
        """Make a new model."""
        return self.model(self.data.shape, self.data.levels, **options)

    @property
    def steps(self) -> int:
        """Number of steps in one epoch."""
        return len(self.data.train_dataloader())


def whole_stack(
    case: Case,
    saves: bool = True,
    watch: Sequence[pl.Callback] = (),
    **options: Any,
) -> float:
    """Train with everything that `configs/digits.yaml` and the command line add, except the callbacks that draw."""
    every = case.keep_every_n_epochs
    best = ModelCheckpoint(monitor="val/loss", filename="best")
    checkpoints = [best, LastCheckpoint(every_n_epochs=every)]
    callbacks = [
        KLAnnealing(Linear(fraction=0.3)),
        FreeBits(FREE_BITS),
        CollapseDetector(),
        TQDMProgressBar(refresh_rate=20),
        FlushLoggers(),
        *(checkpoints if saves else []),
        *watch,
    ]
    options |= {"enable_checkpointing": saves, "plugins": [AtomicCheckpointIO()]}
    with tempfile.TemporaryDirectory() as folder:
        logger = TensorBoardLogger(folder, default_hp_metric=False)
        return fit(case, case.module(), *loaders(case), logger=logger, callbacks=callbacks, **options)


def bare_trainer(case: Case) -> float:
    """Train the same module with a bare Trainer."""
    off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar"), False)
    return fit(case, case.module(free_bits=FREE_BITS), *loaders(case), **off)


def default_trainer(case: Case) -> float:
    """Train the same module with the Trainer's defaults: TensorBoard, a progress bar, a checkpoint an epoch."""
    with tempfile.TemporaryDirectory() as folder:
        # Named, because Lightning picks another bar where `rich` is installed.
        options = {"default_root_dir": folder, "callbacks": [TQDMProgressBar()]}
        return fit(case, case.module(free_bits=FREE_BITS), *loaders(case), **options)


def loaders(case: Case) -> tuple[Iterable[Any], Iterable[Any]]:
    return case.data.train_dataloader(), case.data.val_dataloader()


def fit(case: Case, module: Any, train: Iterable[Any], val: Iterable[Any], **options: Any) -> float:
    options = {"log_every_n_steps": case.log_every_n_steps} | options
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere), contextlib.redirect_stdout(nowhere):
        trainer = pl.Trainer(
            max_epochs=case.epochs, accelerator="cpu", num_sanity_val_steps=0, enable_model_summary=False, **options
        )
        trainer.fit(module, train, val)
    return float(module.seconds) / case.epochs


def hand_written_loop(case: Case, fused: bool = True) -> float:
    """Train in a plain loop on the tensors behind our loader, with fused Adam or torch's default."""
    train, val = (case.data._splits[name]["x"] for name in ("train", "val"))
    scale, size = case.data.levels - 1, case.data.batch_size
    return by_hand(
        case,
        lambda: (train[index].float() / scale for index in torch.randperm(len(train)).split(size)),
        lambda: (x.float() / scale for x in val.split(size)),
        fused,
    )


def loop_over_data_loader(case: Case) -> float:
    """Train in a plain loop on torch's DataLoader over torchvision's data set."""
    train, val = per_image(case)
    return by_hand(case, lambda: (x for x, _ in train), lambda: (x for x, _ in val))


def by_hand(
    case: Case, train: Callable[[], Iterable[Tensor]], val: Callable[[], Iterable[Tensor]], fused: bool = False
) -> float:
    """Train as one would without this package, on images in [0, 1] and with the same loss."""
    vae = case.module()
    optimizer = torch.optim.Adam(vae.parameters(), lr=1e-3, fused=fused)
    started, steps = time.perf_counter(), 0
    for _ in range(case.epochs):
        for x in train():
            distortion, rates = terms(vae, x)
            loss = distortion + min(1, steps / 1000) * rates.clamp(min=FREE_BITS).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            steps += 1
        with torch.no_grad():
            sum(float(distortion + rates.sum()) for distortion, rates in (terms(vae, x) for x in val()))
    return (time.perf_counter() - started) / case.epochs


def terms(networks: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the distortion and the rate of each dimension in nats, averaged over the batch."""
    x = torch.bernoulli(x)
    mean, log_variance = networks.encoder(x)
    logits = networks.decoder(mean + (0.5 * log_variance).exp() * torch.randn_like(mean))
    distortion = F.binary_cross_entropy_with_logits(logits, x, reduction="sum") / len(x)
    return distortion, 0.5 * (mean.square() + log_variance.exp() - log_variance - 1).mean(0)


class PerImage(datasets.FashionMNIST):
    """torchvision's Fashion-MNIST, one tensor per image, over images that are already in memory."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        datasets.VisionDataset.__init__(self, transform=transforms.ToTensor())
        self.data, self.targets = images.squeeze(1), labels


def per_image(case: Case) -> tuple[DataLoader[Any], DataLoader[Any]]:
    splits = (case.data._splits[name] for name in ("train", "val"))
    train, val = (PerImage(split["x"], split["label"]) for split in splits)
    return DataLoader(train, case.data.batch_size, shuffle=True), DataLoader(val, case.data.batch_size)


class TypicalVAE(Clock, pl.LightningModule):
    """A VAE as usually written for Lightning, which logs its terms at each step."""

    def __init__(self, networks: VAE) -> None:
        super().__init__()
        self.encoder, self.decoder = networks.encoder, networks.decoder

    def training_step(self, batch: Any) -> Tensor:
        return self.step(batch, "train")

    def validation_step(self, batch: Any) -> Tensor:
        return self.step(batch, "val")

    def step(self, batch: Any, prefix: str) -> Tensor:
        distortion, rates = terms(self, batch[0])
        loss = distortion + rates.sum()
        self.log_dict(
            {f"{prefix}_loss": loss, f"{prefix}_reconstruction": distortion, f"{prefix}_kl": rates.sum()},
            on_step=prefix == "train",
            on_epoch=True,
            prog_bar=True,
        )
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


class Annealing(pl.Callback):
    """KL annealing as usually written: set the weight at each step and log it."""

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        pl_module.beta = min(1.0, trainer.global_step / 1000)
        pl_module.log("beta", pl_module.beta)


def typical_lightning(case: Case) -> float:
    """Train a typical VAE with the Trainer's defaults: TensorBoard, a progress bar and a checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        return fit(case, TypicalVAE(case.module()), *per_image(case), default_root_dir=folder, callbacks=[Annealing()])


def pythae(case: Case) -> float:
    """Train with pythae's BaseTrainer, which does not binarise: one operation fewer per step."""
    from pythae.data.datasets import BaseDataset
    from pythae.models import VAE as PythaeVAE  # noqa: N811
    from pythae.models import VAEConfig
    from pythae.models.base.base_utils import ModelOutput
    from pythae.models.nn import BaseDecoder, BaseEncoder
    from pythae.trainers import BaseTrainer, BaseTrainerConfig
    from pythae.trainers.training_callbacks import TrainingCallback

    networks = case.module()

    class Encoder(BaseEncoder):
        def __init__(self) -> None:
            super().__init__()
            self.latent_dim, self.layers = networks.latent_dim, networks.encoder

        def forward(self, x: Tensor) -> Any:
            mean, log_variance = self.layers(x)
            return ModelOutput(embedding=mean, log_covariance=log_variance)

    class Decoder(BaseDecoder):
        def __init__(self) -> None:
            super().__init__()
            self.layers = networks.decoder

        def forward(self, z: Tensor) -> Any:
            return ModelOutput(reconstruction=self.layers(z).sigmoid())

    class Timer(Clock, TrainingCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.on_train_start()

        def on_train_end(self, *_: Any, **__: Any) -> None:
            super().on_train_end()

    config = VAEConfig(networks.shape, networks.latent_dim, reconstruction_loss="bce")
    splits = (case.data._splits[name] for name in ("train", "val"))
    train, val = (BaseDataset(split["x"] / (case.data.levels - 1), split["label"]) for split in splits)
    timer, size = Timer(), case.data.batch_size
    with (
        tempfile.TemporaryDirectory() as folder,
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stderr(nowhere),
        contextlib.redirect_stdout(nowhere),
    ):
        BaseTrainer(
            PythaeVAE(config, Encoder(), Decoder()),
            train,
            val,
            BaseTrainerConfig(
                folder,
                num_epochs=case.epochs,
                learning_rate=1e-3,
                per_device_train_batch_size=size,
                per_device_eval_batch_size=size,
                no_cuda=True,
            ),
            callbacks=[timer],
        ).train()
    return timer.seconds / case.epochs
