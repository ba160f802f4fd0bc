import math

import pytest
import torch
from torch import distributions as td

from lightning_vae.terms import DIP, dip_penalty
from tests.terms.steps import exact_data, normal, step_of

MEAN = torch.tensor([[1.0, 0], [0, 1], [-1, 1], [0, -2]]).double()
VARIANCE = torch.tensor([[0.5, 1], [0.2, 0.4], [0.3, 0.6], [1, 0.2]], dtype=torch.float64)
NORMAL = td.Normal(MEAN, VARIANCE.sqrt())
# The standard linear problem: eigenvalues of the data, the latents' share of them, and the variance of the likelihood.
EIGENVALUES, LATENTS, NOISE = torch.tensor([5, 3, 1.5, 0.8, 0.3, 0.1], dtype=torch.float64), 4, 0.4


@pytest.mark.parametrize(("variant", "expected"), [("I", 2.75), ("II", 5.7625)])
def test_values(variant, expected):
    term = DIP(variant=variant, off_diagonal=2.0, diagonal=5.0)
    joint = td.MultivariateNormal(MEAN, VARIANCE.diag_embed())
    for posterior in (NORMAL, td.Independent(NORMAL, 1), joint):
        value = term(step_of(posterior, MEAN))
        assert float(value) == pytest.approx(expected, abs=1e-12)
        assert value.dtype == torch.float64


def test_the_covariance_of_a_full_posterior_counts():
    joint = td.MultivariateNormal(torch.zeros(2, 2), torch.tensor([[2.0, 0.5], [0.5, 1.0]]))
    assert float(DIP()(step_of(joint, joint.mean))) == pytest.approx(2 * 0.5**2 + 1)


def test_the_term_is_0_at_the_optimum_of_the_linear_vae_at_any_beta():
    for beta in (0.1, 1.0, 2.5):
        share = (1 - beta * NOISE / EIGENVALUES[:LATENTS]).clamp(min=0)
        posterior = td.Normal(exact_data(50, torch.eye(LATENTS)) * share.sqrt(), (1 - share).sqrt().expand(50, -1))
        assert float(DIP()(step_of(posterior, posterior.loc))) == pytest.approx(0, abs=1e-25)


def linear_loss(term, x):
    """Minimise the exact loss of a linear VAE with a term, from near the optimum without: E over z is analytic."""
    decoder, encoder = (torch.eye(6, LATENTS).double() + 0.1 * normal(6, LATENTS, seed=seed) for seed in (0, 1))
    log_variance = torch.full((LATENTS,), -1.0).double()
    parameters = [each.requires_grad_() for each in (decoder, encoder, log_variance)]
    optimizer = torch.optim.LBFGS(parameters, max_iter=150, tolerance_change=1e-9, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        posterior = td.Normal(x @ encoder, (0.5 * log_variance).exp().expand(len(x), -1))
        squared_error = (x - posterior.loc @ decoder.T).square().sum(1).mean()
        squared_error = squared_error + (decoder.square() @ log_variance.exp()).sum()
        distortion = 3 * math.log(2 * math.pi * NOISE) + squared_error / (2 * NOISE)
        rate = td.kl_divergence(posterior, td.Normal(0.0, 1.0)).sum(1).mean()
        total = distortion + rate + term.weight * term(step_of(posterior, posterior.loc))
        total.backward()
        return total

    optimizer.step(loss)
    return float(loss().detach())


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("variant", "weight", "expected"),
    [("I", 1.0, 8.63244), ("I", 10.0, 8.65244), ("II", 1.0, 8.54253), ("II", 10.0, 8.54253)],
)
def test_the_end_points_of_the_linear_vae(variant, weight, expected):
    """Variant II leaves the optimum where it was, for any weight; variant I moves it."""
    x = exact_data(12, torch.diag(EIGENVALUES))
    assert linear_loss(DIP(weight, variant), x) == pytest.approx(expected, abs=1e-4)


def test_what_makes_no_sense():
    with pytest.raises(ValueError, match="`variant` must be 'I' or 'II', got 'III'"):
        DIP(variant="III")
    with pytest.raises(ValueError, match="`off_diagonal` must be a finite number of at least 0, got -1"):
        DIP(off_diagonal=-1.0)
    laplace = td.Laplace(MEAN, 1.0)
    with pytest.raises(ValueError, match=r"`DIP` needs .* Gaussian .* got Laplace of batch shape \(4, 2\)"):
        DIP()(step_of(laplace, MEAN))
    with pytest.raises(ValueError, match=r"`DIP` compares .* at least 2, got 1"):
        DIP()(step_of(td.Normal(MEAN[:1], 1.0), MEAN[:1]))
    with pytest.raises(ValueError, match=r"`covariance` must have shape \(k, k\), got \(2, 3\)"):
        dip_penalty(torch.zeros(2, 3))
