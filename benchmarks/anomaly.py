"""Hold each digit out of training in turn, and find it in the test split by four scores."""

from __future__ import annotations

import argparse
import shlex
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from statistics import fmean

import torch
from runs import header, heading, row, train

from lightning_vae import VAE, score
from lightning_vae.datamodules.base import DataModule
from lightning_vae.estimators import auroc

RUN = "--config configs/digits.yaml --trainer.callbacks=CollapseDetector"
# Leave out what does not change the results: validation, logging and checkpoints.
SHORT = "--trainer.limit_val_batches=0 --trainer.logger=false --trainer.enable_checkpointing=false"
IMPORTANCE_SAMPLES = 100
SIGNS = {"elbo": -1, "rate": 1, "distortion": 1, "nll": 1}  # what is higher counts as more anomalous
WIDTHS = (8, 15, 8, 8, 10, 8, 17)


def find(digit: int, options: str, seed: int) -> list[float]:
    """Train without a digit, and return the AUROC of each score for it and the mean effective sample size."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        cli = train(f"{RUN} --data.held_out=[{digit}] {SHORT} --trainer.default_root_dir={folder} {options}", seed)
    cli.datamodule.setup("test")
    return measured(cli.model, cli.datamodule, digit)


def measured(vae: VAE, data: DataModule, digit: int) -> list[float]:
    scores, labels = [], []
    for batch in data.test_dataloader():
        observations = vae.observe(batch)
        scores.append(score(vae, observations, IMPORTANCE_SAMPLES))
        labels.append(observations.label)
    whole = {name: torch.cat([each[name] for each in scores]) for name in scores[0]}
    is_outlier = torch.cat(labels) == digit
    found = [float(auroc(sign * whole[name], is_outlier)) for name, sign in SIGNS.items()]
    return [*found, float(is_outlier.sum()), float(whole["effective_sample_size"].mean())]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--digits", type=int, nargs="+", default=range(10), help="the digits to hold out")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at once, with one thread each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--options", default="", help="further options of `fit`, such as `--model.beta=0.1`")
    given = parser.parse_args(arguments)
    heading(
        "Anomalies. Scikit-learn's digits, the model of configs/digits.yaml trained without one of them; AUROC of each "
        "score for that digit in the test split (297 images of all ten digits) after the last step, where a higher "
        f"score counts as more anomalous. {IMPORTANCE_SAMPLES} importance samples, the distortion is their mean. By "
        f"hand: python train.py fit {RUN} --data.held_out=[3], then `predict` and `auroc`.",
        f"seed {given.seed}{f', options {shlex.quote(given.options)}' if given.options else ''}",
    )
    header(("held out", "of 297 images", "-ELBO", "rate", "distortion", "NLL", "effective samples"), WIDTHS)
    with ProcessPoolExecutor(given.jobs, mp_context=get_context("spawn")) as pool:
        results = []
        for digit, (*areas, count, effective) in zip(
            given.digits, pool.map(partial(find, options=given.options, seed=given.seed), given.digits), strict=True
        ):
            row((digit, int(count), *(f"{area:.3f}" for area in areas), f"{effective:.1f}"), WIDTHS)
            results.append(areas)
    means = [fmean(column) for column in zip(*results, strict=True)]
    row(("mean", "", *(f"{mean:.3f}" for mean in means), ""), WIDTHS)


if __name__ == "__main__":
    main()
