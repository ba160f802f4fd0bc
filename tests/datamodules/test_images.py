from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_vae.datamodules import Images, StreamLoader, TensorLoader
from tests.datamodules.doubles import Watcher, ready, splits, trainer, whole


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
