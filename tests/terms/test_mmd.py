import itertools
import math
import re
from functools import partial

import numpy as np
import pytest
import torch
from scipy.stats import kstest
from torch import distributions as td

from lightning_vae.terms import MMD, inverse_multiquadric, rbf, squared_mmd
from lightning_vae.terms.mmd import sample_prior
from tests.terms.steps import normal, step_of

STANDARD = ([0.0, 0.0], [[1.0, 0.0], [0.0, 1.0]])
SHIFTED = ([1.0, 0.0], [[1.0, 0.0], [0.0, 1.0]])
TILTED = ([1.0, -0.5], [[0.5, 0.2], [0.2, 0.8]])
EXACT = {
    "rbf, h 1, shifted": (partial(rbf, h=1.0), SHIFTED, 0.10235),
    "rbf, h 2, shifted": (partial(rbf, h=2.0), SHIFTED, 0.11750),
    "rbf, h 4, shifted": (partial(rbf, h=4.0), SHIFTED, 0.10661),
    "rbf, h 2, tilted": (partial(rbf, h=2.0), TILTED, 0.19912),
    "imq, C 4, shifted": (partial(inverse_multiquadric, c=4.0), SHIFTED, 0.09113),
    "imq, C 4, tilted": (partial(inverse_multiquadric, c=4.0), TILTED, 0.15102),
}


def expected_kernel(kernel, one, other):
    """E k(a, b) for a and b of two Gaussians of two dimensions, by Gauss-Hermite quadrature over their difference."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(120)
    grid = torch.tensor(list(itertools.product(nodes, nodes)), dtype=torch.float64)
    weights = torch.as_tensor(np.outer(weights, weights).reshape(-1) / (2 * math.pi))
    (mean, covariance), (mean_2, covariance_2) = (map(torch.tensor, each) for each in (one, other))
    scale = torch.linalg.cholesky((covariance + covariance_2).double())
    difference = (mean - mean_2).double() + grid @ scale.T
    return weights @ kernel(difference.square().sum(1))


@pytest.mark.parametrize(("kernel", "other", "expected"), EXACT.values(), ids=EXACT)
def test_the_kernels_have_the_expectations_of_their_closed_forms(kernel, other, expected):
    inside = expected_kernel(kernel, STANDARD, STANDARD) + expected_kernel(kernel, other, other)
    assert float(inside - 2 * expected_kernel(kernel, STANDARD, other)) == pytest.approx(expected, abs=6e-6)


@pytest.mark.parametrize("kernel", [partial(rbf, h=0.7), partial(inverse_multiquadric, c=2.0)], ids=["rbf", "imq"])
def test_the_estimate_is_unbiased(kernel):
    """The mean over all pairs of samples of two distributions on a few points is their exact discrepancy."""
    points, others = normal(3, 2), normal(2, 2, seed=1)

    def mean(one, other):
        return kernel(torch.cdist(one, other).square()).mean()

    exact = mean(points, points) + mean(others, others) - 2 * mean(points, others)
    estimates = [
        squared_mmd(points[list(drawn)], others[list(drawn_2)], kernel)
        for drawn in itertools.product(range(3), repeat=2)
        for drawn_2 in itertools.product(range(2), repeat=3)
    ]
    torch.testing.assert_close(torch.stack(estimates).mean(), exact, rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("options", "name"), [({"kernel": "rbf", "scale": 2.0}, "rbf, h 2"), ({"scale": 4.0}, "imq, C 4")]
)
def test_the_term_estimates_the_discrepancy_from_the_prior(options, name):
    _, (mean, covariance), expected = EXACT[f"{name}, tilted"]
    aggregate = td.MultivariateNormal(torch.tensor(mean).double(), torch.tensor(covariance).double())
    posterior = td.Normal(torch.zeros(200, 2).double(), 1.0)
    torch.manual_seed(0)
    estimates = [MMD(**options)(step_of(posterior, aggregate.sample((200,)))) for _ in range(50)]
    assert float(torch.stack(estimates).mean()) == pytest.approx(expected, abs=0.016)  # four standard errors
    assert estimates[0].dtype == torch.float64


@pytest.mark.parametrize(("kernel", "scale"), [("rbf", 3.0), ("imq", 6.0)])
def test_the_default_scale_is_that_of_the_latent_dimensions(kernel, scale):
    step = step_of(td.Normal(torch.zeros(10, 3), 1.0), normal(10, 3).float())
    assert torch.equal(MMD(kernel=kernel)(step), MMD(kernel=kernel, scale=scale)(step))


def test_gradients_flow_to_the_samples_and_to_a_learned_prior():
    mean = torch.zeros(2).double().requires_grad_()
    z = normal(300, 2).add(3).requires_grad_()
    step = step_of(td.Normal(z, 1.0), z, prior=td.Normal(mean, 1.0))
    towards_prior, towards_posterior = torch.autograd.grad(MMD()(step), [z, mean])
    assert (towards_prior.sum(0) > 0).all()  # less of it lowers the loss
    assert (towards_posterior < 0).all()


def mixture(k):
    components = td.Independent(td.Normal(torch.tensor([[-3.0] * k, [3.0] * k]), 1.0), 1)
    return td.MixtureSameFamily(td.Categorical(torch.ones(2)), components)


PRIORS = {
    "Normal": lambda: td.Normal(torch.zeros(2), torch.ones(2)),
    "conditional": lambda: td.Normal(torch.zeros(100, 2), torch.ones(2)),
    "mixture": lambda: mixture(2),
    "joint and conditional": lambda: td.MultivariateNormal(torch.zeros(100, 2), torch.eye(2)),
}


@pytest.mark.parametrize("prior", PRIORS)
def test_the_term_does_not_touch_the_random_state(prior):
    step = step_of(td.Normal(torch.zeros(100, 2), 1.0), normal(100, 2).float(), prior=PRIORS[prior]())
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    assert torch.isfinite(MMD()(step))
    assert torch.equal(torch.rand(3), expected)


def test_the_samples_of_the_prior_have_its_distribution_and_know_nothing_of_the_latents():
    prior = td.Normal(torch.tensor([0.0, 5.0]), torch.tensor([1.0, 0.1]))
    batches = [normal(100, 2, seed=seed).float() for seed in range(100)]
    drawn = torch.stack([sample_prior(prior, z) for z in batches])
    standard = ((drawn - prior.loc) / prior.scale).reshape(-1, 2)
    for column in standard.T:
        assert kstest(column.numpy(), "norm").pvalue > 1e-3
    together = torch.cat([standard, torch.stack(batches).reshape(-1, 2)], dim=1)
    correlation = torch.corrcoef(together.T) - torch.eye(4)
    assert correlation.abs().max() < 4 / 100  # four standard errors
    assert torch.equal(sample_prior(prior, batches[0]), drawn[0])


def test_samples_of_a_mixture_are_of_all_its_components():
    drawn = sample_prior(mixture(2), normal(2000, 2).float())
    assert float((drawn[:, 0] > 0).float().mean()) == pytest.approx(0.5, abs=0.05)
    assert float(((drawn[:, 0] > 0) == (drawn[:, 1] > 0)).float().mean()) > 0.99


def test_latents_that_are_groups_of_categories():
    posterior = td.OneHotCategorical(torch.full((50, 3, 4), 0.25))
    prior = td.OneHotCategorical(torch.full((3, 4), 0.25))
    assert abs(float(MMD()(step_of(posterior, posterior.sample(), prior=prior)))) < 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel": "linear"}, "`kernel` must be 'imq' or 'rbf', got 'linear'"),
        ({"scale": 0.0}, "`scale` must be positive and finite, or None, got 0.0"),
        ({"weight": -1.0}, "`weight` must be a finite number of at least 0, got -1.0"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        MMD(**options)


def test_what_makes_no_sense_in_a_step():
    with pytest.raises(ValueError, match=r"`MMD` compares .* must hold at least 2, got 1\. Set `drop_last=True`"):
        MMD()(step_of(td.Normal(torch.zeros(1, 2), 1.0), torch.zeros(1, 2)))
    wide = td.Normal(torch.zeros(3, 5, 2), 1.0)
    with pytest.raises(ValueError, match=re.escape("for each latent, of shape (5, 2), got (3, 5, 2)")):
        MMD()(step_of(td.Normal(torch.zeros(5, 2), 1.0), torch.zeros(5, 2), prior=wide))
    with pytest.raises(ValueError, match=r"`a` and `b` must have shapes .*, got \(2, 3\) and \(2, 4\)"):
        squared_mmd(torch.zeros(2, 3), torch.zeros(2, 4), partial(rbf, h=1.0))
