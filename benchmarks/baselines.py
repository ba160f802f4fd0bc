"""Compare a trained VAE with exact probabilistic PCA and with each pixel's mean."""

from __future__ import annotations

import argparse
import math
from functools import partial
from statistics import median

import torch
from runs import SEEDS, header, heading, quiet_trainer, row
from torch import Tensor

from lightning_vae import VAE, Gaussian, MLPDecoder, MLPEncoder
from lightning_vae.datamodules import Digits, FashionMNIST
from lightning_vae.datamodules.base import DataModule

LATENT_DIM = 10
WIDTHS = (14, 17, 14, 9, 9, 27, 7)


def ppca(train: Tensor, test: Tensor, k: int) -> float:
    """Compute the mean NLL of the test split under the training split's best pPCA (Tipping and Bishop 1999)."""
    mean = train.mean(0)
    values, vectors = torch.linalg.eigh(torch.cov(train.T, correction=0))
    variance = values[:-k].mean()
    own = torch.cat(
        [torch.full_like(values[:-k], float(variance)), values[-k:]]
    )  # eigenvalues of the model's covariance
    squares = ((test - mean) @ vectors).square() / own
    return float(0.5 * (squares.sum(1).mean() + own.log().sum() + len(own) * math.log(2 * math.pi)))


def pixel_means(train: Tensor, test: Tensor) -> float:
    """Compute the expected NLL of the binarised test split under independent pixels with the training means."""
    on = train.mean(0).clamp(1e-4, 1 - 1e-4)
    return float(-(test * on.log() + (1 - test) * (1 - on).log()).sum(1).mean())


@torch.no_grad()
def negative_elbo(vae: VAE, data: DataModule) -> float:
    data.setup("test")
    vae.eval()
    losses = [-vae.elbo_terms(batch["x"], batch["index"]).elbo for batch in data.test_dataloader()]
    return float(torch.cat(losses).double().mean())


def train(data: DataModule, epochs: int, gaussian: bool, seed: int) -> VAE:
    torch.manual_seed(seed)
    networks = {"encoder": partial(MLPEncoder, hidden=(400,)), "decoder": partial(MLPDecoder, hidden=(400,))}
    vae = VAE(data.shape, data.levels, LATENT_DIM, **networks, likelihood=Gaussian if gaussian else None)
    quiet_trainer(epochs).fit(vae, data)
    return vae


def images(data: DataModule) -> tuple[Tensor, Tensor]:
    """Return all official training images, including those kept for validation, and the test images."""
    data.prepare_data()
    data.setup("fit")
    data.setup("test")
    parts = [[batch["x"] for batch in loader] for loader in (data.train_dataloader(), data.val_dataloader())]
    test = [batch["x"] for batch in data.test_dataloader()]
    return tuple(torch.cat(each).flatten(1).double() / (data.levels - 1) for each in (parts[0] + parts[1], test))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", default="data", help="folder of Fashion-MNIST, as in the data module")
    root = parser.parse_args().root
    heading(
        f"Baselines. -ELBO of our VAE ({LATENT_DIM} latents, MLP 400; 60 epochs of digits, 5 of Fashion-MNIST) on the "
        f"test split, against the exact NLL of two baselines: pPCA with {LATENT_DIM} latents for the Gaussian "
        "with learned variance, each pixel's mean (expectation under binarisation) for the Bernoulli. In nats per "
        "image, images in [0, 1]; seeds 0, 1, 2 and their median. The baselines are fitted to all training images, "
        "the VAE to nine tenths of them."
    )
    header(("data", "likelihood", "baseline", "its NLL", "our -ELBO", "by seed", "gain"), WIDTHS)
    for name, data, epochs in (("digits", Digits(batch_size=64), 60), ("Fashion-MNIST", FashionMNIST(root), 5)):
        training, test = images(data)
        for gaussian in (False, True):
            baseline = ppca(training, test, LATENT_DIM) if gaussian else pixel_means(training, test)
            seeds = [negative_elbo(train(data, epochs, gaussian, seed), data) for seed in SEEDS]
            labels = ("Gaussian, learned", "pPCA") if gaussian else ("Bernoulli", "pixel means")
            by_seed = " ".join(f"{value:.2f}" for value in seeds)
            row((name, *labels, baseline, median(seeds), by_seed, baseline - median(seeds)), WIDTHS)


if __name__ == "__main__":
    main()
