import itertools
import math

import numpy as np
import pytest
import torch
from torch import distributions as td

from lightning_vae import multi_sample_bound
from lightning_vae.estimators import importance_weighted_bound

# One observation and a linear model of one latent, whose posterior is not exact.
OBSERVATION, SLOPE, NOISE, MEAN, LOG_VARIANCE = 1.3, 0.9, 0.5, 0.2, -0.6


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Drawn(td.Normal):
    """A normal distribution whose samples have given noise."""

    noise: torch.Tensor

    def rsample(self, sample_shape=()):
        return self.loc + self.scale * self.noise


def drawn_posterior(mean, log_variance, noise):
    """A posterior of one latent, the same for each column of noise, ``(K, columns)``."""
    columns = noise.shape[1]
    posterior = Drawn(mean.expand(columns, 1), (0.5 * log_variance).exp().expand(columns, 1))
    posterior.noise = noise[..., None]
    return posterior


def log_likelihood(z):
    return td.Normal(SLOPE * z[..., 0], math.sqrt(NOISE)).log_prob(torch.tensor(OBSERVATION).double())


def standard(k=1):
    return td.Normal(torch.zeros(k).double(), torch.ones(k).double())


def expectation(samples, nodes, beta=1.0):
    """The expected bound and the expected gradients in mean and log-variance, on a grid over the noise."""
    points, weights = np.polynomial.hermite_e.hermegauss(nodes)
    noise = torch.tensor(list(itertools.product(points, repeat=samples)), dtype=torch.float64).T
    products = list(itertools.product(weights / weights.sum(), repeat=samples))
    chance = torch.tensor(products, dtype=torch.float64).prod(1)
    parameters = [torch.tensor(each, dtype=torch.float64, requires_grad=True) for each in (MEAN, LOG_VARIANCE)]
    result = multi_sample_bound(drawn_posterior(*parameters, noise), standard(), log_likelihood, samples, beta=beta)
    gradient = torch.autograd.grad(-(chance @ result.loss), parameters)

    # The plain bound, by automatic differentiation of its definition.
    posterior = drawn_posterior(*parameters, noise)
    z = posterior.rsample()
    log_weights = log_likelihood(z) + beta * (standard().log_prob(z) - posterior.log_prob(z))[..., 0]
    plain = torch.autograd.grad(chance @ (log_weights.logsumexp(0) - math.log(samples)), parameters)
    return float(chance @ result.bound), torch.stack(gradient), torch.stack(plain)


@pytest.mark.parametrize(
    ("samples", "nodes", "bound", "gradient"),
    [
        (1, 120, -2.36571, (1.81600, -0.21894)),
        (2, 120, -2.01380, (1.01683, 0.10269)),
        (3, 40, -1.90105, (0.69867, 0.13699)),
    ],
)
def test_the_bound_and_its_gradient_in_expectation(samples, nodes, bound, gradient):
    value, own, plain = expectation(samples, nodes)
    assert value == pytest.approx(bound, abs=6e-6)
    assert own.tolist() == pytest.approx(gradient, abs=6e-6)
    torch.testing.assert_close(own, plain, rtol=0, atol=1e-12 if nodes == 120 else 1e-7)


@pytest.mark.parametrize("beta", [0.0, 0.3, 2.0])
@pytest.mark.parametrize("samples", [1, 2])
def test_the_gradient_is_unbiased_at_any_weight_of_the_rate(samples, beta):
    value, own, plain = expectation(samples, 120, beta)
    torch.testing.assert_close(own, plain, rtol=0, atol=1e-9)  # the grid
    assert math.isfinite(value)


def test_at_the_exact_posterior_every_sample_is_the_likelihood_and_the_encoders_gradient_is_0():
    eigenvalues, noise = torch.tensor([5, 3, 1.5, 0.8], dtype=torch.float64), 0.4
    rotation = torch.as_tensor(np.linalg.qr(np.random.default_rng(0).standard_normal((6, 6)))[0])
    decoder = rotation[:, :4] * (eigenvalues - noise).sqrt()
    variance = noise / eigenvalues
    x = torch.as_tensor(np.random.default_rng(1).standard_normal((5, 6)))
    mean = (x @ decoder / noise * variance).requires_grad_()
    log_variance = variance.log().expand(5, 4).clone().requires_grad_()
    decoder.requires_grad_()

    def log_likelihood(z):
        return td.Normal(z @ decoder.T, math.sqrt(noise)).log_prob(x).sum(-1)

    exact = td.MultivariateNormal(
        torch.zeros(6).double(), decoder @ decoder.T + noise * torch.eye(6).double()
    ).log_prob(x)
    assert exact.tolist() == pytest.approx([-8.14726, -6.66401, -6.93591, -8.07733, -14.94284], abs=6e-6)
    for samples in (1, 2, 7):
        posterior = td.Normal(mean, (0.5 * log_variance).exp())
        result = multi_sample_bound(posterior, standard(4), log_likelihood, samples)
        torch.testing.assert_close(result.bound, exact.detach(), rtol=0, atol=1e-12)
        gradients = torch.autograd.grad(result.loss.sum(), [mean, log_variance, decoder], retain_graph=True)
        assert max(float(each.abs().max()) for each in gradients[:2]) <= 1e-12
        assert gradients[2].abs().max() > 1  # that of the decoder is not

        z = result.z  # the plain gradient has the noise of the score
        log_weights = result.log_likelihood + (standard(4).log_prob(z) - posterior.log_prob(z)).sum(-1)
        assert torch.autograd.grad(log_weights.logsumexp(0).sum(), mean)[0].abs().max() > 0.1


def test_decoder_and_prior_have_the_plain_gradient_of_each_sample():
    slope, prior_mean = normal(3, 2, seed=1).requires_grad_(), normal(2, seed=2).requires_grad_()
    mean = normal(4, 2, seed=3).requires_grad_()
    x = normal(4, 3, seed=4)

    def log_likelihood(z):
        return td.Normal((z @ slope.T).tanh(), 0.5).log_prob(x).sum(-1)

    prior, posterior = td.Normal(prior_mean, 1.0), td.Normal(mean, 0.7)
    result = multi_sample_bound(posterior, prior, log_likelihood, 5)
    z = result.z.detach()
    log_weights = log_likelihood(z) + (prior.log_prob(z) - posterior.log_prob(z)).sum(-1)
    bounds = log_weights.logsumexp(0) - math.log(5)
    assert torch.equal(result.bound, -result.loss.detach())
    torch.testing.assert_close(result.bound, importance_weighted_bound(log_weights.detach()), rtol=0, atol=1e-13)
    for own, plain in zip(result.loss, bounds, strict=True):
        ours = torch.autograd.grad(-own, [slope, prior_mean], retain_graph=True)
        theirs = torch.autograd.grad(plain, [slope, prior_mean], retain_graph=True)
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-13)


def test_the_encoders_gradient_is_that_of_the_squared_weights():
    mean, scale = normal(4, 2).requires_grad_(), normal(4, 2, seed=1).exp()
    x = normal(4, 2, seed=2)

    def log_likelihood(z):
        return td.Normal(z.sin(), 0.5).log_prob(x).sum(-1)

    result = multi_sample_bound(td.Normal(mean, scale), standard(2), log_likelihood, 6)
    z = result.z.detach().requires_grad_()
    fixed = td.Normal(mean.detach(), scale)
    log_weights = log_likelihood(z) + (standard(2).log_prob(z) - fixed.log_prob(z)).sum(-1)
    of_z = torch.autograd.grad(log_weights.sum(), z)[0]
    expected = -(log_weights.softmax(0).square()[..., None] * of_z).sum(0)  # the mean moves all samples alike
    torch.testing.assert_close(torch.autograd.grad(result.loss.sum(), mean)[0], expected, rtol=0, atol=1e-12)


def test_other_uses_of_the_samples_keep_their_gradient():
    mean = normal(4, 2).requires_grad_()
    result = multi_sample_bound(td.Normal(mean, 1.0), standard(2), lambda z: -z.square().sum(-1), 3)
    whole = torch.autograd.grad(result.loss.sum() + result.z.sum(), mean, retain_graph=True)[0]
    torch.testing.assert_close(
        whole - torch.autograd.grad(result.loss.sum(), mean)[0], torch.full((4, 2), 3.0).double()
    )


FAMILIES = {
    "Laplace": lambda one, other: td.Laplace(one, other.exp()),
    "Normal in Independent": lambda one, other: td.Independent(td.Normal(one, other.exp()), 1),
    "full covariance": lambda one, other: td.MultivariateNormal(one, scale_tril=torch.diag_embed(other.exp())),
    "Student's t": lambda one, other: td.StudentT(5.0, one, other.exp()),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_any_reparameterised_posterior(family):
    """At one sample the gradient is that of the ELBO less the score, whose expectation is 0."""
    one, other = normal(5, 3).requires_grad_(), normal(5, 3, seed=1).mul(0.3).requires_grad_()
    posterior = FAMILIES[family](one, other)
    joint = td.MultivariateNormal(torch.zeros(3).double(), torch.eye(3).double())
    result = multi_sample_bound(posterior, joint, lambda z: -z.square().sum(-1), 1)
    gradient = torch.autograd.grad(result.loss.sum(), [one, other], retain_graph=True)

    z = result.z
    log_density = posterior.log_prob(z)
    own = FAMILIES[family](one, other).log_prob(z.detach())
    score = own if log_density.ndim == 2 else own.sum(-1)
    log_density = log_density if log_density.ndim == 2 else log_density.sum(-1)
    elbo = -z.square().sum(-1) + joint.log_prob(z) - log_density + score
    for one_, other_ in zip(gradient, torch.autograd.grad(-elbo.sum(), [one, other]), strict=True):
        torch.testing.assert_close(one_, other_, rtol=0, atol=1e-12)


def test_without_gradients_it_is_the_bound():
    with torch.no_grad():
        result = multi_sample_bound(td.Normal(normal(4, 2), 1.0), standard(2), lambda z: -z.square().sum(-1), 3)
    assert torch.equal(result.bound, -result.loss)


def test_what_makes_no_sense():
    posterior = td.Normal(torch.zeros(4, 2), 1.0)
    prior = td.Normal(torch.zeros(2), 1.0)

    def call(posterior=posterior, prior=prior, log_likelihood=lambda z: z.sum(-1), samples=2):
        multi_sample_bound(posterior, prior, log_likelihood, samples)

    with pytest.raises(ValueError, match="`samples` must be an integer of at least 1, got 0"):
        call(samples=0)
    with pytest.raises(ValueError, match=r"needs a posterior with reparameterised samples .* got VonMises"):
        call(td.VonMises(torch.zeros(4, 2), 1.0))
    with pytest.raises(ValueError, match=r"of real numbers, got OneHotCategoricalStraightThrough"):
        call(td.OneHotCategoricalStraightThrough(torch.ones(4, 2)))
    with pytest.raises(ValueError, match=r"The parameters of `posterior` must be tensors, .* it holds a list"):
        call(td.LogNormal(torch.zeros(4, 2), 1.0))
    with pytest.raises(ValueError, match=r"`log_likelihood` must return .*, of shape \(2, 4\), got \(2, 4, 2\)"):
        call(log_likelihood=lambda z: z)
    with pytest.raises(ValueError, match=r"`prior` must have a log-density .*, of shape \(2, 4\) .* got \(2,\)"):
        call(prior=td.Independent(td.Normal(torch.zeros(4, 2), 1.0), 2))
