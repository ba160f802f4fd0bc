import math

import numpy as np
import pytest
import torch
from scipy.special import logsumexp
from scipy.stats import multivariate_normal
from torch.distributions import MultivariateNormal, kl_divergence

from lightning_vae.callbacks.metrics.mutual_information import mutual_information
from lightning_vae.estimators import aggregate_moments, cross_fitted_marginal_kl, mixture_estimates


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def linear_posteriors(number, s=0.4, eigenvalues=(5.0, 3.0, 1.5, 0.8), seed=1):
    """Posteriors of the optimal linear VAE, whose mutual information is sum 1/2 log(l / s) and marginal KL 0."""
    eigenvalues = torch.tensor(eigenvalues, dtype=torch.float64)
    mean = normal(number, len(eigenvalues), seed=seed) * (1 - s / eigenvalues).sqrt()
    return mean, (s / eigenvalues).expand(number, -1), float(0.5 * (eigenvalues / s).log().sum())


def direct(mean, variance, seed=0x5EED):
    """The definitions, with scipy's densities in loops."""
    number, k = mean.shape
    noise = torch.randn(mean.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    sample = (mean + variance.sqrt() * noise).numpy()
    deviation = (sample[:, None] - mean.numpy()) / variance.sqrt().numpy()
    each = -0.5 * deviation**2 - 0.5 * np.log(2 * np.pi * variance.numpy())
    joint = each.sum(2)
    own = np.diag(joint)
    mixture = logsumexp(joint, axis=1) - math.log(number)
    np.fill_diagonal(others := joint.copy(), -np.inf)
    marginals = (logsumexp(each, axis=1) - math.log(number)).sum(1)
    prior = multivariate_normal(np.zeros(k)).logpdf(sample)
    rate = 0.5 * (variance + mean**2 - 1 - variance.log()).sum(1).numpy()
    control = own - prior - rate

    def regressed(terms):
        return terms.mean() - np.cov(terms, control, bias=True)[0, 1] / (control**2).mean() * control.mean()

    lower, upper = regressed(own - mixture), regressed(own - logsumexp(others, axis=1) + math.log(number - 1))
    return lower, upper, rate.mean() - lower, regressed(mixture - marginals)


@pytest.mark.parametrize(("rows", "at_once"), [(7, 1400), (64, 2**20)])
def test_mixture_estimates_equal_their_definitions(rows, at_once, monkeypatch):
    monkeypatch.setattr("lightning_vae.callbacks.metrics.mutual_information._ROWS", rows)
    monkeypatch.setattr("lightning_vae.estimators.mixture._AT_ONCE", at_once)
    mean, variance, _ = linear_posteriors(200, s=0.6)
    mean, variance = mean + 0.3, variance * (1 + mean.sigmoid())
    estimates = mixture_estimates(mean, variance)
    found = estimates.lower, estimates.upper_leave_one_out, estimates.marginal_kl, estimates.total_correlation
    np.testing.assert_allclose([float(value) for value in found], direct(mean, variance), rtol=1e-10)
    assert estimates.lower == mutual_information(mean, variance)  # the detector's


def test_bounds_enclose_the_linear_vaes_mutual_information():
    mean, variance, exact = linear_posteriors(2048)
    assert exact == pytest.approx(3.2778, abs=1e-4)
    estimates = mixture_estimates(mean, variance)
    assert not estimates.saturated
    assert exact - 0.1 < estimates.lower < estimates.upper < exact + 0.1
    assert estimates.upper_leave_one_out == pytest.approx(exact, abs=0.1)
    assert estimates.upper_moments == pytest.approx(exact, abs=0.1)
    assert estimates.rate == pytest.approx(exact, abs=0.1)
    assert estimates.marginal_kl == pytest.approx(0, abs=0.05)
    assert estimates.total_correlation == pytest.approx(0, abs=0.05)


def test_a_mutual_information_above_log_m_is_saturated_and_the_moments_stay_right():
    eigenvalues = tuple(0.4 * math.exp(2 * 12.488 / 4) for _ in range(4))
    mean, variance, exact = linear_posteriors(2048, eigenvalues=eigenvalues)
    assert exact == pytest.approx(12.488)
    estimates = mixture_estimates(mean, variance)
    assert estimates.saturated
    assert estimates.lower == pytest.approx(math.log(2048), abs=0.05)
    assert estimates.upper_leave_one_out > 20
    assert estimates.upper == estimates.upper_moments == pytest.approx(exact, abs=0.1)
    assert estimates.marginal_kl == pytest.approx(0, abs=0.05)
    assert estimates.total_correlation == pytest.approx(0, abs=0.05)


def test_few_observations_of_many_dimensions_leave_the_bound_by_moments_a_bound():
    eigenvalues = (1.0,) * 64
    mean, variance, exact = linear_posteriors(300, s=0.1, eigenvalues=eigenvalues)
    moments = aggregate_moments(mean, variance)
    own = MultivariateNormal(moments.mean, moments.covariance)
    prior = MultivariateNormal(torch.zeros(64).double(), torch.eye(64).double())
    assert kl_divergence(own, prior) > 2  # of the sample itself, where the truth is 0
    estimates = mixture_estimates(mean, variance)
    assert estimates.marginal_kl < 0.2
    assert estimates.upper > exact - 0.5
    moved = mixture_estimates(mean + 0.5, variance)
    assert 64 / 8 - 5 < moved.marginal_kl < 64 / 8


def test_collapsed_posteriors_carry_no_information_and_an_offset_is_all_marginal_kl():
    mean, variance = torch.tensor([2.0, 0.0]).expand(2000, 2), torch.ones(2000, 2)
    estimates = mixture_estimates(mean, variance)
    assert abs(estimates.lower) < 1e-12
    assert abs(estimates.upper) < 1e-12
    assert estimates.rate == pytest.approx(2.0)
    assert estimates.marginal_kl == pytest.approx(2.0, abs=0.15)  # a standard error of 2 / sqrt(2000)


def test_correlated_latents_have_their_total_correlation():
    covariance = torch.tensor([[1.0, 0.8], [0.8, 1.0]], dtype=torch.float64)
    means = normal(2000, 2) @ torch.linalg.cholesky(covariance - 0.15 * torch.eye(2)).T
    estimates = mixture_estimates(means, torch.full((2000, 2), 0.15))
    assert not estimates.saturated
    assert estimates.total_correlation == pytest.approx(-0.5 * math.log(1 - 0.64), abs=0.06)


def test_modes_apart_have_a_marginal_kl_that_the_moments_do_not_see():
    sign = torch.arange(1000).remainder(2).double() * 2 - 1
    means, variances = 0.99 * sign[:, None], torch.full((1000, 1), 1 - 0.99**2).double()
    estimates = mixture_estimates(means, variances)
    assert cross_fitted_marginal_kl(means, variances) == pytest.approx(0, abs=0.01)
    assert estimates.lower == pytest.approx(math.log(2), abs=1e-6)
    # The rate of either posterior, less the one bit that tells them apart.
    assert estimates.marginal_kl == pytest.approx(float(estimates.rate) - math.log(2), abs=0.1)


@pytest.mark.parametrize(("mean", "variance"), [((1, 2), (1, 2)), ((5, 2), (5, 3)), ((5,), (5,))])
def test_unfit_shapes_are_refused(mean, variance):
    with pytest.raises(ValueError, match="must both have shape"):
        mixture_estimates(torch.zeros(mean), torch.ones(variance))
