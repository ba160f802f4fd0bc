"""Helpers of the benchmarks: a run of the command line, and tables."""

from __future__ import annotations

import contextlib
import io
import logging
import platform
import shlex
import sys
import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import lightning
import torch
from lightning.pytorch import Trainer

sys.path.insert(0, str(Path(__file__).parent.parent))  # a checkout need not be installed

from lightning_vae import __version__
from lightning_vae.callbacks import CollapseDetector
from lightning_vae.callbacks.metrics.collapse_state import collapse_state
from lightning_vae.cli.vae_cli import VAECLI

SEEDS = (0, 1, 2)

# Print only the table.
logging.disable(logging.WARNING)
warnings.simplefilter("ignore")


class Result(NamedTuple):
    """The last validation pass of a run, in nats per observation."""

    negative_elbo: float
    rate: float
    distortion: float
    mutual_information: float
    active_units: float
    state: str


def train(arguments: str, seed: int) -> VAECLI:
    """Run ``train.py fit`` silently in this process."""
    quiet = "--trainer.enable_progress_bar false --trainer.enable_model_summary false"
    with contextlib.redirect_stdout(io.StringIO()):
        return VAECLI(["fit", *shlex.split(f"{arguments} --seed_everything {seed} {quiet}")])


def fit(arguments: str, seed: int) -> Result:
    """Train, and return the last validation pass."""
    cli = train(arguments, seed)
    measured = {name: float(value) for name, value in cli.trainer.callback_metrics.items()}
    detector = next(each for each in cli.trainer.callbacks if isinstance(each, CollapseDetector))
    history, information = detector.state_dict(), measured["latent/mutual_information"]
    observations = min(detector.observations, len(cli.datamodule._splits["val"]["x"]))
    return Result(
        negative_elbo=-measured["val/elbo"],
        rate=measured["val/rate"],
        distortion=measured["val/distortion"],
        mutual_information=information,
        active_units=measured["latent/active_units"],
        state=collapse_state(history["rates"][-1], history["variances"][-1], information, observations).name,
    )


def quiet_trainer(epochs: int, max_steps: int = -1) -> Trainer:
    """Make a Trainer that only trains, on the CPU."""
    off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return Trainer(max_epochs=epochs, max_steps=max_steps, accelerator="cpu", limit_val_batches=0, **off)


def heading(text: str, *lines: str) -> None:
    """Print the subject of the comparison and the versions."""
    versions = (
        f"lightning-vae {__version__}, torch {torch.__version__}, lightning {lightning.__version__}, "
        f"Python {platform.python_version()}, {torch.get_num_threads()} CPU threads"
    )
    print("\n".join([textwrap.fill(text, 110), *lines, versions, ""]))


def row(cells: Sequence[object], widths: Sequence[int]) -> None:
    """Print one row: text to the left, numbers with two decimals to the right."""
    texts = (
        f"{cell:>{w}.2f}" if isinstance(cell, float) else f"{cell!s:<{w}}"
        for cell, w in zip(cells, widths, strict=True)
    )
    print("| " + " | ".join(texts) + " |")
    sys.stdout.flush()


def header(names: Sequence[str], widths: Sequence[int]) -> None:
    """Print the first two rows of a table."""
    row(names, widths)
    row(["-" * width for width in widths], widths)
