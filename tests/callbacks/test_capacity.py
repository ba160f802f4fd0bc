import math
from functools import partial
from pathlib import Path
from statistics import NormalDist
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from torch import Tensor
from torch.distributions import Normal

from lightning_vae import VAE
from lightning_vae.callbacks import GECO, Capacity, EnforcedFreeBits, FreeBits, KLAnnealing, Linear, Staged, TargetRate
from lightning_vae.datamodules import Gaussian as GaussianData
from lightning_vae.objective import capacity_loss
from tests.doubles import ForeignModule, RecordingVAE, loader, quiet_trainer
from tests.processes import in_two_processes
from tests.test_yardstick import SPECTRUM, LinearVAE, closed_expectation

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:The training data come from a DataLoader"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


class Watching(RecordingVAE):
    """Records the capacity of each step."""

    def __init__(self, capacity_weight: float = 10.0, **options: Any) -> None:
        super().__init__(capacity_weight=capacity_weight, **options)
        self.capacities: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.capacities.append(float(self.capacity))
        return super().training_step(batch, batch_idx)


# ---- the formula


@pytest.mark.parametrize(("rate", "loss", "slope"), [(3.5, 7.0, 2.0), (1.0, 6.0, -2.0), (-1.0, 10.0, -2.0)], ids=str)
def test_each_nat_away_from_the_capacity_has_a_price(rate: float, loss: float, slope: float) -> None:
    nats = torch.tensor(rate, requires_grad=True)
    total = capacity_loss(torch.tensor(4.0), nats, 2.0, 2.0)
    total.backward()
    assert float(total.detach()) == loss
    assert nats.grad == slope


def test_the_training_loss_and_its_gradient(tmp_path: Path) -> None:
    model = RecordingVAE(capacity=1.5, capacity_weight=3.0)
    x = next(iter(loader(8, 8)))
    distortion, rates = model.elbo_terms(x, torch.arange(8))
    wanted = distortion.mean() + 3.0 * (rates.sum(1).mean() - 1.5).abs()
    model.elbo_terms = lambda _: (distortion, rates)  # type: ignore[method-assign, assignment]
    loss = model.training_step(x, 0)
    assert float(loss.detach()) == pytest.approx(float(wanted.detach()), rel=1e-6)
    weights = list(model.encoder.parameters())
    found, expected = (torch.autograd.grad(each, weights, retain_graph=True) for each in (loss, wanted))
    torch.testing.assert_close(found, expected)


# ---- the yardstick


def fit_yardstick(
    root: Path, weight: float, capacity: float, steps: int, size: int = 8192
) -> tuple[Any, Tensor, Tensor]:
    def configure() -> Any:
        optimizer = torch.optim.Adam(vae.parameters(), 3e-3, fused=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 if step < 0.7 * steps else 0.2)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    seed_everything(1)
    vae = LinearVAE(capacity_weight=weight)
    vae.configure_optimizers = configure  # type: ignore[method-assign]
    data = GaussianData(SPECTRUM, size=size, batch_size=200)
    callback = Capacity(Linear(start=0.0, stop=capacity, fraction=0.2))
    options = {"max_steps": steps, "max_epochs": -1, "check_val_every_n_epoch": steps}
    quiet_trainer(root, callbacks=[callback], **options).fit(vae, data)
    distortion, rates, _ = closed_expectation(vae, data._splits["train"]["x"])
    return vae, distortion, rates


@pytest.mark.exhaustive
def test_the_rate_is_the_capacity_and_the_distortion_is_the_least(tmp_path: Path) -> None:
    weight, beta = 10.0, 1.89436
    vae, distortion, rates = fit_yardstick(tmp_path, weight, 2.0, 12000)
    # The noise of the batches smooths the sign of the gradient, so the rate ends slightly above.
    data = GaussianData(SPECTRUM, size=8192, batch_size=200)
    data.setup("fit")
    with torch.no_grad():
        spread = float(vae.elbo_terms(data._splits["train"]["x"].double()).rate.std()) / 200**0.5
    offset = spread * NormalDist().inv_cdf((1 + beta / weight) / 2)
    assert 0.005 < offset < 0.03
    assert float(rates.sum()) == pytest.approx(2.0 + offset, abs=0.04)
    assert float(distortion) == pytest.approx(7.05349, abs=0.05)


@pytest.mark.exhaustive
def test_a_weight_that_is_too_small_is_a_beta_and_is_reported(tmp_path: Path) -> None:
    """The capacity of 2 nats would take a beta of 1.89."""
    with pytest.warns(UserWarning, match="the rate has been above the capacity since .* The weight is too"):
        _, distortion, rates = fit_yardstick(tmp_path, 1.0, 2.0, 5000)
    assert float(rates.sum()) == pytest.approx(3.27777, abs=0.1)
    assert float(distortion) == pytest.approx(5.26476, abs=0.1)


def test_a_short_run_is_near_it(tmp_path: Path) -> None:
    _, _, rates = fit_yardstick(tmp_path, 10.0, 1.0, 400, size=2000)
    assert float(rates.sum()) == pytest.approx(1.0, abs=0.1)


# ---- the knob


def test_the_capacity_follows_the_schedule_and_validation_sees_its_end(tmp_path: Path) -> None:
    callback = Capacity(Linear(start=0.5, stop=2.5, steps=8))
    trainer = quiet_trainer(tmp_path, callbacks=[callback], max_epochs=2, log_every_n_steps=1)
    trainer.fit(model := Watching(), loader(), loader())
    assert model.capacities == [0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0, 2.25, 2.5, 2.5, 2.5, 2.5]
    assert float(model.capacity) == 2.5
    values = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert values["knobs/capacity"] == 2.5
    assert values["val/loss"] == pytest.approx(
        values["val/distortion"] + 10.0 * abs(values["val/rate"] - 2.5), rel=1e-5
    )
    trainer.save_checkpoint(path := tmp_path / "a.ckpt")
    loaded = RecordingVAE.load_from_checkpoint(path)
    assert (float(loaded.capacity), loaded.capacity_weight) == (2.5, 10.0)


def test_a_schedule_without_an_end_ends_at_the_models_capacity(tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path, callbacks=[Capacity(Linear(start=0.0, steps=2))], max_epochs=1)
    trainer.fit(model := Watching(capacity=3.0), loader())
    assert model.capacities == [0.0, 1.5, 3.0, 3.0, 3.0, 3.0]


def test_resuming_goes_on_bit_by_bit(tmp_path: Path) -> None:
    def run(path: Path | None = None) -> Watching:
        torch.manual_seed(0)
        model = Watching()
        model.elbo_terms = partial(quietly, model)  # type: ignore[method-assign]
        save = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=6)
        callbacks = [Capacity(Linear(start=0.5, stop=2.5, fraction=0.8)), save]
        trainer = quiet_trainer(tmp_path, callbacks=callbacks, enable_checkpointing=True, max_epochs=3)
        trainer.fit(model, loader(), loader(), ckpt_path=path)
        return model

    def quietly(model: Watching, x: Any, index: Tensor | None = None) -> Any:
        return VAE.elbo_terms(model, x, torch.arange(len(x)) if index is None else index)

    whole = run()
    for saved in (6, 12):
        resumed = run(tmp_path / f"step={saved}.ckpt")
        assert resumed.capacities == whole.capacities[saved:]
        for name, value in whole.state_dict().items():
            assert torch.equal(resumed.state_dict()[name], value)


def test_a_model_without_a_capacity_is_as_it_was() -> None:
    model = RecordingVAE()
    assert (model.knobs, model.capacity_weight, model.unread_knobs) == ({"beta": None, "free_bits": None}, None, ())
    assert not hasattr(model, "capacity")


def test_a_foreign_module(tmp_path: Path) -> None:
    class Foreign(ForeignModule):
        def __init__(self) -> None:
            super().__init__()
            self.capacity = 0.0
            self.seen: list[float] = []

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            self.seen.append(self.capacity)
            return super().training_step(batch, batch_idx)

    quiet_trainer(tmp_path, callbacks=[Capacity(Linear(start=1.0, stop=3.0, steps=4))], max_epochs=1).fit(
        model := Foreign(), loader()
    )
    assert model.seen == [1.0, 1.5, 2.0, 2.5, 3.0, 3.0]


class Sharing(Watching):
    """Leaves its gradient behind."""

    def __init__(self, folder: Path) -> None:
        super().__init__(capacity=0.5)
        self.folder = folder

    def elbo_terms(self, x: Any, index: Any = None) -> Any:
        return super().elbo_terms(x, (x.sum(1).abs() * 1000).long() if index is None else index)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)

    def on_train_end(self) -> None:
        torch.save(self.state_dict(), self.folder / f"{self.trainer.world_size}.pt")


def share(rank: int, folder: Path) -> None:
    torch.manual_seed(0)
    quiet_trainer(folder, devices=2, strategy="ddp", max_epochs=1).fit(Sharing(folder), loader(12, 6))


@pytest.mark.exhaustive
def test_two_processes_share_the_sign_of_the_whole_batch(tmp_path: Path) -> None:
    in_two_processes(share, tmp_path)
    torch.manual_seed(0)
    quiet_trainer(tmp_path, max_epochs=1).fit(Sharing(tmp_path), loader(12, 12))
    one, two = (torch.load(tmp_path / f"{count}.pt") for count in (1, 2))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-5, atol=1e-6)


# ---- what is reported


def report(tmp_path: Path, capacity: Any, rate: float, **options: Any) -> Any:
    """Fit with a posterior of a given rate."""
    mean = math.sqrt(2 * rate)

    def posterior(model: Any, batch: Tensor) -> Normal:
        return Normal(torch.tensor([[mean, 0.0]]).expand(len(batch), 2), 1.0)

    callback = Capacity(capacity, posterior=posterior, patience=10, **options)
    quiet_trainer(tmp_path, callbacks=[callback], max_epochs=6, log_every_n_steps=1).fit(Watching(), loader())
    return callback


@pytest.mark.parametrize(
    ("rate", "message"),
    [
        (3.0, r"above the capacity since step 5, and is 3 nats instead of 2. The weight is too small to hold it"),
        (1.0, r"below the capacity since step 5, and is 1 nats instead of 2. The run is too short"),
    ],
)
def test_a_rate_on_one_side_of_the_capacity_is_reported_once(tmp_path: Path, rate: float, message: str) -> None:
    with pytest.warns(UserWarning, match=message) as caught:
        callback = report(tmp_path, Linear(start=0.0, stop=2.0, steps=5), rate)
    assert len([each for each in caught if "the rate has been" in str(each.message)]) == 1
    assert callback.state_dict()["since"] == 5


def test_a_rate_at_the_capacity_or_on_its_way_is_no_problem(tmp_path: Path) -> None:
    report(tmp_path, 2.0, 2.05)  # a warning would be an error
    report(tmp_path, Linear(start=0.0, stop=2.0, steps=30), 3.0)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(
    "twin",
    [
        lambda: KLAnnealing(Linear(steps=2)),
        lambda: FreeBits(0.5),
        lambda: TargetRate(1.0),
        lambda: GECO(squared_error=1.0),
    ],
)
def test_what_would_move_an_unread_knob_is_an_error(tmp_path: Path, twin: Any, first: bool) -> None:
    callbacks = [Capacity(1.0), twin()]
    with pytest.raises(MisconfigurationException, match=r"does not read `(beta|free_bits)` .*: `capacity_weight` or"):
        quiet_trainer(tmp_path, callbacks=callbacks if first else callbacks[::-1], max_epochs=1).fit(
            model := Watching(), loader()
        )
    assert not model.used, "before the first step"


def test_an_assignment_that_the_loss_does_not_read_is_an_error(tmp_path: Path) -> None:
    class Assigns(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            pl_module.beta = 4.0

    vae = Watching()
    with pytest.raises(ValueError, match=r"`free_bits` is set to 0.5, but the loss of .* does not read it"):
        vae.free_bits = 0.5
    with pytest.raises(ValueError, match=r"`beta` is set to 4.0, but the loss of .* does not read it"):
        quiet_trainer(tmp_path, callbacks=[Assigns()], max_epochs=1).fit(vae, loader())
    assert (vae.knobs["free_bits"], float(vae.beta)) == (None, 1.0)
    vae.capacity = 3.0


def test_two_that_move_the_capacity_are_an_error(tmp_path: Path) -> None:
    callbacks = [Capacity(1.0), Capacity(Staged([0.0, 1.0], at_steps=[2]), name="other")]
    with pytest.raises(MisconfigurationException, match="Two callbacks move `capacity`"):
        quiet_trainer(tmp_path, callbacks=callbacks, max_epochs=1).fit(Watching(), loader())


def test_enforced_free_bits_are_refused(tmp_path: Path) -> None:
    callbacks = [Capacity(1.0), EnforcedFreeBits(0.5, posterior="encoder", weight="beta")]
    with pytest.raises(MisconfigurationException):
        quiet_trainer(tmp_path, callbacks=callbacks, max_epochs=1).fit(Watching(), loader())


def test_a_monitor_of_the_moving_loss_is_an_error(tmp_path: Path) -> None:
    callbacks = [Capacity(Linear(start=0.0, stop=1.0, steps=4)), EarlyStopping("train/loss")]
    with pytest.raises(MisconfigurationException, match="which moves with `capacity`"):
        quiet_trainer(tmp_path, callbacks=callbacks, max_epochs=1).fit(Watching(), loader())


@pytest.mark.parametrize(
    ("schedule", "value", "step", "steps"),
    [
        (Linear(start=2.0, stop=-1.0, steps=3), "-1", 3, 0),
        (Linear(start=-2.0, stop=1.0, steps=3), "-2", 0, 0),
        (lambda step: 1.0 - step, "-1", 2, 2),
    ],
)
def test_a_schedule_of_negative_capacities_is_an_error(
    tmp_path: Path, schedule: Any, value: str, step: int, steps: int
) -> None:
    message = rf"Capacity\(capacity\): the capacity must be .* got {value} at step {step}\. Change"
    model = Watching()
    with pytest.raises(ValueError, match=message):
        quiet_trainer(tmp_path, callbacks=[Capacity(schedule)], max_epochs=1).fit(model, loader())
    assert len(model.capacities) == steps


@pytest.mark.parametrize("model", [RecordingVAE, ForeignModule])
def test_a_loss_without_a_capacity_is_an_error(tmp_path: Path, model: type[Any]) -> None:
    message = r"Capacity\(capacity\): .* has no 'capacity'.* give `lightning_vae.VAE` a `capacity_weight`, or your own"
    with pytest.raises(ValueError, match=message):
        quiet_trainer(tmp_path, callbacks=[Capacity(1.0)], max_epochs=1).fit(model(), loader())


# ---- options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"capacity_weight": 0.0}, "`capacity_weight` must be a finite number above 0, or None, got 0.0"),
        ({"capacity_weight": math.inf}, "`capacity_weight` must be a finite number above 0"),
        ({"capacity": 2.0}, "`capacity` must come with `capacity_weight`"),
        ({"capacity": -1.0, "capacity_weight": 1.0}, "`capacity` must be a finite number of at least 0"),
        ({"beta": 1.0, "capacity_weight": 1.0}, "`beta` must be left out .* with a `capacity_weight`"),
        ({"free_bits": 0.5, "capacity_weight": 1.0}, "`free_bits` must be left out"),
    ],
)
def test_options_of_the_model_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VAE(shape=(2,), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": -1.0}, "`schedule` must be a finite rate of at least 0, or a schedule"),
        ({"schedule": 1.0, "patience": 0}, "`patience` must be a finite number above 0"),
        ({"schedule": 1.0, "attribute": ""}, "`attribute` must be a dotted path"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Capacity(**options)
