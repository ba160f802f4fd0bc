"""What an encoder may return."""

import functools

import pytest
import torch
from torch import distributions as td

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
