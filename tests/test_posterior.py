from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.distributions import Independent, MultivariateNormal, Normal

from lightning_vae.callbacks.posterior import PosteriorReader, as_distribution, read_prior

MEAN, SECOND = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.25, 4.0]])
FORMS: dict[str, Any] = {
    "pair": (MEAN, SECOND),
    "list": ["reconstruction", "input", MEAN, SECOND],
    "dict": {"embedding": MEAN, "log_covariance": SECOND},
    "fields": SimpleNamespace(mu=MEAN, logvar=SECOND),
    "tuple": (Normal(MEAN, SECOND), torch.zeros(1, 2)),
}


class Says(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, x):
        return self.value


class Model(LightningModule):
    posterior: Any
    prior: Any

    def __init__(self):
        super().__init__()
        self.net = nn.ModuleDict({name: Says(value) for name, value in FORMS.items()})
        self.fc_mu, self.fc_var = Says(MEAN), Says(SECOND)

    def step(self):
        for module in (*self.net.values(), self.fc_mu, self.fc_var):
            module(None)


def read(posterior, second="log_variance", model=None):
    model = model or Model()
    reader = PosteriorReader(posterior, second)
    reader.attach(model)
    model.step()
    return reader.read(model, batch=None)


@pytest.mark.parametrize(
    "posterior",
    [
        "net.pair",
        ("net.list:2", "net.list:3"),
        ["net.list:-2", "net.list:-1"],
        ("net.dict:embedding", "net.dict:log_covariance"),
        ("net.fields:mu", "net.fields:logvar"),
        ("fc_mu", "fc_var"),
        lambda pl_module, batch: (pl_module.fc_mu.value, pl_module.fc_var.value),
    ],
)
def test_every_form_of_a_mean_and_a_second_parameter(posterior):
    distribution = read(posterior)
    assert isinstance(distribution, Normal)
    assert torch.equal(distribution.mean, MEAN)
    torch.testing.assert_close(distribution.variance, SECOND.exp())


def test_a_distribution_in_a_tuple():
    assert read("net.tuple:0") is FORMS["tuple"][0]


@pytest.mark.parametrize(
    ("second", "scale"),
    [
        ("log_variance", (SECOND / 2).exp()),
        ("variance", SECOND.sqrt()),
        ("scale", SECOND),
        ("log_scale", SECOND.exp()),
    ],
)
def test_second(second, scale):
    torch.testing.assert_close(read("net.pair", second).stddev, scale)


def test_the_modules_own_posterior():
    model = Model()
    model.posterior = Independent(Normal(MEAN, SECOND), 1)
    distribution = read(None, model=model)
    assert isinstance(distribution, Normal)
    assert distribution.batch_shape == (1, 2)


def test_a_posterior_that_is_not_a_diagonal_gaussian_stays_what_it_is():
    posterior = MultivariateNormal(MEAN, torch.eye(2))
    assert as_distribution(posterior) is posterior


def test_the_prior_is_standard_normal_unless_the_module_says_otherwise():
    model = Model()
    assert float(read_prior(model).mean) == 0.0
    assert float(read_prior(model).stddev) == 1.0
    model.prior = Independent(Normal(torch.ones(2), 2 * torch.ones(2)), 1)
    prior = read_prior(model)
    assert isinstance(prior, Normal)
    assert prior.stddev.tolist() == [2.0, 2.0]


def test_the_last_posterior_is_read_once_and_hooks_are_removed():
    model = Model()
    reader = PosteriorReader("net.pair")
    reader.attach(model)
    reader.attach(model)
    assert len(model.net["pair"]._forward_hooks) == 1
    model.step()
    reader.read(model, None)
    with pytest.raises(ValueError, match=r"'net\.pair' was not called in this step"):
        reader.read(model, None)
    reader.detach()
    assert not model.net["pair"]._forward_hooks


@pytest.mark.parametrize(
    ("posterior", "message"),
    [
        ("net.pairs", "Model has no submodule 'net.pairs'. Did you mean 'net.pair'"),
        ("xyzzy", "It has 'net', 'net.pair'"),
        (("fc_mu", "fc_vr"), "Did you mean 'fc_var'"),
    ],
)
def test_a_path_that_leads_nowhere(posterior, message):
    model = Model()
    with pytest.raises(ValueError, match=message):
        PosteriorReader(posterior).attach(model)
    assert not model.fc_mu._forward_hooks


@pytest.mark.parametrize(
    ("posterior", "message"),
    [
        ("fc_mu", r"got a tensor of shape \(1, 2\)"),
        ("net.list", "a list of 4"),
        ("net.dict:mean", "a dict with the keys 'embedding', 'log_covariance', which has no 'mean'"),
        ("net.list:7", "which has no '7'"),
        ("net.fields:mean", "has no 'mean'"),
        (None, "`Model.posterior`, which does not exist"),
    ],
)
def test_an_output_that_is_no_posterior(posterior, message):
    with pytest.raises(ValueError, match=message):
        read(posterior)


@pytest.mark.parametrize("posterior", [3, ("a", "b", "c"), (1, 2), []])
def test_invalid_posterior(posterior):
    with pytest.raises(ValueError, match="`posterior` must be None, a submodule's path"):
        PosteriorReader(posterior)


def test_invalid_second():
    with pytest.raises(ValueError, match=r"`second` must be one of 'log_variance'.* got 'logvar'"):
        PosteriorReader("encoder", second="logvar")
