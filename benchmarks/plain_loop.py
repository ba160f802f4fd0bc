"""Train the same model with our stack and with a plain loop, and compare their ELBO."""

from __future__ import annotations

import argparse
import math
from itertools import pairwise
from statistics import median
from typing import Any, NamedTuple

import torch
from runs import SEEDS, header, heading, quiet_trainer, row
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from lightning_vae import VAE, Gaussian, MLPDecoder, MLPEncoder
from lightning_vae.datamodules import Digits, FashionMNIST
from lightning_vae.datamodules.base import DataModule

WIDTHS = (28, 8, 8, 24, 24, 6)
DRAWS = 30_000  # binarisations and posterior samples in one evaluation: its own noise stays below 0.05 nats


class Case(NamedTuple):
    """A model, its data and the length of its training."""

    name: str
    data: DataModule
    epochs: int
    latent_dim: int
    hidden: tuple[int, ...]
    gaussian: bool


def mlp(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for previous, current in pairwise(widths):
        layers += [nn.Linear(previous, current), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def by_hand(case: Case, images: Tensor, seed: int) -> tuple[nn.Module, nn.Module, Tensor]:
    """Train as one would without this package, on images in [0, 1] of shape ``(N, d)``."""
    torch.manual_seed(seed)
    size = images.shape[1]
    encoder = mlp(size, *case.hidden, 2 * case.latent_dim)
    decoder = mlp(case.latent_dim, *case.hidden, size)
    log_variance_x = nn.Parameter(torch.tensor(math.inf))
    parameters = [*encoder.parameters(), *decoder.parameters(), *([log_variance_x] if case.gaussian else [])]
    optimizer = torch.optim.Adam(parameters, lr=1e-3)
    decay = falling(optimizer, case, len(images))
    for _ in range(case.epochs):
        for batch in torch.randperm(len(images)).split(case.data.batch_size):
            x = images[batch]
            if not case.gaussian:
                x = torch.bernoulli(x)
            mean, log_variance = encoder(x).chunk(2, dim=1)
            output = decoder(mean + (0.5 * log_variance).exp() * torch.randn_like(mean))
            if log_variance_x.isinf():  # initialised like ours
                log_variance_x.data = (0.1 * (x - output).square().mean()).log().detach()
            if case.gaussian:
                error = (x - output).square() / log_variance_x.exp() + log_variance_x + math.log(2 * math.pi)
                distortion = 0.5 * error.sum(1)
            else:
                distortion = F.binary_cross_entropy_with_logits(output, x, reduction="none").sum(1)
            rate = 0.5 * (mean.square() + log_variance.exp() - log_variance - 1).sum(1)
            loss = (distortion + rate).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            decay.step()
    return encoder, decoder, log_variance_x


def falling(optimizer: torch.optim.Optimizer, case: Case, images: int) -> torch.optim.lr_scheduler.LambdaLR:
    """Let the learning rate fall to 0, so that noise of the last steps does not decide the comparison."""
    steps = case.epochs * math.ceil(images / case.data.batch_size)
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)


class Ours(VAE):
    """The VAE with the loop's optimizer."""

    case: Case

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=1e-3)
        images = len(self.case.data.train_dataloader().tensors["x"])
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": falling(optimizer, self.case, images), "interval": "step"},
        }


def make(case: Case) -> Ours:
    vae = Ours(
        case.data.shape,
        case.data.levels,
        case.latent_dim,
        encoder=lambda shape, k: MLPEncoder(shape, k, case.hidden),
        decoder=lambda k, shape: MLPDecoder(k, shape, case.hidden),
        likelihood=Gaussian if case.gaussian else None,
    )
    vae.case = case
    return vae


def ours(case: Case, seed: int) -> VAE:
    torch.manual_seed(seed)
    vae = make(case)
    quiet_trainer(case.epochs).fit(vae, case.data)
    return vae


def filled(case: Case, encoder: nn.Module, decoder: nn.Module, log_variance: Tensor) -> VAE:
    """Load the plain loop's weights into our model, so that the same code evaluates both."""
    vae = make(case)
    vae.encoder.layers.load_state_dict(encoder.state_dict())
    vae.decoder.layers.load_state_dict(decoder.state_dict())
    if case.gaussian:
        vae.likelihood.log_variance.data.copy_(log_variance)
    return vae


@torch.no_grad()
def negative_elbo(vae: VAE, data: DataModule) -> float:
    """Compute the mean over the validation split, with many draws per image, the same for every model."""
    vae.eval()
    batches = list(data.val_dataloader())
    images = sum(len(batch["x"]) for batch in batches)
    losses = [
        -vae.elbo_terms(batch["x"], batch["index"] + draw * images).elbo
        for draw in range(max(1, DRAWS // images))
        for batch in batches
    ]
    return float(torch.cat(losses).double().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", default="data", help="folder of Fashion-MNIST, as in the data module")
    root = parser.parse_args().root
    heading(
        "Plain loop. -ELBO of the validation split in nats per image, trained by our stack (Trainer, VAE, data module) "
        "and by a plain loop. Both have the same networks, initial weights, number of steps, batch size and "
        "Adam, with a learning rate that falls from 1e-3 to 0; order of the data, binarisation and samples differ. "
        "60 epochs of digits, 5 of Fashion-MNIST; seeds 0, 1, 2 and their median. `worse` is the relative excess of "
        "ours over the loop's."
    )
    header(("data, likelihood", "ours", "loop", "ours by seed", "loop by seed", "worse"), WIDTHS)
    for case in (
        Case("digits, Bernoulli", Digits(batch_size=64), 60, 16, (256, 256), gaussian=False),
        Case("digits, Gaussian", Digits(batch_size=64), 60, 16, (256, 256), gaussian=True),
        Case("Fashion-MNIST, Bernoulli", FashionMNIST(root), 5, 20, (400,), gaussian=False),
        Case("Fashion-MNIST, Gaussian", FashionMNIST(root), 5, 20, (400,), gaussian=True),
    ):
        case.data.prepare_data()
        case.data.setup("fit")
        batches = [batch["x"] for batch in case.data.train_dataloader()]
        images = torch.cat(batches).flatten(1).float() / (case.data.levels - 1)
        by_loop = [negative_elbo(filled(case, *by_hand(case, images, seed)), case.data) for seed in SEEDS]
        by_us = [negative_elbo(ours(case, seed), case.data) for seed in SEEDS]
        us, loop = median(by_us), median(by_loop)
        seeds = (" ".join(f"{value:.2f}" for value in values) for values in (by_us, by_loop))
        row((case.name, us, loop, *seeds, f"{(us - loop) / abs(loop):+.2%}"), WIDTHS)


if __name__ == "__main__":
    main()
