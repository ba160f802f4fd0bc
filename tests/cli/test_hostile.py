"""Checkpoints and data that are broken on purpose."""

import gzip
import os
import pickle
import struct
import tracemalloc

import pytest
import torch
from PIL import Image

from lightning_vae import VAE
from lightning_vae.datamodules import TensorLoader
from lightning_vae.datamodules.loaders.image_files import find_images, read_image
from lightning_vae.datamodules.mnist import read_idx


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


@pytest.mark.parametrize("shape", [(2**32 - 1,) * 3, (2**32 - 1,) * 255, (10, 28, 28), (0, 28, 28)])
def test_an_idx_header_that_lies_costs_nothing(tmp_path, shape):
    header = b"\0\0\x08" + bytes([len(shape)]) + struct.pack(f">{len(shape)}I", *shape)
    (tmp_path / "plain").write_bytes(header + b"x")
    with gzip.open(tmp_path / "bomb.gz", "wb") as file:
        file.write(header + bytes(2**25))
    tracemalloc.start()
    for name in ("plain", "bomb.gz"):
        with pytest.raises(ValueError, match=f"{name} is not a complete IDX file"):
            read_idx(tmp_path / name)
    assert tracemalloc.get_traced_memory()[1] < 2**21
    tracemalloc.stop()


def test_pipes_and_huge_images_are_named(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(ValueError, match=r"pipe\.png is not a regular file"):
        read_image(tmp_path / "pipe.png", (3, 8, 8))
    Image.new("1", (20000, 20000)).save(tmp_path / "huge.png")
    with pytest.raises(ValueError, match=r"huge\.png can't be read.*exceeds limit"):
        read_image(tmp_path / "huge.png", (3, 8, 8))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_data_that_are_not_finite_are_named(value):
    x = torch.zeros(5, 2)
    x[3, 1] = value
    with pytest.raises(ValueError, match="in 1 of 5 observations, first in number 3"):
        TensorLoader({"x": x}, 2)


def test_a_folder_that_cannot_be_read_is_named_and_not_passed_over(tmp_path, monkeypatch):
    for name in "ab":
        (tmp_path / name).mkdir()
        Image.new("L", (8, 8)).save(tmp_path / name / "0.png")
    scandir = os.scandir

    def refusing(path):  # root may read everything
        if os.path.basename(path) == "b":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    assert len(find_images(tmp_path)) == 2
    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(PermissionError, match=r"b can't be read \(Permission denied\)"):
        find_images(tmp_path)
