"""What the pictures cost: the same runs with and without the callbacks that draw."""

from __future__ import annotations

import argparse
import contextlib
import io
import shlex
import tempfile
import time
from statistics import median

from lightning.pytorch import LightningDataModule
from runs import header, heading, row

from lightning_vae import VAE
from lightning_vae.cli import VAECLI

DRAW = ("Dashboard", "Pictures", "LatentSpace")
WIDTHS = (24, 8, 8, 24, 24, 5)


class TimedCLI(VAECLI):
    """Fits without some of the config's callbacks, and says how long that took."""

    without: tuple[str, ...] = ()

    def before_fit(self) -> None:
        self.trainer.callbacks = [each for each in self.trainer.callbacks if type(each).__name__ not in self.without]
        self.started = time.perf_counter(), time.process_time()

    def after_fit(self) -> None:
        self.seconds = time.perf_counter() - self.started[0], time.process_time() - self.started[1]


def seconds(arguments: str, without: tuple[str, ...] = ()) -> tuple[float, float]:
    """Fit; return the seconds on the clock and of the processor."""
    quiet = "--trainer.enable_progress_bar false --trainer.enable_model_summary false"
    cli_class = type("CLI", (TimedCLI,), {"without": without})
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        return cli_class(
            VAE,
            LightningDataModule,
            save_config_callback=None,
            subclass_mode_model=True,
            subclass_mode_data=True,
            args=["fit", *shlex.split(f"{arguments} --trainer.logger.save_dir {folder} {quiet}")],
        ).seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", help="where Fashion-MNIST lies; without it, digits alone")
    parser.add_argument("--pairs", type=int, default=5, help="how many runs of each, in turn")
    options = parser.parse_args()
    cases = {"digits, 120 epochs": "--config configs/digits.yaml"}
    if options.root:
        cases["Fashion-MNIST, 3 epochs"] = (
            f"--config configs/fashion_mnist.yaml --trainer.accelerator cpu --data.root {options.root} "
            "--trainer.max_epochs 3"
        )
    heading(
        "Seconds of a fit with the config's callbacks less Dashboard, Pictures and LatentSpace, and with them, run in "
        "turn. The ratio is that of the processor's seconds, pair by pair; that of the clock's behind it."
    )
    header(("run", "without", "with", "ratio: median (range)", "clock: median (range)", "pairs"), WIDTHS)
    for name, arguments in cases.items():
        seconds(f"{arguments} --trainer.max_epochs 1")  # what is loaded once
        pairs = [(seconds(arguments, DRAW), seconds(arguments)) for _ in range(options.pairs)]
        ratios = [[drawn[kind] / plain[kind] for plain, drawn in pairs] for kind in (1, 0)]
        texts = [f"{median(values):.3f} ({min(values):.3f} to {max(values):.3f})" for values in ratios]
        without, drawn = (median(pair[which][1] for pair in pairs) for which in (0, 1))
        row((name, without, drawn, *texts, options.pairs), WIDTHS)


if __name__ == "__main__":
    main()
