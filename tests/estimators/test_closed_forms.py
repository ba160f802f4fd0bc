import math

import pytest
import torch

from lightning_vae.estimators import gaussian_total_correlation, moment_marginal_kl


def test_moment_marginal_kl_and_total_correlation_of_gaussians():
    assert moment_marginal_kl(torch.zeros(3), torch.eye(3)) == 0
    assert moment_marginal_kl(torch.tensor([2.0, 0.0]), torch.eye(2)) == pytest.approx(2.0)
    covariance = torch.tensor([[2.0, 0.9], [0.9, 0.5]], dtype=torch.float64)
    expected = 0.5 * (2.5 - 2 - math.log(2 * 0.5 - 0.81))
    assert moment_marginal_kl(torch.zeros(2), covariance) == pytest.approx(expected)
    assert gaussian_total_correlation(covariance) == pytest.approx(-0.5 * math.log(1 - 0.81))
    assert gaussian_total_correlation(covariance.diagonal().diag()) == 0
