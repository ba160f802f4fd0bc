"""Metrics refuse shapes and values that they have no meaning for."""

import pytest
import torch

from lightning_vae.callbacks.metrics.active_units import active_units, variance_of_means
from lightning_vae.callbacks.metrics.aggregate_posterior import AggregatePosterior, aggregate_moments
from lightning_vae.callbacks.metrics.collapse_state import collapse_state
from lightning_vae.callbacks.metrics.latent_layout import LatentLayout
from lightning_vae.callbacks.metrics.latent_monitor import LatentMonitor
from lightning_vae.callbacks.metrics.mutual_information import PosteriorSample, mutual_information
from lightning_vae.callbacks.metrics.observation_subset import ObservationSubset, random_keys
from lightning_vae.callbacks.metrics.rate_decomposition import cross_fitted_marginal_kl, decompose_rate
from lightning_vae.callbacks.metrics.running_moments import moments, pooled_mean
from lightning_vae.callbacks.reading.padding import mask_like

MEAN, ROW = torch.zeros(4, 3), torch.ones(1, 3)
JOINT = torch.distributions.MultivariateNormal(MEAN, torch.eye(3))
CATEGORIES = torch.distributions.OneHotCategorical(torch.ones(4, 3))
SAMPLE = PosteriorSample.draw(MEAN, torch.ones(4, 3))
CALLS = {
    "active units of one axis": lambda: active_units(torch.zeros(4)),
    "active units of none": lambda: active_units(torch.zeros(0, 3)),
    "active units of NaN": lambda: active_units(torch.full((4, 3), torch.nan)),
    "variances of three axes": lambda: variance_of_means(torch.zeros(4, 3, 2)),
    "one variance for all": lambda: aggregate_moments(MEAN, ROW),
    "a column for all dimensions": lambda: AggregatePosterior(3).update(torch.zeros(4, 1), torch.ones(4, 1)),
    "one variance for all posteriors": lambda: mutual_information(MEAN, ROW),
    "a negative variance": lambda: mutual_information(MEAN, -torch.ones(4, 3)),
    "a variance of NaN": lambda: mutual_information(MEAN, torch.full((4, 3), torch.nan)),
    "one term for all": lambda: SAMPLE.average(torch.ones(1)),
    "one rate for all": lambda: decompose_rate(SAMPLE, torch.zeros(4), torch.ones(1)),
    "one log-density for all": lambda: decompose_rate(SAMPLE, torch.zeros(1)),
    "one variance in ten folds": lambda: cross_fitted_marginal_kl(MEAN, ROW),
    "moments of one axis": lambda: moments(torch.zeros(4)),
    "a count for all": lambda: pooled_mean(torch.ones(4, 1), MEAN),
    "one rate for all dimensions": lambda: collapse_state(torch.ones(2), torch.ones(3), None, 10),
    "a variance that is NaN": lambda: collapse_state(None, torch.full((3,), torch.nan), None, 10),
    "rows of another length": lambda: ObservationSubset(2, 5).update(MEAN, torch.arange(4)),
    "one index for all": lambda: ObservationSubset(3, 5).update(MEAN, torch.zeros(1, dtype=torch.long)),
    "fractions for indices": lambda: random_keys(torch.tensor([0.5])),
    "one width for all dimensions": lambda: collapse_state(None, torch.ones(3), None, 10, width=torch.ones(1)),
    "a variance for all": lambda: LatentMonitor().update((MEAN, ROW[:, :2])),
    "an index for all": lambda: LatentMonitor().update((MEAN, MEAN), index=torch.zeros(1)),
    "the axis of observations pooled": lambda: LatentMonitor(pool=0),
    "all axes pooled": lambda: LatentMonitor(pool=1).update((MEAN, MEAN)),
    "an axis too many pooled": lambda: LatentMonitor(pool=(2, 3)).update((MEAN, MEAN)),
    "a floor of observations": lambda: LatentMonitor(observations=1),
    "a prior of another size": lambda: LatentMonitor().update((MEAN, MEAN), (torch.zeros(2), torch.zeros(2))),
    "a mask of another size": lambda: LatentMonitor().update((MEAN, MEAN), mask=torch.ones(4, 2)),
    "a mask that fits two axes": lambda: mask_like(torch.ones(4, 3), torch.ones(4, 3, 3)),
    "a mask of a joint rate": lambda: LatentMonitor().update(JOINT, mask=torch.ones(4, 3)),
    "groups of two kinds": lambda: LatentMonitor().update({"a": (MEAN, MEAN), "b": CATEGORIES}),
    "a group that comes later": lambda: _two_groups(),
    "a boolean for an axis": lambda: LatentLayout(True),
}


def _two_groups():
    monitor = LatentMonitor()
    monitor.update((MEAN, MEAN))
    monitor.update({"a": (MEAN, MEAN), "b": (MEAN, MEAN)})


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_refused(call):
    with pytest.raises(ValueError, match=r"must|needs|in one step and"):
        call()
