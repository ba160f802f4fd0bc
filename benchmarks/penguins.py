"""Compare a VAE of a table with independent columns and a Gaussian mixture, on the Palmer penguins."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import torch
from runs import header, heading, row, train
from sklearn.mixture import GaussianMixture
from torch import Tensor
from torch import distributions as td

from lightning_vae import VAE, evaluate
from lightning_vae.datamodules import Table

RUN = "--config configs/table.yaml --data.columns='{year: categorical}' --data.batch_size=32 --trainer.max_epochs=300"
ANNEALED = (
    "--trainer.callbacks=KLAnnealing --trainer.callbacks.schedule=Linear --trainer.callbacks.schedule.fraction=0.3"
)
# Leave out what does not change the results: validation, logging and checkpoints.
SHORT = "--trainer.limit_val_batches=0 --trainer.logger=false --trainer.enable_checkpointing=false"
PRIORS = {"N(0, I)": "", "mixture of 6": "--model.prior=MixturePrior --model.prior.components=6"}
IMPORTANCE_SAMPLES = 1000
DRAWS = 5000  # rows of the model in the picture
WIDTHS = (6, 25, 11, 13)


def default_path() -> Path | None:
    """Return where the package palmerpenguins has its table; ``None`` if it is not installed."""
    found = find_spec("palmerpenguins")
    return Path(found.submodule_search_locations[0], "data", "penguins.csv") if found else None


def independent(data: Table) -> tuple[float, float]:
    """Return the NLL of the test split under independent columns, of the classes and of the numeric columns.

    A numeric column is a Gaussian, any other has its relative frequencies after one more row of each class.
    """
    (x, there), (test, test_there) = (
        (split["x"].double(), split["mask"]) for split in (data._splits["train"], data._splits["test"])
    )
    classes = numeric = 0.0
    for column, kind in enumerate(data.kinds):
        known, asked = x[there[:, column], column], test[test_there[:, column], column]
        if kind == "numeric":
            numeric -= float(td.Normal(known.mean(), known.std(correction=0)).log_prob(asked).sum())
        else:
            counts = torch.bincount(known.long(), minlength=2 if kind == "binary" else int(kind)) + 1
            classes -= float((counts / counts.sum()).log()[asked.long()].double().sum())
    return classes / len(test), numeric / len(test)


def mixture(data: Table) -> float:
    """Return the NLL of the numeric columns of the test split under scikit-learn's full-covariance mixture.

    Its number of components has the best BIC in the training split. A row has all numbers or none.
    """
    columns = is_numeric(data)
    train_rows, test_rows = (
        ((split["x"] - data.loc) / data.scale)[split["mask"][:, columns].all(1)][:, columns].numpy()
        for split in (data._splits["train"], data._splits["test"])
    )
    fits = [GaussianMixture(k, n_init=5, reg_covar=1e-3, random_state=0).fit(train_rows) for k in range(1, 9)]
    best = min(fits, key=lambda fit: fit.bic(train_rows))
    log_density = best.score_samples(test_rows) - float(data.scale[columns].log().sum())
    return float(-log_density.sum() / len(data._splits["test"]["x"]))


def is_numeric(data: Table) -> Tensor:
    return torch.tensor([kind == "numeric" for kind in data.kinds])


def trained(path: Path, options: str, seed: int) -> tuple[VAE, Table]:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        places = f"--data.path={path} --data.seed={seed} --trainer.default_root_dir={folder}"
        cli = train(f"{RUN} {ANNEALED} {SHORT} {places} {options}", seed)
    cli.datamodule.setup("test")
    return cli.model, cli.datamodule


def nll(vae: VAE, rows: dict[str, Tensor], shown: Tensor) -> float:
    """Return the NLL of the columns that are shown; the encoder does not see the others either."""
    mask = rows["mask"] & shown
    batch = {**rows, "x": rows["x"].where(mask, 0), "mask": mask}
    return float(evaluate(vae, [batch], importance_samples=IMPORTANCE_SAMPLES).nll)


def measured(seed: int, path: Path) -> list[tuple[str, float, float]]:
    """Return the NLL of each model, of all columns and of the numeric ones, for one split."""
    results = []
    for name, options in PRIORS.items():
        vae, data = trained(path, options, seed)
        test, numeric = data._splits["test"], is_numeric(data)
        whole = nll(vae, test, torch.ones_like(numeric))
        results.append((f"VAE, {name}", whole, nll(vae, test, numeric)))
    classes, numbers = independent(data)
    mixed = mixture(data)
    return [
        ("independent columns", classes + numbers, numbers),
        ("mixture and classes", classes + mixed, mixed),
        *results,
    ]


def draw(path: Path, output: Path) -> None:
    """Draw the marginals of the table and of samples of a VAE with a mixture as prior, and two columns together."""
    from matplotlib.figure import Figure

    vae, data = trained(path, PRIORS["mixture of 6"], 0)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        drawn = vae.to_data_scale(vae.decode(vae.prior.sample((DRAWS,))).sample())
    parts = data._splits.values()
    x, there = (torch.cat([part[name] for part in parts]) for name in ("x", "mask"))
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    axes = figure.subplots(3, 3).flat
    for column, (name, kind) in enumerate(zip(data.column_names, data.kinds, strict=True)):
        axis, pair = next(axes), (x[there[:, column], column], drawn[:, column])
        axis.set_title(name, fontsize=10)
        if kind == "numeric":
            edges = torch.linspace(float(pair[0].min()), float(pair[0].max()), 25).tolist()
            axis.hist(pair[0].tolist(), edges, density=True, color="#56b4e9", label="data")
            edges = torch.linspace(float(pair[1].min()), float(pair[1].max()), 60).tolist()
            axis.hist(pair[1].tolist(), edges, density=True, histtype="step", color="#990033", label="samples")
            axis.set_yticks([])
        else:
            words = data.categories[name]
            shares = [torch.bincount(values.long(), minlength=len(words)) / len(values) for values in pair]
            places = torch.arange(len(words))
            axis.bar((places - 0.2).tolist(), shares[0].tolist(), 0.4, color="#56b4e9", label="data")
            axis.bar((places + 0.2).tolist(), shares[1].tolist(), 0.4, color="#990033", label="samples")
            axis.set_xticks(places.tolist(), words)
    across, up = (data.column_names.index(name) for name in ("bill_length_mm", "bill_depth_mm"))
    axis, known = next(axes), there[:, across] & there[:, up]
    few = drawn[: int(known.sum())]  # as many as there are data
    axis.plot(x[known, across].tolist(), x[known, up].tolist(), ".", color="#56b4e9", label="data")
    axis.plot(few[:, across].tolist(), few[:, up].tolist(), ".", color="#990033", markersize=3, label="samples")
    axis.set_title("bill_depth_mm by bill_length_mm", fontsize=10)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(output, dpi=80)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--path", type=Path, default=default_path(), help="penguins.csv of palmerpenguins")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="of the split and of training")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at once, with one thread each")
    parser.add_argument("--picture", type=Path, help="draw samples beside the data into this file, and stop")
    given = parser.parse_args(arguments)
    if given.path is None:
        parser.error("the table comes with a package: `pip install palmerpenguins`, or give its file as `--path`.")
    if given.picture:
        draw(given.path, given.picture)
        return
    heading(
        "Palmer penguins: 344 rows, four numeric columns, species, island, sex and year, 19 cells missing. NLL of the "
        f"test split, about 34 rows, in nats per row, {IMPORTANCE_SAMPLES} importance samples for the VAE. Numeric "
        "alone: the other columns are hidden. Mixture: scikit-learn's Gaussian mixture of the numeric columns, "
        "components by BIC, and the classes independent."
    )
    header(("seed", "model", "all columns", "numeric alone"), WIDTHS)
    with ProcessPoolExecutor(given.jobs, mp_context=get_context("spawn")) as pool:
        tables = []
        for seed, results in zip(given.seeds, pool.map(partial(measured, path=given.path), given.seeds), strict=True):
            for result in results:
                row((seed, *result), WIDTHS)
            tables.append(results)
    for each in zip(*tables, strict=True):
        row(("median", each[0][0], median(found[1] for found in each), median(found[2] for found in each)), WIDTHS)


if __name__ == "__main__":
    main()
