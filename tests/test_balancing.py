import re
from pathlib import Path

import pytest
import torch
from torch import distributions as td
from torch.utils.data import DataLoader

from lightning_vae import free_bits, kl_balance, world_model_kl
from tests.doubles import quiet_trainer

GUIDE = Path(__file__).parents[1] / "docs" / "guides" / "free_bits.md"


def normal(*shape, seed=0):
    """Numbers to differentiate by: always the same, in float64."""
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.requires_grad_()


# Distributions of two tensors of shape (4, 3, 5), whose gradients are those of these tensors.
FAMILIES = {
    "Normal": lambda one, other: td.Normal(one, other.exp()),
    "Normal in Independent": lambda one, other: td.Independent(td.Normal(one, other.exp()), 1),
    "logits": lambda one, other: td.OneHotCategorical(logits=one * other),
    "straight through, in Independent": lambda one, other: td.Independent(
        td.OneHotCategoricalStraightThrough(probs=(one * other).softmax(-1)), 1
    ),
    "MultivariateNormal": lambda one, other: td.MultivariateNormal(one, torch.diag_embed(other.exp())),
}


def gradients(kl, parameters):
    return torch.autograd.grad(kl.sum(), parameters, retain_graph=True)


@pytest.mark.parametrize("alpha", [0.8, 0.5, 0.1])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_value_is_the_kl_and_each_side_gets_its_share_of_the_gradient(family, alpha):
    ours, theirs = [normal(4, 3, 5, seed=seed) for seed in (0, 1)], [normal(4, 3, 5, seed=seed) for seed in (2, 3)]
    make = FAMILIES[family]
    plain = td.kl_divergence(make(*ours), make(*theirs))
    balanced = kl_balance(make(*ours), make(*theirs), alpha)
    # The formula for full covariances is not torch's, which can't be compiled.
    torch.testing.assert_close(balanced, plain, rtol=1e-13 if family == "MultivariateNormal" else 0, atol=0)
    expected = zip((1 - alpha, 1 - alpha, alpha, alpha), gradients(plain, ours + theirs), strict=True)
    for gradient, (share, whole) in zip(gradients(balanced, ours + theirs), expected, strict=True):
        torch.testing.assert_close(gradient, share * whole, rtol=1e-13, atol=1e-15)


def test_the_shares_are_exact_to_the_last_bit():
    ours, theirs = (normal(7, 5), normal(7, 5, seed=1).exp()), (normal(7, 5, seed=2), normal(7, 5, seed=3).exp())
    parameters = [*ours, *theirs]
    plain = gradients(td.kl_divergence(td.Normal(*ours), td.Normal(*theirs)), parameters)
    posterior, prior = td.Normal(*ours), td.Normal(*theirs)
    for share, gradient in enumerate(gradients(kl_balance(posterior, prior, 0.8), parameters)):
        assert torch.equal(gradient, (0.8 if share >= 2 else 1 - 0.8) * plain[share])
    wrapped = td.Independent(posterior, 1), td.Independent(prior, 1)
    weighted = world_model_kl(*wrapped, dynamics=0.7, representation=0.3, free_nats=0.1)
    for share, gradient in enumerate(gradients(weighted, parameters)):
        assert torch.equal(gradient, (0.7 if share >= 2 else 0.3) * plain[share])


def test_balancing_equals_two_kls_with_stopped_gradients_where_both_sides_share_parameters():
    """In a world model both sides see the same recurrent state."""
    shared, own = normal(4, 3, 5), normal(4, 3, 5, seed=1)

    def categorical(logits, stop):
        return td.OneHotCategorical(logits=logits.detach() if stop else logits)

    def kl(stop_posterior, stop_prior):
        return td.kl_divergence(categorical(shared + own, stop_posterior), categorical(shared.sin(), stop_prior))

    stopped = 0.8 * kl(True, False) + 0.2 * kl(False, True)
    balanced = kl_balance(categorical(shared + own, False), categorical(shared.sin(), False))
    torch.testing.assert_close(balanced, stopped, rtol=1e-13, atol=0)
    for ours, theirs in zip(gradients(balanced, [shared, own]), gradients(stopped, [shared, own]), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-15)


def test_a_distribution_that_has_computed_its_probabilities_before():
    ours, theirs = normal(4, 3, 5), normal(4, 3, 5, seed=1)
    posterior, prior = td.OneHotCategorical(logits=ours), td.OneHotCategorical(logits=theirs)
    plain = gradients(td.kl_divergence(posterior, prior), [ours, theirs])
    assert posterior.probs.requires_grad
    balanced = gradients(kl_balance(posterior, prior, 0.75), [ours, theirs])
    torch.testing.assert_close(balanced, (0.25 * plain[0], 0.75 * plain[1]), rtol=1e-13, atol=1e-15)
    again = gradients(td.kl_divergence(posterior, prior), [ours, theirs])  # it is left as it was
    assert all(map(torch.equal, again, plain))


PARAMETERS = [
    torch.tensor([values], dtype=torch.float64, requires_grad=True)
    for values in ([0.5, -1.0], [-0.3, 0.2], [0.0, 0.4], [0.1, -0.1])
]
PLAIN = [[0.40937, -1.70996], [-0.55067, 0.82212], [-0.40937, 1.70996], [0.34599, -3.21607]]


def example():
    """A posterior and a prior with a KL of 1.53504 nats, and the gradients above."""
    mean, log_scale, prior_mean, prior_log_scale = PARAMETERS
    return td.Normal(mean, log_scale.exp()), td.Normal(prior_mean, prior_log_scale.exp())


def check_example(kl, value, of_posterior, of_prior):
    assert kl.sum().item() == pytest.approx(value, abs=2e-5)
    expected = [torch.tensor([row]).double() for row in PLAIN]
    shares = (of_posterior, of_posterior, of_prior, of_prior)
    for gradient, share, whole in zip(gradients(kl, PARAMETERS), shares, expected, strict=True):
        torch.testing.assert_close(gradient, share * whole, rtol=0, atol=2e-5)


def test_known_values():
    check_example(kl_balance(*example()), 1.53504, 0.2, 0.8)
    wrapped = [td.Independent(each, 1) for each in example()]
    check_example(world_model_kl(*wrapped), 1.68854, 0.1, 1.0)
    check_example(world_model_kl(*wrapped, free_nats=2.0), 2.2, 0.0, 0.0)
    check_example(world_model_kl(*wrapped, 0.5, 0.1, free_nats=0.0), 0.6 * 1.53504, 0.1, 0.5)


def test_the_floor_is_under_each_observations_whole_kl():
    mean = torch.tensor([[0.8**0.5, 0.0], [2.0, 2**0.5]], dtype=torch.float64)  # 0.4 and 3 nats
    posterior, prior = td.Normal(mean, 1.0), td.Normal(torch.zeros(2).double(), 1.0)
    kl = world_model_kl(td.Independent(posterior, 1), td.Independent(prior, 1), dynamics=0.75, representation=0.25)
    torch.testing.assert_close(kl, torch.tensor([1.0, 3.0]).double())


def test_the_two_weights_are_a_balance_with_free_bits_under_the_whole():
    shape = (4, 6, 3, 5)  # (batch, time, groups, classes)
    ours, theirs = normal(*shape), normal(*shape, seed=1)
    posterior, prior = td.OneHotCategorical(logits=ours), td.OneHotCategorical(logits=theirs)
    whole = td.Independent(posterior, 1), td.Independent(prior, 1)
    rate = td.kl_divergence(*whole).detach()
    floor = float(rate.quantile(0.3))

    balanced = kl_balance(posterior, prior, alpha=0.6 / 0.7)
    floored = 0.7 * free_bits(balanced.flatten(0, 1), floor, per="whole", average="sample")
    weighted = world_model_kl(*whole, dynamics=0.6, representation=0.1, free_nats=floor)

    assert balanced.shape == shape[:-1]
    assert weighted.shape == shape[:2]
    torch.testing.assert_close(weighted.mean(), floored, rtol=1e-13, atol=0)
    parameters = [ours, theirs]
    for one, other in zip(gradients(weighted.mean(), parameters), gradients(floored, parameters), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-15)
        assert torch.equal(one.abs().sum((2, 3)) > 0, rate > floor)


def test_without_a_closed_form_the_sample_is_the_posteriors():
    torch.manual_seed(0)
    mean, scale, prior_mean = normal(40, 3), normal(40, 3, seed=1), normal(3, seed=2)
    parts = td.Independent(td.Normal(torch.stack([prior_mean, -prior_mean]), 1.0), 1)
    prior = td.MixtureSameFamily(td.Categorical(torch.ones(2).double()), parts)
    posterior = td.Independent(td.Normal(mean, scale.exp()), 1)
    z = posterior.rsample()
    parameters = [mean, scale, prior_mean]

    plain = posterior.log_prob(z) - prior.log_prob(z)
    balanced = kl_balance(posterior, prior, 0.75, z)
    assert torch.equal(balanced, plain)
    shares, whole_gradients = (0.25, 0.25, 0.75), gradients(plain, parameters)
    for gradient, share, whole in zip(gradients(balanced, parameters), shares, whole_gradients, strict=True):
        torch.testing.assert_close(gradient, share * whole, rtol=1e-13, atol=1e-15)
    assert plain.min() < 0  # an estimate may be, and stays so without a floor
    unfloored = world_model_kl(posterior, prior, 0.7, 0.3, free_nats=0.0, z=z)
    torch.testing.assert_close(unfloored, plain, rtol=1e-13, atol=0)
    with pytest.raises(ValueError, match="has no known closed form; pass `z`"):
        kl_balance(posterior, prior)
    with pytest.raises(ValueError, match=r"`z` must be one sample of the posterior, of shape \(40, 3\), got \(3,\)"):
        kl_balance(posterior, prior, z=z[0])


def test_a_class_that_is_ruled_out_leaves_the_value_as_it_is():
    logits = torch.tensor([[[0.0, 1.0, -torch.inf]]])
    posterior, prior = td.OneHotCategorical(logits=logits), td.OneHotCategorical(logits=torch.zeros(1, 1, 3))
    assert torch.equal(kl_balance(posterior, prior), td.kl_divergence(posterior, prior))
    assert kl_balance(posterior, prior).isfinite().all()


def test_a_share_of_zero_stops_the_gradient():
    mean, prior_mean = normal(2), normal(2, seed=1)
    for alpha, parameter in ((1.0, mean), (0.0, prior_mean)):
        kl = kl_balance(td.Normal(mean, 1.0), td.Normal(prior_mean, 1.0), alpha)
        assert torch.autograd.grad(kl.sum(), parameter, allow_unused=True) == (None,)


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan"), "0.8", None])
def test_a_share_out_of_range_is_refused(alpha):
    with pytest.raises(ValueError, match="`alpha` must be"):
        kl_balance(*example(), alpha)


@pytest.mark.parametrize("name", ["dynamics", "representation", "free_nats"])
def test_weights_and_floors_out_of_range_are_refused(name):
    wrapped = [td.Independent(each, 1) for each in example()]
    with pytest.raises(ValueError, match=f"`{name}` must be a finite number of at least 0, got -1"):
        world_model_kl(*wrapped, **{name: -1.0})


@pytest.mark.parametrize("family", ["Normal", "logits"])
def test_a_floor_under_each_dimension_or_group_is_refused(family):
    posterior = FAMILIES[family](normal(4, 3, 5), normal(4, 3, 5, seed=1))
    with pytest.raises(ValueError, match=r"of batch shape .*Wrap both: `Independent\(posterior, 1\)`"):
        world_model_kl(posterior, posterior)


def test_distributions_that_do_not_fit_are_refused():
    posterior, _ = example()
    with pytest.raises(ValueError, match=r"`prior` must broadcast to the posterior's batch shape \(1, 2\), got \(3,\)"):
        kl_balance(posterior, td.Normal(torch.zeros(3), 1.0))
    with pytest.raises(ValueError, match=r"`prior` must have the posterior's event shape \(2,\), got \(\)"):
        kl_balance(td.Independent(posterior, 1), td.Normal(torch.zeros(1), 1.0))


def test_parameters_out_of_reach_are_refused():
    posterior, prior = example()
    moved = td.TransformedDistribution(prior, [td.AffineTransform(normal(2), 2.0)])
    with pytest.raises(ValueError, match=r"The parameters of `prior` must be tensors.*it holds a list"):
        kl_balance(posterior, moved, z=posterior.sample())


@pytest.mark.exhaustive
def test_balancing_compiles_to_one_graph():
    ours, theirs = normal(4, 3, 5), normal(4, 3, 5, seed=1)

    def loss(ours, theirs):
        posterior, prior = (
            td.Independent(td.OneHotCategorical(logits=logits, validate_args=False), 1, validate_args=False)
            for logits in (ours, theirs)
        )
        return world_model_kl(posterior, prior, free_nats=0.1).mean()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for one, other in zip(
        gradients(compiled(ours, theirs), [ours, theirs]), gradients(loss(ours, theirs), [ours, theirs]), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-15)


def test_the_guides_world_models_train(tmp_path):
    section = GUIDE.read_text(encoding="utf-8").partition("## World models")[2].partition("\n## ")[0]
    namespace = {}
    for block in re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL):
        exec(block, namespace)
    batches = DataLoader(torch.randn(8, 5, 6), batch_size=4)
    for name in ("WorldModel", "LikeDreamerV3"):
        model = namespace[name]()
        before = {key: value.clone() for key, value in model.state_dict().items()}
        quiet_trainer(tmp_path, max_epochs=1).fit(model, batches)
        assert not [key for key, value in model.state_dict().items() if torch.equal(value, before[key])]
