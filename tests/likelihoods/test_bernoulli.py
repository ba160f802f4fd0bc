import pytest
import torch
from torch import distributions as td

from lightning_vae import Bernoulli, ContinuousBernoulli


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


def test_continuous_bernoulli_is_normalised():
    grid = torch.linspace(0, 1, 10_001).view(-1, 1)
    for logit in (-5.0, 0.0, 1e-4, 3.0):
        density = ContinuousBernoulli((1,))(torch.full((10_001, 1), logit)).log_prob(grid).exp()
        assert torch.trapezoid(density, grid.flatten()).item() == pytest.approx(1, abs=1e-3)


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


def test_the_start_at_the_mean_leaves_missing_pixels_out():
    likelihood = Bernoulli((2,), start_at_mean=True)
    x = torch.tensor([[1.0, torch.nan], [1.0, torch.nan], [torch.nan, torch.nan]])
    likelihood(torch.zeros(3, 2), x, ~x.isnan())
    torch.testing.assert_close(likelihood(torch.zeros(1, 2)).mean, torch.tensor([[2.5 / 3, 0.5]]))
