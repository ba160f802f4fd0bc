"""Checks of monitors before the first step."""

import copy
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, LambdaCallback, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning_utilities.core.imports import RequirementCache

from lightning_vae import MMD, VAE, LastCheckpoint
from lightning_vae.callbacks import GECO, CollapseDetector
from tests.doubles import loader as vectors
from tests.doubles import quiet_trainer
from tests.image_vae import loader, small, trainer


@pytest.mark.skipif(not RequirementCache("lightning>=2.6"), reason="before, the last was always saved")
@pytest.mark.parametrize(
    ("options", "others", "warns"),
    [
        ({}, [], True),
        ({}, [LastCheckpoint()], False),
        ({}, [ModelCheckpoint()], False),
        ({}, [ModelCheckpoint(save_top_k=0)], True),
        ({}, [ModelCheckpoint(save_weights_only=True)], True),
        ({}, [ModelCheckpoint(monitor="val/rate")], True),
        ({"save_top_k": -1}, [], False),
        ({"every_n_train_steps": 2}, [], False),
        ({"monitor": None, "save_weights_only": True}, [], False),  # its last is the last
    ],
)
def test_a_last_checkpoint_that_is_not_the_last_is_said(tmp_path, options, others, warns):
    options = {"monitor": "val/loss", "filename": "best", "save_last": True, **options}
    callbacks = [ModelCheckpoint(**options), *others]
    with pytest.warns(UserWarning, match="only when the model is among the best") if warns else nullcontext():
        trainer(tmp_path, callbacks=callbacks, enable_checkpointing=True).fit(small(), loader(), loader())


@pytest.mark.parametrize("callback", [EarlyStopping("val/elbo"), ModelCheckpoint(monitor="train/elbo", mode="min")])
def test_minimising_the_elbo_is_refused(tmp_path, callback):
    with pytest.raises(MisconfigurationException, match="a higher ELBO is better"):
        trainer(tmp_path, callbacks=[callback], enable_checkpointing=True).fit(small(), loader(), loader())


# ---- values that are never logged


class OfTheUser(VAE):
    """A VAE that may log anything."""

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        self.log("val/los", 1.0, batch_size=1)


def log_los(trainer, pl_module):
    pl_module.log("val/los", 1.0)


class CallbackOfTheUser(Callback):
    """A callback that may log anything."""

    on_validation_epoch_end = staticmethod(log_los)


class Plateau(VAE):
    """A VAE whose learning rate waits for a value that is never logged."""

    strict = True

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), 1e-6)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        return [optimizer], [{"scheduler": scheduler, "monitor": "val/lss", "strict": self.strict}]


class Forgiving(Plateau):
    strict = False


Plateau.__module__ = Forgiving.__module__ = VAE.__module__  # as if a config had set the scheduler


class Trained(Callback):
    """Notes that a run has made a step."""

    def __init__(self):
        self.has_stepped = False

    def on_train_batch_start(self, *_):
        self.has_stepped = True


Trained.__module__ = VAE.__module__


def run(folder, *callbacks, vae=VAE, loaders=1, rows=12, **options):
    """Train, and return whether a step was made before it failed, and its error."""
    trained = Trained()
    options = {"max_epochs": 1, "enable_checkpointing": True, **options}
    trainer = quiet_trainer(folder, callbacks=[*callbacks, trained], **options)
    try:
        trainer.fit(vae((2,), latent_dim=2), vectors(), [vectors(rows)] * loaders or None)
    except MisconfigurationException as error:
        return trained.has_stepped, str(error)
    return trained.has_stepped, ""


@pytest.mark.parametrize(
    ("monitor", "nearest"),
    [
        ("val/lss", "'val/loss', "),
        ("val_loss", "'val/loss', "),
        ("loss", "'val/loss', 'train/loss', "),
        ("train/eblo", "'train/elbo', "),
        ("test/rate", "'train/rate', "),
        ("validation/rate", "'val/rate', "),
        ("val/lss/dataloader_idx_0", "'val/loss', "),
    ],
)
@pytest.mark.parametrize("owner", [EarlyStopping, ModelCheckpoint])
def test_a_value_that_is_never_logged_is_refused_before_a_step(tmp_path, owner, monitor, nearest):
    has_stepped, error = run(tmp_path, owner(monitor=monitor, mode="max"), CollapseDetector())
    assert not has_stepped
    says = f"{owner.__name__}(monitor={monitor!r}): this run never logs that value. The nearest are {nearest}"
    assert error.startswith(says)


def test_a_scheduler_that_waits_in_vain_is_refused(tmp_path):
    has_stepped, error = run(tmp_path, vae=Plateau)
    assert not has_stepped
    assert error.startswith("ReduceLROnPlateau(monitor='val/lss'): this run never logs that value.")


@pytest.mark.parametrize("monitor", ["val/loss", "train/rate", "train/floored_rate", "latent/active_units", "step"])
def test_a_value_that_is_logged_is_waited_for(tmp_path, monitor):
    callback = ModelCheckpoint(tmp_path, monitor=monitor, filename="best", mode="max")
    assert run(tmp_path, callback, CollapseDetector()) == (True, "")
    assert (tmp_path / "best.ckpt").exists()


@pytest.mark.parametrize("monitor", ["val/squared_error", "train/constrained_error", "val/term_mmd", "train/term_mmd"])
def test_what_a_constraint_or_a_term_adds_is_waited_for(tmp_path, monitor):
    callback = ModelCheckpoint(tmp_path, monitor=monitor, filename="best")
    vae = partial(VAE, terms={"mmd": MMD} if "term" in monitor else None)
    others = [] if "term" in monitor else [GECO(squared_error=1.0)]
    assert run(tmp_path, callback, *others, vae=vae, log_every_n_steps=1) == (True, "")
    assert (tmp_path / "best.ckpt").exists()


@pytest.mark.parametrize(
    ("callbacks", "vae"),
    [
        ([EarlyStopping("val/los")], OfTheUser),
        ([EarlyStopping("val/los"), CallbackOfTheUser()], VAE),
        ([EarlyStopping("val/los"), LambdaCallback(on_validation_epoch_end=log_los)], VAE),
    ],
)
def test_a_value_that_the_users_code_may_log_is_left_to_lightning(tmp_path, callbacks, vae):
    assert run(tmp_path, *callbacks, vae=vae) == (True, "")


@pytest.mark.filterwarnings("ignore:Early stopping conditioned", "ignore:ReduceLROnPlateau conditioned")
@pytest.mark.parametrize(("callbacks", "vae"), [([EarlyStopping("val/lss", strict=False)], VAE), ([], Forgiving)])
def test_a_value_that_need_not_be_logged_is_not_refused(tmp_path, callbacks, vae):
    assert run(tmp_path, *callbacks, vae=vae) == (True, "")


# ---- values of a validation that does not happen


NO_VALIDATION = [{"limit_val_batches": 0}, {"loaders": 0}, {"rows": 0}, {"check_val_every_n_epoch": 2}]


@pytest.mark.filterwarnings("ignore:Total length of")
@pytest.mark.parametrize("options", NO_VALIDATION)
@pytest.mark.parametrize(
    ("callbacks", "name"),
    [
        ([EarlyStopping("val/loss"), LastCheckpoint()], "EarlyStopping(monitor='val/loss')"),
        ([ModelCheckpoint(monitor="val/loss")], "ModelCheckpoint(monitor='val/loss')"),
        ([ModelCheckpoint(monitor="val/loss"), ModelCheckpoint(save_top_k=0)], "ModelCheckpoint(monitor='val/loss')"),
    ],
)
def test_without_validation_what_waits_for_it_is_refused_before_a_step(tmp_path, callbacks, name, options):
    has_stepped, error = run(tmp_path, *copy.deepcopy(callbacks), **options)
    assert not has_stepped
    assert error.startswith(f"{name} needs validation, and this run has none")


@pytest.mark.filterwarnings("ignore:Early stopping conditioned")
def test_without_validation_what_need_not_find_its_value_is_not_refused(tmp_path):
    assert run(tmp_path, EarlyStopping("val/loss", strict=False), loaders=0) == (True, "")


@pytest.mark.filterwarnings("ignore:.*could not find the monitored key", "ignore:Total length of")
@pytest.mark.parametrize("options", NO_VALIDATION)
def test_without_validation_a_checkpoint_beside_one_that_saves_is_not_refused(tmp_path, options):
    callbacks = [ModelCheckpoint(tmp_path, monitor="val/loss"), LastCheckpoint(tmp_path)]
    assert run(tmp_path, *callbacks, **options) == (True, "")
    assert [path.name for path in tmp_path.glob("*.ckpt")] == ["last.ckpt"]


@pytest.mark.parametrize(
    "options", [{"max_epochs": 2, "check_val_every_n_epoch": 2}, {"max_epochs": -1, "max_steps": 8}]
)
def test_validation_that_comes_later_is_waited_for(tmp_path, options):
    callback = ModelCheckpoint(tmp_path, monitor="val/loss", filename="best")
    assert run(tmp_path, callback, num_sanity_val_steps=0, **options) == (True, "")
    assert (tmp_path / "best.ckpt").exists()


@pytest.mark.parametrize(
    ("monitor", "loaders", "logged"),
    [
        ("val/loss", 2, "2 validation loaders this run logs 'val/loss/dataloader_idx_0', 'val/loss/dataloader_idx_1'."),
        ("val/loss/dataloader_idx_2", 2, "2 validation loaders this run logs 'val/loss/dataloader_idx_0', "),
        ("val/loss/dataloader_idx_0", 1, "1 validation loader this run logs 'val/loss'."),
    ],
)
def test_a_value_of_another_loader_is_refused_before_a_step(tmp_path, monitor, loaders, logged):
    has_stepped, error = run(tmp_path, EarlyStopping(monitor), loaders=loaders)
    assert not has_stepped
    assert error.startswith(f"EarlyStopping(monitor={monitor!r}): from its {logged}")


def test_a_value_of_one_of_the_loaders_is_waited_for(tmp_path):
    assert run(tmp_path, EarlyStopping("val/loss/dataloader_idx_1"), loaders=2) == (True, "")
