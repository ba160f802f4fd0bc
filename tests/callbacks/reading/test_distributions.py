import pytest
import torch
from lightning.pytorch import LightningModule
from torch.distributions import Independent, Laplace, MultivariateNormal, Normal

from lightning_vae.callbacks.reading.distributions import as_distribution, read_prior

MEAN, SECOND = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.25, 4.0]])


def test_a_posterior_that_is_not_a_diagonal_gaussian_stays_what_it_is():
    posterior = MultivariateNormal(MEAN, torch.eye(2))
    assert as_distribution(posterior) is posterior


def test_independent_is_taken_off():
    assert isinstance(as_distribution(Independent(Laplace(MEAN, SECOND), 1)), Laplace)


def test_the_prior_is_standard_normal_unless_the_module_says_otherwise():
    model = LightningModule()
    assert float(read_prior(model).mean) == 0.0
    assert float(read_prior(model).stddev) == 1.0
    model.prior = Independent(Normal(torch.ones(2), 2 * torch.ones(2)), 1)
    prior = read_prior(model)
    assert isinstance(prior, Normal)
    assert prior.stddev.tolist() == [2.0, 2.0]


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
