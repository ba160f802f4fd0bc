import csv
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import EarlyStopping, GradientAccumulationScheduler, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_vae.callbacks import Constant, Cyclical, Join, KLAnnealing, Linear, Schedule, Sigmoid, Staged
from tests.doubles import ForeignModule, RecordingVAE, loader, quiet_trainer

pytestmark = [
    # Lightning's remarks on what these tests do on purpose.
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
    pytest.mark.filterwarnings("ignore:The training data come from a DataLoader"),
]


def betas(model: RecordingVAE) -> list[float]:
    return [beta for beta, _ in model.used]


class Raise(Callback):
    """Break off at the start of a batch."""

    def __init__(self, batch: int, error: BaseException) -> None:
        self.batch, self.error = batch, error

    def on_train_batch_start(self, trainer: Any, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.batch:
            raise self.error


# ---- the value at every step


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (Linear(steps=4), [0, 0.25, 0.5, 0.75, 1, 1]),
        (Linear(start=2.0, steps=2), [2, 1.5, 1, 1, 1, 1]),
        (Linear(epochs=0.5), [0, 1 / 3, 2 / 3, 1, 1, 1]),
        (Linear(fraction=0.25), [0, 1 / 3, 2 / 3, 1, 1, 1]),
        (Cyclical(period_steps=4, ratio=0.5), [0, 0.5, 1, 1, 0, 0.5]),
        (Staged([0.0, None], at_steps=[3]), [0, 0, 0, 1, 1, 1]),
        (Join([Constant(0.0, steps=2), Linear(steps=2)]), [0, 0, 0, 0.5, 1, 1]),
        (Constant(1.0), [1] * 6),
        (lambda step: step / 10, [0, 0.1, 0.2, 0.3, 0.4, 0.5]),
    ],
)
def test_each_training_step_uses_the_value_of_the_schedule(
    tmp_path: Path, schedule: Schedule | Callable[[int], float], expected: list[float]
) -> None:
    model = RecordingVAE()
    quiet_trainer(tmp_path, callbacks=[KLAnnealing(schedule)], max_epochs=2).fit(model, loader())
    assert betas(model)[:6] == pytest.approx(expected)
    assert len(model.used) == 12
    assert model.beta == 1.0


@pytest.mark.parametrize("accumulate", [2, 4])
def test_batches_of_one_accumulated_step_share_its_value(tmp_path: Path, accumulate: int) -> None:
    model = ForeignModule()
    trainer = quiet_trainer(
        tmp_path, callbacks=[KLAnnealing(Linear(epochs=1.0))], max_epochs=2, accumulate_grad_batches=accumulate
    )
    trainer.fit(model, loader())
    steps = -(-6 // accumulate)  # the last batch of an epoch steps, even if alone
    expected = [min(1.0, (epoch * steps + batch // accumulate) / steps) for epoch in range(2) for batch in range(6)]
    assert model.used == pytest.approx(expected)


def test_two_optimizers_count_as_one_step_a_batch(tmp_path: Path) -> None:
    model = ForeignModule(optimizers=2)
    trainer = quiet_trainer(tmp_path, callbacks=[KLAnnealing(Linear(fraction=0.5))], max_epochs=2)
    trainer.fit(model, loader())
    assert trainer.global_step == 24
    assert model.used == pytest.approx([min(1.0, step / 6) for step in range(12)])


def test_validation_and_sanity_batches_neither_advance_nor_see_the_schedule(tmp_path: Path) -> None:
    model = ForeignModule(beta=3.0)
    trainer = quiet_trainer(
        tmp_path, callbacks=[KLAnnealing(Linear(steps=12))], max_epochs=2, val_check_interval=2, num_sanity_val_steps=2
    )
    trainer.fit(model, loader(), loader(4))
    assert model.used == pytest.approx([3.0 * step / 12 for step in range(12)])
    assert model.validated == [3.0] * (2 + 6 * 2)


class Moved(ForeignModule):
    """Something else moves the number, too: its optimizer, or a line that leaves no trace on the tensor."""

    def __init__(self, how: str) -> None:
        super().__init__()
        del self.beta
        if how == "an optimizer":
            self.beta = torch.nn.Parameter(torch.tensor(3.0))
        else:
            self.register_buffer("beta", torch.tensor(3.0))
        self.how = how

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        loss = super().training_step(batch, batch_idx) + 0 * self.beta.clone()  # whose weight decays
        if self.how == "at each step":
            self.beta.data.mul_(0.5)
        elif self.how == "once" and self.global_step == 15:
            self.beta.fill_(9.0)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), 0.01)


@pytest.mark.filterwarnings("ignore:.* sets it too")
@pytest.mark.parametrize("how", ["an optimizer", "at each step", "once"])
def test_a_number_at_its_end_is_the_schedules_at_every_step(tmp_path: Path, how: str) -> None:
    model = Moved(how)
    trainer = quiet_trainer(tmp_path, callbacks=[KLAnnealing(Linear(steps=4))], max_epochs=1, log_every_n_steps=50)
    trainer.fit(model, loader(48))
    assert model.used == pytest.approx([3.0 * min(1, step / 4) for step in range(24)])


@pytest.mark.parametrize("attribute", [["beta", "gamma"], ["gamma", "beta"]])
def test_several_paths_move_together(tmp_path: Path, attribute: list[str]) -> None:
    model = ForeignModule()
    model.gamma = 1.0  # type: ignore[assignment]
    quiet_trainer(tmp_path, callbacks=[KLAnnealing(Linear(steps=6), attribute)], max_epochs=1).fit(model, loader())
    assert model.used == pytest.approx([step / 6 for step in range(6)])
    assert (model.beta, model.gamma) == (1.0, 1.0)


class RecordingOwn(RecordingVAE):
    """Has another number than its knobs, which it records at each training batch."""

    own = 0.0

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.used_own = [*getattr(self, "used_own", []), self.own]
        return super().training_step(batch, batch_idx)


def test_a_setter_writes_the_value(tmp_path: Path) -> None:
    annealing = KLAnnealing(
        Linear(stop=2.0, steps=4), setter=lambda to, value: setattr(to, "own", value), name="weight"
    )
    model = RecordingOwn()
    trainer = quiet_trainer(tmp_path, callbacks=[annealing], max_epochs=1, log_every_n_steps=1)
    trainer.fit(model, loader())
    assert model.used_own == [0, 0.5, 1, 1.5, 2, 2]
    assert model.own == 2.0
    assert betas(model) == [1.0] * 6
    assert "knobs/weight" in trainer.callback_metrics


def test_a_setter_needs_an_explicit_end(tmp_path: Path) -> None:
    annealing = KLAnnealing(Linear(steps=4), setter=lambda pl_module, value: None)
    with pytest.raises(ValueError, match="Give it a `stop`"):
        quiet_trainer(tmp_path, callbacks=[annealing], max_epochs=1).fit(RecordingVAE(), loader())


# ---- the target


@pytest.mark.parametrize("beta", [0.1, 1.0, 10.0])
def test_an_open_end_is_the_configured_value(tmp_path: Path, beta: float) -> None:
    model = RecordingVAE(beta=beta)
    quiet_trainer(tmp_path, callbacks=[KLAnnealing(Linear(steps=3))], max_epochs=1).fit(model, loader())
    assert betas(model) == pytest.approx([0, beta / 3, 2 * beta / 3, beta, beta, beta])
    assert float(model.beta) == pytest.approx(beta)
    assert model.knobs == {"beta": beta, "free_bits": None}


def test_three_betas_give_three_models(tmp_path: Path) -> None:
    rates = []
    for beta in (0.1, 1.0, 10.0):
        torch.manual_seed(0)
        model = RecordingVAE(beta=beta)
        model.configure_optimizers = lambda model=model: torch.optim.Adam(model.parameters(), 0.05)  # type: ignore
        trainer = quiet_trainer(
            tmp_path, callbacks=[KLAnnealing(Linear(fraction=0.2))], max_epochs=40, num_sanity_val_steps=0
        )
        trainer.fit(model, loader(batch_size=12))
        rates.append(float(trainer.validate(model, loader(batch_size=12), verbose=False)[0]["val/rate"]))
    assert rates[0] > 1.5 * rates[1] > 1.5 * 1.5 * rates[2]


def test_a_schedule_from_nothing_to_nothing_says_so(tmp_path: Path) -> None:
    """Whoever annealed by hand has a weight that starts at 0."""
    trainer = quiet_trainer(tmp_path, callbacks=[KLAnnealing(Linear(steps=3))], max_epochs=1)
    with pytest.warns(UserWarning, match="starts and ends at 0, so nothing moves"):
        trainer.fit(ForeignModule(beta=0.0), loader())


def test_another_end_than_the_configured_one_is_an_error(tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path, callbacks=[KLAnnealing(Linear(stop=2.0, steps=3))], max_epochs=1)
    model = RecordingVAE(beta=4.0)
    with pytest.raises(MisconfigurationException, match=r"ends at 2, but .* `beta=4`.*Configure it in one place"):
        trainer.fit(model, loader())
    assert model.beta == model.knobs["beta"] == 4.0


def test_the_configured_end_given_twice_is_fine(tmp_path: Path) -> None:
    model = RecordingVAE(beta=4.0)
    quiet_trainer(tmp_path, callbacks=[KLAnnealing(Linear(stop=4.0, steps=3))], max_epochs=1).fit(model, loader())
    assert model.beta == 4.0


def test_an_explicit_end_becomes_the_target_of_a_default(tmp_path: Path) -> None:
    model = RecordingVAE()
    trainer = quiet_trainer(tmp_path, callbacks=[KLAnnealing(Linear(stop=2.0, steps=3))], max_epochs=1)
    trainer.fit(model, loader(), loader())
    assert betas(model)[-1] == model.beta == 2.0
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert metrics["val/loss"] == pytest.approx(metrics["val/distortion"] + 2.0 * metrics["val/rate"])


def test_validation_loss_is_at_the_target_while_the_weight_moves(tmp_path: Path) -> None:
    model = RecordingVAE(beta=3.0)
    trainer = quiet_trainer(tmp_path, callbacks=[KLAnnealing(Linear(steps=6))], max_epochs=1, val_check_interval=2)

    losses = []

    class Watch(Callback):
        def on_validation_end(self, trainer: Any, pl_module: LightningModule) -> None:
            metrics = trainer.callback_metrics
            losses.append(float(metrics["val/loss"] - metrics["val/distortion"] - 3.0 * metrics["val/rate"]))

    trainer.callbacks.append(Watch())  # type: ignore[attr-defined]
    trainer.fit(model, loader(), loader())
    assert losses == pytest.approx([0.0] * 4, abs=1e-5)


def test_a_plain_callable_leaves_the_configured_value_behind(tmp_path: Path) -> None:
    model = ForeignModule(beta=0.7)
    annealing = KLAnnealing(lambda step: step / 10)
    quiet_trainer(tmp_path, callbacks=[annealing], max_epochs=1).fit(model, loader())
    assert model.used == pytest.approx([step / 10 for step in range(6)])
    assert model.beta == 0.7


# ---- one run and the next


@pytest.mark.parametrize(("error", "raised"), [(KeyboardInterrupt(), SystemExit), (RuntimeError("no"), RuntimeError)])
@pytest.mark.parametrize("module", [ForeignModule, RecordingVAE])
def test_after_an_exception_the_knob_holds_its_target(
    tmp_path: Path, module: type[Any], error: BaseException, raised: type[BaseException]
) -> None:
    model, annealing = module(beta=4.0), KLAnnealing(Linear(steps=6))
    with pytest.raises(raised):
        quiet_trainer(tmp_path, callbacks=[annealing, Raise(2, error)], max_epochs=1).fit(model, loader())
    assert model.beta == 4.0

    model.used.clear()
    quiet_trainer(tmp_path, callbacks=[annealing], max_epochs=1).fit(model, loader())
    used = betas(model) if module is RecordingVAE else model.used
    assert used == pytest.approx([4.0 * step / 6 for step in range(6)])


def test_a_callback_that_serves_another_module_leaves_it_alone_if_it_is_refused(tmp_path: Path) -> None:
    annealing = KLAnnealing(Linear(steps=6))
    quiet_trainer(tmp_path, callbacks=[annealing], max_epochs=1).fit(ForeignModule(beta=4.0), loader())
    other = RecordingVAE(beta=0.5)
    stop = EarlyStopping("train/loss")
    with pytest.raises(MisconfigurationException):
        quiet_trainer(tmp_path, callbacks=[annealing, stop], max_epochs=1).fit(other, loader())
    assert other.beta == 0.5


def test_a_lengthened_run_of_the_same_trainer_keeps_its_steps(tmp_path: Path) -> None:
    model = ForeignModule()
    trainer = quiet_trainer(tmp_path, callbacks=[KLAnnealing(Linear(fraction=1.0))], max_epochs=1)
    trainer.fit(model, loader())
    trainer.fit_loop.max_epochs = 2
    with pytest.warns(UserWarning, match="was 6 steps long when it began and is 12 now"):
        trainer.fit(model, loader())
    assert model.used == pytest.approx([min(1.0, step / 6) for step in range(12)])


# ---- resuming

SAVES: dict[str, dict[str, Any]] = {
    "mid-epoch": {"every_n_train_steps": 3},
    "end of epoch": {"every_n_epochs": 1, "save_on_train_epoch_end": True},
    "last batch": {"every_n_train_steps": 6},
}


@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize("module", [ForeignModule, RecordingVAE])
def test_a_resumed_run_goes_on_where_it_was(tmp_path: Path, module: type[Any], save: str) -> None:
    def run(**options: Any) -> list[float]:
        model = module(beta=2.0)
        path = options.pop("ckpt_path", None)
        checkpoint = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, **SAVES[save])
        callbacks = [KLAnnealing(Linear(fraction=0.75)), checkpoint]
        trainer = quiet_trainer(tmp_path, callbacks=callbacks, enable_checkpointing=True, max_epochs=3)
        trainer.fit(model, loader(), ckpt_path=path)
        return betas(model) if module is RecordingVAE else model.used

    whole = run()
    saved = 3 if save == "mid-epoch" else 6
    resumed = run(ckpt_path=tmp_path / f"step={saved}.ckpt")
    assert resumed == whole[saved:]


def checkpoint_of(tmp_path: Path, schedule: Schedule, model: LightningModule, **options: Any) -> Path:
    """Break a run off in its middle, as a kill would, and return what it had saved."""
    path = tmp_path / "broken.ckpt"
    save = ModelCheckpoint(tmp_path, "broken", every_n_train_steps=3)
    callbacks = [KLAnnealing(schedule), save, Raise(4, RuntimeError("killed"))]
    trainer = quiet_trainer(tmp_path, callbacks=callbacks, enable_checkpointing=True, **{"max_epochs": 1, **options})
    with pytest.raises(RuntimeError, match="killed"):
        trainer.fit(model, loader())
    return path


@pytest.mark.parametrize("schedule", [Linear(fraction=1.0), Linear(fraction=0.5), Sigmoid(fraction=1.0)], ids=str)
def test_a_lengthened_run_keeps_the_steps_it_began_with(tmp_path: Path, schedule: Schedule) -> None:
    path = checkpoint_of(tmp_path, schedule, RecordingVAE())
    model = RecordingVAE()
    trainer = quiet_trainer(tmp_path, callbacks=[KLAnnealing(schedule)], max_epochs=2)
    with pytest.warns(UserWarning, match="was 6 steps long when it began and is 12 now. The schedule keeps"):
        trainer.fit(model, loader(), ckpt_path=path)
    begun = schedule.resolve(1.0, steps_per_epoch=6, total_steps=6)
    assert betas(model) == pytest.approx([begun(step) for step in range(3, 12)])


def test_lengths_in_steps_and_epochs_do_not_mind_a_lengthened_run(tmp_path: Path) -> None:
    path = checkpoint_of(tmp_path, Linear(epochs=1), RecordingVAE())
    model = RecordingVAE()
    trainer = quiet_trainer(tmp_path, callbacks=[KLAnnealing(Linear(epochs=1))], max_epochs=2)
    trainer.fit(model, loader(), ckpt_path=path)  # a warning would be an error
    assert betas(model) == pytest.approx([min(1.0, step / 6) for step in range(3, 12)])


def test_a_changed_schedule_is_said(tmp_path: Path) -> None:
    path = checkpoint_of(tmp_path, Linear(steps=6), RecordingVAE())
    model = RecordingVAE()
    trainer = quiet_trainer(tmp_path, callbacks=[KLAnnealing(Linear(steps=5))], max_epochs=1)
    with pytest.warns(UserWarning, match=r"saved under Linear\(.*steps=6.*continues under Linear\(.*steps=5"):
        trainer.fit(model, loader(), ckpt_path=path)
    assert betas(model) == pytest.approx([0.6, 0.8, 1.0])


def test_a_changed_target_is_said_once(tmp_path: Path) -> None:
    path = checkpoint_of(tmp_path, Linear(steps=6), RecordingVAE(beta=2.0))
    model = RecordingVAE(beta=4.0)
    trainer = quiet_trainer(tmp_path, callbacks=[KLAnnealing(Linear(steps=6))], max_epochs=1)
    with pytest.warns(UserWarning, match=r"saved with `beta=2`; the run continues with `beta=4`") as caught:
        trainer.fit(model, loader(), ckpt_path=path)
    assert sum("beta" in str(each.message) for each in caught) == 1
    assert betas(model) == pytest.approx([2.0, 4 * 4 / 6, 4 * 5 / 6])
    assert model.beta == 4.0


@pytest.mark.parametrize("kind", ["number", "buffer", "parameter"])
def test_a_foreign_module_configured_with_another_weight_at_resume_trains_on_at_that_weight(
    tmp_path: Path, kind: str
) -> None:
    """Case `other_weight_at_resume_is_ignored`."""

    def module(beta: float) -> ForeignModule:
        model = ForeignModule(beta=beta)
        if kind != "number":  # which loading a checkpoint overwrites
            del model.beta
            tensor = torch.tensor(beta)
            model.register_buffer("beta", tensor) if kind == "buffer" else model.register_parameter(
                "beta", nn.Parameter(tensor, requires_grad=False)
            )
        return model

    path = checkpoint_of(tmp_path, Linear(steps=6), module(beta=4.0))
    state = torch.load(path, weights_only=True)["callbacks"]["KLAnnealing{'attribute': 'beta', 'name': 'beta'}"]
    assert state["base"] == 4.0
    assert (state["steps_per_epoch"], state["total_steps"]) == (6, 6)

    other = module(beta=2.0)
    trainer = quiet_trainer(tmp_path, callbacks=[KLAnnealing(Linear(steps=6))], max_epochs=1)
    with pytest.warns(UserWarning, match="began with 4, and the module is configured with 2 now; .* continues to 2"):
        trainer.fit(other, loader(), ckpt_path=path)
    assert other.used == pytest.approx([2.0 * step / 6 for step in (3, 4, 5)])
    assert other.beta == 2.0

    same = module(beta=4.0)
    trainer = quiet_trainer(tmp_path, callbacks=[KLAnnealing(Linear(steps=6))], max_epochs=1)
    trainer.fit(same, loader(), ckpt_path=path)  # a warning would be an error
    assert same.used == pytest.approx([4.0 * step / 6 for step in (3, 4, 5)])


def test_a_schedule_with_its_own_end_finds_that_end_again_without_a_warning(tmp_path: Path) -> None:
    path = checkpoint_of(tmp_path, Linear(stop=2.0, steps=6), ForeignModule(beta=1.0))
    model = ForeignModule(beta=2.0)  # a module that was fitted holds it
    trainer = quiet_trainer(tmp_path, callbacks=[KLAnnealing(Linear(stop=2.0, steps=6))], max_epochs=1)
    trainer.fit(model, loader(), ckpt_path=path)
    assert model.used == pytest.approx([2.0 * step / 6 for step in (3, 4, 5)])


def test_a_checkpoint_that_was_only_validated_is_not_resumed(tmp_path: Path) -> None:
    path = checkpoint_of(tmp_path, Linear(fraction=0.5), ForeignModule(beta=4.0))
    annealing, model = KLAnnealing(Linear(fraction=0.5)), ForeignModule(beta=1.0)
    quiet_trainer(tmp_path, callbacks=[annealing]).validate(model, loader(), path, verbose=False)
    quiet_trainer(tmp_path, callbacks=[annealing], max_epochs=2).fit(model, loader())
    assert model.used == pytest.approx([min(1.0, step / 6) for step in range(12)])


def test_a_loaded_checkpoint_holds_the_target(tmp_path: Path) -> None:
    path = checkpoint_of(tmp_path, Linear(stop=4.0, steps=6), RecordingVAE())
    checkpoint = torch.load(path, weights_only=True)
    assert "beta" not in checkpoint["state_dict"]
    assert checkpoint["hyper_parameters"]["beta"] is None
    model = RecordingVAE.load_from_checkpoint(path)
    assert (float(model.beta), model.knobs["beta"]) == (4.0, None)


class Persistent(ForeignModule):
    """Keeps its weight where checkpoints save it: in a buffer and among its hyper-parameters."""

    def __init__(self, beta: float = 1.0, gamma: float = 1.0, nested: dict[str, float] | None = None) -> None:
        super().__init__(beta)
        self.save_hyperparameters()
        del self.beta
        self.register_buffer("beta", torch.tensor(beta))


def test_a_foreign_checkpoint_holds_the_target_too(tmp_path: Path) -> None:
    model = Persistent(beta=4.0, gamma=4.0, nested={"delta": 4.0})
    paths = ["beta", "hparams.gamma", "hparams.nested.delta"]
    save = ModelCheckpoint(tmp_path, "foreign", every_n_train_steps=3)
    trainer = quiet_trainer(
        tmp_path, callbacks=[KLAnnealing(Linear(steps=6), paths), save], enable_checkpointing=True, max_steps=5
    )
    with pytest.warns(UserWarning, match="takes 6 steps but the run stops after 5"):
        trainer.fit(model, loader())
    assert model.used == pytest.approx([4.0 * step / 6 for step in range(5)]), "saving moves nothing that training sees"
    checkpoint = torch.load(tmp_path / "foreign.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 3
    assert checkpoint["state_dict"]["beta"] == 4.0
    assert checkpoint["hyper_parameters"] == {"beta": 4.0, "gamma": 4.0, "nested": {"delta": 4.0}, "optimizers": 1}


# ---- several at once


def test_state_key_tells_instances_apart() -> None:
    assert KLAnnealing(Linear(steps=1)).state_key == "KLAnnealing{'attribute': 'beta', 'name': 'beta'}"
    assert KLAnnealing(Linear(steps=1), "model.gamma").state_key != KLAnnealing(Linear(steps=2)).state_key


def test_two_of_different_attributes_run_side_by_side_and_resume(tmp_path: Path) -> None:
    class Both(ForeignModule):
        gamma = 3.0

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            result = super().training_step(batch, batch_idx)
            self.used[-1] += 100 * self.gamma
            return result

    def run(path: Path | None = None) -> list[float]:
        model = Both()
        callbacks = [KLAnnealing(Linear(steps=6)), KLAnnealing(Linear(steps=3), "gamma", probe=False)]
        save = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=2)
        trainer = quiet_trainer(tmp_path, callbacks=[*callbacks, save], enable_checkpointing=True, max_epochs=1)
        trainer.fit(model, loader(), ckpt_path=path)
        assert (model.beta, model.gamma) == (1.0, 3.0)
        return model.used

    whole = run()
    assert whole == pytest.approx([step / 6 + 100 * min(3.0, step) for step in range(6)])
    assert run(tmp_path / "step=2.ckpt") == whole[2:]


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ({"attribute": "beta"}, {"attribute": ["beta"], "name": "b"}, "Two callbacks move"),
        ({"attribute": ["gamma", "beta"]}, {"attribute": "gamma"}, "Two callbacks move"),
        ({"attribute": "beta"}, {"attribute": "params.beta"}, "Two callbacks log `knobs/beta`"),
        ({"setter": setattr, "name": "a"}, {"setter": setattr, "name": "b"}, "Two callbacks move"),
    ],
)
def test_twins_are_an_error(tmp_path: Path, first: dict[str, Any], second: dict[str, Any], message: str) -> None:
    callbacks = [KLAnnealing(Linear(stop=1, steps=2), **options) for options in (first, second)]
    with pytest.raises(MisconfigurationException, match=message):
        quiet_trainer(tmp_path, callbacks=callbacks, max_epochs=1).fit(ForeignModule(), loader())


def test_identical_twins_are_refused_by_lightning_already(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `KLAnnealing`"):
        quiet_trainer(tmp_path, callbacks=[KLAnnealing(Linear(steps=1)), KLAnnealing(Linear(steps=2))])


# ---- monitors


@pytest.mark.parametrize(
    "callback",
    [
        ModelCheckpoint(monitor="train/loss"),
        ModelCheckpoint(monitor="train/loss_epoch"),
        EarlyStopping("train/loss"),
        EarlyStopping("train_loss"),
    ],
    ids=lambda callback: f"{type(callback).__name__}-{callback.monitor}",
)
def test_monitoring_the_moving_loss_is_an_error(tmp_path: Path, callback: Callback) -> None:
    trainer = quiet_trainer(
        tmp_path, callbacks=[KLAnnealing(Linear(steps=3)), callback], max_epochs=1, enable_checkpointing=True
    )
    with pytest.raises(MisconfigurationException, match=r"moves with `beta`.*Monitor 'val/loss'.*'train/elbo'"):
        trainer.fit(RecordingVAE(), loader())


class Plateau(RecordingVAE):
    monitor = "train/loss"

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), 0.01)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": self.monitor}}


def test_a_learning_rate_scheduler_on_the_moving_loss_is_an_error(tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path, callbacks=[KLAnnealing(Linear(steps=3))], max_epochs=1)
    with pytest.raises(MisconfigurationException, match="learning rate scheduler monitors 'train/loss'"):
        trainer.fit(Plateau(), loader())


def test_monitors_that_do_not_move_are_fine(tmp_path: Path) -> None:
    model = Plateau()
    model.monitor = "val/loss"
    callbacks = [
        KLAnnealing(Linear(steps=3)),
        EarlyStopping("val/loss"),
        ModelCheckpoint(tmp_path, "best", monitor="train/elbo", mode="max"),
    ]
    trainer = quiet_trainer(tmp_path, callbacks=callbacks, max_epochs=2, enable_checkpointing=True)
    trainer.fit(model, loader(), loader())


def test_the_loss_may_be_monitored_where_nothing_moves(tmp_path: Path) -> None:
    callbacks = [KLAnnealing(Constant(1.0)), EarlyStopping("train/loss")]
    quiet_trainer(tmp_path, callbacks=callbacks, max_epochs=1).fit(RecordingVAE(), loader())


@pytest.mark.parametrize("module", [ForeignModule, RecordingVAE])
def test_model_checkpoint_picks_the_best_epoch_and_not_the_one_of_the_smallest_weight(
    tmp_path: Path, module: type[Any]
) -> None:
    model = module(beta=10.0)
    model.configure_optimizers = lambda: torch.optim.Adam(model.parameters(), 0.003)
    monitor = "val/loss" if module is RecordingVAE else "val_loss"
    save = ModelCheckpoint(tmp_path, monitor=monitor)
    losses: list[float] = []

    class Watch(Callback):
        def on_validation_end(self, trainer: Any, pl_module: LightningModule) -> None:
            if not trainer.sanity_checking:
                losses.append(float(trainer.callback_metrics[monitor]))

    trainer = quiet_trainer(
        tmp_path, callbacks=[KLAnnealing(Linear(fraction=0.8)), save, Watch()], max_epochs=8, enable_checkpointing=True
    )
    trainer.fit(model, loader(48), loader(48))
    best = torch.load(save.best_model_path, weights_only=True)["epoch"]
    assert losses[best] == min(losses)
    assert best == 7, f"the model gets better all the time: {losses}"


# ---- lengths


def test_a_schedule_longer_than_the_run_warns_with_the_numbers(tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path, callbacks=[KLAnnealing(Linear(steps=10))], max_epochs=1)
    with pytest.warns(UserWarning, match=r"takes 10 steps but the run stops after 6, at 0.5 instead of 1"):
        trainer.fit(RecordingVAE(), loader())


def test_a_run_of_no_steps_is_too_short_for_no_schedule(tmp_path: Path) -> None:
    model = RecordingVAE()
    quiet_trainer(tmp_path, callbacks=[KLAnnealing(Linear(steps=10))], max_steps=0).fit(model, loader())
    assert model.used == []


class Stream(IterableDataset[torch.Tensor]):
    def __iter__(self) -> Any:
        return iter(torch.zeros(6, 2))


@pytest.mark.parametrize(
    ("schedule", "options", "known"),
    [
        (Linear(fraction=0.5), {"max_epochs": -1}, True),
        (Linear(fraction=0.5), {"max_epochs": 1}, False),
        (Linear(epochs=0.5), {"max_epochs": 1}, False),
        (Linear(epochs=0.5), {"max_steps": 4}, False),
        (Linear(fraction=0.5), {"max_epochs": 2, "callbacks": [GradientAccumulationScheduler({1: 2})]}, True),
    ],
    ids=["endless", "a fraction", "epochs", "epochs of a run in steps", "accumulation that changes"],
)
def test_a_length_that_cannot_be_known_asks_for_steps(
    tmp_path: Path, schedule: Schedule, options: dict[str, Any], known: bool
) -> None:
    callbacks = [KLAnnealing(schedule), *options.get("callbacks", [])]
    trainer = quiet_trainer(tmp_path, **{**options, "callbacks": callbacks})
    data = loader() if known else DataLoader(Stream(), batch_size=2)
    with pytest.raises(ValueError, match=r"must be given in steps here"):
        trainer.fit(ForeignModule(), data)


def test_the_end_of_a_run_of_two_optimizers_in_their_steps_is_not_known(tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path, callbacks=[KLAnnealing(Linear(fraction=0.5))], max_steps=8)
    with pytest.raises(ValueError, match="must be given in steps here"):
        trainer.fit(ForeignModule(optimizers=2), loader())


@pytest.mark.parametrize(
    ("schedule", "options"),
    [
        (Linear(fraction=0.5), {"max_epochs": -1, "max_steps": 8}),
        (Linear(epochs=4 / 6), {"max_epochs": -1, "max_steps": 8}),
        (Linear(steps=4), {"max_epochs": -1, "max_steps": 8}),
        (Linear(fraction=0.5), {"max_epochs": 2, "limit_train_batches": 4}),
    ],
    ids=str,
)
def test_a_length_that_can_be_known_is_used(tmp_path: Path, schedule: Schedule, options: dict[str, Any]) -> None:
    model = ForeignModule()
    quiet_trainer(tmp_path, callbacks=[KLAnnealing(schedule)], **options).fit(model, loader())
    assert model.used == pytest.approx([min(1.0, step / 4) for step in range(8)])


class StepsTwice(ForeignModule):
    """Optimizes manually, in two optimizer steps a batch, so ``max_steps`` batches are never reached."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        self.used.append(float(self.beta))
        loss: torch.Tensor = self.layer(batch).square().mean()
        self.manual_backward(loss)
        for _ in range(2):
            self.optimizers().step()  # type: ignore[union-attr]
        return loss


def test_a_fraction_of_a_run_whose_batches_step_twice_is_refused_or_right(tmp_path: Path) -> None:
    annealing = KLAnnealing(Linear(fraction=0.5), probe=False)
    with pytest.raises(
        ValueError, match=r"steps in the run is not known.* `max_steps` counts the steps of every optim"
    ):
        quiet_trainer(tmp_path, callbacks=[annealing], max_steps=8).fit(StepsTwice(), loader())
    model = StepsTwice()
    quiet_trainer(tmp_path, callbacks=[annealing], max_epochs=2).fit(model, loader())
    assert model.used == pytest.approx([min(1.0, step / 6) for step in range(12)])


def test_a_table_that_is_too_short_says_at_which_step(tmp_path: Path) -> None:
    annealing = KLAnnealing([0.0, 0.5, 1.0].__getitem__, probe=False)
    with pytest.raises(ValueError, match=r"must give a number for every step of the run, .* at step 3"):
        quiet_trainer(tmp_path, callbacks=[annealing], max_epochs=1).fit(ForeignModule(), loader())


# ---- logging


def rows(path: Path) -> list[dict[str, str]]:
    with (path / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_value_is_logged_at_the_step_of_the_other_curves(tmp_path: Path, accumulate: int) -> None:
    logger = CSVLogger(tmp_path)
    trainer = quiet_trainer(
        tmp_path,
        callbacks=[KLAnnealing(Linear(steps=6))],
        max_epochs=2,
        logger=logger,
        log_every_n_steps=2,
        accumulate_grad_batches=accumulate,
    )
    trainer.fit(RecordingVAE(), loader())
    logged = [row for row in rows(Path(logger.log_dir)) if row["knobs/beta"]]
    steps = [1, 3, 5, 7, 9, 11] if accumulate == 1 else [1, 3, 5]
    assert [int(row["step"]) for row in logged] == steps
    assert [float(row["knobs/beta"]) for row in logged] == pytest.approx([min(1.0, step / 6) for step in steps])
    assert all(row["train/elbo"] for row in logged)


class Unclamped(Schedule):
    """It goes on past its end, where it is not asked any more."""

    length, final = 15.0, 0.5

    def resolve(self, *_: Any, **__: Any) -> Schedule:
        return self

    def _value(self, step: int) -> float:
        return step / 30


class LogsAsItLikes(ForeignModule):
    def on_train_start(self) -> None:
        self.trainer.log_every_n_steps = 7  # type: ignore[attr-defined]


@pytest.mark.parametrize(("schedule", "at_20"), [(Linear(steps=30), 20 / 30), (Unclamped(), 0.5)])
def test_a_foreign_module_is_logged_for_as_long_as_it_runs(tmp_path: Path, schedule: Schedule, at_20: float) -> None:
    logger = CSVLogger(tmp_path)
    annealing = KLAnnealing(schedule, probe=False)
    trainer = quiet_trainer(tmp_path, callbacks=[annealing], max_epochs=1, logger=logger, log_every_n_steps=50)
    trainer.fit(module := LogsAsItLikes(), loader(rows=60))
    logged = {int(row["step"]): float(row["knobs/beta"]) for row in rows(Path(logger.log_dir)) if row["knobs/beta"]}
    assert logged == pytest.approx({step: module.used[step] for step in (6, 13, 20, 27)})
    assert module.used[20] == pytest.approx(at_20)


@pytest.mark.filterwarnings("ignore:train_dataloader yielded None")
def test_a_batch_that_is_none_is_logged_too(tmp_path: Path) -> None:
    batches = [None if number == 20 else torch.ones(2, 2) for number in range(30)]
    logger = CSVLogger(tmp_path)
    annealing = KLAnnealing(Linear(steps=30), probe=False)
    trainer = quiet_trainer(tmp_path, callbacks=[annealing], max_epochs=1, logger=logger, log_every_n_steps=7)
    trainer.fit(ForeignModule(), DataLoader(batches, batch_size=None, collate_fn=lambda batch: batch))
    logged = {int(row["step"]): float(row["knobs/beta"]) for row in rows(Path(logger.log_dir)) if row["knobs/beta"]}
    assert logged == pytest.approx({6: 6 / 30, 13: 13 / 30, 20: 19 / 30, 27: 27 / 30})


@pytest.mark.parametrize(("every", "expected"), [(1, 6), (3, 2), (4, 1)])
def test_nothing_is_logged_between_logging_steps(tmp_path: Path, every: int, expected: int) -> None:
    class Counts(ForeignModule):
        calls = 0

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.layer(batch).square().mean()

        def log(self, name: str, *args: Any, **kwargs: Any) -> None:
            self.calls += 1
            super().log(name, *args, **kwargs)

    model = Counts()
    trainer = quiet_trainer(
        tmp_path,
        callbacks=[KLAnnealing(Linear(steps=3), probe=False)],
        max_epochs=1,
        logger=CSVLogger(tmp_path),
        log_every_n_steps=every,
    )
    trainer.fit(model, loader())
    assert model.calls == expected


@pytest.mark.parametrize("loggers", ["none", "several"])
def test_no_logger_and_several_loggers(tmp_path: Path, loggers: str) -> None:
    several = [CSVLogger(tmp_path), CSVLogger(tmp_path, name="other"), TensorBoardLogger(tmp_path, name="board")]
    trainer = quiet_trainer(
        tmp_path,
        callbacks=[KLAnnealing(Linear(steps=3))],
        max_epochs=1,
        logger=several if loggers == "several" else False,
        log_every_n_steps=1,
    )
    trainer.fit(RecordingVAE(), loader())
    assert trainer.callback_metrics["knobs/beta"] == 1.0
    assert "knobs/beta" in trainer.progress_bar_metrics
    if loggers == "several":
        for logger in several[:2]:
            logged = [float(row["knobs/beta"]) for row in rows(Path(logger.log_dir or "")) if row["knobs/beta"]]
            assert logged == pytest.approx([0, 1 / 3, 2 / 3, 1, 1, 1])


def test_name_changes_the_key(tmp_path: Path) -> None:
    model = ForeignModule()
    model.params = {"kld_weight": 1.0}  # type: ignore[assignment]
    for name, key in ((None, "knobs/kld_weight"), ("kl", "knobs/kl")):
        trainer = quiet_trainer(
            tmp_path,
            callbacks=[KLAnnealing(Linear(steps=3), "params.kld_weight", name=name, probe=False)],
            max_epochs=1,
            log_every_n_steps=1,
        )
        trainer.fit(model, loader())
        assert key in trainer.callback_metrics


# ---- the object


def test_pickling_before_and_after_a_run(tmp_path: Path) -> None:
    annealing = KLAnnealing(Cyclical(period_fraction=0.5), ["beta", "gamma"])
    assert pickle.loads(pickle.dumps(annealing)).state_key == annealing.state_key
    model = ForeignModule()
    model.gamma = 1.0  # type: ignore[assignment]
    quiet_trainer(tmp_path, callbacks=[annealing], max_epochs=1).fit(model, loader())
    copy = pickle.loads(pickle.dumps(annealing))
    assert copy.schedule == annealing.schedule
    assert copy.state_dict() == annealing.state_dict()


@pytest.mark.parametrize("attribute", ["", ".", "a..b", "beta.", [], ["beta", ""], [1]])
def test_an_attribute_that_is_no_path(attribute: Any) -> None:
    with pytest.raises(ValueError, match="`attribute` must be a dotted path"):
        KLAnnealing(Linear(steps=1), attribute)


def test_a_schedule_that_is_no_callable() -> None:
    with pytest.raises(ValueError, match="`schedule` must be a schedule or another callable of the step, got float"):
        KLAnnealing(0.5)  # type: ignore[arg-type]


def test_options_are_not_written_by_a_run(tmp_path: Path) -> None:
    schedule, paths = Linear(fraction=0.5), ["beta"]
    annealing = KLAnnealing(schedule, paths)
    quiet_trainer(tmp_path, callbacks=[annealing], max_epochs=1).fit(RecordingVAE(), loader())
    assert annealing.schedule is schedule
    assert schedule == Linear(fraction=0.5)
    assert annealing.attribute is paths
    assert paths == ["beta"]


def test_a_missing_path_stops_the_fit_and_creates_nothing(tmp_path: Path) -> None:
    model = ForeignModule()
    with pytest.raises(ValueError, match=r"ForeignModule has no 'bta'. Did you mean 'beta'"):
        quiet_trainer(tmp_path, callbacks=[KLAnnealing(Linear(steps=2), "bta")], max_epochs=1).fit(model, loader())
    assert not hasattr(model, "bta")
    assert not model.used


@pytest.mark.parametrize("hook", ["setup", "configure_model", "on_fit_start", "on_train_start", "on_train_epoch_start"])
def test_a_module_may_build_itself_in_any_hook_of_the_start(tmp_path: Path, hook: str) -> None:
    class Late(ForeignModule):
        @property
        def weight(self) -> float:
            return self.loss["weight"]  # type: ignore[no-any-return, index, operator, union-attr]

        def build(self, stage: str = "") -> None:
            self.loss = {"weight": 1.0}

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.used.append(self.weight)
            return self.layer(batch).square().mean() * self.weight

    setattr(Late, hook, Late.build)
    model, annealing = Late(), KLAnnealing(Linear(steps=4), "loss.weight")
    quiet_trainer(tmp_path, callbacks=[annealing], max_epochs=1).fit(model, loader())
    assert model.used == [0, 0.25, 0.5, 0.75, 1, 1]
    assert model.loss == {"weight": 1.0}


def test_a_wrong_path_is_an_error_in_a_module_that_builds_itself_late_too(tmp_path: Path) -> None:
    class Late(ForeignModule):
        def on_train_start(self) -> None:
            pass

    model = Late()
    with pytest.raises(ValueError, match="Did you mean 'beta'"):
        quiet_trainer(tmp_path, callbacks=[KLAnnealing(Linear(steps=4), "betta")], max_epochs=1).fit(model, loader())
    assert model.used == []


def test_a_method_that_returns_the_weight_is_replaced(tmp_path: Path) -> None:
    class Computes(ForeignModule):
        def kl_weight(self, step: int) -> float:
            return 1.0

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.used.append(self.kl_weight(batch_idx))
            return self.layer(batch).square().mean() * self.kl_weight(step=batch_idx)

    model = Computes()
    trainer = quiet_trainer(tmp_path, callbacks=[KLAnnealing(Linear(stop=2.0, steps=4), "kl_weight")], max_epochs=1)
    trainer.fit(model, loader())
    assert model.used == [0, 0.5, 1, 1.5, 2, 2]
    assert model.kl_weight(0) == 2.0
    with pytest.raises(ValueError, match="Give it a `stop`"):
        quiet_trainer(tmp_path, callbacks=[KLAnnealing(Linear(steps=4), "kl_weight")], max_epochs=1).fit(
            Computes(), loader()
        )


def test_after_an_exception_that_skips_every_hook_the_number_is_at_its_target(tmp_path: Path) -> None:
    class Fails(ForeignModule):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if batch_idx == 2:
                self.trainer.callbacks.clear()  # type: ignore[attr-defined]
                raise KeyError("disent does this")
            return super().training_step(batch, batch_idx)

    model = Fails(beta=4.0)
    with pytest.raises(KeyError):
        quiet_trainer(tmp_path, callbacks=[KLAnnealing(Linear(steps=4))], max_epochs=1).fit(model, loader())
    assert model.beta == 4.0


def test_a_wrong_path_on_a_module_with_knobs_is_an_error_before_the_sanity_validation(tmp_path: Path) -> None:
    class Watch(Callback):
        def on_sanity_check_start(self, *_: Any) -> None:
            raise AssertionError

    callbacks = [KLAnnealing(Linear(steps=4), "bta"), Watch()]
    with pytest.raises(ValueError, match="Did you mean 'beta'"):
        quiet_trainer(tmp_path, callbacks=callbacks, max_epochs=1).fit(RecordingVAE(), loader(), loader())


def test_one_end_in_two_precisions_is_one(tmp_path: Path) -> None:
    model = RecordingVAE()
    model.beta = torch.tensor(0.1)
    assert model.knobs["beta"] != 0.1
    quiet_trainer(tmp_path, callbacks=[KLAnnealing(Linear(stop=0.1, steps=3))], max_epochs=1).fit(model, loader())
    assert float(model.beta) == float(torch.tensor(0.1))


@pytest.mark.parametrize("ended", [KeyError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["training", "validation"])
def test_a_setter_configures_nothing_after_an_exception_either(
    tmp_path: Path, where: str, ended: type[BaseException]
) -> None:
    class Fails(Callback):
        def on_before_optimizer_step(self, trainer: Any, *_: Any) -> None:
            if where == "training" and trainer.global_step == 2:
                raise ended

        def on_validation_batch_end(self, *_: Any) -> None:
            if where == "validation":
                raise ended

    model = RecordingVAE()
    annealing = KLAnnealing(Linear(steps=5, stop=4.0), setter=lambda module, value: setattr(module, "beta", value))
    options: dict[str, Any] = {"callbacks": [annealing, Fails()], "max_epochs": 1, "num_sanity_val_steps": 0}
    with pytest.raises(SystemExit if ended is KeyboardInterrupt else ended):
        quiet_trainer(tmp_path, **options).fit(model, loader(), loader())
    assert (float(model.beta), model.knobs["beta"], model.hparams["beta"]) == (4.0, None, None)
    if not (where == "validation" and ended is KeyboardInterrupt):  # after which Lightning's loops tell nothing
        model.beta = 2.0
        assert (float(model.beta), model.knobs["beta"]) == (2.0, 2.0)
