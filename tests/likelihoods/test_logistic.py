import math

import pytest
import torch
from scipy.stats import logistic

from lightning_vae import DiscretisedLogistic, DiscretisedLogisticMixture


@pytest.mark.parametrize("levels", [2, 17, 256])
@pytest.mark.parametrize("location", [-0.4, 0.0, 0.31, 1.0, 3.0])
@pytest.mark.parametrize("log_scale", [-9.0, -3.0, 2.0])
def test_discretised_logistic_is_normalised_over_its_levels(levels, location, log_scale):
    likelihood = DiscretisedLogistic((1, 1, 1), levels)
    torch.nn.init.constant_(likelihood.log_scale, log_scale)
    values = (torch.arange(levels) / (levels - 1)).view(-1, 1, 1, 1)
    log_prob = likelihood(torch.full((levels, 1, 1, 1), location)).log_prob(values)
    assert log_prob.isfinite().all()
    assert log_prob.double().exp().sum().item() == pytest.approx(1, abs=1e-4)


def test_discretised_logistic_equals_a_difference_of_cdfs():
    likelihood = DiscretisedLogistic((1, 1, 1), 256).double()
    location, value = torch.tensor(0.4).double(), torch.tensor(97 / 255).double()
    scale = likelihood.log_scale.exp().squeeze()
    expected = torch.sigmoid((value - location + 0.5 / 255) / scale) - torch.sigmoid(
        (value - location - 0.5 / 255) / scale
    )
    actual = likelihood(location.view(1, 1, 1, 1)).log_prob(value.view(1, 1, 1, 1))
    torch.testing.assert_close(actual.squeeze(), expected.log(), rtol=1e-9, atol=0)


def test_discretised_logistic_samples_its_levels():
    torch.manual_seed(0)
    likelihood = DiscretisedLogistic((1, 1, 1), 5)
    distribution = likelihood(torch.full((1, 1, 1, 1), 0.3))
    draws = distribution.base_dist.sample((20_000,)).flatten()  # type: ignore[attr-defined]
    for level in range(5):
        value = torch.full((1, 1, 1, 1), level / 4)
        expected = distribution.log_prob(value).exp().item()
        assert (draws == level / 4).float().mean().item() == pytest.approx(expected, abs=0.01)


def test_a_mixture_is_one_of_differences_of_cdfs():
    torch.manual_seed(0)
    likelihood = DiscretisedLogisticMixture((2, 3, 1), 17, components=4).double()
    assert likelihood.output_shape == (24, 3, 1)
    output = torch.randn(5, 24, 3, 1).double()
    logits, loc, log_scale = output.view(5, 3, 4, 2, 3, 1).unbind(1)
    raised = log_scale + math.log(0.1)
    scale = (-7 + torch.log1p((raised + 7).exp()) - torch.log1p((raised - 3).exp())).exp()
    centre = loc + torch.tensor([0.125, 0.375, 0.625, 0.875]).view(4, 1, 1, 1)
    value = (torch.randint(0, 17, (5, 2, 3, 1)) / 16).double()
    upper = torch.where(value == 1, torch.inf, value + 0.5 / 16)[:, None]
    lower = torch.where(value == 0, -torch.inf, value - 0.5 / 16)[:, None]
    mass = torch.from_numpy(logistic.cdf(upper, centre, scale) - logistic.cdf(lower, centre, scale))
    expected = (logits.softmax(1) * mass).sum(1).log().flatten(1).sum(1)
    torch.testing.assert_close(likelihood(output).log_prob(value), expected)
    mean = (logits.softmax(1) * centre.clamp(0, 1)).sum(1)
    torch.testing.assert_close(likelihood(output).mean, mean)


def test_an_output_of_zero_spreads_the_components_over_the_data():
    likelihood = DiscretisedLogisticMixture((1,), 256, components=2)
    components = likelihood(torch.zeros(1, 6)).base_dist.component_distribution  # type: ignore[attr-defined]
    torch.testing.assert_close(components.loc, torch.tensor([[[0.25, 0.75]]]))


@pytest.mark.parametrize("components", [0, 1.5, True])
def test_a_mixture_has_components(components):
    with pytest.raises(ValueError, match="`components` must be an integer of at least 1, got"):
        DiscretisedLogisticMixture((1,), 256, components=components)
