import math

import pytest
import torch

from lightning_vae.datamodules import Gaussian, linear_vae_optimum
from tests.datamodules.doubles import ready, whole

SPECTRUM = (5.0, 3.0, 1.5, 0.8, 0.3, 0.1)


@pytest.mark.parametrize(
    ("beta", "active", "loss", "rate", "squared_error", "variances"),
    [
        (0.5, 4, 6.59679, 4.6641, 1.2, (0.96, 0.9333, 0.8667, 0.75)),
        (1, 4, 8.54253, 3.2778, 2.0, (0.92, 0.8667, 0.7333, 0.5)),
        (2, 3, 11.04770, 1.8915, 3.6, (0.84, 0.7333, 0.4667, 0)),
        (4, 2, 13.67584, 0.8840, 5.9, (0.68, 0.4667, 0, 0)),
    ],
)
def test_linear_vae_optimum(beta, active, loss, rate, squared_error, variances):
    optimum = linear_vae_optimum(SPECTRUM[::-1], latent_dim=4, variance=0.4, beta=beta)
    assert optimum.active_units == active
    assert optimum.loss == pytest.approx(loss, abs=1e-5)
    assert optimum.rate == pytest.approx(rate, abs=1e-4)
    assert optimum.squared_error == pytest.approx(squared_error)
    assert optimum.posterior_mean_variance == pytest.approx(variances, abs=1e-4)
    assert optimum.loss == pytest.approx(optimum.distortion + beta * optimum.rate)
    assert sum(optimum.rate_per_dimension) == pytest.approx(optimum.rate)


def test_a_collapsed_linear_vae_leaves_all_of_the_variance():
    for eigenvalue in (number / 100 for number in range(1, 100)):
        assert linear_vae_optimum((eigenvalue,), latent_dim=1, variance=1.0).squared_error == pytest.approx(eigenvalue)


def test_linear_vae_optimum_is_the_exact_likelihood_at_beta_one():
    datamodule = ready(Gaussian(size=64), "fit")
    x = whole(datamodule.val_dataloader())["x"].double()
    eigenvalues, directions = torch.linalg.eigh(x.T @ x / len(x))
    weights = directions[:, -4:] * (eigenvalues[-4:] - 0.4).sqrt()
    density = torch.distributions.MultivariateNormal(
        torch.zeros(6).double(), weights @ weights.T + 0.4 * torch.eye(6).double()
    )
    optimum = linear_vae_optimum(SPECTRUM, latent_dim=4, variance=0.4)
    assert optimum.loss == pytest.approx(-density.log_prob(x).mean().item(), abs=1e-6)


def test_more_latents_than_dimensions_stay_at_the_prior():
    optimum = linear_vae_optimum((2.0, 1.0), latent_dim=3, variance=0.5)
    assert optimum.rate_per_dimension == pytest.approx((math.log(4) / 2, math.log(2) / 2, 0))
    assert optimum.squared_error == pytest.approx(1.0)


def minimised(eigenvalues, latent_dim, variance, beta, free_bits) -> tuple[float, list[float]]:
    """Minimise the loss over encoder and posterior variance, with the best decoder for each, from 16 starts."""
    generator = torch.Generator().manual_seed(0)
    covariance = torch.diag(torch.tensor(eigenvalues, dtype=torch.float64))
    spread = torch.logspace(-1.5, 0.3, 16, dtype=torch.float64).view(-1, 1, 1)
    encoder = torch.randn(16, latent_dim, len(covariance), dtype=torch.float64, generator=generator) * spread
    log_variance = -2 * torch.rand(16, latent_dim, dtype=torch.float64, generator=generator)
    optimizer = torch.optim.Adam([encoder.requires_grad_(), log_variance.requires_grad_()])
    steps = 700
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.08 * (1 - step / steps) ** 2
        of_means = encoder @ covariance @ encoder.mT
        cross = covariance @ encoder.mT
        explained = torch.linalg.solve(of_means + torch.diag_embed(log_variance.exp()), cross.mT)
        squared_error = covariance.trace() - (cross * explained.mT).sum((1, 2))
        rates = 0.5 * (of_means.diagonal(dim1=1, dim2=2) + log_variance.exp() - 1 - log_variance)
        distortion = len(covariance) / 2 * math.log(2 * math.pi * variance) + squared_error / (2 * variance)
        loss = distortion + beta * rates.clamp(min=free_bits).sum(dim=1)
        optimizer.zero_grad()
        loss.sum().backward()
        optimizer.step()
    best = loss.argmin()
    return loss[best].item(), sorted(rates[best].tolist(), reverse=True)


@pytest.mark.parametrize(
    ("eigenvalues", "latent_dim", "beta", "free_bits", "rates"),
    [
        (SPECTRUM, 4, 1.0, 0.5, (1.2629, 1.0075, 0.6609, 0.5)),  # one at the floor: a direction each
        (SPECTRUM, 4, 2.5, 0.25, (0.8047, 0.5493, 0.25, 0.25)),  # two share two directions
        (SPECTRUM, 4, 2.5, 0.5, (0.5, 0.5, 0.5, 0.5)),  # a first dimension above the floor doesn't pay
        ((5.161, 1.692, 1.397, 0.921), 5, 0.4, 0.2, (1.737, 1.179, 1.083, 0.776, 0.2)),  # the last above it shares
    ],
)
def test_linear_vae_optimum_with_free_bits_is_the_numerical_minimum(eigenvalues, latent_dim, beta, free_bits, rates):
    optimum = linear_vae_optimum(eigenvalues, latent_dim, variance=0.4, beta=beta, free_bits=free_bits)
    assert optimum.rate_per_dimension == pytest.approx(rates, abs=1e-3)
    loss, found = minimised(eigenvalues, latent_dim, 0.4, beta, free_bits)
    assert loss == pytest.approx(optimum.loss, abs=2e-4)
    assert found == pytest.approx(optimum.rate_per_dimension, abs=0.01)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eigenvalues": (1.0, -1.0)}, r"`eigenvalues` must be one or more positive numbers, got \[1.0, -1.0\]"),
        ({"latent_dim": 0}, "`latent_dim` must be at least 1, got 0"),
        ({"variance": 0}, "`variance` must be positive, got 0"),
        ({"beta": -1}, "`beta` must be positive, got -1"),
        ({"free_bits": -0.5}, "`free_bits` must be at least 0, got -0.5"),
    ],
)
def test_linear_vae_optimum_errors(options, message):
    with pytest.raises(ValueError, match=message):
        linear_vae_optimum(**{"eigenvalues": SPECTRUM, "latent_dim": 4, "variance": 0.4, **options})
