import re
import warnings

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.distributions import Categorical as Weights
from torch.distributions import Independent, MixtureSameFamily, Normal, kl_divergence
from torch.utils.data import DataLoader

from lightning_vae.callbacks import Callback, CollapseDetector, FreeBits, KLAnnealing, LatentSpace, Linear, TargetRate
from lightning_vae.callbacks.reading.latent_reader import LatentReader
from tests.doubles import quiet_trainer

STANDARD = Normal(0.0, 1.0)


class Encoder(nn.Linear):
    def forward(self, x):
        return super().forward(x).chunk(2, dim=1)


class VampPrior(nn.Module):
    """Of Tomczak and Welling 2018, as projects write it: it calls the encoder on pseudo-inputs."""

    def __init__(self, encoder, count):
        super().__init__()
        self.encoder = encoder
        self.pseudo_inputs = nn.Parameter(torch.randn(count, 6))

    def log_prob(self, z):
        mean, log_variance = self.encoder(self.pseudo_inputs + 0.0 * torch.randn(6))
        components = Independent(Normal(mean, (0.5 * log_variance).exp()), 1)
        return MixtureSameFamily(Weights(torch.ones(len(mean))), components).log_prob(z)


class Model(LightningModule):
    """A VAE whose KL is recorded as its own loss computes it, at its own sample."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.encoder, self.decoder, self.prior_net = Encoder(6, 6), nn.Linear(3, 6), Encoder(6, 6)
        self.latents = nn.Identity()  # hands the sample on, so that it can be seen
        self.kls, self.floor = [], 0.0

    def training_step(self, batch, batch_idx):
        mean, log_variance = self.encoder(batch)
        self.q = Normal(mean, (0.5 * log_variance).exp())
        z = self.latents(self.q.rsample())
        kl = self.kl(batch, z)
        self.kls.append(float(kl.detach().mean()))
        return (self.decoder(z) - batch).square().sum(1).mean() + kl.mean()

    def kl(self, batch, z):
        mean, log_variance = self.prior_net(batch)
        self.p = Normal(mean, (0.5 * log_variance).exp())
        return kl_divergence(self.q, self.p).sum(1)

    def validation_step(self, batch, batch_idx):
        self.training_step(batch, batch_idx)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Vamp(Model):
    def __init__(self, count=8):
        super().__init__()
        self.vamp = VampPrior(self.encoder, count)

    def kl(self, batch, z):
        return self.q.log_prob(z).sum(1) - self.vamp.log_prob(z)


class Learned(Model):
    def __init__(self):
        super().__init__()
        self.loc, self.log_scale = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))

    @property
    def prior(self):
        return Normal(self.loc, self.log_scale.exp())

    def kl(self, batch, z):
        return kl_divergence(self.q, self.prior).sum(1)


def fit(tmp_path, model, *callbacks, epochs=2, validates=False, **options):
    torch.manual_seed(0)
    loader = DataLoader(torch.randn(16, 6), 8)
    trainer = quiet_trainer(tmp_path, callbacks=list(callbacks), max_epochs=epochs, log_every_n_steps=1, **options)
    trainer.fit(model, loader, loader if validates else None)
    return trainer


CASES = {
    "a network's output": (Model, {"prior": "prior_net"}),
    "an attribute": (Model, {"prior": lambda module, batch: module.p}),
    "a callable": (Model, {"prior": lambda module, batch: module.prior_net(batch)}),
    "the module's own, learned": (Learned, {}),
    "an object with a log-density": (Vamp, {"prior": "vamp", "z": "latents"}),
    "the same, from a callable": (Vamp, {"prior": lambda module, batch: module.vamp, "z": "latents"}),
}


@pytest.mark.parametrize("name", CASES)
def test_the_rate_of_a_step_is_the_modules_own_kl(tmp_path, name):
    make, places = CASES[name]
    model, detector = make(), CollapseDetector(posterior="encoder", warmup=0, patience=9, **places)
    trainer = fit(tmp_path, model, detector, epochs=1)
    assert float(trainer.callback_metrics["latent/rate"]) == pytest.approx(sum(model.kls) / 2, rel=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_reading_leaves_no_trace(tmp_path, name):
    make, places = CASES[name]
    runs = []
    for callbacks in (
        [],
        [CollapseDetector(posterior="encoder", **places), FreeBits(0.0, "floor", posterior="encoder", **places)],
    ):
        model = make()
        fit(tmp_path, model, *callbacks)
        runs.append(model.state_dict())
    assert all(torch.equal(runs[0][key], runs[1][key]) for key in runs[0])


@pytest.mark.parametrize("count", [3, 8, 16])  # 8 is the number of observations in a batch
def test_pseudo_inputs_are_no_observations(tmp_path, count):
    model, detector = Vamp(count), CollapseDetector(posterior="encoder", prior="vamp", z="latents")
    fit(tmp_path, model, detector, epochs=1)
    assert detector.report.count == 16


class WithinPrior(Model):
    """The prior is called as a whole, and its pseudo-inputs come out of a layer: without gradients nothing shows it."""

    def __init__(self):
        super().__init__()
        self.prior = nn.ModuleDict({"inputs": nn.Linear(6, 6), "encoder": self.encoder})
        self.prior.forward = lambda: self.encoder(self.prior["inputs"](torch.eye(8, 6)))

    def kl(self, batch, z):
        self.prior()
        return kl_divergence(self.q, STANDARD).sum(1)


@pytest.mark.parametrize("validates", [True, False])
def test_calls_within_the_prior_are_no_observations(tmp_path, validates):
    detector = CollapseDetector(posterior="encoder", prior=STANDARD)
    fit(tmp_path, WithinPrior(), detector, epochs=1, validates=validates)
    assert detector.report.count == 16


class FixedInputs(Model):
    """Its pseudo-inputs are observations that it keeps: no gradient shows them."""

    def __init__(self):
        super().__init__()
        self.register_buffer("pseudo_inputs", torch.randn(8, 6))

    def kl(self, batch, z):
        self.encoder(self.pseudo_inputs)
        return kl_divergence(self.q, STANDARD).sum(1)


@pytest.mark.parametrize("validates", [True, False])
def test_buffers_are_no_observations(tmp_path, validates):
    detector = CollapseDetector(posterior="encoder", prior=STANDARD)
    fit(tmp_path, FixedInputs(), detector, epochs=1, validates=validates)
    assert detector.report.count == 16


def test_a_model_saved_amid_a_pass_has_no_hooks_of_a_prior_that_is_asked(tmp_path):
    class Saves(Callback):
        def on_validation_batch_end(self, trainer, pl_module, *_):
            trainer.save_checkpoint(tmp_path / "amid.ckpt")
            hooks.append([len(module._forward_hooks) for module in pl_module.modules()])

    hooks = []
    detector = CollapseDetector(posterior="encoder", prior="vamp", z="latents")
    fit(tmp_path, Vamp(count=3), detector, Saves(), epochs=1, validates=True)
    assert not any(map(any, hooks))


class Hierarchy(Model):
    def training_step(self, batch, batch_idx):
        mean, log_variance = self.encoder(batch)
        self.top = Normal(mean, (0.5 * log_variance).exp())
        self.p = Normal(mean + 1.0, 2.0)
        self.kls.append(
            float((kl_divergence(self.top, STANDARD) + kl_divergence(self.q2, self.p)).detach().sum(1).mean())
        )
        return self.decoder(self.top.rsample()).square().mean()

    @property
    def q2(self):
        return Normal(self.top.mean * 2, 0.5)


def test_the_rates_of_groups_add_up(tmp_path):
    places = {
        "posterior": {"top": "encoder", "bottom": lambda module, batch: module.q2},
        "prior": {"top": STANDARD, "bottom": lambda module, batch: module.p},
    }
    model, detector = Hierarchy(), CollapseDetector(**places)
    target = TargetRate(1.0, attribute="kls.0", start=1.0, **places)
    model.kls.append(1.0)
    trainer = fit(tmp_path, model, detector, target, epochs=1)
    own = sum(model.kls[1:]) / 2
    assert float(trainer.callback_metrics["latent/rate"]) == pytest.approx(own, rel=1e-5)
    assert detector.report.variance.shape == (6,)


@pytest.mark.parametrize("attribute", [nn.Linear(3, 3), lambda: STANDARD])
def test_a_prior_that_has_to_be_called_is_not_guessed(tmp_path, attribute):
    model = Model()
    model.prior = attribute
    with pytest.raises(
        ValueError, match=r"`Model\.prior` is a .*`prior=lambda pl_module, batch: \.\.\.`.*for N\(0, I\) `prior="
    ):
        fit(tmp_path, model, CollapseDetector(posterior="encoder"))
    fit(tmp_path, model, CollapseDetector(posterior="encoder", prior=STANDARD))


def test_an_assumed_prior_is_said_once(tmp_path, caplog):
    with caplog.at_level("INFO"):
        fit(tmp_path, Model(), CollapseDetector(posterior="encoder"), epochs=3)
    said = [record.message for record in caplog.records if "is assumed" in record.message]
    assert said == [
        "CollapseDetector: Model has no `prior`, so the prior N(0, I) is assumed. If it has another one, say where "
        "with `prior=`."
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"posterior": {"a": "x"}, "prior": {"b": "y"}}, "`prior` must have the groups of `posterior`, 'a', got 'b'"),
        ({"posterior": {"a": "x", "b": "y"}, "z": "z"}, "`z` must name the sample of each group"),
        ({"prior": 3}, "`prior` must be None, a submodule's path, a pair of paths or a callable"),
        ({"second": "variances"}, "`second` must be one of .*, or a function from the second parameter to the scale"),
    ],
)
def test_options_that_are_none_of_these(options, message):
    with pytest.raises(ValueError, match=message):
        LatentReader(**options)


def test_priors_and_posteriors_that_do_not_pair_up(tmp_path):
    class Twice(Model):
        def kl(self, batch, z):
            self.prior_net(batch + 1)
            return super().kl(batch, z)

    with pytest.raises(ValueError, match="there are 2 different priors and 1 posteriors"):
        fit(tmp_path, Twice(), CollapseDetector(posterior="encoder", prior="prior_net"))


def test_the_latent_space_of_a_conditional_prior(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    callback = LatentSpace(posterior="encoder", prior="prior_net")
    fit(tmp_path, Model(), callback, epochs=1, validates=True, logger=logger)
    tags = EventAccumulator(logger.log_dir).Reload().Tags()["images"]
    assert {"latent/against_prior", "latent/by_label"} <= set(tags)


class Scaled(Model):
    """Its heads give a mean and a standard deviation."""

    def __init__(self):
        super().__init__()
        self.fc_mean, self.fc_scale, self.kl_weight = nn.Linear(6, 3), nn.Linear(6, 3), 1.0

    def training_step(self, batch, batch_idx):
        mean, scale = self.fc_mean(batch), self.fc_scale(batch)
        q = Normal(mean, scale.square() + 0.1)
        self.out = q
        z = q.rsample()
        kl = 0.5 * (mean.square() + scale.exp() - 1 - scale).sum(1).mean()
        return 0.5 * (self.decoder(z) - batch).square().sum(1).mean() + self.kl_weight * kl


@pytest.mark.parametrize("second", ["log_scale", "log_variance"])
def test_a_reader_that_takes_the_second_parameter_for_another_is_told(tmp_path, second):
    callbacks = [
        KLAnnealing(Linear(steps=4), attribute="kl_weight"),
        FreeBits(0.0, "floor", posterior=("fc_mean", "fc_scale"), second=second),
    ]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(tmp_path, Scaled(), *callbacks)
    said = [str(each.message) for each in caught if "reads 'fc_mean', 'fc_scale'" in str(each.message)]
    assert bool(said) == (second == "log_scale")
    if said:
        assert "`second='log_scale'`, but the KL of the first batch takes it for 'log_variance'" in said[0]


class SetsLater(Model):
    """Its posterior exists from its first step on."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.mean, self.scale = self.out = self.q.mean, self.q.scale
        return loss


@pytest.mark.parametrize("path", ["q", "out:0", ("mean", "scale"), ("out:0", "out:1"), ("q:mean", "q:stddev")])
def test_an_attribute_that_a_step_sets_is_read_as_the_error_says(tmp_path, path):
    model, prior = SetsLater(), lambda module, batch: module.p
    with pytest.raises(ValueError, match="For an attribute that a step sets first") as error:
        fit(tmp_path, model, CollapseDetector(posterior=path, prior=prior))
    [code] = re.findall(r"sets first, write `posterior=(.*)`\.$", str(error.value))
    if path == "out:0":
        assert code == "lambda pl_module, batch: pl_module.out[0]"
        return
    detector = CollapseDetector(posterior=eval(code), prior=prior, second="scale")
    fit(tmp_path, model, detector, epochs=1)
    assert detector.report.rate == pytest.approx(sum(model.kls) / 2, rel=1e-5)


class LayeredVamp(Model):
    """The pseudo-inputs of its prior come out of a layer without gradients, and are as many as the observations."""

    def __init__(self):
        super().__init__()
        self.layer, self.asked = nn.Linear(6, 6), 0

    def log_prob(self, z):
        self.asked += 1
        with torch.no_grad():
            mean, log_variance = self.encoder(self.layer(torch.eye(8, 6)))
        components = Independent(Normal(mean, (0.5 * log_variance).exp()), 1)
        return MixtureSameFamily(Weights(torch.ones(8)), components).log_prob(z)

    def kl(self, batch, z):
        return self.q.log_prob(z).sum(1) - self.log_prob(z)


class OfItself:
    def __init__(self, model):
        self.model = model

    def log_prob(self, z):
        return self.model.log_prob(z)


@pytest.mark.parametrize("validates", [True, False])
def test_calls_that_a_log_density_makes_are_no_observations(tmp_path, validates):
    model = LayeredVamp()
    detector = CollapseDetector(posterior="encoder", prior=lambda module, batch: OfItself(module), z="latents")
    trainer = fit(tmp_path, model, detector, epochs=1, validates=validates, num_sanity_val_steps=0)
    assert detector.report.count == 16
    own = model.kls[-2:] if validates else model.kls
    assert float(trainer.callback_metrics["latent/rate"]) == pytest.approx(sum(own) / 2, rel=1e-5)


def test_views_under_a_log_density_that_calls_nothing_count_and_cost_one_evaluation(tmp_path):
    class Views(Model):
        def kl(self, batch, z):
            self.encoder(batch + 1)
            return kl_divergence(self.q, STANDARD).sum(1)

    class Counts:
        asked = 0

        def log_prob(self, z):
            self.asked += 1
            return STANDARD.log_prob(z).sum(1)

    density = Counts()
    detector = CollapseDetector(posterior="encoder", prior=density)
    fit(tmp_path, Views(), detector, epochs=1)
    assert detector.report.count == 32
    assert density.asked == 1 + 2 * 2


class Sampling(nn.Module):
    """An encoder that draws its sample itself."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 4)

    def forward(self, x):
        mean, log_variance = self.layer(x).chunk(2, 1)
        return mean, log_variance, mean + (0.5 * log_variance).exp() * torch.randn_like(mean)


class SampledVamp(Model):
    """A prior whose log-density calls the encoder that draws the samples, with as many rows as the batch."""

    def __init__(self):
        super().__init__()
        self.encoder, self.layer = Sampling(), nn.Linear(6, 6)

    def training_step(self, batch, _):
        mean, log_variance, z = self.encoder(batch)
        q = Normal(mean, (0.5 * log_variance).exp())
        kl = q.log_prob(z).sum(1) - OfPseudoInputs(self).log_prob(z)
        self.kls.append(float(kl.detach().mean()))
        return kl.mean() + z.square().sum(1).mean()

    validation_step = training_step


class OfPseudoInputs:
    def __init__(self, model):
        self.model = model

    def log_prob(self, z):
        with torch.no_grad():
            mean, log_variance, _ = self.model.encoder(self.model.layer(torch.eye(8, 6)))
        components = Independent(Normal(mean, (0.5 * log_variance).exp()), 1)
        return MixtureSameFamily(Weights(torch.ones(8)), components).log_prob(z)


def test_samples_of_calls_that_a_log_density_makes_are_left_out_too(tmp_path):
    model = SampledVamp()
    detector = CollapseDetector(
        posterior=["encoder:0", "encoder:1"], prior=lambda module, batch: OfPseudoInputs(module), z="encoder:2"
    )
    trainer = fit(tmp_path, model, detector, epochs=1, num_sanity_val_steps=0)
    assert detector.report.count == 16
    assert float(trainer.callback_metrics["latent/rate"]) == pytest.approx(sum(model.kls[-2:]) / 2, rel=1e-5)
