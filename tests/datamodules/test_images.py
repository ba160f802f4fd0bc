import logging
import os
import re
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_vae.datamodules import DataError, Images, StreamLoader, TensorLoader
from tests.datamodules.doubles import Watcher, ready, splits, trainer, whole


def save(path: Path, size: tuple[int, int] = (6, 6), colour=(200, 100, 50), mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).convert(mode).save(path)


FRACTIONS = {"val_fraction": 0.3, "test_fraction": 0.3}  # of a few images, so that no split is empty


def folder_of(root: Path, count: int = 20) -> Path:
    for number in range(count):
        save(root / f"{number:02}.png", colour=(number, 0, 0))
    return root


def test_a_flat_folder_is_split_and_sorted(tmp_path):
    datamodule = ready(Images(folder_of(tmp_path), size=6))
    assert datamodule.shape == (3, 6, 6)
    assert datamodule.levels == 256
    train, val, test = splits(datamodule)
    assert [len(split["x"]) for split in (train, val, test)] == [18, 1, 1]
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
    for number in range(20):
        save(tmp_path / f"{number}.{suffix}", colour=(255, 255, 255), mode=mode)
    train = whole(ready(Images(tmp_path, size=6, channels=channels, **FRACTIONS), "fit").train_dataloader())
    assert train["x"].shape[1:] == (channels, 6, 6)
    assert (train["x"] == 255).all()


def test_a_palette_with_transparency_reads_without_a_warning(tmp_path):
    for number in range(8):
        image = Image.new("P", (6, 6), 1)
        image.putpalette([0, 0, 0, 10, 20, 30])
        image.save(tmp_path / f"{number}.png", transparency=bytes([0, 128]))
    train = whole(ready(Images(tmp_path, size=6), "fit").train_dataloader())
    assert train["x"][0, :, 0, 0].tolist() == [132, 137, 142]  # half of it is the white background


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
    options = {"size": 5, "flip": True, "batch_size": 4, "num_workers": num_workers, **FRACTIONS}
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
    assert [sorted(epoch) for epoch in watcher.epochs] == [list(range(18))] * 2


@pytest.mark.parametrize("budget", [0, 1])
def test_unreadable_images_are_named_up_to_a_hundred(tmp_path, budget):
    folder_of(tmp_path, 120)
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(DataError, match=r"120 of 120 .*Repair or remove them.*`skip_broken`") as error:
        ready(Images(tmp_path, size=6, memory_budget=budget, num_workers=0), "fit")
    [_, *lines] = str(error.value).splitlines()
    assert len(lines) == 101
    assert all(re.fullmatch(r" +/\S*\d+\.png can't be read as an image \(.*\)", line) for line in lines[:100])
    assert lines[-1].strip() == "and 20 more"


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
        ({"background": "nocolour"}, "`background` must be a colour"),
        ({"test_fraction": 0}, "`test_fraction` must be between"),
    ],
)
def test_images_errors(options, message):
    with pytest.raises(ValueError, match=message):
        Images("folder", **{"size": 4, **options})


@pytest.fixture
def said(caplog):
    """The text that `setup` prints."""
    caplog.set_level(logging.INFO)
    return lambda: caplog.text


def reds(datamodule: Images) -> list[set[int]]:
    return [set(split["x"][:, 0, 0, 0].tolist()) for split in splits(datamodule)]


def test_links_are_followed_and_circles_are_not(tmp_path, said):
    """Case `symlinked_class_folder`."""
    folder_of(tmp_path / "set" / "cat")
    folder_of(tmp_path / "elsewhere")
    save(tmp_path / "alone.png")
    (tmp_path / "set" / "dog").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set" / "cat" / "link.png").symlink_to(tmp_path / "alone.png")
    (tmp_path / "set" / "cat" / "circle").symlink_to(tmp_path / "set")
    (tmp_path / "set" / "bird").symlink_to(tmp_path / "nowhere")
    datamodule = ready(Images(tmp_path / "set", size=6))
    assert sum(len(split["x"]) for split in splits(datamodule)) == 41
    assert datamodule.class_names == ["cat", "dog"]
    assert "1 links in a circle" in said()
    assert "1 links that lead nowhere" in said()
    assert "Classes: cat (21), dog (20)." in said()


def test_what_is_passed_over_is_said_once(tmp_path, said):
    folder_of(tmp_path / "cat", 30)
    for name in ("a.txt", "b.TXT", "cat/.hidden.png", "README"):
        (tmp_path / name).write_text("")
    (tmp_path / "empty").mkdir()
    frames = [Image.new("L", (6, 6), grey) for grey in (0, 255)]
    frames[0].save(tmp_path / "cat" / "moving.gif", save_all=True, append_images=frames[1:])
    datamodule = ready(Images(tmp_path, size=6))
    [record] = [line for line in said().split("Images: ") if "observations" in line]
    for part in (
        f"Passed over, 2 ending in .txt: {tmp_path}/",
        f"Passed over, 1 hidden: {tmp_path}/cat/.hidden.png.",
        f"Passed over, 1 without a suffix: {tmp_path}/README.",
        f"Passed over, 1 files, from their second page or frame on: {tmp_path}/cat/moving.gif.",
    ):
        assert part in record
    assert "31 observations, " in record
    assert sum(map(len, datamodule._files.values())) == 31


def test_empty_class_folders_are_named(tmp_path, said):
    for folder in ("train/cat", "train/dog", "test/cat"):
        folder_of(tmp_path / folder)
    for folder in ("train/bird", "train/cat/old", "test/dog"):
        (tmp_path / folder).mkdir()
    (tmp_path / "train" / "bird" / "notes.txt").write_text("")
    ready(Images(tmp_path, size=6, **FRACTIONS))
    [line] = [line for line in said().splitlines() if "folders without images" in line]
    count, _, names = line.strip().partition(": ")
    assert count == "Passed over, 3 folders without images"
    expected = {str(tmp_path / folder) for folder in ("train/bird", "train/cat/old", "test/dog")}
    assert set(names.rstrip(".").split(", ")) == expected


def test_of_many_empty_class_folders_ten_are_named(tmp_path, said):
    folder_of(tmp_path / "cat")
    for number in range(14):
        (tmp_path / f"empty{number}").mkdir()
    ready(Images(tmp_path, size=6, **FRACTIONS))
    [line] = [line for line in said().splitlines() if "14 folders without images" in line]
    assert line.count("/empty") == 10
    assert line.endswith(" and 4 more.")


def test_the_folders_of_a_test_root_are_named_too(tmp_path, said):
    for folder in ("set", "held_out"):
        folder_of(tmp_path / folder / "cat")
        (tmp_path / folder / "dog").mkdir()
    ready(Images(tmp_path / "set", size=6, test_root=tmp_path / "held_out", val_fraction=0.3))
    assert f"2 folders without images: {tmp_path}/set/dog, {tmp_path}/held_out/dog." in said()


def test_one_more_image_moves_no_other(tmp_path):
    """Case `one_more_image_redeals_the_splits`."""
    folder_of(tmp_path, 60)
    before = reds(ready(Images(tmp_path, size=6)))
    save(tmp_path / "005.png", colour=(255, 0, 0))
    after = reds(ready(Images(tmp_path, size=6)))
    assert [one - {255} for one in after] == before
    assert before != reds(ready(Images(tmp_path, size=6, seed=1)))


def test_the_split_depends_on_the_path_below_the_root_alone(tmp_path):
    folder_of(tmp_path / "here", 40)
    here = ready(Images(tmp_path / "here", size=6))
    os.rename(tmp_path / "here", tmp_path / "there")
    assert reds(ready(Images(tmp_path / "there", size=6))) == reds(here)
    other_val = ready(Images(tmp_path / "there", size=6, val_fraction=0.4))
    assert reds(other_val)[2] == reds(here)[2]


def test_an_empty_split_says_what_to_do(tmp_path):
    with pytest.raises(ValueError, match=r"val and test would have none of the 2 .*`test_fraction` 0\.01.*folders"):
        ready(Images(folder_of(tmp_path, 2), size=6, val_fraction=0.01, test_fraction=0.01), "fit")


@pytest.mark.parametrize("classes", [("",), ("cat", "dog")])
@pytest.mark.parametrize("names", [("train", "val", "test"), ("Training", "validation", "Test")])
def test_folders_of_splits_are_used_as_splits(tmp_path, classes, names):
    """Case `folders_of_splits_taken_for_classes`."""
    for red, name in enumerate(names):
        for label, folder in enumerate(classes):
            for number in range(3):
                save(tmp_path / name / folder / f"{number}.png", colour=(red, label, 0))
    datamodule = ready(Images(tmp_path, size=6))
    assert reds(datamodule) == [{0}, {1}, {2}]
    assert list(datamodule.class_names) == [name for name in classes if name]
    for split in splits(datamodule):
        assert len(split["x"]) == 3 * len(classes)
        assert "label" not in split or torch.equal(split["label"], split["x"][:, 1, 0, 0].long())


def test_a_split_without_a_folder_is_taken_from_train(tmp_path):
    folder_of(tmp_path / "train", 40)
    for number in range(3):
        save(tmp_path / "test" / f"{number}.png", colour=(200, 0, 0))
    train, val, test = reds(ready(Images(tmp_path, size=6)))
    assert train | val == set(range(40))
    assert val
    assert test == {200}


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (("train", "test", "cat"), "has the folders cat, test, train.*are splits.*no other folder"),
        (("test", "val"), "must be one for train"),
        (("train", "val", "valid"), "at most one for each other split"),
        (("train/cat", "val/dog"), r"The folder val of `root` must be laid out like train.*'cat'.*'dog'"),
        (("train/cat", "train"), "images beside folders of images"),
        (("bottle/train", "bottle/test"), "bottle/test/.* lies in a folder test that is not directly below"),
        (("data/train", "data/val"), "lies in a folder train that is not directly below"),
        (("train/cat/Test", "val/cat"), "lies in a folder Test"),
        (("train2017", "val2017"), "has the folders train2017, val2017, which look like splits"),
        (("seg_pred", "seg_train", "seg_test"), "has the folders seg_test, seg_train, which look like splits"),
    ],
)
def test_folders_of_splits_are_never_classes_nor_mixed(tmp_path, folders, message):
    for folder in folders:
        folder_of(tmp_path / folder, 3)
    with pytest.raises(ValueError, match=message):
        ready(Images(tmp_path, size=6), "fit")


def test_two_sources_of_test_images_are_refused(tmp_path):
    for folder in ("train", "test", "other"):
        folder_of(tmp_path / "set" / folder if folder != "other" else tmp_path / folder, 3)
    with pytest.raises(ValueError, match=r"`test_root` is .*other, but `root` .*folder of test images too"):
        ready(Images(tmp_path / "set", size=6, test_root=tmp_path / "other"), "fit")


@pytest.mark.parametrize(("background", "colour"), [("white", [255, 255, 255]), ("#ff0010", [255, 0, 16])])
@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_put_on_the_background(tmp_path, said, background, colour, mode):
    """Case `transparent_drawings_are_black`."""
    for number in range(8):
        image = Image.new(mode, (6, 6), {"RGBA": (0, 0, 0, 0), "LA": (0, 0), "P": 0}[mode])
        image.save(tmp_path / f"{number}.png", **({"transparency": 0} if mode == "P" else {}))
    data = ready(Images(tmp_path, size=6, background=background, **FRACTIONS), "fit")
    assert whole(data.train_dataloader())["x"][0, :, 0, 0].tolist() == colour
    assert f"Images with transparency: 8, put on a background of {background}." in said()


@pytest.mark.parametrize("budget", [0, 1])
def test_all_broken_files_are_named_and_left_out_on_request(tmp_path, said, budget):
    """Case `broken_image_while_streaming`."""
    folder_of(tmp_path, 40)
    (tmp_path / "07.png").write_bytes(b"no image")
    (tmp_path / "08.png").write_bytes((tmp_path / "08.png").read_bytes()[:-25])  # its header is sound
    options = {"size": 6, "memory_budget": budget, "num_workers": 0}
    with pytest.raises(DataError, match=r"2 of 40 images can't be used.*\n.*07\.png can't.*\n.*08\.png can't"):
        ready(Images(tmp_path, **options), "fit")
    datamodule = ready(Images(tmp_path, skip_broken=True, **options))
    assert set.union(*reds(datamodule)) == set(range(40)) - {7, 8}
    assert re.search(r"Left out, 2:\n +\S*07\.png can't be read as an image \(.*\)\n +\S*08\.png can't", said())


@pytest.mark.parametrize("budget", [0, 1])
def test_a_broken_image_of_the_test_is_named_before_the_training(tmp_path, budget):
    for folder in ("train", "val", "test"):
        folder_of(tmp_path / folder, 3)
    path = tmp_path / "test" / "01.png"
    path.write_bytes(path.read_bytes()[:-25])  # its header is sound
    with pytest.raises(DataError, match=r"1 of 9 images can't be used.*\n.*test/01\.png can't be read"):
        Images(tmp_path, size=6, memory_budget=budget).setup("fit")


@pytest.mark.parametrize("skip_broken", [False, True])
def test_a_later_run_decodes_nothing_that_was_sound(tmp_path, skip_broken, monkeypatch):
    options = {"size": 6, "memory_budget": 0, "num_workers": 0, "skip_broken": skip_broken}
    before = ready(Images(folder_of(tmp_path), **options), "fit")

    def fail(_):
        raise AssertionError("decoded again")

    monkeypatch.setattr("lightning_vae.datamodules.loaders.decoded_images.inspect_image", fail)
    assert ready(Images(tmp_path, **options), "fit").state_dict() == before.state_dict()


def test_one_process_checks_the_images_for_all(tmp_path, said):
    first, other = (Images(folder_of(tmp_path), size=6, memory_budget=0) for _ in range(2))
    first.prepare_data()
    assert said().count("20 observations") == 1
    first.setup("fit")
    assert said().count("20 observations") == 1
    other.setup("fit")  # another process
    assert other.state_dict() == first.state_dict()


def test_a_fault_is_raised_in_setup_where_no_process_waits_for_another(tmp_path):
    (tmp_path / "0.png").write_bytes(b"no image")
    datamodule = Images(tmp_path, size=6)
    datamodule.prepare_data()
    with pytest.raises(DataError):
        datamodule.setup("fit")


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")  # Python 3.12's, about any fork
@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_fault_while_streaming_is_one_message(tmp_path, num_workers):
    folder_of(tmp_path)
    datamodule = ready(Images(tmp_path, size=6, memory_budget=0, num_workers=num_workers), "fit")
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[:-25])
    with pytest.raises(
        DataError, match=r"^/\S*\d\d\.png can't be read as an image \(.*\)\. Repair or remove it\.$"
    ) as error:
        list(datamodule.train_dataloader())
    assert "Traceback" not in str(error.value)


def test_each_row_has_the_name_of_its_file(tmp_path):
    for name in ("cat", "dog"):
        folder_of(tmp_path / name)
    datamodule = ready(Images(tmp_path, size=6), "predict")
    rows = whole(datamodule.predict_dataloader())
    names = datamodule.file_names("predict")
    for index, label, red in zip(rows["index"], rows["label"], rows["x"][:, 0, 0, 0], strict=True):
        assert names[index] == f"{datamodule.class_names[label]}/{red:02}.png"


def test_other_data_than_the_checkpoints_are_said(tmp_path):
    folder_of(tmp_path / "cat", 40)
    state = ready(Images(tmp_path, size=6), "fit").state_dict()
    ready(Images(tmp_path, size=6), "test").load_state_dict(state)  # warnings are errors
    with pytest.warns(UserWarning, match=r"other data: train has \d+ observations, had \d+"):
        ready(Images(tmp_path, size=6, test_fraction=0.4), "test").load_state_dict(state)
    with pytest.warns(UserWarning, match="other data: .* has other observations|has .* had"):
        ready(Images(tmp_path, size=6, seed=1), "test").load_state_dict(state)
    with pytest.warns(UserWarning, match="other data: shape: 3, 6, 6 -> 1, 6, 6"):
        ready(Images(tmp_path, size=6, channels=1), "test").load_state_dict(state)
    folder_of(tmp_path / "dog", 1)
    with pytest.warns(UserWarning, match="classes: cat -> cat, dog"):
        ready(Images(tmp_path, size=6), "test").load_state_dict(state)


@pytest.mark.parametrize(("mode", "changes"), [("RGB", False), ("RGBA", True)])
def test_another_background_is_said_where_there_is_transparency(tmp_path, mode, changes):
    for number in range(20):
        save(tmp_path / f"{number}.png", mode=mode)
    state = ready(Images(tmp_path, size=6, background="white"), "fit").state_dict()
    ready(Images(tmp_path, size=6, background="#FFFFFF"), "fit").load_state_dict(state)
    with pytest.warns(UserWarning, match="background: #ffffff -> #000000") if changes else nullcontext():
        ready(Images(tmp_path, size=6, background="black"), "fit").load_state_dict(state)


def test_a_resumed_run_says_another_flip_and_a_test_does_not(tmp_path):
    folder_of(tmp_path)
    run, watcher = trainer(max_epochs=1), Watcher()
    options = {"size": 6, "num_workers": 0, "batch_size": 4}
    run.fit(watcher, datamodule=Images(tmp_path, **options))
    run.save_checkpoint(tmp_path / "saved.ckpt")
    resume = {"ckpt_path": tmp_path / "saved.ckpt"}
    other = {"memory_budget": 0, "num_workers": 1, "batch_size": 4, "size": 6}  # changes nothing of the data
    trainer(max_epochs=1).fit(watcher, datamodule=Images(tmp_path, **other), **resume)
    flipped = options | {"flip": True}
    with pytest.warns(UserWarning, match=r"^Images: the run continues with .* saved with: flip: False -> True\.$"):
        trainer(max_epochs=1).fit(watcher, datamodule=Images(tmp_path, **flipped), **resume)
    trainer().test(watcher, datamodule=Images(tmp_path, **flipped), verbose=False, **resume)


def test_a_root_below_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    folder_of(tmp_path / "here")
    folder_of(tmp_path / "there")
    datamodule = ready(Images("~/here", size=6, test_root=Path("~/there")))
    assert (datamodule.root, datamodule.test_root) == (tmp_path / "here", tmp_path / "there")


def test_classes_may_have_the_word_for_a_split_in_their_names(tmp_path):
    for folder in ("train_station", "test_tube", "trainer"):
        folder_of(tmp_path / folder)
    assert ready(Images(tmp_path, size=6), "fit").class_names == ["test_tube", "train_station", "trainer"]


def test_a_file_in_two_splits_is_refused(tmp_path):
    root = tmp_path / "set"
    for folder in ("train", "test"):
        folder_of(root / folder, 20)
    (root / "test" / "link.png").symlink_to(root / "train" / "03.png")
    with pytest.raises(ValueError, match=r"1 files are in two splits.*train/03.png \(train\) and .*link.png \(test\)"):
        ready(Images(root, size=6), "fit")


@pytest.mark.parametrize("inside", ["", "held_out"])
def test_a_test_root_that_overlaps_with_root_is_refused(tmp_path, inside):
    for folder in ("cat", "dog", "held_out/cat", "held_out/dog"):
        folder_of(tmp_path / folder)
    with pytest.raises(ValueError, match=r"files are in two splits.*does not overlap with `root`"):
        ready(Images(tmp_path, size=6, test_root=tmp_path / inside), "fit")


def test_folders_below_class_folders_are_said(tmp_path, said):
    for folder in ("cat", "dog", "dog/small"):
        folder_of(tmp_path / folder)
    ready(Images(tmp_path, size=6), "fit")
    assert "Classes: cat (20), dog (40)" in said()
    assert "further folders below the class folders, which are not classes: 20." in said()
