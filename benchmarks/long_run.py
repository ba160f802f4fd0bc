"""Run a million cheap steps, and check the memory during the run and the knobs and counters at its end."""

from __future__ import annotations

import argparse
import tempfile
import time
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from runs import header, heading, row

from lightning_vae import VAE, Gaussian, LinearDecoder, LinearEncoder
from lightning_vae.callbacks import CollapseDetector, Cyclical, FreeBits, KLAnnealing, Linear
from lightning_vae.datamodules import Gaussian as GaussianData

WIDTHS = (12, 12, 14, 14, 14)
BATCHES = 100  # an epoch


def resident() -> float:
    """Return the process's resident memory in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


class Watch(Callback):
    """Print a row ten times in the run."""

    def __init__(self, steps: int) -> None:
        self.every = steps // 10
        self.rows: list[float] = []
        self.started = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        if trainer.global_step % self.every == 0:
            took, self.started = time.perf_counter() - self.started, time.perf_counter()
            self.rows.append(resident())
            beta, floor = float(pl_module.beta), float(pl_module.free_bits)
            row((trainer.global_step, self.rows[-1], 1e3 * took / self.every, beta, floor), WIDTHS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1_000_000, help="a multiple of 1000")
    steps = parser.parse_args().steps
    heading(
        f"A long run. A linear VAE on Gaussian data, {steps} steps of 8 observations in epochs of {BATCHES}: cyclical "
        "annealing, a floor that rises over the whole run, the detector and a checkpoint every 10 epochs, TensorBoard "
        "every 1000 steps. Memory is the resident memory of the process."
    )
    header(("step", "memory MB", "ms a step", "beta", "free bits"), WIDTHS)
    data = GaussianData(size=8 * BATCHES, batch_size=8)
    vae = VAE(data.shape, None, 4, LinearEncoder, LinearDecoder, partial(Gaussian, variance=0.4), free_bits=0.2)
    annealing, floor = Cyclical(period_steps=steps // 5, cycles=5), Linear(steps=steps)
    watch = Watch(steps)
    callbacks = [
        KLAnnealing(annealing), FreeBits(floor), CollapseDetector(), watch,
        ModelCheckpoint(every_n_epochs=10, save_last=True),
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            max_steps=steps, accelerator="cpu", log_every_n_steps=1000, check_val_every_n_epoch=10, callbacks=callbacks,
            logger=TensorBoardLogger(folder, default_hp_metric=False), enable_progress_bar=False,
            enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(vae, datamodule=data)
    last = annealing.resolve(1.0, steps_per_epoch=BATCHES, total_steps=steps)
    detector = next(each for each in callbacks if isinstance(each, CollapseDetector))
    print(
        f"\nSteps {trainer.global_step}, epochs {trainer.current_epoch}, detector's passes "
        f"{detector.state_dict()['passes']} of {steps // BATCHES // 10}; the last step's beta "
        f"{trainer.callback_metrics['knobs/beta']:.6f}, the schedule's {last(steps - 1):.6f}; after the run beta "
        f"{float(vae.beta):g}, free bits {float(vae.free_bits):g}.\nMemory from the second tenth to the last: "
        f"{max(watch.rows[1:]) - watch.rows[1]:+.1f} MB at most, {watch.rows[-1] - watch.rows[1]:+.1f} MB at the end; "
        f"largest rise between neighbours {max(b - a for a, b in pairwise(watch.rows[1:])):+.1f} MB."
    )


if __name__ == "__main__":
    main()
