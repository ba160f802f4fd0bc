import copy
import pickle
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn

from lightning_vae.callbacks.control.attribute_path import AttributePath, paths_to


@dataclass
class Config:
    beta: float = 1.0


@dataclass(slots=True)
class Slots:
    beta: float = 1.0


@dataclass(frozen=True)
class Frozen:
    beta: float = 1.0


Pair = namedtuple("Pair", "beta gamma")


class Loss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kld_weight = 1.0
        self.shape = (3, 64, 64)
        self.beta: torch.Tensor
        self.register_buffer("beta", torch.tensor(1.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.beta


class Wrapper(nn.Module):
    """Keeps the real thing as DDP does."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


class Model(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = 1.0
        self.whole = 1
        self.flag = True
        self.nothing = None
        self.text = "1.0"
        self.register_buffer("beta", torch.tensor(1.0))
        self.register_buffer("integers", torch.tensor(1))
        self.register_buffer("several", torch.ones(2))
        self.parameter = nn.Parameter(torch.tensor(1.0))
        self.params = {"kld_weight": 1.0, "nested": {"betas": [1.0, 1.0]}}
        self.cfg = Config()
        self.frozen = Frozen()
        self.pair = Pair(1.0, 1.0)
        self.plain = SimpleNamespace(inner=SimpleNamespace(beta=1.0))
        self.weights: Any = nn.ParameterDict({"kl": torch.tensor(1.0)})
        self.levels = {0: 1.0, 1: 1.0}
        self.slots = Slots()
        self.array = np.ones(3)
        self.save_hyperparameters({"kl": 1.0})
        self.loss = Loss()
        self.compiled: Any = torch.compile(Loss())
        self.distributed = Wrapper(Loss())
        self.both = Wrapper(torch.compile(Loss()))  # type: ignore[arg-type]
        self.parts: Any = nn.ModuleList([Loss()])
        self._kept = 1.0

    def method(self, step: int = 0) -> float:
        return 0.1 * step

    @property
    def unready(self) -> float:
        return self.built_later.beta  # type: ignore[no-any-return, operator, union-attr]

    @property
    def refusing(self) -> float:
        raise RuntimeError("call configure() first")

    @property
    def by_epoch(self) -> float:
        return self.weight * self.current_epoch

    @property
    def read_only(self) -> float:
        return self._kept

    @property
    def computed(self) -> torch.Tensor:
        return self.parameter.detach() * 2

    @property
    def settable(self) -> float:
        return self._kept

    @settable.setter
    def settable(self, value: float) -> None:
        self._kept = value


PATHS: dict[str, Callable[[Model], Any]] = {
    "weight": lambda model: model.weight,
    "whole": lambda model: model.whole,
    "settable": lambda model: model._kept,
    "beta": lambda model: model.beta,
    "parameter": lambda model: model.parameter,
    "params.kld_weight": lambda model: model.params["kld_weight"],
    "params.nested.betas.1": lambda model: model.params["nested"]["betas"][1],  # type: ignore[index]
    "params.nested.betas.-1": lambda model: model.params["nested"]["betas"][1],  # type: ignore[index]
    "several.1": lambda model: model.several[1],
    "array.-1": lambda model: model.array[2],
    "weights.kl": lambda model: model.weights["kl"],
    "levels.1": lambda model: model.levels[1],
    "slots.beta": lambda model: model.slots.beta,
    "hparams.kl": lambda model: model.hparams["kl"],
    "cfg.beta": lambda model: model.cfg.beta,
    "plain.inner.beta": lambda model: model.plain.inner.beta,
    "loss.kld_weight": lambda model: model.loss.kld_weight,
    "loss.beta": lambda model: model.loss.beta,
    "parts.0.kld_weight": lambda model: model.parts[0].kld_weight,
    "compiled.kld_weight": lambda model: model.compiled._orig_mod.kld_weight,
    "compiled.beta": lambda model: model.compiled._orig_mod.beta,
    "distributed.kld_weight": lambda model: model.distributed.module.kld_weight,
    "distributed.beta": lambda model: model.distributed.module.beta,
    "both.kld_weight": lambda model: model.both.module._orig_mod.kld_weight,
}


@pytest.mark.parametrize("path", PATHS)
def test_a_number_is_read_and_written_where_it_lies(path: str) -> None:
    model = Model()
    before = PATHS[path](model)

    attribute = AttributePath(model, path)
    assert attribute.read() == 1.0
    attribute.write(0.25)

    after = PATHS[path](model)
    assert after == 0.25
    assert attribute.read() == 0.25
    if isinstance(before, torch.Tensor):
        assert after.data_ptr() == before.data_ptr(), "a tensor is filled, never replaced"


def test_nothing_but_the_number_changes() -> None:
    model = Model()
    names = set(vars(model)), set(model.state_dict())
    for path in PATHS:
        AttributePath(model, path).write(0.5)
    assert (set(vars(model)), set(model.state_dict())) == names
    assert model.params["nested"] == {"betas": [1.0, 0.5]}
    assert model.parameter.requires_grad
    assert "kld_weight" not in vars(model.compiled)
    assert "kld_weight" not in vars(model.distributed)


def test_filling_a_compiled_buffer_changes_what_is_computed() -> None:
    model = Model()
    AttributePath(model, "compiled.beta").write(3.0)
    assert model.compiled._orig_mod(torch.ones(())) == 3.0


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("bta", r"Model has no 'bta'. Did you mean 'beta'"),
        ("zzz", r"Model has no 'zzz'. It has 'weight', 'whole'"),
        ("params.kl_weight", r"dict has no 'kl_weight'. Did you mean 'kld_weight'\? It has 'params.kld_weight'"),
        ("params.nested.betas.2", r"list has no '2'. It has 'params.nested.betas.0', 'params.nested.betas.1'"),
        ("loss.beeta", r"Loss has no 'beeta'. Did you mean 'beta'\?"),
        ("compiled.beeta", r"Loss has no 'beeta'"),
        ("distributed.beeta", r"Loss has no 'beeta'"),
        ("los.beta", r"Model has no 'los'. Did you mean 'loss'"),
        ("cfg.gamma", r"Config has no 'gamma'. It has 'cfg.beta'"),
        ("slots.gamma", r"Slots has no 'gamma'. It has 'slots.beta'"),
        ("levels.2", r"dict has no '2'. It has 'levels.0', 'levels.1'"),
        ("several.2", r"Tensor has no '2'. It has 'several.0', 'several.1'"),
        ("setable", r"Did you mean 'settable'"),
        (
            "kld_weight",
            r"Model has no 'kld_weight'. Did you mean 'params.kld_weight' or 'loss.kld_weight' or 'compiled",
        ),
        ("unready", r"Model.unready can't be read when fitting starts: AttributeError.*built_later"),
        ("nothing.beta", r"the owner of 'beta' is None when fitting starts"),
        ("refusing", r"can't be read: RuntimeError\('call configure\(\) first'\)"),
    ],
)
def test_a_path_that_leads_nowhere_names_what_is_near_and_creates_nothing(path: str, message: str) -> None:
    model = Model()
    names = set(vars(model)), set(model._buffers), set(vars(model.loss)), set(model.params), set(vars(model.cfg))
    with pytest.raises(ValueError, match=message):
        AttributePath(model, path)
    assert names == (
        set(vars(model)),
        set(model._buffers),
        set(vars(model.loss)),
        set(model.params),
        set(vars(model.cfg)),
    )


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("loss", r"must lead to a number.*got Loss. Did you mean one of .*'loss.kld_weight'"),
        ("params", r"got dict. Did you mean one of 'params.kld_weight'"),
        ("text", r"got str\.$"),
        ("flag", r"got bool\.$"),
        ("several", r"got Tensor. Did you mean one of 'several.0', 'several.1'"),
        ("integers", r"tensor of torch.int64, which would round"),
    ],
)
def test_a_path_to_something_that_is_no_number(path: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AttributePath(Model(), path)


@pytest.mark.parametrize("path", ["read_only", "computed"])
def test_a_number_that_cannot_be_set_says_what_to_do_at_once(path: str) -> None:
    with pytest.raises(ValueError, match=r"can't be set .*Name its source, or pass `setter=`"):
        AttributePath(Model(), path)


def test_a_field_of_a_frozen_dataclass_is_replaced_with_it() -> None:
    with pytest.raises(ValueError, match=r"can't be set .* `setter=`.* that uses `dataclasses.replace`"):
        AttributePath(Model(), "frozen.beta")


@pytest.mark.parametrize("path", ["training_step", "forward", "float", "loss.forward", "loss.half"])
def test_a_method_that_does_more_than_return_a_number_is_left_alone(path: str) -> None:
    with pytest.raises(ValueError, match="does more than return a number"):
        AttributePath(Model(), path)


@pytest.mark.parametrize("path", ["read_only", "by_epoch"])
def test_a_read_only_number_is_refused_with_the_way_out(path: str) -> None:
    with pytest.raises(ValueError, match=rf"`attribute='{path}'` can't be set .*Name its source, or"):
        AttributePath(Model(), path)


def test_a_method_is_replaced_by_the_value_on_this_object_alone() -> None:
    model = Model()
    attribute = AttributePath(model, "method")
    assert attribute.read() is None
    attribute.write(0.25)
    assert (model.method(), model.method(7), model.method(step=7), attribute.read()) == (0.25,) * 4
    assert attribute.overwritten() is None
    attribute.write(0.5)
    assert model.method() == 0.5
    assert Model().method(5) == 0.5 == 0.1 * 5
    assert copy.deepcopy(model).method() == pickle.loads(pickle.dumps(model.__dict__["method"]))() == 0.5


def test_what_lies_on_the_way_may_be_replaced() -> None:
    model = Model()
    attribute = AttributePath(model, "cfg.beta")
    model.cfg = Config(beta=7.0)
    attribute.write(0.5)
    assert model.cfg.beta == 0.5


@pytest.mark.parametrize(
    ("path", "change"),
    [
        ("weight", lambda model: setattr(model, "weight", 0.75)),
        ("beta", lambda model: model.beta.fill_(0.75)),
        ("beta", lambda model: setattr(model, "beta", torch.tensor(0.0).fill_(0.75))),  # which was filled as often
        ("beta", lambda model: setattr(model.beta, "data", torch.tensor(0.75))),
        ("beta", lambda model: model.beta.data.fill_(0.75)),  # as weight averaging does: it leaves no version
        ("several.1", lambda model: model.several[1].fill_(0.75)),
        ("cfg.beta", lambda model: setattr(model, "cfg", Config())),
        ("method", lambda model: vars(model).pop("method")),
        ("settable", lambda model: setattr(model, "_kept", 0.0)),
    ],
)
def test_a_number_that_something_else_moved_does_not_hold(path: str, change: Callable[[Any], Any]) -> None:
    model = Model()
    attribute = AttributePath(model, path)
    attribute.write(0.5)
    assert attribute.overwritten() is None
    change(model)
    assert attribute.overwritten() is attribute


def test_what_leaves_the_number_as_it_is_holds() -> None:
    model: Any = Model()
    model.beta = model.beta.bfloat16()
    attributes = [AttributePath(model, path) for path in ("beta", "several.0", "several.1", "parameter")]
    for value, attribute in zip((0.3, 0.1, 0.2, 0.5), attributes, strict=True):
        attribute.write(value)  # each write moves the version of a tensor that two share
    model.beta.copy_(model.beta.clone())  # as a broadcast of buffers does
    with torch.no_grad():
        model.parameter += 0.1  # as its optimizer does, after the loss
    assert [attribute.overwritten() for attribute in attributes] == [None] * 4


def test_a_field_of_a_named_tuple_is_refused() -> None:
    with pytest.raises(ValueError, match=r"pair.beta"):
        AttributePath(Model(), "pair.beta")


def test_the_places_of_a_number() -> None:
    @dataclass(frozen=True)
    class Frozen:
        beta: float = 0.3

    model: Any = LightningModule()
    model.sub = nn.Module()
    model.sub.register_buffer("weight", torch.tensor(0.3))
    model.sub.options = {"kl": {"weight": 0.3, "other": 0.4}}
    model.config = SimpleNamespace(beta=0.3, owner=model)  # a cycle
    model._hidden, model.frozen, model.history, model.flag = 0.3, Frozen(), [0.3], True
    found = paths_to(model, lambda _, number: number == pytest.approx(0.3))
    assert set(found) == {"sub.weight", "sub.options.kl.weight", "config.beta", "_hidden"}
    assert len(found) == 4
    assert set(paths_to(model, lambda name, _: name in ("beta", "other"))) == {"sub.options.kl.other", "config.beta"}
