import warnings
from functools import partial

import pytest

from lightning_vae import VAE, Columns, DiscretisedLogisticMixture, Gaussian, Laplace, Poisson
from lightning_vae.likelihoods import warn_of_feedback

EACH = [
    partial(Gaussian, variance="per_dimension"),
    partial(Gaussian, variance="per_pixel"),
    partial(Columns, kinds=["numeric", 3]),
]
ONE = [Gaussian, partial(Gaussian, variance="optimal"), Laplace, DiscretisedLogisticMixture]


@pytest.mark.parametrize("make", EACH)
def test_below_1_a_scale_for_each_number_has_no_minimum(make):
    with pytest.warns(UserWarning, match="`beta` is 0.5 with a likelihood that learns a scale for each number.*no min"):
        VAE((2,), None, 2, likelihood=make, beta=0.5)
    with pytest.warns(UserWarning, match="the two form a feedback loop"):
        VAE((2,), None, 2, likelihood=make, beta=2)


@pytest.mark.parametrize("make", ONE)
def test_one_scale_feeds_back_on_either_side(make):
    for beta in (0.5, 2):
        with pytest.warns(UserWarning, match="the two form a feedback loop"):
            warn_of_feedback(beta, make((2,)))


@pytest.mark.parametrize(
    ("beta", "make"), [(1, each) for each in (*EACH, *ONE)] + [(0.5, partial(Gaussian, variance=0.5)), (0.5, Poisson)]
)
def test_what_does_not_run_away_is_not_warned_of(beta, make):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_feedback(beta, make((2,)))
