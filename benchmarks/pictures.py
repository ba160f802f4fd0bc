"""Time the same runs with and without the callbacks that draw."""

from __future__ import annotations

import argparse
import contextlib
import io
import shlex
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from statistics import median
from typing import Any, NamedTuple

from runs import header, heading, row

from lightning_vae.callbacks import Callback
from lightning_vae.cli.vae_cli import VAECLI

DRAW = ("Dashboard", "Pictures", "LatentSpace")
WIDTHS = (24, 8, 8, 24, 24, 24, 5)


class Seconds(NamedTuple):
    """Processor time of a fit and of its drawing callbacks, and wall-clock time of the fit."""

    processor: float
    drawing: float
    clock: float


class TimedCLI(VAECLI):
    """Fit with or without the drawing callbacks, and time it."""

    draws = True

    def before_fit(self) -> None:
        callbacks = self.trainer.callbacks
        drawing = [each for each in callbacks if type(each).__name__ in DRAW]
        self.trainer.callbacks = [each for each in callbacks if self.draws or each not in drawing]
        self.drawing = 0.0
        for callback, hook in product(drawing, (name for name in dir(Callback) if name.startswith("on_"))):
            setattr(callback, hook, partial(self.timed, getattr(callback, hook)))
        self.started = time.process_time(), time.perf_counter()

    def timed(self, hook: Callable[..., None], *args: Any) -> None:
        before = time.process_time()
        hook(*args)
        self.drawing += time.process_time() - before

    def after_fit(self) -> None:
        processor, clock = time.process_time() - self.started[0], time.perf_counter() - self.started[1]
        self.seconds = Seconds(processor, self.drawing, clock)


def fit(arguments: str, draws: bool) -> Seconds:
    """Run ``train.py fit`` silently in this process."""
    quiet = "--trainer.enable_progress_bar false --trainer.enable_model_summary false"
    cli_class = type("CLI", (TimedCLI,), {"draws": draws})
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        arguments = f"{arguments} --trainer.logger.save_dir {folder} {quiet}"
        seconds: Seconds = cli_class(["fit", *shlex.split(arguments)]).seconds
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", help="folder of Fashion-MNIST; without it, only digits")
    parser.add_argument("--pairs", type=int, default=5, help="number of runs of each kind, in turn")
    options = parser.parse_args()
    cases = {"digits, 120 epochs": "--config configs/digits.yaml"}
    if options.root:
        cases["Fashion-MNIST, 2 epochs"] = (
            f"--config configs/fashion_mnist.yaml --trainer.accelerator cpu --data.root {options.root} "
            "--trainer.max_epochs 2"
        )
    heading(
        "A config's fit with and without Dashboard, Pictures and LatentSpace, in turn, in seconds of processor time. "
        "'within' divides a fit by the same fit less the time in their hooks. 'between' divides it by the fit without "
        "them in the same round, which on a busy machine varies more; 'clock' is the same in wall-clock time."
    )
    header(("run", "fit", "hooks", "within: median (range)", "between", "clock", "pairs"), WIDTHS)
    for name, arguments in cases.items():
        fit(f"{arguments} --trainer.max_epochs 1", draws=True)  # warm up
        pairs = [(fit(arguments, draws=False), fit(arguments, draws=True)) for _ in range(options.pairs)]
        ratios = (
            [drawn.processor / (drawn.processor - drawn.drawing) for _, drawn in pairs],
            [drawn.processor / plain.processor for plain, drawn in pairs],
            [drawn.clock / plain.clock for plain, drawn in pairs],
        )
        texts = [f"{median(values):.3f} ({min(values):.3f} to {max(values):.3f})" for values in ratios]
        fits, hooks = (median(column) for column in zip(*(drawn[:2] for _, drawn in pairs), strict=True))
        row((name, fits, hooks, *texts, options.pairs), WIDTHS)


if __name__ == "__main__":
    main()
