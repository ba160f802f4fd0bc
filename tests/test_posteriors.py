"""What an encoder may return."""

import functools
from collections import UserList

import pytest
import torch
from torch import distributions as td

from lightning_vae.posteriors import posterior_of
from tests.image_vae import LaplaceEncoder, OwnEncoder, images, small


@pytest.mark.parametrize("encoder", [None, OwnEncoder, LaplaceEncoder, functools.partial(OwnEncoder, width=4)])
def test_an_encoder_may_return_a_pair_a_tensor_or_a_distribution(encoder):
    vae = small(encoder=encoder)
    posterior = vae.encode(images(5))
    assert posterior.batch_shape == (5, 3)
    assert vae.elbo_terms(images(5)).rate_per_dimension.shape == (5, 3)
    if isinstance(posterior, td.Laplace):  # no closed form: the same sample's estimate
        terms = vae.elbo_terms(images(5), torch.arange(5))
        assert terms.rate_per_dimension.isfinite().all()


class IndependentEncoder(LaplaceEncoder):
    def forward(self, x):
        return td.Independent(super().forward(x), 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoder": lambda shape, k: OwnEncoder(shape, 1)}, r"`encoder` must give .* \(5, 3\) each.*got \(5, 1\)"),
        ({"encoder": lambda shape, k: IndependentEncoder(shape, k)}, r"`encoder` must give .* no event shape.*\(3,\)"),
    ],
)
def test_posteriors_of_another_shape_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options).elbo_terms(images(5))


@pytest.mark.parametrize(
    ("output", "got"),
    [
        ((torch.zeros(5, 3), torch.zeros(3)), r"\(5, 3\) and \(3,\)"),
        ((torch.zeros(5, 3), torch.zeros(1, 3)), r"\(5, 3\) and \(1, 3\)"),
        ((torch.zeros(5, 3), torch.zeros(5, 1)), r"\(5, 3\) and \(5, 1\)"),
        ((torch.zeros(1, 3), torch.zeros(5, 3)), r"\(1, 3\) and \(5, 3\)"),
        ((torch.zeros(5, 3),) * 3, r"\(5, 3\) and \(5, 3\) and \(5, 3\)"),
        (torch.zeros(5, 1), r"\(5, 1\)"),
        (torch.zeros(5, 5), r"\(5, 3\) and \(5, 2\)"),
        (torch.tensor(1.0), "Tensor"),
        ({"mean": 1}, "dict"),
        (None, "NoneType"),
    ],
)
def test_parameters_that_would_be_shared_are_refused(output, got):
    with pytest.raises(ValueError, match=rf"`encoder` must give .* \(5, 3\) each.*got {got}\."):
        posterior_of(output, 5, 3)


def test_any_sequence_is_a_pair():
    posterior = posterior_of(UserList([torch.ones(5, 3), torch.zeros(5, 3)]), 5, 3)
    assert torch.equal(posterior.mean, torch.ones(5, 3))
