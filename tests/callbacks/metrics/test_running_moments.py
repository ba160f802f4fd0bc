import numpy as np
import pytest
import torch

from lightning_vae.callbacks.metrics.running_moments import RunningMoments, merge_moments, moments


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_running_moments_equal_numpys():
    values = normal(100, 3) + 1e6
    metric = RunningMoments(3)
    for part in values.split(9):
        metric.update(part)
    count, mean, error = metric.compute()
    assert count == 100
    np.testing.assert_allclose(mean, values.numpy().mean(0), rtol=1e-12)
    np.testing.assert_allclose(error, values.numpy().std(0, ddof=1) / 10, rtol=1e-7)


def test_values_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"must have shape \(N, 3\)"):
        RunningMoments(3).update(torch.zeros(4, 2))


def test_merge_of_empty_sets_is_empty():
    empty = moments(torch.empty(0, 2))
    assert torch.equal(merge_moments(torch.stack([empty, empty])), torch.zeros(3, 2, dtype=torch.float64))
