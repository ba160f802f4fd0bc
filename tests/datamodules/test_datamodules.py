import gzip
import math
import struct
from pathlib import Path
from unittest.mock import Mock
from urllib.error import URLError

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torchvision
from jsonargparse import ArgumentParser
from PIL import Image

from lightning_vae.datamodules import (
    CIFAR10,
    KMNIST,
    MNIST,
    SVHN,
    DataModule,
    Digits,
    FashionMNIST,
    Gaussian,
    Images,
    Omniglot,
    StreamLoader,
    TensorLoader,
    linear_vae_optimum,
)

SPECTRUM = (5.0, 3.0, 1.5, 0.8, 0.3, 0.1)


def whole(loader) -> dict[str, torch.Tensor]:
    batches = list(loader)
    return {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}


def ready(datamodule: DataModule, *stages: str):
    datamodule.prepare_data()
    for stage in stages or ("fit", "validate", "test", "predict"):
        datamodule.setup(stage)
    return datamodule


def splits(datamodule: DataModule) -> list[dict[str, torch.Tensor]]:
    loaders = (datamodule.train_dataloader(), datamodule.val_dataloader(), datamodule.test_dataloader())
    return [whole(loader) for loader in loaders]


# Digits


def test_digits_hold_out_the_last_297_and_split_the_rest():
    from sklearn.datasets import load_digits

    train, val, test = splits(ready(Digits()))
    assert [len(split["x"]) for split in (train, val, test)] == [1350, 150, 297]
    images, labels = load_digits(return_X_y=True)
    torch.testing.assert_close(test["x"].flatten(1).double(), torch.from_numpy(images[1500:]))
    assert test["label"].tolist() == labels[1500:].tolist()
    # The other two are exactly the first 1500.
    together = torch.cat([train["x"], val["x"]]).flatten(1).double()
    assert sorted(together.tolist()) == sorted(images[:1500].tolist())
    assert train["x"].shape[1:] == Digits().shape
    assert train["x"].dtype == torch.uint8
    assert train["x"].max() == Digits().levels - 1
    assert train["label"].dtype == torch.int64


def test_the_split_is_fixed_by_the_seed():
    first, second, other = (whole(ready(Digits(seed=seed)).val_dataloader())["x"] for seed in (0, 0, 1))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_the_index_is_the_position_in_the_split():
    datamodule = ready(Digits(batch_size=2000))
    train, small = (whole(each.train_dataloader()) for each in (datamodule, ready(Digits(batch_size=7))))
    assert sorted(train["index"].tolist()) == list(range(1350))
    torch.testing.assert_close(train["x"][train["index"].argsort()], small["x"][small["index"].argsort()])
    for loader in (datamodule.val_dataloader(), datamodule.test_dataloader(), datamodule.predict_dataloader()):
        index = whole(loader)["index"]
        assert torch.equal(index, torch.arange(len(index)))


def test_each_stage_reads_what_it_needs_once(monkeypatch):
    datamodule = Digits()
    train, test = (Mock(wraps=read) for read in (datamodule._read_train, datamodule._read_test))
    monkeypatch.setattr(datamodule, "_read_train", train)
    monkeypatch.setattr(datamodule, "_read_test", test)
    for stage in ("fit", "validate", "fit"):
        datamodule.setup(stage)
    assert (train.call_count, test.call_count) == (1, 0)
    for stage in ("test", "predict", "test"):
        datamodule.setup(stage)
    assert (train.call_count, test.call_count) == (1, 1)


class Watcher(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.epochs: list[list[int]] = []
        self.stages: dict[str, int] = {}

    def on_train_epoch_start(self):
        self.epochs.append([])

    def training_step(self, batch):
        self.epochs[-1] += batch["index"].tolist()
        return self.weight * batch["x"].float().sum()

    def count(self, stage, batch):
        self.stages[stage] = self.stages.get(stage, 0) + len(batch["x"])

    def validation_step(self, batch):
        self.count("val", batch)

    def test_step(self, batch):
        self.count("test", batch)

    def predict_step(self, batch):
        self.count("predict", batch)
        return batch["index"]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def trainer(**options) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def test_a_trainer_uses_each_split_for_its_stage():
    run, watcher, digits = trainer(max_epochs=2, num_sanity_val_steps=0), Watcher(), Digits()
    run.fit(watcher, datamodule=digits)
    assert [sorted(epoch) for epoch in watcher.epochs] == [list(range(1350))] * 2
    assert watcher.epochs[0] != watcher.epochs[1]
    run.test(watcher, datamodule=digits, verbose=False)
    predictions = run.predict(watcher, datamodule=digits)
    assert [index for batch in predictions or [] for index in batch] == list(range(297))
    assert watcher.stages == {"val": 300, "test": 297, "predict": 297}


def test_a_reloaded_train_loader_goes_on_with_another_order():
    watcher = Watcher()
    trainer(max_epochs=3, limit_val_batches=0, reload_dataloaders_every_n_epochs=1).fit(watcher, datamodule=Digits())
    assert len({tuple(epoch) for epoch in watcher.epochs}) == 3


def test_overfitting_sees_the_same_batches_every_epoch():
    watcher = Watcher()
    trainer(max_epochs=2, overfit_batches=2).fit(watcher, datamodule=Digits(batch_size=16))
    assert watcher.epochs == [list(range(32))] * 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "`batch_size` must be at least 1, got 0"),
        ({"val_fraction": 0}, "`val_fraction` must be between 0 and 1, both excluded, got 0"),
        ({"val_fraction": 1.0}, "`val_fraction` must be between 0 and 1, both excluded, got 1.0"),
    ],
)
def test_digits_errors(options, message):
    with pytest.raises(ValueError, match=message):
        Digits(**options)


def test_a_split_without_observations_is_an_error():
    with pytest.raises(ValueError, match=r"`val_fraction` must leave observations on both sides, got 0\.0001 of 1500"):
        Digits(val_fraction=1e-4).setup("fit")


# The MNIST family


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


@pytest.fixture
def _offline(monkeypatch):
    def fail(*_, **__):
        raise URLError("Name or service not known")

    for module in (torchvision.datasets.mnist, torchvision.datasets.cifar, torchvision.datasets.omniglot):
        monkeypatch.setattr(module, "download_and_extract_archive", fail)
    monkeypatch.setattr(torchvision.datasets.svhn, "download_url", fail)


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
        (lambda data: data[:-1], "t10k-images-idx3-ubyte is no complete IDX file"),
        (lambda data: b"\0\0\x0d" + data[3:], "no complete IDX file of unsigned bytes"),
        (lambda data: b"", "no complete IDX file"),
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


# Downloads


@pytest.mark.usefixtures("_offline")
@pytest.mark.parametrize(
    ("cls", "layout"),
    [
        (MNIST, "train-images-idx3-ubyte"),
        (FashionMNIST, "FashionMNIST/raw"),
        (KMNIST, "KMNIST/raw"),
        (CIFAR10, "cifar-10-batches-py"),
        (SVHN, "test_32x32.mat"),
        (Omniglot, "images_evaluation"),
    ],
)
def test_a_failed_or_unwanted_download_says_what_to_put_where(tmp_path, cls, layout):
    with pytest.raises(FileNotFoundError, match="its download failed") as failed:
        cls(tmp_path / "data").prepare_data()
    assert layout in str(failed.value)
    assert str(tmp_path) in str(failed.value)
    assert "Name or service not known" in str(failed.value)
    with pytest.raises(FileNotFoundError, match="`download` is off") as unwanted:
        cls(tmp_path / "other", download=False).prepare_data()
    assert layout in str(unwanted.value)
    assert not (tmp_path / "other").exists()


def test_setup_without_files_is_an_error_too(tmp_path):
    with pytest.raises(FileNotFoundError, match="MNIST was not found"):
        MNIST(tmp_path).setup("fit")


# CIFAR-10, SVHN and Omniglot, with torchvision's readers replaced where they check the official files' hashes


def test_cifar10(tmp_path, monkeypatch):
    import pickle

    rng = np.random.default_rng(0)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    data = {}
    for name in [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]:
        data[name] = rng.integers(0, 256, (4, 3072), dtype=np.uint8)
        (folder / name).write_bytes(pickle.dumps({"data": data[name], "labels": [3, 1, 4, 1]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": ["cat"]}))
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *_: True)
    train, val, test = splits(ready(CIFAR10(tmp_path)))
    assert [len(split["x"]) for split in (train, val, test)] == [18, 2, 4]
    np.testing.assert_array_equal(test["x"], data["test_batch"].reshape(4, 3, 32, 32))
    assert test["label"].tolist() == [3, 1, 4, 1]


def test_svhn(tmp_path, monkeypatch):
    from scipy.io import savemat  # type: ignore[import-untyped]

    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (32, 32, 3, 10), dtype=np.uint8)
    for split in ("train", "test"):
        savemat(tmp_path / f"{split}_32x32.mat", {"X": images, "y": np.arange(1, 11)[:, None]})
    monkeypatch.setattr(torchvision.datasets.svhn, "check_integrity", lambda *_: True)
    train, val, test = splits(ready(SVHN(tmp_path)))
    assert [len(split["x"]) for split in (train, val, test)] == [9, 1, 10]
    np.testing.assert_array_equal(test["x"], images.transpose(3, 2, 0, 1))
    assert test["label"].tolist() == [*range(1, 10), 0]


def test_omniglot_is_small_and_white_on_black(tmp_path):
    for part, characters in (("background", 3), ("evaluation", 2)):
        for number in range(characters):
            folder = tmp_path / "omniglot-py" / f"images_{part}" / "Alphabet" / f"character{number}"
            folder.mkdir(parents=True)
            for drawing in range(4):
                image = Image.new("1", (105, 105), 1)
                image.paste(0, (40, 40, 66, 66))
                image.save(folder / f"{drawing}.png")
    train, val, test = splits(ready(Omniglot(tmp_path, val_fraction=0.25)))
    assert [len(split["x"]) for split in (train, val, test)] == [9, 3, 8]
    assert test["x"].shape == (8, 1, 28, 28)
    assert test["label"].tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert test["x"][0, 0, 0, 0] == 0
    assert test["x"][0, 0, 14, 14] == 255


# One's own images


def save(path: Path, size: tuple[int, int] = (6, 6), colour=(200, 100, 50), mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).convert(mode).save(path)


def folder_of(root: Path, count: int = 20) -> Path:
    for number in range(count):
        save(root / f"{number:02}.png", colour=(number, 0, 0))
    return root


def test_a_flat_folder_is_split_and_sorted(tmp_path):
    datamodule = ready(Images(folder_of(tmp_path), size=6))
    assert datamodule.shape == (3, 6, 6)
    assert datamodule.levels == 256
    train, val, test = splits(datamodule)
    assert [len(split["x"]) for split in (train, val, test)] == [16, 2, 2]
    assert "label" not in train
    reds = [split["x"][split["index"].argsort(), 0, 0, 0].tolist() for split in (train, val, test)]
    assert sorted(red for split in reds for red in split) == list(range(20))
    assert all(red == sorted(red) for red in reds)
    again = splits(ready(Images(tmp_path, size=6)))
    assert torch.equal(again[1]["x"], val["x"])


def test_class_folders_give_labels(tmp_path):
    for label, name in enumerate(("cat", "dog")):
        for number in range(10):
            save(tmp_path / name / "deep" / f"{number}.PNG", colour=(label, 0, 0))
    save(tmp_path / ".hidden" / "thumbnail.png")
    (tmp_path / "notes.txt").write_text("no image")
    for split in splits(ready(Images(tmp_path, size=6))):
        assert split["label"].dtype == torch.int64
        assert torch.equal(split["label"], split["x"][:, 0, 0, 0].long())


def test_a_test_root_keeps_all_images_of_root_for_training(tmp_path):
    folder_of(tmp_path / "train" / "cat", 10)
    folder_of(tmp_path / "train" / "dog", 10)
    folder_of(tmp_path / "test" / "dog", 4)
    options = {"size": 6, "test_root": tmp_path / "test"}
    train, val, test = splits(ready(Images(tmp_path / "train", **options)))
    assert [len(split["x"]) for split in (train, val, test)] == [18, 2, 4]
    assert test["label"].tolist() == [1, 1, 1, 1]
    folder_of(tmp_path / "test" / "horse", 1)
    with pytest.raises(ValueError, match=r"`test_root` must be laid out like `root`.*'cat', 'dog'.*'horse'"):
        Images(tmp_path / "train", **options).setup("fit")
    with pytest.raises(ValueError, match=r"`test_root` must be laid out like `root`.*got none"):
        Images(tmp_path / "train", size=6, test_root=folder_of(tmp_path / "flat")).setup("fit")


def test_mixed_sizes_are_covered_and_cropped_in_the_centre(tmp_path):
    for number in range(8):
        image = Image.new("RGB", (40, 10), (255, 0, 0))  # a red strip with a green middle
        image.paste((0, 255, 0), (10, 0, 30, 10))
        image.save(tmp_path / f"wide{number}.png")
        image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / f"tall{number}.png")
        save(tmp_path / f"small{number}.png", (3, 4), (0, 255, 0))
    for split in splits(ready(Images(tmp_path, size=(8, 8)))):
        assert split["x"].shape[1:] == (3, 8, 8)
        assert (split["x"][:, 1] == 255).all()
        assert (split["x"][:, 0] == 0).all()


def test_height_comes_before_width(tmp_path):
    for number in range(8):
        image = Image.new("L", (4, 2), number)
        image.putpixel((3, 0), 255)
        image.save(tmp_path / f"{number}.png")
    datamodule = ready(Images(tmp_path, size=(2, 4), channels=1, val_fraction=0.3, test_fraction=0.3))
    assert datamodule.shape == (1, 2, 4)
    assert (whole(datamodule.train_dataloader())["x"][:, 0, 0, 3] == 255).all()


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "LA", "1", "CMYK"])
@pytest.mark.parametrize("channels", [1, 3])
def test_any_mode_becomes_grey_or_colour(tmp_path, mode, channels):
    suffix = "tif" if mode == "CMYK" else "png"
    for number in range(8):
        save(tmp_path / f"{number}.{suffix}", colour=(255, 255, 255), mode=mode)
    train = whole(ready(Images(tmp_path, size=6, channels=channels), "fit").train_dataloader())
    assert train["x"].shape[1:] == (channels, 6, 6)
    assert (train["x"] == 255).all()


def test_a_palette_with_transparency_reads_without_a_warning(tmp_path):
    for number in range(8):
        image = Image.new("P", (6, 6), 1)
        image.putpalette([0, 0, 0, 10, 20, 30])
        image.save(tmp_path / f"{number}.png", transparency=bytes([0, 128]))
    train = whole(ready(Images(tmp_path, size=6), "fit").train_dataloader())
    assert train["x"][0, :, 0, 0].tolist() == [10, 20, 30]


def test_photographs_are_turned_as_their_exif_says(tmp_path):
    for number in range(8):
        image = Image.new("RGB", (16, 16))
        image.paste((255, 255, 255), (0, 0, 16, 8))  # white above, black below
        exif = Image.Exif()
        exif[0x0112] = 3  # turned by 180 degrees
        image.save(tmp_path / f"{number}.jpg", exif=exif)
    train = whole(ready(Images(tmp_path, size=16, channels=1), "fit").train_dataloader())
    assert train["x"][0, 0, 2].max() < 50
    assert train["x"][0, 0, 13].min() > 200


@pytest.mark.parametrize("flip", [False, True])
def test_only_training_images_are_flipped(tmp_path, flip):
    for number in range(40):
        image = Image.new("L", (2, 1), number)
        image.putpixel((0, 0), 255)
        image.save(tmp_path / f"{number:02}.png")
    datamodule = ready(Images(tmp_path, size=(1, 2), channels=1, flip=flip))
    train, val, test = splits(datamodule)
    assert (val["x"][..., 0] == 255).all()
    assert (test["x"][..., 0] == 255).all()
    flipped = (train["x"][..., 0] != 255).sum()
    assert 8 <= flipped <= 24 if flip else flipped == 0


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")  # Python 3.12's, about any fork
def test_streaming_equals_in_memory(tmp_path, num_workers):
    for number in range(12):
        save(tmp_path / ("cat" if number % 2 else "dog") / f"{number}.png", (6 + number, 9), (number, 9, 99))
    options = {"size": 5, "flip": True, "batch_size": 4, "num_workers": num_workers}
    in_memory = ready(Images(tmp_path, **options))
    streamed = ready(Images(tmp_path, memory_budget=0, **options))
    assert isinstance(in_memory.train_dataloader(), TensorLoader)
    assert isinstance(streamed.train_dataloader(), StreamLoader)
    for left, right in zip(splits(in_memory), splits(streamed), strict=True):
        assert left.keys() == right.keys() == {"x", "label", "index"}
        assert all(torch.equal(left[key], right[key]) and left[key].dtype == right[key].dtype for key in left)


def test_the_memory_budget_counts_all_splits(tmp_path):
    size = 20 * 3 * 6 * 6
    folder_of(tmp_path)
    for budget, loader in ((size, TensorLoader), (size - 1, StreamLoader)):
        datamodule = ready(Images(tmp_path, size=6, memory_budget=budget / 2**30))
        assert type(datamodule.val_dataloader()) is loader


def test_streaming_trains_without_a_warning(tmp_path):
    watcher = Watcher()
    datamodule = Images(folder_of(tmp_path), size=6, memory_budget=0, num_workers=0, batch_size=4)
    trainer(max_epochs=2).fit(watcher, datamodule=datamodule)
    assert [sorted(epoch) for epoch in watcher.epochs] == [list(range(16))] * 2


@pytest.mark.parametrize("budget", [0, 1])
def test_an_unreadable_image_is_named(tmp_path, budget):
    folder_of(tmp_path)
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(ValueError, match=r"\d\d\.png can't be read as an image.*Repair or remove it"):
        list(ready(Images(tmp_path, size=6, memory_budget=budget, num_workers=0), "fit").train_dataloader())


def test_deep_colour_is_refused(tmp_path):
    for number in range(8):
        Image.fromarray(np.full((6, 6), 40000, dtype=np.uint16)).save(tmp_path / f"{number}.png")
    with pytest.raises(ValueError, match="more than 8 bits per channel"):
        Images(tmp_path, size=6).setup("fit")


def test_images_layout_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"There is no folder .*nowhere"):
        Images(tmp_path / "nowhere", size=6).setup("fit")
    with pytest.raises(FileNotFoundError, match="has no images"):
        Images(tmp_path, size=6).setup("fit")
    folder_of(tmp_path)
    save(tmp_path / "cat" / "0.png")
    with pytest.raises(ValueError, match="images beside folders of images"):
        Images(tmp_path, size=6).setup("fit")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "`size` must be at least 1, got 0"),
        ({"size": (4, -1)}, r"`size` must be at least 1, got \(4, -1\)"),
        ({"channels": 4}, r"`channels` must be 1 \(grey\) or 3 \(colour\), got 4"),
        ({"memory_budget": -1}, "`memory_budget` must be at least 0 GiB, got -1"),
        ({"num_workers": -1}, "`num_workers` must be at least 0, got -1"),
        ({"val_fraction": 2}, "`val_fraction` must be between"),
        ({"test_fraction": 0}, "`test_fraction` must be between"),
    ],
)
def test_images_errors(options, message):
    with pytest.raises(ValueError, match=message):
        Images("folder", **{"size": 4, **options})


# The linear-Gaussian set and the linear VAE's optimum


def test_every_gaussian_split_has_the_exact_moments():
    datamodule = ready(Gaussian(size=500))
    assert datamodule.shape == (6,)
    assert datamodule.levels is None
    covariances = []
    for split in splits(datamodule):
        x = split["x"].double()
        assert split["x"].dtype == torch.float32
        torch.testing.assert_close(x.mean(dim=0), torch.zeros(6).double(), atol=1e-7, rtol=0)
        covariances.append(x.T @ x / len(x))
        expected = torch.tensor(SPECTRUM).double().flip(0)
        torch.testing.assert_close(torch.linalg.eigvalsh(covariances[-1]), expected, atol=1e-6, rtol=0)
        torch.testing.assert_close(covariances[-1], covariances[0], atol=1e-6, rtol=0)
    assert covariances[0].fill_diagonal_(0).abs().max() > 0.1  # rotated
    train, val, test = (split["x"] for split in splits(datamodule))
    assert not torch.equal(val, test)
    assert not any(torch.equal(train[0], row) for row in val)
    assert torch.equal(whole(ready(Gaussian(size=500)).val_dataloader())["x"], val)
    assert not torch.equal(whole(ready(Gaussian(size=500, seed=1)).val_dataloader())["x"], val)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eigenvalues": ()}, r"`eigenvalues` must be one or more positive numbers, got \[\]"),
        ({"eigenvalues": (1.0, 0.0)}, "`eigenvalues` must be one or more positive numbers"),
        ({"size": 6}, r"`size` must be greater than the number of eigenvalues \(6\), got 6"),
    ],
)
def test_gaussian_errors(options, message):
    with pytest.raises(ValueError, match=message):
        Gaussian(**options)


@pytest.mark.parametrize(
    ("beta", "active", "loss", "rate", "squared_error", "variances"),
    [
        (0.5, 4, 6.59679, 4.6641, 1.2, (0.96, 0.9333, 0.8667, 0.75)),
        (1, 4, 8.54253, 3.2778, 2.0, (0.92, 0.8667, 0.7333, 0.5)),
        (2, 3, 11.04770, 1.8915, 3.6, (0.84, 0.7333, 0.4667, 0)),
        (4, 2, 13.67584, 0.8840, 5.9, (0.68, 0.4667, 0, 0)),
    ],
)
def test_linear_vae_optimum(beta, active, loss, rate, squared_error, variances):
    optimum = linear_vae_optimum(SPECTRUM[::-1], latent_dim=4, variance=0.4, beta=beta)
    assert optimum.active_units == active
    assert optimum.loss == pytest.approx(loss, abs=1e-5)
    assert optimum.rate == pytest.approx(rate, abs=1e-4)
    assert optimum.squared_error == pytest.approx(squared_error)
    assert optimum.posterior_mean_variance == pytest.approx(variances, abs=1e-4)
    assert optimum.loss == pytest.approx(optimum.distortion + beta * optimum.rate)
    assert sum(optimum.rate_per_dimension) == pytest.approx(optimum.rate)


def test_a_collapsed_linear_vae_leaves_all_of_the_variance():
    for eigenvalue in (number / 100 for number in range(1, 100)):
        assert linear_vae_optimum((eigenvalue,), latent_dim=1, variance=1.0).squared_error == pytest.approx(eigenvalue)


def test_linear_vae_optimum_is_the_exact_likelihood_at_beta_one():
    datamodule = ready(Gaussian(size=64), "fit")
    x = whole(datamodule.val_dataloader())["x"].double()
    eigenvalues, directions = torch.linalg.eigh(x.T @ x / len(x))
    weights = directions[:, -4:] * (eigenvalues[-4:] - 0.4).sqrt()
    density = torch.distributions.MultivariateNormal(
        torch.zeros(6).double(), weights @ weights.T + 0.4 * torch.eye(6).double()
    )
    optimum = linear_vae_optimum(SPECTRUM, latent_dim=4, variance=0.4)
    assert optimum.loss == pytest.approx(-density.log_prob(x).mean().item(), abs=1e-6)


def test_more_latents_than_dimensions_stay_at_the_prior():
    optimum = linear_vae_optimum((2.0, 1.0), latent_dim=3, variance=0.5)
    assert optimum.rate_per_dimension == pytest.approx((math.log(4) / 2, math.log(2) / 2, 0))
    assert optimum.squared_error == pytest.approx(1.0)


def minimised(eigenvalues, latent_dim, variance, beta, free_bits) -> tuple[float, list[float]]:
    """Minimise the loss over encoder and posterior variance, with the best decoder for each, from 16 starts."""
    generator = torch.Generator().manual_seed(0)
    covariance = torch.diag(torch.tensor(eigenvalues, dtype=torch.float64))
    spread = torch.logspace(-1.5, 0.3, 16, dtype=torch.float64).view(-1, 1, 1)
    encoder = torch.randn(16, latent_dim, len(covariance), dtype=torch.float64, generator=generator) * spread
    log_variance = -2 * torch.rand(16, latent_dim, dtype=torch.float64, generator=generator)
    optimizer = torch.optim.Adam([encoder.requires_grad_(), log_variance.requires_grad_()])
    steps = 700
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.08 * (1 - step / steps) ** 2
        of_means = encoder @ covariance @ encoder.mT
        cross = covariance @ encoder.mT
        explained = torch.linalg.solve(of_means + torch.diag_embed(log_variance.exp()), cross.mT)
        squared_error = covariance.trace() - (cross * explained.mT).sum((1, 2))
        rates = 0.5 * (of_means.diagonal(dim1=1, dim2=2) + log_variance.exp() - 1 - log_variance)
        distortion = len(covariance) / 2 * math.log(2 * math.pi * variance) + squared_error / (2 * variance)
        loss = distortion + beta * rates.clamp(min=free_bits).sum(dim=1)
        optimizer.zero_grad()
        loss.sum().backward()
        optimizer.step()
    best = loss.argmin()
    return loss[best].item(), sorted(rates[best].tolist(), reverse=True)


@pytest.mark.parametrize(
    ("eigenvalues", "latent_dim", "beta", "free_bits", "rates"),
    [
        (SPECTRUM, 4, 1.0, 0.5, (1.2629, 1.0075, 0.6609, 0.5)),  # one at the floor: a direction each
        (SPECTRUM, 4, 2.5, 0.25, (0.8047, 0.5493, 0.25, 0.25)),  # two share two directions
        (SPECTRUM, 4, 2.5, 0.5, (0.5, 0.5, 0.5, 0.5)),  # a first dimension above the floor doesn't pay
        ((5.161, 1.692, 1.397, 0.921), 5, 0.4, 0.2, (1.737, 1.179, 1.083, 0.776, 0.2)),  # the last above it shares
    ],
)
def test_linear_vae_optimum_with_free_bits_is_the_numerical_minimum(eigenvalues, latent_dim, beta, free_bits, rates):
    optimum = linear_vae_optimum(eigenvalues, latent_dim, variance=0.4, beta=beta, free_bits=free_bits)
    assert optimum.rate_per_dimension == pytest.approx(rates, abs=1e-3)
    loss, found = minimised(eigenvalues, latent_dim, 0.4, beta, free_bits)
    assert loss == pytest.approx(optimum.loss, abs=2e-4)
    assert found == pytest.approx(optimum.rate_per_dimension, abs=0.01)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eigenvalues": (1.0, -1.0)}, r"`eigenvalues` must be one or more positive numbers, got \[1.0, -1.0\]"),
        ({"latent_dim": 0}, "`latent_dim` must be at least 1, got 0"),
        ({"variance": 0}, "`variance` must be positive, got 0"),
        ({"beta": -1}, "`beta` must be positive, got -1"),
        ({"free_bits": -0.5}, "`free_bits` must be at least 0, got -0.5"),
    ],
)
def test_linear_vae_optimum_errors(options, message):
    with pytest.raises(ValueError, match=message):
        linear_vae_optimum(**{"eigenvalues": SPECTRUM, "latent_dim": 4, "variance": 0.4, **options})


# The command line


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # jsonargparse 4.53 renames a method
@pytest.mark.parametrize(
    ("arguments", "shape"),
    [
        (["--data=Digits"], (1, 8, 8)),
        (["--data=FashionMNIST", "--data.root=somewhere"], (1, 28, 28)),
        (["--data=Images", "--data.root=photos", "--data.size=[33,50]", "--data.channels=1"], (1, 33, 50)),
        (["--data=Images", "--data.root=photos", "--data.size=64"], (3, 64, 64)),
        (["--data=Gaussian", "--data.eigenvalues=[2,1,1]"], (3,)),
    ],
)
def test_short_names_on_the_command_line(arguments, shape):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(DataModule, "data")
    assert parser.instantiate_classes(parser.parse_args(arguments)).data.shape == shape
