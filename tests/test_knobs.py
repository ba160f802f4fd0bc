"""The knobs of a loss: assigned, saved and loaded."""

import copy
import math
import pickle
import sys

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader

from lightning_vae import VAE
from lightning_vae.callbacks import KLAnnealing, Linear
from tests.image_vae import LEVELS, SHAPE, fitted, loader, small, trainer


def test_knobs_are_float32_buffers_that_a_number_fills():
    vae = small(beta=4, free_bits=0.5)
    beta = vae.beta
    vae.beta = torch.tensor(0.25, dtype=torch.bfloat16)
    assert vae.beta is beta
    assert (vae.beta.item(), vae.beta.dtype, vae.beta.ndim) == (0.25, torch.float32, 0)
    assert {"beta", "free_bits"} <= dict(vae.named_buffers()).keys()
    assert not {"beta", "free_bits"} & vae.state_dict().keys()
    assert vae.knobs == {"beta": 0.25, "free_bits": 0.5}  # outside of a fit it is configured
    assert (vae.hparams["beta"], vae.hparams_initial["beta"]) == (0.25, 0.25)
    for dtype in (torch.bfloat16, torch.float16, torch.float64, torch.float32):
        vae.beta = 0.1
        vae.to(dtype)
        assert vae.beta.dtype == torch.float32
        assert vae.beta.item() == pytest.approx(0.1, rel=1e-7)


def test_moving_a_knob_within_a_fit_does_not_configure_it(tmp_path):
    class Mover(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            pl_module.beta = 0.2

        def on_validation_start(self, trainer, pl_module):
            pl_module.beta = 0.3

        def on_train_end(self, trainer, pl_module):
            pl_module.beta = 0.4

    vae = small()
    trainer(tmp_path, callbacks=[Mover()]).fit(vae, loader(), loader())
    assert (vae.beta.item(), vae.knobs["beta"], vae.hparams["beta"]) == (pytest.approx(0.4), None, None)
    vae.beta = 0.5
    assert (vae.beta.item(), vae.knobs["beta"], vae.hparams["beta"]) == (0.5, 0.5, 0.5)


def test_an_assignment_leaves_the_other_hyperparameters_alone():
    class Quiet(VAE):
        def __init__(self, weights):
            super().__init__(SHAPE, LEVELS)
            self.save_hyperparameters(logger=False)

    vae = Quiet(np.ones(3))
    vae.beta = 3.0
    assert not vae._log_hyperparams
    assert (vae.hparams["beta"], vae.hparams_initial["beta"], vae.hparams["weights"].sum()) == (3.0, 3.0, 3.0)


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_an_assignment_refuses_what_the_constructor_refuses(value):
    """Case `beta_set_to_nonsense`."""
    vae = small(beta=2.0)
    with pytest.raises(ValueError, match=f"`beta` must be a finite number of at least 0, got {value}"):
        vae.beta = value
    assert (vae.beta.item(), vae.knobs["beta"]) == (2.0, 2.0)


def test_an_argument_replaces_the_checkpoints(tmp_path):
    path = fitted(tmp_path, small(beta=4.0, free_bits_per="dimension"))
    loaded = VAE.load_from_checkpoint(path, weights_only=True, beta=1.0, free_bits_per="whole")
    assert (loaded.beta.item(), loaded.knobs["beta"], loaded.free_bits_per) == (1.0, 1.0, "whole")


def test_a_default_that_is_written_out_is_configured(tmp_path):
    for beta in (1.0, 0.5):
        with pytest.raises(MisconfigurationException, match="Configure it in one place"):
            trainer(tmp_path, callbacks=[KLAnnealing(Linear(stop=4.0, steps=3))]).fit(small(beta=beta), loader())


def test_an_assignment_outside_a_fit_is_in_the_checkpoint(tmp_path):
    vae = small(beta=1.0)
    vae.beta = 4.0
    path = fitted(tmp_path, vae)
    loaded = VAE.load_from_checkpoint(path, weights_only=True)
    assert (loaded.beta.item(), loaded.knobs["beta"], loaded.hparams["beta"]) == (4.0, 4.0, 4.0)
    validated = small()
    trainer(tmp_path).validate(validated, loader(), path, verbose=False)
    assert validated.beta.item() == 4.0


class Fixed(VAE):
    def __init__(self):
        super().__init__(SHAPE, LEVELS, latent_dim=3, beta=2.0)


def test_an_assignment_wins_over_a_subclass_that_says_its_own_number(tmp_path):
    vae = Fixed()
    vae.beta = 4.0
    loaded = Fixed.load_from_checkpoint(fitted(tmp_path, vae), weights_only=True)
    assert (loaded.beta.item(), loaded.knobs["beta"], loaded.hparams["beta"]) == (4.0, 4.0, 4.0)


class Weighted(VAE):
    def __init__(self, weight=2.0):
        super().__init__(SHAPE, LEVELS, latent_dim=3, beta=weight)


def test_an_argument_that_becomes_a_knob_replaces_the_checkpoints(tmp_path):
    path = fitted(tmp_path, Weighted())
    assert Weighted.load_from_checkpoint(path, weights_only=True).beta == 2.0
    assert Weighted.load_from_checkpoint(path, weights_only=True, weight=5.0).beta == 5.0


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_an_evaluation_takes_the_checkpoints_knobs(tmp_path, stage):
    path = fitted(tmp_path, small(beta=4.0, free_bits=0.5))
    vae = small(beta=2.0)
    getattr(trainer(tmp_path), stage)(vae, loader(), ckpt_path=path)
    assert (vae.beta.item(), vae.free_bits.item()) == (4.0, 0.5)
    assert vae.knobs == {"beta": 2.0, "free_bits": None}
    trainer(tmp_path, max_epochs=1).fit(vae, loader())
    assert vae.beta == 2.0, "training is at what the module is configured with"


@pytest.mark.filterwarnings("ignore:The training data come from a DataLoader")
def test_a_configured_knob_wins_over_the_checkpoint_that_a_fit_goes_on_from(tmp_path):
    path = fitted(tmp_path, small(beta=4.0, free_bits=0.5))
    vae = small(beta=2.0)
    with pytest.warns(UserWarning, match=r"saved with `beta=4`; the run continues with `beta=2`") as caught:
        trainer(tmp_path, max_epochs=2).fit(vae, loader(), ckpt_path=path)
    assert sum("`beta=" in str(each.message) for each in caught) == 1
    assert (vae.beta.item(), vae.free_bits.item()) == (2.0, 0.5)
    same = small(beta=4.0)
    trainer(tmp_path, max_epochs=2).fit(same, loader(), ckpt_path=path)  # a warning would be an error


@pytest.mark.sampled(3)
@pytest.mark.parametrize("use_buffers", [True, False])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("annealed", [True, False])
def test_under_weight_averaging_validation_and_checkpoints_keep_the_target(tmp_path, use_buffers, first, annealed):
    """Case `averaged_weights_average_beta`, on the VAE. A mean of 0.1's in float32 is not 0.1."""
    seen = []

    class Watch(pl.Callback):
        def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen.append(pl_module.beta.item())

    save = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=2, save_last=True)
    weights = ModelCheckpoint(tmp_path, "weights-{step}", save_top_k=-1, every_n_train_steps=3, save_weights_only=True)
    callbacks = [EMAWeightAveraging(decay=0.9, use_buffers=use_buffers)]
    callbacks += [KLAnnealing(Linear(fraction=0.5))] if annealed else []
    callbacks = [*(callbacks if first else callbacks[::-1]), Watch(), save, weights]
    run = trainer(tmp_path, callbacks=callbacks, max_epochs=4, enable_checkpointing=True)
    vae = small(beta=0.1)
    run.fit(vae, loader(), loader())
    target = torch.tensor(0.1).item()
    assert set(seen) == {target}
    assert vae.beta.item() == target
    metrics = {name: float(value) for name, value in run.callback_metrics.items()}
    assert metrics["val/loss"] == pytest.approx(metrics["val/distortion"] + 0.1 * metrics["val/rate"], rel=1e-6)
    files = list(tmp_path.glob("*.ckpt"))
    assert len(files) > 10
    for file in files:
        assert torch.load(file, weights_only=True)["lightning_vae"]["knob_values"]["beta"] == target
        assert VAE.load_from_checkpoint(file, weights_only=True).beta.item() == target


def test_weight_averaging_that_a_model_brings_along_leaves_its_knobs(tmp_path):
    class Averaged(VAE):
        def configure_callbacks(self):
            return [EMAWeightAveraging(decay=0.5), *super().configure_callbacks()]

        def training_step(self, batch, batch_idx):
            self.beta = float(batch_idx)
            return super().training_step(batch, batch_idx)

    vae = Averaged(SHAPE, LEVELS, latent_dim=3)
    trainer(tmp_path, max_epochs=1).fit(vae, loader(), loader())
    assert vae.beta.item() == 4.0


def test_knobs_are_among_the_buffers_where_torch_places_them(monkeypatch):
    """FSDP moves the buffers of each module, and DataParallel finds each of them among all buffers."""
    vae = small()
    assert {id(vae.beta), id(vae.free_bits)} <= {id(each) for each in vae.buffers(recurse=False)}
    replication = sys.modules["torch.nn.parallel.replicate"]

    def copies(tensors, devices, detach=False):  # replaces a broadcast, because there is only one device
        return [[each.detach().clone() for each in tensors] for _ in devices]

    monkeypatch.setattr(replication, "_broadcast_coalesced_reshape", copies)
    vae.beta = 3.0
    first, second = replication.replicate(vae, [0, 1], detach=True)
    assert first.beta.item() == second.beta.item() == 3.0
    assert len({each.beta.data_ptr() for each in (vae, first, second)}) == 3
    assert vae.knobs == {"beta": 3.0, "free_bits": None}


def test_a_copy_has_knobs_of_its_own():
    vae = small(beta=2.0)
    twin = pickle.loads(pickle.dumps(vae))
    twin.beta = 3.0
    assert (vae.beta.item(), twin.beta.item(), copy.deepcopy(twin).beta.item()) == (2.0, 3.0, 3.0)
    vae.share_memory()
    assert not pickle.loads(pickle.dumps(vae)).beta.is_shared()


def test_beta_that_is_assigned_with_an_adaptive_scale_warns_once(tmp_path):
    vae = VAE((4,))
    vae.beta = 4.0
    with pytest.warns(UserWarning, match="`beta` is 4 with a likelihood whose scale adapts") as caught:
        trainer(tmp_path, max_epochs=1).fit(vae, DataLoader(torch.randn(8, 4), batch_size=4))
    assert sum("whose scale adapts" in str(each.message) for each in caught) == 1


def test_a_knob_that_an_earlier_version_has_steered_comes_back(tmp_path):
    path = fitted(tmp_path, small(beta=1.0))
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["lightning_vae"] = {"knob_targets": {"beta": 0.25, "free_bits": 0.0}, "rate_limit": (1.0, 10.0)}
    torch.save(checkpoint, path)
    loaded = VAE.load_from_checkpoint(path, weights_only=True)
    assert (loaded.beta.item(), loaded.knobs["beta"], loaded.rate_limit) == (0.25, 1.0, (1.0, 10.0))


def test_an_assignment_within_a_fit_refuses_numbers_out_of_range(tmp_path):
    refused = []

    class Assigns(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            pair = torch.tensor([1.0, 2.0])
            for value in (-1.0, math.nan, math.inf, "4", None, True, torch.tensor(-1.0), torch.tensor(math.nan), pair):
                with pytest.raises(ValueError, match="`beta` must be a finite number of at least 0, got"):
                    pl_module.beta = value
                refused.append(value)
            pl_module.beta = torch.tensor(3.0)

    vae = small(beta=2.0)
    trainer(tmp_path, max_epochs=1, callbacks=[Assigns()]).fit(vae, loader())
    assert len(refused) == 45
    assert (vae.beta.item(), vae.knobs["beta"]) == (3.0, 2.0)


def test_a_checkpoint_with_a_knob_out_of_range_is_refused(tmp_path):
    path = fitted(tmp_path, small())
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["lightning_vae"]["knob_values"]["beta"] = math.nan
    torch.save(checkpoint, path)
    with pytest.raises(ValueError, match="`beta` must be a finite number of at least 0, got nan"):
        VAE.load_from_checkpoint(path, weights_only=True)
