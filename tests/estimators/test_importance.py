import math

import numpy as np
import pytest
import torch
from scipy.special import logsumexp

from lightning_vae.estimators import ImportanceWeightedLikelihood, effective_sample_size, importance_weighted_bound


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_bound_and_effective_size_equal_their_definitions():
    log_weights = normal(50, 7, seed=3) * 3 - 80
    numpy = log_weights.numpy()
    np.testing.assert_allclose(importance_weighted_bound(log_weights), logsumexp(numpy, axis=0) - math.log(50))
    weights = np.exp(numpy - numpy.max(0))
    np.testing.assert_allclose(effective_sample_size(log_weights), weights.sum(0) ** 2 / (weights**2).sum(0))


def test_equal_weights_are_the_likelihood_at_any_number_and_all_effective():
    for number in (1, 10, 1000):
        log_weights = torch.full((number, 3), -1234.5)
        torch.testing.assert_close(importance_weighted_bound(log_weights), torch.full((3,), -1234.5).double())
        assert effective_sample_size(log_weights).tolist() == [number] * 3


def test_one_weight_that_carries_everything():
    log_weights = torch.tensor([[0.0], [-1000.0], [-1000.0], [-1000.0]])
    assert importance_weighted_bound(log_weights).item() == pytest.approx(-math.log(4))
    assert effective_sample_size(log_weights).item() == 1


@pytest.mark.parametrize("spread", [0, 1e-9, 1e-3, 1, 30, 1e5])
def test_the_effective_size_is_from_one_to_the_number(spread):
    for number in (1, 2, 7, 1000):
        sizes = effective_sample_size(-1e4 + spread * normal(number, 200, seed=number))
        assert ((sizes >= 1) & (sizes <= number)).all()


def test_two_equal_weights_of_many_count_as_two():
    log_weights = torch.tensor([[-80.0], [-80.0], [-5000.0], [-5000.0]])
    assert effective_sample_size(log_weights).item() == 2
    twice = torch.tensor([2.0, 1.0]).double().log()[:, None]  # (2 + 1)^2 / (4 + 1)
    assert effective_sample_size(twice).item() == pytest.approx(1.8, rel=1e-15)


def test_likelihood_metric_streams_and_merges():
    log_weights = normal(20, 101) * 2 - 500
    bounds = importance_weighted_bound(log_weights).numpy()
    left, right = ImportanceWeightedLikelihood(), ImportanceWeightedLikelihood()
    for part in log_weights[:, :60].split(7, dim=1):
        left.update(part)
    right.update(log_weights[:, 60:])
    right.update(log_weights[:, :0])
    left.merge_state(right)
    result = left.compute()
    assert result.value.item() == pytest.approx(bounds.mean(), rel=1e-12)
    assert result.standard_error.item() == pytest.approx(bounds.std(ddof=1) / math.sqrt(101), rel=1e-9)
    assert result.effective_sample_size.item() == pytest.approx(float(effective_sample_size(log_weights).mean()))
