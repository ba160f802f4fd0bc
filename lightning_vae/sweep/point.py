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
"""Seconds that a point has to end by itself."""


def work(fit: Sequence[str], test: Sequence[str]) -> None:
    """Train and evaluate in one process, as most of a small point's time would be the start of a second.

    Args:
        fit: Arguments of ``fit``, or none for what is trained.
        test: Arguments of ``test``, or none for what is not to be evaluated; without ``--ckpt_path`` after a ``fit``.
    """
    from ..checkpoints.run_folder import best_keeper
    from ..cli.errors import exit_with
    from ..cli.vae_cli import run

    checkpoint = []
    if fit:
        best = best_keeper(run(list(fit)).trainer)
        if best is None:
            exit_with("`fit` has ended without a checkpoint; the config needs a ModelCheckpoint.")
        checkpoint = [f"--ckpt_path={best.best_model_path}"]
    if test:
        run([*test, *checkpoint])


def _end_with_the_sweep() -> None:
    """Wait until standard input closes, as it does however the sweep ends, and end this process."""
    while os.read(sys.__stdin__.fileno(), 1):  # type: ignore[union-attr]
        pass
    os.kill(os.getpid(), signal.SIGTERM)  # Lightning ends a fit after its step
    time.sleep(_GRACE)  # but goes on with a test
    os._exit(1)


if __name__ == "__main__":
    Thread(target=_end_with_the_sweep, daemon=True).start()
    # Lightning takes the arguments of this process for those of the command that it is given.
    warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
    work(**json.loads(sys.argv[1]))
