"""A loss that is no number ends the run, says where it began, and is never saved."""

import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_vae import VAE
from lightning_vae.checkpoints.exact_resume import ExactResume
from lightning_vae.checkpoints.guards import Guards
from lightning_vae.datamodules import TensorLoader
from lightning_vae.main import main
from tests.doubles import RecordingVAE, quiet_trainer


class Failing(RecordingVAE):
    """One of its terms turns infinite at a batch."""

    def __init__(self, term: str, batch: int) -> None:
        super().__init__(beta=1.0)
        self.term, self.batch = term, batch

    def elbo_terms(self, x: Tensor, index: Tensor | None = None) -> Any:
        terms = super().elbo_terms(x, index)
        if self.training and len(self.used) - 1 == self.batch:
            return terms._replace(**{self.term: getattr(terms, self.term) * math.inf})
        return terms


def fit(folder: Path, vae: RecordingVAE, **options: Any) -> None:
    options = {"max_epochs": 2, "log_every_n_steps": 5, "enable_checkpointing": True, **options}
    loader = TensorLoader({"x": torch.randn(200, 2, generator=torch.Generator().manual_seed(0))}, batch_size=2)
    quiet_trainer(folder, **options).fit(vae, loader)


@pytest.mark.parametrize("batch", [0, 7, 150])
@pytest.mark.parametrize(("term", "name"), [("distortion", "distortion"), ("rate_per_dimension", "rate")])
def test_the_term_and_the_step_are_named_at_the_next_logging_step(
    term: str, name: str, batch: int, tmp_path: Path
) -> None:
    vae = Failing(term, batch)
    with pytest.raises(FloatingPointError, match=rf"`train/{name}` is not a finite number since step {batch}, so"):
        fit(tmp_path, vae, callbacks=[ModelCheckpoint(tmp_path, save_top_k=0)])
    assert len(vae.used) == batch - batch % 5 + 5


def test_the_step_is_found_between_logging_steps_far_apart_and_under_accumulation(tmp_path: Path) -> None:
    callbacks = [ModelCheckpoint(tmp_path, save_top_k=0)]
    with pytest.raises(FloatingPointError, match="since step 70, so training ends at step 99"):
        fit(tmp_path, Failing("distortion", 70), log_every_n_steps=200, callbacks=callbacks)
    with pytest.raises(FloatingPointError, match="since step 35, so training ends at step 39"):
        fit(tmp_path, Failing("distortion", 70), log_every_n_steps=10, accumulate_grad_batches=2, callbacks=callbacks)


def test_a_run_without_a_logging_step_is_checked_at_the_end_of_an_epoch(tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match=r"since step 7, so training ends at step 99.*lower learning rate"):
        fit(tmp_path, Failing("distortion", 7), log_every_n_steps=1000, enable_checkpointing=False)
    with pytest.raises(FloatingPointError, match=r"since step 0, so training ends at step 2.*scale of the data"):
        fit(tmp_path, Failing("distortion", 0), max_steps=3, log_every_n_steps=50, enable_checkpointing=False)


def test_nothing_is_saved_that_is_not_finite(tmp_path: Path) -> None:
    saves = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1)
    with pytest.raises(FloatingPointError, match=r"`train/rate` is not a finite number since step 7, .* at step 8"):
        fit(tmp_path, Failing("rate_per_dimension", 7), log_every_n_steps=100, callbacks=[saves])
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == ["step=3.ckpt", "step=6.ckpt"]


def test_parameters_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    """The loss is a number, its gradient is none, and the save comes before the next loss."""
    vae = RecordingVAE()
    vae.decoder.map.bias.register_hook(lambda gradient: gradient * math.nan)
    saves = ModelCheckpoint(tmp_path, every_n_train_steps=1)
    with pytest.raises(FloatingPointError, match=r"parameter `decoder\.map\.bias` holds values that are not finite"):
        fit(tmp_path, vae, callbacks=[saves])
    assert not list(tmp_path.glob("*.ckpt"))


def test_large_parameters_are_saved(tmp_path: Path) -> None:
    """Their sum overflows, none of them does."""
    vae = RecordingVAE()
    vae.register_parameter("large", nn.Parameter(torch.full((2,), 3e38), requires_grad=False))
    fit(tmp_path, vae, callbacks=[ModelCheckpoint(tmp_path, filename="saved")], max_epochs=1)
    assert (tmp_path / "saved.ckpt").exists()


def test_the_command_line_says_it_without_a_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["train.py"])
    config = Path(__file__).parents[2] / "configs" / "digits.yaml"
    with pytest.raises(SystemExit) as exit_:
        main(["fit", f"--config={config}", "--optimizer.lr=1e20", "--trainer.max_epochs=1"])
    assert exit_.value.code == 1
    assert "error: `train/distortion` is not a finite number since step 1" in capsys.readouterr().err


# ---- the callbacks that a VAE brings along


def brought_along(trainer: Trainer) -> list[str]:
    return [type(each).__name__ for each in trainer.callbacks if isinstance(each, ExactResume | Guards)]


def test_a_second_fit_brings_nothing_along_twice(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer, loader = quiet_trainer(tmp_path, max_epochs=1), TensorLoader({"x": torch.randn(4, 2)}, batch_size=2)
    with caplog.at_level("INFO"):
        for model in (RecordingVAE(), RecordingVAE()):
            trainer.fit(model, loader)
            assert brought_along(trainer) == ["ExactResume", "Guards"]
    assert "will override" not in caplog.text
    given = quiet_trainer(tmp_path, max_epochs=1, callbacks=[Guards(), ExactResume()])
    given.fit(RecordingVAE(), loader)
    assert brought_along(given) == ["Guards", "ExactResume"]


class Foreign(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(2, 1)
        self.noise: list[Tensor] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.noise.append(torch.rand(1))
        loss: Tensor = self.map(batch["x"]).mean()
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_they_leave_a_trainer_that_goes_on_to_another_module(tmp_path: Path) -> None:
    loader = TensorLoader({"x": torch.randn(4, 2)}, batch_size=2)
    noise = []
    for first in (RecordingVAE(), None):
        trainer = quiet_trainer(tmp_path, max_epochs=1)
        if first is not None:
            trainer.fit(first, loader)
        trainer.fit_loop.epoch_progress.reset()
        torch.manual_seed(0)
        foreign = Foreign()
        trainer.fit(foreign, loader)
        assert brought_along(trainer) == []
        trainer.save_checkpoint(tmp_path / "saved.ckpt")
        noise.append(foreign.noise)
    assert len(noise[0]) == 2
    assert noise[0] == noise[1], "the random numbers of another module are left alone"


def test_a_subclass_may_call_the_hooks_that_are_skipped(tmp_path: Path) -> None:
    ended = []

    class Own(Guards):
        def on_train_batch_end(self, *args: Any) -> None:
            super().on_train_batch_end(*args)
            ended.append(args)

    loader = TensorLoader({"x": torch.randn(4, 2)}, batch_size=2)
    quiet_trainer(tmp_path, max_epochs=1, callbacks=[Own()]).fit(RecordingVAE(), loader)
    assert len(ended) == 2


class KeepsAway(RecordingVAE):
    def configure_callbacks(self) -> list[Callback]:
        return []

    def setup(self, stage: str) -> None:
        """Take the hook for itself."""


def test_callbacks_that_a_subclass_keeps_away_are_named_once(tmp_path: Path) -> None:
    trainer, loader = quiet_trainer(tmp_path, max_epochs=2), TensorLoader({"x": torch.randn(4, 2)}, batch_size=2)
    match = r"The run lacks ExactResume, Guards: .*super\(\)\.configure_callbacks"
    with pytest.warns(UserWarning, match=match) as caught:
        trainer.fit(KeepsAway(), loader)
    assert sum("The run lacks" in str(each.message) for each in caught) == 1
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    RecordingVAE.load_from_checkpoint(tmp_path / "saved.ckpt")


@pytest.mark.filterwarnings("ignore:The run lacks")
def test_a_run_without_them_forgets_the_one_that_failed(tmp_path: Path) -> None:
    class Unaccompanied(Failing):
        def configure_callbacks(self) -> list[Callback]:
            return []

    vae = Unaccompanied("distortion", 7)
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    with pytest.raises(FloatingPointError):
        fit(tmp_path, vae, enable_checkpointing=False)
    vae.load_state_dict(before)
    fit(tmp_path, vae, enable_checkpointing=False, max_epochs=1)


def test_weights_alone_are_checked_and_hold_the_knobs(tmp_path: Path) -> None:
    vae = RecordingVAE(beta=3.0)
    fit(tmp_path, vae, max_epochs=1)
    vae.trainer.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    assert RecordingVAE.load_from_checkpoint(tmp_path / "weights.ckpt").beta == 3.0
    with torch.no_grad():
        vae.decoder.map.bias.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="not finite"):
        vae.trainer.save_checkpoint(tmp_path / "broken.ckpt", weights_only=True)
    assert not (tmp_path / "broken.ckpt").exists()


# ---- batches and number formats that can't work are refused before the first step


class Normalised(nn.Module):
    """An encoder of vectors of two with a batch normalisation."""

    def __init__(self, shape: tuple[int, ...], latent_dim: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 2 * latent_dim))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layers(x)
        return result


def vectors(rows: int, **options: Any) -> DataLoader[Tensor]:
    return DataLoader(list(torch.randn(rows, 2)), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "batches",
    [
        lambda: vectors(9, batch_size=4),
        lambda: vectors(9, batch_size=4, shuffle=True),
        lambda: vectors(3, batch_size=1, drop_last=True),
        lambda: TensorLoader({"x": torch.randn(9, 2)}, batch_size=4, shuffle=True),
    ],
)
def test_a_last_batch_of_one_observation_is_refused_before_a_batch_normalisation_sees_it(tmp_path, batches):
    vae = RecordingVAE(encoder=Normalised)
    mean = vae.encoder.layers[1].running_mean.clone()
    with pytest.raises(MisconfigurationException, match=r"The last training batch holds one.*`drop_last=True`"):
        quiet_trainer(tmp_path, max_epochs=1).fit(vae, batches())
    assert vae.used == []
    assert torch.equal(vae.encoder.layers[1].running_mean, mean)


@pytest.mark.filterwarnings("ignore:Found .* in eval mode")
@pytest.mark.parametrize(
    ("encoder", "options", "trainer_options"),
    [
        (Normalised, {"rows": 9, "batch_size": 4, "drop_last": True}, {}),
        (Normalised, {"rows": 10, "batch_size": 4}, {}),
        (Normalised, {"rows": 9, "batch_size": 4}, {"limit_train_batches": 2}),
        (Normalised((2,), 2).eval(), {"rows": 9, "batch_size": 4}, {}),  # its statistics are frozen
        (None, {"rows": 9, "batch_size": 4}, {}),
    ],
)
def test_a_last_batch_that_can_be_trained_on_is_not_refused(tmp_path, encoder, options, trainer_options):
    vae = RecordingVAE(encoder=encoder)
    quiet_trainer(tmp_path, max_epochs=1, **trainer_options).fit(vae, vectors(**options))
    assert len(vae.used) >= 2


def test_a_batch_of_one_observation_is_named_where_a_batch_normalisation_fails():
    vae = RecordingVAE(encoder=Normalised)
    with pytest.raises(ValueError, match=r"^Batch 3 holds one observation.*`drop_last=True`"):
        vae.training_step(torch.randn(1, 2), 3)


@pytest.mark.filterwarnings("ignore:Total length of")
@pytest.mark.parametrize(("stage", "rows"), [("fit", 5), ("validate", 5), ("test", 5), ("predict", 0)])
def test_a_run_without_a_batch_is_an_error(tmp_path, stage, rows):
    run = getattr(quiet_trainer(tmp_path, max_epochs=1), stage)
    with pytest.raises(
        MisconfigurationException, match=f"^`{stage}` got no batch from a loader.* leave out `drop_last`"
    ):
        run(RecordingVAE(), vectors(rows, batch_size=8, drop_last=True))


class Stream(IterableDataset[Tensor]):
    """Vectors of two, whose number is not known before they are read."""

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[Tensor]:
        return iter(torch.randn(self.rows, 2))


EMPTY_BATCHES = DataLoader([torch.randn(0, 2)] * 2, batch_size=None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("stage", "batches"),
    [(stage, DataLoader(Stream(0))) for stage in ("fit", "validate", "test", "predict")]
    + [(stage, EMPTY_BATCHES) for stage in ("validate", "test")],
)
def test_a_stream_without_an_observation_is_an_error(tmp_path, stage, batches):
    trainer = quiet_trainer(tmp_path, max_epochs=1)
    with pytest.raises(MisconfigurationException, match=f"^`{stage}` got no batch from a loader"):
        getattr(trainer, stage)(RecordingVAE(), batches)
    assert not trainer.callback_metrics


def test_each_loader_must_have_observations(tmp_path):
    loaders = [vectors(5, batch_size=4), DataLoader(Stream(0))]
    with pytest.raises(MisconfigurationException, match=r"^`validate` got no batch from a loader"):
        quiet_trainer(tmp_path).validate(RecordingVAE(), loaders)


def test_a_validation_without_an_observation_ends_a_fit_before_its_first_step(tmp_path):
    vae = RecordingVAE()
    with pytest.raises(MisconfigurationException, match=r"^`validate` got no batch from a loader"):
        quiet_trainer(tmp_path, max_epochs=1).fit(vae, vectors(4), DataLoader(Stream(0)))
    assert vae.used == []


def test_an_iterator_that_is_used_up_ends_the_run(tmp_path):
    vae = RecordingVAE()
    with pytest.raises(MisconfigurationException, match=r"^`fit` got no batch.*An iterator can be read only once"):
        quiet_trainer(tmp_path, max_epochs=3).fit(vae, iter(vectors(4, batch_size=2)))
    assert len(vae.used) == 2


class Validating(RecordingVAE):
    """A VAE with a validation step of its own."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        self.log("own", batch.square().mean(), batch_size=len(batch))


class Evaluating(RecordingVAE):
    """A VAE with a test step of its own."""

    test_step = Validating.validation_step  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("vae", "stage", "other"), [(Validating, "validate", "test"), (Evaluating, "test", "validate")]
)
def test_a_subclass_with_a_step_of_its_own_logs_only_its_own_values(tmp_path, vae, stage, other):
    (values,) = getattr(quiet_trainer(tmp_path), stage)(vae(), vectors(4), verbose=False)
    assert list(values) == ["own"]
    with pytest.raises(MisconfigurationException, match="got no batch from a loader"):
        getattr(quiet_trainer(tmp_path), other)(vae(), DataLoader(Stream(0)))


def test_a_run_that_is_limited_to_no_batch_is_none(tmp_path):
    limits = dict.fromkeys(("limit_train_batches", "limit_test_batches"), 0)
    quiet_trainer(tmp_path, max_epochs=1, **limits).fit(RecordingVAE(), vectors(5))
    assert quiet_trainer(tmp_path, **limits).test(RecordingVAE(), vectors(5)) == []


class Optimised(VAE):
    """A VAE of vectors with an optimizer that is given."""

    def __init__(self, optimizer: Any) -> None:
        super().__init__((2,), latent_dim=2)
        self.optimizer = optimizer

    def configure_optimizers(self) -> Any:
        return self.optimizer(self.parameters())


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.RMSprop])
def test_an_optimizer_whose_eps_is_lost_in_float16_is_refused(tmp_path, optimizer):
    with pytest.raises(MisconfigurationException, match=rf"`eps` of {optimizer.__name__}, 1e-08, is lost.*'16-mixed'"):
        quiet_trainer(tmp_path, max_epochs=1, precision="16-true").fit(Optimised(optimizer), vectors(8, batch_size=4))


@pytest.mark.filterwarnings("ignore:The data came in")
@pytest.mark.parametrize(
    ("precision", "optimizer"),
    [
        ("16-true", partial(torch.optim.Adam, eps=1e-4)),
        ("bf16-true", torch.optim.Adam),
    ],
)
def test_what_is_advised_in_place_of_it_trains(tmp_path, precision, optimizer):
    torch.manual_seed(0)
    vae = Optimised(optimizer)
    quiet_trainer(tmp_path, max_epochs=5, precision=precision).fit(vae, vectors(8, batch_size=4))
    assert all(parameter.isfinite().all() for parameter in vae.parameters())
