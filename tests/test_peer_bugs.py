"""Mistakes found in public VAE code, each with a test that would catch it here."""

import itertools
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from lightning_vae import VAE, Bernoulli, ContinuousBernoulli, DiscretisedLogistic, Gaussian, kl_per_dimension
from lightning_vae.callbacks import (
    ActiveUnits,
    Constant,
    Cosine,
    Cyclical,
    FreeBits,
    KLAnnealing,
    Linear,
    Schedule,
    Sigmoid,
    Staged,
    active_units,
    mutual_information,
)
from tests.doubles import ForeignModule, RecordingVAE, loader, quiet_trainer

VARIANCE = 0.5


def untrained(shape: tuple[int, ...], latent_dim: int = 2, **options: Any) -> RecordingVAE:
    torch.manual_seed(1)
    return RecordingVAE(shape, latent_dim=latent_dim, likelihood=partial(Gaussian, variance=VARIANCE), **options)


def blind(**options: Any) -> RecordingVAE:
    """A model whose decoder ignores z, so that its terms have no sampling noise."""
    model = untrained((2,), **options)
    nn.init.zeros_(model.decoder.map.weight)  # type: ignore[union-attr, arg-type]
    return model


def images(rows: int, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(rows, *shape, generator=torch.Generator().manual_seed(0))


def loss_of(model: VAE, x: Tensor) -> float:
    """Return the training loss of a batch, always with the same noise."""
    torch.manual_seed(2)
    return model.training_step(x, 0).item()


def metrics_of(root: Path, model: VAE, **options: Any) -> dict[str, float]:
    """Train for an epoch without moving, validate, and return what was logged for monitors."""
    model.configure_optimizers = lambda: torch.optim.SGD(model.parameters(), 0.0)  # type: ignore[method-assign]
    trainer = quiet_trainer(root, max_epochs=1)
    trainer.fit(model, loader(**options), loader(**options))
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def used_in(root: Path, schedule: Schedule, model: Any = None, **options: Any) -> list[float]:
    """Fit a module that keeps a plain float, and return what it was at each batch."""
    model = ForeignModule() if model is None else model
    validation = loader(4) if options.pop("validate", False) else None
    quiet_trainer(root, callbacks=[KLAnnealing(schedule)], **{"max_epochs": 2, **options}).fit(
        model, loader(), validation
    )
    return [float(value) for value in model.used]


# ---- scaling and reductions

SIZES = [((2,), 2, 3), ((1, 4, 4), 2, 3), ((1, 4, 4), 7, 3), ((3, 8, 8), 7, 11)]


@pytest.mark.parametrize(("shape", "latent_dim", "rows"), SIZES)
def test_pixel_mean_beside_latent_sum(shape: tuple[int, ...], latent_dim: int, rows: int) -> None:
    """A reconstruction that is a mean over pixels beside a KL that is a sum: the loss is the sum over both."""
    model, x = untrained(shape, latent_dim, beta=3.0), images(rows, shape)
    loss = loss_of(model, x)

    torch.manual_seed(2)
    with torch.no_grad():
        mean, log_variance = model.encoder(x)
        z = mean + (0.5 * log_variance).exp() * torch.randn_like(mean)
        error = (model.decoder(z) - x).flatten(1)
        distortion = 0.5 * (error**2 / VARIANCE + math.log(2 * math.pi * VARIANCE)).sum(1)
        rate = 0.5 * (mean**2 + log_variance.exp() - log_variance - 1).sum(1)
    assert loss == pytest.approx(float((distortion + 3.0 * rate).mean()), rel=1e-5)


@pytest.mark.parametrize(("shape", "latent_dim", "rows"), SIZES)
def test_beta_that_depends_on_image_and_latent_size(shape: tuple[int, ...], latent_dim: int, rows: int) -> None:
    """A mean over latent dimensions or pixels: beta weights one nat of rate against one of distortion at every size."""
    model, x = untrained(shape, latent_dim), images(rows, shape)
    base = loss_of(model, x)
    model.beta = 2.0  # type: ignore[assignment]
    rate = kl_per_dimension(model.encode(x), model.prior).sum(1).mean().item()
    assert loss_of(model, x) - base == pytest.approx(rate, rel=1e-3)


def test_sum_over_the_batch() -> None:
    """A loss or a term that is summed over the batch: twice the same rows cost the same."""
    model, x = blind(beta=3.0, free_bits=0.01), images(5, (2,))
    assert loss_of(model, x.repeat(4, 1)) == pytest.approx(loss_of(model, x), rel=1e-5)


@pytest.mark.parametrize("options", [{"beta": 3.0}, {"beta": 0.1}, {"free_bits": 1.5}, {"beta": 3.0, "free_bits": 0.3}])
def test_another_weight_in_validation(tmp_path: Path, options: dict[str, float]) -> None:
    """Training and validation that weight the KL differently under one name."""
    metrics = metrics_of(tmp_path, blind(**options), batch_size=12)
    for name in ("loss", "elbo", "rate", "distortion", "floored_rate"):
        assert metrics[f"val/{name}"] == pytest.approx(metrics[f"train/{name}"], rel=1e-5), name


@pytest.mark.parametrize("beta", [0.0, 0.1, 10.0])
def test_a_weighted_or_negated_rate_in_the_log(tmp_path: Path, beta: float) -> None:
    """A KL that is logged after it was multiplied in place, or with its sign turned."""
    model = blind(beta=beta, free_bits=2.0)
    metrics = metrics_of(tmp_path, model, batch_size=12)
    x = torch.stack(list(loader().dataset))  # type: ignore[call-overload]
    rate = kl_per_dimension(model.encode(x), model.prior).sum(1).mean().item()
    for split in ("train", "val"):
        assert metrics[f"{split}/rate"] == pytest.approx(rate, rel=1e-5)
        assert metrics[f"{split}/rate"] > 0
        assert metrics[f"{split}/elbo"] == pytest.approx(-(metrics[f"{split}/distortion"] + rate), rel=1e-5)
        expected = metrics[f"{split}/distortion"] + beta * metrics[f"{split}/floored_rate"]
        assert metrics[f"{split}/loss"] == pytest.approx(expected, rel=1e-5)


def test_an_elbo_that_is_lower_when_better(tmp_path: Path) -> None:
    """A loss that is logged as "elbo", and selected by its minimum."""
    metrics = metrics_of(tmp_path, blind())
    assert metrics["val/elbo"] == pytest.approx(-metrics["val/loss"])
    trainer = quiet_trainer(
        tmp_path, callbacks=[ModelCheckpoint(monitor="val/elbo")], enable_checkpointing=True, max_epochs=1
    )
    with pytest.raises(MisconfigurationException, match="a higher ELBO is better"):
        trainer.fit(blind(), loader(), loader())


def test_a_mean_of_batch_means(tmp_path: Path) -> None:
    """A mean over batches that counts the rows of a short last one more than the others."""
    whole = metrics_of(tmp_path, blind(), rows=11, batch_size=11)
    uneven = metrics_of(tmp_path, blind(), rows=11, batch_size=4)
    for name, value in whole.items():
        assert uneven[name] == pytest.approx(value, rel=1e-5), name


def test_a_likelihood_without_its_constants() -> None:
    """A squared error or a cross-entropy that is called a likelihood: each one sums or integrates to 1."""
    grid = torch.linspace(-40, 40, 20_001)[:, None]
    gaussian = Gaussian((1,), variance=0.3)(torch.tensor([[0.7]]))
    assert float(torch.trapezoid(gaussian.log_prob(grid).exp(), grid[:, 0])) == pytest.approx(1, abs=1e-4)

    unit = torch.linspace(0, 1, 20_001)[:, None]
    continuous = ContinuousBernoulli((1,))(torch.tensor([[1.3]]))
    assert float(torch.trapezoid(continuous.log_prob(unit).exp(), unit[:, 0])) == pytest.approx(1, abs=1e-4)

    binary = torch.tensor(list(itertools.product([0.0, 1.0], repeat=3)))
    assert float(Bernoulli((3,))(torch.randn(1, 3)).log_prob(binary).exp().sum()) == pytest.approx(1, abs=1e-5)

    levels = (torch.arange(256) / 255)[:, None]
    logistic = DiscretisedLogistic((1,), levels=256)(torch.tensor([[0.4]]))
    assert float(logistic.log_prob(levels).detach().exp().sum()) == pytest.approx(1, abs=1e-4)


def test_cross_entropy_on_grey_levels() -> None:
    """A Bernoulli on grey levels, which is no likelihood: what is observed is binary."""
    observed = Bernoulli((4,)).observe(torch.full((8, 4), 0.4), None)
    assert set(observed.unique().tolist()) <= {0.0, 1.0}


def test_a_log_variance_taken_for_a_variance() -> None:
    """A second head that is called a variance here and a log-variance there."""
    model, x = untrained((2,)), images(3, (2,))
    nn.init.constant_(model.encoder.log_variance, math.log(4.0))  # type: ignore[arg-type]
    posterior = model.encode(x)
    assert posterior.stddev.detach().unique().tolist() == pytest.approx([2.0])
    z = posterior.sample(torch.Size((200_000,)))
    estimate = (posterior.log_prob(z) - model.prior.log_prob(z)).mean(0)
    torch.testing.assert_close(kl_per_dimension(posterior, model.prior), estimate, atol=0.03, rtol=0.01)


def test_reconstructions_from_a_sample() -> None:
    """Embeddings and reconstructions that differ from call to call, since they use a sample and not the mean."""
    model, x = untrained((1, 4, 4)), images(3, (1, 4, 4))
    expected = model.decode(model.encode(x).mean).mean
    assert torch.equal(model.reconstruct(x), expected)
    assert torch.equal(model.reconstruct(x), model.reconstruct(x))
    batch = {"x": x, "index": torch.arange(3)}
    predicted = model.predict_step(batch, 0)["mean"]
    assert torch.equal(predicted, model.encode(x).mean)


def test_samples_that_are_encoded_first() -> None:
    """An image sampler that passes draws of the prior to a ``forward`` that encodes its input."""
    model = untrained((1, 4, 4))
    torch.manual_seed(0)
    drawn = model.sample(5)
    torch.manual_seed(0)
    assert torch.equal(drawn, model.decode(model.prior.sample(torch.Size((5,)))).mean)
    assert drawn.shape == (5, 1, 4, 4)


# ---- schedules


def test_a_counter_that_advances_on_validation(tmp_path: Path) -> None:
    """A counter in the loss function, which validation and the sanity check advance."""
    plain = used_in(tmp_path, Linear(steps=12))
    assert used_in(tmp_path, Linear(steps=12), validate=True, val_check_interval=2) == plain
    assert plain == pytest.approx([step / 12 for step in range(12)])


def test_a_schedule_of_the_batch_index(tmp_path: Path) -> None:
    """A schedule of ``batch_idx``, which begins anew with each epoch."""
    used = used_in(tmp_path, Linear(steps=12))
    assert used[6] > used[5]
    assert len(set(used)) == 12


def test_a_schedule_of_the_epoch_alone(tmp_path: Path) -> None:
    """A weight that jumps between epochs and stands still within them."""
    assert len(set(used_in(tmp_path, Linear(epochs=2)))) == 12


@pytest.mark.parametrize("options", [{"accumulate_grad_batches": 2}, {"model": 2}], ids=["accumulation", "optimizers"])
def test_a_step_that_is_not_said(tmp_path: Path, options: dict[str, Any]) -> None:
    """A step that means batches here and optimizer steps there: half of the run stays half of the run."""
    if "model" in options:
        options = {"model": ForeignModule(optimizers=2)}
    used = used_in(tmp_path, Linear(fraction=0.5), **options)
    assert used[5] < used[6] == used[-1] == 1.0


SCHEDULES = [
    Linear(stop=0.7, steps=7),
    Cosine(start=2.0, stop=0.7, steps=7),
    Sigmoid(stop=0.7, steps=7),
    Cyclical(stop=0.7, period_steps=7, cycles=3),
    Cyclical(stop=0.7, period_steps=7, cycles=3, ratio=1.0, shape="cosine"),
    Staged([0.1, 0.7], at_steps=[7]),
    Constant(0.7),
]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_a_step_beyond_the_end(schedule: Schedule) -> None:
    """A table of values, which a longer run overruns."""
    for step in (21, 22, 1_000, 10**9):
        assert schedule(step) == 0.7


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_an_end_that_is_almost_reached(schedule: Schedule) -> None:
    """A logistic curve that ends at 0.9975, or a ramp that adds up steps: the ends are exact."""
    assert schedule(int(schedule.length)) == 0.7 == schedule.final


def test_cycles_that_drift() -> None:
    """Cycles made by repeated addition, whose ends float; each has its exact values, however many went before."""
    schedule = Cyclical(start=0.1, stop=0.7, period_steps=10)
    for cycle in (0, 1, 7, 123_456):
        values = [schedule(10 * cycle + step) for step in range(10)]
        assert values == [schedule(step) for step in range(10)]
        assert (values[0], values[5], values[9]) == (0.1, 0.7, 0.7)


def test_a_warm_up_of_length_zero() -> None:
    """A division by a warm-up of zero steps."""
    with pytest.raises(ValueError, match="`steps` must be an integer >= 1, got 0"):
        Linear(steps=0)


def test_a_minimum_that_is_parsed_and_ignored(tmp_path: Path) -> None:
    """A minimal weight that is an option and has no effect."""
    assert used_in(tmp_path, Linear(start=0.4, steps=6))[0] == 0.4


def test_a_float_step() -> None:
    """A step computed by division, whose failure is swallowed and leaves a weight of 0 for the whole run."""
    assert [Linear(stop=1.0, fraction=0.3).resolve(total_steps=10)(step) for step in range(4)] == pytest.approx(
        [0, 1 / 3, 2 / 3, 1]
    )


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint")
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
def test_a_counter_lost_at_resume(tmp_path: Path) -> None:
    """A counter that is in no checkpoint, so that a resumed run anneals once more."""
    save = ModelCheckpoint(tmp_path, "saved", every_n_train_steps=4, save_top_k=-1, enable_version_counter=False)
    model = ForeignModule()
    schedule = Linear(fraction=1.0)
    trainer = quiet_trainer(
        tmp_path, callbacks=[KLAnnealing(schedule), save, Stop(at=4)], max_epochs=2, enable_checkpointing=True
    )
    trainer.fit(model, loader())
    resumed = ForeignModule()
    trainer = quiet_trainer(tmp_path, callbacks=[KLAnnealing(schedule)], max_epochs=2)
    trainer.fit(resumed, loader(), ckpt_path=tmp_path / "saved.ckpt")
    assert model.used + resumed.used == pytest.approx([step / 12 for step in range(12)])


class Stop(Callback):
    """End a run early, as a time limit does."""

    def __init__(self, at: int) -> None:
        self.at = at

    def on_train_batch_end(self, trainer: Any, pl_module: LightningModule, *_: Any) -> None:
        trainer.should_stop = trainer.global_step >= self.at


@pytest.mark.parametrize("module", ["own", "foreign"])
def test_selection_on_the_annealed_loss(tmp_path: Path, module: str) -> None:
    """A validation loss under the weight of the moment, by which the first epochs look best."""
    model: Any = blind(beta=10.0) if module == "own" else ForeignModule(beta=10.0)
    model.configure_optimizers = lambda: torch.optim.SGD(model.parameters(), 0.0)
    monitor, losses = "val/loss" if module == "own" else "val_loss", []

    class Watch(Callback):
        def on_validation_end(self, trainer: Any, pl_module: LightningModule) -> None:
            losses.append(float(trainer.callback_metrics[monitor]))

    annealing = KLAnnealing(Linear(fraction=1.0))
    trainer = quiet_trainer(tmp_path, callbacks=[annealing, Watch()], max_epochs=3, num_sanity_val_steps=0)
    trainer.fit(model, loader(), loader())
    assert losses == pytest.approx([losses[0]] * 3), "nothing was learned, so nothing may look better"
    assert losses[0] > 0

    callbacks = [KLAnnealing(Linear(steps=3)), ModelCheckpoint(monitor="train/loss")]
    trainer = quiet_trainer(tmp_path, callbacks=callbacks, max_epochs=1, enable_checkpointing=True)
    with pytest.raises(MisconfigurationException, match="Monitor 'val/loss'"):
        trainer.fit(model, loader())


def test_a_validation_loss_at_a_weight_that_was_moved_by_hand(tmp_path: Path) -> None:
    """A validation loss that reads whatever the weight is at the moment, whoever moved it."""
    model = blind(beta=10.0)
    model.beta.fill_(0.1)
    metrics = metrics_of(tmp_path, model)
    expected = metrics["val/distortion"] + 10.0 * metrics["val/rate"]
    assert metrics["val/loss"] == pytest.approx(expected, rel=1e-5)


def test_a_missing_attribute_in_silence(tmp_path: Path) -> None:
    """A callback that finds no weight to move, does nothing, and logs as if it did."""
    model = ForeignModule()
    annealing = KLAnnealing(Linear(steps=3), "loss_function.beta")
    trainer = quiet_trainer(tmp_path, callbacks=[annealing], max_epochs=1)
    with pytest.raises(ValueError, match=r"has no 'loss_function'"):
        trainer.fit(model, loader())
    assert not hasattr(model, "loss_function")


@pytest.mark.parametrize(
    "construct",
    [
        partial(VAE, (2,)),
        partial(KLAnnealing, Linear(steps=3)),
        partial(FreeBits, 0.5),
        partial(Linear, steps=3),
        partial(Cyclical, period_steps=3),
        partial(Gaussian, (2,)),
    ],
    ids=lambda construct: construct.func.__name__,
)
def test_a_typing_error_swallowed_by_kwargs(construct: Any) -> None:
    """A constructor with ``**kwargs``, to which every misspelt option is welcome."""
    with pytest.raises(TypeError, match="unexpected keyword argument 'bta'"):
        construct(bta=4.0)


def test_a_scheduled_value_saved_as_the_configured_one(tmp_path: Path) -> None:
    """A checkpoint whose configuration holds the weight of the moment, which the next run takes for its target."""
    save = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=2, save_top_k=-1)
    trainer = quiet_trainer(
        tmp_path, callbacks=[KLAnnealing(Linear(steps=12)), save], max_epochs=2, enable_checkpointing=True
    )
    trainer.fit(RecordingVAE(beta=4.0), loader())
    path = tmp_path / "step=2.ckpt"
    assert torch.load(path, weights_only=True)["hyper_parameters"]["beta"] == 4.0
    model = RecordingVAE.load_from_checkpoint(path)
    assert model.beta == 4.0
    used = [4.0 * step / 12 for step in range(12)]
    assert used_in(tmp_path, Linear(steps=12), None)[1:] == pytest.approx([value / 4 for value in used[1:]])
    quiet_trainer(tmp_path, callbacks=[KLAnnealing(Linear(steps=12))], max_epochs=2).fit(model, loader())
    assert [beta for beta, _ in model.used] == pytest.approx(used)


def test_a_warm_up_longer_than_the_run(tmp_path: Path) -> None:
    """A default warm-up that large data sets never finish, without a word."""
    with pytest.warns(UserWarning, match=r"takes 400 steps but the run stops after 12, at 0.0275 instead of 1"):
        used_in(tmp_path, Linear(steps=400))


# ---- measuring


def test_a_naive_variance() -> None:
    """E[z^2] - E[z]^2 in float32, wrong by a multiple where the mean is large."""
    generator = torch.Generator().manual_seed(0)
    means = 100 + 0.05 * torch.randn(50_000, 2, generator=generator)  # a variance of 0.0025: inactive
    means[:, 1] = 100 + 0.2 * torch.randn(50_000, generator=generator)
    metric = ActiveUnits(2)
    for batch in means.split(100):
        metric.update(batch)
    assert metric.variance.tolist() == pytest.approx([0.0025, 0.04], rel=0.03)
    assert metric.variance.tolist() == pytest.approx(means.double().var(0, correction=0).tolist(), rel=1e-9)
    assert int(metric.compute()) == int(active_units(means)) == 1


def test_active_units_that_count_every_dimension() -> None:
    """A number of active dimensions that is the length of a mask, which is always the size of the latent space."""
    means = torch.randn(500, 4, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 0.0, 1.0, 0.01])
    assert int(active_units(means)) == 2


def test_active_units_of_one_batch() -> None:
    """A measure of the last or first batch alone, or a mean of measures of batches."""
    metric = ActiveUnits(1)
    for level in range(10):
        metric.update(torch.full((20, 1), float(level)))  # constant within each batch
    assert metric.variance.tolist() == pytest.approx([8.25])
    assert int(metric.compute()) == 1
    metric.update(torch.zeros(1, 1))
    assert int(metric.count) == 201


def test_mutual_information_capped_by_the_batch() -> None:
    """A mean of the batches' estimates, none of which can exceed the logarithm of the batch size."""
    mean = torch.arange(512.0)[:, None] * 100
    variance = torch.ones_like(mean)
    per_batch = [float(mutual_information(*pair)) for pair in zip(mean.split(8), variance.split(8), strict=True)]
    assert max(per_batch) <= math.log(8) + 1e-6
    assert float(mutual_information(mean, variance)) == pytest.approx(math.log(512))


def test_a_measure_that_moves_the_random_state(tmp_path: Path) -> None:
    """A validation pass or a measure that draws from the training's generator, so that watching changes the run."""
    losses = []
    for validation in (None, loader()):
        torch.manual_seed(0)
        model = untrained((2,))
        trainer = quiet_trainer(tmp_path, max_epochs=2, num_sanity_val_steps=0)
        torch.manual_seed(3)
        trainer.fit(model, loader(), validation)
        losses.append(float(trainer.callback_metrics["train/loss"]))
    assert losses[0] == losses[1]
