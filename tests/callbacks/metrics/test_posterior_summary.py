import torch
from torch.distributions import Normal

from lightning_vae.callbacks.metrics.active_units import active_units
from lightning_vae.callbacks.metrics.posterior_summary import PosteriorSummary


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
