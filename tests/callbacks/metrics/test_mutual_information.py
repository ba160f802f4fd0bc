import math

import numpy as np
import pytest
import torch
from torch.distributions import Independent, Normal, kl_divergence

from lightning_vae.callbacks.metrics.mutual_information import MutualInformation, PosteriorSample, mutual_information
from lightning_vae.callbacks.metrics.observation_subset import random_keys


def linear_posteriors(number: int, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Posteriors of the optimal linear VAE with A = 1 - s / l, whose mutual information is 3.2778 nats."""
    eigenvalues, s = torch.tensor([5.0, 3.0, 1.5, 0.8], dtype=torch.float64), 0.4
    noise = torch.randn(number, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return noise * (1 - s / eigenvalues).sqrt(), (s / eigenvalues).expand(number, 4)


def direct(mean, variance, seed=0x5EED):
    """The estimate's definition, with torch.distributions, the full table of densities and numpy's regression."""
    noise = torch.randn(mean.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    posterior = Independent(Normal(mean, variance.sqrt()), 1)
    sample = mean + variance.sqrt() * noise
    mixture = posterior.log_prob(sample.unsqueeze(1)).logsumexp(dim=1) - math.log(len(mean))
    prior = Independent(Normal(torch.zeros_like(mean), 1.0), 1)
    terms = posterior.log_prob(sample) - mixture
    control = posterior.log_prob(sample) - prior.log_prob(sample) - kl_divergence(posterior, prior)
    return terms.mean() - np.cov(terms, control, bias=True)[0, 1] / control.square().mean() * control.mean()


def test_mutual_information_of_the_linear_vae():
    estimates = [float(mutual_information(*linear_posteriors(2048, seed), seed=100 + seed)) for seed in range(8)]
    assert sum(estimates) / 8 == pytest.approx(3.255, abs=0.03)  # a single one has a standard deviation of 0.027


def test_the_control_variate_leaves_little_noise_where_the_aggregate_is_the_prior():
    mean, variance = linear_posteriors(1024)
    samples = [PosteriorSample.draw(mean, variance, seed) for seed in range(100, 120)]
    terms = [sample.log_own - sample.log_mixture() for sample in samples]
    plain = torch.stack([each.mean() for each in terms])
    controlled = torch.stack([sample.average(each) for sample, each in zip(samples, terms, strict=True)])
    assert controlled.std() < plain.std() / 3
    assert controlled.mean() == pytest.approx(float(plain.mean()), abs=0.03)


def test_the_mixture_without_the_own_component():
    mean, variance = linear_posteriors(150)
    sample = PosteriorSample.draw(mean, variance)
    joint = Independent(Normal(mean, variance.sqrt()), 1).log_prob(sample.z.unsqueeze(1))
    joint += 2 * math.log(2 * math.pi)  # k / 2 of the constants that are left out
    joint.fill_diagonal_(-math.inf)
    expected = joint.logsumexp(dim=1) - math.log(149)
    torch.testing.assert_close(sample.log_mixture(leave_one_out=True), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("shift", "scale"), [(0.0, 1.0), (100.0, 1.0), (0.0, 1e-3)])
def test_mutual_information_equals_its_definition(shift, scale):
    mean, variance = linear_posteriors(200)
    mean, variance = shift + scale * mean, scale**2 * variance
    torch.testing.assert_close(mutual_information(mean, variance), direct(mean, variance), rtol=1e-9, atol=1e-9)


def test_mutual_information_is_zero_at_collapse_and_capped_when_nothing_overlaps():
    collapsed = torch.full((100, 3), 0.7), torch.full((100, 3), 1.3)
    assert abs(mutual_information(*collapsed)) < 1e-12
    apart = torch.arange(100.0)[:, None] * 1000, torch.ones(100, 1)
    torch.testing.assert_close(float(mutual_information(*apart)), math.log(100), rtol=1e-12, atol=0)


def test_mutual_information_is_deterministic_and_leaves_the_global_seed_alone():
    before = torch.get_rng_state()
    assert mutual_information(*linear_posteriors(50)) == mutual_information(*linear_posteriors(50))
    assert torch.equal(torch.get_rng_state(), before)


def subset(mean, variance, index, observations):
    kept = random_keys(index).argsort()[:observations]
    return mean[kept], variance[kept]


@pytest.mark.parametrize(("first", "observations"), [(0, 64), (50_000, 64), (0, 512)])
def test_metric_depends_neither_on_batches_nor_on_order_nor_on_repeats(first, observations):
    mean, variance = linear_posteriors(300)
    index = torch.arange(300) + first
    expected = mutual_information(*subset(mean, variance, index, observations))
    shuffled = torch.randperm(300, generator=torch.Generator().manual_seed(3))
    for order in (torch.arange(300), shuffled, torch.cat([shuffled, shuffled[:100]])):
        for size in (7, 300):
            metric = MutualInformation(dim=4, observations=observations)
            for batch in order.split(size):
                metric.update(mean[batch], variance[batch], index[batch])
            assert metric.state.shape == (observations, 9)
            assert metric.compute() == expected


def test_metric_merges_and_is_nan_before_the_first_observation():
    mean, variance = linear_posteriors(100)
    index = torch.arange(100)
    left, right = MutualInformation(dim=4, observations=64), MutualInformation(dim=4, observations=64)
    assert left(torch.empty(0, 4), torch.empty(0, 4), torch.empty(0)).isnan()
    left.update(mean[50:], variance[50:], index[50:])
    right.update(mean[:60], variance[:60], index[:60])
    left.merge_state(right)
    assert left.compute() == mutual_information(*subset(mean, variance, index, 64))


def test_two_processes_equal_one():
    mean, variance = linear_posteriors(100)
    metrics = [MutualInformation(dim=4, observations=64) for _ in range(2)]
    for metric, rows in zip(metrics, (torch.arange(0, 31), torch.arange(30, 100)), strict=True):  # one row twice
        metric.update(mean[rows], variance[rows], rows)
    tables = [metric.state for metric in metrics]
    metrics[1].sync(dist_sync_fn=lambda *_, **__: tables, distributed_available=lambda: True)
    assert mutual_information(*metrics[1].posteriors) == mutual_information(
        *subset(mean, variance, torch.arange(100), 64)
    )


@pytest.mark.parametrize("options", [{"dim": 0}, {"dim": 1, "observations": 0}])
def test_invalid_options(options: dict[str, int]):
    with pytest.raises(ValueError, match="must be at least 1, got 0"):
        MutualInformation(**options)
