import pytest
import torch
from torch.distributions import (
    Categorical,
    Distribution,
    Independent,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
    StudentT,
    kl_divergence,
)

from lightning_vae.callbacks.reading.kl_rates import kl_per_dimension, measured_rates, rates_under_floors


def test_gaussians_have_the_closed_form() -> None:
    posterior = Normal(torch.randn(5, 3).double(), torch.rand(5, 3).double() + 0.1)
    prior = Normal(torch.randn(3).double(), torch.rand(3).double() + 0.1)
    torch.testing.assert_close(kl_per_dimension(posterior, prior), kl_divergence(posterior, prior))


def test_the_rate_of_a_tiny_scale_is_finite_and_exact() -> None:
    log_scale = torch.tensor([[-30.0, -60.0]])
    rates = kl_per_dimension(Normal(torch.zeros(1, 2), log_scale.exp()), Normal(0.0, 1.0))
    torch.testing.assert_close(rates, -0.5 - log_scale)


def test_a_pair_without_a_closed_form_takes_the_sample_it_is_given() -> None:
    posterior, prior = StudentT(3.0, torch.zeros(4, 2)), Normal(0.0, 1.0)
    z = torch.rand(4, 2) + 0.1
    with pytest.raises(NotImplementedError):
        kl_per_dimension(posterior, prior)
    torch.testing.assert_close(kl_per_dimension(posterior, prior, z), posterior.log_prob(z) - prior.log_prob(z))


@pytest.mark.parametrize(
    "prior",
    [
        Normal(torch.zeros(5, 2), 1.0),
        Normal(torch.zeros(3), 1.0),
        Normal(torch.zeros(1, 1, 2), 1.0),
        MultivariateNormal(torch.zeros(2), torch.eye(2)),
    ],
    ids=str,
)
def test_a_prior_of_another_shape_is_an_error(prior: Distribution) -> None:
    with pytest.raises(ValueError, match=r"does not fit its posterior of shape \(1, 2\)"):
        kl_per_dimension(Normal(torch.zeros(1, 2), 1.0), prior)


def test_measuring_leaves_the_random_state_and_the_graph_alone() -> None:
    posterior, prior = StudentT(10.0, torch.zeros(4000, 2, requires_grad=True)), Normal(0.0, 1.0)
    before = torch.get_rng_state()
    rates = measured_rates(posterior, prior)
    assert torch.equal(torch.get_rng_state(), before)
    assert not rates.requires_grad
    assert rates.shape == (4000, 2)
    z = posterior.sample()
    expected = (posterior.log_prob(z) - prior.log_prob(z)).mean().item()
    assert float(rates.mean()) == pytest.approx(expected, abs=0.05)


def test_a_distribution_over_whole_vectors_has_one_rate() -> None:
    posterior = MultivariateNormal(torch.ones(4, 3), torch.eye(3))
    rates = measured_rates(posterior, MultivariateNormal(torch.zeros(3), torch.eye(3)))
    torch.testing.assert_close(rates, torch.full((4, 1), 1.5))


def test_a_joint_prior_over_vectors_is_refused_for_factorised_posteriors():
    mixture = MixtureSameFamily(Categorical(torch.ones(2)), Independent(Normal(torch.zeros(2, 3), 1.0), 1))
    posterior = Normal(torch.zeros(3, 3), 1.0)
    with pytest.raises(ValueError, match="does not fit its posterior"):
        kl_per_dimension(posterior, mixture, posterior.sample())


@pytest.mark.parametrize("shape", [(3,), (1, 3), (2, 3, 3)])
def test_a_sample_of_another_shape_is_refused(shape):
    mixture = MixtureSameFamily(Categorical(torch.ones(2)), Normal(torch.zeros(2), 1.0))
    with pytest.raises(ValueError, match=r"`z` must be one sample of the posterior, of shape \(3, 3\)"):
        kl_per_dimension(Normal(torch.zeros(3, 3), 1.0), mixture, torch.zeros(shape))


@pytest.mark.parametrize(("rates", "per"), [(torch.ones(4), 1), (torch.ones(4, 3), 2), (torch.ones(4, 3), 0)])
def test_floors_of_other_shapes_are_refused(rates, per):
    with pytest.raises(ValueError, match=r"`rates`|`per`"):
        rates_under_floors(rates, per, "batch")
