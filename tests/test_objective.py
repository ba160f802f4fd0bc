import numpy as np
import pytest
import torch
from torch import distributions as td

from lightning_vae import elbo, free_bits, group_rates, kl_per_dimension, weighted_loss
from lightning_vae.objective import ELBOTerms, limited_rate_loss

KL = torch.tensor([[0.1, 2.0, 0.0, 0.4], [0.3, 4.0, 0.2, 0.8], [0.2, 0.0, 0.1, 0.0]])


def test_kl_of_gaussians_equals_its_formula_and_monte_carlo():
    torch.manual_seed(0)
    mean, scale = torch.tensor([[0.3, -1.2]]).double(), torch.tensor([[0.5, 2.0]]).double()
    posterior, prior = td.Normal(mean, scale), td.Normal(torch.zeros(2).double(), torch.ones(2).double())

    kl = kl_per_dimension(posterior, prior)

    formula = 0.5 * (mean**2 + scale**2 - 1 - (scale**2).log())
    torch.testing.assert_close(kl, formula, rtol=1e-12, atol=0)
    z = posterior.sample((200_000,))
    torch.testing.assert_close((posterior.log_prob(z) - prior.log_prob(z)).mean(0), formula, rtol=0.01, atol=0.01)


def test_kl_without_a_closed_form_is_the_samples_estimate():
    torch.manual_seed(0)
    posterior, prior = td.StudentT(torch.tensor(5.0), 0.1 * torch.ones(20_000, 1)), td.Normal(torch.zeros(1), 1.0)
    z = posterior.sample()

    estimate = kl_per_dimension(posterior, prior, z)

    assert estimate.shape == (20_000, 1)
    assert estimate.min() < 0  # left as it is
    grid = torch.linspace(-40, 40, 400_001, dtype=torch.float64)
    log_q = td.StudentT(torch.tensor(5.0).double(), 0.1).log_prob(grid)
    exact = torch.trapezoid(log_q.exp() * (log_q - td.Normal(0.0, 1.0).log_prob(grid)), grid)
    assert estimate.mean() == pytest.approx(float(exact), abs=0.02)
    with pytest.raises(ValueError, match="has no known closed form"):
        kl_per_dimension(posterior, prior)


def test_kl_refuses_a_posterior_that_hides_its_dimensions():
    posterior = td.Independent(td.Normal(torch.zeros(3, 2), torch.ones(3, 2)), 1)
    with pytest.raises(ValueError, match="unwrap `Independent`"):
        kl_per_dimension(posterior, td.Normal(torch.zeros(2), torch.ones(2)))


@pytest.mark.parametrize(
    ("per", "average", "expected"),
    [
        ("dimension", "batch", lambda kl: np.maximum(kl.mean(0), 0.5).sum()),
        ("dimension", "sample", lambda kl: np.maximum(kl, 0.5).sum(1).mean()),
        ("whole", "batch", lambda kl: np.maximum(kl.sum(1).mean(), 0.5)),
        ("whole", "sample", lambda kl: np.maximum(kl.sum(1), 0.5).mean()),
        (2, "batch", lambda kl: np.maximum(kl.reshape(3, 2, 2).sum(2).mean(0), 0.5).sum()),
        (2, "sample", lambda kl: np.maximum(kl.reshape(3, 2, 2).sum(2), 0.5).sum(1).mean()),
    ],
)
def test_free_bits_variants(per, average, expected):
    assert free_bits(KL, 0.5, per, average).item() == pytest.approx(expected(KL.numpy()))


def test_free_bits_gradient_is_nothing_below_the_floor_and_whole_above():
    kl = KL.clone().requires_grad_()
    free_bits(kl, 0.35).backward()
    assert kl.grad is not None
    torch.testing.assert_close(kl.grad, torch.tensor([[0.0, 1.0, 0.0, 1.0]]).expand(3, 4) / 3)


def test_free_bits_of_nothing_leave_a_negative_estimate_alone():
    assert free_bits(torch.tensor([[-0.5, 1.0]]), 0.0).item() == 0.5
    assert free_bits(torch.tensor([[-0.5, 1.0]]), torch.tensor(0.0)).item() == 0.5


@pytest.mark.parametrize(
    ("per", "average", "message"),
    [
        (3, "batch", "must divide"),
        ("unit", "batch", "`per` must be"),
        (0, "batch", "`per`"),
        ("whole", "all", "`average`"),
    ],
)
def test_free_bits_refuse_unknown_variants(per, average, message):
    with pytest.raises(ValueError, match=message):
        free_bits(KL, 0.5, per, average)


def test_groups_are_consecutive():
    torch.testing.assert_close(group_rates(KL, 2)[0], torch.tensor([2.1, 0.4]))


def test_terms_and_loss_in_their_signs():
    terms = ELBOTerms(distortion=torch.tensor([3.0, 5.0, 1.0]), rate_per_dimension=KL)
    torch.testing.assert_close(terms.elbo, -(terms.distortion + KL.sum(1)))
    assert elbo(torch.tensor(3.0), torch.tensor(2.0)) == -5
    assert weighted_loss(torch.tensor(3.0), torch.tensor(2.0), beta=4.0) == 11


@pytest.mark.parametrize("shape", [(), (4,), (3, 4, 2, 2)])
def test_rates_that_are_not_one_for_each_observation_and_dimension_are_refused(shape):
    """Case `free_bits_of_another_shape`."""
    for function in (lambda rates: free_bits(rates, 0.25), group_rates):
        with pytest.raises(ValueError, match=r"`kl_per_dimension` must .* of shape \(B, k\), got .*`flatten\(1\)`"):
            function(torch.rand(shape))
    with pytest.raises(ValueError, match=r"floating-point numbers of shape \(B, k\), got torch.int64"):
        free_bits(torch.ones(3, 4).long(), 0.25, average="sample")


@pytest.mark.parametrize("threshold", [-1.0, float("nan"), float("inf"), "0.5", None])
def test_a_floor_that_is_no_number_of_nats_is_refused(threshold):
    with pytest.raises(ValueError, match="`threshold` must be a finite number of at least 0, got"):
        free_bits(KL, threshold)


def test_a_floor_may_differ_between_dimensions_and_not_between_observations():
    assert free_bits(KL, torch.tensor([1.0, 0.0, 0.0, 1.0])) == pytest.approx(1 + 2 + 0.1 + 1)
    for average in ("batch", "sample"):
        for shape in ((3, 4), (3,), (3, 1), (2, 4)):
            with pytest.raises(ValueError, match=r"`threshold` must be one number, or a tensor of 4, got shape"):
                free_bits(KL, torch.ones(shape), average=average)


def test_terms_of_different_shapes_are_refused():
    batch, column, number = torch.ones(3), torch.ones(3, 1), torch.tensor(1.0)
    for function in (
        elbo,
        lambda *terms: weighted_loss(*terms, 1.0),
        lambda *terms: limited_rate_loss(*terms, 1.0, 1.0),
    ):
        assert function(batch, batch).shape == (3,)
        for one, other in ((batch, column), (column, batch), (batch, number), (number, batch)):
            with pytest.raises(ValueError, match="must have the same shape, got"):
                function(one, other)
    with pytest.raises(ValueError, match="must have the same shape"):
        ELBOTerms(batch, batch).elbo  # noqa: B018


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_weights_out_of_range_are_refused(value):
    one = torch.tensor(1.0)
    with pytest.raises(ValueError, match="`beta` must be a finite number of at least 0"):
        weighted_loss(one, one, value)
    with pytest.raises(ValueError, match="`limit` must be a finite number of at least 0"):
        limited_rate_loss(one, one, value, 1.0)
    with pytest.raises(ValueError, match="`price` must be a finite number of at least 0"):
        limited_rate_loss(one, one, 1.0, value)
    with pytest.raises(ValueError, match=r"`beta` must be one number, got a tensor of shape \(3,\)"):
        weighted_loss(one, one, torch.ones(3))


def test_kl_refuses_a_joint_prior():
    """A mixture over vectors of 3 dimensions and a batch of 3 would broadcast to a number of nats for each pair."""
    posterior = td.Normal(torch.zeros(3, 3), torch.ones(3, 3))
    parts = td.Independent(td.Normal(torch.zeros(2, 3), torch.ones(2, 3)), 1)
    prior = td.MixtureSameFamily(td.Categorical(torch.ones(2)), parts)
    with pytest.raises(ValueError, match=r"`prior` must have one batch entry per latent dimension.*event shape \(3,\)"):
        kl_per_dimension(posterior, prior, posterior.sample())


@pytest.mark.parametrize("shape", [(4,), (3,), (5, 4, 2), (3, 2), (5, 4, 1)])
def test_kl_refuses_a_prior_and_a_sample_that_do_not_fit_the_posterior(shape):
    posterior = td.Normal(torch.zeros(4, 2), torch.ones(4, 2))
    with pytest.raises(ValueError, match=r"`prior` must broadcast to the posterior's batch shape \(4, 2\), got"):
        kl_per_dimension(posterior, td.Normal(torch.zeros(shape), 1.0))
    with pytest.raises(ValueError, match=r"`z` must be one sample of the posterior, of shape \(4, 2\), got"):
        kl_per_dimension(posterior, td.Normal(torch.zeros(2), 1.0), torch.zeros(shape))


@pytest.mark.parametrize("shape", [(), (1,), (2,), (1, 2), (4, 1), (4, 2)])
def test_kl_takes_a_prior_that_fits(shape):
    posterior = td.Normal(torch.zeros(4, 2), torch.ones(4, 2))
    assert torch.equal(kl_per_dimension(posterior, td.Normal(torch.zeros(shape), 1.0)), torch.zeros(4, 2))
