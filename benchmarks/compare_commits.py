"""Time two checkouts against each other, in turn.

    git worktree add ../before HEAD~1
    python benchmarks/compare_commits.py ../before . --root data

A round runs three fresh processes: the old checkout, the new one, and the old one again, whose ratio to the first shows
the machine's own spread. Each process trains "the whole stack" of `speed.py` with the checkout's own benchmark code.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from typing import Any

WORKLOADS = ("MLP", "digits")
FIRST, LAST = 50, 350  # batches of the MLP's epoch between which calls are counted
WIDTHS = (7, 14, 14, 17, 17)


def measure(checkout: Path, root: str, threads: int, count: bool) -> dict[str, float]:
    """Train both workloads with a checkout's code; return milliseconds a step, or the Python calls of a step."""
    sys.path[:0] = [str(checkout / "benchmarks"), str(checkout)]
    import torch

    torch.set_num_threads(threads)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if (checkout / "benchmarks" / "training_loops.py").is_file():
        import training_loops as loops
    else:
        import ways as loops  # its name in older commits
    import lightning_vae
    from lightning_vae import MLPDecoder, MLPEncoder
    from lightning_vae.datamodules import Digits, FashionMNIST

    assert Path(lightning_vae.__file__).parents[1].resolve() == checkout, lightning_vae.__file__
    fashion, digits = FashionMNIST(root), Digits(batch_size=64)
    for data in (fashion, digits):
        data.prepare_data()
        data.setup("fit")
    wide: dict[str, Any] = {"hidden": (256, 256)}
    tiny = partial(loops.TimedVAE, encoder=partial(MLPEncoder, **wide), decoder=partial(MLPDecoder, **wide))
    small = partial(loops.Case, digits, tiny, log_every_n_steps=10, keep_every_n_epochs=10)
    mlp = loops.Case(fashion, partial(loops.TimedVAE, latent_dim=32))
    loops.whole_stack(small(epochs=1))  # warm up: imports and caches
    if count:
        counter = _counter()
        loops.whole_stack(mlp, watch=[counter], log_every_n_steps=10**6)
        return {"calls": counter.calls / (LAST - FIRST)}
    cases = dict(zip(WORKLOADS, (mlp, small(epochs=120)), strict=True))
    return {name: 1000 * loops.whole_stack(case) / case.steps for name, case in cases.items()}


def _counter() -> Any:
    """Make a callback that counts the calls of Python functions in the middle of an epoch."""
    from lightning.pytorch import Callback

    class Counter(Callback):
        calls = 0

        def count(self, _frame: Any, event: str, _argument: Any) -> None:
            self.calls += event == "call"

        def on_train_batch_end(self, *args: Any) -> None:
            batch_idx = args[-1]
            if batch_idx in (FIRST, LAST):
                sys.setprofile(self.count if batch_idx == FIRST else None)

    return Counter()


def in_a_process(checkout: Path, *options: str) -> dict[str, float]:
    """Measure a checkout in a fresh process."""
    command = [sys.executable, __file__, str(checkout), str(checkout), "--measure", *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=checkout)
    if done.returncode:
        raise SystemExit(f"{checkout}:\n{done.stderr}")
    measured: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return measured


def row(cells: tuple[object, ...]) -> None:
    texts = (f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in cells)
    print("| " + " | ".join(f"{text:<{width}}" for text, width in zip(texts, WIDTHS, strict=True)) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path, help="checkout of the old commit")
    parser.add_argument("new", type=Path, help="checkout of the new commit")
    parser.add_argument("--root", default="data", help="folder of Fashion-MNIST, as in the data module")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--count", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    old, new = options.old.resolve(), options.new.resolve()
    if options.measure:
        print(json.dumps(measure(new, options.root, options.threads, options.count)))
        return
    shared = ("--root", str(Path(options.root).resolve()), "--threads", str(options.threads))
    before, after = (in_a_process(checkout, "--count", *shared)["calls"] for checkout in (old, new))
    print(f"Python calls in a step of the MLP that does not log: old {before:.1f}, new {after:.1f}\n")
    row(("round", "MLP, new/old", "MLP, old/old", "digits, new/old", "digits, old/old"))
    row(tuple("-" * width for width in WIDTHS))
    processes = {"old": old, "new": new, "again": old}
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in processes}
    rounds = []
    for number in range(options.rounds):
        order = [*processes][number % 3 :] + [*processes][: number % 3]  # none is always first
        for name in order:
            taken[name].append(in_a_process(processes[name], *shared))
        base = taken["old"][-1]
        rounds.append([taken[name][-1][work] / base[work] for work in WORKLOADS for name in ("new", "again")])
        row((number + 1, *rounds[-1]))
    columns = list(zip(*rounds, strict=True))
    row(("median", *map(median, columns)))
    if options.rounds > 1:
        quarters = [quantiles(column, n=4, method="inclusive") for column in columns]
        row(("25 %", *(quarter[0] for quarter in quarters)))
        row(("75 %", *(quarter[2] for quarter in quarters)))
    for work in WORKLOADS:
        steps = (f"{name} {median(each[work] for each in taken[name]):.3f}" for name in processes)
        print(f"{work}, median ms a step: {', '.join(steps)}")


if __name__ == "__main__":
    main()
