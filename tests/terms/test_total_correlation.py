import itertools

import numpy as np
import pytest
import torch
from torch import distributions as td

from lightning_vae.estimators import gaussian_total_correlation
from lightning_vae.terms import TotalCorrelation, decompose, minibatch_weights, pairwise_log_densities
from tests.terms.steps import exact_data, normal, step_of


def eight_posteriors():
    """Eight posteriors with a sample of each, of known parts of their rate."""
    generator = np.random.default_rng(0)
    mean, log_variance, noise = (generator.standard_normal((8, 2)) for _ in range(3))
    posterior = td.Normal(torch.as_tensor(mean), torch.as_tensor(np.exp(0.5 * (-1 + 0.3 * log_variance))))
    return posterior, posterior.loc + posterior.scale * torch.as_tensor(noise)


def log_prior(z):
    return td.Normal(0.0, 1.0).log_prob(z).sum(-1)


def test_the_parts_on_a_full_batch():
    posterior, z = eight_posteriors()
    parts = decompose(pairwise_log_densities(posterior, z), log_prior(z), minibatch_weights(8, 8))
    assert [float(part) for part in parts] == pytest.approx([0.66626, 0.28043, 0.07969], abs=6e-6)
    whole = decompose(pairwise_log_densities(posterior, z), log_prior(z))
    torch.testing.assert_close(torch.stack(parts), torch.stack(whole), rtol=0, atol=1e-14)
    assert parts.total_correlation.dtype == torch.float64


@pytest.mark.parametrize("data_size", [8, 20, 10**6])
def test_the_parts_add_up_to_the_rate_at_the_samples(data_size):
    posterior, z = eight_posteriors()
    parts = decompose(pairwise_log_densities(posterior, z), log_prior(z), minibatch_weights(8, data_size))
    rate = (posterior.log_prob(z).sum(-1) - log_prior(z)).mean()
    torch.testing.assert_close(sum(parts), rate, rtol=0, atol=1e-12)
    if data_size == 8:
        assert float(rate) == pytest.approx(1.02638, abs=6e-6)


def test_the_parts_of_gaussians_are_those_of_the_closed_form():
    covariance, variance = [[0.8, 0.3, 0.0], [0.3, 0.6, 0.2], [0.0, 0.2, 0.5]], torch.tensor([0.2, 0.3, 0.4]).double()
    posterior = td.Normal(exact_data(1000, covariance), variance.sqrt().expand(1000, 3))
    z = posterior.loc + posterior.scale * normal(1000, 3)
    parts = decompose(pairwise_log_densities(posterior, z), log_prior(z))
    exact = (1.67859, 0.08090, 0.00536)
    for part, value, tolerance in zip(parts, exact, (0.1, 0.02, 0.005), strict=True):
        assert float(part) == pytest.approx(value, abs=tolerance)
    aggregate = torch.tensor(covariance).double() + variance.diag()
    assert float(gaussian_total_correlation(aggregate)) == pytest.approx(exact[1], abs=6e-6)


@pytest.mark.parametrize("batch_size", [2, 3, 5])
def test_the_weighted_mixture_is_unbiased_over_all_batches(batch_size):
    """The mean over all ordered batches is the mixture of all data, and all of it at the full batch."""
    densities = torch.as_tensor(np.random.default_rng(0).random((5, 5)))  # [n, m]: q(z_n | x_m)
    weights, total = minibatch_weights(batch_size, 5), torch.zeros(5, dtype=torch.float64)
    batches = list(itertools.permutations(range(5), batch_size))
    for batch in map(list, batches):
        total[batch] += (weights * densities[batch][:, batch]).sum(1)
    counts = len(batches) * batch_size / 5
    torch.testing.assert_close(total / counts, densities.mean(1), rtol=0, atol=2e-15)


def test_the_weights():
    weights = minibatch_weights(4, 10)
    assert weights.diagonal().tolist() == pytest.approx([0.1] * 4, abs=1e-15)
    assert weights[0, 1:].tolist() == pytest.approx([0.3] * 3, abs=1e-15)
    assert weights.sum(1).tolist() == pytest.approx([1.0] * 4, abs=1e-15)
    assert torch.allclose(minibatch_weights(4, 4), torch.full((4, 4), 0.25).double(), atol=1e-16)


def test_the_term_is_the_total_correlation_and_reads_the_size_of_the_data():
    posterior, z = eight_posteriors()
    of_step = TotalCorrelation()(step_of(posterior, z, data_size=20))
    weights = minibatch_weights(8, 20)
    assert torch.equal(of_step, decompose(pairwise_log_densities(posterior, z), log_prior(z), weights)[1])
    assert torch.equal(TotalCorrelation(data_size=20)(step_of(posterior, z, data_size=8)), of_step)
    assert float(TotalCorrelation()(step_of(posterior, z, data_size=8))) == pytest.approx(0.28043, abs=6e-6)


def test_its_gradient_is_that_of_the_closed_form():
    """Turning independent latents by an angle makes them dependent: the gradient turns them back."""
    mean, noise = exact_data(500, [[4.0, 0.0], [0.0, 1.0]]), normal(500, 2)
    angle = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    rotation = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()]).view(2, 2)
    posterior = td.Normal(mean @ rotation.T, torch.full((500, 2), 0.5).double())
    z = posterior.loc + posterior.scale * noise
    (gradient,) = torch.autograd.grad(
        TotalCorrelation()(step_of(posterior, z, data_size=500)), angle, retain_graph=True
    )

    aggregate = rotation @ torch.tensor([4.25, 1.25]).double().diag() @ rotation.T
    exact = 0.5 * (aggregate.diagonal().log().sum() - torch.logdet(aggregate))
    (expected,) = torch.autograd.grad(exact, angle)
    assert float(gradient) == pytest.approx(float(expected), rel=0.1)


def test_what_makes_no_sense():
    posterior, z = eight_posteriors()
    with pytest.raises(ValueError, match=r"`data_size` must be .* or None, got 1\."):
        TotalCorrelation(data_size=1)
    with pytest.raises(ValueError, match=r"not known here, .* Give it: `TotalCorrelation\(data_size=...\)`"):
        TotalCorrelation()(step_of(posterior, z))
    with pytest.raises(ValueError, match=r"`data_size` must be an integer of at least the 8 observations .*, got 7"):
        TotalCorrelation()(step_of(posterior, z, data_size=7))
    joint = td.MultivariateNormal(posterior.loc, torch.eye(2).double())
    with pytest.raises(ValueError, match=r"`posterior` must be factorised, .* got batch shape \(8,\) .* shape \(2,\)"):
        TotalCorrelation()(step_of(joint, z, data_size=8))
    one = td.Normal(torch.zeros(1, 2), 1.0)
    with pytest.raises(ValueError, match=r"`TotalCorrelation` compares .* at least 2, got 1"):
        TotalCorrelation()(step_of(one, torch.zeros(1, 2), data_size=8))
    densities = pairwise_log_densities(posterior, z)
    with pytest.raises(ValueError, match=r"`log_densities` must have shape \(B, B, k\)"):
        decompose(densities[:3], log_prior(z))
    with pytest.raises(ValueError, match=r"`weights` must have shape \(8, 8\), got \(4, 4\)"):
        decompose(densities, log_prior(z), minibatch_weights(4, 8))
    with pytest.raises(ValueError, match=r"`log_prior` must have shape \(8,\), got \(8, 2\)"):
        decompose(densities, z)
    with pytest.raises(ValueError, match=r"`z` must have shape \(8, 2\), got \(4, 2\)"):
        pairwise_log_densities(posterior, z[:4])
