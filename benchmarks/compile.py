"""Time the same fit with and without `compile`, in turn."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator
from functools import partial
from itertools import repeat
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import lightning.pytorch as pl
import torch
from runs import header, heading, row

from lightning_vae import VAE, ConvDecoder, ConvEncoder, MLPDecoder, MLPEncoder

WIDTHS = (34, 16, 16, 24, 18)
LEADING = 5  # steps that are not timed: the first compiles


class Clock(pl.Callback):
    """Time the steps of a fit, and its first one."""

    def on_train_start(self, *_: Any) -> None:
        self.times = [time.perf_counter()]

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if len(self.times) in (1, LEADING, trainer.max_steps) and torch.cuda.is_available():
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())

    @property
    def first(self) -> float:
        return self.times[1] - self.times[0]

    @property
    def step(self) -> float:
        return (self.times[-1] - self.times[LEADING]) / (len(self.times) - 1 - LEADING)


class Repeated:
    """Repeat one batch."""

    def __init__(self, x: torch.Tensor, times: int) -> None:
        self.x, self.times = x, times

    def __len__(self) -> int:
        return self.times

    def __iter__(self) -> Iterator[torch.Tensor]:
        return repeat(self.x, self.times)


def fit(vae: VAE, x: torch.Tensor, steps: int, precision: str) -> Clock:
    off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    clock = Clock()
    trainer = pl.Trainer(devices=1, max_steps=steps, limit_val_batches=0, callbacks=[clock], precision=precision, **off)
    trainer.fit(vae, Repeated(x.to(trainer.strategy.root_device), steps))
    return clock


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="how often each model trains")
    parser.add_argument(
        "--modes", nargs="*", default=[], help="additional modes of torch.compile, such as reduce-overhead"
    )
    parser.add_argument("--precision", default="32-true")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # as the command line does
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "the CPU"
    heading(
        f"A fit with and without `compile`, in turn, {options.rounds} rounds on {device}, {options.precision}: "
        "milliseconds per step and their ratio (below 1, compiled is faster), median (range); and the seconds of the "
        "first step, in which torch compiles, with an empty cache."
    )
    wide, deep = {"hidden": (256, 256)}, {"channels": (32, 64, 128, 256)}
    cases = {
        "MLP 784-400-32, batches of 128": ((1, 28, 28), 32, {}, 128, 300),
        "digits, MLP 64-256-256, 64": ((1, 8, 8), 16, _networks(MLPEncoder, MLPDecoder, wide), 64, 500),
        "convolutions, 64 by 64, 64": ((1, 64, 64), 16, _networks(ConvEncoder, ConvDecoder, deep), 64, 25),
    }
    header(("", "compile", "ms a step", "of the uncompiled", "s, first step"), WIDTHS)
    with TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(cache))
        for name, (shape, latent_dim, networks, size, steps) in cases.items():
            x = torch.randint(256, (size, *shape), dtype=torch.uint8)
            clocks: dict[Any, list[Clock]] = {mode: [] for mode in (False, True, *options.modes)}
            for _ in range(options.rounds):
                for mode, timed in clocks.items():
                    vae = VAE(shape, 256, latent_dim, compile=mode, **networks)
                    timed.append(fit(vae, x, steps, options.precision))
            for mode, timed in clocks.items():
                ratios = [own.step / base.step for own, base in zip(timed, clocks[False], strict=True)]
                ratio = f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})" if mode else ""
                milliseconds = f"{1000 * median(each.step for each in timed):.3f}"
                row((name, mode, milliseconds, ratio, f"{timed[0].first:.1f}"), WIDTHS)


def _networks(encoder: Any, decoder: Any, options: dict[str, Any]) -> dict[str, Any]:
    return {"encoder": partial(encoder, **options), "decoder": partial(decoder, **options)}


if __name__ == "__main__":
    main()
