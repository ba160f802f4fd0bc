"""Measure memory and time as observations grow, and the seconds from import to the first step."""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from runs import header, heading, row
from torch.distributions import Normal

from lightning_vae.callbacks import ActiveUnits, LatentMonitor
from lightning_vae.callbacks.metrics.aggregate_posterior import AggregatePosterior
from lightning_vae.callbacks.metrics.observation_subset import ObservationSubset
from lightning_vae.callbacks.metrics.running_moments import RunningMoments

WIDTHS = (34, 14, 16, 20)
ROWS = 4096  # in a batch
OURS = """
from pathlib import Path
from lightning_vae.main import main
main(["fit", "--config", "configs/digits.yaml", "--trainer.max_steps", "1", "--trainer.num_sanity_val_steps", "0",
      "--trainer.limit_val_batches", "0", "--trainer.default_root_dir", FOLDER])
"""
BARE = """
import torch
from torch import nn
import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

class Bare(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(),
                                     nn.Linear(256, 32))
        self.decoder = nn.Sequential(nn.Linear(16, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 64))

    def training_step(self, batch, batch_idx):
        x = torch.bernoulli(batch[0])
        mean, log_variance = self.encoder(x).chunk(2, -1)
        logits = self.decoder(mean + (0.5 * log_variance).exp() * torch.randn_like(mean))
        bce = nn.functional.binary_cross_entropy_with_logits(logits, x, reduction="none").sum(1)
        loss = (bce + 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).sum(1)).mean()
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-3)

x = torch.tensor(load_digits().data[:1350], dtype=torch.float32) / 16
trainer = pl.Trainer(max_steps=1, accelerator="cpu", logger=TensorBoardLogger(FOLDER), callbacks=[ModelCheckpoint()])
trainer.fit(Bare(), DataLoader(TensorDataset(x), batch_size=64, shuffle=True))
"""


def resident_mebibytes() -> float:
    """Return the resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


def watchers(dim: int) -> dict[str, Callable[[Normal, torch.Tensor], Any]]:
    """Return functions that take a batch of posteriors and its indices, by name."""
    units, subset, moments = ActiveUnits(dim), ObservationSubset(2 * dim, 2048), RunningMoments(dim)
    aggregate = AggregatePosterior(dim)
    detector, prior = LatentMonitor(2048), Normal(torch.zeros(dim), torch.ones(dim))
    return {
        "the detector's whole pass": lambda posterior, index: detector.update(posterior, prior, index=index),
        "active units": lambda posterior, _: units.update(posterior.mean),
        "the evaluation's running moments": lambda posterior, _: moments.update(posterior.mean),
        "mutual information": lambda posterior, index: subset.update(
            torch.cat([posterior.mean, posterior.variance], dim=1), index
        ),
        "the aggregate posterior": lambda posterior, _: aggregate.update(posterior.mean, posterior.variance),
    }


def growth(observations: int, dim: int) -> None:
    """Feed posteriors to each metric, and print memory and time after a tenth and at the end."""
    print()
    header(("posteriors", "observations", "resident, MiB", "us an observation"), WIDTHS)
    posterior = Normal(torch.randn(ROWS, dim), torch.rand(ROWS, dim) + 0.1, validate_args=False)
    for name, take in watchers(dim).items():
        done, started, before = 0, time.perf_counter(), 0
        for mark in (observations // 10, observations):
            while done < mark:
                take(posterior, torch.arange(done, done + ROWS))
                done += ROWS
            now = time.perf_counter()
            row((name, f"{done:,}", resident_mebibytes(), 1e6 * (now - started) / (done - before)), WIDTHS)
            started, before = now, done


def startup(rounds: int) -> None:
    """Run both scripts in turn, each in its own process."""
    taken: dict[str, list[float]] = {"train.py fit --config configs/digits.yaml": [], "bare Lightning": []}
    for _ in range(rounds):
        for name, script in zip(taken, (OURS, BARE), strict=True):
            with tempfile.TemporaryDirectory() as folder:
                started = time.perf_counter()
                source = f"FOLDER = {folder!r}\n{script}"
                subprocess.run([sys.executable, "-c", source], check=True, capture_output=True)
                taken[name].append(time.perf_counter() - started)
    header(("import to the end of step 1", "seconds", "of bare", "range"), WIDTHS)
    bare = taken["bare Lightning"]
    for name, seconds in taken.items():
        ratios = [own / base for own, base in zip(seconds, bare, strict=True)]
        row((name, median(seconds), median(ratios), f"{min(ratios):.2f} to {max(ratios):.2f}"), WIDTHS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--observations", type=int, default=10_000_000)
    parser.add_argument("--dim", type=int, default=512, help="latent dimensions")
    parser.add_argument("--rounds", type=int, default=5, help="how often each script starts; 0 for never")
    options = parser.parse_args()
    heading(
        f"Posteriors of {options.dim} dimensions, fed to each metric {ROWS} at a time; and the time of the digits "
        "example to its first step, compared with the same model written for bare Lightning."
    )
    if options.rounds:
        startup(options.rounds)
    if options.observations:
        growth(options.observations, options.dim)


if __name__ == "__main__":
    main()
