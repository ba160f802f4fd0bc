"""Every number of an evaluation against its exact value on the linear VAE, and what does not change it."""

import copy
import json
import math
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributions as td
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_vae import (
    VAE,
    CategoricalGroups,
    DiagonalGaussian,
    DiscretisedLogistic,
    FullCovariance,
    Gaussian,
    LearnedNormal,
    LinearDecoder,
    LinearEncoder,
    MixturePrior,
    PosteriorHead,
    Prior,
    StandardNormal,
    VampPrior,
)
from lightning_vae.callbacks import CollapseDetector
from lightning_vae.callbacks.metrics.observation_subset import random_keys
from lightning_vae.datamodules import Digits, linear_vae_optimum
from lightning_vae.datamodules import Gaussian as GaussianData
from lightning_vae.datamodules.loaders.tensor_loader import TensorLoader
from lightning_vae.estimators import mixture_estimates
from lightning_vae.evaluation.chunks import Target
from lightning_vae.evaluation.decoding_pass import _slopes
from lightning_vae.evaluation.measure import evaluate
from lightning_vae.evaluation.record import Evaluation
from lightning_vae.noise import sample_by_index
from tests.doubles import digits, optimal_linear_vae, quiet_trainer, small_vae
from tests.processes import in_two_processes

SPECTRUM = (5.0, 3.0, 1.5, 0.8, 0.3, 0.1)
VARIANCE = 0.4
ONE_GAUSSIAN = partial(MixturePrior, components=1)  # N(0, I), but joint


@pytest.fixture(scope="module")
def x():
    data = GaussianData(SPECTRUM, size=4096, batch_size=512)
    data.setup("test")
    return data._splits["test"]["x"]


def loader(x, batch_size=512):
    return TensorLoader({"x": x}, batch_size=batch_size)


# ---- exact values


@pytest.mark.parametrize("samples", [1, 7, 60])
def test_at_the_optimum_the_bound_is_the_exact_likelihood_at_any_number_of_samples(x, samples):
    vae = optimal_linear_vae(x, 4, VARIANCE)
    result = evaluate(vae, loader(x), importance_samples=samples)
    covariance = vae.decoder.map.weight @ vae.decoder.map.weight.T + VARIANCE * torch.eye(6)
    exact = td.MultivariateNormal(torch.zeros(6).double(), covariance.detach()).log_prob(x.double())
    assert -exact.mean() == pytest.approx(8.54253, abs=1e-4)
    assert result.likelihood.nll == pytest.approx(-float(exact.mean()), abs=1e-6)
    assert result.likelihood.nll_error == pytest.approx(float(exact.std()) / math.sqrt(len(x)), rel=1e-6)
    assert result.likelihood.effective_sample_size == pytest.approx(samples)
    assert -result.terms.elbo == pytest.approx(result.likelihood.nll, abs=0.1 / math.sqrt(samples))


@pytest.mark.parametrize("beta", [0.5, 1.0, 2.0, 4.0])
def test_every_number_on_the_linear_vae(x, beta):
    optimum = linear_vae_optimum(SPECTRUM, 4, VARIANCE, beta)
    level, active = beta * VARIANCE, [value for value in SPECTRUM[:4] if value > beta * VARIANCE]
    result = evaluate(optimal_linear_vae(x, 4, VARIANCE, beta), loader(x), importance_samples=200)

    assert (result.observations, result.latent_dim, result.beta) == (4096, 4, beta)
    assert result.terms.rate == pytest.approx(optimum.rate, abs=1e-4)
    assert result.latents.rate_per_dimension == pytest.approx(optimum.rate_per_dimension, abs=1e-4)
    assert result.latents.variance_per_dimension == pytest.approx(optimum.posterior_mean_variance, abs=1e-4)
    assert result.latents.active_units == optimum.active_units == len(active)
    assert result.terms.distortion == pytest.approx(optimum.distortion, abs=0.01)
    assert result.terms.elbo == pytest.approx(-(optimum.distortion + optimum.rate), abs=0.01)

    # The model's own density: a Gaussian whose variances are those below, on data of the spectrum.
    model = [value - level + VARIANCE for value in active] + [VARIANCE] * (6 - len(active))
    nll = 0.5 * sum(math.log(2 * math.pi * m) + value / m for m, value in zip(model, SPECTRUM, strict=True))
    assert result.likelihood.nll == pytest.approx(nll, abs=0.02)
    assert result.likelihood.nll_active_only == pytest.approx(result.likelihood.nll, abs=1e-6)

    information = sum(0.5 * math.log(value / level) for value in active)
    assert information - 0.15 < result.latents.mutual_information < information + 0.05
    assert information - 0.05 < result.latents.mutual_information_upper < information + 0.1
    assert not result.latents.mutual_information_saturated
    assert result.latents.marginal_kl == pytest.approx(0, abs=0.15)
    assert result.latents.total_correlation == pytest.approx(0, abs=0.15)
    assert result.latents.aggregate_mean_square == pytest.approx(0, abs=1e-9)
    assert result.latents.aggregate_variance_mean == pytest.approx(1, abs=1e-4)
    assert result.latents.posterior_width == pytest.approx(
        sum(math.sqrt(level / v) for v in active) / len(active), abs=1e-4
    )

    assert result.terms.implied_beta == pytest.approx(beta, rel=0.02)
    assert result.terms.calibration == pytest.approx(optimum.squared_error / (6 * VARIANCE), rel=0.01)
    assert result.generation.shuffled_gap == pytest.approx(sum(value - level for value in active) / VARIANCE, rel=0.1)
    assert result.generation.sample_distance == pytest.approx(1, abs=0.05)  # decoded, q(z) is what the prior is
    assert result.generation.interpolation_distance < 1  # midpoints are nearer to the centre, where the data are
    assert math.isnan(result.labels.knn_accuracy)
    assert math.isnan(result.labels.linear_probe_accuracy)


def test_a_saturated_mutual_information_is_printed_as_at_least(x):
    # 12.488 nats, above log 2048 = 7.62.
    variance = math.exp((sum(map(math.log, SPECTRUM[:4])) - 2 * 12.488) / 4)
    result = evaluate(optimal_linear_vae(x, 4, variance), loader(x), importance_samples=1)
    assert result.terms.rate == pytest.approx(12.488, abs=1e-3)
    assert result.latents.mutual_information_saturated
    assert result.latents.mutual_information_upper == pytest.approx(12.488, abs=0.1)
    assert result.latents.marginal_kl == pytest.approx(0, abs=0.05)
    assert "mutual information        >= log M = 7.62" in result.table()
    assert "marginal KL               >= " in result.table()


@pytest.mark.parametrize("observations", [100, 2048])
def test_a_joint_prior_changes_no_bound(x, observations):
    # A posterior far from N(0, I), once by its own name and once as a mixture of one component.
    models = [optimal_linear_vae(x, 4, 0.1, **prior) for prior in ({}, {"prior": ONE_GAUSSIAN})]
    for vae in models:
        with torch.no_grad():
            vae.encoder.mean.bias.fill_(1.0)
    one, two = (evaluate(vae, loader(x), importance_samples=1, observations=observations).latents for vae in models)
    assert one.mutual_information_saturated == two.mutual_information_saturated == (observations == 100)
    assert two.marginal_kl == pytest.approx(one.marginal_kl, abs=0.2)  # 2 nats: half the square of the shift in each
    assert two.marginal_kl == pytest.approx(2.0, abs=0.5)
    assert two.marginal_kl_lower == pytest.approx(one.marginal_kl_lower, abs=0.2)
    assert two.mutual_information_upper == pytest.approx(one.mutual_information_upper, abs=1e-6)


def test_inactive_units_are_removed_without_a_loss_and_others_move_the_likelihood(x):
    vae = optimal_linear_vae(x, 4, VARIANCE, beta=2.0)
    nll = evaluate(vae, loader(x), importance_samples=3).likelihood.nll
    with torch.no_grad():  # a dimension that the decoder ignores, whose posterior is beside the prior
        vae.encoder.mean.bias[3] = 2.0
    result = evaluate(vae, loader(x), importance_samples=3)
    assert result.latents.active_units == 3
    assert result.likelihood.nll > nll + 0.5  # the more samples, the less the useless rate costs
    assert result.likelihood.nll_active_only == pytest.approx(nll, abs=1e-6)

    with torch.no_grad():  # one that serves the decoder as a constant
        vae.encoder.log_variance[3] = -14.0
        vae.decoder.map.weight[:, 3] = 1.0
        vae.decoder.map.bias -= 2.0
    result = evaluate(vae, loader(x), importance_samples=3)
    assert result.likelihood.nll_active_only == pytest.approx(nll, abs=0.01)

    with torch.no_grad():  # one that the threshold calls inactive, but the decoder reads
        vae = optimal_linear_vae(x, 4, VARIANCE)
        vae.encoder.mean.weight[0] *= 0.05
        vae.encoder.log_variance[0] -= 2 * math.log(20)
        vae.decoder.map.weight[:, 0] *= 20
    result = evaluate(vae, loader(x), importance_samples=50)
    assert result.latents.active_units == 3
    assert abs(result.likelihood.nll_active_only - result.likelihood.nll) > 1


def test_few_effective_samples_are_named(x):
    exact = evaluate(optimal_linear_vae(x, 4, VARIANCE), loader(x), importance_samples=30)
    assert "30 importance samples, 30.0 effective\n" in exact.table()
    poor = evaluate(optimal_linear_vae(x, 4, VARIANCE, beta=0.02), loader(x), importance_samples=30)
    assert poor.likelihood.effective_sample_size < 10
    assert " effective: more would lower it\n" in poor.table()


def test_the_probes_see_labels():
    result = evaluate(small_vae(), digits(), importance_samples=1)
    assert 0.15 < result.labels.knn_accuracy < 1  # random projections of digits keep some of their neighbours
    assert 0.15 < result.labels.linear_probe_accuracy < 1
    assert "5 nearest neighbours" in result.table()


# ---- one name, one number


CODES = {"posterior": partial(CategoricalGroups, classes=8), "latent_dim": 160}


@pytest.mark.filterwarnings("ignore:CollapseDetector")
@pytest.mark.parametrize("options", [{}, CODES], ids=["Gaussian", "categories"])
@pytest.mark.parametrize(("gain", "observations"), [(5, 100), (5, 2048), (60, 100), (60, 2048)])
def test_the_detector_logs_the_numbers_that_test_prints(tmp_path, gain, observations, options):
    vae = small_vae(**options).float()
    with torch.no_grad():
        vae.encoder.layers[-1].weight.mul_(gain)  # so that there is some information, or more than can be measured
    trainer = quiet_trainer(tmp_path, callbacks=[CollapseDetector(observations=observations)])
    trainer.validate(vae, digits(297, 50), verbose=False)
    result = evaluate(vae, digits(297, 64), importance_samples=1, observations=observations)
    logged = trainer.callback_metrics
    assert 0.1 < result.latents.mutual_information <= math.log(observations)
    assert result.latents.mutual_information_saturated == (gain == 60)
    assert logged["latent/mutual_information"] == pytest.approx(result.latents.mutual_information, rel=1e-6)
    assert logged["latent/active_units"] == result.latents.active_units
    assert logged["latent/marginal_kl"] == pytest.approx(result.latents.marginal_kl, rel=1e-5)


# ---- what does not change it


class Shuffled:
    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        whole = {name: torch.cat([batch[name] for batch in self.batches]) for name in ("x", "label", "index")}
        order = torch.randperm(len(whole["x"]), generator=torch.Generator().manual_seed(4))
        for part in order.split(23):
            yield {name: rows[part] for name, rows in whole.items()}


def same(one, other, **tolerance):
    one, other = one.to_dict(), other.to_dict()
    assert one.keys() == other.keys()
    for name, value in one.items():
        if isinstance(value, float) or (isinstance(value, list) and isinstance(value[0], float)):
            assert value == pytest.approx(other[name], **tolerance), name


def test_neither_batches_nor_order_change_a_number(monkeypatch):
    vae = small_vae()
    whole = evaluate(vae, digits(batch_size=297), importance_samples=5, observations=100, samples=50)
    options = {"importance_samples": 5, "observations": 100, "samples": 50}
    same(evaluate(vae, digits(batch_size=10), **options), whole, rel=1e-9, abs=1e-12)
    same(evaluate(vae, Shuffled(list(digits())), **options), whole, rel=1e-9, abs=1e-12)
    monkeypatch.setattr("lightning_vae.evaluation.chunks._NUMBERS_AT_ONCE", {"cpu": 7 * 64})
    same(evaluate(vae, digits(batch_size=297), **options), whole, rel=1e-9, abs=1e-12)


def test_the_model_and_the_random_state_are_left_as_they_were():
    vae = small_vae(partial(Gaussian, variance="optimal"))
    vae.train()
    before, state = torch.get_rng_state(), {name: value.clone() for name, value in vae.state_dict().items()}
    evaluate(vae, digits(64), importance_samples=2)
    assert vae.training
    assert torch.equal(torch.get_rng_state(), before)
    torch.testing.assert_close(dict(vae.state_dict()), state, rtol=0, atol=0)
    assert all(parameter.grad is None for parameter in vae.parameters())


def brightness(vae, batches):
    pixels = [(batch["x"] if isinstance(batch, dict) else batch[0]).double().mean((1, 2, 3)) for batch in batches]
    return torch.cat(pixels).mean()


def measured(batches, **parts):
    options = {"importance_samples": 3, "observations": 64, "samples": 40, "own_metrics": {"brightness": brightness}}
    return evaluate(small_vae(**parts), batches, **options).to_dict()


def unnumbered(rank=0, processes=1):
    """Batches without an index, dealt as DistributedSampler does, with uneven last ones."""
    data = Digits()
    data.setup("test")
    return [(x,) for x in data._splits["test"]["x"][:101][rank::processes].split(16)]


JOINT = {"posterior": FullCovariance, "prior": ONE_GAUSSIAN}


def without_a_share(rank: int, folder: Path) -> None:
    result = evaluate(small_vae(prior=ONE_GAUSSIAN), unnumbered() if rank else [], importance_samples=1)
    (folder / f"{rank}.json").write_text(json.dumps(result.to_dict()))


def test_a_process_without_observations_finds_what_the_others_find(tmp_path):
    in_two_processes(without_a_share, tmp_path)
    one, two = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert one["marginal_kl"] is not None
    assert one == two


def share(rank: int, folder: Path, numbered: bool, parts: dict[str, Any]) -> None:
    # TensorLoader takes its share by itself.
    result = measured(digits(101, 16) if numbered else unnumbered(rank, 2), **parts)
    (folder / f"{rank}.json").write_text(json.dumps(result))


@pytest.mark.parametrize(
    ("numbered", "parts"),
    [(True, {}), (False, {}), (True, JOINT), (True, {"posterior": partial(CategoricalGroups, classes=3)})],
    ids=["numbered", "not numbered", "full covariances", "categories"],
)
def test_two_processes_equal_one(tmp_path, numbered, parts):
    in_two_processes(share, tmp_path, numbered, parts)
    alone = measured(digits(101, 16) if numbered else unnumbered(), **parts)
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found.keys() == alone.keys()
        for name, value in alone.items():
            numbers = isinstance(value, float) or name.endswith("per_dimension")
            assert found[name] == (pytest.approx(value, rel=1e-9, abs=1e-12) if numbers else value), name


def test_the_first_samples_elbo_is_the_one_of_a_test_step():
    vae = small_vae()
    (batch,) = digits(batch_size=297)
    with torch.no_grad():
        terms = vae.eval().elbo_terms(batch["x"], batch["index"])
    result = evaluate(vae, digits(), importance_samples=1)
    assert result.terms.elbo == pytest.approx(float(terms.elbo.mean()), rel=1e-9)


# ---- other models and data


@pytest.mark.parametrize("likelihood", [Gaussian, DiscretisedLogistic])
def test_other_likelihoods_on_batches_without_an_index(likelihood):
    vae, data = small_vae(likelihood), digits(64, 16)
    result = evaluate(vae, [(batch["x"], batch["label"]) for batch in data], importance_samples=2)
    assert math.isfinite(result.likelihood.nll)
    assert math.isnan(result.terms.calibration) == (likelihood is DiscretisedLogistic)  # which claims no variance
    assert result.labels == evaluate(vae, data, importance_samples=2).labels
    assert result.linear_probe_accuracy == result.labels.linear_probe_accuracy > 0.15
    for convert in (torch.Tensor.tolist, torch.Tensor.numpy, lambda label: label[:, None]):
        batches = [{"x": batch["x"], "label": convert(batch["label"])} for batch in data]
        assert evaluate(vae, batches, importance_samples=2).labels == result.labels
    assert math.isnan(evaluate(vae, [batch["x"] for batch in data], importance_samples=2).labels.knn_accuracy)


class LaplaceEncoder(nn.Module):
    def __init__(self, shape, latent_dim):
        super().__init__()
        self.layers = LinearEncoder(shape, latent_dim)

    def forward(self, x):
        mean, log_variance = self.layers(x)
        return td.Laplace(mean, (0.5 * log_variance).exp())


def test_a_posterior_that_is_not_gaussian_leaves_out_what_needs_one():
    vae = small_vae(encoder=LaplaceEncoder)
    result = evaluate(vae, digits(64), importance_samples=2)
    assert math.isfinite(result.likelihood.nll)
    written = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert written["mutual_information"] is written["marginal_kl"] is written["implied_beta"] is None
    assert "mutual information" not in result.table()
    assert "nan" not in result.table()


def test_a_joint_rate_gets_the_verdict_of_the_same_model_with_parts(x):
    with_parts, joint = (optimal_linear_vae(x, 4, 1.0, **prior) for prior in ({}, {"prior": ONE_GAUSSIAN}))
    with torch.no_grad():  # the first dimension is one of the inactive ones
        for vae in (with_parts, joint):
            for weights in (vae.encoder.mean.weight, vae.encoder.log_variance, vae.decoder.map.weight.T):
                weights.copy_(weights.flip(0))
    one, two = (evaluate(vae, loader(x), importance_samples=1) for vae in (with_parts, joint))
    assert one.active_units == two.active_units == 3
    assert one.latents.active_rate == pytest.approx(two.latents.active_rate, abs=0.05)
    assert one.verdict == two.verdict == "balanced"
    assert "3 of 4 dimensions are active" in " ".join(two.symptoms)
    with torch.no_grad():
        joint.encoder.mean.weight.zero_()
    symptom = evaluate(joint, loader(x), importance_samples=1).symptoms[0]
    assert symptom.startswith("latent space: 0 of 4 dimensions are active, with a rate of ")


@pytest.mark.filterwarnings("ignore:CollapseDetector")
@pytest.mark.parametrize("components", [1, 5])
def test_the_scale_of_a_joint_prior_changes_no_number(tmp_path, x, components):
    torch.manual_seed(0)
    vae = optimal_linear_vae(x, 4, VARIANCE, prior=partial(MixturePrior, components=components))
    small, scale = copy.deepcopy(vae), 0.03
    with torch.no_grad():  # the same model, with other units of z
        small.encoder.mean.weight.mul_(scale)
        small.encoder.log_variance.add_(2 * math.log(scale))
        small.decoder.map.weight.div_(scale)
        small.prior_module.loc.mul_(scale)
        small.prior_module.log_scale.add_(math.log(scale))
    one, two = (evaluate(model, loader(x), importance_samples=1) for model in (vae, small))
    assert two.active_units == 4
    assert two.scalars() == pytest.approx(one.scalars(), rel=1e-6, abs=1e-9, nan_ok=True)
    assert two.variance_per_dimension == pytest.approx(one.variance_per_dimension)
    if components == 1:  # the prior is N(0, I)
        assert one.latents.aggregate_variance_mean == pytest.approx(1, abs=1e-6)
    trainer = quiet_trainer(tmp_path, callbacks=[CollapseDetector()])
    trainer.validate(small, loader(x), verbose=False)
    assert trainer.callback_metrics["latent/active_units"] == 4
    assert trainer.callback_metrics["latent/marginal_kl"] == pytest.approx(two.latents.marginal_kl, rel=1e-4)


class Whole(nn.Module):
    """The linear encoder for a posterior with a full covariance, whose factor starts diagonal."""

    def __init__(self, shape, latent_dim, outputs):
        super().__init__()
        self.diagonal = LinearEncoder(shape, latent_dim)
        self.below = nn.Parameter(torch.zeros(outputs - 2 * latent_dim))

    def forward(self, x):
        mean, log_variance = self.diagonal(x)
        return torch.cat([mean, log_variance, self.below.expand(len(x), -1)], dim=1)


@pytest.mark.parametrize("prior", [StandardNormal, ONE_GAUSSIAN])
def test_a_diagonal_covariance_changes_no_number(x, prior):
    vae = optimal_linear_vae(x, 4, VARIANCE, beta=2.0, prior=prior)
    likelihood, parts = partial(Gaussian, variance=VARIANCE), {"encoder": Whole, "decoder": LinearDecoder}
    whole = VAE((6,), None, 4, likelihood=likelihood, beta=2.0, posterior=FullCovariance, prior=prior, **parts).double()
    for part in ("likelihood", "decoder", "prior_module"):
        getattr(whole, part).load_state_dict(getattr(vae, part).state_dict())
    whole.encoder.diagonal.load_state_dict(vae.encoder.state_dict())
    one, two = (evaluate(model, loader(x), importance_samples=2) for model in (vae, whole))
    numbers = {name: value for name, value in one.scalars().items() if name != "nll_active_only"}
    assert two.implied_beta == pytest.approx(2.0, rel=0.05)
    assert two.latents.mutual_information > 1
    assert {name: two.scalars()[name] for name in numbers} == pytest.approx(numbers, rel=1e-5, abs=1e-9, nan_ok=True)


class LaplacePrior(Prior):
    def forward(self, condition=None):
        return td.Laplace(torch.zeros(self.latent_dim).double(), 1.0)


@pytest.mark.parametrize("beta", [0.5, 1.0, 2.0])
def test_the_implied_beta_under_a_prior_without_a_closed_form(x, beta):
    joint = optimal_linear_vae(x, 4, VARIANCE, beta, prior=ONE_GAUSSIAN)
    terms = evaluate(joint, loader(x), importance_samples=1).terms
    assert terms.implied_beta == pytest.approx(beta, rel=0.05)
    assert abs(terms.implied_beta - beta) < 4 * terms.implied_beta_error


def test_the_slope_of_the_rate_is_that_of_its_parts(x):
    # Under a Laplace prior: d/dlog c of E|z| is that of a folded normal, 2 s phi(m / s), less 1 for the entropy.
    vae = optimal_linear_vae(x, 4, VARIANCE, prior=LaplacePrior).requires_grad_(False)
    observations = vae.observe(x)
    posterior = vae.encode(observations)
    target, prior = Target.of(observations), vae.prior_given(None)
    found = [*_slopes(vae, target, posterior, prior, observations.index)][1].mean()
    density = td.Normal(0.0, 1.0).log_prob(posterior.mean / posterior.stddev).exp()
    exact = (2 * posterior.stddev * density - 1).sum(1).mean()
    assert found == pytest.approx(float(exact), abs=0.02)


def test_a_vamp_prior_has_no_implied_beta():
    vae = small_vae(prior=partial(VampPrior, components=5, pseudo_inputs="learned"))
    result = evaluate(vae, digits(64), importance_samples=1)
    assert math.isnan(result.implied_beta)
    assert math.isfinite(result.aggregate_variance_mean)


def test_of_categories_groups_are_active():
    vae = small_vae(posterior=partial(CategoricalGroups, classes=4), latent_dim=12)
    with torch.no_grad():
        last = vae.encoder.layers[-1]
        last.weight[:4].zero_()  # the first of the three groups tells nothing of x, the others do
        last.weight[4:].mul_(20)
    result = evaluate(vae, digits(128), importance_samples=1)
    means = torch.cat([vae.encode(vae.observe(batch)).mean for batch in digits(128)])
    spread = means.var(0, correction=0).sum(1)
    assert result.variance_per_dimension == pytest.approx(spread.tolist())
    assert result.active_units == 2
    assert result.latents.active_rate == pytest.approx(sum(result.rate_per_dimension[1:]))
    assert "active units              2 of 3" in result.table()
    assert not {"aggregate variance", "posterior width", "nan"} & {*re.split("  +|\n", result.table())}
    assert all("posterior width" not in symptom for symptom in result.symptoms)


def test_saturated_codes_have_no_total_correlation():
    vae = small_vae(**CODES)
    with torch.no_grad():
        vae.encoder.layers[-1].weight.mul_(60)
    table = evaluate(vae, digits(297), importance_samples=1).table()
    assert "mutual information        >= log M = 5.69" in table
    assert "marginal KL               >= " in table
    assert "total correlation" not in table


@pytest.mark.parametrize("prior", [StandardNormal, LearnedNormal, ONE_GAUSSIAN])
def test_a_full_covariance_has_the_information_of_its_covariances(prior):
    vae = small_vae(posterior=FullCovariance, prior=prior)
    with torch.no_grad():
        vae.encoder.layers[-1].weight.mul_(20)
        vae.encoder.layers[-1].bias[6:].fill_(0.5)  # below the diagonal
        if prior is LearnedNormal:
            vae.prior_module.loc.fill_(0.3)
            vae.prior_module.log_scale.copy_(torch.tensor([0.5, -0.5, 0.0]))
    found = evaluate(vae, digits(297), importance_samples=1).latents
    posteriors = [vae.encode(vae.observe(batch)) for batch in digits(297)]
    mean = torch.cat([each.mean for each in posteriors]).detach()
    factors = torch.cat([each.scale_tril for each in posteriors]).detach()
    p = vae.prior
    if prior is LearnedNormal:
        mean = (mean - p.loc) / p.scale
        factors = factors / p.scale[:, None]
    order = random_keys(torch.arange(297)).argsort()
    rates = None
    if prior is ONE_GAUSSIAN:
        rates = torch.full((297,), float(found.rate_per_dimension[0]))
    expected = mixture_estimates(mean[order].detach(), rates=rates, scale_tril=factors[order].detach())
    assert expected.lower > 1
    assert found.mutual_information == pytest.approx(float(expected.lower), abs=1e-6)
    assert found.mutual_information_upper == pytest.approx(float(expected.upper), abs=1e-6)
    assert found.marginal_kl == pytest.approx(float(expected.marginal_kl), rel=1e-6)
    assert found.total_correlation == pytest.approx(float(expected.total_correlation), abs=1e-6)


@pytest.mark.parametrize("k", [16, 80])
def test_narrow_posteriors_with_a_full_covariance_are_measured_up_to_64_dimensions(k):
    vae = small_vae(posterior=FullCovariance, latent_dim=k).float()
    with torch.no_grad():
        vae.encoder.layers[-1].weight.mul_(30)  # a condition that a covariance has no Cholesky factor at
    latents = evaluate(vae, digits(100), importance_samples=1).latents
    assert math.isnan(latents.mutual_information) == (k == 80)
    assert latents.mutual_information_saturated == (k == 16)


def test_a_full_covariance_of_one_dimension_is_a_variance():
    found = []
    for head in (DiagonalGaussian, FullCovariance):
        vae = small_vae(posterior=head, latent_dim=1)
        with torch.no_grad():
            vae.encoder.layers[-1].weight.mul_(30)
        found.append(evaluate(vae, digits(100), importance_samples=1).scalars())
    assert found[0]["mutual_information"] > 0.5
    assert found[0] == pytest.approx(found[1], nan_ok=True)


class Twice(PosteriorHead):
    """A joint posterior of one's own: a mixture of two Gaussians."""

    is_joint = True

    def __init__(self, latent_dim):
        super().__init__(latent_dim)
        self.parts = 1

    def forward(self, output):
        mean, log_variance = self._columns(output).chunk(2, dim=1)
        both = td.Normal(torch.stack([mean, -mean], 1), (0.5 * log_variance).exp()[:, None])
        return td.MixtureSameFamily(td.Categorical(torch.ones(len(mean), 2)), td.Independent(both, 1))


def test_a_turn_of_the_latents_changes_no_number(x):
    # Other axes of the latents correlate the posteriors: the factor below the diagonal counts.
    vae = optimal_linear_vae(x, 4, VARIANCE, beta=2.0)
    turned = VAE(
        (6,), None, 4, encoder=Whole, decoder=LinearDecoder, likelihood=partial(Gaussian, variance=VARIANCE), beta=2.0,
        posterior=FullCovariance,
    ).double()  # fmt: skip
    turn = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))).Q
    with torch.no_grad():
        factor = torch.linalg.cholesky(turn @ vae.encoder.log_variance.exp().diag() @ turn.T)
        turned.encoder.diagonal.mean.weight.copy_(turn @ vae.encoder.mean.weight)
        turned.encoder.diagonal.mean.bias.zero_()
        turned.encoder.diagonal.log_variance.copy_(2 * factor.diagonal().log())
        turned.encoder.below.copy_(factor[tuple(torch.tril_indices(4, 4, -1))])
        turned.decoder.map.weight.copy_(vae.decoder.map.weight @ turn.T)
        turned.decoder.map.bias.zero_()
    one, two = (evaluate(model, loader(x), importance_samples=2) for model in (vae, turned))
    assert two.implied_beta == pytest.approx(2.0, rel=0.05)
    assert two.rate == pytest.approx(one.rate)
    assert two.nll == pytest.approx(one.nll, abs=0.02)
    for name in ("mutual_information", "mutual_information_upper", "marginal_kl"):
        assert getattr(two, name) == pytest.approx(getattr(one, name), abs=0.05)


def test_a_joint_posterior_of_ones_own_has_no_information():
    latents = evaluate(small_vae(posterior=Twice), digits(100), importance_samples=1).latents
    assert math.isnan(latents.mutual_information)
    assert latents.active_units is not None


def test_one_latent_dimension_and_few_observations():
    torch.manual_seed(0)
    vae = VAE((2,), latent_dim=1, encoder=LinearEncoder, decoder=LinearDecoder)
    result = evaluate(vae, [torch.randn(12, 2)], importance_samples=2)
    assert (len(result.latents.rate_per_dimension), result.observations) == (1, 12)


def test_own_metrics_are_called_with_the_model_and_the_loader():
    own = {"brightness": lambda vae, batches: sum(float(batch["x"].sum()) for batch in batches) / vae.latent_dim}
    result = evaluate(small_vae(), digits(64), importance_samples=1, own_metrics=own)
    expected = sum(float(batch["x"].sum()) for batch in digits(64)) / 3
    assert result.own == {"brightness": expected}
    assert result.to_dict()["brightness"] == result.scalars()["brightness"] == expected
    assert "brightness" in result.table()


def test_the_dictionary_is_flat_and_has_what_a_sweep_reads():
    written = evaluate(small_vae(), digits(64), importance_samples=1).to_dict()
    names = """observations latent_dim beta elbo rate distortion nll nll_error importance_samples
        effective_sample_size active_units mutual_information mutual_information_upper
        mutual_information_saturated marginal_kl marginal_kl_lower total_correlation posterior_width
        aggregate_mean_square aggregate_variance_mean implied_beta implied_beta_error calibration shuffled_gap
        nll_active_only sample_distance interpolation_distance ex_post_distance knn_accuracy linear_probe_accuracy
        condition_r2 verdict
        symptoms advice rate_per_dimension variance_per_dimension"""
    assert set(names.split()) < written.keys()
    assert written.keys() == Evaluation.names()
    assert not any(isinstance(value, dict) for value in written.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"importance_samples": 0}, "`importance_samples` must be at least 1, a whole number, got 0"),
        ({"importance_samples": 2.5}, "`importance_samples` must be at least 1, a whole number, got 2.5"),
        ({"importance_samples": True}, "`importance_samples` must be at least 1, a whole number, got True"),
        ({"observations": 9}, "`observations` must be at least 10, a whole number, got 9"),
        ({"samples": 2}, "`samples` must be at least 10, a whole number, got 2"),
        ({"own_metrics": {"nll": lambda vae, batches: 0.0}}, r"already taken, got \['nll'\]"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        evaluate(small_vae(), digits(64), **options)


def test_another_model_and_a_metric_that_gives_no_number():
    with pytest.raises(TypeError, match=r"must be a lightning_vae.VAE, got Linear.*lightning_vae.estimators"):
        evaluate(torch.nn.Linear(2, 2), digits(64))
    with pytest.raises(TypeError, match="The metric 'mine' must return one number, got a dict"):
        evaluate(small_vae(), digits(64), importance_samples=1, own_metrics={"mine": lambda vae, batches: {}})


COMPARED = {"mutual_information", "mutual_information_upper", "marginal_kl", "marginal_kl_lower",
            "total_correlation", "sample_distance",
            "interpolation_distance", "ex_post_distance", "knn_accuracy", "linear_probe_accuracy", "condition_r2",
            "verdict"}  # fmt: skip


def test_few_observations_get_the_numbers_that_do_not_compare_them(x):
    vae, few = optimal_linear_vae(x, 4, VARIANCE), x[:6]
    result = evaluate(vae, [(few, torch.arange(6) % 2)], importance_samples=3)
    assert {name for name, value in result.to_dict().items() if value is None} == COMPARED
    covariance = vae.decoder.map.weight @ vae.decoder.map.weight.T + VARIANCE * torch.eye(6)
    exact = td.MultivariateNormal(torch.zeros(6).double(), covariance.detach()).log_prob(few.double())
    assert result.nll == pytest.approx(-float(exact.mean()), abs=1e-6)
    means = vae.encode(few).mean.double()
    assert result.variance_per_dimension == pytest.approx(means.var(dim=0, correction=0).tolist(), rel=1e-5)
    table = result.table()
    assert table.count("too few") == 1
    assert "another, 6:" in " ".join(table.split())
    assert "Verdict: none" in table
    assert "nan" not in table


def test_shuffled_latents_are_never_an_observations_own():
    vae = small_vae()
    (batch,) = digits(2, 2)
    with torch.no_grad():
        observations = vae.observe(batch)
        z = sample_by_index(vae.encode(observations), observations.index)
        own, swapped = (-vae.decode(each).log_prob(observations.observed).mean() for each in (z, z.flip(0)))
    result = evaluate(vae, digits(2, 2), importance_samples=1)
    assert result.shuffled_gap == pytest.approx(float(swapped - own), rel=1e-5)


def test_one_observation_has_no_spread():
    result = evaluate(small_vae(), digits(1), importance_samples=3)
    nothing = {name for name, value in result.to_dict().items() if value is None}
    assert nothing >= COMPARED | {"nll_error", "active_units", "nll_active_only", "shuffled_gap"}
    assert math.isfinite(result.nll)
    assert "nan" not in result.table()


@pytest.mark.parametrize("batch_size", [4, 40])
def test_data_without_variance_get_no_verdict(batch_size):
    vae, x = VAE((2,), latent_dim=2), torch.full((40, 2), 0.3)
    result = evaluate(vae, loader(x, batch_size), importance_samples=1)
    assert result.assessment.verdict is None
    assert "the data have no variance: all observations are equal" in " ".join(result.table().split())
    for row in (0, 13, 27, 39):  # not all of them are among the samples
        varied = x.clone()
        varied[row, 0] = 0.4
        result = evaluate(vae, loader(varied, batch_size), importance_samples=1, samples=10)
        assert result.assessment.verdict is not None
    sampled = {int(row) // 4 for row in random_keys(torch.arange(40)).argsort()[:10]}
    other = min(set(range(10)) - sampled)  # a batch of four, of which none is among the samples
    varied = x.clone()
    varied[4 * other : 4 * other + 4] = 0.4
    result = evaluate(vae, loader(varied, batch_size), importance_samples=1, samples=10)
    assert result.assessment.verdict is not None


def test_no_observations():
    with pytest.raises(ValueError, match="`loader` is empty"):
        evaluate(small_vae(), [])


class Stream(IterableDataset):
    """Vectors without a length: those of a tensor, from the start at each reading, or only once."""

    def __init__(self, x, once=False):
        self.x, self.once, self.rest = x, once, iter(x)

    def __iter__(self):
        return self.rest if self.once else iter(self.x)


def test_a_stream_without_a_length_is_read_to_its_end(x):
    vae = optimal_linear_vae(x[:300], 4, VARIANCE)
    options = {"importance_samples": 2, "observations": 64, "samples": 64}
    result = evaluate(vae, DataLoader(Stream(x[:300]), 64), **options)
    same(result, evaluate(vae, loader(x[:300]), **options), rel=1e-9, abs=1e-12)
    with pytest.raises(ValueError, match="gave 300 observations at the first reading and 0 at the second"):
        evaluate(vae, DataLoader(Stream(x[:300], once=True), 64), **options)


def test_an_iterator_is_refused(x):
    with pytest.raises(ValueError, match="`loader` is read twice"):
        evaluate(optimal_linear_vae(x, 4, VARIANCE), iter(loader(x)))


def test_a_model_or_data_with_nan_are_no_balanced_model(x):
    vae = optimal_linear_vae(x, 4, VARIANCE)
    with pytest.raises(ValueError, match="data must be finite"):
        evaluate(vae, [torch.where(torch.arange(6) == 2, math.nan, x)], importance_samples=1)
    with torch.no_grad():
        vae.decoder.map.bias[0] = math.nan
    with pytest.raises(ValueError, match="distortion is nan"):
        evaluate(vae, loader(x), importance_samples=1)
    with torch.no_grad():
        vae.encoder.mean.bias[0] = math.nan
    with pytest.raises(ValueError, match="posteriors are not finite"):
        evaluate(vae, loader(x), importance_samples=1)


def test_labels_of_any_integers_count_and_numbers_are_no_classes(x):
    vae, x = optimal_linear_vae(x, 4, VARIANCE), x[:300]
    index, sign = torch.arange(300), (x[:, 0] > 0).long()
    small, large = (
        evaluate(vae, [{"x": x, "index": index, "label": label}], importance_samples=1)
        for label in (sign, sign * 10**9 + 16_777_217)
    )
    assert small.labels.knn_accuracy == large.labels.knn_accuracy > 0.8
    assert small.labels.linear_probe_accuracy == large.labels.linear_probe_accuracy > 0.8
    with pytest.warns(UserWarning, match="The labels are not classes"):
        number = evaluate(vae, [{"x": x, "index": index.int(), "label": x[:, 0]}], importance_samples=1)
    assert math.isnan(number.labels.knn_accuracy)


def three_clusters():
    """Three clusters of vectors of twenty each, of which two each have the label of the next cluster."""
    label = torch.arange(60) % 3
    x = 3.0 * label[:, None] + 0.1 * torch.randn(60, 2, generator=torch.Generator().manual_seed(0))
    label[:6] = (label[:6] + 1) % 3
    torch.manual_seed(0)
    return VAE((2,), latent_dim=2, encoder=LinearEncoder, decoder=LinearDecoder), x, label


NAMES = ("sandal", "boot", "shirt")


@pytest.mark.parametrize(
    "items",
    [
        lambda x, label: (x, label),
        lambda x, label: (x, label[None]),  # batches of shape (B, 1)
        lambda x, label: {"x": x, "label": label[None, None]},
        lambda x, label: (x, NAMES[label]),
        lambda x, label: {"x": x, "label": NAMES[label]},
        lambda x, label: {"x": x, "y": label[None]},
    ],
)
def test_the_probes_find_classes_beside_the_observations(items):
    """Case `labels_beside_the_observations`."""
    vae, x, label = three_clusters()
    data = [items(*pair) for pair in zip(x, label, strict=True)]
    subset = torch.utils.data.random_split(data, [60, 0])[0]  # type: ignore[arg-type, var-annotated]
    result = evaluate(vae, DataLoader(subset, batch_size=16), importance_samples=1)
    assert result.labels.knn_accuracy == pytest.approx(54 / 60)
    labels = evaluate(vae, [(x, label)], importance_samples=1).labels
    assert result.labels.linear_probe_accuracy == pytest.approx(labels.linear_probe_accuracy)


@pytest.mark.parametrize(
    ("label", "given"),
    [
        (torch.rand(60), r"torch.float32 of shape \(60,\)"),
        (torch.zeros(60, 4).int(), "torch.int32"),
        ([None] * 60, "None"),
    ],
)
def test_labels_that_are_no_classes_are_said_once(label, given):
    vae, x, _ = three_clusters()
    batch = {"x": x, "label": label}
    with pytest.warns(UserWarning, match=f"The labels are not classes.*got .*{given}") as said:
        result = evaluate(vae, [batch, batch], importance_samples=1)
    assert math.isnan(result.labels.knn_accuracy)
    assert len(said) == 1


@pytest.mark.parametrize("label", [{"digit": torch.arange(300)}, 7])
def test_labels_that_are_none_of_the_observations_do_not_stop_an_evaluation(x, label):
    batch = {"x": x[:300], "index": torch.arange(300), "label": label}
    result = evaluate(optimal_linear_vae(x[:300], 4, VARIANCE), [batch], importance_samples=1)
    assert math.isnan(result.labels.knn_accuracy)


def test_observations_that_repeat_are_no_sign_of_poor_samples():
    x = torch.randn(500, 12, generator=torch.Generator().manual_seed(0))
    vae = optimal_linear_vae(x, 12, 0.05)
    once, twice = (evaluate(vae, [data], importance_samples=1) for data in (x, torch.cat([x, x])))
    assert once.assessment.verdict == twice.assessment.verdict == "balanced"
    assert twice.generation.sample_distance == pytest.approx(once.generation.sample_distance, abs=0.05)
    assert twice.latents.mutual_information_upper == pytest.approx(once.latents.mutual_information_upper, abs=0.3)


class NoMoments(LaplaceEncoder):
    def forward(self, x):
        return td.TransformedDistribution(super().forward(x), [td.transforms.AffineTransform(0.0, 1.0)])


def test_a_posterior_without_moments_is_refused():
    with pytest.raises(ValueError, match="a mean and a variance, got TransformedDistribution"):
        evaluate(small_vae(encoder=NoMoments), digits(64))
