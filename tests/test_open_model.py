"""Priors, posterior heads and likelihoods in a model that is fitted, evaluated, saved and sampled from."""

from functools import partial

import pytest
import torch
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_vae import (
    VAE,
    BatchNormMeans,
    Bernoulli,
    CategoricalGroups,
    Columns,
    Condition,
    ConditionalNormal,
    ConvDecoder,
    ConvEncoder,
    DiagonalGaussian,
    FullCovariance,
    Gaussian,
    Laplace,
    LearnedNormal,
    MixturePrior,
    Poisson,
    Term,
    UniformCategorical,
    VampPrior,
    evaluate,
    score,
)
from lightning_vae.callbacks import CollapseDetector, FreeBits, LatentSpace, Pictures
from lightning_vae.datamodules import Digits, TensorLoader
from lightning_vae.estimators import ExPostDensity
from tests.doubles import quiet_trainer
from tests.processes import in_two_processes

MODELS = {
    "a learned normal": {"prior": LearnedNormal},
    "p(z|c)": {"prior": ConditionalNormal, "condition": partial(Condition, classes=10)},
    "a mixture": {"prior": partial(MixturePrior, components=5)},
    "pseudo-inputs": {"prior": partial(VampPrior, components=7)},
    "pseudo-inputs from the data": {"prior": partial(VampPrior, components=7, pseudo_inputs="data")},
    "pseudo-inputs and their classes": {
        "prior": partial(VampPrior, components=7, pseudo_inputs="learned"),
        "condition": partial(Condition, classes=10, embedding=3),
    },
    "a bounded log-variance": {"posterior": partial(DiagonalGaussian, bound=5.0)},
    "normalised means": {"posterior": BatchNormMeans},
    "a full covariance": {"posterior": FullCovariance},
    "a full covariance under a mixture": {"posterior": FullCovariance, "prior": partial(MixturePrior, components=5)},
    "categories": {"posterior": partial(CategoricalGroups, classes=4), "latent_dim": 8},
    "a likelihood with two outputs": {"likelihood": partial(Gaussian, variance="per_pixel")},
    "heavy tails given a class": {"likelihood": Laplace, "condition": partial(Condition, classes=10, embedding=3)},
}


class Ink(Term):
    """A term of one's own: the mean squared difference in ink between the data and their reconstructions."""

    def forward(self, step):
        shown, drawn = step.observations.observed, step.likelihood.mean
        return (shown.flatten(1).sum(1) - drawn.flatten(1).sum(1)).square().mean()


SHARED = MODELS | {
    "an added term": {"terms": {"ink": partial(Ink, weight=0.01)}},
    "three samples of each posterior": {"importance_samples": 3},
}


class Record(Logger):
    """Keeps the names of the pictures that it gets."""

    name, version = "record", 0

    def __init__(self):
        super().__init__()
        self.images = set()

    def log_hyperparams(self, *_, **__):
        pass

    def log_metrics(self, *_, **__):
        pass

    def log_image(self, key, images, step=None):
        self.images.add(key)


@pytest.mark.parametrize("name", MODELS)
def test_each_part_is_drawn(tmp_path, name):
    vae, logger = model(name), Record()
    trainer = quiet_trainer(
        tmp_path, max_epochs=1, limit_train_batches=2, callbacks=[Pictures(), LatentSpace()], logger=logger
    )
    trainer.fit(vae, Digits(batch_size=100))
    assert {"images/reconstructions", "images/samples", "images/traversals", "images/interpolations"} <= logger.images
    assert ("images/counterfactuals" in logger.images) == (vae.condition is not None)
    assert {tag for tag in logger.images if tag.startswith("latent/")}


def model(name, **options):
    torch.manual_seed(0)
    options = {"latent_dim": 3, "likelihood": Bernoulli, **SHARED[name], **options}
    return VAE((1, 8, 8), 17, **options)


@pytest.mark.parametrize("name", MODELS)
def test_each_part_is_fitted_evaluated_saved_and_sampled_from(tmp_path, name):
    vae, data = model(name), Digits(batch_size=100)
    trainer = quiet_trainer(tmp_path, max_epochs=1, limit_train_batches=4, callbacks=[CollapseDetector(warmup=9)])
    trainer.fit(vae, data)
    found = trainer.callback_metrics
    assert torch.isfinite(found["val/loss"])
    assert float(found["latent/rate"]) == pytest.approx(float(found["val/rate"]), rel=1e-4, abs=1e-5)

    [tested] = trainer.test(vae, data, verbose=False)
    batches = list(data.test_dataloader())
    elbo = torch.cat([score(vae, vae.observe(batch))["elbo"] for batch in batches]).mean()
    assert float(elbo) == pytest.approx(tested["test/elbo"], rel=1e-5)
    result = evaluate(vae, batches, importance_samples=5)
    assert result.nll < -result.elbo + 0.5  # the bound of five samples is tighter, but for their noise

    trainer.save_checkpoint(tmp_path / "a.ckpt")
    loaded = VAE.load_from_checkpoint(tmp_path / "a.ckpt").eval()
    vae.eval()
    condition = {} if vae.condition is None else {"condition": 3}
    torch.manual_seed(1)
    samples = vae.sample(5, **condition)
    torch.manual_seed(1)
    torch.testing.assert_close(loaded.sample(5, **condition), samples)
    assert samples.shape == (5, 1, 8, 8)
    observations = vae.observe(next(iter(data.test_dataloader())))
    torch.testing.assert_close(loaded.reconstruct(observations), vae.reconstruct(observations))


def share(rank, folder, name):
    vae = model(name)
    trainer = quiet_trainer(folder, devices=2, strategy="ddp", max_epochs=1, limit_train_batches=3)
    trainer.fit(vae, Digits(batch_size=25))
    metrics = {key: float(value) for key, value in trainer.callback_metrics.items() if key.startswith("val/")}
    torch.save([metrics, vae.state_dict()], folder / f"{rank}.pt")


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", SHARED)
def test_two_processes_train_the_same_weights_and_validate_as_one(tmp_path, name):
    in_two_processes(share, tmp_path, name)
    (metrics, weights), (others, other_weights) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert metrics == pytest.approx(others, rel=1e-6)
    vae = model(name)
    trained = set(dict(vae.named_parameters()))
    assert any(not torch.equal(weights[key], vae.state_dict()[key]) for key in trained)
    for key in trained:
        assert torch.equal(weights[key], other_weights[key])
    vae.load_state_dict(weights)
    [alone] = quiet_trainer(tmp_path).validate(vae, Digits(batch_size=41), verbose=False)
    assert metrics == pytest.approx(alone, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("name", ["a mixture", "pseudo-inputs", "a full covariance"])
def test_a_floor_per_dimension_needs_parts(tmp_path, name):
    with pytest.raises(ValueError, match="`free_bits_per` must be 'whole' under a joint prior or posterior"):
        model(name, free_bits=0.1)
    vae = model(name, free_bits=2.0, free_bits_per="whole")
    trainer = quiet_trainer(tmp_path, max_epochs=1, limit_train_batches=2)
    trainer.fit(vae, Digits(batch_size=100))
    assert trainer.callback_metrics["val/floored_rate"] >= 2
    with pytest.raises(MisconfigurationException, match="no parts for the dimensions"):
        quiet_trainer(tmp_path, max_epochs=1, callbacks=[FreeBits(0.1)]).fit(model(name), Digits())
    quiet_trainer(tmp_path, max_steps=1, callbacks=[FreeBits(0.1, per="whole")]).fit(model(name), Digits())


def test_the_rate_under_all_observations_as_pseudo_inputs_is_the_mutual_information():
    torch.manual_seed(0)
    vae = VAE((5,), latent_dim=2, prior=partial(VampPrior, components=40, pseudo_inputs="data")).double().eval()
    x = torch.randn(40, 5).double()
    vae.prior_module.start(x)
    observations = vae.observe({"x": x, "index": torch.arange(40)})
    rate = vae.elbo_terms(observations).rate
    from lightning_vae.noise import sample_by_index

    posterior = vae.encode(observations)
    z = sample_by_index(posterior, observations.index)
    each = posterior.log_prob(z[:, None]).sum(2)
    expected = posterior.log_prob(z).sum(1) - (each.logsumexp(1) - torch.tensor(40.0).double().log())
    torch.testing.assert_close(rate, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("pseudo_inputs", ["data", "both", "learned"])
def test_pseudo_inputs_have_the_conditions_of_observations(tmp_path, pseudo_inputs):
    condition = partial(Condition, classes=3, covariates=2, embedding=2)
    prior = partial(VampPrior, components=8, pseudo_inputs=pseudo_inputs)
    vae = VAE((5,), latent_dim=2, prior=prior, condition=condition, likelihood=partial(Gaussian, variance=1.0))
    batch = {"x": torch.randn(8, 5), "label": torch.arange(8) % 3, "condition": 100 * torch.randn(8, 2)}
    batch["index"] = torch.arange(8)
    vae.condition.set_scale(torch.tensor([50.0, 0.0]), torch.tensor([100.0, 100.0]))
    quiet_trainer(tmp_path, max_steps=3).fit(vae, TensorLoader(batch, 4))
    columns = torch.cat([batch["label"][:, None], batch["condition"]], dim=1)
    assert torch.equal(vae.prior_module.conditions, columns)
    assert torch.equal(vae.prior_module.inputs, batch["x"]) == (pseudo_inputs == "data")

    # The components are the model's own posteriors, with what the condition's embedding has learned.
    vae.eval()
    observations = vae.observe({**batch, "x": vae.prior_module.inputs.detach()})
    expected, components = vae.encode(observations), vae.prior.component_distribution.base_dist
    torch.testing.assert_close(components.loc, expected.loc)
    torch.testing.assert_close(components.scale, expected.scale)
    codes = vae.condition.codes
    [gradient] = torch.autograd.grad(vae.prior.log_prob(torch.zeros(2)), codes)
    assert gradient.any()

    loaded = VAE(
        (5,), latent_dim=2, prior=prior, condition=condition, likelihood=partial(Gaussian, variance=1.0)
    ).eval()
    loaded.load_state_dict(vae.state_dict())
    z = torch.randn(6, 2)
    assert torch.equal(loaded.prior.log_prob(z), vae.prior.log_prob(z))


def test_pseudo_inputs_are_what_the_encoder_sees_of_a_table(tmp_path):
    columns = partial(Columns, kinds=["numeric", "count", 3])
    prior = partial(VampPrior, components=12, pseudo_inputs="data")
    vae = VAE((3,), latent_dim=2, prior=prior, likelihood=columns)
    vae.likelihood.set_scale([4000.0, 0, 0], [300.0, 1, 1])
    x = torch.stack([4000 + 300 * torch.randn(12), torch.arange(12.0) * 5, torch.arange(12.0) % 3], dim=1)
    mask = torch.rand(12, 3) < 0.7
    batch = {"x": x.where(mask, 0), "mask": mask, "index": torch.arange(12)}
    quiet_trainer(tmp_path, max_steps=2).fit(vae, TensorLoader(batch, 12))
    vae.eval()
    expected, components = vae.encode(vae.observe(batch)), vae.prior.component_distribution.base_dist
    torch.testing.assert_close(components.loc, expected.loc)
    torch.testing.assert_close(components.scale, expected.scale)


@pytest.mark.parametrize("pseudo_inputs", ["learned", "both"])
def test_pseudo_inputs_of_counts_are_learned(tmp_path, pseudo_inputs):
    torch.manual_seed(0)
    prior = partial(VampPrior, components=4, pseudo_inputs=pseudo_inputs)
    vae = VAE((3,), latent_dim=2, prior=prior, likelihood=Poisson)
    batch = {"x": torch.poisson(torch.full((8, 3), 1000.0)), "index": torch.arange(8)}
    quiet_trainer(tmp_path, max_epochs=20).fit(vae, TensorLoader(batch, 8))
    assert vae.prior_module.inputs.isfinite().all()
    if pseudo_inputs == "both":  # they start at the logarithms, which an optimizer's steps can move
        moved = vae.prior_module.inputs.detach() - batch["x"][:4].log1p()
        assert 1e-3 < float(moved.abs().mean()) < 0.1


def test_a_prior_that_starts_without_its_conditions_says_so():
    vae = VAE((5,), latent_dim=2, prior=partial(VampPrior, components=4), condition=partial(Condition, classes=3))
    for condition, given in ((None, "None"), (torch.zeros(4, 2), r"\(4, 2\)")):
        with pytest.raises(ValueError, match=rf"with their conditions, of shape \(4, 1\), got {given}"):
            vae.prior_module.start(torch.randn(4, 5), condition)


def test_a_copy_of_a_model_with_pseudo_inputs_encodes_them_itself():
    import copy

    vae = model("pseudo-inputs").eval()
    other = copy.deepcopy(vae)
    with torch.no_grad():
        for parameter in other.encoder.parameters():
            parameter.add_(1)
    z = torch.zeros(1, 3)
    assert not torch.allclose(vae.prior.log_prob(z), other.prior.log_prob(z))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prior": ConditionalNormal}, "`condition_dim` must be at least 1"),
        (
            {"posterior": partial(CategoricalGroups, classes=2), "prior": LearnedNormal},
            "got no and 2 classes. Leave `prior` out, or choose UniformCategorical with `classes` 2",
        ),
        (
            {"prior": partial(UniformCategorical, classes=2)},
            "got 2 and no classes. Leave `prior` out, or choose CategoricalGroups as `posterior`",
        ),
        ({"posterior": partial(CategoricalGroups, classes=3)}, "`classes` must divide `latent_dim`"),
        ({"prior": torch.nn.Linear(1, 1)}, "`prior` must be a lightning_vae.Prior"),
        (
            {"prior": ConditionalNormal(4, 3), "condition": partial(Condition, classes=10)},
            "`prior` has a `condition_dim` of 3, but the model's condition c has 10 columns",
        ),
        ({"prior": ConditionalNormal(4, 3)}, "`prior` has a `condition_dim` of 3, but the model has no condition"),
        ({"posterior": torch.nn.Linear(1, 1)}, "`posterior` must be a lightning_vae.PosteriorHead"),
    ],
)
def test_what_makes_no_sense_is_refused(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        VAE((6,), latent_dim=4, **options)


class Forgetful(MixturePrior):
    """A joint prior whose class does not say so."""

    is_joint = False


class Boastful(LearnedNormal):
    """A factorised prior whose class says that it is joint."""

    is_joint = True


@pytest.mark.parametrize(("prior", "parts", "found"), [(Forgetful, 4, 1), (Boastful, 1, 4)])
@pytest.mark.parametrize("options", [{}, {"importance_samples": 3}])
def test_a_prior_that_says_wrongly_whether_it_is_joint_is_refused_at_the_first_step(prior, parts, found, options):
    vae = VAE((6,), latent_dim=4, prior=prior, **options)
    message = rf"rates of shape \(5, {parts}\).*got \(5,\) and \(5, {found}\).*must set `is_joint = True`"
    with pytest.raises(ValueError, match=message):
        vae.training_step(torch.randn(5, 6), 0)


@pytest.mark.parametrize("name", MODELS)
def test_no_sample_is_an_empty_tensor(name):
    options = {"latent_dim": 4, **MODELS[name]}
    condition = torch.empty(0, dtype=torch.int64) if "condition" in options else None
    assert VAE((1, 8, 8), 17, **options).eval().sample(0, condition).shape == (0, 1, 8, 8)


@pytest.mark.parametrize(
    ("density", "given"),
    [
        (ExPostDensity.of_moments(torch.randn(50, 4), torch.ones(50, 4)), r"a ExPostDensity\."),
        (torch.distributions.Normal(0.0, 1.0), r"a Normal over the shape \(\)\."),
        (torch.distributions.Normal(torch.zeros(3), 1.0), r"a Normal over the shape \(3,\)\."),
        (torch.distributions.Normal(torch.zeros(5, 4), 1.0), r"a Normal over the shape \(5, 4\)\."),
        (torch.randn(3, 4), r"a Tensor\."),
    ],
)
def test_a_density_of_another_form_is_refused(density, given):
    with pytest.raises(ValueError, match=f"`density` must be a torch.distributions.Distribution over .* 4 .*{given}"):
        VAE((6,), latent_dim=4).sample(3, density=density)


@pytest.mark.parametrize("name", ["a learned normal", "categories"])
@pytest.mark.parametrize("shape", [(8,), (3, 8)])
def test_a_density_of_one_latent_or_of_each_is_drawn_from(name, shape):
    vae = VAE((6,), **{**MODELS[name], "latent_dim": 8}).eval()
    exact = torch.distributions.Normal(torch.arange(8.0).expand(shape), 1e-6)
    for density in (exact, torch.distributions.Independent(exact, 1)):
        drawn = vae.sample(3, density=density)
        torch.testing.assert_close(drawn, vae.decode(torch.arange(8.0).expand(3, 8)).mean, atol=1e-4, rtol=1e-4)


def test_convolutions_take_a_head_and_a_condition():
    vae = VAE(
        (3, 9, 13), latent_dim=4, encoder=ConvEncoder, decoder=ConvDecoder, posterior=FullCovariance,
        condition=partial(Condition, covariates=2), likelihood=partial(Gaussian, variance=1.0),
    )  # fmt: skip
    batch = {"x": torch.rand(5, 3, 9, 13), "condition": torch.randn(5, 2)}
    assert vae.elbo_terms(vae.observe(batch)).elbo.shape == (5,)


def test_missing_numbers_count_for_nothing(tmp_path):
    vae = VAE((6,), latent_dim=2, likelihood=partial(Gaussian, variance=1.0)).eval()
    x, mask = torch.randn(4, 6), torch.rand(4, 6) < 0.6
    terms = [
        vae.elbo_terms(vae.observe({"x": x.where(mask, torch.tensor(stand_in)), "mask": mask}))
        for stand_in in (0.0, 5.0, float("nan"))
    ]
    for other in terms[1:]:
        assert torch.equal(terms[0].distortion, other.distortion)
        assert torch.equal(terms[0].rate, other.rate)
    observations = vae.observe({"x": x.where(mask, torch.tensor(0.0)), "mask": mask})
    posterior = vae.encode(observations)
    from lightning_vae.noise import sample_by_index

    mean = vae.decode(sample_by_index(posterior, observations.index)).mean
    numbers = torch.distributions.Normal(mean, 1.0).log_prob(x) * mask
    torch.testing.assert_close(terms[0].distortion, -numbers.sum(1))
