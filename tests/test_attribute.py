from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn

from lightning_vae.callbacks.attribute import Attribute, writer


@dataclass
class Config:
    beta: float = 1.0


@dataclass(frozen=True)
class Frozen:
    beta: float = 1.0


Pair = namedtuple("Pair", "beta gamma")


class Loss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kld_weight = 1.0
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
        self.loss = Loss()
        self.compiled: Any = torch.compile(Loss())
        self.distributed = Wrapper(Loss())
        self.both = Wrapper(torch.compile(Loss()))  # type: ignore[arg-type]
        self.parts: Any = nn.ModuleList([Loss()])
        self._kept = 1.0

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

    attribute = Attribute(model, path)
    assert attribute.read() == 1.0
    attribute.write(0.25)

    after = PATHS[path](model)
    assert after == 0.25
    assert attribute.read() == 0.25
    if isinstance(before, torch.Tensor):
        assert after is before, "a tensor is filled, never replaced"


def test_nothing_but_the_number_changes() -> None:
    model = Model()
    names = set(vars(model)), set(model.state_dict())
    for path in PATHS:
        Attribute(model, path).write(0.5)
    assert (set(vars(model)), set(model.state_dict())) == names
    assert model.params["nested"] == {"betas": [1.0, 0.5]}
    assert model.parameter.requires_grad
    assert "kld_weight" not in vars(model.compiled)
    assert "kld_weight" not in vars(model.distributed)


def test_filling_a_compiled_buffer_changes_what_is_computed() -> None:
    model = Model()
    Attribute(model, "compiled.beta").write(3.0)
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
    ],
)
def test_a_path_that_leads_nowhere_names_what_is_near_and_creates_nothing(path: str, message: str) -> None:
    model = Model()
    names = set(vars(model)), set(model._buffers), set(vars(model.loss)), set(model.params), set(vars(model.cfg))
    with pytest.raises(ValueError, match=message):
        Attribute(model, path)
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
        ("several", r"got Tensor\.$"),
        ("integers", r"tensor of torch.int64, which would round"),
    ],
)
def test_a_path_to_something_that_is_no_number(path: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Attribute(Model(), path)


@pytest.mark.parametrize("path", ["read_only", "computed", "frozen.beta"])
def test_a_number_that_cannot_be_set_says_what_to_do_at_once(path: str) -> None:
    with pytest.raises(ValueError, match=r"can't be set .*Name what it is computed from, or pass `setter=`"):
        Attribute(Model(), path)


def test_a_field_of_a_named_tuple_is_refused() -> None:
    with pytest.raises(ValueError, match=r"pair.beta"):
        Attribute(Model(), "pair.beta")


def test_several_paths_get_the_same_value() -> None:
    model: Any = Model()
    write, current = writer(model, ["weight", "params.kld_weight", "beta"], None)
    write(0.125)
    assert current == 1.0
    assert (model.weight, model.params["kld_weight"], model.beta) == (0.125, 0.125, 0.125)


def test_one_wrong_path_among_several_is_an_error() -> None:
    with pytest.raises(ValueError, match="'kld_wait'"):
        writer(Model(), ["weight", "kld_wait"], None)


def test_a_setter_takes_the_place_of_the_path() -> None:
    model = Model()
    write, current = writer(model, "nowhere", lambda pl_module, value: setattr(pl_module.cfg, "beta", value))
    write(0.5)
    assert current is None
    assert model.cfg.beta == 0.5
