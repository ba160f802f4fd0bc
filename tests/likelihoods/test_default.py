import pytest

from lightning_vae import Bernoulli, DiscretisedLogistic, Gaussian
from lightning_vae.likelihoods import default_likelihood


@pytest.mark.parametrize(
    ("shape", "expected"), [((1, 28, 28), Bernoulli), ((3, 32, 32), DiscretisedLogistic), ((6,), Gaussian)]
)
def test_default_goes_by_the_data(shape, expected):
    likelihood = default_likelihood(shape)
    assert type(likelihood) is expected
    if isinstance(likelihood, Gaussian):
        assert likelihood.variance == "learned"
