from collections import OrderedDict
from types import SimpleNamespace

import pytest
import torch
from torch.distributions import Independent, Laplace, MultivariateNormal, Normal, OneHotCategorical

from lightning_vae.callbacks.reading.distributions import as_distribution, standard_prior

MEAN, SECOND = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.25, 4.0]])


def test_a_posterior_that_is_not_a_diagonal_gaussian_stays_what_it_is():
    posterior = MultivariateNormal(MEAN, torch.eye(2))
    assert as_distribution(posterior) is posterior


def test_independent_is_taken_off():
    assert isinstance(as_distribution(Independent(Laplace(MEAN, SECOND), 1)), Laplace)


def test_the_prior_of_a_module_without_one():
    assert (standard_prior(Normal(MEAN, SECOND)).mean, standard_prior(Normal(MEAN, SECOND)).stddev) == (0, 1)
    uniform = standard_prior(OneHotCategorical(torch.rand(5, 2, 4)))
    torch.testing.assert_close(uniform.probs, torch.full((5, 2, 4), 0.25))
    assert standard_prior(Laplace(MEAN, SECOND)) is None


class LatentDist:
    """As diffusers' ``DiagonalGaussianDistribution``."""

    def __init__(self, mean, logvar):
        self.parameters, self.mean, self.logvar = torch.cat([mean, logvar], dim=1), mean, logvar
        self.std, self.var = torch.exp(0.5 * logvar), torch.exp(logvar)


@pytest.mark.parametrize(
    "value",
    [
        LatentDist(MEAN, SECOND.log()),
        SimpleNamespace(latent_dist=LatentDist(MEAN, SECOND.log())),
        OrderedDict(latent_dist=LatentDist(MEAN, SECOND.log())),
        {"mu": MEAN, "logvar": SECOND.log(), "z": MEAN},
        SimpleNamespace(loc=MEAN, scale=SECOND.sqrt()),
        SimpleNamespace(mean=MEAN, var=SECOND),
        SimpleNamespace(mean=MEAN, log_std=0.5 * SECOND.log()),
        {"dist": Independent(Normal(MEAN, SECOND.sqrt()), 1)},
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("second", ["log_variance", "variance"])  # where a field has a name, the name decides
def test_an_object_that_describes_a_gaussian_is_read_as_it_is(value, second):
    read = as_distribution(value, second)
    torch.testing.assert_close(read.mean, MEAN)
    torch.testing.assert_close(read.scale, SECOND.sqrt())


@pytest.mark.parametrize(
    ("raw", "second"),
    [
        (torch.tensor([[0.3, -1.0]]), lambda raw: torch.nn.functional.softplus(raw) + 1e-4),
        (torch.tensor([[0.3, -1.0]]), lambda raw: raw.square()),
        (torch.tensor([[0.3, -40.0]]), lambda raw: (0.5 * raw.clamp(-20, 2)).exp()),
    ],
)
def test_any_parametrisation_of_a_scale(raw, second):
    torch.testing.assert_close(as_distribution((MEAN, raw), second, check=True).scale, second(raw))


def test_a_function_that_gives_no_scale_is_refused():
    with pytest.raises(ValueError, match="second parameter must be positive, got values down to -1"):
        as_distribution((MEAN, -SECOND.clamp(max=1)), lambda raw: raw, check=True)


@pytest.mark.parametrize(
    ("value", "chunk", "message"),
    [
        (torch.zeros(3, 5), 1, r"`chunk=1` must be an axis of even size.* got a tensor of shape \(3, 5\)"),
        (torch.zeros(3, 0), 1, "must be an axis of even size"),
        (torch.zeros(3, 4), 2, r"`chunk=2` must be an axis after the first.*\(3, 4\)"),
        (torch.zeros(4, 4), -2, "`chunk=-2` must be an axis after the first"),
        (torch.zeros(4), 1, "must be an axis after the first"),
        ((MEAN, SECOND), 1, r"`chunk=1` splits one tensor into mean and log_variance, got a tuple of 2"),
        (Normal(MEAN, SECOND), 1, "splits one tensor into mean and log_variance, got a Normal"),
        (torch.zeros(3, 4), None, r"got a tensor of shape \(3, 4\).*`chunk=1`"),
    ],
)
def test_what_can_not_be_split(value, chunk, message):
    with pytest.raises(ValueError, match=message):
        as_distribution(value, chunk=chunk)


def test_all_observations_may_share_a_second_parameter():
    shared = torch.tensor([0.0, 1.0])
    assert as_distribution((torch.zeros(5, 2), shared)).scale.shape == (5, 2)
