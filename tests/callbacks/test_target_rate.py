import math
import warnings
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor, nn
from torch.distributions import Gamma, Normal, kl_divergence
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_vae import Gaussian
from lightning_vae.callbacks import Constant, KLAnnealing, Linear, Schedule, Staged, TargetRate
from lightning_vae.datamodules import Gaussian as GaussianData
from lightning_vae.datamodules import linear_vae_optimum
from lightning_vae.objective import limited_rate_loss
from tests.doubles import RecordingVAE, loader, quiet_trainer, weight_averaging
from tests.processes import in_two_processes
from tests.test_yardstick import SPECTRUM, VARIANCE, LinearVAE

pytestmark = [
    # Lightning's remarks on what these tests do on purpose.
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
    pytest.mark.filterwarnings("ignore:The training data come from a DataLoader"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed from"),
]

PACKAGES = ("lightning.pytorch", "pytorch_lightning")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def betas(model: RecordingVAE) -> list[float]:
    return [beta for beta, _ in model.used]


def beta_at(rate: float) -> float:
    """The weight whose optimum on the yardstick has this rate."""
    low, high = -12.0, 6.0
    for _ in range(60):
        middle = (low + high) / 2
        if linear_vae_optimum(SPECTRUM, 4, VARIANCE, beta=math.exp(middle)).rate > rate:
            low = middle
        else:
            high = middle
    return math.exp(low)


# ---- the yardstick


class Watch(Callback):
    """Record the weight of each step, and each validation."""

    def __init__(self) -> None:
        self.betas: list[float] = []
        self.passes: list[tuple[int, dict[str, float]]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.betas.append(float(pl_module.beta))

    def on_validation_end(self, trainer: Any, pl_module: LightningModule) -> None:
        values = {name: float(value) for name, value in trainer.callback_metrics.items()}
        self.passes.append((len(self.betas), values))


def train(tmp_path: Path, callback: Callback, steps: int, model: LinearVAE, **options: Any) -> tuple[Watch, Trainer]:
    watch = Watch()
    options = {"check_val_every_n_epoch": 5, "num_sanity_val_steps": 0, "max_epochs": steps // 4, **options}
    trainer = quiet_trainer(tmp_path, callbacks=[callback, watch, *options.pop("callbacks", [])], **options)
    # Large batches, so that what is seen is the controller and not the noise of the steps.
    trainer.fit(model, GaussianData(SPECTRUM, size=8192, batch_size=2048))
    return watch, trainer


@pytest.mark.sampled(1)
@pytest.mark.parametrize("start", [0.1, 10.0])
@pytest.mark.parametrize("target", [0.884, 3.2778])
def test_rate_and_weight_reach_the_closed_form_from_both_sides(tmp_path: Path, target: float, start: float) -> None:
    watch, trainer = train(tmp_path, TargetRate(target), 1200, model := LinearVAE(beta=start))
    beta = beta_at(target)
    rates = [values["val/rate"] for step, values in watch.passes if step >= 960]
    assert len(rates) == 13
    assert rates == pytest.approx([target] * 13, abs=max(0.01 * target, 0.02))
    assert watch.betas[960:] == pytest.approx([beta] * 240, rel=0.03)
    assert float(model.beta) == pytest.approx(beta, rel=0.03), "fitting leaves the weight that was found"
    optimum = linear_vae_optimum(SPECTRUM, 4, VARIANCE, beta=beta)
    # The target and no more is paid for: the loss is the least distortion at that rate.
    assert trainer.callback_metrics["val/loss"] == pytest.approx(optimum.distortion, abs=0.1)


@pytest.mark.exhaustive
def test_a_learned_variance_settles_with_the_weight(tmp_path: Path) -> None:
    """The target fixes the product of the two, that the error, and the error the variance."""
    model, target = LinearVAE(), 2.0
    model.likelihood = Gaussian((6,), variance="learned")
    watch, _ = train(tmp_path, TargetRate(target), 1200, model)
    product = VARIANCE * beta_at(target)
    variance = sum(min(each, product) for each in SPECTRUM) / 6  # mean squared error of reverse water-filling
    assert float(model.likelihood.log_variance.detach().exp()) == pytest.approx(variance, rel=0.01)  # type: ignore[operator]
    assert watch.betas[960:] == pytest.approx([product / variance] * 240, rel=0.03)
    assert watch.passes[-1][1]["val/rate"] == pytest.approx(target, rel=0.01)


@pytest.mark.exhaustive
def test_a_reachable_target_is_met_after_an_unreachable_one(tmp_path: Path) -> None:
    def configure() -> Any:
        optimizer = torch.optim.Adam(model.parameters(), 0.02)
        # In full until the target is near, which takes Adam 200 steps; then ever less, and with it the noise.
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, 3 * (1 - step / 1600)) ** 3)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    callback = TargetRate(Staged([100.0, 2.0], at_steps=[800]), patience=200)
    model = LinearVAE()
    model.configure_optimizers = configure  # type: ignore[method-assign]
    with pytest.warns(UserWarning, match=r"has been at its smallest, 0.01, for .* instead of 100. Lower `min_beta`"):
        watch, _ = train(tmp_path, callback, 1600, model)
    assert watch.betas[799] == pytest.approx(0.01)
    later = [values["val/rate"] for step, values in watch.passes if step >= 1300]
    assert len(later) == 16
    assert later == pytest.approx([2.0] * 16, abs=0.02)
    assert watch.betas[1300:] == pytest.approx([beta_at(2.0)] * 300, rel=0.03)


@pytest.mark.exhaustive
def test_the_target_moves_on_a_schedule(tmp_path: Path) -> None:
    # Slow enough for the rate to follow.
    watch, trainer = train(tmp_path, TargetRate(Linear(start=0.5, stop=4.0, fraction=0.8)), 1200, LinearVAE())
    followed = [(0.5 + 3.5 * min(step / 960, 1), values["val/rate"]) for step, values in watch.passes if step > 400]
    assert max(abs(target - rate) for target, rate in followed) < 0.25
    assert trainer.callback_metrics["knobs/target_rate"] == 4.0


# ---- val/loss


def test_the_loss_selects_the_closed_form_of_the_limit() -> None:
    """Of all models on the curve of rate and distortion the best is the one at the limit, if the price is right."""
    limit = 2.0
    curve = [linear_vae_optimum(SPECTRUM, 4, VARIANCE, beta=1.02**step) for step in range(-150, 120)]

    def best(price: float) -> float:
        losses = [
            float(limited_rate_loss(torch.tensor(o.distortion), torch.tensor(o.rate), limit, price)) for o in curve
        ]
        return curve[losses.index(min(losses))].rate

    # Two neighbours on the curve are 0.03 nats apart.
    assert best(price=1.05 * beta_at(limit)) == pytest.approx(limit, abs=0.03)
    assert best(price=10.0) == pytest.approx(limit, abs=0.03)
    assert best(price=0.9 * beta_at(limit)) > 1.05 * limit, "too cheap: exceeding it pays, which is reported"


def test_validation_loss_is_of_one_scale_and_the_same_for_a_checkpoint(tmp_path: Path) -> None:
    save = ModelCheckpoint(tmp_path, "best", monitor="val/loss")
    callback = TargetRate(1.0, price=20.0)
    vae = LinearVAE()
    watch, _ = train(tmp_path, callback, 400, vae, callbacks=[save], enable_checkpointing=True)
    losses = []
    for _, values in watch.passes:
        expected = values["val/distortion"] + 20.0 * max(0.0, values["val/rate"] - 1.05)
        losses.append(values["val/loss"])
        assert values["val/loss"] == pytest.approx(expected, rel=1e-5), "no weight of the moment in it"
    kept, best = watch.passes[losses.index(min(losses))]
    assert max(values["val/rate"] for _, values in watch.passes) > 1.2, "some exceed the limit"
    assert best["val/rate"] < 1.06, "and are not selected"

    path = tmp_path / "best.ckpt"
    assert torch.load(path, weights_only=True)["global_step"] == kept
    data = GaussianData(SPECTRUM, size=8192, batch_size=2048)
    went_on_with = [*watch.betas, float(vae.beta)][kept]
    for model, trainer in ((LinearVAE(), quiet_trainer(tmp_path)), (LinearVAE(beta=3.0), quiet_trainer(tmp_path))):
        again = trainer.validate(model, data, path, verbose=False)[0]
        assert float(model.beta) == pytest.approx(went_on_with, rel=1e-5)
        assert again["val/loss"] == pytest.approx(best["val/loss"], rel=1e-5)
        tested = trainer.test(model, data, path, verbose=False)[0]
        assert tested["test/loss"] == pytest.approx(
            tested["test/distortion"] + 20.0 * max(0.0, tested["test/rate"] - 1.05), rel=1e-5
        )
        assert model.rate_limit == pytest.approx((1.05, 20.0))


def test_without_the_callback_the_loss_is_again_at_the_weight(tmp_path: Path) -> None:
    model = RecordingVAE()
    quiet_trainer(tmp_path, callbacks=[TargetRate(1.0)], max_epochs=1).fit(model, loader())
    assert model.rate_limit is not None
    model.beta = 2.0  # type: ignore[assignment]
    trainer = quiet_trainer(tmp_path, max_epochs=1)
    trainer.fit(model, loader(), loader())
    assert model.rate_limit is None
    values = trainer.callback_metrics
    assert values["val/loss"] == pytest.approx(float(values["val/distortion"] + 2.0 * values["val/rate"]))


@pytest.mark.exhaustive
def test_a_price_below_the_weight_is_reported_once(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"it takes `beta` = .* `val/loss` charges 0.5 .* Raise `price`") as caught:
        train(tmp_path, TargetRate(1.8915, price=0.5), 800, LinearVAE(), log_every_n_steps=10)
    assert len([each for each in caught if "Raise `price`" in str(each.message)]) == 1


@pytest.mark.parametrize("monitor", ["train/loss", "train_loss"])
def test_a_monitor_of_the_moving_loss_is_an_error(tmp_path: Path, monitor: str) -> None:
    callbacks = [TargetRate(1.0), EarlyStopping(monitor)]
    with pytest.raises(MisconfigurationException, match="which moves with `beta`"):
        quiet_trainer(tmp_path, callbacks=callbacks, max_epochs=1).fit(RecordingVAE(), loader())


# ---- any module


def foreign(package: str = "lightning.pytorch", tensor: bool = False) -> Any:
    """Somebody's VAE, which keeps its weight in a config and draws its noise from the batch's number."""

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.map = nn.Linear(2, 4)

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return self.map(x).chunk(2, -1)

    class Foreign(import_module(package).LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.encoder, self.decoder = Encoder(), nn.Linear(2, 2)
            self.params: dict[str, Any] = {"kl_weight": torch.tensor(1.0) if tensor else 1.0}
            self.used: list[float] = []
            self.rates: list[float] = []

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            self.used.append(float(self.params["kl_weight"]))
            batch = list(loader())[batch_idx]  # a run that is resumed amid an epoch gets the epoch's first batch again
            mean, log_variance = self.encoder(batch)
            noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(batch_idx))
            posterior = Normal(mean, (0.5 * log_variance).exp())
            rate = kl_divergence(posterior, Normal(0.0, 1.0)).sum(-1).mean()
            self.rates.append(float(rate.detach()))
            error = (batch - self.decoder(mean + noise * posterior.scale)).square().sum(-1).mean()
            return error + self.params["kl_weight"] * rate

        def validation_step(self, batch: Tensor, batch_idx: int) -> None:
            self.log("val_loss", self.params["kl_weight"] * batch.mean())

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), 0.02)

    return Foreign()


def fit(package: str, model: Any, root: Path, ckpt_path: Path | None = None, **options: Any) -> Any:
    callback = TargetRate(0.5, attribute="params.kl_weight", posterior="encoder", **options.pop("target", {}))
    save = import_module(f"{package}.callbacks").ModelCheckpoint(
        str(root), "{step}", save_top_k=-1, every_n_train_steps=5
    )
    quiet = {"accelerator": "cpu", "devices": 1, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = import_module(package).Trainer(
        default_root_dir=root, logger=False, callbacks=[callback, save],
        **{"max_epochs": 4, "log_every_n_steps": 1, **quiet, **options},
    )  # fmt: skip
    trainer.fit(model, loader(), ckpt_path=ckpt_path)
    return trainer


@pytest.mark.parametrize("tensor", [False, True])
@pytest.mark.parametrize("package", PACKAGES)
def test_a_foreign_module_is_steered_and_resumes_bit_by_bit(package: str, tensor: bool, tmp_path: Path) -> None:
    trainer = fit(package, whole := foreign(package, tensor), tmp_path / "whole")
    callback = next(each for each in trainer.callbacks if isinstance(each, TargetRate))
    assert len(set(whole.used)) == 24
    assert isinstance(whole.params["kl_weight"], Tensor if tensor else float)
    assert float(whole.params["kl_weight"]) == float(callback.weight)
    assert float(trainer.callback_metrics["knobs/kl_weight"]) == whole.used[-1]
    assert trainer.callback_metrics["knobs/target_rate"] == 0.5

    average = whole.rates[0]
    for rate in whole.rates[1:]:
        average += 0.05 * (rate - average)
    assert float(trainer.callback_metrics["latent/controlled_rate"]) == pytest.approx(average, rel=1e-4)

    for saved in (5, 10):
        path = tmp_path / "whole" / f"step={saved}.ckpt"
        state = next(
            value for key, value in torch.load(path, weights_only=True)["callbacks"].items() if "TargetRate" in key
        )
        assert all(isinstance(value, float | int | str | Tensor | None) for value in state.values()), "flat"
        again = foreign(package, tensor)
        again.params["kl_weight"] = 0.3 * again.params["kl_weight"]  # the run's start and bounds are not the module's
        resumed = fit(package, again, tmp_path / f"from {saved}", path)
        assert again.used == whole.used[saved:]
        twin = next(each for each in resumed.callbacks if isinstance(each, TargetRate))
        assert str(twin.state_dict()) == str(callback.state_dict())


def test_a_run_that_hardly_logs_is_steered_the_same(tmp_path: Path) -> None:
    often, seldom = foreign(), foreign()
    fit("lightning.pytorch", often, tmp_path / "often")
    fit("lightning.pytorch", seldom, tmp_path / "seldom", log_every_n_steps=23)
    assert often.used == seldom.used


def test_resuming_the_vae_goes_on_bit_by_bit(tmp_path: Path) -> None:
    def run(path: Path | None = None) -> RecordingVAE:
        torch.manual_seed(0)
        model = RecordingVAE()
        model.elbo_terms = partial(quietly, model)  # type: ignore[method-assign]
        save = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=6)
        callbacks = [TargetRate(bits=1.5), save]
        trainer = quiet_trainer(tmp_path, callbacks=callbacks, enable_checkpointing=True, max_epochs=3)
        trainer.fit(model, loader(), loader(), ckpt_path=path)
        return model

    def quietly(model: RecordingVAE, x: Tensor, index: Tensor | None = None) -> Any:
        return RecordingVAE.elbo_terms(model, x, torch.arange(len(x)) if index is None else index)

    whole = run()
    assert len(set(betas(whole))) == 18
    for saved in (6, 12):
        assert betas(run(tmp_path / f"step={saved}.ckpt")) == betas(whole)[saved:]


def test_the_weight_that_was_found_goes_on_and_an_argument_replaces_it(tmp_path: Path) -> None:
    def trainer(epochs: int) -> Trainer:
        return quiet_trainer(tmp_path, callbacks=[TargetRate(0.1)], max_epochs=epochs)

    (first := trainer(1)).fit(model := RecordingVAE(beta=1.0), loader())
    first.save_checkpoint(path := tmp_path / "found.ckpt")
    found = float(model.beta)
    assert found != 1.0
    for beta in (1.0, 3.0, None):
        resumed = RecordingVAE(beta=beta)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer(2).fit(resumed, loader(), ckpt_path=path)
        said = [str(each.message) for each in caught if "`beta=" in str(each.message)]
        assert len(said) == (beta == 3.0)  # it has changed
        for line in said:
            assert f"continues with `beta={found:g}`, which a controller had found" in line
            assert "`beta=3`, which the module is configured with, is not used" in line
        assert betas(resumed)[0] == found
        assert resumed.knobs["beta"] == beta
    assert float(RecordingVAE.load_from_checkpoint(path).beta) == found
    for beta in (1.0, 2.0):
        loaded = RecordingVAE.load_from_checkpoint(path, beta=beta)
        assert (float(loaded.beta), loaded.knobs["beta"], loaded.hparams["beta"]) == (beta, beta, beta)


def test_the_same_trainer_goes_on_where_it_was(tmp_path: Path) -> None:
    callback = TargetRate(0.5, attribute="params.kl_weight", posterior="encoder")
    trainer = quiet_trainer(tmp_path, callbacks=[callback], max_epochs=1)
    trainer.fit(model := foreign(), loader())
    before = callback.weight
    trainer.fit_loop.max_epochs = 2
    trainer.fit(model, loader())
    assert before is not None
    assert model.used[6] == float(before)
    assert callback.state_dict()["base"] == 1.0


def test_a_setter_gets_floats(tmp_path: Path) -> None:
    written: list[Any] = []
    callback = TargetRate(0.5, posterior="encoder", setter=lambda _, value: written.append(value), start=2.0, name="w")
    trainer = quiet_trainer(tmp_path, callbacks=[callback], max_epochs=1, log_every_n_steps=1)
    trainer.fit(foreign(), loader())
    assert written[0] == pytest.approx(2.0)
    assert all(isinstance(value, float) for value in written)
    assert len(set(written)) == 7, "the weight of each step, and the one that is left"
    assert {"knobs/w", "knobs/target_rate_w", "latent/controlled_rate_w"} <= trainer.callback_metrics.keys()


def test_batches_of_one_step_are_measured_together(tmp_path: Path) -> None:
    fit(
        "lightning.pytorch",
        model := foreign(),
        tmp_path,
        accumulate_grad_batches=4,
        max_epochs=2,
        target={"smoothing": 0.0},
    )
    assert model.used == [model.used[0]] * 4 + [model.used[4]] * 2 + [model.used[6]] * 4 + [model.used[10]] * 2
    assert len(set(model.used)) == 4
    # The second weight from the mean of the first four batches.
    error = (sum(model.rates[:4]) / 4 - 0.5) / 1.0
    assert math.log(model.used[4]) == pytest.approx(1.03 * error, rel=1e-4)


@pytest.mark.filterwarnings("ignore:.training_step. returned .None.")
@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_batch_that_is_skipped_has_no_rate(accumulated: int, tmp_path: Path) -> None:
    def skip(batch: Tensor, batch_idx: int) -> Tensor | None:
        return None if batch_idx in (2, 3) else step(batch, batch_idx)

    model = foreign()
    step, model.training_step = model.training_step, skip
    fit("lightning.pytorch", model, tmp_path, max_epochs=1, accumulate_grad_batches=accumulated)
    assert len(model.used) == 4
    assert len(set(model.used)) == 4 // accumulated


class Sharing(RecordingVAE):
    """Leaves behind what its process did."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder, self.rates = folder, []

    def on_train_batch_end(self, *args: Any) -> None:
        assert self.posterior is not None
        self.rates.append(float(kl_divergence(self.posterior, self.prior).sum(-1).mean().detach()))  # type: ignore[arg-type]
        super().on_train_batch_end(*args)

    def on_train_end(self) -> None:
        torch.save({"betas": betas(self), "rates": self.rates}, self.folder / f"{self.global_rank}.pt")


def share(rank: int, folder: Path) -> None:
    callbacks = [TargetRate(0.5, smoothing=0.0)]
    quiet_trainer(folder, devices=2, strategy="ddp", callbacks=callbacks, max_epochs=2).fit(Sharing(folder), loader(24))


def test_two_processes_have_one_weight_from_the_rate_of_both(tmp_path: Path) -> None:
    in_two_processes(share, tmp_path)
    one, other = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert one["rates"] != other["rates"]
    assert one["betas"] == other["betas"]
    assert len(set(one["betas"])) == len(one["betas"])
    error = (one["rates"][0] + other["rates"][0]) / 2 - 0.5
    assert math.log(one["betas"][1]) == pytest.approx(1.03 * error, rel=1e-4)


class CountWaits(TorchDispatchMode):
    """Count what would wait for a device: a tensor's value that becomes a number of Python's."""

    def __init__(self) -> None:
        super().__init__()
        self.waits = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.waits += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default)
        return func(*args, **(kwargs or {}))


class Counted(TargetRate):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.counts: list[int] = []

    def on_train_batch_start(self, *args: Any) -> None:
        with CountWaits() as mode:
            super().on_train_batch_start(*args)
        self.counts.append(mode.waits)

    def on_before_optimizer_step(self, *args: Any) -> None:
        with CountWaits() as mode:
            super().on_before_optimizer_step(*args)
        self.counts.append(mode.waits)

    def on_train_batch_end(self, *args: Any) -> None:
        with CountWaits() as mode:
            super().on_train_batch_end(*args)
        self.counts.append(mode.waits)


def test_no_step_waits_for_the_device(tmp_path: Path) -> None:
    callback = Counted(1.0)
    quiet_trainer(tmp_path, callbacks=[callback], max_epochs=1, log_every_n_steps=5).fit(RecordingVAE(), loader())
    start, optimizer, end = (callback.counts[first::3] for first in range(3))
    assert end[4] > 0, "the logging step does, so the count works"
    assert optimizer[0] == 1, "the first step checks that the scale is positive"
    assert [*start, *optimizer[1:], *end[:4], *end[5:]] == [0] * 16


def test_a_broken_batch_is_passed_over(tmp_path: Path) -> None:
    def posterior(model: Any, batch: Tensor) -> Any:
        mean, log_variance = model.encoder(batch)
        return mean * (math.nan if len(model.used) == 3 else 1.0), log_variance

    callback = TargetRate(0.5, attribute="params.kl_weight", posterior=posterior)
    quiet_trainer(tmp_path, callbacks=[callback], max_epochs=1).fit(model := foreign(), loader())
    assert all(math.isfinite(value) for value in model.used)
    assert len(set(model.used)) == 6, "the integral goes on with the average that there is"


def test_a_posterior_without_a_prior_is_an_error(tmp_path: Path) -> None:
    def posterior(model: Any, batch: Tensor) -> Gamma:
        return Gamma(torch.ones(len(batch), 3), 1.0)

    callback = TargetRate(0.5, attribute="params.kl_weight", posterior=posterior)
    with pytest.raises(ValueError, match="The rate of a Gamma needs a prior, and the module offers none"):
        quiet_trainer(tmp_path, callbacks=[callback], max_epochs=1).fit(foreign(), loader())


def test_validation_and_checkpoints_have_the_weight_of_the_moment(tmp_path: Path) -> None:
    trainer = fit("lightning.pytorch", model := foreign(tensor=True), tmp_path)
    values = trainer.validate(model, loader(), verbose=False)[0]
    batches = torch.stack([batch.mean() for batch in loader()])
    assert values["val_loss"] == pytest.approx(float(model.params["kl_weight"] * batches.mean()), rel=1e-4)


def test_monitoring_a_foreign_validation_loss_is_warned_of(tmp_path: Path) -> None:
    callbacks = [TargetRate(0.5, attribute="params.kl_weight", posterior="encoder"), EarlyStopping("val_loss")]
    trainer = quiet_trainer(tmp_path, callbacks=callbacks, max_epochs=1)
    with pytest.warns(UserWarning, match="EarlyStopping monitors 'val_loss'.*Monitor a reconstruction error"):
        trainer.fit(foreign(), loader(), loader())


# ---- what is reported


def test_an_unreachable_target_is_reported_once(tmp_path: Path) -> None:
    callback = TargetRate(5.0, min_beta=0.5, max_beta=2.0, patience=20, integral=0.1)
    trainer = quiet_trainer(tmp_path, callbacks=[callback], max_epochs=20, log_every_n_steps=1)
    with pytest.warns(UserWarning, match=r"TargetRate\(beta\): `beta` has been at its smallest, 0.5, for 20") as caught:
        trainer.fit(model := RecordingVAE(), loader())
    assert len([each for each in caught if "has been at its" in str(each.message)]) == 1
    assert betas(model)[-1] == pytest.approx(0.5)


def test_what_is_wrong_is_reported_where_nothing_is_logged(tmp_path: Path) -> None:
    callback = TargetRate(5.0, min_beta=0.5, patience=20, integral=0.1)
    trainer = quiet_trainer(tmp_path, callbacks=[callback], max_epochs=20, log_every_n_steps=1000)
    with pytest.warns(UserWarning, match="`beta` has been at its smallest, 0.5"):
        trainer.fit(RecordingVAE(), loader())


def test_a_rate_that_stays_too_high_is_reported(tmp_path: Path) -> None:
    callback = TargetRate(0.0, posterior=lambda model, batch: Normal(torch.ones(len(batch), 2) * 3, 1.0), patience=20)
    trainer = quiet_trainer(tmp_path, callbacks=[callback], max_epochs=50, log_every_n_steps=1)
    with pytest.warns(UserWarning, match="at its largest, 100, .* 9 nats instead of 0. Raise `max_beta` or the target"):
        trainer.fit(RecordingVAE(), loader())


def test_a_target_met_at_a_bound_is_no_problem(tmp_path: Path) -> None:
    def posterior(model: Any, batch: Tensor) -> Normal:
        return Normal(torch.full((len(batch), 2), 2.02), 1.0)  # 4.08 nats

    callback = TargetRate(4.0, posterior=posterior, max_beta=1.02, patience=1)
    trainer = quiet_trainer(tmp_path, callbacks=[callback], max_epochs=20, log_every_n_steps=1)
    trainer.fit(model := RecordingVAE(), loader())  # a warning would be an error
    assert betas(model)[-1] == pytest.approx(1.02)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(
    ("twin", "message"),
    [
        (lambda: KLAnnealing(Linear(steps=2)), "Two callbacks move `beta`"),
        (lambda: TargetRate(2.0, name="other"), "Two callbacks move `beta`"),
        (lambda: TargetRate(2.0, attribute="free_bits"), "Two callbacks log `knobs/target_rate`"),
    ],
)
def test_two_that_move_one_weight_are_an_error(tmp_path: Path, twin: Any, message: str, first: bool) -> None:
    callbacks = [TargetRate(1.0), twin()]
    with pytest.raises(MisconfigurationException, match=message):
        quiet_trainer(tmp_path, callbacks=callbacks if first else callbacks[::-1], max_epochs=1).fit(
            RecordingVAE(), loader()
        )


# ---- options


def test_bits_and_nats(tmp_path: Path) -> None:
    assert TargetRate(bits=8).target(0) == pytest.approx(5.545177)
    assert TargetRate(8.0).target(0) == TargetRate(nats=8).target(0) == 8.0
    moving = TargetRate(bits=Linear(start=1.0, stop=3.0, steps=4))
    assert [moving.target(step) for step in (0, 2, 9)] == pytest.approx([math.log(2), 2 * math.log(2), 3 * math.log(2)])
    trainer = quiet_trainer(tmp_path, callbacks=[TargetRate(bits=2.0)], max_epochs=1, log_every_n_steps=1)
    trainer.fit(model := RecordingVAE(), loader())
    assert trainer.callback_metrics["knobs/target_rate"] == pytest.approx(2 * math.log(2))
    assert model.rate_limit == pytest.approx((2 * math.log(2) * 1.05, 10.0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "must be given as `nats` or as `bits`"),
        ({"nats": 1.0, "bits": 1.0}, "must be given as `nats` or as `bits`"),
        ({"nats": -1.0}, "must be a finite rate of at least 0"),
        ({"bits": math.inf}, "must be a finite rate of at least 0"),
        ({"nats": Linear(start=0.5, fraction=0.5)}, "Give it a `stop`"),
        ({"nats": 1.0, "start": 0.0}, "`start` must be a finite number above 0"),
        ({"nats": 1.0, "min_beta": -1.0}, "`min_beta` must be a finite number above 0"),
        ({"nats": 1.0, "integral": 0.0}, "`integral` must be a finite number above 0"),
        ({"nats": 1.0, "price": math.nan}, "`price` must be a finite number above 0"),
        ({"nats": 1.0, "proportional": -0.1}, "`proportional` must be a finite number of at least 0"),
        ({"nats": 1.0, "min_beta": 2.0, "max_beta": 0.5}, "`min_beta` must be below `max_beta`, got 2.0 and 0.5"),
        ({"nats": 1.0, "smoothing": 1.0}, "`smoothing` must be at least 0 and below 1"),
        ({"nats": 1.0, "setter": setattr}, "`start` must be given with a `setter`"),
        ({"nats": 1.0, "attribute": ""}, "`attribute` must be a dotted path"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TargetRate(**options)


@pytest.mark.parametrize(
    ("options", "beta", "message"),
    [
        ({}, 0.0, "the weight to start from must be above 0, got 0"),
        ({"min_beta": 2.0}, 1.0, "starts at 1, which must be within `min_beta` and `max_beta`, 2 to 100"),
        ({"attribute": "betta"}, 1.0, "betta"),
    ],
)
def test_what_a_module_can_not_start_from(tmp_path: Path, options: Any, beta: float, message: str) -> None:
    trainer = quiet_trainer(tmp_path, callbacks=[TargetRate(1.0, **options)], max_epochs=1)
    with pytest.raises(ValueError, match=message):
        trainer.fit(model := RecordingVAE(beta=beta), loader())
    assert float(model.beta) == beta


@pytest.mark.parametrize("target", [Linear(start=1.0, stop=-1.0, steps=4), lambda step: math.nan])
def test_a_target_that_ends_nowhere_is_an_error(tmp_path: Path, target: Any) -> None:
    with pytest.raises(ValueError, match="the target must end at a finite rate of at least 0"):
        quiet_trainer(tmp_path, callbacks=[TargetRate(target)], max_epochs=1).fit(RecordingVAE(), loader())


def test_a_plain_function_ends_with_the_run(tmp_path: Path) -> None:
    callback = TargetRate(lambda step: 1.0 + 0.5 * step, tolerance=0.0)
    quiet_trainer(tmp_path, callbacks=[callback], max_epochs=1).fit(model := RecordingVAE(), loader())
    assert model.rate_limit == (4.0, 10.0)


@pytest.mark.parametrize("schedule", [Constant(1.0), Staged([1.0, 2.0], at_fractions=[0.5])], ids=str)
def test_state_key_and_schedules(schedule: Schedule) -> None:
    assert TargetRate(schedule).state_key == "TargetRate{'attribute': 'beta', 'name': 'beta'}"


def test_after_an_exception_the_weight_is_where_the_controller_had_it(tmp_path: Path) -> None:
    class Fail(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 4:
                raise RuntimeError("no")

    callback, model = TargetRate(1.0), RecordingVAE()
    with pytest.raises(RuntimeError, match="no"):
        quiet_trainer(tmp_path, callbacks=[callback, Fail()], max_epochs=1).fit(model, loader())
    assert callback.weight is not None
    assert float(model.beta) == float(callback.weight)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("first", [True, False])
def test_weight_averaging_saves_the_weight_of_the_moment_and_no_average_of_it(tmp_path: Path, first: bool) -> None:
    class Buffered(LightningModule):
        posterior: Any = None

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)
            self.register_buffer("beta", torch.tensor(1.0))

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            mean = self.layer(batch)
            self.posterior = Normal(mean, torch.ones_like(mean))
            return (mean - batch).square().mean() + self.beta * mean.square().mean()  # type: ignore[operator]

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.01)

    class Saves(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
            trainer.save_checkpoint(tmp_path / "a.ckpt")
            saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
            weights.append(float(pl_module.beta))
            for state in ("state_dict", "current_model_state"):
                assert float(saved[state]["beta"]) == weights[-1]

    weights: list[float] = []
    callbacks = [TargetRate(5.0, integral=0.5), weight_averaging(decay=0.9)]
    callbacks = [*(callbacks if first else callbacks[::-1]), Saves()]
    quiet_trainer(tmp_path, callbacks=callbacks, max_epochs=1).fit(Buffered(), loader())
    assert len(set(weights)) == 6


def test_a_checkpoint_names_the_knobs_that_are_steered(tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path, callbacks=[TargetRate(0.1)], max_epochs=1)
    trainer.fit(model := RecordingVAE(), loader())
    assert model.steered_knobs == ("beta",)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    loaded = RecordingVAE.load_from_checkpoint(tmp_path / "a.ckpt")
    assert (loaded.steered_knobs, loaded.rate_limit) == (("beta",), model.rate_limit)
    quiet_trainer(tmp_path, max_epochs=1).fit(model, loader())
    assert model.steered_knobs == ()


def test_a_table_with_a_target_for_each_step_of_the_run_is_enough(tmp_path: Path) -> None:
    table = [1.0] * 6
    quiet_trainer(tmp_path, callbacks=[TargetRate(table.__getitem__)], max_epochs=1).fit(RecordingVAE(), loader())


def test_the_state_of_an_earlier_version_starts_over_and_is_said(tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path, max_epochs=1, callbacks=[TargetRate(0.5)])
    trainer.fit(RecordingVAE(), loader())
    trainer.save_checkpoint(tmp_path / "new.ckpt")
    checkpoint = torch.load(tmp_path / "new.ckpt", weights_only=True)
    [state] = [each for name, each in checkpoint["callbacks"].items() if "TargetRate" in name]
    state["rate"], state["log_weight"] = state.pop("average"), state.pop("output")
    torch.save(checkpoint, tmp_path / "old.ckpt")
    resumed = quiet_trainer(tmp_path, max_epochs=2, callbacks=[TargetRate(0.5)])
    with pytest.warns(UserWarning, match="that of an earlier version, so the weight starts over at 1"):
        resumed.fit(RecordingVAE(), loader(), ckpt_path=tmp_path / "old.ckpt")
