"""The parts of a model in a checkpoint, and what a checkpoint may name."""

import functools
import os
import pickle

import pytest
import torch

from lightning_vae import VAE, ConvDecoder, ConvEncoder, Gaussian, MLPDecoder, MLPEncoder
from tests.image_vae import LEVELS, SHAPE, OwnEncoder, fitted, images, small


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"encoder": OwnEncoder, "decoder": functools.partial(MLPDecoder, hidden=(5, 6))},
        {"encoder": ConvEncoder, "decoder": ConvDecoder, "likelihood": functools.partial(Gaussian, variance="optimal")},
        {"encoder": {"class_path": "lightning_vae.networks.MLPEncoder", "init_args": {"hidden": [9]}}},
        {"free_bits_per": 3, "free_bits": 0.2, "beta": 0.3},
    ],
)
def test_checkpoints_load_without_another_argument(tmp_path, options):
    vae = small(**options)
    path = fitted(tmp_path, vae)
    loaded = VAE.load_from_checkpoint(path, weights_only=True)
    assert loaded.knobs == vae.knobs
    assert loaded.beta == vae.beta
    torch.testing.assert_close(loaded.reconstruct(images(4)), vae.reconstruct(images(4)), rtol=0, atol=0)


def test_an_instance_of_ones_own_must_be_passed_again(tmp_path):
    path = fitted(tmp_path, small(encoder=OwnEncoder(SHAPE, 3)))
    with pytest.raises(ValueError, match=r"`encoder` was given as an instance of .*OwnEncoder.*encoder=\.\.\."):
        VAE.load_from_checkpoint(path, weights_only=True)
    loaded = VAE.load_from_checkpoint(path, weights_only=True, encoder=OwnEncoder(SHAPE, 3))
    assert loaded.sample(2).shape == (2, *SHAPE)


def test_a_checkpoint_can_name_networks_only(tmp_path):
    path = fitted(tmp_path, small())
    checkpoint = torch.load(path, weights_only=True)
    for name in ("os.system", "nowhere.Encoder", "lightning_vae.networks.Missing", "builtins.print"):
        checkpoint["hyper_parameters"]["encoder"] = {"class_path": name, "init_args": {}}
        torch.save(checkpoint, path)
        with pytest.raises(ValueError, match="`encoder`"):
            VAE.load_from_checkpoint(path, weights_only=True)


def test_parts_that_are_no_network_are_refused():
    with pytest.raises(TypeError, match=r"`encoder` must be an nn.Module, or a class or callable that makes one"):
        small(encoder=lambda shape, latent_dim: 3)
    with pytest.raises(TypeError, match="`decoder`"):
        small(decoder="mlp")


def test_a_subclass_with_arguments_of_its_own_loads(tmp_path):
    path = fitted(tmp_path, Subclass(width=7))
    assert Subclass.load_from_checkpoint(path, weights_only=True).hparams["width"] == 7


class Subclass(VAE):
    def __init__(self, width=5, shape=SHAPE, levels=LEVELS):
        super().__init__(shape, levels, encoder=functools.partial(MLPEncoder, hidden=(width,)))


# ---- checkpoints of a stranger


class Code:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def saved(path, **hyper_parameters):
    vae = VAE((2,), latent_dim=1)
    torch.save(
        {
            "state_dict": vae.state_dict(),
            "pytorch-lightning_version": "2.6.0",
            "hyper_parameters": {**vae.hparams, "_instantiator": "lightning.pytorch.cli.instantiate_module",
                                 "_class_path": "lightning_vae.VAE", **hyper_parameters},
        },
        path,
    )  # fmt: skip
    return path


def test_code_in_a_checkpoint_does_not_run(tmp_path):
    path = saved(tmp_path / "x.ckpt", other=Code(str(tmp_path / "ran")))
    with pytest.raises(pickle.UnpicklingError):
        VAE.load_from_checkpoint(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("part", ["encoder", "decoder", "likelihood"])
def test_what_a_checkpoint_names_is_called_only_if_it_is_a_network(tmp_path, part):
    command = {"class_path": "os.system", "init_args": {"command": f"touch {tmp_path / 'ran'}"}}
    with pytest.raises(ValueError, match=f"`{part}.*must name a subclass of torch.nn.Module, got 'os.system'"):
        VAE.load_from_checkpoint(saved(tmp_path / "x.ckpt", **{part: command}))
    assert not (tmp_path / "ran").exists()
