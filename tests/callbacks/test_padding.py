"""Positions of a sequence that are padding count for nothing, whatever they hold."""

import math

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import Logger
from torch import nn
from torch.distributions import Independent, Normal, OneHotCategorical
from torch.utils.data import DataLoader

from lightning_vae.callbacks import CollapseDetector, FreeBits, LatentSpace, TargetRate
from lightning_vae.callbacks.free_bits import count_at_floor
from lightning_vae.callbacks.metrics.posterior_summary import PosteriorSummary
from lightning_vae.callbacks.reading.latent_reader import Latent, measured_rates
from tests.doubles import quiet_trainer

T, C = 5, 2
LENGTHS = [5, 2, 3, 1, 4, 4, 2, 2]
MASK = torch.arange(T) < torch.tensor(LENGTHS)[:, None]
PLACES = {"posterior": "pad", "chunk": -1, "mask": "mask"}
PICTURES = {"latent/against_prior", "latent/by_label"}


def kl(mean, log_variance):
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance)


class Sequences(LightningModule):
    """Its latents are (N, T, C); where a sequence has ended they hold something absurd."""

    def __init__(self, garbage):
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.pad = nn.Linear(2, 2 * C), nn.Identity()
        self.garbage, self.kl_weight, self.free_bits = garbage, 1.0, 0.0

    def training_step(self, batch, batch_idx):
        real = batch["mask"][..., None]
        mean, log_variance = self.pad(self.encoder(batch["x"]).where(real, self.garbage)).chunk(2, dim=-1)
        self.rates = kl(mean, log_variance).where(real, 0.0)
        return self.rates.flatten(1).sum(1).mean()

    def validation_step(self, batch, batch_idx):
        self.training_step(batch, batch_idx)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


class Record(Logger):
    name, version = "record", 0

    def __init__(self):
        super().__init__()
        self.images, self.numbers = {}, {}

    def log_hyperparams(self, *_, **__):
        pass

    def log_metrics(self, metrics, step=None):
        self.numbers.update(metrics)

    def log_image(self, key, images, step=None):
        self.images[key] = torch.from_numpy(images[0])


def fit(tmp_path, model, *callbacks, batch_size=8):
    x = torch.randn(8, T, 2, generator=torch.Generator().manual_seed(1))
    data = DataLoader([{"x": row, "mask": real} for row, real in zip(x, MASK, strict=True)], batch_size)
    logger = Record()
    options = {"max_epochs": 1, "logger": logger, "log_every_n_steps": 1, "num_sanity_val_steps": 0}
    quiet_trainer(tmp_path, callbacks=list(callbacks), **options).fit(model, data, data)
    return logger


@pytest.mark.parametrize("garbage", [1e3, -7.0])
def test_all_callbacks_measure_the_rate_of_what_is_real(tmp_path, garbage):
    detector, target = CollapseDetector(**PLACES), TargetRate(1.0, attribute="kl_weight", smoothing=0.0, **PLACES)
    model = Sequences(garbage)
    logger = fit(tmp_path, model, target, FreeBits(0.1, **PLACES), detector)
    rates = model.rates.detach()
    assert logger.numbers["latent/controlled_rate"] == pytest.approx(float(rates.flatten(1).sum(1).mean()), rel=1e-5)
    assert detector.report.rate == pytest.approx(logger.numbers["latent/controlled_rate"], rel=1e-5)
    by_position = rates.sum(0) / MASK.sum(0)[:, None]
    assert logger.numbers["latent/at_floor"] == (by_position <= 0.1 * 1.05).sum()


def test_what_padding_holds_is_not_drawn(tmp_path):
    for places, are_equal in ((PLACES, True), ({**PLACES, "mask": None}, False)):
        one, other = (fit(tmp_path, Sequences(garbage), LatentSpace(**places)).images for garbage in (1e3, -7.0))
        assert set(one) == PICTURES
        assert all(one[tag].equal(other[tag]) for tag in PICTURES) == are_equal


def test_sequences_of_another_length_are_not_drawn(tmp_path):
    class Shorter(Sequences):
        def validation_step(self, batch, batch_idx):
            self.training_step({name: each[:, : T - batch_idx] for name, each in batch.items()}, batch_idx)

    logger = fit(tmp_path, Shorter(0.0), LatentSpace(posterior="pad", chunk=-1), batch_size=4)
    assert set(logger.images) == PICTURES


@pytest.mark.parametrize(
    ("per", "average", "expected"),
    [
        ("dimension", "batch", (2.0, 3.0)),  # means of 0.5, 0.1 and 0.2 over what is real; the last is all padding
        ("dimension", "sample", (1.0, 2.0)),  # two of three, and none of one
        (2, "batch", (1.0, 2.0)),  # 0.55 and 0.2
        ("whole", "batch", (0.0, 1.0)),
    ],
)
def test_floors_count_what_is_real(per, average, expected):
    rates = torch.tensor([[0.4, 0.1, 0.2, 0.0], [0.6, 0.0, 0.0, 0.0]])
    mask = torch.tensor([[True, True, True, False], [True, False, False, False]])
    counted = count_at_floor(rates, 0.3, per, average, mask)
    assert (counted.at_floor, counted.groups) == expected
    assert counted.floors == pytest.approx(0.3 * expected[1])
    assert counted.rate == pytest.approx(0.65)


def test_a_summary_leaves_padding_out():
    torch.manual_seed(0)
    mean, scale = torch.randn(8, T, C), torch.rand(8, T, C) + 0.1
    mean[:, 0] = 1.0  # inactive
    real = MASK[..., None].expand(8, T, C)
    summary = PosteriorSummary.of(Normal(mean.where(real, 1e3), scale), Normal(0.0, 1.0), mask=MASK)
    mean, real, rates = mean.flatten(1), real.flatten(1), kl(mean, 2 * scale.log()).flatten(1)
    assert summary.mean.isnan().equal(~real)
    active = set()
    for number in range(T * C):
        rows = real[:, number]
        assert summary.title(number) == f"z{number}  {float(rates[rows, number].mean()):.2f} nats"
        active |= {number} if mean[rows, number].var(correction=0) > 0.01 else set()
    assert set(summary.active) == active
    assert 0 < len(active) < T * C - 1


def test_a_mask_of_groups_of_classes_and_one_of_a_joint_rate():
    torch.manual_seed(0)
    posterior = OneHotCategorical(torch.rand(2, 3, 4))
    mask = torch.tensor([[True, True, False], [True, False, False]])
    rates = measured_rates(Latent(posterior, OneHotCategorical(torch.ones(2, 3, 4)), mask=mask))
    torch.testing.assert_close(rates, (math.log(4) - posterior.entropy()).where(mask, 0.0))
    whole = Independent(Normal(torch.zeros(2, 3), 1.0), 1), Independent(Normal(torch.ones(3), 1.0), 1)
    with pytest.raises(ValueError, match="`mask` needs a rate for each position"):
        measured_rates(Latent(*whole, mask=mask))
