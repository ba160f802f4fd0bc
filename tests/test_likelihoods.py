import ast
import functools
import math
import pickle

import pytest
import torch
from torch import distributions as td

from lightning_vae import Bernoulli, ContinuousBernoulli, DiscretisedLogistic, Gaussian, Likelihood
from lightning_vae.likelihoods import default_likelihood
from tests.processes import in_two_processes


def test_bernoulli_is_normalised():
    likelihood = Bernoulli((3,))
    output = torch.randn(2, 3)
    states = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 3)
    total = sum(likelihood(output).log_prob(state.expand(2, 3)).exp() for state in states)
    torch.testing.assert_close(total, torch.ones(2))


def test_bernoulli_agrees_with_torchs_own():
    output = torch.randn(2, 1, 3, 4).requires_grad_()
    distribution = Bernoulli((1, 3, 4))(output)
    expected = td.Independent(td.Bernoulli(logits=output), 3)
    for x in (torch.randn(2, 1, 3, 4), torch.randn(5, 2, 1, 3, 4), torch.randn(3, 4)):  # also several, or one for all
        pair = [each.log_prob((x > 0).float()) for each in (distribution, expected)]
        assert torch.equal(*pair)
        assert torch.equal(*(torch.autograd.grad(each.sum(), output)[0] for each in pair))
    assert distribution.expand((7, 2)).log_prob((x > 0).float()).shape == (7, 2)


@pytest.mark.parametrize("levels", [2, 17, 256])
@pytest.mark.parametrize("location", [-0.4, 0.0, 0.31, 1.0, 3.0])
@pytest.mark.parametrize("log_scale", [-9.0, -3.0, 2.0])
def test_discretised_logistic_is_normalised_over_its_levels(levels, location, log_scale):
    likelihood = DiscretisedLogistic((1, 1, 1), levels)
    torch.nn.init.constant_(likelihood.log_scale, log_scale)
    values = (torch.arange(levels) / (levels - 1)).view(-1, 1, 1, 1)
    log_prob = likelihood(torch.full((levels, 1, 1, 1), location)).log_prob(values)
    assert log_prob.isfinite().all()
    assert log_prob.double().exp().sum().item() == pytest.approx(1, abs=1e-4)


def test_discretised_logistic_equals_a_difference_of_cdfs():
    likelihood = DiscretisedLogistic((1, 1, 1), 256).double()
    location, value = torch.tensor(0.4).double(), torch.tensor(97 / 255).double()
    scale = likelihood.log_scale.exp().squeeze()
    expected = torch.sigmoid((value - location + 0.5 / 255) / scale) - torch.sigmoid(
        (value - location - 0.5 / 255) / scale
    )
    actual = likelihood(location.view(1, 1, 1, 1)).log_prob(value.view(1, 1, 1, 1))
    torch.testing.assert_close(actual.squeeze(), expected.log(), rtol=1e-9, atol=0)


def test_discretised_logistic_samples_its_levels():
    torch.manual_seed(0)
    likelihood = DiscretisedLogistic((1, 1, 1), 5)
    distribution = likelihood(torch.full((1, 1, 1, 1), 0.3))
    draws = distribution.base_dist.sample((20_000,)).flatten()  # type: ignore[attr-defined]
    for level in range(5):
        value = torch.full((1, 1, 1, 1), level / 4)
        expected = distribution.log_prob(value).exp().item()
        assert (draws == level / 4).float().mean().item() == pytest.approx(expected, abs=0.01)


def test_continuous_bernoulli_is_normalised():
    grid = torch.linspace(0, 1, 10_001).view(-1, 1)
    for logit in (-5.0, 0.0, 1e-4, 3.0):
        density = ContinuousBernoulli((1,))(torch.full((10_001, 1), logit)).log_prob(grid).exp()
        assert torch.trapezoid(density, grid.flatten()).item() == pytest.approx(1, abs=1e-3)


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


def _share(rank, folder):
    x, output = errors()
    part = slice(0, 30) if rank == 0 else slice(30, 37)
    variances = [
        Gaussian((3,), variance=variance)(output[part], x[part]).base_dist.variance[0, 0].item()  # type: ignore[attr-defined]
        for variance in ("optimal", "learned")
    ]
    bernoulli = Bernoulli((3,), start_at_mean=True)
    bernoulli(output[part], (x[part] > 0).float())
    (folder / f"{rank}.txt").write_text(repr([*variances, *bernoulli.offset.tolist()]))


def errors():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(37, 3, generator=generator), torch.randn(37, 3, generator=generator)


def test_what_starts_from_a_batch_starts_from_the_global_one(tmp_path):
    in_two_processes(_share, tmp_path)
    x, output = errors()
    mse = (x - output).square().mean().item()
    on = (x > 0).sum(dim=0)
    expected = [mse, 0.1 * mse, *((on + 0.5) / (37 - on + 0.5)).log().tolist()]
    for rank in range(2):
        assert ast.literal_eval((tmp_path / f"{rank}.txt").read_text()) == pytest.approx(expected, rel=1e-5)


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


def test_a_bernoulli_starts_at_the_first_batchs_mean_once():
    likelihood = Bernoulli((1, 1, 3), start_at_mean=True)
    x = torch.tensor([[1.0, 0.0, 1.0], [1.0, 0.0, 0.0], [1.0, 0.0, 1.0]]).view(3, 1, 1, 3)
    output = torch.zeros(3, 1, 1, 3)
    torch.testing.assert_close(likelihood(output).mean, torch.full_like(x, 0.5))  # evaluation starts nothing
    expected = torch.tensor([3.5 / 4, 0.5 / 4, 2.5 / 4]).expand_as(x)
    torch.testing.assert_close(likelihood(output, x).mean, expected)
    other = Bernoulli((1, 1, 3), start_at_mean=True)
    other.load_state_dict(likelihood.state_dict())
    for module in (likelihood, other):
        torch.testing.assert_close(module(output, 1 - x).mean, expected)  # a later batch moves nothing
    assert not Bernoulli((1, 1, 3)).state_dict()


def test_a_perfect_reconstruction_has_a_finite_density():
    x = torch.randn(4, 3)
    assert Gaussian((3,), variance="optimal")(x, x).log_prob(x).isfinite().all()


@pytest.mark.parametrize("variance", [0.0, -1.0, math.inf, "best", True, None])
def test_gaussian_refuses_other_variances(variance):
    with pytest.raises(ValueError, match="`variance` must be a positive number, 'learned' or 'optimal'"):
        Gaussian((2,), variance=variance)


def test_binarisation_is_fresh_in_training_and_fixed_at_evaluation():
    torch.manual_seed(0)
    likelihood, x = Bernoulli((1, 4, 4)), torch.full((300, 1, 4, 4), 0.3)
    index = torch.arange(300)
    fixed = likelihood.observe(x, index)
    assert torch.equal(likelihood.observe(x, index), fixed)
    assert torch.equal(likelihood.observe(x[:7], index[:7]), fixed[:7])
    assert not torch.equal(Bernoulli((1, 4, 4), seed=1).observe(x, index), fixed)
    assert not torch.equal(likelihood.observe(x, None), likelihood.observe(x, None))
    for draw in (fixed, likelihood.observe(x, None)):
        assert set(draw.unique().tolist()) == {0.0, 1.0}
        assert draw.mean().item() == pytest.approx(0.3, abs=0.03)
    black_and_white = torch.tensor([0.0, 1.0]).view(1, 1, 1, 2).expand(300, 1, 4, 2).repeat(1, 1, 1, 2)
    assert torch.equal(likelihood.observe(black_and_white, None), black_and_white)


@pytest.mark.parametrize(
    ("shape", "expected"), [((1, 28, 28), Bernoulli), ((3, 32, 32), DiscretisedLogistic), ((6,), Gaussian)]
)
def test_default_goes_by_the_data(shape, expected):
    likelihood = default_likelihood(shape)
    assert type(likelihood) is expected
    if isinstance(likelihood, Gaussian):
        assert likelihood.variance == "learned"


@pytest.mark.parametrize("likelihood", [Bernoulli, ContinuousBernoulli, DiscretisedLogistic, Gaussian])
def test_every_likelihood_is_a_distribution_over_observations(likelihood):
    module: Likelihood = likelihood((3, 4, 5), 256)
    distribution = module(torch.randn(2, 3, 4, 5))
    assert isinstance(distribution, td.Distribution)
    assert (distribution.batch_shape, distribution.event_shape) == ((2,), (3, 4, 5))
    assert distribution.mean.shape == (2, 3, 4, 5)
    assert distribution.log_prob(torch.zeros(2, 3, 4, 5)).shape == (2,)


@pytest.mark.parametrize(
    "make", [lambda: Gaussian((2,)), lambda: DiscretisedLogistic((2,)), lambda: Gaussian((2,), variance="optimal")]
)
def test_scales_stay_in_float32_under_half_precision(make):
    likelihood = make().to(torch.bfloat16)
    assert {tensor.dtype for tensor in likelihood.state_dict().values()} == {torch.float32}


@pytest.mark.parametrize("make", [Bernoulli, ContinuousBernoulli, Gaussian, DiscretisedLogistic])
@pytest.mark.parametrize("shape", [(5, 4, 4), (5, 3, 4, 4), (4, 4, 1), (4,), ()])
def test_values_of_another_shape_have_no_density(make, shape):
    likelihood = make((1, 4, 4))(torch.zeros(5, 1, 4, 4))
    assert likelihood.log_prob(torch.zeros(5, 1, 4, 4)).shape == (5,)
    with pytest.raises(ValueError, match=r"`value` must end with the shape \(1, 4, 4\) of one observation, got shape"):
        likelihood.log_prob(torch.zeros(shape))


STARTERS = [
    (functools.partial(Gaussian, (3,), variance="learned"), "log_variance"),
    (functools.partial(Bernoulli, (3,), start_at_mean=True), "offset"),
]


@pytest.mark.parametrize(("make", "name"), STARTERS)
def test_loading_is_no_start(make, name):
    """Case `partial_load_collapses`: after part of a checkpoint, or one without a batch, the data set the start."""
    x, output = torch.full((10, 3), 0.3), torch.zeros(10, 3)
    right = make()
    right(output, x)
    fresh = make().state_dict()
    for state in ({}, fresh):
        part = make()
        part.load_state_dict(state, strict=False)
        part(output, x)
        assert torch.equal(getattr(part, name), getattr(right, name))
    again = make()
    again.load_state_dict(right.state_dict())
    again.load_state_dict({}, strict=False)
    again(output, 1 - 0.1 * x)
    assert torch.equal(getattr(again, name), getattr(right, name))
    again.load_state_dict(fresh)
    again(output, x)
    assert torch.equal(getattr(again, name), getattr(right, name))


@pytest.mark.parametrize(("make", "name"), STARTERS)
def test_a_value_that_is_set_by_hand_is_kept(make, name):
    likelihood = make()
    with torch.no_grad():
        getattr(likelihood, name).fill_(-3.0)
    likelihood(torch.zeros(10, 3), torch.ones(10, 3))
    assert (getattr(likelihood, name) == -3.0).all()
