"""``python -m lightning_vae.sweep_point``: the command line as a point's process, which ends when its sweep does."""

from __future__ import annotations

import os
import signal
import sys
import time
from threading import Thread

_GRACE = 10.0  # seconds, after which what is left is not waited for


def _end_with_the_sweep() -> None:
    """Wait until the sweep has closed its end of standard input, as it does however it ends, and end too."""
    while os.read(sys.__stdin__.fileno(), 1):  # type: ignore[union-attr]
        pass
    os.kill(os.getpid(), signal.SIGTERM)  # Lightning ends a fit behind its step
    time.sleep(_GRACE)  # and goes on with a test
    os._exit(1)


if __name__ == "__main__":
    Thread(target=_end_with_the_sweep, daemon=True).start()
    from ..main import main

    main()
