"""Compare a plain VAE with schedules, free bits, other betas and a target rate, on two data sets."""

from __future__ import annotations

import argparse
import csv
import math
import platform
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import lightning
import torch
from runs import SEEDS, header, heading, row, train

from lightning_vae import __version__
from lightning_vae.evaluation.measure import evaluate
from lightning_vae.sweep.tables import write

KL = "--trainer.callbacks+=KLAnnealing --trainer.callbacks.schedule"
SCHEDULE = "--trainer.callbacks.schedule"
METHODS = {
    "plain": "",
    "annealed": f"{KL}=Linear {SCHEDULE}.fraction=0.3",
    "cyclical": f"{KL}=Cyclical {SCHEDULE}.period_fraction=0.2 {SCHEDULE}.cycles=4",
    "free bits": "--trainer.callbacks+=FreeBits --trainer.callbacks.threshold=0.5",
    "target rate": "--trainer.callbacks+=TargetRate --trainer.callbacks.bits=8",
    "beta 0.1": "--model.beta=0.1",
    "beta 10": "--model.beta=10",
}
BASE = "--config configs/digits.yaml --trainer.callbacks=CollapseDetector"
DATA = {
    "digits": "",  # 22 steps an epoch
    "Fashion-MNIST": "--data=FashionMNIST --data.batch_size=128 --trainer.max_epochs=6",  # 422
}
# Leave out what does not change the results: validation, logging and checkpoints.
SHORT = "--trainer.limit_val_batches=0 --trainer.logger=false --trainer.enable_checkpointing=false"
IMPORTANCE_SAMPLES = 100
RESULTS = Path(__file__).parent / "results" / "methods.csv"
FIGURE = Path(__file__).parent.parent / "docs" / "images" / "methods.png"
MARKERS = "os^DvPX"
EXCESS = (0, 0.5, 1, 2, 5, 10, 20, 50, 100)  # nats
# Rows of the tables: the name, the column and the decimals.
QUANTITIES = (
    ("-ELBO", "negative_elbo", 2),
    ("NLL", "nll", 2),
    ("effective samples", "effective_sample_size", 1),
    ("rate", "rate", 2),
    ("distortion", "distortion", 2),
    ("MI", "mutual_information", 2),
    ("marginal KL", "marginal_kl", 2),
    ("active units", "active_units", 0),
    ("z shuffled", "shuffled_gap", 1),
    ("implied beta", "implied_beta", 2),
    ("prior samples", "sample_distance", 2),
    ("interpolations", "interpolation_distance", 2),
    ("5 neighbours", "knn_accuracy", 3),
    ("linear probe", "linear_probe_accuracy", 3),
    ("verdict", "verdict", 0),
)
BOUNDED = ("mutual_information", "marginal_kl")  # lower bounds where the mutual information is saturated

Row = dict[str, Any]


def command(data: str, method: str, seed: int) -> str:
    """Return the options that distinguish a run from the others, without the folder of the data."""
    return " ".join(filter(None, (BASE, DATA[data], METHODS[method], f"--seed_everything={seed}")))


def measure(data: str, method: str, seed: int, root: str) -> Row:
    """Train one model, and evaluate it after the last step on the test split."""
    torch.set_num_threads(1)
    place = f"--data.root={root}" if "FashionMNIST" in DATA[data] else ""
    with tempfile.TemporaryDirectory() as folder:
        short = f"{SHORT} --trainer.default_root_dir={folder}"
        cli = train(f"{BASE} {DATA[data]} {place} {METHODS[method]} {short}", seed)
    cli.datamodule.setup("test")
    found = evaluate(cli.model, cli.datamodule.test_dataloader(), IMPORTANCE_SAMPLES).to_dict()
    measured = {name: value for name, value in found.items() if not isinstance(value, list | tuple | str)}
    return {
        "data": data,
        "method": method,
        "seed": seed,
        "negative_elbo": -found["elbo"],
        **measured,
        "verdict": found["verdict"],
        "lightning_vae": __version__,
        "torch": torch.__version__,
        "lightning": lightning.__version__,
        "python": platform.python_version(),
        "command": command(data, method, seed),
    }


def read(path: Path) -> list[Row]:
    """Read the rows of finished runs whose commands are still part of the comparison."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        rows: list[Row] = list(csv.DictReader(file))
    wanted = {command(data, method, seed) for data, method, seed in plan()}
    return [each for each in rows if each["command"] in wanted]


def plan() -> list[tuple[str, str, int]]:
    return [(data, method, seed) for data in DATA for seed in SEEDS for method in METHODS]


def run(path: Path, root: str, jobs: int) -> list[Row]:
    """Run the methods that are not in the file yet, several at once."""
    rows = read(path)
    done = {each["command"] for each in rows}
    missing = [point for point in plan() if command(*point) not in done]
    print(f"{len(plan())} runs, {len(done)} of them in {path} already; {jobs} at once, one thread each", flush=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        futures = {pool.submit(measure, *point, root): point for point in missing}
        try:
            for number, future in enumerate(as_completed(futures), 1):
                rows.append(future.result())
                write(path, rows)
                found = rows[-1]
                terms = f"-ELBO {found['negative_elbo']:.2f}, rate {found['rate']:.2f} nats"
                print(f"[{number}/{len(missing)}] {', '.join(map(str, futures[future]))}: {terms}", flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return read(path)  # as a later call will


def cell(rows: Sequence[Row], column: str, decimals: int) -> str:
    """Format the median over the seeds and, in parentheses, the range."""
    if column == "verdict":
        return "/".join(sorted({each[column].removesuffix("-regularised") for each in rows}))
    values = [float(each[column]) for each in rows if each[column]]
    if not values:
        return "-"
    saturated = [each["mutual_information_saturated"] == "True" for each in rows]
    if column in BOUNDED and any(saturated):
        capped = column == "mutual_information" and all(saturated)
        return f">= {math.log(int(rows[0]['mutual_information_observations'])) if capped else min(values):.{decimals}f}"
    return f"{median(values):z.{decimals}f} ({max(values) - min(values):.{decimals}f})"


def table(rows: Sequence[Row]) -> None:
    widths = (17, *(16 for _ in METHODS))
    header(("", *METHODS), widths)
    for name, column, decimals in QUANTITIES:
        of = {method: [each for each in rows if each["method"] == method] for method in METHODS}
        row((name, *(cell(of[method], column, decimals) for method in METHODS)), widths)


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw rates and distortions for each data set, and the likelihoods beside them."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(len(DATA), 2, figsize=(11, 8.4), width_ratios=(1.25, 1), layout="constrained")
    for data, (plane, strip) in zip(DATA, axes, strict=True):
        of = [each for each in rows if each["data"] == data]
        best = min(float(each["nll"]) for each in of)
        for place, method in enumerate(METHODS):
            mine = [each for each in of if each["method"] == method]
            rate, distortion, bound, nll = (
                [float(each[name]) for each in mine] for name in ("rate", "distortion", "negative_elbo", "nll")
            )
            look = {
                "color": f"C{place}",
                "marker": MARKERS[place],
                "linestyle": "none",
                "alpha": 0.75,
                "clip_on": False,
            }
            plane.plot(rate, distortion, markersize=8, **look)
            strip.plot([value - best for value in nll], [place] * len(nll), markersize=7, **look)
            strip.plot([value - best for value in bound], [place] * len(bound), markersize=7, fillstyle="none", **look)
        _isolines(plane)
        plane.set(title=f"{data}; lines of equal -ELBO", xlabel="rate, nats", ylabel="distortion, nats")
        strip.set_xscale("symlog", linthresh=1)  # seeds differ by tenths of a nat, betas by ten
        strip.set_xticks(EXCESS, map(str, EXCESS))
        strip.set(
            title="-ELBO (open), NLL (filled)", xlabel=f"nats above the best NLL, {best:.1f}", xlim=(-0.1, EXCESS[-1])
        )
        strip.set_yticks(range(len(METHODS)), list(METHODS))
        for place, label in enumerate(strip.get_yticklabels()):
            label.set_color(f"C{place}")
        strip.invert_yaxis()
        strip.grid(axis="x", alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _isolines(axes: Any) -> None:
    """Draw labelled lines of equal -ELBO, rate + distortion, in the background."""
    from matplotlib.ticker import MaxNLocator

    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    axes.set(xlim=(left, right), ylim=(bottom, top))
    for total in MaxNLocator(9).tick_values(left + bottom, right + top):
        axes.axline((0, total), slope=-1, color="0.85", linewidth=1, zorder=0)
        end = (right, total - right) if total - right > bottom else (total - bottom, bottom)
        if left + 0.1 * (right - left) < end[0] and end[1] < top:
            box = {"facecolor": "white", "edgecolor": "none", "pad": 1.0}
            axes.text(
                *end,
                f"{total:g}",
                color="0.5",
                fontsize=9,
                ha="right",
                va="bottom",
                bbox=box,
                zorder=0.5,
                in_layout=False,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", default="data", help="folder of Fashion-MNIST, to which it is downloaded if missing")
    parser.add_argument("--jobs", type=int, default=2, help="runs at once")
    parser.add_argument("--results", type=Path, default=RESULTS, help="table of the runs; finished runs in it are kept")
    parser.add_argument("--figure", type=Path, default=FIGURE, help="picture to draw")
    options = parser.parse_args()
    heading(
        "Methods. The model of configs/digits.yaml (Bernoulli, 16 latents, MLP 256-256) on scikit-learn's digits (1350 "
        "to train, 120 epochs) and on Fashion-MNIST (54000, 6 epochs, about as many steps), after the last step, on "
        f"the test split (297 and 10000), in nats per image; {IMPORTANCE_SAMPLES} importance samples. The runs:",
        f"python train.py fit {BASE} --seed_everything SEED, and",
        *(f"  {name:<14} {arguments}" for name, arguments in (METHODS | DATA).items() if arguments),
    )
    rows = run(options.results, options.root, options.jobs)
    for data in DATA:
        print(f"\n{data}: medians of seeds {', '.join(map(str, SEEDS))} (largest less smallest)\n")
        table([each for each in rows if each["data"] == data])
    draw(rows, options.figure)
    print(f"\nFigure: {options.figure}")


if __name__ == "__main__":
    main()
