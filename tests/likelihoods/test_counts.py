from functools import partial

import numpy as np
import pytest
import torch
from scipy.stats import nbinom, poisson

from lightning_vae import VAE, NegativeBinomial, Poisson

COUNTS = torch.arange(40).double()


def log_probs(likelihood, *parameters):
    """Log-probabilities of the counts from 0 to 39."""
    output = torch.tensor([parameters]).double().expand(len(COUNTS), -1)
    return likelihood.double()(output).log_prob(COUNTS[:, None]).detach()


def test_the_probabilities_are_those_of_scipy():
    for log_mean in (-3.0, -1.0, 0.5, 4.0):
        mean = torch.tensor(log_mean).double().exp()
        expected = torch.from_numpy(poisson.logpmf(COUNTS, mean))
        torch.testing.assert_close(log_probs(Poisson((1,)), log_mean), expected, rtol=1e-9, atol=1e-9)
        likelihood = NegativeBinomial((1,))
        for log_theta in (-2.0, 0.0, 3.0):
            with torch.no_grad():
                likelihood.log_inverse_dispersion.fill_(log_theta)
            theta = torch.tensor(log_theta).double().exp()
            expected = torch.from_numpy(nbinom.logpmf(COUNTS, theta, theta / (theta + mean)))
            torch.testing.assert_close(log_probs(likelihood, log_mean), expected, rtol=1e-6, atol=1e-9)


def test_a_share_of_the_counts_is_replaced_by_zeros():
    share = torch.tensor(0.7).double().sigmoid()
    for make in (Poisson, NegativeBinomial):
        counts = log_probs(make((1,)), 1.3).exp()
        expected = (1 - share) * counts + share * (COUNTS == 0)
        torch.testing.assert_close(log_probs(make((1,), zero_inflated=True), 1.3, 0.7).exp(), expected)


@pytest.mark.parametrize("zero_inflated", [False, True])
@pytest.mark.parametrize("make", [Poisson, NegativeBinomial])
def test_mean_and_variance_are_those_of_the_probabilities(make, zero_inflated):
    likelihood = make((1,), zero_inflated=zero_inflated).double()
    parameters = torch.tensor([[1.0, -0.4][: 1 + zero_inflated]]).double()
    counts = torch.arange(400).double()
    distribution = likelihood(parameters)
    mass = likelihood(parameters.expand(400, -1)).log_prob(counts[:, None]).exp()
    mean = (mass * counts).sum()
    torch.testing.assert_close(distribution.mean.squeeze(), mean)
    torch.testing.assert_close(distribution.variance.squeeze(), (mass * (counts - mean).square()).sum())


def test_a_mean_near_zero_still_has_a_slope():
    output = torch.full((1, 1), -200.0, requires_grad=True)
    log_prob = Poisson((1,))(output).log_prob(torch.ones(1, 1))
    assert log_prob.item() == pytest.approx(-200)
    (gradient,) = torch.autograd.grad(log_prob.sum(), output)
    assert gradient.item() == pytest.approx(1)


@pytest.mark.parametrize(("learned", "used"), [(-50.0, -10.0), (50.0, 8.0)])
def test_the_dispersion_stays_where_float32_is_precise(learned, used):
    likelihood = NegativeBinomial((1,))
    with torch.no_grad():
        likelihood.log_inverse_dispersion.fill_(learned)
    single = likelihood(torch.full((40, 1), 2.0)).log_prob(COUNTS[:, None].float())
    theta, mean = np.exp(used), np.exp(2.0)
    expected = torch.from_numpy(nbinom.logpmf(COUNTS, theta, theta / (theta + mean)))
    torch.testing.assert_close(single.double(), expected, rtol=1e-4, atol=5e-3)


@pytest.mark.parametrize("make", [Poisson, NegativeBinomial, partial(Poisson, zero_inflated=True)])
def test_data_that_are_no_counts_are_refused(make):
    vae = VAE((2,), None, 2, likelihood=make)
    vae.elbo_terms(torch.tensor([[0, 300]]))
    for wrong in (-1.0, 0.5):
        with pytest.raises(ValueError, match=f"needs counts .0, 1, 2 and so on., but a batch holds {wrong:g}"):
            vae.elbo_terms(torch.tensor([[0, wrong]]))
    with pytest.raises(ValueError, match=r"`levels` must be None for the .* likelihood, whose data are counts"):
        make((2,), 256)


def test_missing_counts_are_not_checked():
    x = torch.tensor([[3.0, torch.nan]])
    Poisson((2,)).check_values(x, ~x.isnan())
    with pytest.raises(ValueError, match="`likelihood` Poisson needs counts"):
        Poisson((2,)).check_values(x)


def test_the_encoder_sees_the_logarithm_of_counts():
    x = torch.tensor([[0.0, 7.0, torch.nan]])
    features = Poisson((3,)).features(x, ~x.isnan())
    torch.testing.assert_close(features, torch.tensor([[1.0, 8.0, 1.0]]).log())
