"""Priors: exact rates under each, and how a VampPrior keeps to the encoder of its model."""

import copy
import io
import itertools
import math
import pickle
from functools import partial

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.special import logsumexp
from sklearn.mixture import GaussianMixture
from torch import distributions as td
from torch import nn

from lightning_vae import (
    BatchNormMeans,
    CategoricalGroups,
    ConditionalNormal,
    DiagonalGaussian,
    FullCovariance,
    LearnedNormal,
    MixturePrior,
    StandardNormal,
    UniformCategorical,
    VampPrior,
    rate_parts,
)
from lightning_vae.priors import Prior

MEANS = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 1.0], [0.0, -2.0]]).double()
VARIANCES = torch.tensor([[0.5, 1.0], [0.2, 0.4], [0.3, 0.6], [1.0, 0.2]]).double()
# Eight posteriors and their noise, and the terms of the rate under their own mixture.
_RNG = np.random.default_rng(0)
MU, LOG_VARIANCE, NOISE = (_RNG.standard_normal((8, 2)) for _ in range(3))
LOG_VARIANCE = -1 + 0.3 * LOG_VARIANCE
TERMS = [1.06764, 1.25266, 0.89472, 2.04901, -0.52126, 0.36908, 1.82753, -1.60930]


class Model(nn.Module):
    """A posterior and a prior, wired as a VAE does it."""

    def __init__(self, prior=VampPrior, head=DiagonalGaussian, width=4, latent_dim=3, layers=()):
        super().__init__()
        self.head = head(latent_dim)
        self.encoder = nn.Sequential(nn.Linear(width, 8), *layers, nn.Tanh(), nn.Linear(8, self.head.outputs))
        self.prior = prior(latent_dim)
        self.prior.connect((width,), self.encode)

    def encode(self, x):
        return self.head(self.encoder(x))

    def rate(self, x):
        posterior = self.encode(x)
        return rate_parts(posterior, self.prior(), posterior.rsample()).sum(1).mean()


class Table(nn.Module):
    """An encoder of eight observations, which are one-hot: each has its own mean and log-variance."""

    def __init__(self, prior):
        super().__init__()
        self.parameters_ = nn.Parameter(torch.tensor(np.hstack([MU, LOG_VARIANCE])))
        self.head, self.prior = DiagonalGaussian(2), prior.double()
        self.prior.connect((8,), self.encode)
        self.double()

    def encode(self, x):
        return self.head(x @ self.parameters_)


def data(rows=6, width=4):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(3))


def rate(posterior, prior):
    """The mean rate in nats."""
    return rate_parts(posterior, prior).sum(1).mean().item()


def set_parameters(module, **values):
    with torch.no_grad():
        for name, value in values.items():
            getattr(module, name).copy_(torch.as_tensor(value))


# ---- factorised priors


def test_the_standard_normal_has_no_parameters_and_saves_nothing():
    prior = StandardNormal(3)
    assert not [*prior.parameters()]
    assert not prior.state_dict()
    assert prior().batch_shape == (3,)
    assert torch.equal(prior().loc, torch.zeros(3))
    assert torch.equal(prior(torch.ones(5, 2)).scale, torch.ones(3))


def test_a_prior_fitted_to_the_posteriors_lowers_the_rate_by_the_closed_form():
    posterior = td.Normal(MEANS, VARIANCES.sqrt())
    fitted, mean = LearnedNormal(2).double(), MEANS.mean(0)
    variance = MEANS.var(0, correction=0) + VARIANCES.mean(0)
    set_parameters(fitted, loc=mean, log_scale=0.5 * variance.log())
    standard, own = (rate(posterior, prior.double()()) for prior in (StandardNormal(2), fitted))
    assert (standard, own) == (pytest.approx(1.34289, abs=5e-6), pytest.approx(1.17681, abs=5e-6))
    saved = 0.5 * (mean.square() + variance - 1 - variance.log()).sum()
    assert standard - own == pytest.approx(float(saved), abs=1e-12)


def test_a_rate_under_a_fitted_full_covariance_is_lower_by_its_own_divergence_from_the_standard_normal():
    covariance = torch.from_numpy(np.cov(MEANS.T, bias=True)) + VARIANCES.mean(0).diag()
    assert covariance.flatten().tolist() == pytest.approx([1, -0.25, -0.25, 2.05])
    posterior, prior = td.Normal(MEANS, VARIANCES.sqrt()), td.MultivariateNormal(MEANS.mean(0), covariance)
    assert rate_parts(posterior, prior).shape == (4, 1)
    own, standard = rate(posterior, prior), rate(posterior, StandardNormal(2).double()())
    assert own == pytest.approx(1.16133, abs=5e-6)
    saved = 0.5 * (covariance.trace() - 2 - covariance.logdet())
    assert standard - own == pytest.approx(float(saved), abs=1e-12)


def test_a_conditional_prior_makes_up_for_an_encoder_that_does_not_see_the_condition():
    """The encoder V x of x = G c + r has the rate of V r under N(0, I) if the prior's mean is V G c."""
    rng = np.random.default_rng(0)
    eigenvalues, noise = np.array([5.0, 3.0, 1.5, 0.8, 0.3, 0.1]), 0.4
    directions = np.linalg.qr(rng.standard_normal((6, 6)))[0]
    joint = rng.standard_normal((200, 8))
    joint -= joint.mean(0)
    joint = joint @ np.linalg.inv(np.linalg.cholesky(joint.T @ joint / 200)).T  # covariance I
    c, residual = joint[:, :2], (joint[:, 2:] * np.sqrt(eigenvalues)) @ directions.T
    effect = np.array([[2, 0], [-1, 1], [0, 0.5], [1, -1], [0.5, 0], [0, 3]])
    x = c @ effect.T + residual
    active = eigenvalues[:4]
    encoder = (directions[:, :4] * np.sqrt(active - noise) / active).T
    prior = ConditionalNormal(4, 2).double()
    with torch.no_grad():
        prior.layers[0].weight.copy_(torch.from_numpy(encoder @ effect))
    posterior = td.Normal(torch.from_numpy(x @ encoder.T), torch.from_numpy(np.sqrt(noise / active)))
    posterior = posterior.expand((200, 4))
    made = prior(torch.from_numpy(c))
    rates = rate_parts(posterior, made).mean(0).detach()
    torch.testing.assert_close(rates, torch.from_numpy(0.5 * np.log(active / noise)), rtol=1e-10, atol=0)
    assert rate(posterior, made) == pytest.approx(3.27777, abs=5e-6)
    shifts = 0.5 * np.square(encoder @ effect).sum()  # c has covariance I
    standard = rate(posterior, StandardNormal(4).double()())
    assert standard == pytest.approx(rate(posterior, made) + shifts, abs=1e-10)


@pytest.mark.parametrize("variance", ["shared", "conditional"])
@pytest.mark.parametrize("hidden", [(), (5, 4)])
def test_a_conditional_prior_starts_at_the_standard_normal_and_learns_all_it_has(hidden, variance):
    torch.manual_seed(0)
    prior, c = ConditionalNormal(3, 2, hidden, variance), torch.randn(7, 2)
    assert torch.equal(prior(c).loc, torch.zeros(7, 3))
    assert torch.equal(prior(c).scale, torch.ones(7, 3))
    for _ in range(2):  # the layers below the last one have a gradient once that is not zero
        rate_parts(td.Normal(torch.ones(7, 3), 0.5), prior(c)).sum().backward()
        with torch.no_grad():
            for parameter in prior.parameters():
                parameter -= 0.1 * parameter.grad + 0.01
    assert all(parameter.grad.any() for parameter in prior.parameters())
    scale = prior(torch.tensor([[0.0, 1.0], [3.0, 1.0]])).scale
    assert torch.equal(scale[0], scale[1]) == (variance == "shared")


# ---- joint priors


def mixture_parameters(components=3, k=2):
    rng = np.random.default_rng(5)
    return rng.standard_normal((components, k)), rng.uniform(0.3, 2, (components, k)), rng.standard_normal(components)


def mixture_prior():
    loc, scale, logits = mixture_parameters()
    prior = MixturePrior(2, components=3).double()
    set_parameters(prior, loc=loc, log_scale=np.log(scale), logits=logits)
    return prior


def test_the_density_of_a_mixture_is_that_of_scipy():
    loc, scale, logits = mixture_parameters()
    z = np.random.default_rng(6).standard_normal((4, 5, 2)) * 3
    each = stats.norm(loc, scale).logpdf(z[:, :, None]).sum(-1)
    expected = logsumexp(each + logits - logsumexp(logits), axis=-1)
    prior = mixture_prior()()
    assert (prior.batch_shape, prior.event_shape) == ((), (2,))
    for value, density in ((z, expected), (z[0], expected[0]), (z[0, 0], expected[0, 0])):
        found = prior.log_prob(torch.from_numpy(value)).detach().numpy()
        np.testing.assert_allclose(found, density, rtol=1e-12)


def test_the_density_of_a_mixture_is_that_of_scikit_learn():
    rng = np.random.default_rng(8)
    x = np.concatenate([rng.normal(-2, 0.5, (200, 2)), rng.normal(2, 1, (100, 2))])
    fitted = GaussianMixture(3, covariance_type="diag", random_state=0).fit(x)
    prior = MixturePrior(2, components=3).double()
    log_scale = 0.5 * np.log(fitted.covariances_)
    set_parameters(prior, loc=fitted.means_, log_scale=log_scale, logits=np.log(fitted.weights_))
    found = prior().log_prob(torch.from_numpy(x)).detach().numpy()
    np.testing.assert_allclose(found, fitted.score_samples(x), rtol=1e-10)


def test_the_density_and_its_gradients_are_torchs_also_for_narrow_components_far_from_zero():
    """In float32 the squares of such means would leave no digit of the distance."""
    generator = torch.Generator().manual_seed(0)
    loc = 100 + torch.randn(6, 4, generator=generator)
    z = (loc[[0, 3, 5]] + 1e-3 * torch.randn(3, 4, generator=generator)).requires_grad_()
    prior = MixturePrior(4, components=6)
    set_parameters(prior, loc=loc, log_scale=torch.full((6, 4), math.log(1e-3)))

    def with_gradients(log_prob, z):
        log_prob.sum().backward()
        parts = [z.grad, *(each.grad for each in prior.parameters())]
        found = [log_prob.detach(), *(each.clone() for each in parts)]
        prior.zero_grad(set_to_none=False)
        return found

    own = with_gradients(prior().log_prob(z), z)
    double = z.detach().double().requires_grad_()
    prior.double()
    made = prior()
    expected = with_gradients(td.MixtureSameFamily.log_prob(made, double), double)
    for one, other in zip(own, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)


def test_samples_and_moments_of_a_mixture():
    prior = mixture_prior()()
    torch.manual_seed(0)
    z = prior.sample((200_000,))
    assert z.shape == (200_000, 2)
    assert not z.requires_grad
    torch.testing.assert_close(z.mean(0), prior.mean.detach(), atol=0.02, rtol=0)
    torch.testing.assert_close(z.var(0), prior.variance.detach(), atol=0.05, rtol=0)
    loc, scale, logits = mixture_parameters()
    weights = np.exp(logits - logsumexp(logits))
    np.testing.assert_allclose(prior.mean.detach(), weights @ loc, rtol=1e-12)
    second = weights @ (loc**2 + scale**2)
    np.testing.assert_allclose(prior.variance.detach(), second - (weights @ loc) ** 2, rtol=1e-12)
    assert prior.sample().shape == (2,)
    assert prior.sample((3, 4)).shape == (3, 4, 2)


@pytest.mark.parametrize("components", [1, 200])
def test_a_mixture_starts_near_the_standard_normal(components):
    torch.manual_seed(0)
    prior = MixturePrior(2, components=components)()
    torch.testing.assert_close(prior.mean, torch.zeros(2), atol=0.1, rtol=0)
    torch.testing.assert_close(prior.variance, torch.ones(2), atol=0.15, rtol=0)


def test_a_mixture_of_one_component_is_a_gaussian():
    prior = MixturePrior(2, components=1).double()
    set_parameters(prior, loc=[[0.5, -1.0]], log_scale=[[0.2, -0.3]])
    posterior, z = td.Normal(MEANS, VARIANCES.sqrt()), MEANS + 0.3
    gaussian = td.Normal(prior.loc[0], prior.log_scale[0].exp())
    expected = (posterior.log_prob(z) - gaussian.log_prob(z)).sum(1, keepdim=True)
    torch.testing.assert_close(rate_parts(posterior, prior(), z), expected, rtol=1e-12, atol=1e-12)


# ---- VampPrior


def test_the_rate_under_the_posteriors_of_all_observations_is_their_mutual_information():
    prior = VampPrior(2, components=8, pseudo_inputs="data")
    model, x, noise = Table(prior), torch.eye(8).double(), torch.from_numpy(NOISE)
    assert prior.wants == 8
    prior.start(x)
    assert prior.wants == 0
    posterior = model.encode(x)
    z = posterior.loc + posterior.scale * noise
    terms = rate_parts(posterior, prior(), z)[:, 0].detach().numpy()
    assert terms == pytest.approx(TERMS, abs=5e-6)
    assert terms.mean() == pytest.approx(0.66626, abs=5e-6)

    z = MU + np.exp(0.5 * LOG_VARIANCE) * NOISE
    each = stats.norm(MU, np.exp(0.5 * LOG_VARIANCE)).logpdf(z[:, None]).sum(-1)  # [n, m]: log q(z_n | x_m)
    np.testing.assert_allclose(terms, each.diagonal() - logsumexp(each, axis=1) + np.log(8), rtol=0, atol=1e-12)


@pytest.mark.parametrize("layers", [(nn.Dropout(0.5),), (nn.BatchNorm1d(8),), ()])
def test_pseudo_inputs_are_encoded_as_at_evaluation(layers):
    model, x = Model(partial(VampPrior, components=4), layers=copy.deepcopy(layers)), data()
    model.prior.start(x)
    if layers and isinstance(layers[0], nn.BatchNorm1d):
        model.encode(10 * x)  # running statistics other than the batch's
    before = {name: value.clone() for name, value in model.state_dict().items()}
    training = model.prior().component_distribution.base_dist
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    expected = model.eval().encode(x[:4])
    assert torch.equal(training.loc, expected.loc)
    assert torch.equal(training.scale, expected.scale)
    model.prior()
    assert not any(module.training for module in model.modules())


def test_an_encoder_that_fails_is_in_training_mode_again():
    model = Model(partial(VampPrior, components=4, pseudo_inputs="learned"))
    model.encoder[0] = nn.Linear(5, 8)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        model.prior()
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize(
    ("pseudo_inputs", "weights"), [*itertools.product(("learned", "data", "both"), ("uniform", "learned"))]
)
def test_gradients_reach_the_encoder_and_what_the_prior_learns(pseudo_inputs, weights):
    torch.manual_seed(0)
    prior = partial(VampPrior, components=4, pseudo_inputs=pseudo_inputs, weights=weights)
    model, x = Model(prior), data()
    model.prior.start(x)
    assert torch.equal(model.prior.inputs, x[:4]) == (pseudo_inputs != "learned")
    own, through = model.encoder[0].weight, []
    for stops in (False, True):
        posterior = model.encode(x).loc.detach(), model.encode(x).scale.detach()
        posterior = td.Normal(*posterior) if stops else model.encode(x)
        model.zero_grad()
        torch.manual_seed(1)
        rate_parts(posterior, model.prior(), posterior.rsample()).sum().backward()
        through.append(own.grad.clone())
    assert through[1].any()  # through the prior alone
    assert not torch.equal(*through)
    learned = {name for name, each in model.prior.named_parameters() if each.grad is not None and each.grad.any()}
    assert learned == ({"inputs"} if pseudo_inputs != "data" else set()) | (
        {"logits"} if weights == "learned" else set()
    )


def test_bounded_pseudo_inputs_stay_within_0_and_1_and_find_back():
    model = Model(partial(VampPrior, components=2, bounded=True), width=3)
    seen = []
    model.encoder.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    values = torch.tensor([[-0.5, 0.0, 0.25], [1.0, 1.5, 0.75]])
    model.prior.start(values)
    model.prior()
    assert torch.equal(seen[0], values.clamp(0, 1))
    for sign in (1.0, -1.0):
        model.prior.inputs.grad = None
        model.prior()
        (sign * seen[-1].sum()).backward()
        # A step against the gradient: down at first, then up.
        expected = [[0, 0, 1], [1, 1, 1]] if sign > 0 else [[1, 1, 1], [0, 0, 1]]
        assert torch.equal(model.prior.inputs.grad, sign * torch.tensor(expected).float())


def test_bounded_pseudo_inputs_start_within_the_bounds_and_leave_such_data_alone():
    prior = partial(VampPrior, components=50, pseudo_inputs="learned", bounded=True)
    inputs = Model(prior).prior.inputs
    assert 0 <= inputs.min() < 0.1
    assert 0.9 < inputs.max() <= 1
    x = torch.rand(4, 4)
    model = Model(partial(VampPrior, components=4, bounded=True))
    model.prior.start(x)
    assert torch.equal(model.prior().component_distribution.base_dist.loc, model.encode(x).loc)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copied_model_has_a_prior_of_its_own_encoder(copied):
    model, x = Model(partial(VampPrior, components=4)), data()
    model.prior.start(x)
    twin = copied(model)
    assert torch.equal(twin.prior().mean, model.prior().mean)
    with torch.no_grad():
        twin.encoder[0].weight.add_(1)
    assert not torch.equal(twin.prior().mean, model.prior().mean)
    twin.rate(x).backward()
    assert twin.encoder[0].weight.grad is not None
    assert model.encoder[0].weight.grad is None


def test_the_encoder_is_no_part_of_the_prior():
    model = Model(partial(VampPrior, components=4))
    assert set(model.prior.state_dict()) == {"inputs", "_has_started"}
    assert not [*model.prior.children()]
    alone = VampPrior(3, components=4, pseudo_inputs="learned")
    alone.connect((4,), nn.Sequential(model.encoder, model.head))  # a module is not registered either
    assert not [*alone.children()]
    assert alone().event_shape == (3,)


@pytest.mark.parametrize("weights_only", [True, False])
def test_a_checkpoint_brings_the_pseudo_inputs_which_then_want_no_data(weights_only):
    model, x = Model(partial(VampPrior, components=4, weights="learned")), data()
    model.prior.start(x)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    loaded = Model(partial(VampPrior, components=4, weights="learned"))
    assert loaded.prior.wants == 4
    loaded.load_state_dict(torch.load(file, weights_only=weights_only))
    assert loaded.prior.wants == 0
    loaded.prior.start(10 * x)
    assert torch.equal(loaded.prior.inputs, x[:4])
    assert torch.equal(loaded.prior().mean, model.prior().mean)
    loaded.load_state_dict(Model(partial(VampPrior, components=4, weights="learned")).state_dict())
    assert loaded.prior.wants == 4


def test_training_without_the_data_that_a_vamp_prior_wants_is_an_error():
    model = Model(partial(VampPrior, components=4))
    with pytest.raises(ValueError, match=r"`prior` VampPrior has no pseudo-inputs yet: call `start\(x\)`"):
        model.prior()
    assert model.eval().prior().mean.isfinite().all()
    with pytest.raises(ValueError, match=r"at 4 observations of shape \(4,\), got 3 of shape \(4,\). Set `components`"):
        model.prior.start(data(3))
    with pytest.raises(ValueError, match=r"at 4 observations of shape \(4,\), got 6 of shape \(5,\)"):
        model.prior.start(data(6, 5))
    with pytest.raises(ValueError, match=r"`prior` VampPrior has no encoder: call `connect"):
        VampPrior(2).start(data())


def test_other_priors_want_no_data():
    for prior in (StandardNormal(2), LearnedNormal(2), MixturePrior(2)):
        before = {name: value.clone() for name, value in prior.state_dict().items()}
        prior.connect((4,), lambda x: None)
        prior.start(data())
        assert prior.wants == 0
        assert all(torch.equal(value, before[name]) for name, value in prior.state_dict().items())


# ---- all of them

PRIORS = {
    "standard": StandardNormal,
    "learned": LearnedNormal,
    "conditional": partial(ConditionalNormal, condition_dim=2, hidden=(3,)),
    "mixture": partial(MixturePrior, components=4),
    "vamp": partial(VampPrior, components=4, pseudo_inputs="learned", weights="learned"),
    "categories": partial(UniformCategorical, classes=3),
}
POSTERIORS = {
    "diagonal": DiagonalGaussian,
    "batch_norm": BatchNormMeans,
    "full": FullCovariance,
    "categories": partial(CategoricalGroups, classes=3),
}


def pairs():
    for (prior, make), (posterior, head) in itertools.product(PRIORS.items(), POSTERIORS.items()):
        if (prior == "categories") == (posterior == "categories"):
            yield pytest.param(make, head, id=f"{prior}-{posterior}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("prior", "head"), list(pairs()))
def test_the_rate_under_each_pair_has_its_parts_and_type_and_a_gradient(prior, head, dtype):
    torch.manual_seed(0)
    model = Model(prior, head, latent_dim=6).to(dtype)
    posterior = model.encode(data().to(dtype))
    rates = rate_parts(posterior, model.prior(torch.ones(6, 2)), posterior.rsample())
    assert rates.shape == (6, 1 if model.prior.is_joint else model.head.parts)
    assert rates.dtype == dtype
    rates.sum().backward()
    assert model.encoder[0].weight.grad.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("prior", list(PRIORS.values()), ids=list(PRIORS))
def test_no_number_of_a_prior_is_in_half_precision(prior, dtype):
    prior = prior(6)
    prior.connect((4,), None)
    prior.to(dtype)
    tensors = [each for each in (*prior.parameters(), *prior.buffers()) if each.is_floating_point()]
    assert all(each.dtype == torch.float32 for each in tensors)
    assert prior.double() is prior
    tensors = [each for each in (*prior.parameters(), *prior.buffers()) if each.is_floating_point()]
    assert all(each.dtype == torch.float64 for each in tensors)


@pytest.mark.parametrize("prior", list(PRIORS.values()), ids=list(PRIORS))
def test_a_prior_follows_its_module_to_another_device(prior):
    """The device `meta` has no values, so whatever is left behind can't be combined with it."""
    head = partial(CategoricalGroups, classes=3) if "Categorical" in str(prior) else DiagonalGaussian
    model = Model(prior, head, latent_dim=6).to("meta")
    made = model.prior(torch.ones(5, 2, device="meta"))
    assert made.mean.device.type == "meta"


@pytest.mark.parametrize("prior", list(PRIORS.values()), ids=list(PRIORS))
def test_a_saved_prior_gives_the_same_distribution(prior):
    def made(prior):
        prior.connect((4,), lambda x: td.Normal(x[:, :1].expand(-1, 6), 1.0))
        return prior

    torch.manual_seed(0)
    one, other = made(prior(6)), made(prior(6))
    other.load_state_dict(one.state_dict())
    c = torch.ones(5, 2)
    assert torch.equal(one(c).mean, other(c).mean)
    assert torch.equal(one(c).variance, other(c).variance)


@pytest.mark.exhaustive
@pytest.mark.parametrize(("prior", "head"), [each for each in pairs() if "batch_norm" not in each.id])
@pytest.mark.filterwarnings("ignore")
def test_the_rate_compiles_to_one_graph(prior, head):
    torch.compiler.reset()
    model, x, c = Model(prior, head, latent_dim=6).eval(), data(), torch.ones(6, 2)

    def rate(x):
        posterior = model.encode(x)
        return rate_parts(posterior, model.prior(c), posterior.mean).sum()

    compiled = torch.compile(rate, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), rate(x))
    model.train()
    compiled(x).backward()
    assert all(module.training for module in model.modules())


# ---- what does not go together


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ConditionalNormal(2), "`condition_dim` must be at least 1 for a prior .* got 0. Give the model"),
        (lambda: ConditionalNormal(2, 1, hidden=(0,)), r"`hidden` must be widths of at least 1, got \(0,\)"),
        (
            lambda: ConditionalNormal(2, 1, variance="own"),
            "`variance` must be one of 'shared', 'conditional', got 'own'",
        ),
        (lambda: VampPrior(2, components=0), "`components` must be an integer of at least 1, got 0"),
        (lambda: VampPrior(2, pseudo_inputs="some"), "`pseudo_inputs` must be one of 'learned', 'data', 'both', got"),
        (lambda: VampPrior(2, weights="equal"), "`weights` must be one of 'uniform', 'learned', got 'equal'"),
        (lambda: MixturePrior(2, components=1.5), "`components` must be an integer of at least 1, got 1.5"),
        (lambda: StandardNormal(0), "`latent_dim` must be an integer of at least 1, got 0"),
        (lambda: LearnedNormal(2, -1), "`condition_dim` must be an integer of at least 0, got -1"),
        (lambda: UniformCategorical(7, classes=3), "`classes` must divide `latent_dim`, .* got 3 for 7"),
        (lambda: UniformCategorical(6, classes=1), "`classes` must be an integer of at least 2, got 1"),
    ],
)
def test_options_that_make_no_sense_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("condition", [None, torch.ones(5, 3), torch.ones(2)])
def test_a_conditional_prior_says_what_condition_it_needs(condition):
    with pytest.raises(ValueError, match=r"needs a condition of shape \(B, 2\), got"):
        ConditionalNormal(3, 2)(condition)


def test_a_prior_without_a_distribution_is_an_error():
    with pytest.raises(NotImplementedError, match="`prior`: Prior has no `forward`"):
        Prior(2)()


def test_the_standard_prior_moves_with_its_module_and_trains_after_inference():
    prior = StandardNormal(3)
    with torch.inference_mode():
        prior()
    loc = torch.zeros(2, 3, requires_grad=True)
    td.kl_divergence(td.Normal(loc, 1.0), prior()).sum().backward()
    assert prior.double()().loc.dtype == torch.float64
    assert prior.to("meta")().loc.device.type == "meta"
