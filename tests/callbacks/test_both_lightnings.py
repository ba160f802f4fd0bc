"""Each callback under the Trainer and the LightningCLI of both Lightning packages."""

import csv
import sys
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import yaml
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from lightning_vae.callbacks import CollapseDetector, FreeBits, KLAnnealing, Linear
from tests.doubles import loader

# ModelCheckpoint's remark on a run that goes on elsewhere.
pytestmark = pytest.mark.filterwarnings("ignore:The dirpath has changed from")

PACKAGES = ("lightning.pytorch", "pytorch_lightning")
WAYS = ("list", "yaml", "flags")
EPOCHS, STEPS_PER_EPOCH, FLOOR = 4, 6, 0.25
STEPS = EPOCHS * STEPS_PER_EPOCH
BETAS = [min(1.0, step / 18) for step in range(STEPS)]  # three quarters of the run

# The same three callbacks in three languages.
NAMED = [
    {"class_path": "lightning_vae.callbacks.KLAnnealing",
     "init_args": {"schedule": {"class_path": "lightning_vae.callbacks.Linear", "init_args": {"fraction": 0.75}}}},
    {"class_path": "lightning_vae.callbacks.FreeBits", "init_args": {"threshold": FLOOR}},
    {"class_path": "lightning_vae.callbacks.CollapseDetector", "init_args": {"warmup": EPOCHS}},
]  # fmt: skip
FLAGS = [
    "--trainer.callbacks=KLAnnealing",
    "--trainer.callbacks.schedule=Linear",
    "--trainer.callbacks.schedule.fraction=0.75",
    "--trainer.callbacks+=FreeBits",
    f"--trainer.callbacks.threshold={FLOOR}",
    "--trainer.callbacks+=CollapseDetector",
    f"--trainer.callbacks.warmup={EPOCHS}",
]


def listed() -> list[Any]:
    return [KLAnnealing(Linear(fraction=0.75)), FreeBits(FLOOR), CollapseDetector(warmup=EPOCHS)]


def foreign(package: str) -> type[Any]:
    """Somebody's VAE of two latent dimensions, each with a weight of its own, written against one of the packages.

    It draws no noise, so that its runs can be compared.
    """

    class ForeignVAE(import_module(package).LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.decoder = nn.Linear(2, 4), nn.Linear(2, 2)
            self.posterior: Normal | None = None
            self.beta, self.kld_weight, self.free_bits = 1.0, 1.0, 0.0
            self.used: dict[str, list[float]] = {"beta": [], "kld_weight": [], "free_bits": []}

        def loss(self, batch: Tensor) -> Tensor:
            mean, log_variance = self.encoder(batch).chunk(2, -1)
            self.posterior = Normal(mean, (0.5 * log_variance).exp())
            rates = kl_divergence(self.posterior, Normal(0.0, 1.0)).mean(0).clamp(min=self.free_bits)
            distortion = (batch - self.decoder(mean)).square().sum(-1).mean()
            return distortion + self.beta * rates[0] + self.kld_weight * rates[1]

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            for name, values in self.used.items():
                values.append(getattr(self, name))
            return self.loss(batch)

        def validation_step(self, batch: Tensor, batch_idx: int) -> None:
            self.log("val_loss", self.loss(batch))

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), 0.01)

        def train_dataloader(self) -> Any:
            return loader()

        def val_dataloader(self) -> Any:
            return loader()

    return ForeignVAE


OPTIONS = {
    "accelerator": "cpu",
    "devices": 1,
    "max_epochs": EPOCHS,
    "log_every_n_steps": 1,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def keep_all(package: str, root: Path) -> Any:
    return import_module(f"{package}.callbacks").ModelCheckpoint(str(root), "{epoch}", save_top_k=-1)


def fit(package: str, callbacks: Any, root: Path, ckpt_path: Path | None = None, model: Any = None) -> tuple[Any, Any]:
    """Fit with callbacks from Python."""
    torch.manual_seed(0)
    model = model or foreign(package)()
    logger = import_module(f"{package}.loggers").CSVLogger(root, name="", version="")
    trainer = import_module(package).Trainer(default_root_dir=root, logger=logger, callbacks=callbacks, **OPTIONS)
    trainer.fit(model, ckpt_path=ckpt_path)
    return trainer, model


def fit_named(package: str, arguments: list[str], root: Path, ckpt_path: Path | None = None) -> tuple[Any, Any]:
    """Fit with callbacks that the package's own LightningCLI is told by name."""
    pytest.importorskip("jsonargparse", reason="the base install has no command line")
    logger = {
        "class_path": f"{package}.loggers.CSVLogger",
        "init_args": {"save_dir": str(root), "name": "", "version": ""},
    }
    resume = [f"--ckpt_path={ckpt_path}"] if ckpt_path else []
    with patch.object(sys, "argv", ["train.py", "fit", *arguments, *resume]):
        cli = import_module(f"{package}.cli").LightningCLI(
            foreign(package),
            trainer_defaults={**OPTIONS, "logger": logger, "callbacks": [keep_all(package, root)]},
            save_config_callback=None,
            seed_everything_default=0,
        )
    return cli.trainer, cli.model


def run(package: str, way: str, root: Path, ckpt_path: Path | None = None) -> tuple[Any, Any]:
    if way == "list":
        return fit(package, [*listed(), keep_all(package, root)], root, ckpt_path)
    if way == "flags":
        return fit_named(package, FLAGS, root, ckpt_path)
    config = root.parent / "config.yaml"
    config.write_text(yaml.safe_dump({"trainer": {"callbacks": NAMED}}))
    return fit_named(package, [f"--config={config}"], root, ckpt_path)


def column(root: Path, name: str) -> list[float]:
    """The values of one key, in the order in which they were logged."""
    with (root / "metrics.csv").open() as table:
        return [float(row[name]) for row in csv.DictReader(table) if row.get(name)]


def ours(trainer: Any, cls: type[Any]) -> Any:
    return next(callback for callback in trainer.callbacks if isinstance(callback, cls))


@pytest.mark.sampled(2)  # another way in each package
@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("way", WAYS)
def test_schedules_are_followed_and_everything_is_logged(package: str, way: str, tmp_path: Path) -> None:
    trainer, model = run(package, way, tmp_path / "run")
    assert model.used["beta"] == pytest.approx(BETAS)
    assert model.used["free_bits"] == [FLOOR] * STEPS
    assert column(tmp_path / "run", "knobs/beta") == pytest.approx(BETAS)
    assert column(tmp_path / "run", "knobs/free_bits") == [FLOOR] * STEPS
    assert len(column(tmp_path / "run", "latent/at_floor")) == STEPS
    assert len(column(tmp_path / "run", "latent/active_units")) == EPOCHS
    assert ours(trainer, CollapseDetector).state_dict()["passes"] == EPOCHS
    assert model.beta == 1.0


@pytest.mark.sampled(2)
@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("way", WAYS)
def test_a_resumed_run_equals_the_uninterrupted_one(package: str, way: str, tmp_path: Path) -> None:
    whole, model = run(package, way, tmp_path / "whole")
    path = tmp_path / "whole" / "epoch=1.ckpt"
    resumed, again = run(package, way, tmp_path / "resumed", ckpt_path=path)
    assert again.used == {name: values[2 * STEPS_PER_EPOCH :] for name, values in model.used.items()}
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), again.parameters(), strict=True))
    for cls in (KLAnnealing, FreeBits, CollapseDetector):
        assert str(ours(resumed, cls).state_dict()) == str(ours(whole, cls).state_dict())
    for name in ("latent/active_units", "latent/mutual_information"):
        assert column(tmp_path / "resumed", name) == column(tmp_path / "whole", name)[2:]


@pytest.mark.parametrize("package", PACKAGES)
def test_a_resumed_run_ends_at_the_weight_that_the_module_is_configured_with_now(package: str, tmp_path: Path) -> None:
    run(package, "list", tmp_path)
    model = foreign(package)()
    model.beta = 0.5
    with pytest.warns(UserWarning, match="began with 1, and the module is configured with 0.5 now; .* to 0.5"):
        fit(package, listed(), tmp_path / "resumed", tmp_path / "epoch=1.ckpt", model)
    assert model.used["beta"] == pytest.approx([0.5 * beta for beta in BETAS[2 * STEPS_PER_EPOCH :]])


@pytest.mark.parametrize(
    ("position", "key", "expected"),
    [(0, "knobs/beta", BETAS), (1, "knobs/free_bits", [FLOOR] * STEPS), (2, "latent/active_units", [2.0] * EPOCHS)],
)
@pytest.mark.parametrize("package", PACKAGES)
def test_a_callback_needs_no_list(package: str, position: int, key: str, expected: list[float], tmp_path: Path) -> None:
    fit(package, listed()[position], tmp_path)
    assert column(tmp_path, key) == pytest.approx(expected)


@pytest.mark.parametrize("package", PACKAGES)
def test_two_of_one_class_stand_side_by_side(package: str, tmp_path: Path) -> None:
    def pair() -> list[Any]:
        return [
            KLAnnealing(Linear(fraction=0.75)),
            KLAnnealing(Linear(steps=STEPS, start=2.0, stop=1.0), attribute="kld_weight"),
        ]

    _, model = fit(package, [*pair(), keep_all(package, tmp_path)], tmp_path)
    weights = [2.0 - step / STEPS for step in range(STEPS)]
    assert model.used["beta"] == pytest.approx(BETAS)
    assert model.used["kld_weight"] == pytest.approx(weights)
    assert column(tmp_path, "knobs/beta") == pytest.approx(BETAS)
    assert column(tmp_path, "knobs/kld_weight") == pytest.approx(weights)

    saved = torch.load(tmp_path / "epoch=1.ckpt", weights_only=True)["callbacks"]
    assert {key for key in saved if key.startswith("KLAnnealing")} == {callback.state_key for callback in pair()}
    _, again = fit(package, pair(), tmp_path / "resumed", tmp_path / "epoch=1.ckpt")
    assert again.used == {name: values[2 * STEPS_PER_EPOCH :] for name, values in model.used.items()}


@pytest.mark.parametrize("package", PACKAGES)
def test_two_detectors_keep_apart_what_they_see(package: str, tmp_path: Path) -> None:
    def flat(pl_module: Any, batch: Tensor) -> Normal:
        return Normal(torch.zeros(len(batch), 3), 1.0)

    fit(package, [CollapseDetector(), CollapseDetector(flat, name="flat"), keep_all(package, tmp_path)], tmp_path)
    assert column(tmp_path, "latent/active_units") == [2.0] * EPOCHS
    assert column(tmp_path, "latent_flat/active_units") == [0.0] * EPOCHS
    saved = torch.load(tmp_path / "epoch=1.ckpt", weights_only=True)["callbacks"]
    assert len([key for key in saved if key.startswith("CollapseDetector")]) == 2
