import pytest
import torch
from torch.distributions import (
    Categorical,
    Independent,
    Laplace,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
    OneHotCategorical,
)

from lightning_vae.callbacks.metrics.active_units import active_units
from lightning_vae.callbacks.metrics.posterior_summary import PosteriorSummary
from lightning_vae.callbacks.metrics.prior_units import marginal_densities


def test_dimensions_come_in_order_of_rate():
    mean = torch.randn(500, 4, generator=torch.Generator().manual_seed(0)) * torch.tensor([0.3, 0.9, 0.0, 0.6])
    codes = PosteriorSummary.of(Normal(mean, torch.tensor([1.0, 0.5, 0.2, 0.8])), Normal(0.0, 1.0))
    assert codes.order == [2, 1, 3, 0]  # dimension 2 has the most rate, and no information
    assert codes.active == [1, 3, 0]
    rate = 0.5 * (mean[:, 1] ** 2 + 0.25 - 1 - torch.tensor(0.25).log()).mean()
    assert codes.title(1) == f"z1  {float(rate):.2f} nats"
    alone = PosteriorSummary.of(mean, Normal(0.0, 1.0))
    assert (alone.order, alone.active, alone.title(1)) == ([1, 3, 0, 2], [1, 3, 0], "z1")
    joined = PosteriorSummary.joined([codes.rows([0, 1]), codes])
    assert joined.mean.shape == joined.scale.shape == joined.rates.shape == (502, 4)
    assert PosteriorSummary.joined([alone, alone]).rates is None


def test_the_active_dimensions_are_those_that_are_counted():
    means = torch.tensor([[0.006, 0.0], [0.206, 0.0]])  # their variance is above 0.01, and rounds to it in float32
    assert PosteriorSummary.of(means, Normal(0.0, 1.0)).active == [0]
    assert active_units(means) == 1


def test_dimensions_are_measured_in_units_of_a_gaussian_prior():
    mean, loc, scale = torch.randn(50, 3), torch.randn(50, 3), torch.rand(50, 3) + 0.5
    codes = PosteriorSummary.of(Normal(mean, 0.5), Normal(loc, scale))
    standard, standard_scale = codes.in_units_of_prior
    torch.testing.assert_close(standard, (mean - loc) / scale)
    torch.testing.assert_close(standard_scale, 0.5 / scale)
    same = PosteriorSummary.of(Normal(loc, 0.5), Normal(loc, scale))
    assert same.active == []  # the means vary, as much as the prior's


@pytest.mark.parametrize("full", [False, True])
def test_dimensions_are_measured_in_units_of_a_mixture(full):
    loc, scale = torch.tensor([[10.0, 0.0], [30.0, 0.0]]), torch.full((2, 2), 0.1)
    parts = MultivariateNormal(loc, scale_tril=scale.diag_embed()) if full else Independent(Normal(loc, scale), 1)
    mixture = MixtureSameFamily(Categorical(torch.tensor([0.75, 0.25])), parts)
    mean = torch.tensor([[15.0, 0.0], [15.0, 0.2], [15.0, 0.0]])
    codes = PosteriorSummary.of(Normal(mean, 0.1), mixture)
    unit = torch.tensor([(75 + 0.01) ** 0.5, 0.1])  # between the components the variance is 400 * 3 / 16
    torch.testing.assert_close(codes.standard, (mean - torch.tensor([15.0, 0.0])) / unit)
    torch.testing.assert_close(codes.standard_scale, (0.1 / unit).expand(3, 2))
    assert codes.active == [1]


def test_the_marginals_of_a_prior_in_its_units():
    grid, mean = torch.linspace(-4, 4, 81), torch.zeros(3, 2)
    standard = Normal(0.0, 1.0).log_prob(grid).exp()[:, None].expand(81, 2)
    for prior in (Normal(5.0, 2.0), MultivariateNormal(torch.ones(2), 4 * torch.eye(2))):
        torch.testing.assert_close(marginal_densities(prior, mean, grid), standard)
    laplace = Laplace(torch.tensor([1.0, -1.0]), torch.tensor([3.0, 0.5]))  # of standard deviation sqrt(2) b
    expected = Laplace(0.0, 0.5**0.5).log_prob(grid).exp()[:, None].expand(81, 2)
    torch.testing.assert_close(marginal_densities(laplace, mean, grid), expected)
    parts = Independent(Normal(torch.tensor([[-8.0, 0.0], [8.0, 0.0]]), torch.full((2, 2), 6.0)), 1)
    found = marginal_densities(MixtureSameFamily(Categorical(torch.ones(2)), parts), mean, grid)
    two = sum(Normal(place, 0.6).log_prob(grid).exp() / 2 for place in (-0.8, 0.8))  # in units of 10
    torch.testing.assert_close(found, torch.stack([two, standard[:, 0]], 1))
    assert marginal_densities(OneHotCategorical(torch.ones(2, 2)), mean, grid) is None


def test_of_very_many_dimensions_some_are_chosen_and_keep_their_names():
    few, many = Normal(torch.randn(5, 2), 1.0), Normal(torch.randn(5, 3, 10, 10), 1.0)
    beside = PosteriorSummary.beside(PosteriorSummary.of(each, Normal(0.0, 1.0)) for each in (few, many))
    whole = torch.cat([few.loc, many.loc.flatten(1)], dim=1)
    assert beside.mean.shape == beside.rates.shape == (5, 256)
    assert torch.equal(beside.mean, whole[:, list(beside.numbers)])
    assert beside.name(255) == f"z{beside.numbers[255]}"
    assert PosteriorSummary.joined([beside, beside]).numbers == beside.numbers
