import logging
import re
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from jsonargparse import ArgumentParser

from lightning_vae.datamodules import DataModule, Digits, Gaussian, base
from lightning_vae.datamodules.base import split_of_name
from tests.datamodules.doubles import Watcher, ready, trainer, whole


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


def test_a_split_without_observations_is_an_error():
    with pytest.raises(ValueError, match=r"`val_fraction` must leave observations on both sides, got 0\.0001 of 1500"):
        Digits(val_fraction=1e-4).setup("fit")


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


def test_what_was_read_is_printed_once(caplog):
    caplog.set_level(logging.INFO)
    digits = Digits()
    for stage in ("fit", "validate", "fit"):
        digits.setup(stage)
    [text] = [record.getMessage() for record in caplog.records if "Digits" in record.getMessage()]
    assert text.startswith("Digits: 1500 observations, 1350 in train, 150 in val. Classes: 0 (151), 1 (15")
    assert sum(int(count) for count in re.findall(r"\((\d+)\)", text)) == 1500


@pytest.mark.parametrize(
    ("before", "now", "change"),
    [
        (Digits(), Digits(seed=1), "train has other observations; val has other observations; seed: 0 -> 1. "),
        (
            Digits(),
            Digits(val_fraction=0.2),
            "train has 1200 observations, had 1350; val has 300 ",
        ),
        (
            Gaussian((2.0, 1.0), size=9),
            Gaussian((3.0, 1.0), size=9, seed=1),
            r"eigenvalues: 2.0, 1.0 -> 3.0, 1.0; seed: 0 -> 1\. ",
        ),
    ],
)
def test_a_checkpoint_of_other_data_is_said(before, now, change):
    state = ready(before, "fit").state_dict()
    ready(before, "fit").load_state_dict(state)  # warnings are errors
    with pytest.warns(UserWarning, match=f"trained on other data: {change}"):
        ready(now, "fit").load_state_dict(state)


def test_a_split_by_name_keeps_to_the_shares():
    names = [f"folder/{number}.png" for number in range(20_000)]
    fractions = {"test": 0.1, "val": 0.2}
    split = [split_of_name(name, fractions, seed=0) for name in names]
    shares = {name: split.count(name) / len(split) for name in ("test", "val", "train")}
    assert shares == pytest.approx({"test": 0.1, "val": 0.18, "train": 0.72}, abs=0.01)
    assert [split_of_name(name, fractions, seed=1) for name in names] != split


def saved_by(data: DataModule, folder: Path) -> dict[str, Path]:
    run = trainer(max_epochs=1, limit_train_batches=1)
    run.fit(Watcher(), datamodule=data)
    run.save_checkpoint(folder / "saved.ckpt")
    return {"ckpt_path": folder / "saved.ckpt"}


def test_a_run_that_continues_says_another_batch_size(tmp_path):
    saved = saved_by(Digits(), tmp_path)
    trainer(max_epochs=1).fit(Watcher(), datamodule=Digits(), **saved)  # warnings are errors
    changed = r"^Digits: the run continues with other .*: batch size over all processes: 128 -> 64\.$"
    with pytest.warns(UserWarning, match=changed):
        trainer(max_epochs=1).fit(Watcher(), datamodule=Digits(batch_size=64), **saved)
    trainer().validate(Watcher(), datamodule=Digits(batch_size=64), verbose=False, **saved)


def test_the_same_batch_over_more_processes_is_the_same(monkeypatch):
    state = ready(Digits(batch_size=128), "fit").state_dict()
    monkeypatch.setattr(base, "rank_and_world_size", lambda: (0, 2))
    ready(Digits(batch_size=64), "fit").load_state_dict(state)
    with pytest.warns(UserWarning, match="batch size over all processes: 128 -> 256"):
        ready(Digits(batch_size=128), "fit").load_state_dict(state)


def test_a_tuner_that_restores_its_own_state_has_changed_nothing():
    digits = ready(Digits(), "fit")
    state = digits.state_dict()
    digits.batch_size = 64
    digits.load_state_dict(state)


def test_a_test_compares_the_split_that_is_tested(tmp_path, monkeypatch):
    saved = saved_by(Digits(), tmp_path)
    trainer().test(Watcher(), datamodule=Digits(seed=1, val_fraction=0.3), verbose=False, **saved)  # it has the same

    class Fewer(Digits):
        def _read_test(self):
            return {"test": {name: tensor[1:] for name, tensor in super()._read_test()["test"].items()}}

    Fewer.__qualname__ = "Digits"  # by which Lightning finds the state
    with pytest.warns(UserWarning, match="trained on other data: test has 296 observations, had 297"):
        trainer().test(Watcher(), datamodule=Fewer(), verbose=False, **saved)
    with pytest.warns(UserWarning, match="train has other observations"):
        trainer().validate(Watcher(), datamodule=Digits(seed=1), verbose=False, **saved)


def test_a_test_of_another_draw_is_said(tmp_path):
    saved = saved_by(Gaussian((2.0, 1.0), size=9), tmp_path)
    with pytest.warns(UserWarning, match="trained on other data: seed: 0 -> 1\\. Results"):
        trainer().test(Watcher(), datamodule=Gaussian((2.0, 1.0), size=9, seed=1), verbose=False, **saved)


def test_data_without_a_test_split_can_be_saved(tmp_path):
    class Untested(Digits):
        def _read_test(self):
            raise FileNotFoundError("nothing to test")

    state = ready(Untested(), "fit").state_dict()
    assert state["fingerprint"].keys() == {"train", "val"}
    ready(Untested(), "fit").load_state_dict(state)
