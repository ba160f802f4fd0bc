"""Tiny stand-ins that several test modules share."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer, callbacks
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_vae import VAE, Bernoulli, Gaussian, LinearDecoder, LinearEncoder
from lightning_vae.datamodules import Digits
from lightning_vae.datamodules.loaders.tensor_loader import TensorLoader


def loader(rows: int = 12, batch_size: int = 2, width: int = 2) -> DataLoader[Tensor]:
    """Always the same rows, in the same order."""
    data = torch.randn(rows, width, generator=torch.Generator().manual_seed(0))
    # A generator of its own: the start of a pass draws a number, which must not come out of the training's.
    return DataLoader(list(data), batch_size=batch_size, generator=torch.Generator())  # type: ignore[arg-type]


def quiet_trainer(root: Path, **options: Any) -> Trainer:
    """A Trainer on the CPU that prints and writes nothing unless asked to."""
    quiet = {"logger": False, "enable_checkpointing": False, "accelerator": "cpu", "devices": 1}
    return Trainer(default_root_dir=root, enable_progress_bar=False, enable_model_summary=False, **{**quiet, **options})


class ForeignModule(LightningModule):
    """Somebody else's module: it keeps a float that weights its loss, and records what it was at each batch."""

    def __init__(self, beta: float = 1.0, optimizers: int = 1) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layer = nn.Linear(2, 1)
        self.beta = beta
        self.count = optimizers
        self.automatic_optimization = optimizers == 1
        self.used: list[float] = []
        self.validated: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.used.append(float(self.beta))
        loss: Tensor = self.layer(batch).square().mean() * float(self.beta)
        if not self.automatic_optimization:
            self.manual_backward(loss)
            for optimizer in self.optimizers():  # type: ignore[union-attr]
                optimizer.step()
                optimizer.zero_grad()
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.validated.append(float(self.beta))
        self.log("val_loss", self.layer(batch).square().mean() * float(self.beta), batch_size=len(batch))

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.parameters(), 0.01) for _ in range(self.count)]


class RecordingVAE(VAE):
    """A linear VAE on vectors of two, which records the knobs at each training batch."""

    def __init__(self, shape: tuple[int, ...] = (2,), **options: Any) -> None:
        parts = {
            "latent_dim": 2,
            "encoder": LinearEncoder,
            "decoder": LinearDecoder,
            "likelihood": partial(Gaussian, variance=0.5),
        }
        super().__init__(shape, **{**parts, **options})
        self.used: list[tuple[float, float]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.used.append((float(self.beta), float(self.free_bits)))
        return super().training_step(batch, batch_idx)


def optimal_linear_vae(
    x: Tensor, latent_dim: int, variance: float, beta: float = 1.0, trained_variance: float | None = None, **parts: Any
) -> VAE:
    """The linear VAE at its closed-form optimum on centred data x, in float64, without training.

    `trained_variance` is the variance of the likelihood that it is optimal for, where that is not the one it has.
    """
    level = beta * (trained_variance or variance)
    eigenvalues, directions = torch.linalg.eigh(x.double().T @ x.double() / len(x))
    eigenvalues, directions = eigenvalues.flip(0)[:latent_dim], directions.flip(1)[:, :latent_dim]
    signal = (eigenvalues - level).clamp(min=0).sqrt()
    vae = VAE(
        (x.shape[1],),
        latent_dim=latent_dim,
        encoder=LinearEncoder,
        decoder=LinearDecoder,
        likelihood=partial(Gaussian, variance=variance),
        beta=beta,
        **parts,
    ).double()
    with torch.no_grad():
        vae.decoder.map.weight.copy_(directions * signal)
        vae.decoder.map.bias.zero_()
        vae.encoder.mean.weight.copy_((directions * signal / eigenvalues).T)
        vae.encoder.mean.bias.zero_()
        vae.encoder.log_variance.copy_((level / eigenvalues).clamp(max=1).log())
    return vae


def digits(size: int = 297, batch_size: int = 64) -> TensorLoader:
    """The test digits in batches."""
    data = Digits()
    data.setup("test")
    return TensorLoader({name: rows[:size] for name, rows in data._splits["test"].items()}, batch_size=batch_size)


def small_vae(likelihood: Any = Bernoulli, **options: Any) -> VAE:
    """An untrained VAE of digits with three latent dimensions, in float64."""
    torch.manual_seed(1)
    return VAE((1, 8, 8), 17, **{"latent_dim": 3, **options}, likelihood=likelihood).double()


def weight_averaging(**options: Any) -> Any:
    """Lightning's EMAWeightAveraging, which begins with 2.6."""
    if not hasattr(callbacks, "EMAWeightAveraging"):
        pytest.skip("weight averaging begins with Lightning 2.6")
    return callbacks.EMAWeightAveraging(**options)
