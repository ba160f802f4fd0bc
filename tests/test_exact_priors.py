"""The linear VAE with learned priors and normalised means: at its closed-form optimum, and fitted."""

from functools import partial

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from torch import nn

from lightning_vae import (
    VAE,
    BatchNormMeans,
    Condition,
    ConditionalNormal,
    FullCovariance,
    Gaussian,
    LearnedNormal,
    LinearDecoder,
    LinearEncoder,
)
from lightning_vae.datamodules import TensorLoader
from tests.doubles import optimal_linear_vae, quiet_trainer

SPECTRUM, VARIANCE = np.array([5, 3, 1.5, 0.8, 0.3, 0.1]), 0.4
DIRECTIONS = np.linalg.qr(np.random.default_rng(0).standard_normal((6, 6)))[0]
SLOPES = np.array([[2, 0], [-1, 1], [0, 0.5], [1, -1], [0.5, 0], [0, 3]])
GAMMA = 0.6


def whitened(size, columns):
    """Draw rows whose sample covariance is exactly I."""
    rows = np.random.default_rng(1).standard_normal((size, columns))
    rows -= rows.mean(0)
    return rows @ np.linalg.inv(np.linalg.cholesky(rows.T @ rows / size)).T


def exact_data(size=500):
    """Draw x whose sample covariance has exactly the spectrum."""
    return torch.from_numpy(whitened(size, 6) * np.sqrt(SPECTRUM) @ DIRECTIONS.T)


def linear_vae(beta=1.0, **parts):
    networks = {"encoder": LinearEncoder, "decoder": LinearDecoder, "likelihood": partial(Gaussian, variance=VARIANCE)}
    return VAE((6,), latent_dim=4, beta=beta, **{**networks, **parts})


@torch.no_grad()
def expected_loss(vae, batch, beta=1.0):
    """Compute the loss with the expectation over z in closed form, and the rate."""
    observations = vae.observe(batch)
    rate = vae.elbo_terms(observations).rate.mean()
    posterior, c = vae.posterior, vae._embedded(observations.condition)
    error = (vae._decode(posterior.mean, c).mean - observations.x).square().sum(1)
    weight = vae.decoder.map.weight[:, :4]
    if not posterior.event_shape:
        posterior = torch.distributions.MultivariateNormal(posterior.mean, scale_tril=posterior.stddev.diag_embed())
    error = error + (weight @ posterior.scale_tril).square().sum((1, 2))
    distortion = 3 * np.log(2 * np.pi * VARIANCE) + error.mean() / (2 * VARIANCE)
    return float(distortion + beta * rate), float(rate)


# ---- at the optimum


@pytest.mark.parametrize(
    ("beta", "loss", "rate"), [(0.5, 6.59679, 4.66406), (1.0, 8.54253, 3.27777), (2.5, 11.90665, 1.55676)]
)
def test_a_learned_prior_has_the_optimum_of_the_standard_one_in_any_scale_of_the_latents(beta, loss, rate):
    x = exact_data()
    standard = optimal_linear_vae(x, 4, VARIANCE, beta)
    loc, scale = torch.tensor([1.0, -2.0, 0.5, 3.0]).double(), torch.tensor([0.3, 4.0, 1.0, 20.0]).double()
    vae = linear_vae(beta, prior=LearnedNormal).double()
    with torch.no_grad():
        vae.prior_module.loc.copy_(loc)
        vae.prior_module.log_scale.copy_(scale.log())
        vae.encoder.mean.weight.copy_(scale[:, None] * standard.encoder.mean.weight)
        vae.encoder.mean.bias.copy_(loc)
        vae.encoder.log_variance.copy_(standard.encoder.log_variance + 2 * scale.log())
        vae.decoder.map.weight.copy_(standard.decoder.map.weight / scale)
        vae.decoder.map.bias.copy_(-vae.decoder.map.weight @ loc)
    found = expected_loss(vae, x, beta)
    assert found == pytest.approx((loss, rate), abs=6e-6)
    assert found == pytest.approx(expected_loss(standard, x, beta), abs=1e-10)
    parts = vae.elbo_terms(vae.observe(x)).rate_per_dimension.mean(0)
    exact = np.log(np.maximum(SPECTRUM[:4] / (beta * VARIANCE), 1)) / 2
    np.testing.assert_allclose(parts.detach(), exact, atol=1e-10)


def widths():
    """The variances of the posterior at the end point under normalised means, one for each eigenvalue."""

    def slope(d, eigenvalue):
        return eigenvalue * GAMMA**2 / (VARIANCE * (GAMMA**2 + d) ** 2) - (1 / d - 1)

    return np.array([brentq(slope, 1e-6, 1 - 1e-9, (eigenvalue,), xtol=1e-14) for eigenvalue in SPECTRUM[:4]])


def test_normalised_means_have_their_end_point_in_closed_form():
    width = widths()
    assert width == pytest.approx([0.03322, 0.06183, 0.17485, 0.51583], abs=6e-6)
    vae = linear_vae(posterior=partial(BatchNormMeans, gamma=GAMMA)).double()
    weight = DIRECTIONS[:, :4] * np.sqrt(SPECTRUM[:4]) * GAMMA / (GAMMA**2 + width)
    with torch.no_grad():
        for parameter in (*vae.encoder.parameters(), *vae.decoder.parameters()):
            parameter.zero_()
        vae.encoder.mean.weight[:4] = 1e3 * torch.from_numpy(DIRECTIONS[:, :4].T)  # large beside the epsilon
        vae.encoder.mean.bias[4:] = torch.from_numpy(np.log(width))
        vae.decoder.map.weight.copy_(torch.from_numpy(weight))
    assert expected_loss(vae, exact_data()) == pytest.approx((8.95411, 3.40978), abs=6e-6)


def test_a_full_covariance_gains_nothing_where_the_exact_posterior_is_diagonal_and_all_where_it_is_not():
    """At beta 1 the loss is the exact negative log-likelihood for any rotation of the latents."""
    x, rotation = exact_data(), np.linalg.qr(np.random.default_rng(4).standard_normal((4, 4)))[0]
    standard = optimal_linear_vae(x, 4, VARIANCE)
    for turned in (np.eye(4), rotation):
        turned = torch.from_numpy(turned)
        vae = linear_vae(posterior=FullCovariance).double()
        covariance = turned @ standard.encoder.log_variance.exp().diag() @ turned.T
        factor = torch.linalg.cholesky(covariance)
        rows, columns = torch.tril_indices(4, 4, -1)
        bias = torch.cat([torch.zeros(4), 2 * factor.diagonal().log(), factor[rows, columns]])
        with torch.no_grad():
            vae.encoder.mean.weight.zero_()
            vae.encoder.mean.weight[:4] = turned @ standard.encoder.mean.weight
            vae.encoder.mean.bias.copy_(bias)
            vae.decoder.map.weight.copy_(standard.decoder.map.weight @ turned.T)
            vae.decoder.map.bias.zero_()
        assert expected_loss(vae, x) == pytest.approx((8.54253, 3.27777), abs=6e-6)


# ---- fitted


class Blind(nn.Module):
    """An encoder that does not see the condition."""

    def __init__(self, shape, latent_dim, condition_dim):
        super().__init__()
        self.network = LinearEncoder(shape, latent_dim)

    def forward(self, x, c):
        return self.network(x)


def fitted(tmp_path, steps, batch_size, batch, **parts):
    torch.manual_seed(0)

    class Annealed(VAE):
        def configure_optimizers(self):
            optimizer = torch.optim.Adam(self.parameters(), 0.01)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, 1e-5)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    networks = {"encoder": LinearEncoder, "decoder": LinearDecoder, "likelihood": partial(Gaussian, variance=VARIANCE)}
    vae = Annealed((6,), latent_dim=4, **{**networks, **parts})
    tensors = {name: value.float() if value.is_floating_point() else value for name, value in batch.items()}
    loader = TensorLoader(tensors, batch_size=batch_size, shuffle=True)
    quiet_trainer(tmp_path, max_steps=steps, max_epochs=-1).fit(vae, loader)
    return vae.double()


@pytest.mark.exhaustive
def test_a_fit_with_a_learned_prior_reaches_the_optimum_of_the_standard_one(tmp_path):
    batch = {"x": exact_data(2000), "index": torch.arange(2000)}
    vae = fitted(tmp_path, 4000, 200, batch, prior=LearnedNormal)
    loss, rate = expected_loss(vae, batch)
    assert -1e-4 <= loss - 8.54253 <= 0.03
    assert rate == pytest.approx(3.27777, abs=0.1)


@pytest.mark.exhaustive
def test_a_fit_with_a_conditional_prior_needs_no_condition_in_the_encoder(tmp_path):
    rows = whitened(2000, 8) @ np.linalg.cholesky(np.diag([*SPECTRUM, 1, 0.5])).T
    residual, c = rows[:, :6] @ DIRECTIONS.T, rows[:, 6:]
    x = torch.from_numpy(residual + c @ SLOPES.T)
    batch = {"x": x, "condition": torch.from_numpy(c), "index": torch.arange(2000)}
    parts = {"condition": partial(Condition, covariates=2), "prior": ConditionalNormal, "encoder": Blind}
    loss, rate = expected_loss(fitted(tmp_path, 4000, 200, batch, **parts), batch)
    assert -1e-4 <= loss - 8.54253 <= 0.03
    assert rate == pytest.approx(3.27777, abs=0.1)


@pytest.mark.exhaustive
def test_a_fit_with_normalised_means_reaches_their_end_point(tmp_path):
    batch = {"x": exact_data(500), "index": torch.arange(500)}
    parts = {"posterior": partial(BatchNormMeans, gamma=GAMMA)}
    vae = fitted(tmp_path, 3000, 500, batch, **parts).train()  # the batch is the data, so its statistics are exact
    loss, rate = expected_loss(vae, batch)
    assert -1e-3 <= loss - 8.95411 <= 0.03
    assert rate == pytest.approx(3.40978, abs=0.05)
    with torch.no_grad():
        moments = vae.posterior.mean.var(0, correction=0)
    torch.testing.assert_close(moments, torch.full((4,), GAMMA**2).double(), rtol=1e-3, atol=0)
