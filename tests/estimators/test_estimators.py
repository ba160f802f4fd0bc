import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import logsumexp
from scipy.stats import multivariate_normal
from torch import distributed as dist
from torch.multiprocessing import start_processes

from lightning_vae.callbacks.metrics.mutual_information import mutual_information
from lightning_vae.estimators import (
    AggregatePosterior,
    ImportanceWeightedLikelihood,
    ObservationSubset,
    RunningMoments,
    aggregate_moments,
    effective_sample_size,
    gaussian_total_correlation,
    importance_weighted_bound,
    is_saturated,
    mixture_estimates,
    moment_marginal_kl,
)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def linear_posteriors(number, s=0.4, eigenvalues=(5.0, 3.0, 1.5, 0.8), seed=1):
    """Posteriors of the optimal linear VAE, whose mutual information is sum 1/2 log(l / s) and marginal KL 0."""
    eigenvalues = torch.tensor(eigenvalues, dtype=torch.float64)
    mean = normal(number, len(eigenvalues), seed=seed) * (1 - s / eigenvalues).sqrt()
    return mean, (s / eigenvalues).expand(number, -1), float(0.5 * (eigenvalues / s).log().sum())


# ---- the likelihood


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
        torch.testing.assert_close(effective_sample_size(log_weights), torch.full((3,), float(number)).double())


def test_one_weight_that_carries_everything():
    log_weights = torch.tensor([[0.0], [-1000.0], [-1000.0], [-1000.0]])
    assert importance_weighted_bound(log_weights).item() == pytest.approx(-math.log(4))
    assert effective_sample_size(log_weights).item() == pytest.approx(1.0)


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


# ---- the aggregate posterior by its moments


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


def test_moment_marginal_kl_and_total_correlation_of_gaussians():
    assert moment_marginal_kl(torch.zeros(3), torch.eye(3)) == 0
    assert moment_marginal_kl(torch.tensor([2.0, 0.0]), torch.eye(2)) == pytest.approx(2.0)
    covariance = torch.tensor([[2.0, 0.9], [0.9, 0.5]], dtype=torch.float64)
    expected = 0.5 * (2.5 - 2 - math.log(2 * 0.5 - 0.81))
    assert moment_marginal_kl(torch.zeros(2), covariance) == pytest.approx(expected)
    assert gaussian_total_correlation(covariance) == pytest.approx(-0.5 * math.log(1 - 0.81))
    assert gaussian_total_correlation(covariance.diagonal().diag()) == 0


# ---- the aggregate posterior as a mixture


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


@pytest.mark.parametrize("at_once", [1400, 2**20])
def test_mixture_estimates_equal_their_definitions(at_once, monkeypatch):
    monkeypatch.setattr("lightning_vae.estimators.mixture._AT_ONCE", at_once)
    mean, variance, _ = linear_posteriors(200, s=0.6)
    mean, variance = mean + 0.3, variance * (1 + mean.sigmoid())
    estimates = mixture_estimates(mean, variance)
    found = estimates.lower, estimates.upper_leave_one_out, estimates.marginal_kl, estimates.total_correlation
    np.testing.assert_allclose([float(value) for value in found], direct(mean, variance), rtol=1e-10)
    assert estimates.lower == pytest.approx(float(mutual_information(mean, variance)), abs=0.2)  # the detector's


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
    assert moment_marginal_kl(moments.mean, moments.covariance) > 2  # of the sample itself, where the truth is 0
    estimates = mixture_estimates(mean, variance)
    assert estimates.marginal_kl < 0.2
    assert estimates.upper > exact - 0.5
    moved = mixture_estimates(mean + 0.5, variance)
    assert 64 / 8 - 5 < moved.marginal_kl < 64 / 8


def test_saturation_begins_at_nine_tenths_of_log_m():
    assert not is_saturated(0.899 * math.log(100), 100)
    assert is_saturated(0.901 * math.log(100), 100)


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
    assert moment_marginal_kl(torch.zeros(1), torch.ones(1, 1)) == 0
    assert estimates.lower == pytest.approx(math.log(2), abs=1e-6)
    # The rate of either posterior, less the one bit that tells them apart.
    assert estimates.marginal_kl == pytest.approx(float(estimates.rate) - math.log(2), abs=0.1)


@pytest.mark.parametrize(("mean", "variance"), [((1, 2), (1, 2)), ((5, 2), (5, 3)), ((5,), (5,))])
def test_unfit_shapes_are_refused(mean, variance):
    with pytest.raises(ValueError, match="must both have shape"):
        mixture_estimates(torch.zeros(mean), torch.ones(variance))


# ---- streaming


def test_running_moments_equal_numpys():
    values = normal(100, 3) + 1e6
    metric = RunningMoments(3)
    for part in values.split(9):
        metric.update(part)
    count, mean, error = metric.compute()
    assert count == 100
    np.testing.assert_allclose(mean, values.numpy().mean(0), rtol=1e-12)
    np.testing.assert_allclose(error, values.numpy().std(0, ddof=1) / 10, rtol=1e-7)


def test_subset_depends_on_keys_alone():
    rows, keys = normal(300, 2), torch.randperm(300, generator=torch.Generator().manual_seed(5)) + 2**50
    expected = rows[keys.argsort()[:64]]
    for order in (torch.arange(300), torch.arange(300).flip(0), torch.arange(300).repeat(2)):
        metric = ObservationSubset(columns=2, size=64)
        for batch in order.split(50):
            metric.update(rows[batch], keys[batch])
        assert torch.equal(metric.compute(), expected)
    small = ObservationSubset(columns=2, size=64)
    small.update(rows[:5], keys[:5])
    assert small.compute().shape == (5, 2)


def share(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    part = slice(0, 70) if rank == 0 else slice(70, 100)
    values = normal(100, 3)
    metrics = RunningMoments(3), AggregatePosterior(3), ImportanceWeightedLikelihood(), ObservationSubset(3, 40)
    metrics[0].update(values[part])
    metrics[1].update(values[part], values[part].exp())
    metrics[2].update(values[part].T)
    metrics[3].update(values[part], torch.arange(100)[part] * 37 % 101)
    found = list(metrics[0].compute()), vars(metrics[1].compute()), list(metrics[2].compute()), metrics[3].compute()
    torch.save(list(found), folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path):
    start_processes(share, args=(tmp_path,), nprocs=2, start_method="fork")
    values = normal(100, 3)
    likelihood = ImportanceWeightedLikelihood()
    likelihood.update(values.T)
    kept = values[(torch.arange(100) * 37 % 101).argsort()[:40]]
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


def test_values_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"must have shape \(N, 3\)"):
        RunningMoments(3).update(torch.zeros(4, 2))
