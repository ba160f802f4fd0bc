"""Classes that are left out of training and validation, and remain in the test."""

import logging

import pytest
import torch
from PIL import Image

from lightning_vae.datamodules import MNIST, DataModule, Digits, Images, Omniglot
from tests.datamodules.doubles import Watcher, ready, splits, trainer, whole
from tests.datamodules.test_mnist import write_mnist


def said(caplog):
    return [record.getMessage() for record in caplog.records if "eld out" in record.getMessage()]


def test_digits_lose_a_class_in_training_and_validation_alone(caplog):
    caplog.set_level(logging.INFO)
    train, val, test = splits(ready(Digits(), "fit", "test"))
    one_less = ready(Digits(held_out=[3]), "fit", "validate", "fit", "test")
    train_without, val_without, test_without = splits(one_less)
    for split, without in ((train, train_without), (val, val_without)):
        assert set(without["label"].tolist()) == set(range(10)) - {3}
        kept = split["x"][split["index"].argsort()][split["label"][split["index"].argsort()] != 3]
        assert torch.equal(without["x"][without["index"].argsort()], kept)  # no other observation has moved
    assert torch.equal(test_without["x"], test["x"])
    assert torch.equal(test_without["label"], test["label"])
    assert (len(train_without["x"]), len(val_without["x"])) == (1350 - 140, 150 - 13)
    assert said(caplog) == ["Digits: held out of training and validation. Classes: 3 (153)."]


def test_several_classes_of_mnist(tmp_path):
    write_mnist(tmp_path, "")
    train, val, test = splits(ready(MNIST(tmp_path, val_fraction=0.3, held_out=[0, "7"])))
    assert set(train["label"].tolist()) | set(val["label"].tolist()) == {1, 2, 3, 4, 5, 6, 8, 9}
    assert test["label"].tolist() == list(range(8))


@pytest.mark.parametrize("budget", [0, 1])  # streamed, and in memory
def test_images_are_held_out_by_the_name_of_their_folder(tmp_path, caplog, budget):
    caplog.set_level(logging.INFO)
    for number, name in enumerate(("cat", "dog", "2")):
        (tmp_path / name).mkdir()
        for each in range(12):
            Image.new("L", (2, 2), number).save(tmp_path / name / f"{each}.png")
    options = {"size": 2, "channels": 1, "val_fraction": 0.3, "test_fraction": 0.3, "memory_budget": budget}
    everything = splits(ready(Images(tmp_path, num_workers=0, **options)))
    images = ready(Images(tmp_path, num_workers=0, held_out=["dog", 2], **options))
    train, val, test = splits(images)
    assert images.class_names == ["2", "cat", "dog"]  # the labels of a test mean the same
    assert set(train["label"].tolist()) | set(val["label"].tolist()) == {1}
    assert not train["x"].any()
    assert torch.equal(test["label"], everything[2]["label"])
    left_out = [sum((split["label"] == label).sum().item() for split in everything[:2]) for label in (0, 2)]
    (line,) = said(caplog)
    assert f"Held out of training and validation: 2 ({left_out[0]}), dog ({left_out[1]})." in line
    trainer(max_epochs=1).fit(Watcher(), datamodule=images)


class Named(DataModule):
    """A data module of one's own, with nothing done for it."""

    shape, levels, class_names = (1,), None, ("cat", "dog")

    def _read_train(self):
        x = torch.arange(8.0)[:, None]
        return {name: {"x": x, "label": torch.arange(8) % 2} for name in ("train", "val")}

    def _read_test(self):
        return {"test": self._read_train()["val"]}


def test_a_data_module_of_ones_own_has_the_option_too():
    data = ready(Named(held_out=["dog"]))
    assert whole(data.val_dataloader())["x"].flatten().tolist() == [0, 2, 4, 6]
    assert len(whole(data.predict_dataloader())["x"]) == 8


class Unlabelled(Named):
    def _read_train(self):
        return {name: {"x": torch.zeros(4, 1)} for name in ("train", "val")}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (Digits(held_out=[10]), "`held_out` must be classes of the training data, 0, 1, 2, .*, 9, got 10."),
        (Named(held_out=["cow", "cat"]), "`held_out` must be classes of the training data, cat, dog, got cow."),
        (Named(held_out=["cat", "dog"]), "without cat, dog there are none in train and val. Hold out fewer"),
        (Unlabelled(held_out=[0]), "`held_out` needs data with one class for each observation"),
        (Omniglot(held_out=[3]), "`held_out` must be left out: all of"),
    ],
)
def test_classes_that_can_not_be_held_out_are_refused(data, message, monkeypatch):
    if isinstance(data, Omniglot):
        monkeypatch.setattr(data, "_read_train", dict)
    with pytest.raises(ValueError, match=message):
        data.setup("fit")


def test_a_folder_without_classes_has_none_to_hold_out(tmp_path):
    for number in range(20):
        Image.new("L", (2, 2)).save(tmp_path / f"{number}.png")
    with pytest.raises(ValueError, match="classes of the training data, which has none, got cat"):
        Images(tmp_path, size=2, held_out=["cat"]).setup("fit")


@pytest.mark.parametrize("given", [3, "3", [3.5], [True], None])
def test_what_is_no_list_of_classes_is_refused(given):
    with pytest.raises(ValueError, match=r"`held_out` must be a list of classes, such as \[3\], got"):
        Digits(held_out=given)


def test_a_run_that_continues_with_other_classes_says_so():
    state = ready(Digits(held_out=[3]), "fit").state_dict()
    ready(Digits(held_out=["3"]), "fit").load_state_dict(state)  # warnings are errors
    ready(Digits(), "test").load_state_dict({**state, "training": {}})  # a test has the same split
    with pytest.warns(UserWarning, match=r"train has 1350 observations, had 1210; .*; held out: 3 -> none\."):
        ready(Digits(), "fit").load_state_dict(state)
