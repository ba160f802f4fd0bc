import copy
import inspect
import pickle
import sys
import warnings
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging
from torch import nn

from lightning_vae.callbacks import (
    AttributeScheduler,
    AttributeWriter,
    CollapseDetector,
    EnforcedFreeBits,
    KLAnnealing,
    Linear,
    TargetRate,
)
from tests.doubles import ForeignModule, RecordingVAE, loader, quiet_trainer, weight_averaging


@dataclass
class Config:
    beta: float = 1.0
    weights: dict[str, float] = field(default_factory=lambda: {"kl": 1.0})


class Warmed(ForeignModule):
    """Has a warm-up of its own, in one of several places."""

    def __init__(self, how: str = "") -> None:
        super().__init__()
        self.how = how
        self.cfg = Config()
        self.register_buffer("buffer", torch.tensor(1.0))
        self.sub = nn.Module()
        self.sub.beta = 1.0  # type: ignore[assignment]
        self.read = lambda: self.beta

    def set_beta(self) -> None:
        setattr(self.cfg, "beta", 0.75)  # noqa: B010

    def set_weights(self) -> None:
        self.cfg.weights.update(kl=0.75)

    def set_module(self) -> None:
        self.sub.beta = 0.75  # type: ignore[assignment]

    def set_buffer(self) -> None:
        self.buffer.fill_(0.75)

    def set_data(self) -> None:
        self.buffer.data.fill_(0.75)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self.how == "hook":
            self.beta = 0.75

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        if self.how.startswith("set"):
            getattr(self, self.how)()
        return self.layer(batch).square().mean() * self.beta * self.cfg.beta * self.sub.beta * self.buffer  # type: ignore[no-any-return]


class Other(Callback):
    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        pl_module.beta = 0.75


def fit(path: Path, model: Any, attribute: str, *others: Any, **options: Any) -> list[str]:
    annealing = KLAnnealing(Linear(stop=2.0, steps=10), attribute, probe=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        quiet_trainer(path, callbacks=[annealing, *others], max_epochs=2, **options).fit(model, loader(), loader())
    return [str(each.message) for each in caught if "sets it too" in str(each.message)]


@pytest.mark.parametrize(
    ("how", "attribute"),
    [
        ("set_beta", "cfg.beta"),
        ("set_weights", "cfg.weights.kl"),
        ("set_module", "sub.beta"),
        ("set_buffer", "buffer"),
        ("hook", "beta"),
    ],
)
def test_that_something_else_sets_the_number_is_said_once_with_both_values(
    tmp_path: Path, how: str, attribute: str
) -> None:
    (message,) = fit(tmp_path, Warmed(how), attribute)
    assert message.startswith(
        f"KLAnnealing({attribute.split('.')[-1]}): `{attribute}` was set to 0.2 for step 1, and after it is 0.75: "
    )
    assert "Remove one of them." in message


def test_another_callback_is_noticed(tmp_path: Path) -> None:
    (message,) = fit(tmp_path, ForeignModule(), "beta", Other())
    assert "after it is 0.75: something else sets it too, perhaps Other, so one of the two has no effect." in message


def test_a_write_that_leaves_no_version_is_noticed_where_the_run_logs(tmp_path: Path) -> None:
    (message,) = fit(tmp_path, Warmed("set_data"), "buffer", log_every_n_steps=3)
    assert "`buffer` was set to 0.4 for step 2, and after it is 0.75" in message or "step 5" in message


def test_no_profiler_is_used(tmp_path: Path) -> None:
    class Profiles(Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            assert sys.getprofile() is None

    assert len(fit(tmp_path, Warmed("set_beta"), "cfg.beta", Profiles())) == 1


def test_the_first_steps_are_looked_at_however_many_batches_they_take(tmp_path: Path) -> None:
    class Late(Other):
        def on_train_batch_start(self, trainer: Any, *others: Any) -> None:
            if trainer.global_step >= 6:
                super().on_train_batch_start(trainer, *others)

    annealing = KLAnnealing(Linear(stop=1.0, steps=10), probe=False)
    options: dict[str, Any] = {"max_steps": 10, "accumulate_grad_batches": 4, "log_every_n_steps": 1000}
    with pytest.warns(UserWarning, match=r"`beta` was set to 0.6 for step 6, and after it is 0.75"):
        quiet_trainer(tmp_path, callbacks=[annealing, Late()], **options).fit(ForeignModule(), loader())


def test_a_run_that_ends_without_its_hooks_leaves_the_target(tmp_path: Path) -> None:
    class Fails(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 1:
                trainer.callbacks.clear()
                raise KeyError

    annealing, model = KLAnnealing(Linear(stop=2.0, steps=5), "cfg.beta", probe=False), Warmed("set_beta")
    with pytest.raises(KeyError):
        quiet_trainer(tmp_path, callbacks=[annealing, Fails()], max_epochs=1).fit(model, loader())
    assert model.cfg.beta == 2.0


def test_a_modules_own_schedule_is_named(tmp_path: Path) -> None:
    model = Warmed("set_beta")
    model.kl_warmup_epochs = 10  # type: ignore[assignment]
    (message,) = fit(tmp_path, model, "cfg.beta")
    assert message.endswith("Switch off the module's own schedule, perhaps `kl_warmup_epochs=10`.")


def test_an_undisturbed_number_is_no_conflict(tmp_path: Path) -> None:
    class Saves(Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            trainer.save_checkpoint(tmp_path / "a.ckpt")  # which sets the number to its target

    model = ForeignModule()
    for place in ([], [Saves()]):
        assert fit(tmp_path, model, "beta", *place, accumulate_grad_batches=2, val_check_interval=0.5) == []
    annealing = KLAnnealing(Linear(stop=2.0, steps=5), probe=False)
    trainer = quiet_trainer(tmp_path, callbacks=[Saves(), annealing], max_epochs=1)
    trainer.fit(ForeignModule(), loader())


def test_two_numbers_in_one_tensor_are_no_conflict(tmp_path: Path) -> None:
    class Weighted(ForeignModule):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("weights", torch.ones(2))
            self.seen: list[list[float]] = []

        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            self.seen.append(self.weights.tolist())  # type: ignore[operator, union-attr]
            return self.layer(batch).square().mean() + self.weights.sum()  # type: ignore[no-any-return, operator, union-attr]

    model = Weighted()
    callbacks = [KLAnnealing(Linear(steps=4), f"weights.{index}", name=f"w{index}") for index in (0, 1)]
    quiet_trainer(tmp_path, callbacks=callbacks, max_epochs=1).fit(model, loader())
    assert model.seen == [[min(step / 4, 1)] * 2 for step in range(6)]


def test_a_module_may_set_the_number_a_single_time(tmp_path: Path) -> None:
    class Once(ForeignModule):
        ready = False

        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            if not self.ready:
                self.beta, self.ready = 0.7, True
            return super().training_step(batch, batch_idx)

    assert fit(tmp_path, Once(), "beta") == []


def test_cleaning_up_does_not_hide_what_ended_the_run(tmp_path: Path) -> None:
    class Loses(ForeignModule):
        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            del self.beta
            raise KeyError("the reason")

    annealing = KLAnnealing(Linear(stop=2.0, steps=5), probe=False)
    trainer = quiet_trainer(tmp_path, callbacks=[annealing], max_epochs=1)
    with pytest.warns(UserWarning, match="Cleaning up"), pytest.raises(KeyError, match="the reason"):
        trainer.fit(Loses(), loader())
    assert "teardown" not in vars(trainer.strategy)


def test_a_validation_that_does_not_see_the_target_is_told(tmp_path: Path) -> None:
    class Resets(ForeignModule):
        def on_validation_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            self.beta = 0.123

    annealing = KLAnnealing(Linear(stop=2.0, steps=5), probe=False)
    with pytest.warns(UserWarning, match=r"validation should see `beta` at its target, 2, but sees 0.123") as caught:
        quiet_trainer(tmp_path, callbacks=[annealing], max_epochs=2, num_sanity_val_steps=0).fit(
            Resets(), loader(), loader()
        )
    assert sum("validation should see" in str(each.message) for each in caught) == 1


def test_a_schedule_that_gives_no_number_is_an_error(tmp_path: Path) -> None:
    annealing = KLAnnealing(lambda step: float("nan") if step == 2 else 1.0)
    with pytest.raises(ValueError, match="finite numbers, got nan at step 2"):
        quiet_trainer(tmp_path, callbacks=[annealing], max_epochs=1).fit(ForeignModule(), loader())


class Buffered(Warmed):
    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.validated.append(float(self.buffer))


@pytest.mark.parametrize("use_buffers", [True, False])
@pytest.mark.parametrize("first", [True, False])
def test_weight_averaging_does_not_average_the_number(tmp_path: Path, first: bool, use_buffers: bool) -> None:
    """Case `averaged_weights_average_beta`: validation and checkpoints hold the target of somebody's buffer."""
    model = Buffered()
    save = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=2)
    annealing = KLAnnealing(Linear(fraction=0.5), "buffer", probe=False)
    callbacks = [annealing, weight_averaging(decay=0.5, use_buffers=use_buffers)]
    trainer = quiet_trainer(
        tmp_path, callbacks=[*(callbacks if first else callbacks[::-1]), save], max_epochs=3, enable_checkpointing=True
    )
    trainer.fit(model, loader(), loader(4))
    assert set(model.validated) == {1.0}
    assert float(model.buffer) == 1.0
    files = list(tmp_path.glob("*.ckpt"))
    assert len(files) == 9
    assert {float(torch.load(file, weights_only=True)["state_dict"]["buffer"]) for file in files} == {1.0}


@pytest.mark.parametrize("first", [True, False])
def test_validation_of_averaged_weights_sees_the_target_in_a_run_that_saves_nothing(
    tmp_path: Path, first: bool
) -> None:
    model = Buffered()
    callbacks = [KLAnnealing(Linear(fraction=0.5), "buffer", probe=False), weight_averaging(decay=0.5)]
    trainer = quiet_trainer(tmp_path, callbacks=callbacks if first else callbacks[::-1], max_epochs=2)
    trainer.fit(model, loader(), loader(4))
    assert set(model.validated) == {1.0}


@pytest.mark.parametrize("how", ["a save in between", "an exception"])
def test_saves_of_weights_alone_hold_the_target_though_they_ask_no_callback(tmp_path: Path, how: str) -> None:
    if how == "an exception" and "save_on_exception" not in inspect.signature(ModelCheckpoint.__init__).parameters:
        pytest.skip("saves on an exception begin with Lightning 2.6")

    class Fails(Warmed):
        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            if how == "an exception" and batch_idx == 3:
                raise KeyError
            return super().training_step(batch, batch_idx)

    every = {"every_n_train_steps": 3} if how == "a save in between" else {"save_on_exception": True}
    save = ModelCheckpoint(tmp_path, "{step}", save_weights_only=True, save_top_k=-1, **every)  # type: ignore[arg-type]
    annealing = KLAnnealing(Linear(steps=6), "buffer", probe=False)
    trainer = quiet_trainer(tmp_path, callbacks=[annealing, save], max_epochs=1, enable_checkpointing=True)
    with pytest.raises(KeyError) if how == "an exception" else nullcontext():
        trainer.fit(Fails(), loader())
    files = list(tmp_path.glob("*.ckpt"))
    assert files
    assert {float(torch.load(file, weights_only=True)["state_dict"]["buffer"]) for file in files} == {1.0}


class SavesWeights(Callback):
    """Save weights alone in one hook, for which Lightning calls no hook of a callback."""

    def __init__(self, path: Path, hook: str) -> None:
        self.path = path
        self.around: list[tuple[float, float]] = []  # the number before and after each save
        setattr(self, hook, self.save)

    def save(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        before = float(pl_module.beta)
        trainer.save_checkpoint(self.path, weights_only=True)
        self.around.append((before, float(pl_module.beta)))


class BufferedModule(ForeignModule):
    def __init__(self) -> None:
        super().__init__()
        del self.beta
        self.register_buffer("beta", torch.tensor(1.0))


@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_before_optimizer_step", "on_train_batch_end"])
@pytest.mark.parametrize("kind", [RecordingVAE, BufferedModule])
@pytest.mark.parametrize("first", [True, False])
def test_saves_within_a_batch_hold_the_target_and_move_nothing(
    tmp_path: Path, hook: str, kind: type[Any], first: bool
) -> None:
    used, path = [], tmp_path / "weights.ckpt"
    for saves in ([SavesWeights(path, hook)], []):
        annealing = KLAnnealing(Linear(steps=12), probe=False)
        callbacks = [*saves, annealing] if first else [annealing, *saves]
        model = kind()
        trainer = quiet_trainer(tmp_path, callbacks=callbacks, max_epochs=2)
        trainer.fit(model, loader())
        assert "save_checkpoint" not in vars(trainer)
        assert all(before == after for each in saves for before, after in each.around)
        used.append(model.used)
    assert used[0] == used[1]
    loaded = torch.load(path, weights_only=True)
    values = loaded["lightning_vae"]["knob_values"] if kind is RecordingVAE else loaded["state_dict"]
    assert float(values["beta"]) == 1.0


def test_a_save_after_the_fit_holds_what_the_module_holds(tmp_path: Path) -> None:
    model = BufferedModule()
    trainer = quiet_trainer(tmp_path, callbacks=[KLAnnealing(Linear(steps=2), probe=False)], max_epochs=1)
    trainer.fit(model, loader())
    model.beta.fill_(7.0)  # type: ignore[operator, union-attr]
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert float(torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]["beta"]) == 7.0


def test_after_a_batch_that_is_skipped_the_module_holds_the_target(tmp_path: Path) -> None:
    class Skips(BufferedModule):
        at_end = None

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
            return -1 if batch_idx == 2 else None

        def on_train_epoch_end(self) -> None:
            self.at_end = self.at_end or float(self.beta)  # type: ignore[assignment]

    model = Skips()
    annealing = KLAnnealing(Linear(steps=4, stop=3.0), probe=False)
    quiet_trainer(tmp_path, callbacks=[annealing], max_epochs=3).fit(model, loader())
    assert model.at_end == 3.0


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("saves", [True, False])
def test_weight_averaging_copies_no_average_of_the_number_at_the_end(tmp_path: Path, first: bool, saves: bool) -> None:
    callbacks = [KLAnnealing(Linear(steps=6), probe=False), weight_averaging(decay=0.5)]
    callbacks = callbacks if first else callbacks[::-1]
    callbacks += [SavesWeights(tmp_path / "weights.ckpt", "on_train_end")] if saves else []
    trainer = quiet_trainer(tmp_path, callbacks=callbacks, max_epochs=1)
    trainer.fit(BufferedModule(), loader())
    trainer.save_checkpoint(tmp_path / "after.ckpt")  # of the average
    for path in tmp_path.glob("*.ckpt"):
        assert float(torch.load(path, weights_only=True)["state_dict"]["beta"]) == 1.0, path


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("trainable", [True, False])
def test_stochastic_weight_averaging_leaves_the_number(tmp_path: Path, first: bool, trainable: bool) -> None:
    model = BufferedModule()
    if trainable:
        del model.beta
        model.beta = nn.Parameter(torch.tensor(1.0), requires_grad=False)
    callbacks = [KLAnnealing(Linear(steps=12), probe=False), StochasticWeightAveraging(0.01, swa_epoch_start=1)]
    trainer = quiet_trainer(tmp_path, callbacks=callbacks if first else callbacks[::-1], max_epochs=4)
    trainer.fit(model, loader())
    steps = len(loader())
    assert model.used[: 3 * steps] == pytest.approx([min(step / 12, 1.0) for step in range(3 * steps)])
    assert float(model.beta) == 1.0


@pytest.mark.parametrize("knobs", [["beta"], "beta", None, 3])
def test_a_foreign_module_may_call_anything_its_knobs(tmp_path: Path, knobs: Any) -> None:
    model = ForeignModule()
    model.knobs = knobs
    quiet_trainer(tmp_path, callbacks=[KLAnnealing(Linear(steps=2))], max_epochs=1).fit(model, loader())
    assert model.used[:3] == [0.0, 0.5, 1.0]


def test_a_number_of_the_callbacks_own_needs_a_name() -> None:
    assert AttributeScheduler(Linear(steps=1), None, name="own").name == "own"
    for kind, arguments in ((AttributeWriter, ()), (AttributeScheduler, (Linear(steps=1),))):
        with pytest.raises(ValueError, match="`name` must be given where `attribute` is None"):
            kind(*arguments, None)  # type: ignore[abstract]


def test_a_controller_of_ones_own(tmp_path: Path) -> None:
    class HalvedEachStep(AttributeWriter):
        _moves = True  # type: ignore[assignment]

        def _prepare(self, trainer: Any, pl_module: Any, current: Any, restored: dict[str, Any]) -> None:
            self._target = restored.get("target", current)

        def _value(self, step: int) -> Any:
            return self._target

        def on_train_batch_end(self, *arguments: Any) -> None:
            self._target /= 2  # type: ignore[operator]
            super().on_train_batch_end(*arguments)

        def state_dict(self) -> dict[str, Any]:
            return {"target": self._target}

    def run(epochs: int, ckpt_path: Path | None = None) -> tuple[Any, ForeignModule]:
        trainer, model = quiet_trainer(tmp_path, callbacks=[HalvedEachStep("beta")], max_epochs=epochs), ForeignModule()
        trainer.fit(model, loader(4), loader(2), ckpt_path=ckpt_path)
        return trainer, model

    trainer, model = run(1)
    assert (model.used, model.validated[-1], model.beta) == ([1.0, 0.5], 0.25, 0.25)
    trainer.save_checkpoint(path := tmp_path / "a.ckpt")
    assert run(2, path)[1].used == [0.25, 0.125]


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_module_that_is_watched_can_be_copied_in_any_hook(tmp_path: Path, how: str) -> None:
    copies: dict[str, Any] = {}

    def copied(name: str, pl_module: Any) -> None:
        trainer, pl_module.trainer = pl_module.trainer, None
        if how == "deepcopy":
            copies[name] = copy.deepcopy(pl_module)
        else:  # as `torch.save(pl_module, ...)` does
            copies[name] = pickle.loads(pickle.dumps(pl_module))
        pl_module.trainer = trainer

    class Copies(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            copied("start", pl_module)

        def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:
            copied("backward", pl_module)

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            copied("end", pl_module)

        def on_validation_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            copied("validation", pl_module)

    model = Encoded()
    model.detector = CollapseDetector(posterior="encoder", chunk=-1)
    callbacks = [
        Copies(),
        EnforcedFreeBits(0.5, posterior="encoder", weight=1.0, chunk=-1),
        TargetRate(1.0, posterior="encoder", chunk=-1),
        model.detector,
    ]
    quiet_trainer(tmp_path, callbacks=callbacks, max_epochs=1, num_sanity_val_steps=0).fit(model, loader(), loader())
    assert set(copies) == {"start", "backward", "end", "validation"}
    for each in copies.values():
        assert b"lightning_vae" not in pickle.dumps(each.encoder), "loading a copy needs nothing of this package"
        assert each.encoder(torch.zeros(3, 2)).shape == (3, 4)


class Encoded(ForeignModule):
    detector: Any

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(2, 4)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        mean, log_variance = self.encoder(batch).chunk(2, dim=-1)
        kl = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).sum(1).mean()
        return (mean - batch).square().sum(1).mean() + kl  # type: ignore[no-any-return]

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.encoder(batch)
