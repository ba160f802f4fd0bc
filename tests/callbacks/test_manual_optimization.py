"""The callbacks in a module that optimizes manually: an autoencoder for latent diffusion with a discriminator."""

import csv
import math
import re
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.distributions import Normal
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import DataLoader

from lightning_vae import free_bits
from lightning_vae.callbacks import (
    Callback,
    CollapseDetector,
    EnforcedFreeBits,
    FreeBits,
    KLAnnealing,
    Linear,
    TargetRate,
)
from lightning_vae.callbacks.control.pi_controller import ControllerState, PIController
from lightning_vae.callbacks.probing.loss_probe import LossProbe
from tests.doubles import quiet_trainer

CHANNELS = 2


def images(rows: int = 24, batch_size: int = 4) -> DataLoader[Tensor]:
    data = torch.rand(rows, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return DataLoader(list(data), batch_size=batch_size, generator=torch.Generator())  # type: ignore[arg-type]


class AdversarialVAE(pl.LightningModule):
    """A small AutoencoderKL: latents (N, C, 4, 4), and a hinge discriminator from a step on."""

    def __init__(self, kl_weight: float = 1e-6, start: int = 3) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.kl_weight, self.start, self.free_bits = kl_weight, start, 0.0
        self.encoder = nn.Sequential(nn.Conv2d(1, 6, 3, 2, 1), nn.SiLU(), nn.Conv2d(6, 2 * CHANNELS, 3, 1, 1))
        self.decoder = nn.Sequential(nn.Conv2d(CHANNELS, 6, 3, 1, 1), nn.SiLU(), nn.ConvTranspose2d(6, 1, 4, 2, 1))
        self.discriminator = nn.Sequential(nn.Conv2d(1, 6, 4, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(6, 1, 3, 1, 1))
        self.used: list[float] = []
        self.encoded: list[list[float]] = []  # the rates of each batch, one for each call of the encoder
        self.passed: list[list[float]] = []  # the losses of each batch

    def begin(self) -> None:
        self.used.append(float(self.kl_weight))
        self.encoded.append([])
        self.passed.append([])

    def reconstruct(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the reconstruction and the KL of each observation and latent."""
        mean, log_variance = self.encoder(x).chunk(2, 1)
        z = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).flatten(1)
        if self.training:
            self.encoded[-1].append(float(kl.sum(1).mean()))
        return self.decoder(z), kl

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        self.passed[-1].append(float(loss))
        loss.backward(*args, **kwargs)

    def generator_loss(self, x: Tensor) -> tuple[Tensor, Tensor]:
        reconstruction, kl = self.reconstruct(x)
        distortion = (x - reconstruction).abs().flatten(1).sum(1).mean()
        loss = distortion + self.kl_weight * free_bits(kl, self.free_bits)
        if self.is_adversarial:
            loss = loss - 0.1 * self.discriminator(reconstruction).mean()
        return loss, reconstruction

    def discriminator_loss(self, x: Tensor, reconstruction: Tensor) -> Tensor:
        real, fake = self.discriminator(x), self.discriminator(reconstruction.detach())
        return F.relu(1 - real).mean() + F.relu(1 + fake).mean()

    @property
    def is_adversarial(self) -> bool:
        return len(self.used) > self.start

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        self.begin()
        generator, discriminator = self.optimizers()  # type: ignore[misc]
        self.toggle_optimizer(generator)
        loss, reconstruction = self.generator_loss(batch)
        generator.zero_grad()
        self.manual_backward(loss)
        self.clip_gradients(generator, gradient_clip_val=1.0, gradient_clip_algorithm="norm")
        generator.step()
        self.untoggle_optimizer(generator)
        if self.is_adversarial:
            self.toggle_optimizer(discriminator)
            loss = self.discriminator_loss(batch, reconstruction)
            discriminator.zero_grad()
            self.manual_backward(loss)
            discriminator.step()
            self.untoggle_optimizer(discriminator)
        self.lr_schedulers().step()  # type: ignore[union-attr]

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        reconstruction, _ = self.reconstruct(batch)
        self.log("val/error", (batch - reconstruction).abs().mean())

    def configure_optimizers(self) -> Any:
        networks = (*self.encoder.parameters(), *self.decoder.parameters())
        generator = torch.optim.Adam(networks, 1e-3)
        return [generator, torch.optim.Adam(self.discriminator.parameters(), 1e-3)], [
            torch.optim.lr_scheduler.ExponentialLR(generator, 0.9)
        ]


class DiscriminatorFirst(AdversarialVAE):
    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        self.begin()
        generator, discriminator = self.optimizers()  # type: ignore[misc]
        if self.is_adversarial:
            with discriminator.toggle_model():
                loss = self.discriminator_loss(batch, self.reconstruct(batch)[0])
                self.manual_backward(loss)
                discriminator.step()
                discriminator.zero_grad()
        with generator.toggle_model(sync_grad=True):
            self.manual_backward(self.generator_loss(batch)[0])
            generator.step()
            generator.zero_grad()


class Closures(AdversarialVAE):
    def training_step(self, batch: Tensor, batch_idx: int) -> dict[str, int]:  # type: ignore[override]
        self.begin()
        optimizers = self.optimizers(use_pl_optimizer=False)

        def generate() -> None:
            optimizers[0].zero_grad()  # type: ignore[index]
            self.manual_backward(self.generator_loss(batch)[0])

        def discriminate() -> None:
            optimizers[1].zero_grad()  # type: ignore[index]
            self.manual_backward(self.discriminator_loss(batch, self.reconstruct(batch)[0]))

        generator, discriminator = self.optimizers()  # type: ignore[misc]
        generator.step(closure=generate)
        discriminator.step(closure=discriminate)
        return {"batch": batch_idx}


class Alternating(AdversarialVAE):
    """The discriminator in the even batches, the generator in the odd ones."""

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        self.begin()
        optimizer = self.optimizers()[batch_idx % 2 == 0]  # type: ignore[index]
        reconstruction = self.reconstruct(batch)[0]
        loss = self.generator_loss(batch)[0] if batch_idx % 2 else self.discriminator_loss(batch, reconstruction)
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()


class Unwrapped(AdversarialVAE):
    """Steps torch's own optimizers, one of which has a learning rate scheduler."""

    def optimizers(self, use_pl_optimizer: bool = False) -> Any:
        return super().optimizers(use_pl_optimizer)


EACH = pytest.mark.parametrize("kind", [AdversarialVAE, DiscriminatorFirst, Closures])


def fit(path: Path, module: AdversarialVAE, *callbacks: Any, validates: bool = False, **options: Any) -> pl.Trainer:
    pl.seed_everything(0)
    trainer = quiet_trainer(path, **{"callbacks": list(callbacks), "max_epochs": 2, "log_every_n_steps": 1, **options})
    trainer.fit(module, images(), images() if validates else None)
    return trainer


def rows(logger: CSVLogger) -> list[dict[str, str]]:
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What KLAnnealing says without warning."""
    texts: list[str] = []
    monkeypatch.setattr(
        "lightning_vae.callbacks.kl_annealing.rank_zero_info", lambda text: texts.append(" ".join(text.split()))
    )
    return texts


# ---- steps


@EACH
def test_a_step_is_a_batch_however_many_optimizers_step_in_it(tmp_path: Path, kind: Any) -> None:
    logger, module = CSVLogger(tmp_path), kind()
    trainer = fit(tmp_path, module, KLAnnealing(Linear(steps=6), "kl_weight"), logger=logger)
    assert trainer.global_step == {AdversarialVAE: 12 + 9, DiscriminatorFirst: 12 + 9, Closures: 24}[kind]
    weights = [1e-6 * min(1.0, step / 6) for step in range(12)]
    assert module.used == pytest.approx(weights)
    assert module.kl_weight == 1e-6
    logged = {int(row["step"]): float(row["knobs/kl_weight"]) for row in rows(logger) if row["knobs/kl_weight"]}
    assert logged == pytest.approx(dict(enumerate(weights)))


def test_steps_of_torchs_own_optimizers_are_not_counted_by_lightning(tmp_path: Path) -> None:
    module = Unwrapped()
    trainer = fit(tmp_path, module, KLAnnealing(Linear(steps=6), "kl_weight"))
    assert trainer.global_step == 0
    assert module.used == pytest.approx([1e-6 * min(1.0, step / 6) for step in range(12)])


@pytest.mark.parametrize(
    ("schedule", "options", "batches"),
    [
        (Linear(epochs=1), {"max_steps": 17}, 10),  # 3 batches of a step, 7 of two
        (Linear(steps=6), {"max_steps": 17}, 10),
        (Linear(epochs=1), {"max_steps": 17, "max_epochs": 1}, 6),
        (Linear(fraction=0.5), {"max_epochs": 2}, 12),
    ],
    ids=str,
)
def test_max_steps_counts_the_steps_of_every_optimizer(
    tmp_path: Path, schedule: Any, options: Any, batches: int
) -> None:
    module = AdversarialVAE()
    fit(tmp_path, module, KLAnnealing(schedule, "kl_weight"), **{"max_epochs": -1, **options})
    assert module.used == pytest.approx([1e-6 * min(1.0, step / 6) for step in range(batches)])


def test_a_fraction_of_a_run_under_max_steps_is_refused(tmp_path: Path) -> None:
    annealing = KLAnnealing(Linear(fraction=0.5), "kl_weight")
    with pytest.raises(ValueError, match=r"`max_steps` counts the steps of every optimizer, and not batches: limit"):
        fit(tmp_path, AdversarialVAE(), annealing, max_steps=20)


def test_a_schedule_that_max_steps_cuts_off_is_reported_in_batches(tmp_path: Path) -> None:
    annealing = KLAnnealing(Linear(steps=10), "kl_weight")
    text = r"takes 10 steps but the run stops after 7 if each of 2 optimizers steps once in a batch, at 6e-07 instead"
    with pytest.warns(UserWarning, match=text) as caught:
        fit(tmp_path, AdversarialVAE(start=0), annealing, max_epochs=-1, max_steps=14)
    assert len([each for each in caught if "the run stops" in str(each.message)]) == 1


@pytest.mark.parametrize(
    ("callback", "values"),
    [
        (KLAnnealing(Linear(steps=6), "kl_weight"), "at 5e-07 instead of 1e-06"),
        (
            TargetRate(Linear(start=1.0, stop=2.0, steps=6), attribute="kl_weight", posterior="encoder", chunk=1),
            "at 1.5 instead of 2",
        ),
    ],
)
def test_a_schedule_that_max_steps_cuts_off_unforeseen_is_reported_at_the_end(
    tmp_path: Path, callback: Any, values: str
) -> None:
    class ThreeSteps(AdversarialVAE):
        def on_train_batch_end(self, *_: Any) -> None:
            self.trainer.strategy._lightning_optimizers[1].zero_grad()

        def training_step(self, batch: Tensor, batch_idx: int) -> None:
            super().training_step(batch, batch_idx)
            self.optimizers()[1].step()  # type: ignore[index]

    module = ThreeSteps(start=0)
    with pytest.warns(UserWarning, match=rf"takes 6 steps but the run stops after 4, {values}\. Under manual"):
        fit(tmp_path, module, callback, max_epochs=-1, max_steps=12)
    assert len(module.used) == 4


class Saves(Callback):
    def __init__(self, path: Path, step: int) -> None:
        self.path, self.at = path, step

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.step(trainer) == self.at:
            trainer.save_checkpoint(self.path)


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
@pytest.mark.parametrize("saved", [1, 3, 5, 7])
def test_a_resumed_run_goes_on_where_it_was(tmp_path: Path, saved: int) -> None:
    annealing, path = KLAnnealing(Linear(epochs=1.5), "kl_weight"), tmp_path / "saved.ckpt"
    fit(tmp_path, AdversarialVAE(), annealing, Saves(path, saved))
    module, logger = AdversarialVAE(), CSVLogger(tmp_path)
    trainer = quiet_trainer(tmp_path, callbacks=[annealing], max_epochs=2, logger=logger, log_every_n_steps=1)
    trainer.fit(module, images(), ckpt_path=path)
    remaining = range(saved + 1, 12)
    assert module.used == pytest.approx([1e-6 * min(1.0, step / 9) for step in remaining])
    assert [int(row["step"]) for row in rows(logger) if row["knobs/kl_weight"]] == list(remaining)


# ---- the effect of the weight


@EACH
def test_the_effective_beta_is_that_of_the_generators_loss(tmp_path: Path, said: list[str], kind: Any) -> None:
    module = kind(kl_weight=0.5, start=0 if kind is not AdversarialVAE else 3)
    fit(tmp_path, module, KLAnnealing(Linear(steps=2), "kl_weight"), max_epochs=1)
    [text] = said
    loss = {AdversarialVAE: "the loss", DiscriminatorFirst: "loss 2 of 2", Closures: "loss 1 of 2"}[kind]
    assert f"{loss} of the first batch is" in text
    slope = float(re.search(r" \+ (\S+) \* `kl_weight`", text)[1])  # type: ignore[index]
    assert slope == pytest.approx(module.encoded[0][0], rel=1e-3)
    assert "its slope is the KL ('encoder', chunk=1, log_variance)" in text
    if kind is AdversarialVAE:  # the others have an adversarial term from the start
        assert "at 0 it is the absolute error, summed over 64 elements" in text
        assert "`kl_weight` = 0.5 is an effective beta of 0.5." in text


def test_a_weight_far_below_rounding_is_measured(tmp_path: Path, said: list[str]) -> None:
    fit(tmp_path, AdversarialVAE(), KLAnnealing(Linear(steps=2), "kl_weight"), max_epochs=1)
    assert "`kl_weight` = 1e-06 is an effective beta of 1e-06." in said[0]


def test_a_run_that_begins_with_the_discriminator_is_measured_at_its_second_batch(
    tmp_path: Path, said: list[str]
) -> None:
    fit(tmp_path, Alternating(kl_weight=0.5), KLAnnealing(Linear(steps=2), "kl_weight"), max_epochs=1)
    [text] = said
    assert "the loss of the second batch is" in text
    assert "its slope is the KL" in text


def test_a_weight_that_no_loss_reads_is_reported(tmp_path: Path) -> None:
    class Ignores(AdversarialVAE):
        def generator_loss(self, x: Tensor) -> tuple[Tensor, Tensor]:
            reconstruction, kl = self.reconstruct(x)
            return (x - reconstruction).abs().mean() + 1e-6 * kl.mean(), reconstruction

    with pytest.warns(
        UserWarning, match=r"loss 1 of 2 of the second batch is .* whatever `kl_weight` is, and no other"
    ):
        fit(tmp_path, Ignores(start=0), KLAnnealing(Linear(steps=2), "kl_weight"), max_epochs=1)


class Probes(Callback):
    """Evaluates the losses of every batch before it is trained on."""

    def __init__(self) -> None:
        self.losses: list[list[float]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append([*LossProbe(trainer, pl_module, batch, batch_idx).losses({})])


class Penalizes(DiscriminatorFirst):
    """Keeps a function of a parameter, which acts on the original's parameter even in a copy."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        weight = self.decoder[0].weight
        self.penalty = lambda: 10 * weight.square().sum()

    def generator_loss(self, x: Tensor) -> tuple[Tensor, Tensor]:
        loss, reconstruction = super().generator_loss(x)
        return loss + self.penalty(), reconstruction


@pytest.mark.parametrize("kind", [AdversarialVAE, DiscriminatorFirst, Closures, Alternating, Unwrapped, Penalizes])
def test_evaluating_the_losses_leaves_no_trace(tmp_path: Path, kind: Any) -> None:
    def run(*callbacks: Any) -> tuple[Any, ...]:
        torch.manual_seed(1)
        module = kind(kl_weight=0.5, start=0)
        trainer = fit(tmp_path, module, *callbacks, max_epochs=1)
        states = [optimizer.state_dict() for optimizer in trainer.optimizers]
        return module.state_dict(), states, module.passed, trainer.lr_scheduler_configs[0].scheduler.state_dict()

    probes = Probes()
    for one, other in zip(run(probes), run(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert len(probes.losses) == 6


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_the_losses_of_a_copy_are_those_of_the_batch(tmp_path: Path, precision: str) -> None:
    probes, module = Probes(), AdversarialVAE()
    fit(tmp_path, module, probes, precision=precision)
    assert [len(losses) for losses in probes.losses] == [1] * 3 + [2] * 9
    assert probes.losses == module.passed


def test_losses_after_an_optimizers_step_are_evaluated_before_it(tmp_path: Path) -> None:
    """So that a weight changes only the losses that read it."""
    probes, module = Probes(), DiscriminatorFirst(start=0)
    fit(tmp_path, module, probes, max_epochs=1)
    assert [losses[0] for losses in probes.losses] == [losses[0] for losses in module.passed]
    assert [losses[1] for losses in probes.losses] != [losses[1] for losses in module.passed]


class UntilItFalls(AdversarialVAE):
    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        self.begin()
        generator, _ = self.optimizers()  # type: ignore[misc]
        first = loss = None
        while first is None or loss is None or float(loss) >= first:
            torch.manual_seed(0)
            loss, _ = self.generator_loss(batch)
            first = float(loss) if first is None else first
            generator.zero_grad()
            self.manual_backward(loss)
            generator.step()


class NoBackward(AdversarialVAE):
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:  # type: ignore[override]
        self.begin()
        return self.generator_loss(batch)[0]


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (UntilItFalls, "its optimizers take more than 32 steps in a batch"),
        (NoBackward, "its training step passes no loss to `manual_backward`"),
    ],
)
def test_a_step_that_can_not_be_tried_is_said(tmp_path: Path, said: list[str], kind: Any, reason: str) -> None:
    fit(tmp_path, kind(), KLAnnealing(Linear(steps=2), "kl_weight"), max_epochs=1)
    assert said == [f"KLAnnealing(kl_weight): the effect on the loss can't be measured ({reason})."]


# ---- reading the posterior


@EACH
def test_the_detector_measures_the_latents(tmp_path: Path, kind: Any) -> None:
    module, detector = kind(), CollapseDetector("encoder", chunk=1)
    trainer = fit(tmp_path, module, detector, validates=True)
    mean, log_variance = module.encoder(torch.cat(list(images()))).chunk(2, 1)
    rate = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).flatten(1).sum(1).mean()
    assert float(trainer.callback_metrics["latent/rate"]) == pytest.approx(float(rate), rel=1e-5)


@pytest.mark.filterwarnings("ignore:FreeBits. 32 of 32 floors hold")
def test_free_bits_of_the_generators_loss(tmp_path: Path) -> None:
    logger, module = CSVLogger(tmp_path), AdversarialVAE(kl_weight=1.0)
    fit(tmp_path, module, FreeBits(0.5, posterior="encoder", chunk=1), logger=logger)
    assert module.free_bits == 0.5
    at_floor = {int(row["step"]): float(row["latent/at_floor"]) for row in rows(logger) if row["latent/at_floor"]}
    assert at_floor == dict.fromkeys(range(12), 32.0)


@EACH
def test_the_target_rate_is_steered_by_each_batch(tmp_path: Path, kind: Any) -> None:
    module = kind(kl_weight=1e-3)
    fit(tmp_path, module, TargetRate(2.0, attribute="kl_weight", posterior="encoder", chunk=1))
    controller = PIController(math.log(1e-5), math.log(1e-1), 1.0, 0.03, 0.95, 0.05)
    state, weights = ControllerState.start(math.log(1e-3), "cpu"), []
    for rates in module.encoded:
        weights.append(float(state.output.exp()))
        # After the first optimizer's step the encoder has other weights.
        of_step = rates[:1] if kind is Closures else rates
        state = controller(state, torch.tensor(of_step).mean(), 2.0, 2.0)
    assert module.used == pytest.approx(weights, rel=1e-5)
    assert module.kl_weight == pytest.approx(float(state.output.exp()), rel=1e-5)


@EACH
def test_a_callable_is_called_before_the_first_optimizers_step(tmp_path: Path, kind: Any) -> None:
    calls: list[float] = []

    def posterior(module: Any, batch: Tensor) -> Normal:
        mean, log_variance = module.encoder(batch).chunk(2, 1)
        rates = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance)
        calls.append(float(rates.flatten(1).sum(1).mean()))
        return Normal(mean, (0.5 * log_variance).exp())

    module = kind(start=0)
    fit(tmp_path, module, TargetRate(2.0, attribute="kl_weight", posterior=posterior))
    assert calls == pytest.approx([rates[0] for rates in module.encoded], rel=1e-6)


def test_a_floor_from_outside_is_refused(tmp_path: Path) -> None:
    floor = EnforcedFreeBits(0.5, posterior="encoder", chunk=1, weight="kl_weight")
    module = AdversarialVAE()
    del module.free_bits
    text = "AdversarialVAE optimizes manually, .* Put the floor in the loss, and set it with `FreeBits`"
    with pytest.raises(MisconfigurationException, match=text):
        fit(tmp_path, module, floor)
