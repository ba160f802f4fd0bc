"""A pool of processes, one for each point of a sweep."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import torch

from .plan import Point

LOG = "sweep.log"
"""File in a point's folder with the output of its process."""
_POLL = 0.05  # seconds
_PATIENCE = 15.0
"""Seconds that a process has to end once the sweep does, more than it gives itself."""


def run(points: Sequence[Point], jobs: int, done: Callable[[Point], str], evaluate: bool = True) -> list[Point]:
    """Train and evaluate points, and print a line for each with an estimate of the time left.

    Args:
        points: The points. Finished parts of a point are not run again.
        jobs: Number of processes at once; they share the threads that torch would use.
        done: Returns the text to print for a finished point.
        evaluate: Whether to evaluate them too.

    Returns:
        The points that failed.
    """
    failed, begun = [], time.monotonic()
    with closing(_finished(points, jobs, evaluate)) as finished:
        for number, (point, error, seconds) in enumerate(finished, 1):
            if error:
                failed.append(point)
                text = f"FAILED: {error} (full output: {point.folder / LOG})"
            else:
                text = f"{done(point)} ({duration(seconds)})"
            left = remaining(time.monotonic() - begun, number, len(points), jobs)
            ahead = f"; about {duration(left)} to go" if number < len(points) else ""
            print(f"[{number:>{len(str(len(points)))}}/{len(points)}] {point.label}: {text}{ahead}", flush=True)
    return failed


def threads_each(jobs: int) -> int:
    """Return the number of threads for each of this number of processes."""
    return max(1, torch.get_num_threads() // jobs)


class Running(NamedTuple):
    """The process of a point."""

    point: Point
    process: subprocess.Popen[bytes]
    since: float
    log_from: int
    """Offset of its output in the point's log, which also holds the output of earlier processes."""


def _finished(points: Sequence[Point], jobs: int, evaluate: bool) -> Generator[tuple[Point, str, float], None, None]:
    """Yield each point as its process ends, with the reason for a failure and the seconds that it took."""
    waiting = list(reversed(points))
    running: list[Running] = []
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                running.append(start(waiting.pop(), evaluate, threads_each(jobs)))
            ended = [each for each in running if each.process.poll() is not None]
            for each in ended:
                running.remove(each)
                _close(each)
                yield each.point, _failure(each, evaluate), time.monotonic() - each.since
            if not ended:
                time.sleep(_POLL)
    finally:
        for each in running:
            _close(each)  # ends the process
        for each in running:
            try:
                each.process.wait(_PATIENCE)
            except subprocess.TimeoutExpired:  # such as one that is suspended
                each.process.kill()
                each.process.wait()


def start(point: Point, evaluate: bool, threads: int) -> Running:
    """Start the process of a point. Its output goes to a file in the point's folder.

    Args:
        point: The point.
        evaluate: Whether to evaluate it too.
        threads: Number of threads for torch.
    """
    point.folder.mkdir(parents=True, exist_ok=True)
    package = os.pathsep.join(filter(None, (str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH"))))
    environment = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "PYTHONPATH": package}
    with (point.folder / LOG).open("ab") as log:
        log_from = log.tell()  # before the process, which writes at the same place
        process = subprocess.Popen(
            [sys.executable, "-m", "lightning_vae.sweep.point", json.dumps(point.commands(evaluate))],
            stdin=subprocess.PIPE,  # closes when this process ends, however it ends
            stdout=log,
            stderr=log,
            env={**os.environ, **environment},
        )
        return Running(point, process, time.monotonic(), log_from)


def _close(running: Running) -> None:
    assert running.process.stdin is not None
    running.process.stdin.close()


def _failure(ended: Running, evaluate: bool) -> str:
    """Return the line of the log with the reason for a failure: the command line's message, else the last line."""
    code, point = ended.process.returncode, ended.point
    if code == 0:  # also of a fit that SIGTERM stopped: Lightning exits without a code
        is_done = point.evaluation.is_file() if evaluate else point.checkpoint is not None
        return "" if is_done else "its process was stopped before it ended"
    said = (point.folder / LOG).read_bytes()[ended.log_from :].decode(errors="replace")
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or lines or [f"its process ended with exit code {code}"])[-1].removeprefix("error: ")


def remaining(elapsed: float, done: int, total: int, jobs: int) -> float:
    """Estimate the seconds left, in rounds of as many points as run at once.

    Example::

        >>> remaining(100.0, done=1, total=6, jobs=2)
        300.0
    """
    return elapsed / math.ceil(done / jobs) * math.ceil((total - done) / jobs)


def duration(seconds: float) -> str:
    """Format a duration in at most two units.

    Example::

        >>> duration(3725.0)
        '1 h 2 min'
    """
    minutes, rest = divmod(math.ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
