import gzip
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_vae.datamodules import KMNIST, MNIST, FashionMNIST
from lightning_vae.datamodules.mnist import read_idx
from tests.datamodules.doubles import ready, splits


def write_idx(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def write_mnist(folder: Path, suffix: str) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    images = {}
    for part, size in (("train", 30), ("t10k", 8)):
        images[part] = rng.integers(0, 256, (size, 28, 28), dtype=np.uint8)
        write_idx(folder / f"{part}-images-idx3-ubyte{suffix}", images[part])
        write_idx(folder / f"{part}-labels-idx1-ubyte{suffix}", np.arange(size, dtype=np.uint8) % 10)
    return images


@pytest.mark.usefixtures("_offline")
@pytest.mark.parametrize("folder", ["", "{name}/raw"])
@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("cls", [MNIST, FashionMNIST, KMNIST])
def test_the_mnist_family_reads_both_layouts(tmp_path, cls, suffix, folder):
    images = write_mnist(tmp_path / folder.format(name=cls.__name__), suffix)
    train, val, test = splits(ready(cls(tmp_path, val_fraction=0.2)))
    assert [len(split["x"]) for split in (train, val, test)] == [24, 6, 8]
    assert test["x"].dtype == torch.uint8
    assert test["x"].shape == (8, *cls.shape)
    np.testing.assert_array_equal(test["x"][:, 0], images["t10k"])
    assert test["label"].tolist() == list(range(8))
    together = torch.cat([train["x"], val["x"]]).flatten(1).tolist()
    assert sorted(together) == sorted(images["train"].reshape(30, -1).tolist())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-1], "t10k-images-idx3-ubyte is not a complete IDX file"),
        (lambda data: b"\0\0\x0d" + data[3:], "not a complete IDX file of unsigned bytes"),
        (lambda data: b"", "not a complete IDX file"),
    ],
)
def test_a_damaged_idx_file_is_named(tmp_path, damage, message):
    write_mnist(tmp_path, "")
    path = tmp_path / "t10k-images-idx3-ubyte"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=message):
        ready(MNIST(tmp_path), "test")


def test_a_cut_gzip_file_is_named(tmp_path):
    write_mnist(tmp_path, ".gz")
    path = tmp_path / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"t10k-images-idx3-ubyte\.gz can't be unpacked"):
        ready(MNIST(tmp_path), "test")


def test_setup_without_files_is_an_error_too(tmp_path):
    with pytest.raises(FileNotFoundError, match="MNIST was not found"):
        MNIST(tmp_path).setup("fit")


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


def test_a_root_below_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_mnist(tmp_path / "mnist", "")
    assert len(ready(MNIST("~/mnist", download=False), "test").test_dataloader()) == 1


def test_a_checkpoint_knows_the_test_images(tmp_path):
    write_mnist(tmp_path, "")
    state = ready(MNIST(tmp_path), "fit").state_dict()
    ready(MNIST(tmp_path, seed=1, val_fraction=0.5), "test").load_state_dict({"fingerprint": state["fingerprint"]})
    write_idx(tmp_path / "t10k-images-idx3-ubyte", np.zeros((8, 28, 28), dtype=np.uint8))
    with pytest.warns(UserWarning, match="trained on other data: test has other observations"):
        ready(MNIST(tmp_path), "test").load_state_dict(state)
