import copy
import random
import re
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn
from torch.distributions import Independent, Normal
from torch.utils.data import TensorDataset
from torchmetrics import MeanMetric

from lightning_vae.callbacks import Callback
from lightning_vae.callbacks.probing.loss_probe import LossProbe
from tests.doubles import loader, quiet_trainer


class Stateful(pl.LightningModule):
    """Changes all that a training step may change besides gradients, and uses all kinds of random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layer = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
        self.beta = 1.0
        self.seen = MeanMetric()
        self.steps: list[int] = []
        self.counts = {"steps": 0}
        self.data = TensorDataset(torch.zeros(1))
        self.dict_output = False

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.scale = 2.0

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        batch += 1  # in place
        noise = torch.randn(()) + random.random() + float(np.random.rand())
        value = self.layer(batch).square().mean() * self.scale + noise
        self.seen.update(value)
        self.steps.append(batch_idx)
        self.counts["steps"] += 1
        self.log("train/value", value, on_epoch=True)
        self.log_dict({"train/seen": self.seen})
        assert isinstance(self.trainer, pl.Trainer)
        assert isinstance(self.trainer.strategy, SingleDeviceStrategy)  # scvi-tools looks at it in each step
        if self.logger is not None:
            self.logger.log_metrics({"mine": float(value.detach())})
            assert self.loggers
        loss = value * self.beta + self.trainer.global_step
        return {"loss": loss} if self.dict_output else loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


class Probes(Callback):
    """Evaluates the loss of every batch several times, and keeps what it was."""

    def __init__(self, values: Any = {}) -> None:  # noqa: B006
        self.values = values
        self.losses: list[list[float]] = []
        self.reasons: list[str] = []
        self.real: list[float] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        probe = LossProbe(trainer, pl_module, batch, batch_idx)
        try:
            self.losses.append([probe(self.values) for _ in range(2)])
        except LossProbe.NotPossible as reason:
            self.reasons.append(str(reason))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
        self.real.append(float(outputs["loss"]))


def fit(path: Path, model: Any, *callbacks: Any, data: Any = None, **options: Any) -> Any:
    pl.seed_everything(1)
    trainer = quiet_trainer(path, callbacks=list(callbacks), **{"max_epochs": 2, "log_every_n_steps": 1, **options})
    trainer.fit(model, data or loader())
    return trainer


@pytest.mark.parametrize("dict_output", [False, True])
def test_it_is_the_loss_that_the_batch_then_has(tmp_path: Path, dict_output: bool) -> None:
    probes, model = Probes(), Stateful()
    model.dict_output = dict_output
    fit(tmp_path, model, probes)
    assert [losses[0] for losses in probes.losses] == pytest.approx(probes.real, rel=1e-6)
    assert all(one == other for one, other in probes.losses)


def test_a_copy_is_prepared(tmp_path: Path) -> None:
    probes = Probes({("beta",): 0.0})
    model = Stateful()
    fit(tmp_path, model, probes)
    assert [losses[0] for losses in probes.losses] == list(range(12))
    assert model.beta == 1.0


def test_nothing_is_different_afterwards(tmp_path: Path) -> None:
    def run(*callbacks: Any) -> tuple[Any, ...]:
        pl.seed_everything(0)
        model = Stateful()
        logger = CSVLogger(tmp_path, name=f"with_{len(callbacks)}")
        trainer = fit(tmp_path, model, *callbacks, logger=logger)
        table = (Path(logger.log_dir) / "metrics.csv").read_text()
        state = {name: value.tolist() for name, value in model.state_dict().items()}
        return state, model.steps, model.counts, trainer.callback_metrics, table

    with_probes = run(Probes())
    assert with_probes == run()
    assert with_probes[2] == {"steps": 12}


class Manual(Stateful):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class Fetches(Stateful):
    def training_step(self, dataloader_iter: Any) -> Tensor:  # type: ignore[override]
        batch, *_ = next(dataloader_iter)
        return self.layer(batch).sum()  # type: ignore[no-any-return]


class Steps(Stateful):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.trainer.strategy.optimizer_step(self.optimizers(), lambda: None)  # type: ignore[arg-type]


class Fails(Stateful):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.beta == 0:
            self.trainer.callbacks.clear()  # type: ignore[attr-defined]
            raise RuntimeError("a weight of 0")
        return super().training_step(batch, batch_idx)


class Skips(Stateful):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return None


class Large(Stateful):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.empty(1).expand(2**27))


class Compiled(Stateful):
    def __init__(self) -> None:
        super().__init__()
        self.part: Any = torch.compile(nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Manual, "its training step passes no loss to `manual_backward`"),
        (Fetches, "its training step fetches batches"),
        (Steps, "it uses `optimizer_step` of the Trainer"),
        (Fails, "a copy raised RuntimeError('a weight of 0')"),
        (Skips, "it returned NoneType"),
        (Large, "a copy of it would be large"),
        (Compiled, "a copy would have to be compiled"),
    ],
)
def test_what_can_not_be_probed_is_left_alone(tmp_path: Path, model: Any, reason: str) -> None:
    trainer, kept = quiet_trainer(tmp_path), model()
    callback = Callback()
    trainer.callbacks.append(callback)  # type: ignore[attr-defined]
    trainer.strategy._lightning_module = kept
    kept.trainer = trainer
    before = {name: value.clone() for name, value in kept.state_dict().items() if name != "table"}
    probe = LossProbe(trainer, kept, torch.ones(3, 2), 0)
    with pytest.raises(LossProbe.NotPossible, match=re.escape(reason)):
        probe({("beta",): 0.0})
    assert callback in trainer.callbacks  # type: ignore[attr-defined]
    assert kept.beta == 1.0
    assert all(torch.equal(value, before[name]) for name, value in kept.state_dict().items() if name != "table")


def test_a_step_that_reads_and_changes_its_optimizer_gets_a_copy_of_it(tmp_path: Path) -> None:
    class Schedules(Stateful):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            optimizer, scheduler = self.optimizers(), self.lr_schedulers()
            optimizer.param_groups[0]["lr"] *= 0.5  # type: ignore[union-attr]
            if isinstance(optimizer, torch.optim.Optimizer) and batch_idx == 0:
                optimizer.step()
            assert optimizer.param_groups[0]["params"][0] is next(self.parameters())  # type: ignore[union-attr]
            assert scheduler.optimizer.param_groups is optimizer.param_groups  # type: ignore[union-attr]
            rate = optimizer.param_groups[0]["lr"]  # type: ignore[union-attr]
            return self.layer[0](batch).square().mean() * rate

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.Adam(self.parameters(), 0.25)
            return [optimizer], [torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)]

    probes, model, other = Probes(), Schedules(), Schedules()
    other.load_state_dict(model.state_dict())
    fit(tmp_path, model, probes, max_epochs=1)
    fit(tmp_path, other, max_epochs=1)
    assert not probes.reasons
    assert [losses[0] for losses in probes.losses] == pytest.approx(probes.real, rel=1e-6)
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), other.parameters(), strict=True))


def test_a_module_that_keeps_the_graph_of_its_last_step_is_copied(tmp_path: Path) -> None:
    class Keeps(Stateful):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            value = self.layer(batch).square().mean()
            self.latest, self.posterior = {"all": [value]}, Independent(Normal(value.expand(2), 1.0), 1)
            self.output, self.total = Output(value), value + getattr(self, "total", torch.zeros(())).detach()
            return value + self.total

    @dataclass
    class Output:
        loss: Tensor

    probes = Probes()
    fit(tmp_path, Keeps(), probes, max_epochs=1)
    assert not probes.reasons
    assert [losses[0] for losses in probes.losses] == pytest.approx(probes.real, rel=1e-6)


def test_a_dry_run_copies_a_large_module_too(tmp_path: Path) -> None:
    class Table(Stateful):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.zeros(2**26 + 1), persistent=False)

    for options, tried in (({"limit_train_batches": 1, "max_epochs": 1}, 0), ({"fast_dev_run": True}, 1)):
        probes = Probes()
        quiet_trainer(tmp_path, callbacks=[probes], **options).fit(Table(), loader())
        assert (len(probes.losses), len(probes.reasons)) == (tried, 1 - tried)


def test_several_processes_are_not_probed() -> None:
    with pytest.raises(LossProbe.NotPossible, match="processes"):
        LossProbe(SimpleNamespace(world_size=2), Stateful(), torch.zeros(2, 2), 0)({})  # type: ignore[arg-type]


class Config:
    """A class that serves as a config: a copy shares it."""

    beta = 1.0


class SharesConfig(Stateful):
    def __init__(self) -> None:
        super().__init__()
        self.cfg = Config

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.layer(batch).sum() * self.cfg.beta


class Closure(Stateful):
    def __init__(self) -> None:
        super().__init__()
        self.norm: Any = lambda x: self.layer[1](x)


class Attached(Stateful):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.other.layer(batch).sum()

    @property
    def other(self) -> Any:
        return KEPT[-1]


class Hooked(Stateful):
    def __init__(self) -> None:
        super().__init__()
        self.layer.register_forward_hook(lambda *_: None)


class Uncopied(Stateful):
    class Part(nn.Module):
        def __deepcopy__(self, _memo: Any) -> Any:
            return self

    def __init__(self) -> None:
        super().__init__()
        self.part = self.Part()


KEPT: list[Any] = []


@pytest.mark.parametrize(
    ("model", "paths", "reason"),
    [
        (SharesConfig, ("cfg.beta",), "copies share the number with the module"),
        (Closure, ("beta",), "it keeps a function that acts on the original module"),
        (Attached, ("beta",), "a copy acts on the module itself"),
        (Hooked, ("beta",), "it has hooks"),
        (Uncopied, ("beta",), "a submodule can't be copied"),
    ],
)
def test_a_copy_that_acts_on_the_module_itself_is_stopped(
    tmp_path: Path, model: Any, paths: tuple[str, ...], reason: str
) -> None:
    trainer, kept = quiet_trainer(tmp_path), model()
    KEPT.append(kept)
    trainer.strategy._lightning_module = kept
    kept.trainer = trainer
    before = copy.deepcopy(kept.state_dict())
    with pytest.raises(LossProbe.NotPossible, match=reason):
        LossProbe(trainer, kept, torch.ones(3, 2), 0)({paths: 0.5})
    assert Config.beta == 1.0
    assert all(torch.equal(value, before[name]) for name, value in kept.state_dict().items())
    kept.layer(torch.ones(3, 2))  # and it works again


def test_the_trainer_shows_a_copy_itself(tmp_path: Path) -> None:
    class Asks(Stateful):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            assert self.trainer.lightning_module is self
            assert self.trainer.strategy.lightning_module is self
            return self.layer(batch).sum()

    probes = Probes()
    fit(tmp_path, Asks(), probes, max_epochs=1)
    assert not probes.reasons


class OtherName(Stateful):
    def training_step(self, batch: Any, _: int) -> Any:
        return self.layer(batch).sum()


class NoIndex(Stateful):
    def training_step(self, batch: Any) -> Any:  # type: ignore[override]
        return self.layer(batch).sum()


class Anything(Stateful):
    def training_step(self, *arguments: Any, **others: Any) -> Any:
        assert len(arguments) + len(others) == 2
        return self.layer(arguments[0]).sum()


@pytest.mark.parametrize("model", [OtherName, NoIndex])
def test_a_step_is_called_as_lightning_calls_it(tmp_path: Path, model: Any) -> None:
    probes = Probes()
    fit(tmp_path, model(), probes, max_epochs=1)
    assert not probes.reasons
    assert [losses[0] for losses in probes.losses] == pytest.approx(probes.real, rel=1e-6)
