import pickle

import numpy as np
import torch

from lightning_vae.estimators import AggregatePosterior, aggregate_moments


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_moments_equal_numpys_also_far_from_zero():
    mean, variance = normal(500, 4) @ normal(4, 4, seed=1) + 1e5, normal(500, 4, seed=2).exp()
    moments = aggregate_moments(mean, variance)
    covariance = np.cov(mean.numpy().T, bias=True)
    np.testing.assert_allclose(moments.mean, mean.numpy().mean(0))
    np.testing.assert_allclose(moments.covariance_of_means, covariance, rtol=1e-7, atol=1e-7)
    np.testing.assert_allclose(moments.covariance, covariance + np.diag(variance.numpy().mean(0)), rtol=1e-7, atol=1e-7)
    np.testing.assert_allclose(moments.variance_of_means, np.diag(covariance), rtol=1e-7)


def test_active_dimensions_exceed_the_threshold():
    mean = torch.tensor([[-0.125, -0.13, 5.0], [0.125, 0.13, 5.0]], dtype=torch.float64)
    moments = aggregate_moments(mean, torch.ones(2, 3))
    assert moments.active(0.125**2).tolist() == [False, True, False]  # the threshold itself is not above it
    assert moments.active().tolist() == [True, True, False]


def test_aggregate_metric_streams_merges_and_pickles():
    mean, variance = normal(300, 3) + 1e4, normal(300, 3, seed=2).exp()
    left, right = AggregatePosterior(3), AggregatePosterior(3)
    left.update(mean[:0], variance[:0])
    for part in range(0, 120, 11):
        left.update(mean[part : min(part + 11, 120)], variance[part : min(part + 11, 120)])
    right.update(mean[120:], variance[120:])
    left = pickle.loads(pickle.dumps(left))
    left.merge_state(right)
    torch.testing.assert_close(vars(left.compute()), vars(aggregate_moments(mean, variance)), rtol=1e-9, atol=1e-9)


def test_one_latent_dimension_keeps_its_shapes():
    metric = AggregatePosterior(1)
    metric.update(torch.tensor([[-1.0], [1.0]]), torch.ones(2, 1))
    moments = metric.compute()
    assert (moments.mean.tolist(), moments.covariance.tolist(), moments.active().tolist()) == ([0.0], [[2.0]], [True])
