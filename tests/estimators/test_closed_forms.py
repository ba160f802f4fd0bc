import math

import pytest
import torch

from lightning_vae.datamodules import linear_vae_optimum
from lightning_vae.estimators import gaussian_total_correlation, shannon_distortion


def test_total_correlation_of_a_gaussian():
    covariance = torch.tensor([[2.0, 0.9], [0.9, 0.5]], dtype=torch.float64)
    assert gaussian_total_correlation(covariance) == pytest.approx(-0.5 * math.log(1 - 0.81))
    assert gaussian_total_correlation(covariance.diagonal().diag()) == 0


@pytest.mark.parametrize("beta", [0.1, 0.5, 1, 4, 9, 20])
def test_shannons_curve_is_where_the_optimal_linear_vaes_are(beta):
    eigenvalues = (0.1, 5.0, 3.0, 0.8, 1.5, 0.3)
    optimum = linear_vae_optimum(eigenvalues, latent_dim=6, variance=0.4, beta=beta)
    assert shannon_distortion(eigenvalues, 0.4, optimum.rate) == pytest.approx(optimum.distortion, abs=1e-9)
    narrow = linear_vae_optimum(eigenvalues, latent_dim=1, variance=0.4, beta=beta)
    if beta < 1:
        assert shannon_distortion(eigenvalues, 0.4, narrow.rate) < narrow.distortion - 0.1


def test_shannons_curve_refuses_a_negative_rate():
    with pytest.raises(ValueError, match="`rate` must be at least 0"):
        shannon_distortion([1.0], 1.0, -0.1)
