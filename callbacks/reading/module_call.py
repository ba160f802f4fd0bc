"""Calls of a method or a submodule of any LightningModule."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from functools import reduce
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .distributions import describe

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule


class ModuleCall:
    """A call of a module's method or submodule.

    Args:
        option: Name of the option, for errors.
        where: The path of a method or submodule, ``"model.decode"``, or of a part of its output,
            ``"model.forward:0"``; or a callable ``(pl_module, input)``.

    Raises:
        ValueError: If ``where`` is neither.
    """

    def __init__(self, option: str, where: str | Callable[..., Any]) -> None:
        if not (callable(where) or isinstance(where, str)):
            raise ValueError(
                f"`{option}` must be the path of a method or submodule, or a callable `(pl_module, input)`, got "
                f"{where!r}."
            )
        self.option = option
        self.where = where

    def check(self, pl_module: LightningModule) -> None:
        """Check that the path leads to something callable.

        Raises:
            ValueError: If the path leads nowhere, or to something that can't be called.
        """
        if isinstance(self.where, str):
            self._find(pl_module, self.where)

    def __call__(self, pl_module: LightningModule, *values: Any) -> Any:
        """Call the method or submodule."""
        if not isinstance(self.where, str):
            return self.where(pl_module, *values)
        return part_of_output(self._find(pl_module, self.where)(*values), self.where, self.option)

    def _find(self, pl_module: LightningModule, where: str) -> Callable[..., Any]:
        path = where.partition(":")[0]
        try:
            found: Any = reduce(getattr, path.split("."), pl_module)
        except AttributeError:
            found = None
        if not callable(found):
            names = _callables(pl_module)
            last = path.rpartition(".")[2]
            alike = [name for name in names if name.rpartition(".")[2] == last]
            near = alike or difflib.get_close_matches(path, names, n=3)
            hint = f"Did you mean {' or '.join(map(repr, near))}?" if near else f"It has {', '.join(names[:20])}."
            raise ValueError(
                f"`{self.option}`: {type(pl_module).__name__} has nothing callable at {path!r}. {hint} Or pass a "
                "callable `(pl_module, input)`."
            )
        called: Callable[..., Any] = found
        return called


def part_of_output(output: Any, path: str, option: str = "posterior") -> Any:
    """Return the part of an output that a path names after its colon; the whole output if there is no colon.

    Args:
        output: The output.
        path: The path, such as ``"encoder:0"``.
        option: Name of the option that it comes from, for the error.

    Raises:
        ValueError: If there is no such part.
    """
    part = path.partition(":")[2]
    for name in part.split(".") if part else ():
        try:
            output = _item(output, name)
        except (AttributeError, LookupError, TypeError):
            hint = " To split a tensor into halves, use `chunk=`." if isinstance(output, Tensor) else ""
            raise ValueError(f"`{option}={path!r}`: {describe(output)} has no {name!r}.{hint}") from None
    return output


def _callables(pl_module: LightningModule) -> list[str]:
    """Return the callable paths of a module: its submodules, and the methods that they define."""
    names = []
    for path, module in pl_module.named_modules():
        names += [path] if path else []
        for cls in type(module).__mro__:
            if cls.__module__.partition(".")[0] not in ("torch", "lightning", "pytorch_lightning", "builtins"):
                names += [f"{path}.{name}".lstrip(".") for name in vars(cls) if not name.startswith("_")]
    return sorted(dict.fromkeys(names), key=lambda name: name.count("."))


def _item(value: Any, name: str) -> Any:
    """Look a name up in a value: as a key, an index or a field."""
    if isinstance(value, Tensor):  # an index would pick an observation, a field would be a method
        raise TypeError
    if isinstance(value, Mapping) and name in value:
        return value[name]
    return value[int(name)] if name.lstrip("-").isdigit() else getattr(value, name)
