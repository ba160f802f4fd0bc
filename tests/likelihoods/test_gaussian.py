import math
import pickle

import numpy as np
import pytest
import torch
from scipy.stats import norm

from lightning_vae import VAE, Gaussian, LinearDecoder, LinearEncoder
from lightning_vae.datamodules import TensorLoader
from tests.doubles import quiet_trainer


@pytest.mark.parametrize("variance", [0.25, "learned", "optimal"])
def test_gaussian_has_its_constants(variance):
    likelihood = Gaussian((2,), variance=variance)
    with torch.no_grad():
        likelihood.log_variance.fill_(math.log(0.25))
    x, output = torch.randn(5, 2), torch.randn(5, 2)
    expected = -math.log(2 * math.pi * 0.25) - (x - output).square().sum(1) / 0.5
    torch.testing.assert_close(likelihood(output).log_prob(x), expected)


def test_optimal_variance_is_the_batchs_in_training_and_a_saved_running_mean_at_evaluation():
    torch.manual_seed(0)
    likelihood = Gaussian((3,), variance="optimal")
    errors = []
    for _ in range(20):
        x, output = torch.randn(8, 3), torch.randn(8, 3)
        mse = (x - output).square().mean()
        torch.testing.assert_close(likelihood(output, x).base_dist.variance.mean(), mse)
        errors.append(mse.item())
    weights = [0.99 ** (len(errors) - 1 - i) for i in range(len(errors))]
    running = sum(w * e for w, e in zip(weights, errors, strict=True)) / sum(weights)
    assert likelihood(output).base_dist.variance[0, 0].item() == pytest.approx(running, rel=1e-5)
    assert likelihood.state_dict()["log_variance"].exp().item() == pytest.approx(running, rel=1e-5)


def test_optimal_variance_gives_the_gradient_of_the_log_of_the_error():
    x, output = torch.randn(4, 3), torch.randn(4, 3, requires_grad=True)
    loss = -Gaussian((3,), variance="optimal")(output, x).log_prob(x).sum()
    (gradient,) = torch.autograd.grad(loss, output)
    expected = 12 / 2 * (math.log(2 * math.pi) + (x - output).square().mean().log() + 1)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, output)[0])


def test_a_learned_variance_starts_at_the_datas_scale_once():
    torch.manual_seed(0)
    likelihood = Gaussian((3,), variance="learned")
    x, output = 100 * torch.randn(50, 3), torch.randn(50, 3, requires_grad=True)
    start = math.log(0.1 * (x - output).square().mean().item())
    likelihood(output)  # evaluation before training starts nothing
    likelihood(output, x).log_prob(x).sum().backward()
    assert likelihood.log_variance.item() == pytest.approx(start, rel=1e-5)
    assert likelihood.log_variance.grad is not None
    with torch.no_grad():
        likelihood.log_variance.add_(1)
    other = Gaussian((3,), variance="learned")
    other.load_state_dict(likelihood.state_dict())
    for module in (likelihood, other):
        module(output, x)
        assert module.log_variance.item() == pytest.approx(start + 1, rel=1e-5)
    pickle.loads(pickle.dumps(other))


def test_a_perfect_reconstruction_has_a_finite_density():
    x = torch.randn(4, 3)
    assert Gaussian((3,), variance="optimal")(x, x).log_prob(x).isfinite().all()


@pytest.mark.parametrize("variance", [0.0, -1.0, math.inf, "best", True, None])
def test_gaussian_refuses_other_variances(variance):
    with pytest.raises(ValueError, match="`variance` must be a positive number, 'learned', 'optimal', 'per_dimension'"):
        Gaussian((2,), variance=variance)


def test_a_variance_per_pixel_is_predicted_and_bounded():
    torch.manual_seed(0)
    likelihood = Gaussian((2, 3, 3), variance="per_pixel").double()
    assert likelihood.output_shape == (4, 3, 3)
    x, output = torch.randn(5, 2, 3, 3).double(), torch.randn(5, 4, 3, 3).double()
    with torch.no_grad():
        likelihood.log_variance.fill_(-0.5)
    mean, deviation = output[:, :2], output[:, 2:]
    normal = likelihood(output).base_dist  # type: ignore[attr-defined]
    bounded = -12 + torch.log1p((deviation - 0.5 + 12).exp()) - torch.log1p((deviation - 0.5 - 30).exp())
    torch.testing.assert_close(normal.variance.log(), bounded)
    expected = norm.logpdf(x, mean, (bounded / 2).exp()).reshape(5, -1).sum(1)
    torch.testing.assert_close(likelihood(output).log_prob(x), torch.from_numpy(expected))
    extreme = torch.full((1, 4, 3, 3), 1e4).double().requires_grad_()
    for sign in (-1, 1):
        variance = likelihood(sign * extreme).base_dist.variance  # type: ignore[attr-defined]
        assert variance.min() >= math.exp(-12) * (1 - 1e-9)
        assert variance.max() <= math.exp(30) * (1 + 1e-9)


def test_variances_of_their_own_start_at_the_datas_scale():
    torch.manual_seed(0)
    x, means = torch.tensor([1.0, 100.0]) * torch.randn(50, 2), torch.randn(50, 2)
    there = torch.rand(50, 2) < 0.7
    missing = x.where(there, torch.nan)
    squares = (x - means).square()
    each = Gaussian((2,), variance="per_dimension")
    each(means, x)
    torch.testing.assert_close(each.log_variance.exp(), 0.1 * squares.mean(0))
    each = Gaussian((2,), variance="per_dimension")
    each(means, missing, there)
    torch.testing.assert_close(each.log_variance.exp(), 0.1 * (squares * there).sum(0) / there.sum(0))
    for variance in ("learned", "per_pixel"):
        one = Gaussian((2,), variance=variance)  # type: ignore[arg-type]
        one(torch.cat([means, torch.zeros(50, 2)], 1) if variance == "per_pixel" else means, missing, there)
        torch.testing.assert_close(one.log_variance.exp(), 0.1 * squares[there].mean())
    best = Gaussian((2,), variance="optimal")(means, missing, there)
    torch.testing.assert_close(best.base_dist.variance[0, 0], squares[there].mean())  # type: ignore[attr-defined]


def test_a_dimension_that_no_observation_of_the_first_batch_has_starts_at_the_others_error():
    likelihood = Gaussian((2,), variance="per_dimension")
    x = torch.tensor([[2.0, torch.nan], [2.0, torch.nan]])
    likelihood(torch.zeros(2, 2), x, ~x.isnan())
    torch.testing.assert_close(likelihood.log_variance.exp(), torch.tensor([0.4, 0.4]))


PSI = np.array([0.2, 0.5, 0.3, 0.4, 0.8, 0.6])
LOADINGS = np.array([[1, 0], [0.8, 0.3], [0.6, -0.5], [0, 0.9], [0.2, 0.7], [-0.5, 0.4]])
MINIMUM = 7.822006  # d / 2 log 2 pi + 1 / 2 log det C + d / 2, of data whose covariance is exactly C


def factor_data():
    x = np.random.default_rng(0).standard_normal((300, 6))
    x -= x.mean(0)
    whitened = x @ np.linalg.inv(np.linalg.cholesky(x.T @ x / 300)).T
    return torch.from_numpy(whitened @ np.linalg.cholesky(LOADINGS @ LOADINGS.T + np.diag(PSI)).T)


class FactorAnalysis(VAE):
    def __init__(self):
        super().__init__(
            (6,), None, 2, LinearEncoder, LinearDecoder, lambda *given: Gaussian(*given, variance="per_dimension")
        )

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=0.03)
        steps = self.trainer.estimated_stepping_batches
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, 2 * (1 - step / steps)) ** 2)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def distortion_and_rate(vae, data):
    """Means over the data, the expectation of a quadratic function of z exactly: the mean of two points an axis."""
    posterior = vae.encode(data)
    points = [sign * 2**0.5 * torch.eye(2).double()[axis] for sign in (-1, 1) for axis in (0, 1)]
    distortions = [-vae.decode(posterior.mean + point * posterior.stddev).log_prob(data).mean() for point in points]
    return torch.stack(distortions).mean(), vae.elbo_terms(data).rate.mean()


def test_linear_networks_with_a_variance_per_dimension_are_factor_analysis():
    """At factor analysis' own parameters the loss is its negative log-likelihood, and psi is stationary."""
    # The posterior factorises in the axes in which W' Psi^-1 W is diagonal.
    eigenvalues, axes = np.linalg.eigh(LOADINGS.T @ (LOADINGS / PSI[:, None]))
    w = LOADINGS @ axes
    vae = FactorAnalysis().double()
    with torch.no_grad():
        for target, value in (
            (vae.encoder.mean.weight, (w / PSI[:, None]).T / (1 + eigenvalues)[:, None]),
            (vae.encoder.log_variance, -np.log(1 + eigenvalues)),
            (vae.decoder.map.weight, w),
            (vae.likelihood.log_variance, np.log(PSI)),
        ):
            target.copy_(torch.from_numpy(value))
        vae.encoder.mean.bias.zero_()
        vae.decoder.map.bias.zero_()
    distortion, rate = distortion_and_rate(vae, factor_data())
    assert (distortion + rate).item() == pytest.approx(MINIMUM, abs=1e-6)
    assert rate.item() == pytest.approx(0.5 * np.log1p(eigenvalues).sum(), abs=1e-9)
    (gradient,) = torch.autograd.grad(distortion, vae.likelihood.log_variance)
    torch.testing.assert_close(gradient, torch.zeros(6).double())


@pytest.mark.exhaustive
def test_a_fit_reaches_factor_analysis(tmp_path):
    torch.manual_seed(0)
    data, vae = factor_data(), FactorAnalysis()
    batches = TensorLoader({"x": data.float()}, batch_size=300)
    quiet_trainer(tmp_path, max_steps=2000).fit(vae, batches)
    with torch.no_grad():
        distortion, rate = distortion_and_rate(vae.double(), data)
    assert MINIMUM - 1e-6 < (distortion + rate).item() < MINIMUM + 0.02
    assert vae.likelihood.log_variance.exp().tolist() == pytest.approx(PSI.tolist(), abs=0.08)
