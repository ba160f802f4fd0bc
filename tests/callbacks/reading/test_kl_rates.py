import pytest
import torch
from torch.distributions import (
    Categorical,
    Distribution,
    Independent,
    LowRankMultivariateNormal,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
    OneHotCategorical,
    StudentT,
    kl_divergence,
)

from lightning_vae.callbacks.reading.kl_rates import kl_per_dimension, rate_parts, rates_under_floors
from lightning_vae.callbacks.reading.latent_reader import Latent, measured_rates


def test_gaussians_have_the_closed_form() -> None:
    posterior = Normal(torch.randn(5, 3).double(), torch.rand(5, 3).double() + 0.1)
    prior = Normal(torch.randn(3).double(), torch.rand(3).double() + 0.1)
    torch.testing.assert_close(kl_per_dimension(posterior, prior), kl_divergence(posterior, prior))


def test_a_fixed_prior_is_moved_to_the_device_of_the_posterior() -> None:
    """Meta tensors refuse those of the CPU as a GPU's do."""
    posterior = Normal(*torch.ones(2, 4, 3, device="meta"), validate_args=False)
    rates = kl_per_dimension(posterior, Normal(torch.zeros(3), 2 * torch.ones(3)))
    assert rates.device.type == "meta"
    assert rates.shape == (4, 3)


def test_the_rate_of_a_tiny_scale_is_finite_and_exact() -> None:
    log_scale = torch.tensor([[-30.0, -60.0]])
    rates = kl_per_dimension(Normal(torch.zeros(1, 2), log_scale.exp()), Normal(0.0, 1.0))
    torch.testing.assert_close(rates, -0.5 - log_scale)


def test_a_pair_without_a_closed_form_takes_the_sample_it_is_given() -> None:
    posterior, prior = StudentT(3.0, torch.zeros(4, 2)), Normal(0.0, 1.0)
    z = torch.rand(4, 2) + 0.1
    with pytest.raises(NotImplementedError):
        kl_per_dimension(posterior, prior)
    nats, is_estimate = rate_parts(posterior, prior, z)
    assert is_estimate
    torch.testing.assert_close(nats, posterior.log_prob(z) - prior.log_prob(z))


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
    rates = measured_rates(Latent(posterior, prior))
    assert torch.equal(torch.get_rng_state(), before)
    assert not rates.requires_grad
    assert rates.shape == (4000, 2)
    z = posterior.sample()
    expected = (posterior.log_prob(z) - prior.log_prob(z)).mean().item()
    assert float(rates.mean()) == pytest.approx(expected, abs=0.05)


TRIL = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.8, 0.0], [-0.3, 0.2, 1.5]], dtype=torch.float64)
FULL = MultivariateNormal(torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).double(), scale_tril=TRIL)
VECTOR = MultivariateNormal(torch.zeros(3).double(), torch.eye(3).double())


@pytest.mark.parametrize(
    "prior",
    [
        VECTOR,
        Normal(0.0, 1.0),
        Normal(torch.zeros(3).double(), torch.ones(3).double()),
    ],
    ids=str,
)
def test_a_full_covariance_has_one_part_in_closed_form_under_every_spelling_of_the_prior(prior) -> None:
    nats, is_estimate = rate_parts(FULL, prior)
    covariance = TRIL @ TRIL.T
    expected = 0.5 * (covariance.trace() + FULL.loc.square().sum(1) - 3 - covariance.logdet())
    assert not is_estimate
    torch.testing.assert_close(nats, expected[:, None])


def test_a_covariance_of_low_rank_has_a_closed_form_too() -> None:
    posterior = LowRankMultivariateNormal(FULL.loc, TRIL[:, :1], torch.ones(3).double())
    nats, is_estimate = rate_parts(posterior, Normal(0.0, 1.0))
    whole = MultivariateNormal(FULL.loc, TRIL[:, :1] @ TRIL[:, :1].T + torch.eye(3).double())
    assert not is_estimate
    torch.testing.assert_close(nats, kl_divergence(whole, VECTOR)[:, None])


def test_a_factorised_posterior_under_a_full_covariance_has_one_part() -> None:
    posterior = Normal(torch.randn(4, 3).double(), torch.rand(4, 3).double() + 0.1)
    nats, is_estimate = rate_parts(posterior, MultivariateNormal(torch.zeros(3).double(), scale_tril=TRIL))
    whole = MultivariateNormal(posterior.loc, posterior.scale.square().diag_embed())
    expected = kl_divergence(whole, MultivariateNormal(torch.zeros(3).double(), scale_tril=TRIL))
    assert not is_estimate
    torch.testing.assert_close(nats, expected[:, None])


MIXTURE = MixtureSameFamily(
    Categorical(torch.ones(2)), Independent(Normal(torch.tensor([[-1.0] * 3, [1.0] * 3]), 1.0), 1)
)


def test_a_joint_prior_has_one_part_at_the_sample_of_the_module() -> None:
    posterior = Normal(torch.randn(3, 3), 1.0)
    z = posterior.sample()
    nats, is_estimate = rate_parts(posterior, MIXTURE, z)
    assert is_estimate
    torch.testing.assert_close(nats, (posterior.log_prob(z).sum(1) - MIXTURE.log_prob(z))[:, None])
    with pytest.raises(ValueError, match="does not fit its posterior"):
        kl_per_dimension(posterior, MIXTURE)


@pytest.mark.parametrize("shape", [(3,), (3, 1)])
def test_an_object_with_a_log_density_is_a_prior(shape) -> None:
    class Density:
        def log_prob(self, z):
            return MIXTURE.log_prob(z).reshape(shape)

    posterior = Normal(torch.randn(3, 3), 1.0)
    z = posterior.sample()
    torch.testing.assert_close(rate_parts(posterior, Density(), z), rate_parts(posterior, MIXTURE, z))


@pytest.mark.parametrize("log_prob", [lambda z: z.sum(), lambda z: z[:, :2], lambda z: 3.0, lambda z: z.mean(0)])
def test_a_log_density_of_another_shape_is_refused(log_prob) -> None:
    class Density:
        pass

    Density.log_prob = staticmethod(log_prob)
    with pytest.raises(ValueError, match="`log_prob` must"):
        rate_parts(Normal(torch.zeros(4, 3), 1.0), Density())


def test_categories_have_a_part_for_each_group() -> None:
    logits = torch.randn(5, 2, 4).double()
    nats, is_estimate = rate_parts(OneHotCategorical(logits=logits), OneHotCategorical(logits=torch.zeros(4).double()))
    probs = logits.softmax(-1)
    assert not is_estimate
    torch.testing.assert_close(nats, (probs * (probs * 4).log()).sum(-1))


@pytest.mark.parametrize("shape", [(3,), (1, 3), (2, 3, 3)])
def test_a_sample_of_another_shape_is_refused(shape):
    mixture = MixtureSameFamily(Categorical(torch.ones(2)), Normal(torch.zeros(2), 1.0))
    with pytest.raises(ValueError, match=r"`z` must be one sample of the posterior, of shape \(3, 3\)"):
        rate_parts(Normal(torch.zeros(3, 3), 1.0), mixture, torch.zeros(shape))


@pytest.mark.parametrize(("rates", "per"), [(torch.ones(4), 1), (torch.ones(4, 3), 2), (torch.ones(4, 3), 0)])
def test_floors_of_other_shapes_are_refused(rates, per):
    with pytest.raises(ValueError, match=r"`rates`|`per`"):
        rates_under_floors(rates, per, "batch")
