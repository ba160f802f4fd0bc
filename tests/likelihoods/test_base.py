import ast
import math
from functools import partial

import pytest
import torch
from torch import distributions as td

from lightning_vae import (
    VAE,
    Bernoulli,
    Categorical,
    ContinuousBernoulli,
    ConvDecoder,
    ConvEncoder,
    DiscretisedLogistic,
    Gaussian,
    Likelihood,
    MLPDecoder,
    MLPEncoder,
    NegativeBinomial,
    Poisson,
)
from lightning_vae.checkpoints.class_paths import build, describe
from tests.likelihoods.cases import CASES, output
from tests.processes import in_two_processes


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


@pytest.mark.parametrize("name", CASES)
def test_every_likelihood_is_a_distribution_over_observations(name):
    likelihood = CASES[name].make((3, 4, 5))
    distribution = likelihood(output(likelihood, 2))
    assert isinstance(distribution, td.Distribution)
    assert (distribution.batch_shape, distribution.event_shape) == ((2,), (3, 4, 5))
    assert distribution.mean.shape == (2, 3, 4, 5)
    assert distribution.sample(torch.Size((7,))).shape == (7, 2, 3, 4, 5)
    log_prob = distribution.log_prob(torch.zeros(2, 3, 4, 5, dtype=torch.float64))
    assert log_prob.shape == (2,)
    assert log_prob.dtype == distribution.mean.dtype == torch.float64


@pytest.mark.parametrize("name", CASES)
def test_every_likelihood_is_normalised_and_has_its_mean(name):
    case = CASES[name]
    likelihood = case.make((1,))
    for seed in range(3):
        row = output(likelihood, 1, seed)
        mean = likelihood(row).mean.item()
        x, weight = case.nodes(mean)
        mass = weight * likelihood(row.expand(len(x), -1)).log_prob(x[:, None]).exp()
        assert mass.sum().item() == pytest.approx(1, abs=1e-6)
        if not case.has_own_mean:
            assert mean == pytest.approx((mass * x).sum().item(), abs=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_samples_are_as_frequent_as_probable(name):
    torch.manual_seed(0)
    case = CASES[name]
    likelihood = case.make((1,))
    row = output(likelihood, 1)
    draws = likelihood(row).sample(torch.Size((20_000,))).flatten()
    x, weight = case.nodes(likelihood(row).mean.item())
    mass = weight * likelihood(row.expand(len(x), -1)).log_prob(x[:, None]).exp()
    for bound in x[:: max(1, len(x) // 20)].tolist():  # the cumulative distribution, at some points
        share = (draws <= bound + 1e-6).double().mean().item()
        # Half of the weight at the bound is above it, where the values are nodes of an integral.
        half = 0 if case.interval is None else mass[x == bound].sum().item() / 2
        assert share == pytest.approx(mass[x <= bound].sum().item() - half, abs=0.015)


@pytest.mark.parametrize("name", CASES)
def test_missing_numbers_count_nothing(name):
    torch.manual_seed(0)
    case = CASES[name]
    likelihood = case.make((3, 2, 1))
    values = case.values()[:20]
    x = values[torch.randint(len(values), (4, 3, 2, 1))]
    parameters = output(likelihood, 4).requires_grad_()
    mask = torch.rand(x.shape) < 0.5
    assert 0 < mask.sum() < mask.numel()
    distribution = likelihood(parameters)
    numbers = distribution.base_dist.log_prob(x)
    log_prob = distribution.log_prob(x.where(mask, torch.nan), mask)
    torch.testing.assert_close(log_prob, (numbers * mask).flatten(1).sum(1))
    (gradient,) = torch.autograd.grad(log_prob.sum(), parameters)
    assert gradient.isfinite().all()
    parts = gradient.unflatten(1, (-1, 3))  # the parameters of each number
    assert (parts.movedim(1, -1)[~mask] == 0).all()
    assert (parts.movedim(1, -1)[mask] != 0).any()
    everything = torch.ones_like(mask)
    likelihood, parameters = CASES[name].make((3, 2, 1)), parameters.detach()
    assert torch.equal(likelihood(parameters).log_prob(x, everything), likelihood(parameters).log_prob(x))
    likelihood.check_mask()


def test_a_mask_of_another_kind_is_refused():
    distribution = Gaussian((3,))(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="`mask` must be boolean, True where a number is there, got torch"):
        distribution.log_prob(torch.zeros(2, 3), torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"`mask` must end with the shape \(3,\) of one observation"):
        distribution.log_prob(torch.zeros(2, 3), torch.ones(2, 4).bool())


class Own(Likelihood):
    """As one writes it without masks in mind."""

    def forward(self, output, x=None):
        return td.Independent(td.Normal(output, 1.0), len(self.shape))


def test_a_likelihood_that_takes_no_mask_says_so():
    with pytest.raises(ValueError, match="`likelihood` Own takes no mask of missing numbers"):
        Own((3,)).check_mask()
    assert VAE((3,), None, 2, likelihood=Own).elbo_terms(torch.zeros(2, 3)).distortion.shape == (2,)


def test_the_encoder_sees_zeros_for_missing_numbers():
    x = torch.tensor([[0.5, torch.nan]])
    assert torch.equal(Gaussian((2,)).features(x, ~x.isnan()), torch.tensor([[0.5, 0.0]]))
    assert Gaussian((2,)).features(x) is x


@pytest.mark.parametrize("networks", [(MLPEncoder, MLPDecoder), (ConvEncoder, ConvDecoder)])
@pytest.mark.parametrize("name", CASES)
def test_a_decoder_is_built_for_what_the_likelihood_needs(name, networks):
    case = CASES[name]
    shape = (2, 4, 3)
    vae = VAE(shape, case.levels, 2, *networks, likelihood=case.constructor)
    assert networks[1](2, vae.likelihood.output_shape)(torch.zeros(5, 2)).shape == (5, *vae.likelihood.output_shape)
    torch.manual_seed(0)
    x = vae.to_data_scale(case.values())[torch.randint(min(5, len(case.values())), (6, *shape))].round()
    vae.elbo_terms(x).distortion.mean().backward()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in vae.decoder.parameters())
    top = math.inf if case.levels is None else case.levels - 1
    for means in (vae.reconstruct(x), vae.sample(6)):
        assert means.shape == (6, *shape)
        assert means.isfinite().all()
        assert means.max() <= top
    draws = vae.to_data_scale(vae.decode(torch.zeros(6, 2)).sample())
    if case.interval is None:
        torch.testing.assert_close(draws, draws.round())


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", CASES)
def test_a_model_with_any_likelihood_is_exported(name):
    """So its means need no value on the host, which would also wait for the device in each step."""
    case = CASES[name]
    vae = VAE((2, 3, 1), case.levels, 2, likelihood=case.constructor).eval()
    x = torch.zeros(4, 2, 3, 1)
    model = torch.export.export(vae, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},)).module()
    torch.testing.assert_close(model(x[:3]), vae.reconstruct(x[:3]))


def test_a_decoder_of_another_shape_is_refused():
    vae = VAE((3,), 5, 2, decoder=lambda latent_dim, shape: MLPDecoder(latent_dim, (3,)), likelihood=Categorical)
    with pytest.raises(ValueError, match=r"`decoder` must give shape \(7, 15\), got \(7, 3\)"):
        vae.decode(torch.zeros(7, 2))


@pytest.mark.parametrize("name", CASES)
def test_a_likelihood_that_a_checkpoint_names_is_found(name):
    case = CASES[name]
    built = build("likelihood", describe(case.constructor), (3,), case.levels)
    assert type(built) is type(case.make((3,)))
    old = {**describe(case.constructor), "class_path": f"lightning_vae.likelihoods.{type(built).__name__}"}
    again = build("likelihood", old, (3,), case.levels)
    assert type(again) is type(built)
    again.load_state_dict(built.state_dict())


@pytest.mark.parametrize(
    "make", [*(case.constructor for case in CASES.values()), partial(Gaussian, variance="optimal")]
)
def test_scales_stay_in_float32_under_half_precision(make):
    likelihood = make((2,), None if issubclass(getattr(make, "func", make), Poisson | NegativeBinomial) else 5)
    likelihood = likelihood.to(torch.bfloat16)
    assert {tensor.dtype for tensor in likelihood.state_dict().values()} <= {torch.float32}


@pytest.mark.parametrize("make", [Bernoulli, ContinuousBernoulli, Gaussian, DiscretisedLogistic])
@pytest.mark.parametrize("shape", [(5, 4, 4), (5, 3, 4, 4), (4, 4, 1), (4,), ()])
def test_values_of_another_shape_have_no_density(make, shape):
    likelihood = make((1, 4, 4))(torch.zeros(5, 1, 4, 4))
    assert likelihood.log_prob(torch.zeros(5, 1, 4, 4)).shape == (5,)
    with pytest.raises(ValueError, match=r"`value` must end with the shape \(1, 4, 4\) of one observation, got shape"):
        likelihood.log_prob(torch.zeros(shape))


STARTERS = [
    (partial(Gaussian, (3,), variance="learned"), "log_variance"),
    (partial(Bernoulli, (3,), start_at_mean=True), "offset"),
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
