"""A run that stopped at any moment at which it is saved, and went on, is the run that never stopped."""

import re
import shutil
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, LearningRateFinder, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.optim.lr_scheduler import OneCycleLR, ReduceLROnPlateau
from torch.utils.data import DataLoader, TensorDataset

from lightning_vae import VAE, LastCheckpoint, MLPDecoder, MLPEncoder
from lightning_vae.callbacks import (
    CollapseDetector,
    Cosine,
    Cyclical,
    FreeBits,
    Join,
    KLAnnealing,
    Linear,
    Schedule,
    Sigmoid,
    Staged,
    TargetRate,
)
from lightning_vae.datamodules import Digits
from tests.doubles import quiet_trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:The dirpath has changed from"),
    pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:FreeBits"),  # what is trained for six steps is no model
    pytest.mark.filterwarnings("ignore:CollapseDetector"),
]


class Scheduled(VAE):
    """A small VAE, under a learning rate schedule that knows the length of the run or looks at the validation."""

    def __init__(self, rate: str) -> None:
        narrow = {"encoder": partial(MLPEncoder, hidden=(8,)), "decoder": partial(MLPDecoder, hidden=(8,))}
        super().__init__(Digits.shape, Digits.levels, latent_dim=4, **narrow)
        self.rate = rate

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=1e-3)
        if self.rate == "constant":
            return optimizer
        if self.rate == "plateau":  # a threshold that no epoch meets: the rate falls each time
            scheduler = {"scheduler": ReduceLROnPlateau(optimizer, patience=0, threshold=10.0), "monitor": "val/loss"}
            return {"optimizer": optimizer, "lr_scheduler": scheduler}
        total = int(self.trainer.estimated_stepping_batches)
        return [optimizer], [{"scheduler": OneCycleLR(optimizer, 0.01, total_steps=total), "interval": "step"}]


class AtValidationEnd(ModelCheckpoint):
    """Saves when a validation ends, under a name of its own."""

    @property
    def state_key(self) -> str:
        return "AtValidationEnd"


def saving(folder: Path) -> list[Callback]:
    """Save after every training batch, validation and epoch."""
    common = {"filename": "{step}", "save_top_k": -1}
    return [
        ModelCheckpoint(folder / "batch", every_n_train_steps=1, **common),
        ModelCheckpoint(folder / "epoch", every_n_epochs=1, save_on_train_epoch_end=True, **common),
        AtValidationEnd(folder / "validation", monitor="val/loss", save_on_train_epoch_end=False, **common),
    ]


def run(folder: Path, callbacks: list[Callback], more: list[Callback], ckpt: Path | None, **options: Any) -> Any:
    """Fit, writing to TensorBoard; return all that training has made."""
    torch.manual_seed(0 if ckpt is None else 1)  # nothing may depend on what the new process has drawn before
    rate = options.pop("rate", "one cycle")
    saved = torch.load(ckpt, weights_only=True)["lightning_vae"] if ckpt else {}
    purge = saved["unfinished"]["step"] if ckpt else None
    logger = TensorBoardLogger(folder, name="", version="run", default_hp_metric=False, purge_step=purge)
    options = {
        "max_epochs": 2,
        "log_every_n_steps": 2,
        "num_sanity_val_steps": 0,
        "enable_checkpointing": True,
        **options,
    }
    trainer = quiet_trainer(folder, logger=logger, callbacks=[*callbacks, *more], **options)
    vae = Scheduled(rate)
    # 3 batches an epoch; the seed of the data's order is the module's own
    trainer.fit(vae, datamodule=Digits(batch_size=450), ckpt_path=ckpt, weights_only=True if ckpt else None)
    return {
        "parameters": vae.state_dict(),
        "optimizer": trainer.optimizers[0].state_dict(),
        "learning rate": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
        "knobs": (float(vae.beta), float(vae.free_bits)),
        "callbacks": {each.state_key: each.state_dict() for each in callbacks},
        "steps": (trainer.global_step, trainer.current_epoch, trainer.fit_loop.epoch_loop._batches_that_stepped),
    }


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder / "run"))
    events.Reload()
    return {tag: [(each.step, each.value) for each in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def assert_identical(found: Any, expected: Any, where: str = "") -> None:
    """Compare nested values bit by bit."""
    if isinstance(expected, torch.Tensor):
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True, msg=lambda text: f"{where}: {text}")
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key in expected:
            assert_identical(found[key], expected[key], f"{where}/{key}")
    elif isinstance(expected, list | tuple) and not all(isinstance(each, float | int) for each in expected):
        assert len(found) == len(expected), where
        for number, pair in enumerate(zip(found, expected, strict=True)):
            assert_identical(*pair, f"{where}/{number}")
    else:
        assert found == expected, where


def annealed() -> list[Callback]:
    return [
        KLAnnealing(Linear(fraction=0.5)),
        FreeBits(Linear(stop=0.2, steps=4)),
        CollapseDetector(warmup=0, patience=1),
    ]


def steered() -> list[Callback]:
    return [TargetRate(1.0), EMAWeightAveraging(decay=0.9)]


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("make", "options"),
    [
        (annealed, {}),
        (annealed, {"rate": "plateau"}),
        (annealed, {"accumulate_grad_batches": 2}),
        (annealed, {"val_check_interval": 2}),
        (annealed, {"check_val_every_n_epoch": 2}),
        (annealed, {"limit_val_batches": 0}),
        (annealed, {"max_epochs": -1, "max_steps": 8}),
        (annealed, {"max_epochs": -1, "max_steps": 9, "rate": "plateau"}),
        (annealed, {"max_epochs": -1, "max_steps": 8, "val_check_interval": 2}),
        (annealed, {"max_epochs": -1, "max_steps": 9, "limit_val_batches": 0}),
        (steered, {"gradient_clip_val": 1.0}),
    ],
    ids=["plain", "plateau", "accumulation", "validation amid epochs", "each second epoch", "no validation", "steps",
         "steps, plateau", "steps, validation amid epochs", "steps, no validation", "steered"],
)  # fmt: skip
def test_resumed_from_any_save_a_run_ends_bit_by_bit_as_the_uninterrupted_one(
    make: Any, options: dict[str, Any], tmp_path: Path
) -> None:
    monitor: list[Callback] = (
        [] if "accumulate_grad_batches" in options else [LearningRateMonitor()]
    )  # which writes steps twice there
    whole = tmp_path / "whole"
    ends = 2 if "limit_val_batches" in options else 3
    expected = run(whole, make(), [*monitor, *saving(whole)[:ends]], None, **options)
    expected_curves = curves(whole)
    checkpoints = [path for path in whole.glob("*/*.ckpt") if path.stem != f"step={expected['steps'][0]}"]
    assert len(checkpoints) >= 3
    for path in checkpoints:
        folder = tmp_path / f"from {path.parent.name} {path.stem}"
        shutil.copytree(whole / "run", folder / "run")  # what the run wrote before it was killed, long after the save
        for events in (folder / "run").glob("events*"):  # TensorBoard reads files by name: time, host, process, number
            events.rename(events.with_name("events.out.tfevents.0"))
        found = run(folder, make(), [*monitor, *saving(folder)[:ends]], path, **options)
        assert_identical(found, expected, folder.name)
        assert curves(folder) == expected_curves, folder.name


class Ends(Callback):
    """Ends the run after a step, as a limit on its time does, and saves when it has ended."""

    def __init__(self, step: int | None, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        trainer.should_stop = trainer.global_step == self.step

    def on_train_end(self, trainer: Trainer, *_: Any) -> None:
        trainer.save_checkpoint(self.path / "afterwards.ckpt")


class Means(ModelCheckpoint):
    """Notes each epoch's mean of the loss; a ModelCheckpoint, because these are asked after the module."""

    def __init__(self) -> None:
        super().__init__(save_top_k=0)
        self.seen: dict[int, float] = {}

    def on_train_epoch_end(self, trainer: Trainer, *_: Any) -> None:
        self.seen[trainer.global_step] = float(trainer.callback_metrics["train/loss"])


@pytest.mark.sampled(5)
@pytest.mark.parametrize("ended", [{"max_steps": 8}, {"max_steps": 9}, {"max_epochs": 3}, 7, 8, 9], ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"val_check_interval": 2}, {"check_val_every_n_epoch": 2}, {"limit_val_batches": 0}],
    ids=["plain", "validation amid epochs", "each second epoch", "no validation"],
)
def test_a_run_that_has_ended_anywhere_goes_on_as_the_longer_one(ended: Any, options: Any, tmp_path: Path) -> None:
    def schedules() -> list[Callback]:
        return [KLAnnealing(Linear(steps=8)), FreeBits(0.1)]

    longer = {"max_epochs": -1, "max_steps": 12} if "max_steps" in str(ended) else {"max_epochs": 4}
    shorter = longer if isinstance(ended, int) else longer | ended
    options = options | {"rate": "constant"}
    expected = run(tmp_path / "whole", schedules(), [means := Means()], None, **longer, **options)
    ends = Ends(ended if isinstance(ended, int) else None, tmp_path)
    saves = [
        LastCheckpoint(tmp_path, every_n_epochs=100),
        *saving(tmp_path)[: 2 if "limit_val_batches" in options else 3],
    ]
    begun = run(tmp_path, schedules(), [*saves, ends], None, **shorter, **options)
    paths = [tmp_path / "last.ckpt", tmp_path / "afterwards.ckpt", *tmp_path.glob(f"*/step={begun['steps'][0]}.ckpt")]
    assert len(paths) >= 4
    for path in paths:
        assert torch.load(path, weights_only=True)["global_step"] == begun["steps"][0] < expected["steps"][0]
        saves = [LastCheckpoint(tmp_path / "on"), *saving(tmp_path / "on")[: len(saves) - 1]]
        found = run(tmp_path / path.stem, schedules(), [*saves, seen := Means()], path, **longer, **options)
        for part in ("parameters", "optimizer", "knobs", "steps"):
            assert_identical(found[part], expected[part], f"{path.relative_to(tmp_path)} {part}")
        assert seen.seen.items() <= means.seen.items(), path


@pytest.mark.parametrize(
    "schedule",
    [Sigmoid(steps=5), Cosine(epochs=1.5), Cyclical(period_steps=4), Staged([0.0, 0.5, 1.0], at_steps=[2, 4]),
     Join([Linear(stop=1.0, steps=2), Linear(start=1.0, stop=0.5, steps=3)])],
    ids=lambda schedule: type(schedule).__name__,
)  # fmt: skip
def test_every_schedule_goes_on_where_it_was(schedule: Schedule, tmp_path: Path) -> None:
    whole = run(tmp_path, [KLAnnealing(schedule)], saving(tmp_path), None)
    for step in (1, 4):
        folder, path = tmp_path / f"from {step}", tmp_path / "batch" / f"step={step}.ckpt"
        found = run(folder, [KLAnnealing(schedule)], saving(folder), path)
        assert_identical(found, whole, f"step {step}")


# ---- what is said of a run that goes on otherwise


class Adams(VAE):
    lr = 1e-3

    def __init__(self, beta: float = 1.0) -> None:
        super().__init__(Digits.shape, Digits.levels, latent_dim=4, beta=beta)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=self.lr)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    trainer = quiet_trainer(tmp_path, max_epochs=1, limit_train_batches=2, limit_val_batches=0)
    trainer.fit(Adams(), datamodule=Digits())
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    return tmp_path / "saved.ckpt"


def go_on(path: Path, vae: VAE, data: Any = None, **options: Any) -> None:
    options = {"max_epochs": 2, "limit_train_batches": 2, "limit_val_batches": 0, **options}
    quiet_trainer(path.parent, **options).fit(vae, data or Digits(), ckpt_path=path, weights_only=True)


def test_another_knob_is_said(saved: Path) -> None:
    with pytest.warns(UserWarning, match=r"was saved with `beta=1`; the run continues with `beta=4`"):
        go_on(saved, Adams(beta=4.0))


def test_an_option_of_the_optimizer_that_the_checkpoint_overrides_is_said(saved: Path) -> None:
    vae = Adams()
    vae.lr = 0.5
    with pytest.warns(UserWarning, match=r"Adam keeps the options in the checkpoint, .*: lr 0.001 -> 0.5"):
        go_on(saved, vae)
    assert vae.trainer.optimizers[0].param_groups[0]["lr"] == 1e-3


def test_another_optimizer_is_refused(saved: Path) -> None:
    class Descends(Adams):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=self.lr)

    with pytest.raises(ValueError, match=r"saved with the optimizer Adam, so a run with SGD can't be resumed from it"):
        go_on(saved, Descends())


def test_what_something_else_has_moved_was_not_changed(tmp_path: Path) -> None:
    class WarmsUp(Callback):
        def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
            trainer.optimizers[0].param_groups[0]["lr"] = 1e-4

    callbacks: list[Callback] = [WarmsUp()]
    trainer = quiet_trainer(tmp_path, max_epochs=1, limit_train_batches=2, limit_val_batches=0, callbacks=callbacks)
    trainer.fit(Adams(), datamodule=Digits())
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    go_on(tmp_path / "saved.ckpt", Adams(), callbacks=callbacks)  # a warning would be an error here


def test_a_tuner_that_restores_the_start_has_changed_nothing(tmp_path: Path) -> None:
    finder = LearningRateFinder(max_lr=0.01, num_training_steps=30, early_stop_threshold=None)
    options = {"max_epochs": 3, "limit_val_batches": 0, "enable_checkpointing": True}
    vae = Adams()
    vae.save_hyperparameters({"lr": vae.lr})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        quiet_trainer(tmp_path, callbacks=[finder], **options).fit(vae, datamodule=Digits())
    assert vae.lr != 1e-3
    assert not [each for each in caught if re.search("options of the model|The run lacks", str(each.message))]


def test_options_of_any_kind_are_compared(tmp_path: Path) -> None:
    class Weighted(Adams):
        def __init__(self, weights: torch.Tensor) -> None:
            super().__init__()
            self.save_hyperparameters("weights")

    trainer = quiet_trainer(tmp_path, max_epochs=1, limit_train_batches=2, limit_val_batches=0)
    trainer.fit(Weighted(torch.ones(3)), datamodule=Digits())
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    go_on(tmp_path / "saved.ckpt", Weighted(torch.ones(3)))
    with pytest.warns(UserWarning, match=r"weights tensor\(\[1., 1., 1.\]\) -> tensor\(\[2., 2., 2.\]\)"):
        go_on(tmp_path / "saved.ckpt", Weighted(2 * torch.ones(3)))


def test_a_callback_that_the_checkpoint_holds_nothing_of_is_said(saved: Path) -> None:
    with pytest.warns(UserWarning, match=r"KLAnnealing\(beta\): the checkpoint holds no state of this callback"):
        go_on(saved, Adams(), callbacks=[KLAnnealing(Linear(steps=4))])


def test_nothing_is_said_of_a_callback_that_would_do_the_same(saved: Path) -> None:
    go_on(saved, Adams(), callbacks=[FreeBits(0.1)])  # a warning would be an error here


def test_another_length_of_the_run_is_said(saved: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        go_on(saved, Adams())
    assert "not as long as when it was saved: max_epochs 1 -> 2" in caplog.text


def test_another_number_of_batches_in_an_epoch_is_said(saved: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Of any loader, such as one whose batch size has changed."""
    with caplog.at_level("INFO"):
        go_on(saved, Adams())
        assert "An epoch has" not in caplog.text
        go_on(saved, Adams(), limit_train_batches=3)
    assert "An epoch has 3 batches; when the run was saved it had 2." in caplog.text


@pytest.mark.parametrize(("interval", "says"), [(3, True), (2, False)])
def test_accumulated_gradients_that_are_not_saved_are_said(interval: int, says: bool, tmp_path: Path) -> None:
    options = {"accumulate_grad_batches": 2, "val_check_interval": interval, "limit_train_batches": 4, "logger": False}
    saves = AtValidationEnd(tmp_path, filename="{step}", save_top_k=-1, save_on_train_epoch_end=False)
    trainer = quiet_trainer(tmp_path, max_epochs=1, callbacks=[saves], enable_checkpointing=True, **options)
    trainer.fit(Adams(), datamodule=Digits())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        go_on(min(tmp_path.glob("*.ckpt")), Adams(), limit_val_batches=1, **options)
    assert any("does not hold the gradients so far" in str(each.message) for each in caught) is says


@pytest.mark.parametrize(("shuffle", "batches", "says"), [(True, 2, True), (False, 2, False), (False, 3, True)])
def test_a_loader_that_keeps_no_place_is_named_unless_nothing_is_lost(
    shuffle: bool, batches: int, says: bool, tmp_path: Path
) -> None:
    data = TensorDataset(torch.randint(0, 17, (8, 1, 8, 8), dtype=torch.uint8))
    loader = DataLoader(data, batch_size=4, shuffle=shuffle)  # 2 batches
    options = {"max_epochs": 3, "enable_checkpointing": True, "logger": False}
    saves = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=batches, save_top_k=-1)
    quiet_trainer(tmp_path, callbacks=[saves], **options).fit(Adams(), loader)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        go_on(tmp_path / f"step={batches}.ckpt", Adams(), loader, max_epochs=3, limit_train_batches=None)
    assert any("come from a DataLoader, which keeps" in str(each.message) for each in caught) is says
