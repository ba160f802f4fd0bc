"""Check TargetRate against the closed form, after thousands of steps with a target out of reach."""

from __future__ import annotations

import argparse
import logging
import math
import warnings
from functools import partial
from statistics import fmean, pstdev
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from runs import header, heading, quiet_trainer, row
from torch import Tensor

from lightning_vae import VAE, Gaussian, LinearDecoder, LinearEncoder, kl_per_dimension
from lightning_vae.callbacks import Staged, TargetRate
from lightning_vae.datamodules import Gaussian as GaussianData

SPECTRUM = (5.0, 3.0, 1.5, 0.8, 0.3, 0.1)
VARIANCE = 0.4
UNREACHABLE, TARGET = 100.0, 4.0  # nats; the data's rate at beta 1 is 3.28
SWITCH, AFTER = 5000, 1000  # steps
BETA = (5.0 * 3.0 * 1.5 * 0.8) ** 0.25 * math.exp(-TARGET / 2) / VARIANCE
"""The closed form's weight, with all four latents active: their rates, log(l / (beta * variance)) / 2, add up to it."""
WIDTHS = (6, 4, 12, 18, 18, 11, 9, 16, 18)


class Exact(Callback):
    """Record the weight and the exact rate of all data at each step after the switch."""

    def __init__(self, x: Tensor) -> None:
        self.x = x
        self.rates: list[float] = []
        self.betas: list[float] = []
        self.before = float("nan")

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        assert isinstance(pl_module, VAE)
        if trainer.global_step <= SWITCH:
            self.before = float(pl_module.beta)
            return
        self.rates.append(float(kl_per_dimension(pl_module.encode(self.x), pl_module.prior).sum(dim=1).mean()))
        self.betas.append(float(pl_module.beta))


def steer(batch_size: int, seed: int) -> Exact:
    """Train a linear VAE whose target can be reached only after the switch."""
    seed_everything(seed, verbose=False)
    data = GaussianData(SPECTRUM, size=4 * batch_size, batch_size=batch_size)
    data.setup("fit")
    vae = VAE(
        shape=data.shape,
        levels=data.levels,
        latent_dim=4,
        encoder=LinearEncoder,
        decoder=LinearDecoder,
        likelihood=partial(Gaussian, variance=VARIANCE),
    )
    vae.configure_optimizers = lambda: torch.optim.Adam(vae.parameters(), 0.02)  # type: ignore[method-assign]
    watch = Exact(torch.cat([batch["x"] for batch in data.train_dataloader()]))
    trainer = quiet_trainer(-1, max_steps=SWITCH + AFTER)
    trainer.callbacks += [TargetRate(Staged([UNREACHABLE, TARGET], at_steps=[SWITCH])), watch]  # type: ignore[attr-defined]
    trainer.fit(vae, data)
    return watch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[512, 8192])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    heading(
        f"TargetRate on the linear VAE, Adam at 0.02: {UNREACHABLE:g} nats for {SWITCH} steps, then {TARGET:g}. Steps "
        f"are counted from there; mean, deviation and share outside 1 % are of the steps {AFTER // 2} to {AFTER}. The "
        f"closed form's weight is {BETA:.4f}."
    )
    header(
        ("batch", "seed", "beta before", "rate within 1 %", "beta 3 % from", "mean rate", "deviation",
         "outside 1 %", "largest beta error"), WIDTHS,
    )  # fmt: skip
    for batch_size in options.batch_sizes:
        for seed in options.seeds:
            watch = steer(batch_size, seed)
            first = next((step for step, rate in enumerate(watch.rates) if abs(rate / TARGET - 1) <= 0.01), AFTER)
            off = [step for step, beta in enumerate(watch.betas) if abs(beta / BETA - 1) > 0.03]
            late = watch.rates[AFTER // 2 :]
            outside = sum(abs(rate / TARGET - 1) > 0.01 for rate in late) / len(late)
            worst = max(abs(beta / BETA - 1) for beta in watch.betas[AFTER // 2 :])
            cells = (first, max(off, default=-1) + 1, f"{fmean(late):.3f}", f"{pstdev(late):.3f}")
            row((batch_size, seed, watch.before, *cells, f"{outside:.1%}", f"{worst:.1%}"), WIDTHS)


if __name__ == "__main__":
    main()
