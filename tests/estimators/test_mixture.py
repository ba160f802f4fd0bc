import math

import numpy as np
import pytest
import torch
from scipy.special import logsumexp
from scipy.stats import multivariate_normal
from torch.distributions import MultivariateNormal, Normal, kl_divergence

from lightning_vae.callbacks import categorical_mutual_information
from lightning_vae.callbacks.metrics.categorical import information_of_groups
from lightning_vae.callbacks.metrics.mutual_information import PosteriorSample, mutual_information
from lightning_vae.estimators import (
    aggregate_moments,
    categorical_estimates,
    cross_fitted_marginal_kl,
    mixture_estimates,
)


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


def rotated(mean, variance, seed=3):
    """The same posteriors in other axes, with a full covariance: neither the information nor the rate changes."""
    turn = torch.linalg.qr(normal(mean.shape[1], mean.shape[1], seed=seed)).Q
    return mean @ turn.T, turn @ variance.diag_embed() @ turn.T


def test_estimates_from_covariances_equal_their_definitions():
    mean, variance, _ = linear_posteriors(150, s=0.6)
    mean, covariance = rotated(mean + 0.3, variance * (1 + mean.sigmoid()))
    estimates = mixture_estimates(mean, scale_tril=torch.linalg.cholesky(covariance))
    noise = torch.randn(mean.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0x5EED))
    sample = mean + (torch.linalg.cholesky(covariance) @ noise[..., None]).squeeze(-1)
    posterior = MultivariateNormal(mean, covariance)
    joint, own = posterior.log_prob(sample[:, None]), posterior.log_prob(sample)
    each = Normal(mean, covariance.diagonal(dim1=1, dim2=2).sqrt()).log_prob(sample[:, None])
    prior = MultivariateNormal(torch.zeros(4).double(), torch.eye(4).double())
    rates = kl_divergence(posterior, prior)
    control = own - prior.log_prob(sample) - rates

    def regressed(terms):
        slope = ((terms - terms.mean()) * control).mean() / control.square().mean()
        return terms.mean() - slope * control.mean()

    mixture = joint.logsumexp(1) - math.log(150)
    others = joint.masked_fill(torch.eye(150, dtype=torch.bool), -math.inf).logsumexp(1) - math.log(149)
    marginals = (each.logsumexp(1) - math.log(150)).sum(1)
    lower = regressed(own - mixture)
    expected = lower, regressed(own - others), rates.mean() - lower, regressed(mixture - marginals)
    found = estimates.lower, estimates.upper_leave_one_out, estimates.marginal_kl, estimates.total_correlation
    torch.testing.assert_close(torch.stack(found), torch.stack(expected), rtol=1e-9, atol=1e-9)


def test_diagonal_covariances_are_variances():
    mean, variance, _ = linear_posteriors(200)
    factors = variance.sqrt().diag_embed()
    for one, other in zip(mixture_estimates(mean, variance), mixture_estimates(mean, scale_tril=factors), strict=True):
        assert float(one) == pytest.approx(float(other), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("information", [3.2778, 12.488])
def test_a_rotation_of_the_latents_keeps_the_bounds_on_the_information(information):
    eigenvalues = (5.0, 3.0, 1.5, 0.8) if information < 4 else (0.4 * math.exp(2 * 12.488 / 4),) * 4
    mean, variance, exact = linear_posteriors(2048, eigenvalues=eigenvalues)
    mean, covariance = rotated(mean, variance)
    estimates = mixture_estimates(mean, scale_tril=torch.linalg.cholesky(covariance))
    assert exact == pytest.approx(information, abs=1e-4)
    assert estimates.saturated == (information > 4)
    assert estimates.upper == pytest.approx(exact, abs=0.1)
    assert estimates.rate == pytest.approx(exact, abs=0.1)
    assert estimates.marginal_kl == pytest.approx(0, abs=0.05)
    assert estimates.total_correlation == pytest.approx(0, abs=0.05)  # q(z) is N(0, I), which no rotation changes


def test_correlated_posteriors_of_no_information_have_their_total_correlation():
    factor = torch.tensor([[1.0, 0.0], [0.8, 0.6]], dtype=torch.float64).expand(1000, 2, 2)
    estimates = mixture_estimates(torch.zeros(1000, 2), scale_tril=factor)
    exact = -0.5 * math.log(1 - 0.64)
    assert estimates.lower == 0
    assert estimates.upper == pytest.approx(0, abs=1e-12)
    assert estimates.rate == pytest.approx(exact)
    assert estimates.total_correlation == pytest.approx(exact, abs=0.06)
    assert estimates.upper_moments == pytest.approx(0)


def test_badly_conditioned_covariances_lose_nothing():
    # Other axes that shear and stretch the latents, and their samples with them, change no ratio of densities.
    mean, variance, _ = linear_posteriors(200)
    plain = PosteriorSample.draw(mean, variance)
    for condition in (1e3, 1e9):
        axes = normal(4, 4, seed=3).tril(-1) + torch.logspace(0, math.log10(condition), 4, dtype=torch.float64).diag()
        moved = PosteriorSample.draw_joint(mean @ axes.T, axes @ variance.sqrt().diag_embed())
        ratios = [each.log_own - each.log_mixture() for each in (plain, moved)]
        torch.testing.assert_close(*ratios, rtol=0, atol=1e-6)


def code_posteriors(number, groups, classes, sharpness=1.5, seed=0):
    return (sharpness * normal(number, groups, classes, seed=seed)).softmax(-1)


def uniform_rates(probs):
    return (probs * (probs * probs.shape[-1]).log()).sum((1, 2))


def test_estimates_of_categories_equal_their_definitions():
    probs = code_posteriors(40, 3, 4)
    rates = uniform_rates(probs)
    estimates = categorical_estimates(probs, rates)
    joint = torch.einsum("na,nb,nc->nabc", *probs.unbind(1))  # all 64 joint classes
    aggregate, usage = joint.mean(0), probs.mean(0)
    apart = torch.einsum("a,b,c->abc", *usage)
    information = (joint * (joint / aggregate).log()).flatten(1).sum(1).mean()
    torch.testing.assert_close(estimates.lower, information)
    torch.testing.assert_close(estimates.total_correlation, (aggregate * (aggregate / apart).log()).sum())
    torch.testing.assert_close(estimates.marginal_kl, (aggregate * (64 * aggregate).log()).sum())
    assert estimates.rate == rates.mean()
    assert estimates.lower == categorical_mutual_information(probs).mutual_information  # the detector's


def test_bounds_enclose_the_information_of_categories():
    # Each observation's own logits, drawn alike: the information in z is that of one group, three times.
    probs = code_posteriors(2048, 3, 8)
    many = code_posteriors(200_000, 1, 8, seed=1)
    exact = 3 * float((many * (8 * many).log()).sum((1, 2)).mean())  # by symmetry each class is used alike
    estimates = categorical_estimates(probs, uniform_rates(probs))
    assert not estimates.saturated
    assert estimates.lower - 0.05 < exact < estimates.upper + 0.05
    assert estimates.upper_leave_one_out == pytest.approx(exact, abs=0.1)
    assert estimates.upper_moments == pytest.approx(exact, abs=0.05)
    assert estimates.total_correlation == pytest.approx(0, abs=0.1)


def test_codes_beyond_log_m_are_no_marginal_kl():
    # Every observation has its own code of 8 x 8 x 8, of which only 400 are seen: q(z) is the uniform prior.
    codes = torch.randint(0, 8, (400, 3), generator=torch.Generator().manual_seed(0))
    probs = torch.nn.functional.one_hot(codes, 8).double()
    rates = torch.full((400,), 3 * math.log(8), dtype=torch.float64)
    estimates = categorical_estimates(probs, rates)
    assert estimates.saturated
    assert estimates.lower < math.log(400) < estimates.rate
    assert estimates.upper_leave_one_out == math.inf
    assert estimates.upper == estimates.upper_moments == pytest.approx(3 * math.log(8), abs=1e-9)
    assert estimates.marginal_kl == pytest.approx(0, abs=1e-9)
    assert estimates.total_correlation.isnan()


def test_a_class_seen_once_leaves_the_bound_tight():
    codes = torch.randint(0, 2, (2048, 32), generator=torch.Generator().manual_seed(0))
    codes[5, 0] = 7
    probs = torch.nn.functional.one_hot(codes, 32).double()
    estimates = categorical_estimates(probs, torch.full((2048,), 32 * math.log(32), dtype=torch.float64))
    assert estimates.saturated
    assert estimates.upper == pytest.approx(32 * math.log(2), abs=0.1)
    assert estimates.marginal_kl == pytest.approx(32 * math.log(16), abs=0.1)


@pytest.mark.parametrize("groups", [2, 20])
def test_the_information_of_categories_is_never_negative(groups):
    for seed in range(6):
        probs = code_posteriors(200, groups, 8, sharpness=1e-3, seed=seed)
        assert 0 <= categorical_mutual_information(probs).mutual_information < 1e-4


def test_the_bound_of_few_observations_of_many_classes_stays_a_bound():
    probs = code_posteriors(100, 4, 32, sharpness=5)
    many = code_posteriors(20_000, 1, 32, sharpness=5, seed=1)
    exact = 4 * float((many * (32 * many).log()).sum((1, 2)).mean())
    assert information_of_groups(probs).sum() < exact - 0.3  # of these observations alone
    assert categorical_estimates(probs, uniform_rates(probs)).upper_moments > exact - 0.1


@pytest.mark.parametrize(
    ("probs", "rates", "message"),
    [
        (torch.ones(1, 2, 2) / 2, torch.zeros(1), "`probs` must have at least 2 rows"),
        (torch.ones(4, 2) / 2, torch.zeros(4), "`probs` must have shape"),
        (torch.ones(4, 2, 2), torch.zeros(4), "`probs` must give probabilities"),
        (torch.ones(4, 2, 2) / 2, torch.zeros(3), "`rates` must have a rate for each of the 4 posteriors"),
    ],
)
def test_unfit_categories_are_refused(probs, rates, message):
    with pytest.raises(ValueError, match=message):
        categorical_estimates(probs, rates)


@pytest.mark.parametrize(
    ("mean", "variance"),
    [((1, 2), (1, 2)), ((5, 2), (5, 3)), ((5,), (5,)), ((5, 2), (5, 2, 2))],
)
def test_unfit_shapes_are_refused(mean, variance):
    with pytest.raises(ValueError, match="must both have shape"):
        mixture_estimates(torch.zeros(mean), torch.ones(variance))
