"""A VAE of images of four by four pixels, data for it, and encoders of one's own."""

import csv
import math

import torch
from torch import distributions as td
from torch import nn

from lightning_vae import VAE
from lightning_vae.datamodules import TensorLoader
from tests.doubles import quiet_trainer

SHAPE, LEVELS = (1, 4, 4), 17


def images(n=70, shape=SHAPE, levels=LEVELS):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, levels, (n, *shape), generator=generator, dtype=torch.uint8)


def loader(n=70, batch_size=16, **options):
    return TensorLoader({"x": images(n), "label": torch.arange(n) % 3}, batch_size=batch_size, **options)


def trainer(tmp_path, **options):
    return quiet_trainer(tmp_path, **{"max_epochs": 2, **options})


def small(**options):
    return VAE(**{"shape": SHAPE, "levels": LEVELS, "latent_dim": 3, **options})


class OwnEncoder(nn.Module):
    def __init__(self, shape, latent_dim, width=8):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(math.prod(shape), width), nn.Tanh(), nn.Linear(width, 2 * latent_dim)
        )

    def forward(self, x):
        return self.layers(x)


class LaplaceEncoder(OwnEncoder):
    def forward(self, x):
        loc, log_scale = self.layers(x).chunk(2, 1)
        return td.Laplace(loc, log_scale.exp())


def small_like(vae):
    """The same networks behind data that are scaled already."""
    other = VAE(SHAPE, latent_dim=3)
    other.load_state_dict(vae.state_dict())
    return lambda x: other.encode(x).mean


def rows(path):
    with open(path / "metrics.csv") as file:
        return list(csv.DictReader(file))


def fitted(tmp_path, vae):
    run = trainer(tmp_path, max_epochs=1)
    run.fit(vae, loader())
    run.save_checkpoint(tmp_path / "vae.ckpt")
    return tmp_path / "vae.ckpt"
