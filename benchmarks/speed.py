"""Time a training step: the whole stack against a bare Trainer, plain loops and other projects."""

from __future__ import annotations

import argparse
import cProfile
import os
import platform
import pstats
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import lightning.pytorch as pl
import torch
from runs import header, heading, row
from training_loops import (
    Case,
    TimedVAE,
    bare_trainer,
    default_trainer,
    hand_written_loop,
    loop_over_data_loader,
    pythae,
    typical_lightning,
    whole_stack,
)

from lightning_vae import ConvDecoder, ConvEncoder, MLPDecoder, MLPEncoder
from lightning_vae.datamodules import Digits, FashionMNIST
from lightning_vae.datamodules.base import DataModule, Tensors

WIDTHS = (42, 12, 26)
Loops = dict[str, Callable[[Case], float]]
OURS: Loops = {
    "ours, the whole stack": whole_stack,
    "the same module in a bare Trainer": bare_trainer,
    "Trainer's own logger, bar and checkpoints": default_trainer,
    "a plain loop: same tensors, fused Adam": hand_written_loop,
}
SAVING: Loops = {
    "ours without its checkpoints": partial(whole_stack, saves=False),
}
OTHERS: Loops = {
    "the same loop, torch's default Adam": partial(hand_written_loop, fused=False),
    "that loop over torch's DataLoader": loop_over_data_loader,
    "a typical Lightning VAE": typical_lightning,
    "pythae": pythae,
}


class RandomImages(DataModule):
    """Noise images of 64 by 64 pixels."""

    shape, levels = (1, 64, 64), 256

    def _read_train(self) -> dict[str, Tensors]:
        sizes = {"train": 8192, "val": 256}
        return {name: {"x": torch.randint(256, (n, *self.shape), dtype=torch.uint8)} for name, n in sizes.items()}

    def _read_test(self) -> dict[str, Tensors]:
        raise NotImplementedError


def matrix_products(case: Case) -> float:
    """Time the matrix products of the MLP's layers alone, forward and backward, for one epoch."""
    widths, size = (784, 400, 64, 32, 400, 784), case.data.batch_size
    layers = [
        (torch.randn(size, into), torch.randn(into, out), torch.randn(size, out))
        for into, out in pairwise(widths)
        if (into, out) != (64, 32)  # the mean and the log-variance become a sample
    ]
    started = time.perf_counter()
    for _ in range(case.steps):
        for number, (x, weight, gradient) in enumerate(layers):
            x @ weight
            x.T @ gradient
            if number:  # the images need no gradient
                gradient @ weight.T
    return time.perf_counter() - started


def compare(title: str, case: Case, rounds: int, loops: Loops) -> None:
    """Run the loops in turn, several times, and print a table."""
    print(f"\n{title}; {case.steps} steps and a validation an epoch, {case.epochs} epochs, {rounds} rounds in turn")
    header(("", "ms a step", "ours is: median (range)"), WIDTHS)
    hand_written_loop(case)  # warm up
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    names = list(loops)
    for number in range(rounds):
        start = number % len(names)  # none is always first
        for name in names[start:] + names[:start]:
            seconds[name].append(loops[name](case))
    ours = next(iter(seconds.values()))
    for name, taken in seconds.items():
        ratios = [us / them for us, them in zip(ours, taken, strict=True)]
        cells = (f"{1000 * median(taken) / case.steps:.3f}", ratio(ratios) if taken is not ours else "")
        row((name, *cells), WIDTHS)


def ratio(values: Sequence[float]) -> str:
    return f"{median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


class Profile(pl.Callback):
    """Profile whole steps in the middle of an epoch."""

    def __init__(self, first: int, last: int) -> None:
        self.first, self.last = first, last
        self.profile = cProfile.Profile()

    def on_train_batch_end(self, *args: Any) -> None:
        batch_idx = args[-1]
        if batch_idx == self.first:
            self.profile.enable()
        elif batch_idx == self.last:
            self.profile.disable()


class Empty(pl.Callback):
    """Do nothing in a hook, for comparison."""

    def on_train_batch_start(self, *_: Any) -> None:
        pass


def hooks(case: Case, rounds: int) -> None:
    """Print the time of our hooks in a step that does not log."""
    print(
        "\nOur own code in a step of the MLP that does not log, without the model and the loss, by cProfile's self"
        "\ntime: the callbacks, the callbacks that resume and save, the VAE's hooks, and the running sums."
    )
    header(("", "us a step", "calls a step"), WIDTHS)
    parts: dict[str, list[tuple[float, float]]] = {}
    for _ in range(rounds):
        watch = Profile(50, 350)
        whole_stack(case, watch=[Empty(), watch], log_every_n_steps=10**6)
        sums: dict[str, tuple[float, float]] = {}
        for (file, _, name), (_, calls, own, _, _) in pstats.Stats(watch.profile).stats.items():  # type: ignore[attr-defined]
            part = part_of(Path(file), name)
            time_sum, call_sum = sums.get(part, (0.0, 0.0))
            sums[part] = (time_sum + own, call_sum + calls)
        for part, pair in sums.items():
            parts.setdefault(part, []).append(pair)
    parts.pop("")
    for part, pairs in parts.items():
        times, calls = zip(*pairs, strict=True)
        row((part, f"{1e6 * median(times) / 300:.1f}", f"{median(calls) / 300:.0f}"), WIDTHS)


def part_of(file: Path, name: str) -> str:
    """Return the part of our code that a function belongs to; empty if it is not counted."""
    if "site-packages" in file.parts:
        return ""
    if file == Path(__file__) and name == "on_train_batch_start":
        return "for comparison: an empty hook"
    if "callbacks" in file.parts:
        return "callbacks"
    if file.name in ("vae.py", "module.py", "knobs.py", "exact_resume.py") and name.startswith("on_"):
        return "the VAE's hooks"
    if file.parent.name == "checkpoints":
        return "resuming and saving"
    return "running sums" if file.name == "running_sums.py" else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", default="data", help="folder of Fashion-MNIST, as in the data module")
    parser.add_argument("--rounds", type=int, default=5, help="how often each loop trains")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if not torch.cuda.is_available():
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # as the command line does
    heading(
        "Milliseconds a step, with training and validation, of several loops that train the same VAE: medians over the "
        "rounds. A ratio compares two loops in the same round; below 1, ours is faster.",
        f"{os.cpu_count()} x {processor()}",
    )
    fashion, digits, noise = FashionMNIST(options.root), Digits(batch_size=64), RandomImages(batch_size=64)
    for data in (fashion, digits, noise):
        data.prepare_data()
        data.setup("fit")
    mlp = Case(fashion, partial(TimedVAE, latent_dim=32))
    wide, deep = {"hidden": (256, 256)}, {"channels": (32, 64, 128, 256)}
    tiny = partial(TimedVAE, encoder=partial(MLPEncoder, **wide), decoder=partial(MLPDecoder, **wide))
    conv = partial(TimedVAE, encoder=partial(ConvEncoder, **deep), decoder=partial(ConvDecoder, **deep))
    others = {name: other for name, other in OTHERS.items() if name != "pythae" or find_spec("pythae")}
    if len(others) < len(OTHERS):
        print("Without pythae, which is not installed (pip install pythae==0.1.2).")
    floor = {"the matrix products alone": matrix_products}
    compare("MLP 784-400-32, Fashion-MNIST, batches of 128", mlp, options.rounds, OURS | others | floor)
    compare("Convolutions, 64 by 64, batches of 64", Case(noise, conv), options.rounds, OURS)
    small = Case(digits, tiny, epochs=120, log_every_n_steps=10, keep_every_n_epochs=10)
    compare("The model and the length of configs/digits.yaml", small, options.rounds, OURS | SAVING)
    hooks(mlp, 3)


def processor() -> str:
    """Return the name of the processor, or of its architecture if the name is unknown."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
