"""What measures posteriors keeps no more of many observations than of few."""

import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal

from lightning_vae.callbacks import ActiveUnits, LatentMonitor
from lightning_vae.callbacks.metrics.aggregate_posterior import AggregatePosterior
from lightning_vae.callbacks.metrics.observation_subset import ObservationSubset
from lightning_vae.callbacks.metrics.running_moments import RunningMoments
from lightning_vae.running_sums import RunningSums

DIM, ROWS = 8, 64
PRIOR = Normal(torch.zeros(DIM), torch.ones(DIM))
Take = Callable[[Any, Normal, Tensor], None]

WATCHERS: dict[str, tuple[Callable[[], Any], Take]] = {
    "detector": (
        lambda: LatentMonitor(256),
        lambda it, q, index: it.update(q, PRIOR, index=index),
    ),
    "active units": (lambda: ActiveUnits(DIM), lambda it, q, _: it.update(q.mean)),
    "subset": (lambda: ObservationSubset(DIM, 256), lambda it, q, index: it.update(q.mean, index)),
    "aggregate": (lambda: AggregatePosterior(DIM), lambda it, q, _: it.update(q.mean, q.variance)),
    "moments": (lambda: RunningMoments(DIM), lambda it, q, _: it.update(q.mean)),
    "sums": (lambda: RunningSums(DIM), lambda it, q, _: it.add(q.mean.sum(0), len(q.mean))),
}


@pytest.mark.parametrize("name", list(WATCHERS))
def test_what_is_kept_does_not_grow_with_the_observations(name: str) -> None:
    make, take = WATCHERS[name]
    watcher, sizes = make(), []
    for number in range(640):
        posterior = Normal(torch.randn(ROWS, DIM), torch.rand(ROWS, DIM) + 0.1)
        take(watcher, posterior, torch.arange(number * ROWS, (number + 1) * ROWS))
        if number + 1 in (64, 640):  # whole blocks of each
            sizes.append(len(pickle.dumps(watcher)))
    assert sizes[1] <= sizes[0] + 64  # bytes: counts of more digits
