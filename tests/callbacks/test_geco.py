import math
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor, nn
from torch.distributions import Independent, Normal, kl_divergence

from lightning_vae import MMD, VAE
from lightning_vae.callbacks import GECO, KLAnnealing, Linear, Staged, TargetRate
from lightning_vae.callbacks.geco import sum_and_count
from lightning_vae.datamodules import Gaussian as GaussianData
from lightning_vae.datamodules import linear_vae_optimum
from lightning_vae.objective import constrained_error, constrained_rate_loss
from tests.doubles import RecordingVAE, loader, quiet_trainer
from tests.processes import in_two_processes
from tests.test_yardstick import SPECTRUM, VARIANCE, LinearVAE, closed_expectation

pytestmark = [
    # Lightning's remarks on what these tests do on purpose.
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
    pytest.mark.filterwarnings("ignore:The training data come from a DataLoader"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed from"),
]

PACKAGES = ("lightning.pytorch", "pytorch_lightning")
CONSTANT = 3 * math.log(2 * math.pi * VARIANCE)  # distortion of the yardstick without error
# Constraint on the squared error, and its multiplier, rate and distortion at the optimum.
END_POINTS = {2.0: (1.25, 3.27777, 5.26476), 4.0: (0.53571, 1.66025, 7.76476)}


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def betas(model: RecordingVAE) -> list[float]:
    return [beta for beta, _ in model.used]


# ---- the yardstick


class Watch(Callback):
    """Record the weight of each step."""

    def __init__(self) -> None:
        self.betas: list[float] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.betas.append(float(pl_module.beta))

    def multiplier(self, steps: int) -> float:
        """The multiplier on the squared error, averaged over the last steps."""
        return sum(1 / (2 * VARIANCE * beta) for beta in self.betas[-steps:]) / steps


def fit_yardstick(
    root: Path, callback: GECO, steps: int, start: float, batch_size: int, rates: tuple[float, float]
) -> Any:
    """Train with a learning rate between two, which doesn't fall to 0: the weight would no longer move the model."""

    def configure() -> Any:
        optimizer = torch.optim.Adam(vae.parameters(), rates[0], fused=True)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, rates[1] / rates[0], steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    seed_everything(1)
    vae, watch = LinearVAE(beta=start), Watch()
    vae.configure_optimizers = configure  # type: ignore[method-assign]
    data = GaussianData(SPECTRUM, size=8192, batch_size=batch_size)
    options = {"max_steps": steps, "max_epochs": -1, "check_val_every_n_epoch": steps}
    trainer = quiet_trainer(root, callbacks=[callback, watch], **options)
    trainer.fit(vae, data)
    distortion, parts, _ = closed_expectation(vae, data._splits["train"]["x"])
    return watch, 2 * VARIANCE * (float(distortion) - CONSTANT), float(parts.sum())


@pytest.mark.exhaustive
@pytest.mark.parametrize("start", [0.1, 10.0])
@pytest.mark.parametrize("kind", ["squared_error", "distortion"])
@pytest.mark.parametrize("limit", [4.0, 2.0])
def test_the_end_point_is_the_closed_form_from_both_sides(
    tmp_path: Path, limit: float, kind: str, start: float
) -> None:
    multiplier, rate, distortion = END_POINTS[limit]
    if kind == "distortion":  # of which a larger share stays, whatever the weight
        callback = GECO(distortion=distortion, proportional=2.0, integral=0.02)
    else:
        callback = GECO(squared_error=limit)
    watch, error, found = fit_yardstick(tmp_path, callback, 2000, start, 512, (1e-2, 1e-3))
    assert watch.multiplier(500) == pytest.approx(multiplier, rel=0.03)
    assert error == pytest.approx(limit, rel=0.03)
    assert found == pytest.approx(rate, abs=0.05)


def test_a_short_run_is_near_it(tmp_path: Path) -> None:
    fast = GECO(squared_error=4.0, smoothing=0.9, integral=0.03)
    watch, error, _ = fit_yardstick(tmp_path, fast, 300, 1.0, 512, (2e-2, 5e-3))
    assert watch.multiplier(75) == pytest.approx(END_POINTS[4.0][0], rel=0.1)
    assert error == pytest.approx(4.0, rel=0.05)


@pytest.mark.exhaustive
def test_a_reachable_constraint_is_met_after_an_unreachable_one(tmp_path: Path) -> None:
    callback = GECO(squared_error=Staged([0.3, 4.0], at_steps=[5000]))
    with pytest.warns(
        UserWarning, match=r"has been at its smallest, 0.01, .* instead of 0.3: the constraint is out of"
    ):
        watch, error, rate = fit_yardstick(tmp_path, callback, 9000, 1.0, 200, (3e-3, 3e-3))
    assert watch.betas[4999] == pytest.approx(0.01)
    assert min(watch.betas) > 0.009999
    assert max(watch.betas) < 3.0, "it doesn't overshoot by much"
    multiplier, least, _ = END_POINTS[4.0]
    assert error == pytest.approx(4.0, rel=0.03)
    assert rate == pytest.approx(least, abs=0.05)
    assert watch.multiplier(1000) == pytest.approx(multiplier, rel=0.03)


# ---- val/loss


def test_the_loss_selects_the_closed_form_of_the_limit() -> None:
    """Of all models on the curve of rate and distortion the best is the one at the limit, if the price is right."""
    curve = [linear_vae_optimum(SPECTRUM, 4, VARIANCE, beta=1.02**step) for step in range(-150, 120)]

    def best(price: float) -> float:
        """The squared error of the best."""
        errors = [2 * VARIANCE * (each.distortion - CONSTANT) for each in curve]
        rates = (torch.tensor(each.rate) for each in curve)
        losses = [
            float(constrained_rate_loss(rate, torch.tensor(error), 4.0, price))
            for rate, error in zip(rates, errors, strict=True)
        ]
        return errors[losses.index(min(losses))]

    # Two neighbours on the curve are 0.06 apart.
    assert best(price=1.05 * END_POINTS[4.0][0]) == pytest.approx(4.0, abs=0.06)
    assert best(price=100 / 4.0) == pytest.approx(4.0, abs=0.06), "the default"
    assert best(price=0.9 * END_POINTS[4.0][0]) > 4.2, "too cheap: a violation pays"


@pytest.mark.parametrize("kind", ["squared_error", "distortion"])
def test_the_validation_loss_is_the_rate_and_the_price_of_a_violation(tmp_path: Path, kind: str) -> None:
    callback = GECO(**{kind: 1.5}, price=3.0, tolerance=0.1)
    trainer = quiet_trainer(tmp_path, callbacks=[callback], max_epochs=1)
    trainer.fit(model := RecordingVAE(), loader(), loader())
    values = {name: float(value) for name, value in trainer.callback_metrics.items()}
    error = values[f"val/{kind}"]
    # The likelihood's variance is 0.5, so the two errors differ by a constant.
    assert values["val/distortion"] == pytest.approx(
        math.log(math.pi) + values["val/squared_error"] if kind == "squared_error" else error, rel=1e-5
    )
    assert error > 1.65
    assert values["val/loss"] == pytest.approx(values["val/rate"] + 3.0 * (error - 1.65), rel=1e-5)
    assert model.error_limit == (kind, pytest.approx(1.65), 3.0)
    assert (model.rate_limit, model.steered_knobs) == (None, ("beta",))

    trainer.save_checkpoint(path := tmp_path / "a.ckpt")
    again = RecordingVAE(beta=3.0)
    tested = quiet_trainer(tmp_path).test(again, loader(), path, verbose=False)[0]
    assert float(again.beta) == float(model.beta)
    assert tested["test/loss"] == pytest.approx(
        tested["test/rate"] + 3.0 * max(0.0, tested[f"test/{kind}"] - 1.65), rel=1e-5
    )

    quiet_trainer(tmp_path, max_epochs=1).fit(model, loader())
    assert model.error_limit is None


def test_the_default_price_is_in_units_of_the_error(tmp_path: Path) -> None:
    for callback, price in ((GECO(squared_error=0.5, factor=2.0), 100.0), (GECO(distortion=-4.0), 10.0)):
        quiet_trainer(tmp_path, callbacks=[callback], max_epochs=1).fit(model := RecordingVAE(), loader())
        assert model.error_limit is not None
        assert model.error_limit[2] == price
    assert model.error_limit[1] == pytest.approx(-3.8), "a tolerance allows more"


def test_a_price_below_the_multiplier_is_reported(tmp_path: Path) -> None:
    errors = iter(range(100))
    callback = GECO(distortion=5.0, price=0.5, tolerance=0.2)
    model = RecordingVAE()
    elbo_terms = model.elbo_terms

    def at_the_limit(*args: Any) -> Any:
        terms = elbo_terms(*args)
        model.constrained_error = torch.full((2,), 5.0 + 0.1 * (-1) ** next(errors))
        return terms

    model.elbo_terms = at_the_limit  # type: ignore[method-assign]
    trainer = quiet_trainer(tmp_path, callbacks=[callback], max_epochs=1, log_every_n_steps=1)
    with pytest.warns(UserWarning, match="and `val/loss` charges 0.5 for it: a violation would pay. Raise `price`"):
        trainer.fit(model, loader())


# ---- the steps of the controller


def expected(errors: list[float], limit: float, scale: float, start: float = 1.0) -> list[float]:
    """The weight of each step by the formula, in float64."""
    average, integral, weights = errors[0], -math.log(start), [start]
    for error in errors:
        average = 0.99 * average + 0.01 * error
        relative = max(-1.0, min(1.0, (average - limit) / scale))
        integral += 0.01 * relative
        weights.append(math.exp(-(relative + integral)))
    return weights


class Errors(Callback):
    """Record each step's error of a VAE."""

    def __init__(self) -> None:
        self.errors: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.errors.append(float(pl_module.constrained_error.mean()))


@pytest.mark.parametrize(("kind", "limit", "scale"), [("squared_error", 3.0, 3.0), ("distortion", 0.2, 1.0)])
def test_the_weight_of_each_step(tmp_path: Path, kind: str, limit: float, scale: float) -> None:
    seen = Errors()
    trainer = quiet_trainer(tmp_path, callbacks=[GECO(**{kind: limit}), seen], max_epochs=2, log_every_n_steps=1)
    trainer.fit(model := RecordingVAE(), loader())
    weights = expected(seen.errors, limit, scale)
    assert [*betas(model), float(model.beta)] == pytest.approx(weights, rel=1e-4)
    assert float(trainer.callback_metrics["knobs/beta"]) == pytest.approx(weights[-2], rel=1e-4)
    assert float(trainer.callback_metrics["knobs/error_limit"]) == pytest.approx(limit)
    average = seen.errors[0]
    for error in seen.errors[1:]:
        average = 0.99 * average + 0.01 * error
    assert float(trainer.callback_metrics["train/constrained_error"]) == pytest.approx(average, rel=1e-4)


def test_the_error_is_that_of_the_sampled_latents(tmp_path: Path) -> None:
    """At the mean, wide posteriors would cost nothing."""
    model = RecordingVAE()
    with torch.no_grad():
        model.encoder.mean.weight.zero_()
        model.decoder.map.weight.copy_(10.0 * torch.eye(2))
        model.decoder.map.bias.zero_()
    seen = Errors()
    quiet_trainer(tmp_path, callbacks=[GECO(squared_error=1.0), seen], max_steps=1).fit(model, loader(64, 64))
    assert 100 < seen.errors[0] < 300, "200 in the mean"


# ---- any module


class Decoder(nn.Linear):
    """Returns p(x|z)."""

    def forward(self, z: Tensor) -> Independent:
        return Independent(Normal(super().forward(z), 0.5**0.5), 1)


def foreign(package: str = "lightning.pytorch", decoder: type[nn.Module] = nn.Linear, tensor: bool = False) -> Any:
    """Somebody's VAE, which keeps its weight in a config and draws its noise from the batch's number."""

    class Foreign(import_module(package).LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.encoder, self.decoder = nn.Linear(2, 4), decoder(2, 2)
            self.params: dict[str, Any] = {"kl_weight": torch.tensor(1.0) if tensor else 1.0}
            self.mean_error, self.last_errors = torch.tensor(0.0), torch.zeros(2)
            self.used: list[float] = []
            self.errors: list[float] = []

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            self.used.append(float(self.params["kl_weight"]))
            mean, log_variance = self.encoder(batch).chunk(2, -1)
            noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(batch_idx))
            posterior = Normal(mean, (0.5 * log_variance).exp())
            rate = kl_divergence(posterior, Normal(0.0, 1.0)).sum(-1).mean()
            decoded = self.decoder(mean + noise * posterior.scale)
            errors = (batch - (decoded if isinstance(decoded, Tensor) else decoded.mean)).square().sum(-1)
            self.mean_error, self.last_errors = errors.mean().detach(), errors.detach()
            self.errors.append(float(self.mean_error))
            return errors.mean() + self.params["kl_weight"] * rate

        def validation_step(self, batch: Tensor, batch_idx: int) -> None:
            self.log("val_loss", self.params["kl_weight"] * batch.mean())

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), 0.02)

    return Foreign()


def fit(package: str, model: Any, root: Path, ckpt_path: Path | None = None, **options: Any) -> GECO:
    geco = options.pop("geco", {"squared_error": 1.0, "error": "decoder"})
    callback = GECO(**{"attribute": "params.kl_weight", **geco})
    save = import_module(f"{package}.callbacks").ModelCheckpoint(
        str(root), "{step}", save_top_k=-1, every_n_train_steps=6
    )
    quiet = {"accelerator": "cpu", "devices": 1, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = import_module(package).Trainer(
        default_root_dir=root, logger=False, callbacks=[callback, save],
        **{"max_epochs": 3, "log_every_n_steps": 1, **quiet, **options},
    )  # fmt: skip
    trainer.fit(model, loader(), ckpt_path=ckpt_path)
    return callback


@pytest.mark.parametrize("tensor", [False, True])
@pytest.mark.parametrize("package", PACKAGES)
def test_a_foreign_module_is_steered_and_resumes_bit_by_bit(package: str, tensor: bool, tmp_path: Path) -> None:
    callback = fit(package, whole := foreign(package, tensor=tensor), tmp_path / "whole")
    assert [*whole.used, float(whole.params["kl_weight"])] == pytest.approx(expected(whole.errors, 1.0, 1.0), rel=1e-4)
    assert len(set(whole.used)) == 18
    for saved in (6, 12):
        path = tmp_path / "whole" / f"step={saved}.ckpt"
        state = next(value for key, value in torch.load(path, weights_only=True)["callbacks"].items() if "GECO" in key)
        assert all(isinstance(value, float | int | str | Tensor | None) for value in state.values()), "flat"
        again = foreign(package, tensor=tensor)
        resumed = fit(package, again, tmp_path / f"from {saved}", path)
        assert again.used == whole.used[saved:]
        assert str(resumed.state_dict()) == str(callback.state_dict())


@pytest.mark.parametrize(
    ("error", "decoder"),
    [
        ("decoder", Decoder),
        ("mean_error", nn.Linear),
        ("last_errors", nn.Linear),
        (lambda module, batch: module.last_errors, nn.Linear),
    ],
    ids=["distribution", "mean", "errors", "callable"],
)
def test_every_place_gives_the_same(error: Any, decoder: Any, tmp_path: Path) -> None:
    model = foreign(decoder=decoder)
    fit("lightning.pytorch", model, tmp_path, geco={"squared_error": 1.0, "error": error})
    assert model.used == pytest.approx(expected(model.errors, 1.0, 1.0)[:-1], rel=1e-4)


def test_the_distortion_of_a_likelihood(tmp_path: Path) -> None:
    model = foreign(decoder=Decoder)
    fit("lightning.pytorch", model, tmp_path, geco={"distortion": 2.5, "error": "decoder"})
    # Two dimensions of variance 0.5.
    weights = expected([math.log(math.pi) + error for error in model.errors], 2.5, 2.5)
    assert model.used == pytest.approx(weights[:-1], rel=1e-4)


def test_a_setter_writes_the_weight_of_the_reconstruction(tmp_path: Path) -> None:
    written: list[float] = []
    geco = {
        "squared_error": 1.0, "error": "decoder", "start": 2.0, "name": "w",
        "setter": lambda _, beta: written.append(1 / beta),
    }  # fmt: skip
    fit("lightning.pytorch", model := foreign(), tmp_path, geco=geco, max_epochs=1)
    assert written[0] == pytest.approx(0.5)
    assert sorted({*written}) == pytest.approx(sorted(1 / each for each in expected(model.errors, 1.0, 1.0, 2.0)))


def test_batches_of_one_step_are_measured_together(tmp_path: Path) -> None:
    fit("lightning.pytorch", model := foreign(), tmp_path, accumulate_grad_batches=3, max_epochs=1)
    steps = [sum(model.errors[first : first + 3]) / 3 for first in (0, 3)]
    assert model.used == pytest.approx([weight for weight in expected(steps, 1.0, 1.0)[:2] for _ in range(3)], rel=1e-4)


@pytest.mark.parametrize(
    ("value", "x", "sums"),
    [
        (torch.tensor([1.0, 2.0, 6.0]), None, (9.0, 3)),
        (torch.tensor(2.0), torch.zeros(5, 4), (10.0, 5)),
        (torch.tensor(2.0), None, (2.0, 1)),
        (torch.ones(3, 4), torch.zeros(3, 2, 2), (12.0, 3)),
        (torch.ones(3, 2, 2), torch.zeros(3, 2, 2, dtype=torch.uint8), (12.0, 3)),
        (Normal(torch.ones(3, 4), 1.0), torch.zeros(3, 2, 2), (12.0, 3)),
    ],
)
def test_sum_and_count(value: Any, x: Any, sums: tuple[float, int]) -> None:
    assert tuple(sum_and_count(value, x, "squared_error").tolist()) == sums


@pytest.mark.parametrize(
    ("value", "x", "kind", "message"),
    [
        (torch.ones(3, 4), torch.zeros(3, 5), "squared_error", r"shape \(3, 4\), which can't be compared .* \(3, 5\)"),
        (torch.ones(4, 3), torch.zeros(3, 4), "squared_error", "can't be compared with observations of shape"),
        (Normal(torch.ones(4), 1.0), torch.zeros(3, 4), "distortion", "can't be compared with observations of shape"),
        (torch.ones(3, 4), torch.zeros(3, 4), "distortion", r"must be a Distribution p\(x\|z\) or the error itself"),
        ((torch.ones(3, 4),) * 2, torch.zeros(3, 4), "squared_error", "must be a reconstruction, a Distribution"),
        (torch.ones(3, 4), None, "squared_error", "`x` must be the observations in the batch"),
    ],
)
def test_what_can_not_be_compared(value: Any, x: Any, kind: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sum_and_count(value, x, kind)


def test_a_module_that_leaves_no_error_is_an_error(tmp_path: Path) -> None:
    class Own(RecordingVAE):
        def elbo_terms(self, x: Any, index: Any = None) -> Any:
            terms = super().elbo_terms(x, index)
            self.constrained_error = None
            return terms

    message = r"GECO\(beta\): Own has left no error in its first step. Say where it is with `error=`"
    with pytest.raises(ValueError, match=message):
        quiet_trainer(tmp_path, callbacks=[GECO(squared_error=1.0)], max_epochs=1).fit(Own(), loader())


def test_monitoring_a_foreign_validation_loss_is_warned_of(tmp_path: Path) -> None:
    callbacks = [
        GECO(squared_error=0.5, attribute="params.kl_weight", error="decoder"),
        EarlyStopping("val_loss"),
    ]
    trainer = quiet_trainer(tmp_path, callbacks=callbacks, max_epochs=1)
    with pytest.warns(UserWarning, match="EarlyStopping monitors 'val_loss'.*Monitor the rate, once the error is at"):
        trainer.fit(foreign(), loader(), loader())


def test_resuming_the_vae_goes_on_bit_by_bit(tmp_path: Path) -> None:
    def run(path: Path | None = None) -> RecordingVAE:
        torch.manual_seed(0)
        model = RecordingVAE()
        model.elbo_terms = partial(quietly, model)  # type: ignore[method-assign]
        save = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=6)
        callbacks = [GECO(squared_error=2.0), save]
        trainer = quiet_trainer(tmp_path, callbacks=callbacks, enable_checkpointing=True, max_epochs=3)
        trainer.fit(model, loader(), loader(), ckpt_path=path)
        return model

    def quietly(model: RecordingVAE, x: Any, index: Tensor | None = None) -> Any:
        return VAE.elbo_terms(model, x, torch.arange(len(x)) if index is None else index)

    whole = run()
    assert len(set(betas(whole))) == 18
    for saved in (6, 12):
        resumed = run(tmp_path / f"step={saved}.ckpt")
        assert betas(resumed) == betas(whole)[saved:]
        assert resumed.error_limit == whole.error_limit


@pytest.mark.filterwarnings("ignore:.*the run continues under Constant")
def test_resuming_with_the_other_error_starts_its_average(tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path, callbacks=[first := GECO(squared_error=2.0)], max_epochs=1)
    trainer.fit(RecordingVAE(), loader())
    trainer.save_checkpoint(path := tmp_path / "a.ckpt")

    seen, second = Errors(), GECO(distortion=20.0, smoothing=0.9)
    trainer = quiet_trainer(tmp_path, callbacks=[second, seen], max_epochs=2)
    with pytest.warns(UserWarning, match="a constraint on the squared_error, and this run has one on the distortion"):
        trainer.fit(model := RecordingVAE(), loader(), ckpt_path=path)
    assert betas(model)[0] == pytest.approx(float(first.weight))  # type: ignore[arg-type]
    average = seen.errors[0]
    for error in seen.errors[1:]:
        average = 0.9 * average + 0.1 * error
    assert float(second.state_dict()["average"]) == pytest.approx(average, rel=1e-5)


@pytest.mark.filterwarnings("ignore:.*the checkpoint holds no state of this callback")
@pytest.mark.parametrize("controller", [lambda: GECO(squared_error=2.0), lambda: TargetRate(0.3)])
def test_resuming_without_it_drops_its_limit_and_says_so(tmp_path: Path, controller: Any) -> None:
    trainer = quiet_trainer(tmp_path, callbacks=[controller()], max_epochs=1)
    trainer.fit(RecordingVAE(), loader(), loader())
    trainer.save_checkpoint(path := tmp_path / "a.ckpt")

    trainer = quiet_trainer(tmp_path, callbacks=[KLAnnealing(Linear(stop=3.0, steps=1))], max_epochs=2)
    with pytest.warns(UserWarning, match="none of this run does: `val/loss` is the loss at the module's knobs"):
        trainer.fit(model := RecordingVAE(), loader(), loader(), ckpt_path=path)
    assert (model.rate_limit, model.error_limit, model.steered_knobs) == (None, None, ())
    values = trainer.callback_metrics
    assert values["val/loss"] == pytest.approx(float(values["val/distortion"] + 3.0 * values["val/rate"]))

    other = GECO(distortion=2.0) if isinstance(controller(), TargetRate) else TargetRate(0.3)
    trainer = quiet_trainer(tmp_path, callbacks=[other], max_epochs=2)
    with pytest.warns(UserWarning, match="none of this run does"):
        trainer.fit(model := RecordingVAE(), loader(), loader(), ckpt_path=path)
    assert (model.rate_limit is None) != (model.error_limit is None)


class Sharing(RecordingVAE):
    """Leaves behind what its process did."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder, self.errors = folder, []

    def on_train_batch_end(self, *args: Any) -> None:
        assert self.constrained_error is not None
        self.errors.append(float(self.constrained_error.mean()))
        super().on_train_batch_end(*args)

    def on_train_end(self) -> None:
        torch.save({"betas": betas(self), "errors": self.errors}, self.folder / f"{self.global_rank}.pt")


def share(rank: int, folder: Path) -> None:
    callbacks = [GECO(squared_error=3.0, smoothing=0.0)]
    quiet_trainer(folder, devices=2, strategy="ddp", callbacks=callbacks, max_epochs=1).fit(Sharing(folder), loader(24))


@pytest.mark.exhaustive
def test_two_processes_have_one_weight_from_the_error_of_both(tmp_path: Path) -> None:
    in_two_processes(share, tmp_path)
    one, other = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert one["errors"] != other["errors"]
    assert one["betas"] == other["betas"]
    error = max(-1.0, min(1.0, ((one["errors"][0] + other["errors"][0]) / 2 - 3.0) / 3.0))
    assert math.log(one["betas"][1]) == pytest.approx(-1.01 * error, rel=1e-4)


# ---- what is reported


@pytest.mark.parametrize(
    ("limit", "message"),
    [
        (1e-3, r"GECO\(beta\): `beta` has been at its smallest, 0.5, .* squared error is .* instead of 0.001: the "),
        (1e3, r"GECO\(beta\): `beta` has been at its largest, 2, .* instead of 1000: the constraint is idle. Lower it"),
    ],
)
@pytest.mark.parametrize("logs", [1, 1000])
def test_a_constraint_out_of_reach_or_idle_is_reported_once(
    tmp_path: Path, limit: float, message: str, logs: int
) -> None:
    callback = GECO(squared_error=limit, min_beta=0.5, max_beta=2.0, patience=20)
    trainer = quiet_trainer(tmp_path, callbacks=[callback], max_epochs=10, log_every_n_steps=logs)
    with pytest.warns(UserWarning, match=message) as caught:
        trainer.fit(model := RecordingVAE(), loader())
    assert len([each for each in caught if "has been at its" in str(each.message)]) == 1
    assert betas(model)[-1] == pytest.approx(0.5 if limit < 1 else 2.0)


@pytest.mark.parametrize(
    ("twin", "message"),
    [
        (lambda: KLAnnealing(Linear(steps=2)), "Two callbacks move `beta`"),
        (lambda: TargetRate(2.0), "Two callbacks move `beta`"),
        (lambda: GECO(distortion=2.0, attribute="free_bits"), "Two callbacks log `knobs/error_limit`"),
    ],
)
def test_two_that_move_one_weight_are_an_error(tmp_path: Path, twin: Any, message: str) -> None:
    callbacks = [GECO(squared_error=1.0), twin()]
    with pytest.raises(MisconfigurationException, match=message):
        quiet_trainer(tmp_path, callbacks=callbacks, max_epochs=1).fit(RecordingVAE(), loader())


@pytest.mark.parametrize(
    "second",
    [
        lambda: GECO(distortion=2.0, attribute="mmd_weight", name="second"),
        lambda: GECO(squared_error=2.0, attribute=["free_bits", "mmd_weight"], start=3.0, name="second"),
        lambda: TargetRate(2.0, attribute="mmd_weight"),
    ],
)
@pytest.mark.parametrize("alone", [True, False])
def test_another_knob_than_beta_is_an_error(tmp_path: Path, second: Any, alone: bool) -> None:
    """Its direction would be wrong, and the limit of one controller would replace that of the other."""
    model = RecordingVAE(terms={"mmd": MMD})
    callbacks = [second()] if alone else [GECO(squared_error=1.0), second()]
    with pytest.raises(MisconfigurationException, match=r"moves `beta` alone.*got attribute=.*Leave it out"):
        quiet_trainer(tmp_path, callbacks=callbacks, max_epochs=1).fit(model, loader())


# ---- options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "must be given as `squared_error` or as `distortion`"),
        ({"squared_error": 1.0, "distortion": 1.0}, "must be given as `squared_error` or as `distortion`"),
        ({"squared_error": 0.0}, "`squared_error` must be a finite number above 0, or a schedule"),
        ({"distortion": math.inf}, "`distortion` must be a finite number, or a schedule"),
        ({"squared_error": Linear(start=0.5, fraction=0.5)}, "Give it a `stop`"),
        ({"squared_error": 1.0, "factor": 0.0}, "`factor` must be a finite number above 0"),
        ({"distortion": 1.0, "factor": 2.0}, "`factor` must be 1 with a `distortion`"),
        ({"squared_error": 1.0, "integral": 0.0}, "`integral` must be a finite number above 0"),
        ({"squared_error": 1.0, "smoothing": 1.0}, "`smoothing` must be at least 0 and below 1"),
        ({"squared_error": 1.0, "setter": setattr}, "`start` must be given with a `setter`"),
        ({"squared_error": 1.0, "error": 3}, "`error` must be None, a submodule's path"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GECO(**options)


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (GECO(squared_error=Linear(start=1.0, stop=-1.0, steps=4)), "must end at a finite number above 0, got -1"),
        (GECO(distortion=lambda step: math.nan), "must end at a finite number, got nan"),
        (GECO(squared_error=1.0, attribute="betta"), "betta"),
    ],
)
def test_what_can_not_begin(tmp_path: Path, callback: GECO, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quiet_trainer(tmp_path, callbacks=[callback], max_epochs=1).fit(RecordingVAE(), loader())


def test_a_factor_and_a_schedule(tmp_path: Path) -> None:
    callback = GECO(squared_error=Linear(start=2.0, stop=1.0, steps=4), factor=1.5)
    quiet_trainer(tmp_path, callbacks=[callback], max_epochs=1).fit(model := RecordingVAE(), loader())
    assert [callback.target(step) for step in (0, 2, 9)] == pytest.approx([3.0, 2.25, 1.5])
    assert model.error_limit is not None
    assert model.error_limit[1] == pytest.approx(1.5 * 1.05)


def test_a_missing_number_has_no_error() -> None:
    x, likelihood = torch.ones(2, 3), Independent(Normal(torch.zeros(2, 3), 1.0), 1)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    errors = [constrained_error("squared_error", torch.zeros(2), likelihood, x, each) for each in (None, mask)]
    assert [each.tolist() for each in errors] == [[3.0, 3.0], [2.0, 1.0]]


def test_a_mean_in_another_shape_than_the_data_has_no_squared_error() -> None:
    likelihood = Independent(Normal(torch.zeros(2, 1, 3), 1.0), 2)
    with pytest.raises(
        ValueError, match=r"in the shape of the data, \(2, 3\), got \(2, 1, 3\). Constrain the distortion"
    ):
        constrained_error("squared_error", torch.zeros(2), likelihood, torch.ones(2, 3))
