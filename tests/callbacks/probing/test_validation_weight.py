import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric

from lightning_vae.callbacks import Callback, KLAnnealing, Linear
from lightning_vae.callbacks.probing.loss_probe import LossProbe
from lightning_vae.callbacks.probing.validation_weight import StaleWeight, stale_weight
from tests.doubles import quiet_trainer

ROWS, STEPS = 8, 4


class Copying(pl.LightningModule):
    """Leaves a copy of its weight in each training step, which validation may read."""

    def __init__(self, reads: str = "beta") -> None:
        super().__init__()
        self.reads = reads
        self.beta = 2.0
        self.layer = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(0.5))
        self.kwargs = {"kl_weight": 2.0, "n_obs": 40}
        self.sub = nn.Module()
        self.sub.cfg = SimpleNamespace(beta=2.0)  # type: ignore[assignment]
        self.register_buffer("buffer", torch.tensor(2.0))
        self._private = 2.0
        self.kept = [2.0]
        self.mean = MeanMetric()

    def weight(self) -> float:
        return {
            "kwargs": self.kwargs["kl_weight"],
            "object": self.sub.cfg.beta,  # type: ignore[union-attr]
            "buffer": self.buffer,
            "private": self._private,
            "list": self.kept[-1],
            "nothing": 0.0,
            "half": 0.5 * (self.beta + self._private),
        }.get(self.reads, self.beta)  # type: ignore[return-value]

    def loss(self, batch: Tensor, weight: float) -> Tensor:
        latent = self.layer(batch) + torch.randn(())
        return latent.square().mean() + weight * latent.abs().mean()  # type: ignore[no-any-return]

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        if self.reads in ("kwargs", "returned", "metric", "refreshed"):
            self.kwargs["kl_weight"] = self.beta
        elif self.reads == "object":
            self.sub.cfg.beta = self.beta  # type: ignore[union-attr]
        elif self.reads == "buffer":
            self.buffer.fill_(self.beta)  # type: ignore[operator, union-attr]
        elif self.reads in ("private", "half") and self.training:
            self._private = self.beta
        elif self.reads == "list":
            self.kept.append(self.beta)
        return self.loss(batch, self.beta)

    def on_validation_epoch_start(self) -> None:
        if self.reads == "refreshed":
            self.kwargs["kl_weight"] = self.beta

    def validation_step(self, batch: Tensor, batch_idx: int) -> Any:
        assert not self.training
        read = self.reads in ("returned", "metric", "refreshed")
        loss = self.loss(batch, self.kwargs["kl_weight"] if read else self.weight())
        if self.reads == "returned":
            return loss
        self.log_dict({"val_weight": self.beta, "val_noise": torch.rand(())})
        if self.reads == "metric":
            self.mean.update(loss)
        self.log("val_loss", self.mean if self.reads == "metric" else loss)
        return None

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters())


class Measures(Callback):
    def __init__(self) -> None:
        self.found: list[Any] = []

    def on_validation_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if batch_idx == 0:
            self.found.append(stale_weight(LossProbe(trainer, pl_module, batch, 0), ("beta",), 0.5, 2.0))


def data() -> DataLoader[Tensor]:
    return DataLoader(torch.randn(ROWS * STEPS, 3), ROWS)  # type: ignore[arg-type]


def fit(path: Path, model: Any, *callbacks: Any, **options: Any) -> Any:
    pl.seed_everything(1)
    trainer = quiet_trainer(path, callbacks=list(callbacks), **{"max_epochs": 2, **options})
    trainer.fit(model, data(), data())
    return trainer


def measured(path: Path, model: Any, **options: Any) -> StaleWeight | None:
    measures = Measures()
    fit(path, model, measures, **options)
    found: StaleWeight | None = measures.found[-1]
    return found


@pytest.mark.parametrize(
    ("reads", "name", "places", "weight"),
    [
        ("kwargs", "val_loss", ("kwargs.kl_weight",), 0.5),
        ("object", "val_loss", ("sub.cfg.beta",), 0.5),
        ("buffer", "val_loss", ("buffer",), 0.5),
        ("private", "val_loss", ("_private",), 0.5),
        ("list", "val_loss", (), 0.5),
        ("half", "val_loss", ("_private",), 1.25),
        ("metric", "val_loss", ("kwargs.kl_weight",), 0.5),
        ("returned", "loss", ("kwargs.kl_weight",), 0.5),
    ],
)
def test_the_weight_that_validation_uses(
    tmp_path: Path, reads: str, name: str, places: tuple[str, ...], weight: float
) -> None:
    model = Copying(reads)
    stale = measured(tmp_path, model)
    assert stale is not None
    assert (stale.name, stale.places) == (name, places)
    assert stale.weight == pytest.approx(weight, rel=1e-4)
    assert stale.meant > stale.value > 0


@pytest.mark.parametrize("reads", ["beta", "nothing", "refreshed"])
def test_a_validation_that_reads_the_weight_itself_or_none_is_right(tmp_path: Path, reads: str) -> None:
    assert measured(tmp_path, Copying(reads)) is None


def test_numbers_that_change_between_evaluations_are_not_the_weights(tmp_path: Path) -> None:
    generator = torch.Generator()  # whose state a trial does not put back

    class Noisy(Copying):
        def validation_step(self, batch: Tensor, batch_idx: int) -> None:
            self.log("val_loss", torch.rand((), generator=generator))

    assert measured(tmp_path, Noisy()) is None


@pytest.mark.parametrize(("reads", "is_stale"), [("kwargs", True), ("beta", False)])
def test_in_mixed_precision(tmp_path: Path, reads: str, is_stale: bool) -> None:
    assert (measured(tmp_path, Copying(reads), precision="bf16-mixed") is not None) == is_stale


def test_a_training_step_that_needs_gradients_is_measured(tmp_path: Path) -> None:
    class Penalised(Copying):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            (gradient,) = torch.autograd.grad(loss, self.layer[0].weight, create_graph=True)
            return loss + gradient.square().sum()

    stale = measured(tmp_path, Penalised("kwargs"))
    assert stale is not None
    assert stale.weight == pytest.approx(0.5, rel=1e-4)


class Indexed(Copying):
    def validation_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int) -> None:  # type: ignore[override]
        super().validation_step(batch, batch_idx)


class Defaulted(Copying):
    def validation_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> None:
        super().validation_step(batch, batch_idx)


@pytest.mark.parametrize("kind", [Indexed, Defaulted])
def test_several_validation_loaders(tmp_path: Path, kind: type[Copying]) -> None:
    measures = Measures()
    trainer = quiet_trainer(tmp_path, callbacks=[measures], max_epochs=1)
    trainer.fit(kind("kwargs"), data(), [data(), data()])
    assert [each.weight for each in measures.found] == [
        pytest.approx(0.5, rel=1e-4)
    ] * 4  # 2 of them in the sanity pass


def test_nothing_is_different_afterwards(tmp_path: Path) -> None:
    def run(*callbacks: Any) -> tuple[Any, ...]:
        pl.seed_everything(0)
        model = Copying("kwargs")
        logger = CSVLogger(tmp_path, name=f"with_{len(callbacks)}")
        trainer = fit(tmp_path, model, *callbacks, logger=logger, log_every_n_steps=1)
        table = (Path(logger.log_dir) / "metrics.csv").read_text()
        state = {name: value.tolist() for name, value in model.state_dict().items()}
        modes = [module.training for module in model.modules()]
        return state, model.kwargs, model.kept, modes, trainer.callback_metrics, table

    assert run(Measures()) == run()


class Silent(Copying):
    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.loss(batch, self.beta)


class Hooked(Copying):
    def __init__(self) -> None:
        super().__init__("kwargs")
        next(self.children()).register_forward_hook(lambda *_: None)


class NeedsItsOwnBatch(Copying):
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        if not self.trainer.training:
            raise KeyError("x")
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Silent, "its validation step neither logs nor returns a number"),
        (NeedsItsOwnBatch, "a step of a copy raised KeyError"),
        (Hooked, "it has hooks"),
    ],
)
def test_what_can_not_be_measured(tmp_path: Path, model: Any, reason: str) -> None:
    with pytest.raises(LossProbe.NotPossible, match=reason):
        measured(tmp_path, model())


# ---- in KLAnnealing


def said(path: Path, caplog: Any, recwarn: Any, model: Any, **options: Any) -> list[str]:
    annealing = KLAnnealing(**{"schedule": Linear(fraction=0.75), **options})
    with caplog.at_level(logging.INFO):
        fit(path, model, annealing)
    texts = [*(str(each.message) for each in recwarn), *(each.getMessage() for each in caplog.records)]
    return [text for text in texts if "validation" in text and "KLAnnealing" in text]


def test_a_stale_validation_is_told_once_with_numbers_and_a_remedy(tmp_path: Path, caplog: Any, recwarn: Any) -> None:
    (text,) = said(tmp_path, caplog, recwarn, Copying("kwargs"))
    # The last step of the first epoch is step 3 of a ramp of 6.
    assert "KLAnnealing(beta): validation should use the target, 2, but `val_loss` uses 1:" in text
    assert "whose weight was 1, leaves a copy" in text
    assert text.endswith("Write the copy too: `attribute=['beta', 'kwargs.kl_weight']`.")


@pytest.mark.parametrize(
    "options", [{"probe": False}, {"setter": lambda module, value: setattr(module, "beta", value)}]
)
def test_nothing_is_tried_where_nothing_may_be(
    tmp_path: Path, caplog: Any, recwarn: Any, options: dict[str, Any]
) -> None:
    annealing = KLAnnealing(Linear(stop=2.0, fraction=0.75), **options)
    with caplog.at_level(logging.INFO):
        fit(tmp_path, Copying("kwargs"), annealing)
    assert not [each for each in recwarn if "validation" in str(each.message)]
    assert "validation" not in caplog.text


def test_the_remedy_cures(tmp_path: Path, caplog: Any, recwarn: Any) -> None:
    assert said(tmp_path, caplog, recwarn, Copying("kwargs"), attribute=["beta", "kwargs.kl_weight"]) == []


@pytest.mark.parametrize(("model", "texts"), [(Silent, 1), (Hooked, 0)])
def test_what_can_not_be_tried_is_told_once(tmp_path: Path, caplog: Any, recwarn: Any, model: Any, texts: int) -> None:
    told = said(tmp_path, caplog, recwarn, model())
    assert len(told) == texts, "a reason that the first batch gave already is not repeated"
    assert all("can't be measured (its validation step neither logs" in text for text in told)


def test_a_validation_after_the_schedule_has_ended_is_not_tried(tmp_path: Path, caplog: Any, recwarn: Any) -> None:
    assert said(tmp_path, caplog, recwarn, Copying("kwargs"), schedule=Linear(steps=2)) == []
