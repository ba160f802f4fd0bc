"""Measure the memory and the time of a pass of `LatentMonitor` over latents of latent diffusion's size."""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import time
from typing import Any

import torch
from runs import header, heading, row
from torch.distributions import Normal

from lightning_vae.callbacks import LatentMonitor

WIDTHS = (14, 10, 12, 16, 16, 14)
SHAPES = ((16, 64, 64), (4, 64, 64))
BATCH = 32


def peak() -> float:
    """Return the largest resident memory of this process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measured(shape: tuple[int, ...], images: int, pool: Any, queue: Any) -> None:
    """Pass posteriors of a shape to the monitor, and put extra memory, seconds with and without it, into the queue."""
    torch.set_num_threads(1)
    noise = torch.randn(BATCH, *shape)

    def batches() -> Any:
        for number in range(images // BATCH):
            yield Normal(noise * (1 + number % 7), (0.1 * noise).exp(), validate_args=False)

    started = time.perf_counter()
    for posterior in batches():
        posterior.rsample()
    without, before = time.perf_counter() - started, peak()
    monitor = LatentMonitor(pool=pool)
    started = time.perf_counter()
    for posterior in batches():
        posterior.rsample()
        monitor.update(posterior)
    report = monitor.compute()
    seconds = time.perf_counter() - started
    assert report is not None
    queue.put((peak() - before, without, seconds, report.state))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=10_000)
    images = parser.parse_args().images
    heading(
        f"A validation pass over {images} images in batches of {BATCH}: memory of the monitor above that of the "
        "batches, and seconds of sampling each posterior without and with it. One process and one thread for each row."
    )
    header(("latents", "pool", "memory, MiB", "without, s", "with, s", "state"), WIDTHS)
    for shape in SHAPES:
        for pool in (None, (2, 3)):
            queue: Any = multiprocessing.Queue()
            process = multiprocessing.Process(target=measured, args=(shape, images, pool, queue))
            process.start()
            memory, without, seconds, state = queue.get()
            process.join()
            row(("x".join(map(str, shape)), str(pool), memory, without, seconds, state), WIDTHS)


if __name__ == "__main__":
    main()
