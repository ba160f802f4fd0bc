import math

import pytest
import torch
from scipy.stats import laplace, t

from lightning_vae import Laplace, StudentT


def test_the_densities_are_those_of_scipy():
    torch.manual_seed(0)
    x, output = torch.randn(5, 3).double(), torch.randn(5, 3).double()
    expected = laplace.logpdf(x, output, 0.4).sum(1)
    actual = Laplace((3,), scale=0.4).double()(output).log_prob(x)
    torch.testing.assert_close(actual, torch.from_numpy(expected), rtol=1e-6, atol=0)
    for degrees in (1.5, 2.5, 40):
        expected = t.logpdf(x, degrees, output, 0.4).sum(1)
        distribution = StudentT((3,), degrees_of_freedom=degrees, scale=0.4).double()(output)
        torch.testing.assert_close(distribution.log_prob(x), torch.from_numpy(expected), rtol=1e-6, atol=0)
        assert distribution.variance[0, 0].item() == pytest.approx(t.var(degrees, scale=0.4), rel=1e-6)


def test_the_degrees_of_freedom_are_learned_from_5_on_and_bounded():
    likelihood = StudentT((3,), scale=1.0).double()
    assert likelihood(torch.zeros(1, 3)).base_dist.df[0, 0].item() == pytest.approx(5)  # type: ignore[attr-defined]
    likelihood(torch.zeros(1, 3)).log_prob(torch.full((1, 3), 9.0)).sum().backward()
    assert likelihood.log_excess.grad is not None
    assert likelihood.log_excess.grad < 0  # an outlier asks for heavier tails
    with torch.no_grad():
        likelihood.log_excess.fill_(50)
    df = likelihood(torch.zeros(1, 3)).base_dist.df[0, 0].item()  # type: ignore[attr-defined]
    assert df == pytest.approx(1 + math.exp(7))


@pytest.mark.parametrize("make", [Laplace, StudentT])
def test_a_learned_scale_starts_at_the_first_batchs_error_once(make):
    torch.manual_seed(0)
    likelihood = make((3,))
    x, output = 100 * torch.randn(50, 3), torch.randn(50, 3)
    likelihood(output)
    assert likelihood.log_scale.item() == 0  # evaluation before training starts nothing
    there = torch.rand(50, 3) < 0.7
    start = math.sqrt(0.1) * (x - output).abs()[there].mean().item()
    for data in (x.where(there, torch.nan), 7 * x):
        likelihood(output, data, there)
        assert likelihood.log_scale.exp().item() == pytest.approx(start, rel=1e-5)
    assert make((3,)).learns_scale
    assert not make((3,), scale=1.0).learns_scale


@pytest.mark.parametrize("make", [Laplace, StudentT])
def test_a_perfect_reconstruction_has_a_finite_density(make):
    x, likelihood = torch.randn(4, 3), make((3,))
    assert likelihood(x, x).log_prob(x).isfinite().all()


@pytest.mark.parametrize("scale", [0.0, -1.0, math.inf, "best", True, None])
def test_other_scales_are_refused(scale):
    with pytest.raises(ValueError, match="`scale` must be a positive number or 'learned', got"):
        Laplace((2,), scale=scale)


@pytest.mark.parametrize("degrees", [1.0, 0.5, math.inf, "best", True, None])
def test_degrees_of_freedom_without_a_mean_are_refused(degrees):
    with pytest.raises(ValueError, match="`degrees_of_freedom` must be a number above 1 or 'learned', got"):
        StudentT((2,), degrees_of_freedom=degrees)
