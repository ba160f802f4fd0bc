import csv
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.distributions import (
    Cauchy,
    Distribution,
    Gamma,
    Independent,
    Laplace,
    LowRankMultivariateNormal,
    MultivariateNormal,
    Normal,
    OneHotCategorical,
    RelaxedBernoulli,
    kl_divergence,
)

from lightning_vae import free_bits
from lightning_vae.callbacks import Constant, FreeBits, KLAnnealing, Linear
from lightning_vae.callbacks.free_bits import count_at_floor
from tests.doubles import ForeignModule, RecordingVAE, loader, quiet_trainer

# Most tests set floors that their tiny models sit at.
pytestmark = pytest.mark.filterwarnings("ignore:FreeBits. .* floors hold their dimension")

KL = np.array(
    [
        [0.1, 2.0, 0.0, 0.6],
        [0.3, 4.0, 0.0, 0.2],
        [0.0, 1.0, 0.9, 1.0],
    ]
)
VARIANTS: list[tuple[Any, Any]] = [
    (per, average) for per in ("dimension", 2, 4, "whole") for average in ("batch", "sample")
]


def grouped(kl: np.ndarray, per: Any) -> np.ndarray:
    size = {"dimension": 1, "whole": kl.shape[1]}.get(per, per)
    return np.asarray(kl.reshape(len(kl), -1, size).sum(-1))


def reference(kl: np.ndarray, threshold: float, per: Any, average: str) -> float:
    rates = grouped(kl, per)
    if average == "batch":
        return float(sum(max(threshold, rate) for rate in rates.mean(0)))
    return float(np.mean([sum(max(threshold, rate) for rate in row) for row in rates]))


class Posed(LightningModule):
    """Somebody else's module, whose posterior has given rates and whose loss reads a floor of its own."""

    free_bits: Tensor

    def __init__(self, rates: list[float]) -> None:
        super().__init__()
        self.register_buffer("free_bits", torch.tensor(0.0))
        self.mean = nn.Parameter((2 * torch.tensor(rates)).sqrt())
        self.posterior: Distribution | None = None
        self.losses: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.posterior = Normal(self.mean.expand(len(batch), -1), 1.0)
        kl_per_dimension = kl_divergence(self.posterior, Normal(0.0, 1.0))
        loss = 7.0 + 3.0 * free_bits(kl_per_dimension, self.free_bits)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.0)


# ---- the formula


@pytest.mark.parametrize(("per", "average"), VARIANTS)
@pytest.mark.parametrize("threshold", [0.0, 0.25, 0.5, 1.5, 10.0])
def test_each_variant_is_what_its_name_says(threshold: float, per: Any, average: Any) -> None:
    floored = free_bits(torch.tensor(KL), threshold, per, average)
    assert float(floored) == pytest.approx(reference(KL, threshold, per, average))


def test_the_variants_differ() -> None:
    values = {round(float(free_bits(torch.tensor(KL), 2.8, per, average)), 6) for per, average in VARIANTS}
    assert len(values) == 6, "a group of all four dimensions is the whole, and no other two agree"


@pytest.mark.parametrize("per", ["dimension", 2, "whole"])
def test_a_floor_on_each_sample_is_never_below_one_on_their_mean(per: Any) -> None:
    kl = torch.rand(50, 4, generator=torch.Generator().manual_seed(0))
    for threshold in (0.2, 0.5, 0.9, 2.0):
        assert free_bits(kl, threshold, per, "sample") >= free_bits(kl, threshold, per, "batch")


def test_the_loss_never_falls_below_the_floors() -> None:
    for per, average in VARIANTS:
        floors = 0.5 * grouped(KL, per).shape[1]
        assert free_bits(torch.zeros(3, 4), 0.5, per, average) == floors
        assert free_bits(torch.tensor(KL), 0.5, per, average) >= max(floors, KL.sum(1).mean())


@pytest.mark.parametrize(("per", "average"), VARIANTS)
def test_the_gradient_is_zero_below_the_floor_and_full_above(per: Any, average: Any) -> None:
    kl = torch.tensor(KL, requires_grad=True)
    free_bits(kl, 0.5, per, average).backward()
    rates = grouped(KL, per)
    above = np.broadcast_to(rates.mean(0) > 0.5, rates.shape) if average == "batch" else rates > 0.5
    expected = np.repeat(above / len(KL), KL.shape[1] // rates.shape[1], axis=1)
    np.testing.assert_allclose(kl.grad, expected)  # type: ignore[arg-type]


@pytest.mark.parametrize(("per", "average"), VARIANTS)
def test_a_threshold_of_zero_is_off_also_where_an_estimate_is_negative(per: Any, average: Any) -> None:
    kl = torch.tensor([[-0.5, 0.2, -0.1, 0.0], [-0.3, 0.1, -0.4, 0.0]], requires_grad=True)
    floored = free_bits(kl, 0.0, per, average)
    floored.backward()
    assert float(floored.detach()) == pytest.approx(float(kl.detach().sum(1).mean()))
    assert torch.equal(kl.grad, torch.full((2, 4), 0.5))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("per", "average", "count"),
    [
        ("dimension", "batch", 2),  # means 0.133, 2.333, 0.3, 0.6
        ("dimension", "sample", 6 / 3),  # 2, 3 and 1 of the dimensions of each observation
        (2, "batch", 0),  # means 2.467, 0.9
        (2, "sample", 1 / 3),
        ("whole", "batch", 0),
    ],
)
def test_counting_what_sits_at_its_floor(per: Any, average: str, count: float) -> None:
    at_floor = count_at_floor(torch.tensor(KL), 0.5, per, average)
    groups = grouped(KL, per).shape[1]
    assert at_floor.at_floor == pytest.approx(count)
    assert (at_floor.groups, at_floor.floors) == (groups, 0.5 * groups)
    assert at_floor.rate == pytest.approx(KL.sum(1).mean())
    assert count_at_floor(torch.tensor(KL), 0.0, per, average).at_floor == 0


# ---- the callback on the VAE


def logged(root: Path, model: LightningModule, *callbacks: Any, **options: Any) -> dict[str, list[float]]:
    """Fit, and return each curve that a logger got."""
    logger = CSVLogger(root)
    trainer = quiet_trainer(
        root, callbacks=list(callbacks), logger=logger, log_every_n_steps=1, **{"max_epochs": 1, **options}
    )
    trainer.fit(model, loader())
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return {name: [float(row[name]) for row in rows if row[name]] for name in rows[0]}


def test_a_constant_threshold_reaches_the_loss(tmp_path: Path) -> None:
    model = RecordingVAE(beta=4.0)
    curves = logged(tmp_path, model, FreeBits(5.0))
    assert [floor for _, floor in model.used] == [5.0] * 6
    assert curves["knobs/free_bits"] == [5.0] * 6
    assert curves["train/floored_rate"] == pytest.approx([10.0] * 6), "two dimensions"
    assert max(curves["train/rate"]) < 5.0, "the raw rate stands beside it"
    # The floor is under the rate, not under beta times the rate.
    losses = [distortion + 4.0 * 10.0 for distortion in curves["train/distortion"]]
    assert curves["train/loss"] == pytest.approx(losses)
    assert model.free_bits == 5.0


def test_a_scheduled_threshold_reaches_the_loss(tmp_path: Path) -> None:
    model = RecordingVAE()
    curves = logged(tmp_path, model, FreeBits(Linear(start=4.0, stop=1.0, steps=3)))
    assert [floor for _, floor in model.used] == [4, 3, 2, 1, 1, 1]
    # The untrained rate is small, so that high floors are all of the floored rate.
    assert curves["train/floored_rate"][:3] == pytest.approx([8.0, 6.0, 4.0])
    assert model.free_bits == 1.0


def test_without_the_callback_nothing_is_floored(tmp_path: Path) -> None:
    curves = logged(tmp_path, RecordingVAE())
    assert curves["train/floored_rate"] == pytest.approx(curves["train/rate"])


def test_an_open_end_is_the_configured_threshold(tmp_path: Path) -> None:
    model = RecordingVAE(free_bits=2.0)
    logged(tmp_path, model, FreeBits(Linear(start=0.0, steps=2)))
    assert [floor for _, floor in model.used] == [0, 1, 2, 2, 2, 2]


def test_another_threshold_than_the_configured_one_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=r"configured with `free_bits=2`"):
        logged(tmp_path, RecordingVAE(free_bits=2.0), FreeBits(0.5))


def test_validation_loss_has_the_target_floor(tmp_path: Path) -> None:
    model = RecordingVAE()
    trainer = quiet_trainer(tmp_path, callbacks=[FreeBits(Linear(start=9.0, stop=5.0, steps=6))], max_epochs=1)
    trainer.fit(model, loader(), loader())
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert metrics["val/floored_rate"] == pytest.approx(10.0)
    assert metrics["val/loss"] == pytest.approx(metrics["val/distortion"] + 10.0)
    assert metrics["val/elbo"] == pytest.approx(-metrics["val/distortion"] - metrics["val/rate"])


@pytest.mark.parametrize(
    ("per", "average", "groups"), [("whole", "batch", 1), (1, "sample", 2), ("dimension", None, 2)]
)
def test_the_variant_is_set_on_the_module(tmp_path: Path, per: Any, average: Any, groups: int) -> None:
    model = RecordingVAE()
    curves = logged(tmp_path, model, FreeBits(5.0, per=per, average=average))
    assert (model.free_bits_per, model.free_bits_average) == (per, average or "batch")
    assert curves["train/floored_rate"] == pytest.approx([5.0 * groups] * 6)


def test_left_out_the_variant_is_the_modules(tmp_path: Path) -> None:
    model = RecordingVAE(free_bits_per="whole", free_bits_average="sample")
    curves = logged(tmp_path, model, FreeBits(5.0))
    assert (model.free_bits_per, model.free_bits_average) == ("whole", "sample")
    assert curves["train/floored_rate"] == pytest.approx([5.0] * 6)
    assert curves["latent/at_floor"] == [1.0] * 6


def test_annealing_and_free_bits_side_by_side(tmp_path: Path) -> None:
    model = RecordingVAE()
    curves = logged(tmp_path, model, KLAnnealing(Linear(steps=3)), FreeBits(Linear(start=3.0, stop=0.0, steps=3)))
    expected = [(0, 3), (1 / 3, 2), (2 / 3, 1), (1, 0), (1, 0), (1, 0)]
    torch.testing.assert_close(torch.tensor(model.used), torch.tensor(expected))
    assert curves["latent/at_floor"][3:] == [0.0] * 3, "a floor of 0 holds nothing"


def test_a_loaded_checkpoint_has_floor_and_variant(tmp_path: Path) -> None:
    save = ModelCheckpoint(tmp_path, "saved")
    callbacks = [FreeBits(Linear(start=2.0, stop=0.5, steps=6), per="whole"), save]
    trainer = quiet_trainer(tmp_path, callbacks=callbacks, max_epochs=1, enable_checkpointing=True)
    trainer.fit(RecordingVAE(), loader())
    model = RecordingVAE.load_from_checkpoint(tmp_path / "saved.ckpt")
    assert (model.free_bits, model.knobs["free_bits"], model.free_bits_per) == (0.5, None, "whole")


def test_a_constant_floor_does_not_move_the_loss(tmp_path: Path) -> None:
    logged(tmp_path, RecordingVAE(), FreeBits(0.5), EarlyStopping("train/loss"))
    with pytest.raises(MisconfigurationException, match="moves with `free_bits`"):
        logged(tmp_path, RecordingVAE(), FreeBits(Linear(stop=0.5, steps=3)), EarlyStopping("train/loss"))


# ---- the callback on a module of somebody else's


def test_a_foreign_module_with_its_own_buffer_and_the_one_line(tmp_path: Path) -> None:
    model = Posed([2.0, 0.5, 0.1])
    floor = model.free_bits
    curves = logged(tmp_path, model, FreeBits(Linear(start=0.0, stop=1.0, steps=4)))
    expected = [7 + 3 * (2.0 + max(0.5, floor) + max(0.1, floor)) for floor in (0, 0.25, 0.5, 0.75, 1, 1)]
    assert model.losses == pytest.approx(expected)
    assert curves["latent/at_floor"] == [0, 1, 2, 2, 2, 2]
    assert model.free_bits is floor
    assert floor == 1.0


def test_a_posterior_is_read_where_it_is_said_to_be(tmp_path: Path) -> None:
    class Elsewhere(Posed):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            self.posterior, self.kept = None, self.posterior
            return loss

    def read(pl_module: Any, batch: Any) -> Any:
        return pl_module.kept

    curves = logged(tmp_path, Elsewhere([2.0, 0.5, 0.1]), FreeBits(1.0, posterior=read))
    assert curves["latent/at_floor"] == [2.0] * 6


def test_without_a_posterior_the_floor_still_works(tmp_path: Path) -> None:
    model = ForeignModule()
    model.free_bits = 0.0  # type: ignore[assignment]
    curves = logged(tmp_path, model, FreeBits(Constant(1.0)))
    assert model.free_bits == 1.0
    assert "latent/at_floor" not in curves


@pytest.mark.parametrize("option", [{"per": "whole"}, {"average": "sample"}])
def test_a_variant_for_a_module_that_has_no_such_choice_is_an_error(tmp_path: Path, option: dict[str, Any]) -> None:
    name, value = next(iter(option.items()))
    with pytest.raises(
        MisconfigurationException, match=rf"`{name}='{value}'` can't be set on Posed.*{name}='{value}'\)"
    ):
        logged(tmp_path, Posed([1.0]), FreeBits(0.5, **option))


def test_a_module_without_a_floor_is_told_the_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no 'free_bits'.*loss = reconstruction \+ beta \* free_bits\(kl_per"):
        logged(tmp_path, ForeignModule(), FreeBits(0.5))


def test_the_names_that_a_module_without_a_floor_has_are_no_floors(tmp_path: Path) -> None:
    model: Any = ForeignModule()
    model.kld_weight, model.min_kl_weight, model.free_bits_warmup, model.floor = 0.00025, 0.1, 400, "second"
    for path in ("free_bits", "layer", "fre_bits", "hparams"):
        with pytest.raises(ValueError, match=r"use `EnforcedFreeBits`, which needs the paths of its post") as caught:
            logged(tmp_path, model, FreeBits(0.5, path))
        named = set(re.findall(r"'(\w*)'", str(caught.value)))
        assert named == {path}, "and no weight of the KL or length of a warm-up is offered"


@pytest.mark.parametrize("name", ["free_nats", "kl_floor", "min_kl", "freebits"])
def test_another_name_of_a_floor_is_offered(tmp_path: Path, name: str) -> None:
    model: Any = ForeignModule()
    model.loss_options = {name: 3, "beta": 1.0}
    setattr(model.layer, name, 1.0)
    with pytest.raises(ValueError, match=rf"Did you mean 'loss_options.{name}' or 'layer.{name}'\? The module's own"):
        logged(tmp_path, model, FreeBits(0.5))


def test_a_posterior_without_a_closed_form_is_sampled_without_a_trace(tmp_path: Path) -> None:
    class Heavy(Posed):
        draws: list[float]
        prior = Cauchy(0.0, 2.0)

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            self.posterior = Laplace(self.mean.expand(len(batch), -1), 1.0)
            self.draws.append(torch.rand(()).item())
            return loss

    draws: list[list[float]] = []
    for callbacks in ([], [FreeBits(0.5)]):
        torch.manual_seed(0)
        model = Heavy([1.0, 2.0])
        model.draws = []
        quiet_trainer(tmp_path, callbacks=callbacks, max_epochs=1, log_every_n_steps=1).fit(model, loader())
        draws.append(model.draws)
    assert draws[0] == draws[1]


def posed(posterior: Any, prior: Any = None) -> Posed:
    """Return a module that offers this posterior of each batch, and this prior."""

    class Offers(Posed):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            self.posterior = posterior(self.mean.expand(len(batch), -1)) if callable(posterior) else posterior
            return loss

    model = Offers([2.0, 0.5, 0.1])
    model.prior = prior
    return model


OTHERS: dict[str, Any] = {
    "MultivariateNormal": lambda mean: MultivariateNormal(mean, torch.eye(3)),
    "LowRankMultivariateNormal": lambda mean: LowRankMultivariateNormal(mean, torch.ones(3, 1), torch.ones(3)),
    "Gamma": lambda mean: Gamma(mean.exp(), 1.0),
    "RelaxedBernoulli": lambda mean: RelaxedBernoulli(torch.tensor(0.5), logits=mean),
    "Laplace": lambda mean: Laplace(mean, 1.0),
}


@pytest.mark.parametrize("name", OTHERS)
def test_no_rate_of_a_dimension_is_invented(tmp_path: Path, name: str) -> None:
    curves = logged(tmp_path, posed(OTHERS[name]), FreeBits(0.5))
    assert "latent/at_floor" not in curves


def test_each_group_of_categories_has_a_floor(tmp_path: Path) -> None:
    curves = logged(tmp_path, posed(lambda mean: OneHotCategorical(logits=mean)), FreeBits(0.5))
    assert curves["latent/at_floor"] == [1.0] * 6


def test_a_floor_under_the_whole_rate_needs_no_rate_of_a_dimension(tmp_path: Path) -> None:
    model = posed(OTHERS["MultivariateNormal"])
    model.free_bits_per, model.free_bits_average = "whole", "batch"
    curves = logged(tmp_path, model, FreeBits(0.5))
    assert curves["latent/at_floor"] == [0.0] * 6


def test_a_prior_over_vectors_gives_no_rate_of_a_dimension(tmp_path: Path) -> None:
    prior = MultivariateNormal(torch.zeros(3), torch.eye(3))
    curves = logged(tmp_path, posed(lambda mean: Normal(mean, 1.0), prior), FreeBits(0.5))
    assert "latent/at_floor" not in curves


def test_a_posterior_over_vectors_gives_no_rate_of_a_dimension(tmp_path: Path) -> None:
    def posterior(mean: Tensor) -> Distribution:
        return MultivariateNormal(mean[:1].expand(3, -1), torch.eye(3))  # (3,) and (3, 3) would broadcast

    curves = logged(tmp_path, posed(posterior, Normal(torch.zeros(3, 3), 1.0)), FreeBits(0.5))
    assert "latent/at_floor" not in curves


@pytest.mark.parametrize("independent", [True, False])
def test_a_factorised_posterior_is_measured_against_the_modules_prior(tmp_path: Path, independent: bool) -> None:
    def posterior(mean: Tensor) -> Distribution:
        laplace = Laplace(mean, 1.0)  # rates of 1.14, 0.37 and 0.09
        return Independent(laplace, 1) if independent else laplace

    curves = logged(tmp_path, posed(posterior, Laplace(torch.zeros(3), 1.0)), FreeBits(0.5))
    assert curves["latent/at_floor"] == [2.0] * 6


def test_what_is_called_posterior_and_is_none(tmp_path: Path) -> None:
    class Names(ForeignModule):
        free_bits = 0.0

        def posterior(self, x: Tensor) -> Normal:
            return Normal(x, 1.0)

    assert "latent/at_floor" not in logged(tmp_path, Names(), FreeBits(0.5))
    model = posed(None)
    assert "latent/at_floor" not in logged(tmp_path, model, FreeBits(0.5))


def test_the_rates_of_all_views_count(tmp_path: Path) -> None:
    # Rates of 2, 0.5, 0.1 in one view and 0, 4, 0.5 in the other: 1, 2.25, 0.3 on average.
    views = [lambda mean: mean, lambda mean: torch.tensor([0.0, 8**0.5, 1.0]).expand_as(mean)]
    model = posed(lambda mean: [Normal(view(mean), 1.0) for view in views])
    assert logged(tmp_path, model, FreeBits(0.9))["latent/at_floor"] == [1.0] * 6


def test_views_of_different_sizes(tmp_path: Path) -> None:
    model = posed(lambda mean: [Normal(mean, 1.0), Normal(mean[:, :2], 1.0)])
    with pytest.raises(ValueError, match=r"latents of different shapes, \(2,\) and \(3,\)\. Select"):
        logged(tmp_path, model, FreeBits(0.9))


def test_a_prior_of_another_shape(tmp_path: Path) -> None:
    model = posed(lambda mean: Normal(mean.unsqueeze(-1), 1.0), Normal(torch.zeros(3), 1.0))
    with pytest.raises(ValueError, match=r"`prior` of shape \(3,\) does not fit its posterior of shape \(2, 3, 1\)"):
        logged(tmp_path, model, FreeBits(0.9))


# ---- the warning


@pytest.mark.parametrize(
    ("rates", "threshold", "message"),
    [
        ([0.5, 0.5, 0.5, 0.1], 0.5, r"4 of 4 floors .* together they are 2.00 nats, the measured rate is 1.60"),
        ([0.51, 0.51], 0.5, r"2 of 2 floors .* together they are 1.00 nats, the measured rate is 1.02"),
        ([3.0, 0.0, 0.0], 1.5, r"2 of 3 floors .* together they are 4.50 nats, the measured rate is 3.00"),
    ],
)
def test_a_threshold_that_sets_the_model_warns_once_from_half_of_the_run_on(
    tmp_path: Path, rates: list[float], threshold: float, message: str
) -> None:
    callback, warned_at = FreeBits(threshold), []
    end = callback.on_train_epoch_end

    def watched(trainer: Any, pl_module: Any) -> None:
        before = callback._warned
        end(trainer, pl_module)
        if callback._warned != before:
            warned_at.append(trainer.current_epoch)

    callback.on_train_epoch_end = watched  # type: ignore[method-assign]
    with pytest.warns(UserWarning, match=message) as record:
        logged(tmp_path, Posed(rates), callback, max_epochs=4)
    assert len([each for each in record if "FreeBits" in str(each.message)]) == 1
    assert warned_at == [1]


@pytest.mark.filterwarnings("error:FreeBits")
@pytest.mark.parametrize(
    ("rates", "threshold"), [([3.0, 2.0, 0.5], 0.5), ([0.0, 0.0], 0.0), ([1.0, 1.0], 0.5), ([5.0] * 9 + [0.1], 0.5)]
)
def test_a_threshold_that_leaves_the_model_alone_does_not_warn(
    tmp_path: Path, rates: list[float], threshold: float
) -> None:
    logged(tmp_path, Posed(rates), FreeBits(threshold), max_epochs=2)


# ---- the object


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": -0.1}, "`threshold` must be at least 0 nats and finite, or a schedule, got -0.1"),
        ({"threshold": float("nan")}, "`threshold` must be at least 0"),
        ({"threshold": float("inf")}, "and finite, or a schedule, got inf"),
        (
            {"threshold": 0.5, "per": "group"},
            "`per` must be 'dimension', 'whole' or a number of dimensions, got 'group'",
        ),
        ({"threshold": 0.5, "per": 0}, "`per` must be"),
        ({"threshold": 0.5, "average": "mean"}, "`average` must be 'batch' or 'sample', got 'mean'"),
        ({"threshold": 0.5, "second": "std"}, "`second` must be one of"),
        ({"threshold": 0.5, "chunk": 0}, "`chunk` must be the axis"),
    ],
)
def test_an_option_out_of_its_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FreeBits(**options)


def test_state_key_and_pickling(tmp_path: Path) -> None:
    callback = FreeBits(Linear(stop=0.5, steps=3))
    assert callback.state_key == "FreeBits{'attribute': 'free_bits', 'name': 'free_bits'}"
    assert callback.state_key is callback.state_key  # Lightning asks at every hook
    logged(tmp_path, RecordingVAE(), callback)
    assert pickle.loads(pickle.dumps(callback)).state_dict() == callback.state_dict()
