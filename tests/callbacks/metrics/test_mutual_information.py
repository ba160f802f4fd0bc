import math

import numpy as np
import pytest
import torch
from torch.distributions import Independent, Normal, kl_divergence

from lightning_vae.callbacks.metrics.mutual_information import PosteriorSample, mutual_information


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


def test_mutual_information_of_nothing_is_unknown():
    assert mutual_information(torch.empty(0, 4), torch.empty(0, 4)).isnan()


def test_mutual_information_is_deterministic_and_leaves_the_global_seed_alone():
    before = torch.get_rng_state()
    assert mutual_information(*linear_posteriors(50)) == mutual_information(*linear_posteriors(50))
    assert torch.equal(torch.get_rng_state(), before)
