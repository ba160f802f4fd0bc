import numpy as np
import pytest
import torch
from torch import distributions as td

from lightning_vae import elbo, free_bits, group_rates, kl_per_dimension, rate_parts, weighted_loss
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


# ---- rates in parts

_RNG = np.random.default_rng(2)


def positive_definite(*batch):
    root = _RNG.standard_normal((*batch, 3, 3))
    return torch.from_numpy(root @ root.swapaxes(-1, -2) + 0.1 * np.eye(3))


def vectors(*batch):
    return torch.from_numpy(_RNG.standard_normal((*batch, 3)))


def diagonal(*batch):
    return td.Normal(vectors(*batch), torch.from_numpy(_RNG.uniform(0.3, 2, (*batch, 3))))


def low_rank():
    return td.LowRankMultivariateNormal(vectors(5), vectors(5)[..., None], vectors(5).exp())


def moments(distribution):
    whole = isinstance(distribution, td.MultivariateNormal | td.LowRankMultivariateNormal)
    covariance = distribution.covariance_matrix if whole else distribution.variance.expand(5, 3).diag_embed()
    return distribution.mean.expand(5, 3).numpy(), covariance.expand(5, 3, 3).numpy()


WHOLE = {
    "full": td.MultivariateNormal(vectors(5), positive_definite(5)),
    "low rank": low_rank(),
    "diagonal": diagonal(5),
    "wrapped": td.Independent(diagonal(5), 1),
}
OVER_VECTORS = {
    "full": td.MultivariateNormal(vectors(), positive_definite()),
    "full, conditional": td.MultivariateNormal(vectors(5), positive_definite(5)),
    "diagonal": diagonal(),
    "diagonal, conditional": diagonal(5),
    "diagonal, one for all": td.Normal(torch.tensor(0.5).double(), 2.0),
    "wrapped": td.Independent(diagonal(), 1),
}


@pytest.mark.parametrize("prior", OVER_VECTORS.values(), ids=OVER_VECTORS)
@pytest.mark.parametrize("posterior", WHOLE.values(), ids=WHOLE)
def test_the_rate_of_any_two_gaussians_is_their_closed_form(posterior, prior):
    """KL = 1/2 (tr(P^-1 S) + (m - n)' P^-1 (m - n) - k + log det P / det S)."""
    expected = []
    for mean, covariance, other, scale in zip(*moments(posterior), *moments(prior), strict=True):
        shift, ratio = mean - other, np.linalg.solve(scale, covariance)
        squares = shift @ np.linalg.solve(scale, shift)
        expected.append(0.5 * (np.trace(ratio) + squares - 3 - np.linalg.slogdet(ratio)[1]))
    rates = rate_parts(posterior, prior)
    joint = (td.MultivariateNormal, td.LowRankMultivariateNormal)
    assert rates.shape == (5, 1 if isinstance(posterior, joint) or isinstance(prior, joint) else 3)
    np.testing.assert_allclose(rates.sum(1), expected, rtol=1e-10)


def test_the_rate_of_factorised_distributions_is_that_of_each_dimension():
    posterior, prior = diagonal(5), diagonal()
    assert torch.equal(rate_parts(posterior, prior), kl_per_dimension(posterior, prior))
    wrapped = rate_parts(td.Independent(posterior, 1), td.Independent(prior, 1))
    assert torch.equal(wrapped, kl_per_dimension(posterior, prior))
    z, prior = posterior.sample(), td.StudentT(3.0, vectors(), 1.0)
    assert torch.equal(rate_parts(posterior, prior, z), kl_per_dimension(posterior, prior, z))


def mixture_of(components):
    return td.MixtureSameFamily(td.Categorical(torch.ones(2).double()), components)


@pytest.mark.parametrize("posterior", [*WHOLE.values(), td.Laplace(vectors(5), 1.0)], ids=[*WHOLE, "laplace"])
def test_the_rate_under_a_mixture_is_the_estimate_at_the_sample(posterior):
    z = posterior.sample()
    own = posterior.log_prob(z)
    for components in (td.Independent(diagonal(2), 1), td.MultivariateNormal(vectors(2), positive_definite(2))):
        prior = mixture_of(components)
        rates = rate_parts(posterior, prior, z)
        assert rates.shape == (5, 1)
        torch.testing.assert_close(rates[:, 0], own.reshape(5, -1).sum(1) - prior.log_prob(z))
        with pytest.raises(ValueError, match="has no known closed form; pass `z`"):
            rate_parts(posterior, prior)


def test_the_rate_of_groups_of_categories_has_a_part_for_each_group():
    probs = torch.tensor([[[0.5, 0.25, 0.25], [1 / 3, 1 / 3, 1 / 3]]]).double()
    posterior, prior = td.OneHotCategorical(probs), td.OneHotCategorical(torch.ones(2, 3).double())
    expected = [[np.log(3) - 1.5 * np.log(2), 0]]
    np.testing.assert_allclose(rate_parts(posterior, prior), expected, atol=1e-15)
    wrapped = td.Independent(posterior, 1), td.Independent(prior, 1)
    np.testing.assert_allclose(rate_parts(*wrapped), expected, atol=1e-15)


@pytest.mark.parametrize(
    ("posterior", "prior", "message"),
    [
        (diagonal(5), td.MultivariateNormal(torch.zeros(2), torch.eye(2)), r"event shape \(3,\), got \(2,\)"),
        (diagonal(5), td.MultivariateNormal(torch.zeros(4, 3), torch.eye(3)), r"batch shape \(5,\), got \(4,\)"),
        (WHOLE["full"], td.Normal(torch.zeros(2), 1.0), r"batch shape \(5,\), got \(2,\)"),
        (WHOLE["full"], td.Normal(torch.zeros(4, 3), 1.0), r"batch shape \(5,\), got \(4, 3\)"),
        (WHOLE["full"], td.MultivariateNormal(torch.zeros(2), torch.eye(2)), r"event shape \(3,\), got \(2,\)"),
        (td.OneHotCategorical(torch.ones(5, 2, 3)), diagonal(), "must both be over categories or neither, got OneHot"),
        (td.OneHotCategorical(torch.ones(5, 2, 3)), OVER_VECTORS["full"], "must both be over categories or neither"),
        (diagonal(5), td.OneHotCategorical(torch.ones(3)), "must both be over categories or neither, got Normal and"),
        (
            td.OneHotCategorical(torch.ones(5, 2, 3)),
            td.OneHotCategorical(torch.ones(3, 3)),
            r"batch shape \(5, 2\), got \(3,\)",
        ),
    ],
)
def test_a_rate_of_distributions_that_do_not_fit_is_refused(posterior, prior, message):
    with pytest.raises(ValueError, match=message):
        rate_parts(posterior, prior, posterior.sample())


@pytest.mark.parametrize("posterior", [diagonal(5), WHOLE["full"]], ids=["diagonal", "full"])
def test_a_rate_at_something_else_than_one_sample_is_refused(posterior):
    for shape in ((3,), (4, 3), (2, 5, 3), (5, 1)):
        with pytest.raises(ValueError, match=r"`z` must be one sample of the posterior, of shape \(5, 3\), got"):
            rate_parts(posterior, mixture_of(td.Independent(diagonal(2), 1)), torch.zeros(shape).double())
