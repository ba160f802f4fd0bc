from collections import UserDict, UserList
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule

from lightning_vae.callbacks import KLAnnealing, Linear
from lightning_vae.callbacks.control.tied_attributes import TiedAttributes, number_place
from tests.doubles import ForeignModule, loader, quiet_trainer


class Model(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = 1.0
        self.params = {"kld_weight": 1.0}
        self.cfg = SimpleNamespace(beta=1.0)
        self._low, self._high = 0.0, 1.0

    @property
    def low(self) -> float:
        return self._low

    @low.setter
    def low(self, value: float) -> None:
        if not 0 <= value <= self._high:
            raise ValueError(f"low={value} is larger than high={self._high}")
        self._low = value

    @property
    def high(self) -> float:
        return self._high

    @high.setter
    def high(self, value: float) -> None:
        if value < self._low:
            raise ValueError(f"high={value} is smaller than low={self._low}")
        self._high = value


def test_several_paths_get_the_same_value() -> None:
    model = Model()
    knob = TiedAttributes(model, ["weight", "params.kld_weight", "cfg.beta"])
    assert knob.read() == 1.0
    knob.write(0.125)
    assert (model.weight, model.params["kld_weight"], model.cfg.beta) == (0.125, 0.125, 0.125)


@pytest.mark.parametrize("paths", [["low", "high"], ["high", "low"]])
def test_two_that_check_each_other_move_both_ways(paths: list[str]) -> None:
    model = Model()
    knob = TiedAttributes(model, paths)
    assert knob.read() == 1.0, "a range ends at its upper bound"
    for value in (0.5, 0.7, 2.0, 0.1, 0.0, 3.0):
        knob.write(value)
        assert (model.low, model.high) == (value, value)
        assert knob.overwritten() is None


def test_a_value_that_no_order_makes_acceptable_is_named() -> None:
    with pytest.raises(ValueError, match=r"`attribute='low'` can't be set to -1: low=-1.0 is larger"):
        TiedAttributes(Model(), ["low", "weight"]).write(-1.0)


def test_the_place_that_something_else_moved_is_named() -> None:
    model = Model()
    knob = TiedAttributes(model, ["weight", "params.kld_weight"])
    knob.write(0.5)
    assert knob.overwritten() is None
    model.params["kld_weight"] = 0.9
    place: Any = knob.overwritten()
    assert place.path == "params.kld_weight"


def test_one_wrong_path_among_several_is_an_error() -> None:
    with pytest.raises(ValueError, match="'kld_wait'"):
        TiedAttributes(Model(), ["weight", "kld_wait"])


def test_a_setter_takes_the_place_of_the_path() -> None:
    model = Model()
    knob = number_place(model, [], lambda pl_module, value: setattr(pl_module.cfg, "beta", value))
    knob.write(0.5)
    assert knob.read() is None
    assert knob.overwritten() is None
    assert model.cfg.beta == 0.5


def test_a_count_is_no_place_of_a_weight() -> None:
    model: Any = LightningModule()
    model.max_kl_weight, model.n_epochs_kl_warmup = 1.0, 400
    with pytest.raises(ValueError, match=r"must name the places of one quantity, got .*`n_epochs_kl_warmup` = 400"):
        TiedAttributes(model, ["max_kl_weight", "n_epochs_kl_warmup"]).refuse_several_quantities()
    with pytest.raises(ValueError, match=r"Did you mean 'max_kl_weight'. It has 'max_kl_weight'\.$"):
        TiedAttributes(model, ["kl_weight", "n_epochs_kl_warmup"])
    assert (model.max_kl_weight, model.n_epochs_kl_warmup) == (1.0, 400)


UNLIKE: list[dict[str, float]] = [
    {"beta": 0.5, "warmup": 400.0},
    {"beta": 0.5, "gamma": 0.6},
    {"min_beta": 0.1, "max_beta": 1.0, "warmup": 400.0},
    {"max_beta": 0.1, "beta": 1.0},
    {"min_kl": 1.0, "max_kl_epochs": 400},
]
ALIKE: list[dict[str, float]] = [
    {"beta": 0.5, "copy": 0.5},
    {"beta": 0.5, "in_half_precision": 0.5005},
    {"now": 0.0, "final": 0.7},
    {"min_kl_weight": 0.0, "max_kl_weight": 1.0, "kl_weight": 0.0},
    {"min_kl_weight": 0.1, "max_kl_weight": 1.0, "kl_weight": 0.4},
    {"lowest": 0.1, "highest": 0.9},
]


@pytest.mark.parametrize("values", UNLIKE)
def test_one_value_is_not_written_to_numbers_that_are_several_quantities(
    tmp_path: Path, values: dict[str, float]
) -> None:
    model: Any = ForeignModule()
    vars(model).update(values)
    with pytest.raises(ValueError, match=r"must name the places of one quantity, got .* which are several"):
        quiet_trainer(tmp_path, max_epochs=1, callbacks=[KLAnnealing(Linear(steps=2), list(values))]).fit(
            model, loader()
        )
    assert {name: getattr(model, name) for name in values} == values


def fit(path: Path, model: Any, places: list[str], ckpt_path: Path | None = None) -> Path:
    annealing = KLAnnealing(Linear(steps=2), places, name="beta", probe=False)
    trainer = quiet_trainer(path, max_epochs=2 if ckpt_path else 1, callbacks=[annealing])
    trainer.fit(model, loader(), ckpt_path=ckpt_path)
    trainer.save_checkpoint(path / "saved.ckpt")
    return path / "saved.ckpt"


def tied(values: dict[str, float], buffered: str = "") -> Any:
    model: Any = ForeignModule()
    for name, value in values.items():
        if name == buffered:
            model.register_buffer(name, torch.tensor(value))
        else:
            setattr(model, name, value)
    return model


@pytest.mark.parametrize("values", UNLIKE)
def test_a_resumed_run_does_not_write_one_value_to_several_quantities_either(
    tmp_path: Path, values: dict[str, float]
) -> None:
    path, model = fit(tmp_path, tied(dict.fromkeys(values, 0.5)), [*values]), tied(values)
    with pytest.raises(ValueError, match=r"must name the places of one quantity, got .* which are several"):
        fit(tmp_path, model, [*values], path)
    assert {name: getattr(model, name) for name in values} == values


@pytest.mark.parametrize("buffered", ["first", "second"])
def test_a_checkpoint_may_restore_some_of_the_places(tmp_path: Path, buffered: str) -> None:
    places = ["first", "second"]
    path = fit(tmp_path, tied(dict.fromkeys(places, 0.5), buffered), places)
    model = tied(dict.fromkeys(places, 4.0), buffered)
    with pytest.warns(UserWarning, match="the module is configured with 4 now; the run continues to 4"):
        fit(tmp_path, model, places, path)
    assert float(model.first) == float(model.second) == 4.0


@pytest.mark.parametrize("values", ALIKE)
def test_numbers_of_one_quantity_get_one_value(values: dict[str, float]) -> None:
    model: Any = LightningModule()
    vars(model).update(values)
    place = TiedAttributes(model, list(values))
    place.refuse_several_quantities()
    place.write(0.25)
    assert {getattr(model, name) for name in values} == {0.25}


def test_any_sequence_and_any_mapping_lead_to_a_number() -> None:
    model: Any = LightningModule()
    model.config = UserDict(kl=UserList([1.0, UserDict(weight=1.0)]))
    place = TiedAttributes(model, UserList(["config.kl.0", "config.kl.1.weight"]))
    place.write(0.25)
    assert (model.config["kl"][0], model.config["kl"][1]["weight"], place.overwritten()) == (0.25, 0.25, None)
