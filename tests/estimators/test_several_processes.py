"""Every streaming metric of an evaluation gives the same on two processes as on one."""

from pathlib import Path

import pytest
import torch

from lightning_vae.callbacks.metrics.observation_subset import random_keys
from lightning_vae.estimators import (
    AggregatePosterior,
    ImportanceWeightedLikelihood,
    ObservationSubset,
    RunningMoments,
    aggregate_moments,
)
from tests.processes import in_two_processes


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def share(rank: int, folder: Path) -> None:
    part = slice(0, 70) if rank == 0 else slice(70, 100)
    values = normal(100, 3)
    metrics = RunningMoments(3), AggregatePosterior(3), ImportanceWeightedLikelihood(), ObservationSubset(3, 40)
    metrics[0].update(values[part])
    metrics[1].update(values[part], values[part].exp())
    metrics[2].update(values[part].T)
    metrics[3].update(values[part], torch.arange(100)[part] * 37 % 101)
    found = list(metrics[0].compute()), vars(metrics[1].compute()), list(metrics[2].compute()), metrics[3].compute()
    torch.save(list(found), folder / f"{rank}.pt")


def test_two_processes_equal_one(tmp_path):
    in_two_processes(share, tmp_path)
    values = normal(100, 3)
    likelihood = ImportanceWeightedLikelihood()
    likelihood.update(values.T)
    kept = values[random_keys(torch.arange(100) * 37 % 101).argsort()[:40]]
    averages = [torch.tensor(100.0).double(), values.mean(0), values.std(0) / 10]
    expected = [averages, vars(aggregate_moments(values, values.exp())), list(likelihood.compute()), kept]
    for rank in range(2):
        torch.testing.assert_close(torch.load(tmp_path / f"{rank}.pt"), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: RunningMoments(0), "columns"),
        (lambda: AggregatePosterior(0), "dim"),
        (lambda: ObservationSubset(0, 1), "columns"),
        (lambda: ObservationSubset(1, 0), "size"),
    ],
)
def test_invalid_options(make, name):
    with pytest.raises(ValueError, match=f"`{name}` must be at least 1, got 0"):
        make()
