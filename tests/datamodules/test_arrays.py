import io
import logging
import os
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser

from lightning_vae import Condition, Gaussian, Poisson
from lightning_vae.datamodules import Arrays, DataError, DataModule
from lightning_vae.datamodules.loaders.array_files import find_arrays
from tests.datamodules.doubles import Watcher, ready, splits, trainer, whole

FLOATS = np.arange(60, dtype=np.float64).reshape(30, 2) / 8
GREY = np.arange(30 * 4 * 5, dtype=np.uint8).reshape(30, 4, 5)


def saved(folder: Path, name: str = "data.npz", **arrays: Any) -> Path:
    folder.mkdir(exist_ok=True)
    np.savez(folder / name, **arrays)
    return folder / name


def by_row(datamodule: DataModule) -> dict[int, dict[str, torch.Tensor]]:
    """Every observation of the three splits, by the row of the file that `file_names` says."""
    found: dict[int, dict[str, torch.Tensor]] = {}
    for split, stage in zip(splits(datamodule), ("train", "val", "test"), strict=True):
        for place, index in enumerate(split["index"].tolist()):
            name = datamodule.file_names(stage)[index]
            found[int(re.search(r"\[(\d+)\]$", name)[1])] = {key: value[place] for key, value in split.items()}
    return found


@pytest.mark.parametrize("budget", [2.0, 0.0], ids=["in memory", "mapped"])
def test_every_row_is_in_one_split_with_its_label_and_condition(tmp_path, budget):
    label, condition = np.arange(30) % 3, np.arange(30, dtype=np.float32) * 10
    path = saved(tmp_path, x=FLOATS, label=label, condition=condition)
    rows = by_row(ready(Arrays(path, memory_budget=budget, num_workers=0)))
    assert sorted(rows) == list(range(30))
    for row, item in rows.items():
        assert item["x"].dtype == torch.float32
        assert item["x"].tolist() == [row / 4, row / 4 + 1 / 8]
        assert item["label"].dtype == torch.int64
        assert int(item["label"]) == row % 3
        assert item["condition"].tolist() == [10.0 * row]
        assert item.keys() == {"x", "label", "condition", "index"}


def test_mapped_rows_come_in_the_order_of_those_in_memory_also_from_workers(tmp_path):
    path = tmp_path / "x.npy"
    np.save(path, FLOATS)
    held = ready(Arrays(path, batch_size=4))
    mapped = ready(Arrays(path, batch_size=4, memory_budget=0, num_workers=1))
    for one, other in zip(splits(held), splits(mapped), strict=True):
        assert one.keys() == other.keys() == {"x", "index"}
        assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed], ids=["stored", "compressed"])
def test_an_archive_reads_like_numpy(tmp_path, save, order):
    arrays = {"first": np.asarray(FLOATS.astype(">f4"), order=order), "second": np.asarray(GREY, order=order)}
    save(tmp_path / "a.npz", **arrays)
    found = find_arrays(tmp_path / "a.npz")
    for name, array in arrays.items():
        assert np.array_equal(found[name].open(), array)
        assert (found[name].offset is None) == (save is np.savez_compressed)
        assert isinstance(found[name].open(), np.memmap) == (save is np.savez)
    train = whole(ready(Arrays(tmp_path / "a.npz", x="first")).train_dataloader())
    assert set(train["x"][:, 0].tolist()) <= set(FLOATS[:, 0].tolist())


def test_a_folder_holds_arrays_by_the_names_of_its_files(tmp_path):
    np.save(tmp_path / "images.npy", GREY)
    np.save(tmp_path / "label.npy", np.arange(30))
    datamodule = ready(Arrays(tmp_path, x="images"))
    assert {row: int(item["label"]) for row, item in by_row(datamodule).items()} == {row: row for row in range(30)}
    assert datamodule.file_names("test")[0].startswith("images.npy[")


@pytest.mark.parametrize(
    ("array", "layout", "shape", "levels"),
    [
        (GREY, None, (1, 4, 5), 256),
        (GREY > 9, None, (1, 4, 5), 2),
        (GREY, "channels_first", (4, 5), 256),
        (GREY, "channels_last", (5, 4), 256),
        (GREY.astype(np.float32), None, (4, 5), None),
        (GREY.astype(np.float32), "grey", (1, 4, 5), None),
        (GREY[:, None], None, (1, 4, 5), 256),
        (GREY[..., None], None, (1, 4, 5), 256),
        (np.stack([GREY] * 3, axis=-1), None, (3, 4, 5), 256),
        (np.stack([GREY] * 3, axis=1), None, (3, 4, 5), 256),
        (np.stack([GREY] * 4, axis=-1), "channels_last", (4, 4, 5), 256),
        (FLOATS, None, (2,), None),
        (FLOATS.astype(np.int64), None, (2,), None),
        (GREY.reshape(30, 20), None, (20,), 256),
    ],
)
def test_the_layout_is_recognised_or_given(tmp_path, array, layout, shape, levels):
    np.save(tmp_path / "x.npy", array)
    datamodule = Arrays(tmp_path / "x.npy", layout=layout)
    assert (datamodule.shape, datamodule.levels) == (shape, levels)
    train = whole(ready(datamodule).train_dataloader())
    assert train["x"].shape[1:] == shape
    assert train["x"].dtype == (torch.float32 if levels is None else torch.uint8)


def test_channels_on_the_last_axis_move_to_the_front(tmp_path):
    array = np.arange(30 * 2 * 4 * 3, dtype=np.float32).reshape(30, 2, 4, 3)
    np.save(tmp_path / "x.npy", array)
    for row, item in by_row(ready(Arrays(tmp_path / "x.npy"))).items():
        assert np.array_equal(item["x"].numpy(), array[row].transpose(2, 0, 1))


@pytest.mark.parametrize(
    "array", [GREY[:, :, :3], GREY[:, :3], GREY.astype(np.int64), np.zeros((30, 3, 4, 3)), np.zeros((30, 4, 4, 4))]
)
def test_an_ambiguous_layout_is_asked_for(tmp_path, array):
    np.save(tmp_path / "x.npy", array)
    given = re.escape(f'`layout` must be given for {array.dtype} of shape {array.shape}: "channels_first" (the array')
    with pytest.raises(ValueError, match=given):
        Arrays(tmp_path / "x.npy")


def test_levels_are_integers_in_any_type(tmp_path):
    for kind, expected in ((np.int64, torch.uint8), (np.float64, torch.float32)):
        np.save(tmp_path / "x.npy", (GREY % 17).astype(kind))
        datamodule = ready(Arrays(tmp_path / "x.npy", layout="grey", levels=17))
        assert datamodule.levels == 17
        train = whole(datamodule.train_dataloader())["x"]
        assert train.dtype == expected
        assert train.max() == 16
    np.save(tmp_path / "x.npy", GREY.astype(np.int16) * 3)
    train = whole(ready(Arrays(tmp_path / "x.npy", layout="grey", levels=1000)).train_dataloader())["x"]
    assert train.dtype == torch.int32


@pytest.mark.parametrize("budget", [2.0, 0.0], ids=["in memory", "mapped"])
def test_missing_values_are_masked_only_if_asked(tmp_path, budget):
    holed = FLOATS + 1
    holed[[4, 17], [0, 1]] = np.nan
    np.save(tmp_path / "x.npy", holed)
    for item in by_row(ready(Arrays(tmp_path / "x.npy", missing=True, memory_budget=budget, num_workers=0))).values():
        assert item["mask"].dtype == torch.bool
        assert torch.equal(item["mask"], item["x"] != 0)
    rows = by_row(ready(Arrays(tmp_path / "x.npy", missing=True)))
    assert sorted(row for row, item in rows.items() if not item["mask"].all()) == [4, 17]
    message = (
        f"{tmp_path}/x.npy must hold finite numbers, but 2 of 30 rows have NaN: 4, 17. Set `missing` if NaN marks a"
        " missing value, or remove or fix these rows."
    )
    with pytest.raises(DataError, match=f"^{re.escape(message)}$"):
        Arrays(tmp_path / "x.npy", memory_budget=budget).setup("fit")


@pytest.mark.parametrize("budget", [2.0, 0.0], ids=["in memory", "mapped"])
def test_a_fit_gives_the_condition_the_scale_of_the_training_split(tmp_path, budget):
    condition = np.stack([1990 + 10 * FLOATS[:, 0], np.arange(30) % 2, np.full(30, 7.0)], axis=1)
    data = Arrays(saved(tmp_path, x=FLOATS, condition=condition), memory_budget=budget, num_workers=0)
    model = Watcher()
    model.condition = Condition(covariates=3)
    trainer(max_epochs=1).fit(model, datamodule=data)
    train = whole(data.train_dataloader())["condition"]
    assert 20 < len(train) < 30
    torch.testing.assert_close(model.condition.loc, torch.tensor([train[:, 0].mean(), 0, 7]))
    torch.testing.assert_close(model.condition.scale, torch.tensor([train[:, 0].std(correction=0), 1, 1]))
    model.condition = Condition(covariates=2)
    message = (
        "`covariates` of the model's condition is 2, but the condition of the data has 3 numbers: condition[0],"
        " condition[1], condition[2]. Set `covariates` to 3, or give the data another `condition`."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        trainer(max_epochs=1).fit(model, datamodule=data)
    model.condition = Condition(classes=2)  # takes no covariates, and the archive has some
    trainer(max_epochs=1).fit(model, datamodule=data)


@pytest.mark.parametrize("budget", [2.0, 0.0], ids=["in memory", "mapped"])
@pytest.mark.parametrize("missing", [False, True])
def test_numbers_far_from_order_1_are_warned_of(tmp_path, budget, missing):
    far = FLOATS + 100
    if missing:
        far[::2] = np.nan
    np.save(tmp_path / "far.npy", far)
    np.save(tmp_path / "near.npy", FLOATS - 2)
    model = Watcher()
    options: dict[str, Any] = {"memory_budget": budget, "num_workers": 0, "missing": missing}
    for likelihood in (Gaussian((2,)), Poisson((2,))):  # warnings are errors
        model.likelihood = likelihood
        trainer(max_epochs=1).fit(model, datamodule=Arrays(tmp_path / "near.npy", **options))
    trainer(max_epochs=1).fit(model, datamodule=Arrays(tmp_path / "far.npy", **options))
    model.likelihood = Gaussian((2,))
    message = r"^Arrays: the networks take the numbers of x as they are, and they are far .*: 10\d\.\d* and 2\.\d*\. "
    with pytest.warns(UserWarning, match=message):
        trainer(max_epochs=1).fit(model, datamodule=Arrays(tmp_path / "far.npy", **options))


def test_words_are_classes_in_alphabetical_order_and_those_of_other_files_follow(tmp_path):
    train = saved(tmp_path, "train.npz", x=FLOATS, label=np.array(["dog", "cat"] * 15))
    test = saved(tmp_path, "test.npz", x=FLOATS[:4], label=np.array(["bird", "dog", "cat", "cow"]))
    datamodule = ready(Arrays(train, test_path=test))
    assert datamodule.class_names == ["cat", "dog", "bird", "cow"]
    assert whole(datamodule.test_dataloader())["label"].tolist() == [2, 1, 0, 3]
    assert set(whole(datamodule.train_dataloader())["label"].tolist()) == {0, 1}


@pytest.mark.parametrize("budget", [2.0, 0.0], ids=["in memory", "mapped"])
def test_a_class_that_is_held_out_remains_in_the_test(tmp_path, caplog, budget):
    caplog.set_level(logging.INFO)
    options: dict[str, Any] = {"memory_budget": budget, "num_workers": 0, "test_fraction": 0.4, "val_fraction": 0.3}
    path = saved(tmp_path, x=FLOATS, label=np.array(["a", "b", "c"] * 10), condition=np.arange(30))
    before = by_row(ready(Arrays(path, **options)))
    datamodule = ready(Arrays(path, held_out=["b"], **options))
    train, val, test = splits(datamodule)
    assert set(train["label"].tolist()) == set(val["label"].tolist()) == {0, 2}
    assert set(test["label"].tolist()) == {0, 1, 2}
    rows = by_row(datamodule)
    left_out = before.keys() - rows.keys()
    assert left_out
    assert all(int(before[row]["label"]) == 1 for row in left_out)
    for row, item in rows.items():
        assert all(torch.equal(item[name], before[row][name]) for name in ("x", "label", "condition"))
    assert f"Arrays: held out of training and validation. Classes: b ({len(left_out)})." in caplog.messages
    with pytest.raises(ValueError, match=r"`held_out` must be classes of the training data, a, b, c, got d\."):
        Arrays(path, held_out=["d"], **options).setup("fit")
    with pytest.raises(ValueError, match="`held_out` needs data with one class for each observation"):
        Arrays(saved(tmp_path, "bare.npz", x=FLOATS), held_out=["d"], **options).setup("fit")


def test_files_of_their_own_are_splits(tmp_path):
    paths = [saved(tmp_path, f"{name}.npz", x=FLOATS + place) for place, name in enumerate(("a", "b", "c"))]
    train, val, test = splits(ready(Arrays(paths[0], val_path=paths[1], test_path=paths[2])))
    assert [len(split["x"]) for split in (train, val, test)] == [30, 30, 30]
    assert np.array_equal(val["x"].numpy(), FLOATS + 1)
    assert np.array_equal(test["x"].numpy(), FLOATS + 2)
    train, val, test = splits(ready(Arrays(paths[0], test_path=paths[2])))
    assert len(train["x"]) + len(val["x"]) == 30
    assert len(test["x"]) == 30


def test_a_row_that_is_appended_moves_no_other(tmp_path):
    more = np.concatenate([FLOATS, FLOATS + 100])
    before, after = (ready(Arrays(saved(tmp_path, f"{len(array)}.npz", x=array))) for array in (FLOATS, more))
    for stage in ("train", "val", "test"):
        first, second = ([name.partition("[")[2] for name in each.file_names(stage)] for each in (before, after))
        assert second[: len(first)] == first


def test_what_was_found_is_printed(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    path = saved(tmp_path, x=GREY, label=np.arange(30) % 2, condition=np.zeros((30, 3)), spare=FLOATS)
    datamodule = Arrays(path, memory_budget=0, num_workers=0)
    for stage in ("fit", "validate", "test"):
        datamodule.setup(stage)
    [text] = [record.getMessage() for record in caplog.records if "Arrays" in record.getMessage()]
    assert text.splitlines() == [
        f"Arrays: {path} has 30 observations, 26 in train, 2 in val, 2 in test.",
        "  Data: x, uint8 of shape (30, 4, 5), grey, as (1, 4, 5) with 256 levels.",
        "  A hash of each row's number has chosen val and test, so the shares are approximate.",
        "  Classes: 0 (15), 1 (15).",
        "  Condition: condition, numbers an observation: 3.",
        "  Not used: spare.",
        "  The data take 5.59e-07 GiB, more than `memory_budget` (0), so rows are read from the file during the run.",
    ]


def test_a_run_uses_each_split_for_its_stage(tmp_path):
    watcher, data = Watcher(), Arrays(saved(tmp_path, x=FLOATS), memory_budget=0, num_workers=0)
    run = trainer(max_epochs=2, num_sanity_val_steps=0)
    run.fit(watcher, datamodule=data)
    assert [sorted(epoch) for epoch in watcher.epochs] == [list(range(26))] * 2
    run.test(watcher, datamodule=data, verbose=False)
    assert watcher.stages == {"val": 4, "test": 2}


@pytest.mark.parametrize("budget", [2.0, 0.0], ids=["in memory", "mapped"])
def test_a_checkpoint_of_other_data_is_said(tmp_path, budget):
    options: dict[str, Any] = {"memory_budget": budget, "num_workers": 0}
    path, other = (saved(tmp_path, f"{n}.npz", x=FLOATS + n, label=np.array(["a", "b", "c"] * 10)) for n in (0, 1))
    state = ready(Arrays(path, **options), "fit").state_dict()
    assert state["fingerprint"].keys() == {"train", "val", "test", "classes", "shape", "levels"}
    ready(Arrays(path, **options), "fit").load_state_dict(state)  # warnings are errors
    with pytest.warns(UserWarning, match="trained on other data: train has other obs.*; val has .*; test has"):
        ready(Arrays(other, **options), "fit").load_state_dict(state)
    bare = saved(tmp_path, "bare.npz", x=FLOATS)
    with pytest.warns(UserWarning, match="other data: train has other obs"):  # as many rows in each split, but others
        ready(Arrays(bare, seed=31, **options), "fit").load_state_dict(
            ready(Arrays(bare, **options), "fit").state_dict()
        )
    relabelled = saved(tmp_path, "words.npz", x=FLOATS, label=np.array(["a", "b", "d"] * 10))
    with pytest.warns(UserWarning, match="classes: a, b, c -> a, b, d"):
        ready(Arrays(relabelled, **options), "fit").load_state_dict(state)


def test_rows_are_copied_to_another_process_without_the_array(tmp_path):
    datamodule = ready(Arrays(saved(tmp_path, x=np.zeros((30, 9999))), memory_budget=0, num_workers=0))
    dataset = datamodule.train_dataloader().dataset
    first = dataset[0]
    copied = pickle.dumps(dataset)
    assert len(copied) < 5000
    assert torch.equal(pickle.loads(copied)[0]["x"], first["x"])


def test_a_name_on_the_command_line(tmp_path):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(DataModule, "data")
    path = saved(tmp_path, x=GREY)
    arguments = ["--data=Arrays", f"--data.path={path}", "--data.layout=channels_last"]
    assert parser.instantiate_classes(parser.parse_args(arguments)).data.shape == (5, 4)


# ---- errors: each before the first step


class Evil:
    """An object whose unpickling would leave a trace."""

    def __reduce__(self):
        return os.mkdir, ("unpickled",)


def test_nothing_is_unpickled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    objects = np.array([Evil(), None], dtype=object)
    np.save("objects.npy", objects, allow_pickle=True)
    np.savez("objects.npz", x=objects, allow_pickle=True)
    Path("pickled.npy").write_bytes(pickle.dumps(Evil()))
    Path("pickled.npz").write_bytes(pickle.dumps(Evil()))
    reasons = {
        "objects.npy": "objects.npy holds Python objects, which are never unpickled",
        "objects.npz": r"objects.npz\['x'\] holds Python objects, which are never unpickled",
        "pickled.npy": "pickled.npy is not an array of NumPy",
        "pickled.npz": "pickled.npz is not a complete .npz file",
    }
    for name, reason in reasons.items():
        with pytest.raises(DataError, match=reason):
            Arrays(name)
    assert not Path("unpickled").exists()


def broken(folder: Path) -> dict[str, tuple[str, str]]:
    """Return files that are not what they should be, each with its message."""
    np.save(folder / "x.npy", FLOATS)
    whole_file = (folder / "x.npy").read_bytes()
    (folder / "short.npy").write_bytes(whole_file[:-1])
    (folder / "header.npy").write_bytes(whole_file[:20])
    (folder / "text.npy").write_text("one, two, three")
    (folder / "x.txt").write_text("1, 2, 3")
    (folder / "none").mkdir()
    np.savez(folder / "none.npz")
    (folder / "short.npz").write_bytes(saved(folder, x=FLOATS).read_bytes()[:-9])
    with zipfile.ZipFile(folder / "text.npz", "w") as archive:
        archive.writestr("x.npy", "no array")
    buffer = io.BytesIO()
    np.save(buffer, FLOATS)
    with zipfile.ZipFile(folder / "cut.npz", "w") as archive:
        archive.writestr("x.npy", buffer.getvalue()[:-8])
    return {
        "nowhere.npy": (
            "There is no file .*nowhere.npy. Name a .npy file, an .npz file or a folder",
            "FileNotFoundError",
        ),
        "none": ("The folder .*none has no .npy file. Put arrays there, or name a file.", "FileNotFoundError"),
        "short.npy": ("short.npy is incomplete: it has 607 bytes and needs 608. Write it again.", "DataError"),
        "header.npy": (r"header.npy is not an array of NumPy \(EOF", "DataError"),
        "text.npy": (r"text.npy is not an array of NumPy \(the magic string is not correct", "DataError"),
        "x.txt": ("x.txt must end in .npy or .npz, or be a folder of .npy files. Save it with NumPy.", "DataError"),
        "none.npz": ("none.npz holds no array. Write it again.", "DataError"),
        "short.npz": (
            r"short.npz is not a complete .npz file \(File is not a zip file\). Write it again.",
            "DataError",
        ),
        "text.npz": (r"text.npz\['x'\] is not an array of NumPy", "DataError"),
        "cut.npz": (r"cut.npz\['x'\] is incomplete: it has 600 bytes and needs 608. Write it again.", "DataError"),
    }


def test_a_broken_file_is_named(tmp_path):
    for name, (message, kind) in broken(tmp_path).items():
        with pytest.raises((DataError, FileNotFoundError), match=message) as error:
            Arrays(tmp_path / name)
        assert error.type.__name__ == kind


@pytest.mark.parametrize(
    ("arrays", "options", "message"),
    [
        ({"a": FLOATS, "b": FLOATS}, {}, "`x` must name the data among a, b, because none is called x."),
        ({"a": FLOATS}, {"x": "b"}, "`x` is 'b', which PATH does not have. It has a."),
        ({"x": FLOATS}, {"label": "y"}, "`label` is 'y', which PATH does not have. It has x."),
        ({"x": FLOATS}, {"condition": "c"}, "`condition` is 'c', which PATH does not have. It has x."),
        (
            {"x": FLOATS[:, 0]},
            {},
            "PATH['x'] must have the observations on its first axis and their values on others, got shape (30,)."
            " Reshape it: one number an observation is `(N, 1)`.",
        ),
        ({"x": FLOATS * 1j}, {}, "PATH['x'] must hold integers, floats or booleans, got complex128. Convert it."),
        ({"x": np.array([["a", "b"]])}, {}, "PATH['x'] must hold integers, floats or booleans, got <U1. Convert it."),
        (
            {"x": GREY},
            {"missing": True},
            "`missing` takes NaN for a missing value, and PATH['x'] holds uint8, which has no NaN. Save floats, or"
            " leave out `missing`.",
        ),
        (
            {"x": GREY[:, None]},
            {"layout": "grey"},
            '`layout` "grey" is for images without an axis of channels, (N, height, width), got shape (30, 1, 4, 5) in'
            """ PATH['x']. Give "channels_first" or "channels_last".""",
        ),
        ({"x": FLOATS}, {"levels": 1}, "`levels` must be at least 2, got 1."),
        (
            {"x": FLOATS},
            {"layout": "hwc"},
            '`layout` must be "channels_first", "channels_last" or "grey", got \'hwc\'.',
        ),
        ({"x": FLOATS}, {"memory_budget": -1}, "`memory_budget` must be at least 0 GiB, got -1."),
        ({"x": FLOATS}, {"num_workers": -1}, "`num_workers` must be at least 0, got -1."),
    ],
)
def test_options_that_do_not_fit(tmp_path, arrays, options, message):
    path = saved(tmp_path, **arrays)
    with pytest.raises(ValueError, match=f"^{re.escape(message.replace('PATH', str(path)))}$"):
        Arrays(path, **options)


@pytest.mark.parametrize(
    ("arrays", "options", "message"),
    [
        ({"x": FLOATS[:0]}, {}, "PATH['x'] has no observations. Name another file."),
        (
            {"x": FLOATS[:2]},
            {},
            "test and val would have none of the 2 rows of PATH, with `test_fraction` 0.1, `val_fraction` 0.1. A hash"
            " of each row's number decides, so a small set may miss a split: choose other fractions or another `seed`,"
            " add rows, or give `val_path` and `test_path`.",
        ),
        (
            {"x": FLOATS, "label": np.arange(29)},
            {},
            "`label` must have a row for each of the 30 observations, got shape (29,) in PATH['label'].",
        ),
        (
            {"x": FLOATS, "label": np.zeros((30, 2), dtype=int)},
            {},
            "`label` must have one class an observation, got shape (30, 2) in PATH['label'].",
        ),
        (
            {"x": FLOATS, "label": np.arange(30) / 7},
            {},
            "`label` must hold integers or words, got float64 in PATH['label']. Numbers that are no classes are a"
            " `condition`.",
        ),
        (
            {"x": FLOATS, "label": np.arange(30, dtype=np.uint64) + 2**63},
            {},
            "`label` must fit int64, got 9223372036854775837 in PATH['label']. Number the classes from 0.",
        ),
        (
            {"x": FLOATS, "condition": np.where(FLOATS > 7, np.inf, 0)},
            {},
            "`condition` must hold finite numbers, but 2 rows of PATH['condition'] don't: row 28, 29. Remove or fix"
            " these rows.",
        ),
        (
            {"x": FLOATS, "condition": np.stack([np.arange(30), 2**27 + np.arange(30)], axis=1)},
            {},
            "`condition`: column 1 of PATH['condition'] has numbers from 134217728 to 134217757, which float32 would"
            " round by up to 8, too much for a standard deviation of 8.66. Subtract an offset, such as the smallest.",
        ),
        (
            {"x": np.where(FLOATS > 7.3, -np.inf, FLOATS)},
            {"missing": True},
            "PATH['x'] must hold finite numbers, but 1 of 30 rows do not: 29. Remove or fix these rows.",
        ),
        (
            {"x": np.where(FLOATS > 7.3, 1e39, FLOATS)},
            {},
            "PATH['x'] must hold finite numbers, but 1 of 30 rows do not: 29. Remove or fix these rows.",
        ),
        (
            {"x": GREY % 20},
            {"levels": 19},
            "PATH['x'] must hold integers from 0 to 18, but 28 of 30 rows do not: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 18"
            " more. Remove or fix these rows, or set `levels`.",
        ),
        (
            {"x": np.where(FLOATS > 7.2, 7.5, np.floor(FLOATS))},
            {"levels": 8},
            "PATH['x'] must hold integers from 0 to 7, but 1 of 30 rows do not: 29. Remove or fix these rows, or set"
            " `levels`.",
        ),
        (
            {"x": GREY[:, 0].astype(np.int64) - np.eye(30, 5, dtype=np.int64) * 999},
            {"levels": 256},
            "PATH['x'] must hold integers from 0 to 255, but 5 of 30 rows do not: 0, 1, 2, 3, 4. Remove or fix these"
            " rows, or set `levels`.",
        ),
    ],
)
@pytest.mark.parametrize("budget", [2.0, 0.0], ids=["in memory", "mapped"])
def test_data_that_do_not_fit(tmp_path, arrays, options, message, budget):
    path = saved(tmp_path, **arrays)
    with pytest.raises(ValueError, match=f"^{re.escape(message.replace('PATH', str(path)))}$"):
        Arrays(path, memory_budget=budget, **options).setup("fit")


def test_faults_in_any_part_of_a_large_array_are_found(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_vae.datamodules.arrays._CHUNK", 8)  # four rows at once
    holed = FLOATS.copy()
    holed[[3, 4, 29], 0] = np.nan
    path = saved(tmp_path, x=holed)
    with pytest.raises(DataError, match=r"but 3 of 30 rows have NaN: 3, 4, 29\. Set"):
        Arrays(path).setup("fit")
    assert len(by_row(ready(Arrays(path, missing=True)))) == 30


def test_other_files_must_fit_the_first(tmp_path):
    path = saved(tmp_path, x=FLOATS, label=np.arange(30))
    with pytest.raises(ValueError, match=r"^`test_path` and `path` are the same file, .*, so a model would be judged"):
        Arrays(path, test_path=tmp_path / "." / "data.npz")
    wide = saved(tmp_path, "wide.npz", x=np.zeros((9, 3)), label=np.arange(9))
    message = (
        r"^`test_path` must hold float64 of shape \(2,\) an observation, as `path` does, got float64 of shape \(3,\)"
    )
    with pytest.raises(ValueError, match=message):
        Arrays(path, test_path=wide).setup("test")
    unlabelled = saved(tmp_path, "unlabelled.npz", x=FLOATS)
    with pytest.raises(ValueError, match=r"^`label` is 'label', which .*unlabelled.npz does not have. It has x\.$"):
        Arrays(path, test_path=unlabelled).setup("test")
    path_given = saved(tmp_path, "given.npz", x=FLOATS, condition=FLOATS[:, 0])
    same = saved(tmp_path, "same.npz", x=FLOATS, condition=FLOATS[:, :1])
    Arrays(path_given, test_path=same).setup("test")
    wide = saved(tmp_path, "wide.npz", x=FLOATS, condition=FLOATS)
    message = (
        f"`condition` must have the 1 numbers an observation that {path_given}['condition'] has, got 2 in"
        f" {wide}['condition']. Save both alike."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Arrays(path_given, test_path=wide).setup("fit")
    words = saved(tmp_path, "words.npz", x=FLOATS, label=np.array(["a"] * 30))
    with pytest.raises(ValueError, match=r"^`label` must hold words in all files, or integers in all. Save the labels"):
        Arrays(path, test_path=words).setup("test")
    unnamed = saved(tmp_path, "unnamed.npz", y=FLOATS)
    with pytest.raises(ValueError, match=r"^`x` is 'x', which .*unnamed.npz does not have. It has y\.$"):
        Arrays(path, val_path=unnamed).setup("test")


def test_compressed_data_beyond_the_budget_are_refused(tmp_path):
    np.savez_compressed(tmp_path / "x.npz", x=FLOATS)
    message = (
        f"{tmp_path}/x.npz['x'] is compressed, so its rows can't be read one by one. The data take 2.24e-07 GiB, more"
        " than `memory_budget` (0). Save it with `numpy.savez`, or as .npy files in a folder, or raise the budget."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Arrays(tmp_path / "x.npz", memory_budget=0).setup("fit")
