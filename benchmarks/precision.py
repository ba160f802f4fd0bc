"""Compare `bf16-mixed` with float32 on this CPU, in turn."""

from __future__ import annotations

import argparse
import os
import time
from functools import partial
from statistics import median
from typing import Any

import lightning.pytorch as pl
from runs import header, heading, row

from lightning_vae import VAE, ConvDecoder, ConvEncoder
from lightning_vae.callbacks import CollapseDetector
from lightning_vae.datamodules import FashionMNIST

PRECISIONS = ("32-true", "bf16-mixed")
WIDTHS = (34, 12, 12, 24, 12, 12, 14)


class Timer(pl.Callback):
    """Time a fit from its second step to its last."""

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        now = time.perf_counter()
        if trainer.global_step == 1:
            self.started = now
        self.step = (now - self.started) / max(1, trainer.global_step - 1)


def fit(data: FashionMNIST, model: Any, steps: int, seed: int, precision: str) -> dict[str, float]:
    pl.seed_everything(seed, verbose=False)
    off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    timer = Timer()
    trainer = pl.Trainer(
        max_steps=steps,
        val_check_interval=steps,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        accelerator="cpu",
        precision=precision,
        callbacks=[timer, CollapseDetector()],
        **off,
    )
    trainer.fit(model(data.shape, data.levels), data.train_dataloader(), data.val_dataloader())
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return {"ms": 1000 * timer.step, **metrics}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", default="data", help="folder of Fashion-MNIST, as in the data module")
    parser.add_argument(
        "--rounds", type=int, default=3, help="how often each model trains, each time from another seed"
    )
    parser.add_argument("--steps", type=int, default=1000)
    options = parser.parse_args()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    data = FashionMNIST(options.root)
    data.prepare_data()
    data.setup("fit")
    heading(
        f"{options.steps} steps on Fashion-MNIST in batches of {data.batch_size}, {options.rounds} rounds in turn: "
        "milliseconds of a step, their ratio to float32 (below 1, bfloat16 is faster), median (range); and the "
        "medians of ELBO and rate in nats and of active units on the validation split."
    )
    header(("", "precision", "ms a step", "of float32", "ELBO", "rate", "active units"), WIDTHS)
    channels = {"channels": (32, 64, 128)}
    networks = {"encoder": partial(ConvEncoder, **channels), "decoder": partial(ConvDecoder, **channels)}
    for name, model in {
        "MLP 784-400-32": partial(VAE, latent_dim=32),
        "convolutions, channels 32-64-128": partial(VAE, latent_dim=32, **networks),
    }.items():
        found: dict[str, list[dict[str, float]]] = {precision: [] for precision in PRECISIONS}
        for seed in range(options.rounds):
            for precision, results in found.items():
                results.append(fit(data, model, options.steps, seed, precision))
        for precision, results in found.items():
            ratios = [own["ms"] / base["ms"] for own, base in zip(results, found["32-true"], strict=True)]
            medians = [median(each[key] for each in results) for key in ("ms", "val/elbo", "val/rate")]
            row(
                (
                    name,
                    precision,
                    f"{medians[0]:.2f}",
                    "" if precision == "32-true" else f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
                    *(f"{each:.2f}" for each in medians[1:]),
                    f"{median(each['latent/active_units'] for each in results):.0f}",
                ),
                WIDTHS,
            )


if __name__ == "__main__":
    main()
