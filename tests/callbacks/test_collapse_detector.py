import csv
import json
import math
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]
from torch import nn
from torch.distributions import (
    Bernoulli,
    Gamma,
    Independent,
    Laplace,
    LogNormal,
    LowRankMultivariateNormal,
    MultivariateNormal,
    Normal,
    RelaxedBernoulli,
    RelaxedOneHotCategorical,
    TransformedDistribution,
    VonMises,
    kl_divergence,
)
from torch.distributions.transforms import TanhTransform
from torch.utils.data import DataLoader, IterableDataset

from lightning_vae.callbacks import EnforcedFreeBits, FreeBits, KLAnnealing, Linear, TargetRate
from lightning_vae.callbacks.collapse_detector import CollapseDetector
from lightning_vae.callbacks.control.attribute_writer import MisconfigurationException
from lightning_vae.callbacks.drawing.media_logger import MediaLogger
from lightning_vae.callbacks.metrics.mutual_information import mutual_information
from lightning_vae.callbacks.metrics.observation_subset import random_keys
from tests.doubles import quiet_trainer
from tests.processes import in_two_processes


def detect(*args, **options):
    """A detector that waits for two passes after one: the runs here are short."""
    return CollapseDetector(*args, **{"patience": 2, "warmup": 1, **options})


ROWS = 400
STATES = ("collapsed", "offset", "uninformative", "pruned", "healthy")


def posteriors(state: str, rows: int = ROWS) -> tuple[torch.Tensor, torch.Tensor]:
    """Means and variances of a four-dimensional posterior in the state of that name."""
    mean = torch.randn(rows, 4, generator=torch.Generator().manual_seed(1))
    mean = (mean - mean.mean(dim=0)) / mean.std(dim=0, correction=0)
    spread, offset, variance = {
        "healthy": ([0.9] * 4, [0.0] * 4, [0.1] * 4),
        "pruned": ([0.95, 0.95, 0.0, 0.0], [0.0] * 4, [0.1, 0.1, 1.0, 1.0]),
        "collapsed": ([0.0] * 4, [0.0] * 4, [1.0] * 4),
        "offset": ([0.95, 0.0, 0.0, 0.0], [0.0, 0.8, 0.8, 0.8], [0.1, 1.0, 1.0, 1.0]),
        "uninformative": ([0.15] * 4, [1.0] * 4, [1.0] * 4),
    }[state]
    return mean * torch.tensor(spread) + torch.tensor(offset), torch.tensor(variance).expand(rows, 4)


def information(mean: torch.Tensor, variance: torch.Tensor, observations: int) -> float:
    """The mutual information of the random subset of observations that are numbered from 0."""
    kept = random_keys(torch.arange(len(mean))).argsort()[:observations]
    return float(mutual_information(mean[kept], variance[kept]))


def batches(state: str, rows: range, size: int) -> Any:
    mean, variance = posteriors(state)
    index = torch.arange(ROWS)[rows.start : rows.stop]
    return [{"mean": mean[part], "variance": variance[part], "index": part} for part in index.split(size)]


class Known(LightningModule):
    """A module whose posterior on validation pass n is that of the nth state, and which learns nothing."""

    def __init__(self, states=("healthy",), size=64):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.encoder = nn.Identity()
        self.states, self.size = states, size
        self.posterior = None

    @property
    def state(self):
        return self.states[min(self.current_epoch, len(self.states) - 1)]

    def step(self, batch):
        mean, variance = self.encoder((batch["mean"], batch["variance"]))
        self.posterior = Normal(mean, variance.sqrt())

    def training_step(self, batch, batch_idx):
        self.step(batch)
        return self.weight * 0 + self.weight.square()

    def validation_step(self, batch, batch_idx):
        self.step(batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def loader(self):
        return DataLoader(batches(self.state, range(ROWS), self.size), batch_size=None)

    train_dataloader = loader
    val_dataloader = loader


def fit(tmp_path, detector, model=None, *, epochs=3, ckpt_path=None, callbacks=(), **options):
    trainer = Trainer(
        **{
            "default_root_dir": tmp_path,
            "accelerator": "cpu",
            "max_epochs": epochs,
            "callbacks": [detector, *callbacks],
            "logger": CSVLogger(tmp_path, version="run"),
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": False,
            "num_sanity_val_steps": 0,
            "reload_dataloaders_every_n_epochs": 1,
            "log_every_n_steps": 1,
            **options,
        }
    )
    trainer.fit(model or Known(), ckpt_path=ckpt_path)
    return trainer


def rows_of(trainer) -> list[dict[str, float]]:
    with Path(trainer.logger.log_dir, "metrics.csv").open() as file:
        rows = [
            {key: float(value) for key, value in row.items() if value and key != "step"} for row in csv.DictReader(file)
        ]
    return [row for row in rows if "latent/active_units" in row]


class Alarms(list[tuple[int, str]]):
    def __call__(self, trainer, pl_module, state):
        self.append((trainer.current_epoch, state.name))


@pytest.mark.parametrize("state", STATES)
def test_each_state_is_told_from_its_neighbours(tmp_path, state):
    alarms = Alarms()
    trainer = fit(tmp_path, detect(on_alarm=alarms), Known([state]))
    alarming = state in STATES[:3]
    assert alarms == ([(2, state)] if alarming else [])
    assert [row["collapse/alarm"] for row in rows_of(trainer)] == [0, 0, float(alarming)]
    units = {"collapsed": 0, "offset": 1, "uninformative": 4, "pruned": 2, "healthy": 4}[state]
    assert trainer.callback_metrics["latent/active_units"] == units
    assert trainer.callback_metrics["latent/active_fraction"] == units / 4


def test_what_is_logged_equals_the_formulas(tmp_path):
    trainer = fit(tmp_path, detect(observations=300), epochs=1)
    mean, variance = (part.double() for part in posteriors("healthy"))
    expected = information(mean, variance, 300)
    kept = random_keys(torch.arange(ROWS)).argsort()[:300]
    rate = 0.5 * (mean**2 + variance - 1 - variance.log()).sum(dim=1)[kept].mean()
    [row] = rows_of(trainer)
    assert row["latent/mutual_information"] == pytest.approx(expected, rel=1e-6)
    assert row["latent/marginal_kl"] == pytest.approx(float(rate) - expected, abs=1e-5)
    everything = 0.5 * (mean**2 + variance - 1 - variance.log()).sum(dim=1).mean()
    assert row["latent/rate"] == pytest.approx(float(everything), rel=1e-6)
    assert set(row) - {"epoch"} == {
        "latent/active_units",
        "latent/active_fraction",
        "latent/rate",
        "latent/mutual_information",
        "latent/marginal_kl",
        "collapse/alarm",
    }
    assert trainer.progress_bar_metrics == {"latent/active_units": 4.0}


@pytest.mark.parametrize(
    ("patience", "warmup", "epoch"), [(1, 0, 0), (2, 0, 1), (1, 2, 2), (2, 1, 2), (3, 1, 3), (4, 2, None)]
)
def test_patience_starts_after_warmup(tmp_path, patience, warmup, epoch):
    alarms = Alarms()
    detector = detect(patience=patience, warmup=warmup, on_alarm=alarms)
    fit(tmp_path, detector, Known(["collapsed"]), epochs=5)
    assert alarms == ([] if epoch is None else [(epoch, "collapsed")])


def test_patience_needs_passes_in_a_row_and_each_state_is_reported_once(tmp_path):
    alarms = Alarms()
    states = ["offset", "healthy", "offset", "offset", "collapsed", "collapsed", "pruned", "collapsed", "collapsed"]
    fit(tmp_path, detect(patience=2, warmup=0, on_alarm=alarms), Known(states), epochs=len(states))
    assert alarms == [(3, "offset"), (4, "collapsed"), (8, "collapsed")]


def test_the_sanity_pass_never_counts(tmp_path):
    detector = detect(patience=1, warmup=0)
    trainer = fit(tmp_path, detector, num_sanity_val_steps=-1, epochs=2)
    assert len(rows_of(trainer)) == 2
    assert detector.state_dict()["passes"] == 2


def test_what_the_sanity_pass_saw_is_forgotten(tmp_path):
    """Its two batches would be counted twice."""
    measured = [
        fit(tmp_path / str(batches), detect(), num_sanity_val_steps=batches, epochs=1).callback_metrics
        for batches in (0, 2)
    ]
    assert measured[0]["latent/marginal_kl"] == measured[1]["latent/marginal_kl"]


def test_the_sanity_pass_shows_a_wrong_path(tmp_path):
    with pytest.raises(ValueError, match="Did you mean 'encoder'"):
        fit(tmp_path, detect(posterior="encodr"), num_sanity_val_steps=2)


def test_warning_says_what_was_measured_and_what_to_try(tmp_path):
    with pytest.warns(
        UserWarning, match="(?s)is collapsed.*Measured: 0 of 4 latent.*Try next: .*KLAnnealing"
    ) as record:
        fit(tmp_path, detect(), Known(["collapsed"]), epochs=5)
    assert [str(warning.message).count("CollapseDetector") for warning in record].count(1) == 1


class Penalised(LightningModule):
    """A collapsed VAE: every posterior is the prior, and so it stays."""

    def __init__(self, **attributes):
        super().__init__()
        self.encoder = nn.Linear(2, 4)
        nn.init.zeros_(self.encoder.weight)
        nn.init.zeros_(self.encoder.bias)
        self.beta = 1.0
        vars(self).update(attributes)

    def training_step(self, batch, batch_idx):
        mean, log_variance = self.encoder(batch).chunk(2, dim=1)
        self.posterior = Normal(mean, (log_variance / 2).exp())
        return self.beta * kl_divergence(self.posterior, Normal(0.0, 1.0)).sum(dim=1).mean()

    validation_step = training_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)


ANNEAL, KEEP = "Let `KLAnnealing` hold beta at 0 until", "Keep beta at 0 for longer, "
PUT, RAISE = "put a floor of a few nats under the whole rate", "raise the floor under the rate"


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:FreeBits", "ignore:.*the loss of the first")
@pytest.mark.parametrize(
    ("callbacks", "attributes", "advice"),
    [
        ([], {}, (ANNEAL, PUT)),
        ([KLAnnealing(Linear(steps=2), probe=False)], {}, (KEEP, PUT)),
        ([TargetRate(1.0)], {}, (KEEP, PUT)),
        ([FreeBits(0.1, attribute="floor")], {"floor": 0.0}, (ANNEAL, RAISE)),
        ([EnforcedFreeBits(0.1, "encoder", "beta", chunk=1)], {}, (ANNEAL, RAISE)),
        ([], {"free_bits": 0.1}, (ANNEAL, RAISE)),
        ([], {"free_bits": torch.tensor([0.0, 0.1])}, (ANNEAL, RAISE)),
        ([], {"free_bits": torch.zeros(2)}, (ANNEAL, PUT)),
        ([], {"free_bits": "none of ours"}, (ANNEAL, PUT)),
        ([KLAnnealing(Linear(steps=2), probe=False), FreeBits(0.1)], {"free_bits": 0.0}, (KEEP, RAISE)),
    ],
)
def test_the_remedy_is_none_that_the_run_has(tmp_path, callbacks, attributes, advice):
    rows = DataLoader(torch.randn(8, 2), batch_size=4)
    detector = detect(patience=1, warmup=0)
    with pytest.warns(UserWarning, match="CollapseDetector: the posterior is collapsed") as record:
        quiet_trainer(tmp_path, callbacks=[detector, *callbacks], max_epochs=1).fit(Penalised(**attributes), rows, rows)
    (message,) = (" ".join(str(each.message).split()) for each in record if "CollapseDetector:" in str(each.message))
    assert [text for text in (ANNEAL, KEEP, PUT, RAISE) if text in message] == list(advice)


def test_a_module_that_never_offers_its_posterior_is_told(tmp_path):
    class Silent(Known):
        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)
            self.posterior = None

    with pytest.warns(UserWarning, match="no observations, or the module offered no posterior"):
        fit(tmp_path, detect(), Silent(), epochs=1)


def test_by_default_the_start_of_training_is_no_alarm(tmp_path):
    alarms = Alarms()
    fit(tmp_path, CollapseDetector(on_alarm=alarms), Known(["collapsed"]), epochs=14)
    assert alarms == [(12, "collapsed")]  # ten passes never count, and then three must look so


def test_stop(tmp_path):
    with pytest.warns(UserWarning, match="is offset"):
        trainer = fit(tmp_path, detect(on_alarm="stop"), Known(["offset"]), epochs=10)
    assert trainer.current_epoch == 3


@pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero")  # asked for: a loader without batches
@pytest.mark.parametrize("options", [{"limit_val_batches": 0}, {}])
def test_without_validation_training_epochs_are_measured(tmp_path, options, caplog, monkeypatch):
    model = Known(["healthy", "collapsed"])
    if not options:
        monkeypatch.setattr(model, "val_dataloader", lambda: [*()])
    alarms = Alarms()
    with caplog.at_level("INFO"):
        trainer = fit(tmp_path, detect(on_alarm=alarms), model, **options)
    assert caplog.text.count("each training epoch is measured instead") == 1
    assert [row["latent/active_units"] for row in rows_of(trainer)] == [4, 0, 0]
    assert alarms == [(2, "collapsed")]


class Begun(Callback):
    """Gives the detector the begun pass of a checkpoint that kept no rates of the observations."""

    def on_fit_start(self, trainer, pl_module):
        detector = next(callback for callback in trainer.callbacks if isinstance(callback, CollapseDetector))
        moments = (torch.zeros(3, 4), torch.zeros(300, 9), torch.zeros(4))
        begun = {"batches": [], "rows": 300, "shape": (4,), "moments": moments}
        detector.load_state_dict({**detector.state_dict(), "begun": begun})


def test_a_begun_pass_of_another_width_is_dropped_with_a_warning(tmp_path):
    detector, options = detect(observations=300), {"epochs": 1, "limit_val_batches": 0}
    with pytest.warns(UserWarning, match="begun pass of another version") as caught:
        trainer = fit(tmp_path, detector, Known(), callbacks=[Begun()], **options)
    assert sum("another version" in str(each.message) for each in caught) == 1
    fit(tmp_path, detector, Known(), logger=False, **options)  # has forgotten it
    assert [row["latent/active_units"] for row in rows_of(trainer)] == [4]


def test_validate_reports_at_once_and_counts_nothing(tmp_path):
    detector = detect()
    trainer = Trainer(
        default_root_dir=tmp_path, accelerator="cpu", callbacks=[detector], logger=False, enable_progress_bar=False
    )
    with pytest.warns(UserWarning, match="is collapsed"):
        [metrics] = trainer.validate(Known(["collapsed"]), verbose=False)
    assert (metrics["latent/active_units"], metrics["collapse/alarm"]) == (0, 1)
    assert detector.state_dict()["passes"] == 0


@pytest.mark.parametrize("size", [1, 7, 400])
def test_the_size_of_batches_does_not_matter(tmp_path, size):
    trainer = fit(tmp_path, detect(observations=100), Known(size=size), epochs=1)
    mean, variance = posteriors("healthy")
    expected = information(mean, variance, 100)
    assert rows_of(trainer)[0]["latent/mutual_information"] == pytest.approx(expected, rel=1e-6)


class Foreign(Known):
    """A module that knows nothing of us: batches are tuples, latents have space axes, the encoder returns a pair."""

    def step(self, batch):
        mean, variance = batch
        self.encoder((mean.reshape(-1, 1, 2, 2), variance.reshape(-1, 1, 2, 2)))

    def loader(self):
        pairs: Any = [(batch["mean"], batch["variance"]) for batch in batches("healthy", range(ROWS), 64)]
        return DataLoader(pairs, batch_size=None)

    train_dataloader = loader
    val_dataloader = loader


def test_a_foreign_module_with_batches_that_have_no_index(tmp_path):
    detector = detect(posterior="encoder", second="variance", observations=100)
    model = Foreign()
    trainer = fit(tmp_path, detector, model, epochs=1)
    mean, variance = posteriors("healthy")
    expected = information(mean, variance, 100)
    assert rows_of(trainer)[0]["latent/mutual_information"] == pytest.approx(expected, rel=1e-5)
    assert not model.encoder._forward_hooks


OTHERS: dict[str, Any] = {
    "MultivariateNormal": lambda mean: MultivariateNormal(mean, torch.eye(4)),
    "LowRankMultivariateNormal": lambda mean: LowRankMultivariateNormal(mean, torch.ones(4, 1), torch.ones(4)),
    "Gamma": lambda mean: Gamma(mean.exp(), 1.0),
    "Laplace": lambda mean: Laplace(mean, 1.0),
    "Independent Laplace": lambda mean: Independent(Laplace(mean, 1.0), 1),
    "LogNormal": lambda mean: LogNormal(mean, 1.0),
    "Bernoulli": lambda mean: Bernoulli(logits=mean),
    "VonMises": lambda mean: VonMises(mean, 1.0),
}


@pytest.mark.parametrize("prior", [None, MultivariateNormal(torch.zeros(4), torch.eye(4))])
@pytest.mark.parametrize("name", OTHERS)
def test_a_posterior_that_is_not_a_diagonal_gaussian_has_active_units_only(tmp_path, name, prior):
    model = Known()
    model.prior = prior
    [row] = rows_of(fit(tmp_path, detect(posterior=lambda _, batch: OTHERS[name](batch["mean"])), model, epochs=1))
    assert row["latent/active_units"] == 4
    assert not {"latent/mutual_information", "latent/marginal_kl"} & set(row)


@pytest.mark.parametrize(
    "make",
    [
        lambda mean: RelaxedBernoulli(torch.tensor(0.5), logits=mean),
        lambda mean: RelaxedOneHotCategorical(torch.tensor(0.5), logits=mean),
        lambda mean: TransformedDistribution(Normal(mean, 1.0), [TanhTransform()]),
    ],
)
def test_a_posterior_without_a_mean(tmp_path, make):
    name = type(make(torch.zeros(1, 4))).__name__
    with pytest.raises(ValueError, match=f"a {name}, has no `mean`.*Pass a Normal, .* as a callable"):
        fit(tmp_path, detect(posterior=lambda _, batch: make(batch["mean"])), epochs=1)


def test_a_prior_of_another_shape(tmp_path):
    model = Known()
    model.prior = Normal(torch.zeros(5, 1, 1), 1.0)
    with pytest.raises(ValueError, match=r"`prior` of shape \(5, 1, 1\) does not fit its posterior of shape \(64, 4\)"):
        fit(tmp_path, detect(), model, epochs=1)


# ---- the shape of the latents


def test_each_position_of_latents_with_axes_is_a_dimension(tmp_path):
    def grid(pl_module, batch):
        return batch["mean"].reshape(-1, 2, 2, 1), batch["variance"].log().reshape(-1, 2, 2, 1)

    [flat] = rows_of(fit(tmp_path / "flat", detect(), Known(["pruned"]), epochs=1))
    [row] = rows_of(fit(tmp_path / "grid", detect(posterior=grid), Known(["pruned"]), epochs=1))
    assert row == pytest.approx(flat, rel=1e-6)


def test_latents_whose_shape_changes(tmp_path):
    def padded(pl_module, batch):
        length = int(batch["index"][0]) // 64 + 1
        return Normal(batch["mean"].unsqueeze(1).expand(-1, length, -1), 1.0)

    with pytest.raises(ValueError, match=r"shape \(1, 4\) in one step and \(2, 4\) in another.*`pool=1`"):
        fit(tmp_path, detect(posterior=padded), epochs=1)


def test_the_variance_is_exact_beside_a_large_mean(tmp_path):
    means = 100 + 0.05 * torch.randn(ROWS, 4, generator=torch.Generator().manual_seed(3))
    assert means.dtype == torch.float32
    detector = detect(posterior=lambda _, batch: (means[batch["index"]], torch.zeros(len(batch["index"]), 4)))
    measured = []
    log = detector._log
    detector._log = lambda trainer, module, each, alarm: (measured.append(each), log(trainer, module, each, alarm))
    fit(tmp_path, detector, Known(size=7), epochs=1)
    exact = means.double()
    exact = (exact - exact.mean(0)).square().mean(0)
    assert exact.tolist() == pytest.approx([0.0025] * 4, rel=0.2)
    assert measured[0].variance.tolist() == pytest.approx(exact.tolist(), rel=1e-6)


# ---- several posteriors


@pytest.mark.parametrize("indexed", [True, False])
def test_each_view_of_an_observation_counts(tmp_path, indexed):
    mean, variance = posteriors("healthy")

    class Views(Known):
        def validation_step(self, batch, batch_idx):
            part = batch if isinstance(batch, torch.Tensor) else batch["index"]
            self.encoder((mean[part], variance[part]))
            self.encoder((-mean[part] + 3, variance[part]))

        def val_dataloader(self):
            parts = torch.arange(ROWS).split(32)
            return DataLoader([{"index": part} for part in parts] if indexed else parts, batch_size=None)

    [row] = rows_of(fit(tmp_path, detect("encoder", second="variance"), Views(), epochs=1))
    both = torch.stack([mean, -mean + 3], dim=1).flatten(end_dim=1), variance.repeat(2, 1)
    expected = information(*both, 2 * ROWS)
    assert row["latent/mutual_information"] == pytest.approx(expected, rel=1e-6 if indexed else 0.02)
    rate = 0.5 * (both[0] ** 2 + both[1] - 1 - both[1].log()).sum(dim=1).mean()
    assert row["latent/marginal_kl"] == pytest.approx(float(rate) - row["latent/mutual_information"], abs=1e-4)


class Two(Known):
    """A module with two encoders, of which one has collapsed."""

    def __init__(self):
        super().__init__(["collapsed"])
        self.other = nn.Identity()

    def step(self, batch):
        super().step(batch)
        self.other((posteriors("healthy")[0][batch["index"]], batch["variance"]))


def test_two_detectors_side_by_side(tmp_path):
    names = {"dead": "encoder", "alive": "other"}
    detectors = [detect(path, second="variance", name=name) for name, path in names.items()]
    logger = TensorBoardLogger(tmp_path)
    with pytest.warns(UserWarning, match=r"CollapseDetector\(dead\): the posterior is collapsed"):
        trainer = fit(tmp_path, detectors[0], Two(), callbacks=detectors[1:], logger=logger)
    metrics = trainer.callback_metrics
    assert [metrics[f"latent_{name}/active_units"] for name in names] == [0, 4]
    assert [metrics[f"collapse_{name}/alarm"] for name in names] == [1, 0]
    assert not [key for key in metrics if key.startswith(("latent/", "collapse/"))]
    events = EventAccumulator(logger.log_dir).Reload().Tags()
    assert {f"latent_{name}/rate_per_dimension" for name in names} <= set(events["images"])
    assert events["tensors"] == ["collapse_dead/message/text_summary"]
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    saved = torch.load(tmp_path / "two.ckpt", weights_only=True)["callbacks"]
    assert [saved[each.state_key]["alarming_passes"] for each in detectors] == [2, 0]


@pytest.mark.parametrize(("name", "key"), [(None, "latent/active_units"), ("same", "latent_same/active_units")])
def test_two_detectors_that_would_log_the_same(tmp_path, name, key):
    detectors = [detect(path, second="variance", name=name) for path in ("encoder", "other")]
    message = f"Two CollapseDetectors log `{key}`. Distinguish them with `name=`"
    with pytest.raises(MisconfigurationException, match=message):
        fit(tmp_path, detectors[0], Two(), callbacks=detectors[1:])
    with pytest.raises(MisconfigurationException, match=message):
        Trainer(
            default_root_dir=tmp_path,
            accelerator="cpu",
            callbacks=list(detectors),
            logger=False,
            enable_progress_bar=False,
        ).validate(Two(), verbose=False)


def test_no_forward_pass_is_added(tmp_path):
    calls = []
    model = Known()
    model.encoder.register_forward_hook(lambda *_: calls.append(1))
    fit(tmp_path, detect(posterior="encoder", second="variance"), model, epochs=2)
    assert len(calls) == 2 * (7 + 7)


def test_tensorboard_gets_pictures_and_the_message(tmp_path):
    with pytest.warns(UserWarning, match="is offset"):
        trainer = fit(tmp_path, detect(), Known(["offset"]), logger=TensorBoardLogger(tmp_path))
    events = EventAccumulator(trainer.logger.log_dir, size_guidance={"images": 0}).Reload()
    for tag in ("latent/rate_per_dimension", "latent/variance_per_dimension"):
        images = events.Images(tag)
        assert [(image.step, image.width, image.height) for image in images] == [
            (6, 8, 256),
            (13, 16, 256),
            (20, 24, 256),
        ]
    [message] = events.Tensors("collapse/message/text_summary")
    assert b"the posterior is offset" in message.tensor_proto.string_val[0]
    assert [event.value for event in events.Scalars("collapse/alarm")] == [0, 0, 1]


@pytest.mark.exhaustive
def test_a_long_run_keeps_and_draws_ever_fewer_passes(tmp_path):
    """So that neither the memory, nor a checkpoint, nor what a pass costs grows with the number of passes."""
    detector = detect(warmup=10_000)
    logger = TensorBoardLogger(tmp_path)
    trainer = fit(tmp_path, detector, Known(), epochs=300, logger=logger, limit_train_batches=1, limit_val_batches=1)
    assert detector.state_dict()["passes"] == 300
    assert detector.state_dict()["rates"].shape == detector.state_dict()["variances"].shape == (150, 4)
    events = EventAccumulator(trainer.logger.log_dir, size_guidance={"images": 0}).Reload()
    steps = [image.step for image in events.Images("latent/rate_per_dimension")]
    assert steps[:11] == [*range(9), 10, 12]
    assert steps[-1] == 299 + 1  # at the end of the run, which was not due
    assert len(steps) < 40


class Remember(Callback):
    """Keeps the detector's state as a run starts with it."""

    def on_train_start(self, trainer, pl_module):
        detector = next(callback for callback in trainer.callbacks if isinstance(callback, CollapseDetector))
        self.state = detector.state_dict()


def test_resume_goes_on_where_it_was(tmp_path):
    states = ["healthy", "collapsed", "collapsed", "collapsed"]
    detector = detect(patience=3)
    path = tmp_path / "last.ckpt"
    fit(tmp_path, detector, Known(states), epochs=3, logger=False).save_checkpoint(path)
    saved = torch.load(path, weights_only=True)["callbacks"][detector.state_key]
    assert (saved["passes"], saved["alarming_passes"], saved["reported"]) == (3, 2, "")
    assert saved["rates"].shape == saved["variances"].shape == (3, 4)

    remember, alarms = Remember(), Alarms()
    resumed = detect(patience=3, on_alarm=alarms)
    fit(tmp_path, resumed, Known(states), epochs=4, ckpt_path=path, callbacks=[remember], logger=False)
    assert repr(remember.state) == repr(saved)
    assert alarms == [(3, "collapsed")]
    assert resumed.state_dict()["rates"].shape == (4, 4)


def test_state_before_the_first_pass():
    fresh = detect()
    fresh.load_state_dict(detect().state_dict())
    assert fresh.state_dict()["passes"] == 0


def test_state_key_and_pickle():
    places: list[Any] = [None, "encoder", ("a", "b"), posteriors]
    keys = [detect(place).state_key for place in places]
    keys.append(detect("encoder", name="view").state_key)
    assert keys[1] == "CollapseDetector{'posterior': 'encoder', 'name': None}"
    assert len(set(keys)) == 5
    assert pickle.loads(pickle.dumps(detect("encoder"))).state_key == keys[1]
    detector = detect("encoder")
    assert detector.state_key is detector.state_key  # Lightning asks at every hook


class Shared(Known):
    """Deals its batches unevenly: rank 1 gets a quarter of the first pass and nothing at all of the later ones."""

    def __init__(self, folder, **options):
        super().__init__(**options)
        self.folder = folder

    def val_dataloader(self):
        if self.trainer.world_size == 1:
            return self.loader()
        cut = 301 if self.current_epoch == 0 else ROWS
        rows = range(cut) if self.trainer.global_rank == 0 else range(cut, ROWS)
        return DataLoader(Stream(batches(self.state, rows, self.size)), batch_size=None)

    def on_train_end(self):
        metrics = {key: float(value) for key, value in self.trainer.callback_metrics.items()}
        Path(self.folder, f"{self.global_rank}.json").write_text(json.dumps([self.current_epoch, metrics]))


class Stream(IterableDataset[Any]):
    def __init__(self, items):
        self.items = [item for item in items if len(item["index"])]

    def __iter__(self):
        return iter(self.items)


def fit_until_it_stops(rank, folder, **options):
    detector = detect(observations=350, on_alarm="stop")
    model = Shared(folder, states=["healthy", "offset", "offset"])
    (folder / f"rows{rank}.json").write_text(json.dumps(rows_of(fit(folder, detector, model, epochs=9, **options))))


def fit_with_another(rank, folder):
    fit_until_it_stops(rank, folder, strategy="ddp", devices=2, use_distributed_sampler=False)


@pytest.mark.filterwarnings("ignore:CollapseDetector. the posterior is offset")
def test_two_processes_equal_one_and_stop_together(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    fit_until_it_stops(0, tmp_path / "one")
    in_two_processes(fit_with_another, tmp_path / "two")
    alone, together = (json.loads((tmp_path / name / "rows0.json").read_text()) for name in ("one", "two"))
    assert [row["latent/active_units"] for row in alone] == [4, 1, 1]
    for one, two in zip(alone, together, strict=True):
        assert two == pytest.approx(one, rel=1e-6)
    ends = [json.loads((tmp_path / "two" / f"{rank}.json").read_text()) for rank in range(2)]
    assert ends[0] == ends[1]
    assert ends[0][0] == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patience": 0}, "`patience` must be a finite number of at least 1, got 0"),
        ({"warmup": -1}, "`warmup` must be a finite number of at least 0, got -1"),
        ({"min_rate": float("nan")}, "`min_rate` must be a finite number of at least 0, got nan"),
        ({"observations": 1}, "`observations` must be a finite number of at least 2, got 1"),
        ({"on_alarm": "raise"}, "`on_alarm` must be 'warn', 'stop' or a callable.*'raise'"),
        ({"second": "std"}, "`second` must be one of"),
        ({"chunk": 0}, "`chunk` must be the axis"),
    ],
)
def test_invalid_options(options, message):
    with pytest.raises(ValueError, match=message):
        CollapseDetector(**options)


class Normalised(LightningModule):
    """A VAE of another project with a batch normalisation and a dropout, which records the rate of each step."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5))
        self.weight = 1.0
        self.rates = []
        self.evaluated = []

    def encode(self, x):
        self.evaluated.append(not self.training or torch.is_grad_enabled())
        self.net[2](x[0])  # draws random numbers
        mean, log_variance = self.net[:2](x[0]).chunk(2, 1)
        return mean, log_variance

    def training_step(self, batch, _):
        self.net(batch[0])  # draws random numbers
        mean, log_variance = self.net[:2](batch[0]).chunk(2, 1)
        rates = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance)
        self.rates.append(rates.detach().double())
        return rates.sum(1).mean() + self.net(batch[0]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.5)


def normalised(tmp_path, callbacks, **options):
    torch.manual_seed(0)
    model, data = Normalised(), [(row,) for row in torch.randn(48, 4)]
    trainer = Trainer(
        default_root_dir=tmp_path,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
        callbacks=callbacks,
        **options,
    )
    trainer.fit(model, DataLoader(data, 8, generator=torch.Generator()))
    return model, trainer, torch.random.get_rng_state()


@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_callable_measures_the_weights_of_the_step_and_changes_nothing(tmp_path, accumulated):
    plain, _, before = normalised(tmp_path, [], accumulate_grad_batches=accumulated)
    detector = CollapseDetector(posterior=lambda module, batch: module.encode(batch))
    model, trainer, after = normalised(tmp_path, [detector], accumulate_grad_batches=accumulated)
    assert len(model.evaluated) == 6  # once for each step,
    assert not any(model.evaluated)  # in its own mode and without gradients
    assert before.equal(after)
    for (name, one), other in zip(plain.state_dict().items(), model.state_dict().values(), strict=True):
        assert one.equal(other), name  # the statistics of the batch normalisation among them
    expected = torch.cat(model.rates).mean(0).sum()
    assert float(trainer.callback_metrics["latent/rate"]) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.filterwarnings("ignore:FreeBits")  # the loss does not read its floor
@pytest.mark.parametrize("make", [partial(TargetRate, 1.0, smoothing=0.0), partial(FreeBits, 0.5)])
def test_a_callable_of_a_callback_that_moves_a_number(tmp_path, make):
    plain, _, before = normalised(tmp_path, [])
    callback = make(attribute="weight", posterior=lambda module, batch: module.encode(batch))
    model, trainer, after = normalised(tmp_path, [callback], log_every_n_steps=3)
    assert before.equal(after)
    for (name, one), other in zip(plain.state_dict().items(), model.state_dict().values(), strict=True):
        assert one.equal(other), name
    expected = model.rates[-1].sum(1).mean()
    if isinstance(callback, FreeBits):
        assert len(model.evaluated) == 2  # only the steps that log
        assert callback._latest.rate == pytest.approx(float(expected), rel=1e-3)
    else:
        assert len(model.evaluated) == 6
        assert float(trainer.callback_metrics["latent/controlled_rate"]) == pytest.approx(float(expected), rel=1e-3)


def test_a_negative_scale_is_refused_by_name(tmp_path):
    class Head(Normalised):
        def validation_step(self, batch, _):
            self.net[:1](batch[0])
            self.net[0](batch[0])

    detector = CollapseDetector(posterior="net.0", second="scale", chunk=1)
    with pytest.raises(ValueError, match=r"net\.0.*scale must be positive, got values down to -.*log_variance"):
        normalised_with_validation(tmp_path, detector, Head())


def normalised_with_validation(tmp_path, detector, model, epochs=1):
    data = DataLoader([(row,) for row in torch.randn(16, 4)], 8)
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    trainer = Trainer(
        default_root_dir=tmp_path, max_epochs=epochs, enable_model_summary=False, callbacks=[detector], **options
    )
    trainer.fit(model, data, data)
    return trainer


def test_a_scale_that_turns_negative_gives_no_rate(tmp_path):
    class Turns(Normalised):
        def validation_step(self, batch, batch_idx):
            sign = 1.0 if self.trainer.sanity_checking or batch_idx == 0 else -1.0
            self.read = torch.zeros(8, 2), torch.full((8, 2), sign)

    model = Turns()
    detector = CollapseDetector(posterior=lambda module, _: module.read, second="scale")
    with pytest.warns(UserWarning, match="the rate is not a number.*log_variance"):
        trainer = normalised_with_validation(tmp_path, detector, model)
    assert "latent/rate" not in trainer.callback_metrics


def test_means_that_are_not_finite_do_not_end_the_run(tmp_path):
    class Diverges(Normalised):
        def validation_step(self, batch, batch_idx):
            self.posterior = Normal(torch.full((8, 2), math.nan), torch.ones(8, 2), validate_args=False)

    with pytest.warns(UserWarning, match="can't be judged.*nan") as said:
        trainer = normalised_with_validation(tmp_path, CollapseDetector(), Diverges(), epochs=3)
    assert trainer.current_epoch == 3
    assert len([each for each in said if "can't be judged" in str(each.message)]) == 1
    assert "latent/active_units" not in trainer.callback_metrics


def test_a_full_disk_does_not_end_the_run(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("No space left on device")

    for method in ("image", "text"):
        monkeypatch.setattr(MediaLogger, method, fail)
    with pytest.warns(UserWarning, match="No space left") as said:
        trainer = fit(tmp_path, detect(on_alarm=lambda *_: None), Known(["collapsed"]), epochs=4)
    assert trainer.current_epoch == 4
    texts = [str(each.message) for each in said if "can't be shown" in str(each.message)]
    assert len(texts) == len(set(texts)) == 3  # two pictures and the message, each once
