"""Run the points of a sweep: one process each, several at once, and whatever is done already not again."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from threading import Lock
from typing import Any

import torch

from .plan import Point

LOG = "sweep.log"
"""What the processes of a point have printed, in its folder."""


class Failed(Exception):  # noqa: N818
    """A process of a point has ended with an error; the message is its last line."""


class Jobs:
    """Runs points and reports how far they are.

    Args:
        jobs: Number of processes at once; they share the threads that torch would use.
    """

    def __init__(self, jobs: int) -> None:
        self.jobs = jobs
        self.threads = max(1, torch.get_num_threads() // jobs)
        self._running: set[subprocess.Popen[bytes]] = set()
        self._lock = Lock()
        self._stopped = False

    def run(self, points: Sequence[Point], work: Callable[[Point], str]) -> list[Point]:
        """Do some work on each point, and say of each how it went.

        Args:
            points: The points.
            work: Does it, and returns what to say of the point.

        Returns:
            The points that failed.
        """
        failed, start = [], time.monotonic()
        with ThreadPoolExecutor(self.jobs) as pool:
            futures = {pool.submit(work, point): point for point in points}
            try:
                for number, future in enumerate(as_completed(futures), 1):
                    point = futures[future]
                    try:
                        text = future.result()
                    except Failed as error:
                        failed.append(point)
                        text = f"FAILED: {error} (all it said: {point.folder / LOG})"
                    left = remaining(time.monotonic() - start, number, len(points), self.jobs)
                    ahead = f"; about {duration(left)} to go" if number < len(points) else ""
                    print(f"[{number:>{len(str(len(points)))}}/{len(points)}] {point.label}: {text}{ahead}", flush=True)
            except BaseException:
                self._stop()
                pool.shutdown(cancel_futures=True)
                raise
        return failed

    def fit(self, point: Point) -> None:
        """Train a point, unless it is."""
        if point.checkpoint is None:
            self._call(point.fit(), point)
        if point.checkpoint is None:
            raise Failed("`fit` has ended without a checkpoint; the config needs a ModelCheckpoint")

    def evaluate(self, point: Point) -> dict[str, Any]:
        """Evaluate a trained point, unless it is, and return what ``test`` has found."""
        if not point.evaluation.is_file():
            self._call(point.test(), point)
        return evaluation(point)

    def _call(self, arguments: Sequence[str], point: Point) -> None:
        """Run the command line in a process of its own, which writes what it says into the point's folder."""
        point.folder.mkdir(parents=True, exist_ok=True)
        threads = {name: str(self.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        here = os.pathsep.join(filter(None, (str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH"))))
        command = [sys.executable, "-m", "lightning_vae.sweep.point", *arguments]
        with (point.folder / LOG).open("ab") as log:
            before = log.tell()
            with self._lock:
                if self._stopped:
                    raise Failed("stopped")
                process = subprocess.Popen(  # its standard input closes with this process, however that ends
                    command,
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=log,
                    env={**os.environ, **threads, "PYTHONPATH": here},
                )
                self._running.add(process)
            code = process.wait()
            with self._lock:
                self._running.discard(process)
                _close(process)
        if code != 0:
            said = (point.folder / LOG).read_bytes()[before:].decode(errors="replace")
            raise Failed(_last_words(said) or f"`{arguments[0]}` has ended with exit code {code}")

    def _stop(self) -> None:
        with self._lock:
            self._stopped = True
            for process in self._running:
                process.terminate()
                _close(process)


def _close(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    process.stdin.close()


def evaluation(point: Point) -> dict[str, Any]:
    """Read what ``test`` has found."""
    found: dict[str, Any] = json.loads(point.evaluation.read_text())
    return found


def remaining(elapsed: float, done: int, total: int, jobs: int) -> float:
    """Estimate the seconds that are left, in rounds of as many points as run at once.

    Example::

        >>> remaining(100.0, done=1, total=6, jobs=2)
        300.0
    """
    return elapsed / math.ceil(done / jobs) * math.ceil((total - done) / jobs)


def duration(seconds: float) -> str:
    """Write a duration in two units at most.

    Example::

        >>> duration(3725.0)
        '1 h 2 min'
    """
    minutes, rest = divmod(math.ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _last_words(said: str) -> str:
    """Find the line that says why: the command line's own message, else an exception's last line."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or lines or [""])[-1].removeprefix("error: ")
