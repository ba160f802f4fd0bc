"""Compare models that differ in one part: a condition, a prior, or the share of missing values."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch
from runs import header, heading, quiet_trainer, row, train
from torch import Tensor

from lightning_vae import VAE, evaluate
from lightning_vae.datamodules import Digits, TensorLoader

SHORT = (
    "--trainer.limit_val_batches=0 --trainer.logger=false --trainer.enable_checkpointing=false "
    "--trainer.callbacks=CollapseDetector"
)
CONDITION = "--model.condition=Condition --model.condition.classes=10"
BERNOULLI = "--model.likelihood=Bernoulli"
VAMP = "--model.prior=VampPrior --model.prior.components=500"
ANNEALED = (
    "--trainer.callbacks+=KLAnnealing --trainer.callbacks.schedule=Linear --trainer.callbacks.schedule.fraction=0.3"
)


def trained(options: str, seed: int) -> tuple[VAE, Any]:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        cli = train(f"{options} --trainer.default_root_dir={folder}", seed)
    cli.datamodule.setup("test")
    return cli.model, cli.datamodule


def first(data: Any, number: int) -> list[dict[str, Tensor]]:
    """Return the first observations of the test split, in batches of 100."""
    batches, count = [], 0
    for batch in data.test_dataloader():
        batches.append({name: values[: number - count] for name, values in batch.items()})
        count += len(batches[-1]["x"])
        if count >= number:
            break
    return [part for batch in batches for part in TensorLoader(batch, 100)]


def condition(job: tuple[str, str, int, int]) -> list[str]:
    root, options, passes, seed = job
    run = f"--config configs/fashion_mnist.yaml --data.root={root} --trainer.max_epochs={passes} {SHORT} {options}"
    vae, data = trained(run, seed)
    result = evaluate(vae, first(data, 2000), importance_samples=100)
    numbers = (result.nll, result.rate, result.linear_probe_accuracy, result.condition_r2)
    return [f"{number:.3f}" for number in numbers]


def prior(job: tuple[str, str, int, int]) -> list[str]:
    root, options, passes, seed = job
    run = f"--config configs/mnist_burda.yaml --data.root={root} --trainer.max_epochs={passes} {SHORT} {options}"
    vae, data = trained(run, seed)
    result = evaluate(vae, first(data, 1000), importance_samples=500)
    return [f"{number:.2f}" for number in (result.nll, result.nll_error, -result.elbo, result.rate)]


def masked(rows: dict[str, Tensor], share: float, seed: int) -> dict[str, Tensor]:
    """Hide a share of the pixels, at random."""
    if not share:
        return rows
    generator = torch.Generator().manual_seed(seed)
    there = torch.rand(rows["x"].shape, generator=generator) >= share
    return {**rows, "x": rows["x"].where(there, 0), "mask": there}


def missing(job: tuple[str, str, int, int]) -> list[str]:
    _, share, passes, seed = job
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    data = Digits()
    data.setup("fit")
    data.setup("test")
    training = masked(data._splits["train"], float(share), seed)
    test = data._splits["test"]
    vae = VAE(data.shape, data.levels, 16)
    quiet_trainer(passes).fit(vae, TensorLoader(training, 64, shuffle=True))
    vae.eval()
    hidden = masked(test, float(share) or 0.5, seed + 100)
    observations = vae.observe(hidden)
    with torch.no_grad():
        result = evaluate(vae, [hidden], importance_samples=100)
        filled = vae.reconstruct(observations)
    gone = ~hidden["mask"]
    error = (filled - test["x"]).square()[gone].mean().sqrt()
    seen = training.get("mask", torch.ones_like(training["x"], dtype=torch.bool))
    means = (training["x"] * seen).sum(0) / seen.sum(0)
    naive = (means - test["x"]).square()[gone].mean().sqrt()
    per_pixel = result.nll / float(hidden["mask"].flatten(1).sum(1).float().mean())
    return [f"{number:.3f}" for number in (result.nll, per_pixel, float(error), float(naive))]


TABLES = {
    "condition": (
        condition,
        {
            "unconditional": "",
            "given the label": CONDITION,
            "unconditional, Bernoulli": BERNOULLI,
            "given the label, Bernoulli": f"{CONDITION} {BERNOULLI}",
        },
        ("NLL", "rate", "label probe", "condition R2"),
        "Fashion-MNIST, configs/fashion_mnist.yaml, 2,000 test images, K = 100. Label probe: accuracy of a linear "
        "probe for the label on the posterior means; condition R2: of ridge regression for the one-hot label.",
    ),
    "prior": (
        prior,
        {
            "N(0, I)": "",
            "N(0, I), annealed": ANNEALED,
            "VampPrior (500)": VAMP,
            "the same, annealed": f"{VAMP} {ANNEALED}",
        },
        ("NLL", "error", "-ELBO", "rate"),
        "MNIST, configs/mnist_burda.yaml, 1,000 test images, K = 500. Annealed: beta grows from 0 to 1 over the first "
        "30 % of the steps.",
    ),
    "missing": (
        missing,
        {"all pixels": "0", "25 % missing": "0.25", "50 % missing": "0.5"},
        ("NLL of the seen", "per seen pixel", "RMSE of the hidden", "RMSE of the mean"),
        "Scikit-learn's digits with pixels missing at random, in training and in the test; a model of all pixels is "
        "tested with half of them hidden. K = 100; errors of the hidden pixels in grey levels from 0 to 16, against "
        "the training data's mean of each pixel.",
    ),
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--root", default="data", help="folder of the data set")
    parser.add_argument("--passes", type=int, default=20)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="trainings at once, with one thread each")
    given = parser.parse_args(arguments)
    measure, rows, columns, text = TABLES[given.table]
    heading(text, f"{given.passes} passes")
    widths = (26, 5, *(max(9, len(column)) for column in columns))
    header(("model", "seed", *columns), widths)
    models = [(name, options, seed) for name, options in rows.items() for seed in given.seeds]
    jobs = [(given.root, options, given.passes, seed) for _, options, seed in models]
    with ProcessPoolExecutor(given.jobs, mp_context=get_context("spawn")) as pool:
        for (name, _, seed), numbers in zip(models, pool.map(measure, jobs), strict=True):
            row((name, seed, *numbers), widths)


if __name__ == "__main__":
    main()
