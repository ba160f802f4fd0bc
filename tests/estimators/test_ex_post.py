import math

import numpy as np
import pytest
import torch
from torch import distributions as td

from lightning_vae.estimators import ExPostDensity
from tests.terms.steps import exact_data, normal

MEAN = torch.tensor([[1.0, 0], [0, 1], [-1, 1], [0, -2]]).double()
VARIANCE = torch.tensor([[0.5, 1], [0.2, 0.4], [0.3, 0.6], [1, 0.2]], dtype=torch.float64)


def rate_under(density, mean=MEAN, variance=VARIANCE):
    posterior = td.MultivariateNormal(mean, variance.diag_embed())
    return float(td.kl_divergence(posterior, density.distribution().expand((len(mean),))).mean())


def test_the_gaussian_of_the_moments_and_the_rate_under_it():
    density = ExPostDensity.of_moments(MEAN, VARIANCE)
    torch.testing.assert_close(density.means, torch.zeros(1, 2).double(), rtol=0, atol=1e-15)
    expected = torch.tensor([[[1, -0.25], [-0.25, 2.05]]], dtype=torch.float64)
    torch.testing.assert_close(density.covariances, expected, rtol=0, atol=1e-15)
    standard = ExPostDensity(torch.ones(1), torch.zeros(1, 2).double(), torch.eye(2)[None].double())
    rate = rate_under(standard)
    gain = float(td.kl_divergence(density.distribution(), standard.distribution()))
    assert (rate, gain, rate_under(density)) == pytest.approx((1.34289, 0.18156, 1.16133), abs=6e-6)
    assert rate_under(density) == pytest.approx(rate - gain, abs=1e-12)


@pytest.mark.parametrize("beta", [0.1, 1.0, 2.5])
def test_the_aggregate_of_the_linear_vae_is_the_prior_at_any_beta(beta):
    share = (1 - beta * 0.4 / torch.tensor([5, 3, 1.5, 0.8], dtype=torch.float64)).clamp(min=0)
    mean = exact_data(50, torch.eye(4)) * share.sqrt()
    density = ExPostDensity.of_moments(mean, (1 - share).expand(50, 4))
    torch.testing.assert_close(density.covariances[0], torch.eye(4).double(), rtol=0, atol=1e-14)
    if beta == 2.5:  # the last latent is unused: its mean does not vary
        with pytest.raises(ValueError, match=r"Fit samples of q\(z\), not the posterior means"):
            ExPostDensity.fit(mean)


def test_a_gaussian_of_samples_has_their_moments():
    z = normal(100, 3) @ torch.tensor([[1.0, 0, 0], [1, 2, 0], [0, 1, 3]]).double() + 5
    density = ExPostDensity.fit(z.float())
    z = z.float().double()
    torch.testing.assert_close(density.means[0], z.mean(0))
    torch.testing.assert_close(density.covariances[0], torch.as_tensor(np.cov(z.numpy().T, bias=True)))


def test_a_mixture_is_no_less_likely_than_one_gaussian_and_keeps_the_latents_scale():
    scale = torch.tensor([1.0, 1e-4])  # far below scikit-learn's own floor of a variance, 1e-6
    z = torch.cat([normal(150, 2), normal(50, 2, seed=1) * 0.5 + torch.tensor([6.0, -4.0])]) * scale
    one, two = (ExPostDensity.fit(z, components).distribution() for components in (1, 2))
    assert two.log_prob(z).mean() > one.log_prob(z).mean() + 0.5
    density = ExPostDensity.fit(z, 2, seed=3)
    small = int(density.weights.argmin())
    assert float(density.weights[small]) == pytest.approx(0.25, abs=0.01)
    assert (density.means[small] / scale).tolist() == pytest.approx([6.0, -4.0], abs=0.3)
    assert (density.covariances[small].diagonal().sqrt() / scale).tolist() == pytest.approx([0.5, 0.5], abs=0.1)


def test_it_is_saved_as_plain_tensors_and_sampled(tmp_path):
    z = torch.cat([normal(60, 2), normal(60, 2, seed=1) + 5])
    for components in (1, 3):
        density = ExPostDensity.fit(z, components)
        torch.save(vars(density), tmp_path / "density.pt")
        loaded = ExPostDensity(**torch.load(tmp_path / "density.pt", weights_only=True)).distribution()
        assert torch.equal(loaded.log_prob(z), density.distribution().log_prob(z))
        assert loaded.sample((7,)).shape == (7, 2)
        assert density.means.shape == (components, 2)


@pytest.mark.parametrize(
    ("name", "call"),
    {
        "no component": ("components", lambda: ExPostDensity.fit(MEAN, 0)),
        "a negative seed": ("seed", lambda: ExPostDensity.fit(MEAN, 2, seed=-1)),
        "one axis": ("z", lambda: ExPostDensity.fit(MEAN[0])),
        "as few latents as dimensions": ("z", lambda: ExPostDensity.fit(MEAN[:2])),
        "as few latents as components": ("z", lambda: ExPostDensity.fit(MEAN, 4)),
        "a latent that is not finite": ("z", lambda: ExPostDensity.fit(MEAN / 0)),
        "a negative variance": ("variance", lambda: ExPostDensity.of_moments(MEAN, -VARIANCE)),
    }.items(),
)
def test_refused(name, call):
    option, fit = call
    with pytest.raises(ValueError, match=f"`{option}` must"):
        fit()


def test_latents_on_a_plane_are_refused():
    z = normal(20, 2)
    for column in (z.sum(1), torch.zeros(20).double(), math.pi * z[:, 0]):
        with pytest.raises(ValueError, match="The latents lie on a plane"):
            ExPostDensity.fit(torch.cat([z, column[:, None]], dim=1))
