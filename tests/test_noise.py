import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import distributions as td

from lightning_vae import MixturePrior, UniformCategorical
from lightning_vae.noise import component, sample_by_index, uniform_by_index
from lightning_vae.posteriors import OneHotGroups


def test_noise_belongs_to_the_observation():
    noise = uniform_by_index(torch.arange(100), 7)
    order = torch.randperm(100)
    assert torch.equal(uniform_by_index(order, 7), noise[order])
    assert torch.equal(uniform_by_index(torch.tensor([42]), 7), noise[42:43])
    assert torch.equal(uniform_by_index(torch.arange(100), 5), noise[:, :5])
    assert not torch.equal(uniform_by_index(torch.arange(100), 7, seed=1), noise)


def test_noise_is_uniform_and_independent():
    noise = uniform_by_index(torch.arange(2000), 50).double().numpy()
    assert 0 < noise.min() < noise.max() < 1
    assert stats.kstest(noise.ravel(), "uniform").pvalue > 0.001
    for other in (noise[1:, :], noise[:, 1:], uniform_by_index(torch.arange(2000), 50, seed=1).numpy()):
        rows, columns = other.shape
        assert abs(stats.pearsonr(noise[:rows, :columns].ravel(), other.ravel()).statistic) < 0.015


def test_noise_stays_inside_the_interval_where_half_precision_is_the_default():
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        noise = uniform_by_index(torch.arange(2000), 50)
    finally:
        torch.set_default_dtype(default)
    assert noise.dtype == torch.float32
    assert torch.equal(noise, uniform_by_index(torch.arange(2000), 50))
    assert noise.max() < 1


def test_noise_leaves_the_random_state_alone():
    state = torch.get_rng_state()
    uniform_by_index(torch.arange(3), 4)
    assert torch.equal(torch.get_rng_state(), state)


def test_noise_of_far_indices_differs():
    index = torch.tensor([5, 5 + 2**32, 5 + 2**33])
    assert len(uniform_by_index(index, 3).unique(dim=0)) == 3


def test_noise_is_the_same_in_every_version():
    """MurmurHash3's finaliser in Python's own integers; int32 overflows, and has no unsigned shift."""

    def mixed(key: int) -> int:
        key = (key ^ (key >> 16)) * 0x85EBCA6B % 2**32
        key = (key ^ (key >> 13)) * 0xC2B2AE35 % 2**32
        return key ^ (key >> 16)

    for index, seed in itertools.product((0, 7, 2**31, 2**32 - 1, 2**40 + 3), (0, 3, 0x9057E101)):
        row = mixed((mixed(seed) + (index % 2**32) * 0x9E3779B9 + (index >> 32)) % 2**32)
        bits = [mixed((row + column * 0x9E3779B9) % 2**32) for column in (1, 2, 3)]
        expected = torch.tensor([[((each >> 9) + 0.5) / 2**23 for each in bits]])
        assert torch.equal(uniform_by_index(torch.tensor([index]), 3, seed), expected)


# ---- samples

MANY = torch.arange(20_000)
FACTOR = torch.tensor([[0.5, 0.0, 0.0], [-1.0, 2.0, 0.0], [0.3, 0.1, 0.2]]).double()
LOC = torch.tensor([1.0, -2.0, 0.5]).double()
PROBS = torch.tensor([[0.1, 0.0, 0.6, 0.3], [0.25, 0.25, 0.25, 0.25]]).double()


def full(*batch):
    return td.MultivariateNormal(LOC.expand(*batch, 3), scale_tril=FACTOR)


def one_hot(*batch):
    return OneHotGroups(PROBS.log().expand(*batch, 2, 4))


def mixture():
    components = td.MultivariateNormal(torch.stack([LOC, -LOC]), scale_tril=torch.stack([FACTOR, 2 * FACTOR]))
    return td.MixtureSameFamily(td.Categorical(torch.tensor([0.3, 0.7]).double()), components)


@pytest.mark.parametrize("number", [0, 1, 7])
def test_a_factorised_posterior_is_sampled_by_its_quantiles(number):
    posterior = td.Normal(torch.randn(5, 3), torch.rand(5, 3) + 0.1)
    expected = posterior.icdf(uniform_by_index(torch.arange(5), 3, seed=0x9057E101 + number))
    assert torch.equal(sample_by_index(posterior, torch.arange(5), number), expected)
    wrapped = td.Independent(posterior, 1)
    assert torch.equal(sample_by_index(wrapped, torch.arange(5), number), expected)


@pytest.mark.parametrize(
    "posterior", [full(8), one_hot(8), td.Normal(LOC.expand(8, 3), 1.0)], ids=["full", "one_hot", "diagonal"]
)
def test_a_sample_belongs_to_the_observation(posterior):
    order = torch.tensor([3, 0, 7, 1, 2, 4, 6, 5])
    z = sample_by_index(posterior, torch.arange(8))  # all observations have the same posterior
    assert torch.equal(sample_by_index(posterior, order), z[order])
    assert not torch.equal(sample_by_index(posterior, torch.arange(8), number=1), z)
    assert not torch.equal(sample_by_index(posterior, torch.arange(8), seed=1), z)
    state = torch.get_rng_state()
    sample_by_index(posterior, order)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("posterior", [full(20_000), full()], ids=["posterior", "prior"])
def test_samples_of_a_full_covariance_have_it(posterior):
    noise = torch.linalg.solve_triangular(FACTOR, (sample_by_index(posterior, MANY) - LOC).T, upper=False).T.numpy()
    assert stats.kstest(noise.ravel(), "norm").pvalue > 0.001
    np.testing.assert_allclose(np.corrcoef(noise.T), np.eye(3), atol=0.02)


def test_a_diagonal_covariance_has_the_samples_of_independent_dimensions():
    scale = torch.tensor([0.5, 1.0, 3.0])
    whole, each = td.MultivariateNormal(LOC.float(), scale_tril=scale.diag()), td.Normal(LOC.float(), scale)
    torch.testing.assert_close(sample_by_index(whole, MANY), sample_by_index(each, MANY))
    thin = td.LowRankMultivariateNormal(LOC.float(), torch.zeros(3, 1), scale.square())
    torch.testing.assert_close(sample_by_index(thin, MANY), sample_by_index(each, MANY))


@pytest.mark.parametrize("posterior", [one_hot(20_000), one_hot()], ids=["posterior", "prior"])
def test_samples_of_categories_have_their_probabilities(posterior):
    z = sample_by_index(posterior, MANY)
    assert z.shape == (20_000, 2, 4)
    assert torch.equal(z.sum(-1), torch.ones(20_000, 2).double())
    counts = z.sum(0).numpy()
    assert counts[0, 1] == 0  # the class of probability 0
    possible = PROBS[0].numpy() > 0
    for found, probs in ((counts[0, possible], PROBS[0].numpy()[possible]), (counts[1], PROBS[1].numpy())):
        assert stats.chisquare(found, 20_000 * probs / probs.sum()).pvalue > 0.001
    assert abs(np.corrcoef(z[:, 0, 2], z[:, 1, 2])[0, 1]) < 0.03


def test_samples_of_categories_have_the_gradient_of_the_probabilities():
    logits = torch.tensor([[[1.0, 0.0, -1.0]]]).double().requires_grad_()
    sample_by_index(OneHotGroups(logits), torch.arange(1))[..., 0].sum().backward()
    probs = logits.detach().softmax(-1)
    torch.testing.assert_close(logits.grad, probs[..., :1] * (torch.eye(3)[0] - probs))
    plain = td.OneHotCategorical(logits=logits)
    assert not sample_by_index(plain, torch.arange(1)).requires_grad


def test_samples_of_uniform_categories_as_a_prior():
    z = sample_by_index(UniformCategorical(6, classes=3)(), MANY)
    assert z.shape == (20_000, 2, 3)
    assert stats.chisquare(z.sum(0).flatten()).pvalue > 0.001


def test_samples_of_a_mixture_have_its_distribution():
    z = sample_by_index(mixture(), MANY)
    weights, scale = torch.tensor([0.3, 0.7]), FACTOR.square().sum(1).sqrt()
    for dimension in range(3):
        loc, width = float(LOC[dimension]), float(scale[dimension])
        cdf = lambda x, a=loc, s=width: 0.3 * stats.norm.cdf(x, a, s) + 0.7 * stats.norm.cdf(x, -a, 2 * s)  # noqa: E731
        assert stats.kstest(z[:, dimension].numpy(), cdf).pvalue > 0.001
    torch.testing.assert_close(z.mean(0), (weights[0] - weights[1]) * LOC, atol=0.05, rtol=0)


def test_samples_of_a_mixture_of_diagonal_gaussians_as_a_prior():
    torch.manual_seed(0)
    prior = MixturePrior(2, components=5)()
    z = sample_by_index(prior, MANY).detach()
    torch.testing.assert_close(z.mean(0), prior.mean.detach(), atol=0.03, rtol=0)
    torch.testing.assert_close(z.var(0), prior.variance.detach(), atol=0.05, rtol=0)
    assert torch.equal(sample_by_index(prior, MANY[7:9]), sample_by_index(prior, MANY)[7:9])


def test_what_has_no_inverse_is_sampled_with_fresh_noise():
    index = torch.arange(4)
    posterior, prior = td.StudentT(3.0, torch.zeros(4, 2)), td.StudentT(3.0, torch.zeros(2))
    components = td.Independent(td.Normal(torch.zeros(4, 3, 2), 1.0), 1)
    batch = td.MixtureSameFamily(td.Categorical(torch.ones(4, 3)), components)
    for distribution in (posterior, prior, batch):
        torch.manual_seed(0)
        z = sample_by_index(distribution, index)
        assert z.shape == (4, 2)
        assert not torch.equal(sample_by_index(distribution, index), z)
    with pytest.raises(NotImplementedError, match="batch of mixtures"):
        component(batch, index)


def test_the_chosen_components_of_a_mixture():
    parts = component(mixture(), torch.tensor([[0, 1], [1, 1]]))
    assert parts.batch_shape == (2, 2)
    assert torch.equal(parts.loc[0, 1], -LOC)
    torch.testing.assert_close(parts.covariance_matrix[1, 0], 4 * FACTOR @ FACTOR.T)
    assert math.isclose(float(parts.scale_tril[0, 0, 1, 1]), 2.0)
