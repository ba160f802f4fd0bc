"""``python -m lightning_vae.sweep.point``: the process of a point, which ends when its sweep does."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import warnings
from collections.abc import Sequence
from threading import Thread

_GRACE = 10.0
"""Seconds within which a point must end by itself."""


def work(fit: Sequence[str], test: Sequence[str]) -> None:
    """Train and evaluate in one process: a second start would take most of a small point's time.

    Args:
        fit: Arguments of ``fit``; empty for a trained point.
        test: Arguments of ``test``; empty for no evaluation. Without ``--ckpt_path`` after a ``fit``.
    """
    from ..checkpoints.run_folder import best_keeper
    from ..cli.errors import exit_with
    from ..cli.vae_cli import run

    checkpoint = []
    if fit:
        best = best_keeper(run(list(fit)).trainer)
        if best is None:
            exit_with("`fit` ended without a checkpoint; the config needs a ModelCheckpoint.")
        checkpoint = [f"--ckpt_path={best.best_model_path}"]
    if test:
        run([*test, *checkpoint])


def _end_with_the_sweep() -> None:
    """Wait until standard input closes, which happens however the sweep ends, and end this process."""
    while os.read(sys.__stdin__.fileno(), 1):  # type: ignore[union-attr]
        pass
    os.kill(os.getpid(), signal.SIGTERM)  # Lightning ends a fit after its step
    time.sleep(_GRACE)  # but does not stop a test
    os._exit(1)


if __name__ == "__main__":
    Thread(target=_end_with_the_sweep, daemon=True).start()
    # Lightning mistakes the arguments of this process for those of its command.
    warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
    work(**json.loads(sys.argv[1]))
