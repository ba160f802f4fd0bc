import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from lightning_vae.callbacks.metrics.mutual_information import PosteriorSample
from lightning_vae.callbacks.metrics.rate_decomposition import cross_fitted_marginal_kl, decompose_rate, is_saturated


def posteriors(rows: int, dim: int, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Posteriors of one scale whose aggregate is N(0, I)."""
    noise = torch.randn(rows, dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return noise * math.sqrt(1 - scale**2), torch.full((rows, dim), scale**2, dtype=torch.float64)


def rates(mean: torch.Tensor, variance: torch.Tensor, prior: Normal) -> torch.Tensor:
    return kl_divergence(Normal(mean, variance.sqrt()), prior).sum(dim=1)


def decomposed(mean, variance, rates=None):
    sample = PosteriorSample.draw(mean, variance)
    return decompose_rate(sample, sample.log_mixture(), rates)


def test_saturation_begins_at_nine_tenths_of_log_m():
    assert not is_saturated(0.899 * math.log(100), 100)
    assert is_saturated(0.901 * math.log(100), 100)


@pytest.mark.parametrize(("scale", "saturated"), [(0.5, False), (0.01, True)])
def test_the_standard_prior_is_recognised_by_its_rates(scale, saturated):
    mean, variance = posteriors(1000, 4, scale)
    own, known = decomposed(mean, variance), decomposed(mean, variance, rates(mean, variance, Normal(0.0, 1.0)))
    assert [*map(float, own)] == pytest.approx([*map(float, known)])
    assert own.saturated is saturated
    assert own.marginal_kl == pytest.approx(0, abs=0.05)  # rate less log M would be 11.5 nats


@pytest.mark.parametrize(("scale", "saturated"), [(0.5, False), (0.01, True)])
def test_with_another_prior_the_marginal_kl_is_still_exact(scale, saturated):
    mean, variance = posteriors(1000, 4, scale)  # q(z) is N(0, I)
    other = rates(mean, variance, Normal(0.5, 2.0))
    found = decomposed(mean, variance, other)
    assert found.saturated is saturated
    exact = 4 * float(kl_divergence(Normal(0.0, 1.0), Normal(0.5, 2.0)))
    assert found.marginal_kl == pytest.approx(exact, abs=0.1)  # 1.398 nats; rate less log M would be 12.9
    if not saturated:
        assert found.marginal_kl == other.mean() - found.mutual_information
    assert decomposed(mean, variance, other * math.nan).marginal_kl.isnan()


def test_noise_makes_neither_part_negative():
    mean = 0.1 * torch.randn(20, 2, generator=torch.Generator().manual_seed(2)).double()
    variance = 1 + mean.abs()
    sample = PosteriorSample.draw(mean, variance)
    for leave_one_out in (False, True):
        mixture = sample.log_mixture(leave_one_out)
        assert sample.average(sample.log_own - mixture) < -0.005
        assert sample.information(mixture) == 0
    assert decomposed(mean, variance, torch.full((20,), -0.02).double())[:2] == (0, 0)  # an estimate, which may be


def test_the_bound_by_moments_is_the_divergence_of_a_gaussian():
    covariance = torch.tensor([[2.0, 0.9], [0.9, 0.5]], dtype=torch.float64)
    noise = torch.randn(20_000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    variance = torch.full((20_000, 2), 0.02, dtype=torch.float64)
    mean = torch.tensor([2.0, 0.0]) + noise @ torch.linalg.cholesky(covariance - 0.02 * torch.eye(2)).T
    expected = 0.5 * (4 + 2.5 - 2 - math.log(2 * 0.5 - 0.81))
    assert cross_fitted_marginal_kl(mean, variance) == pytest.approx(expected, abs=0.06)  # a standard error of 0.02
    assert cross_fitted_marginal_kl(torch.zeros(100, 3), torch.ones(100, 3)) == 0


def test_more_dimensions_than_observations_are_fitted_one_by_one():
    mean, variance = posteriors(200, 201, 0.5)
    assert cross_fitted_marginal_kl(mean, variance) == 0
    assert cross_fitted_marginal_kl(mean + 0.5, variance) == pytest.approx(201 / 8, abs=4)
