"""Reading and writing a number that a LightningModule keeps somewhere."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, MutableMapping, MutableSequence, Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule

# What every module has, and nobody means.
_OF_LIGHTNING = ("training", "prepare_data_per_node", "allow_zero_length_dataloader_with_multiple_devices")


class Attribute:
    """A number that lies at a dotted path of a module: ``"beta"``, ``"model.beta"``, ``"params.kld_weight"``.

    The path may pass through submodules, plain objects, dict keys and list indices. It must exist: an ``nn.Module``
    takes any new name without a word, so a typing error would otherwise anneal nothing. Wrappers that keep the real
    thing in ``_orig_mod`` or ``module`` (``torch.compile``, DDP) are looked through.

    Args:
        pl_module: Where the path starts.
        path: The path.

    Raises:
        ValueError: If the path leads nowhere, to something that is no number, or to a number that can't be set.
    """

    def __init__(self, pl_module: LightningModule, path: str) -> None:
        self.path = path
        *parents, self._name = path.split(".")
        owner: Any = pl_module
        for name in parents:
            owner = _get(owner, name, path)
        while not _has(owner, self._name) and (inner := _unwrapped(owner)) is not None:
            owner = inner
        self._owner = owner
        value = _get(owner, self._name, path)
        is_number = isinstance(value, Real) and not isinstance(value, bool)
        if not (is_number or (isinstance(value, Tensor) and value.numel() == 1)):
            within = f" Did you mean one of {_known(value, path + '.')}?" if _names(value) else ""
            raise ValueError(
                f"`attribute={path!r}` must lead to a number or a tensor of one element, got {type(value).__name__}."
                + within
            )
        if isinstance(value, Tensor) and not value.is_floating_point():
            raise ValueError(
                f"`attribute={path!r}` is a tensor of {value.dtype}, which would round what is written to it. Make it "
                "a floating-point tensor."
            )
        # What can't be set says so before the first step.
        self._set(value)
        if isinstance(value, Tensor) and _get(owner, self._name, path).data_ptr() != value.data_ptr():
            raise self._not_settable("it is computed anew each time")

    def read(self) -> float:
        """Return the number as it is now."""
        value = _get(self._owner, self._name, self.path)
        return float(value.detach() if isinstance(value, Tensor) else value)

    def write(self, value: float) -> None:
        """Set the number: a tensor is filled in place, anything else is replaced."""
        current = _get(self._owner, self._name, self.path)
        if isinstance(current, Tensor):
            with torch.no_grad():
                current.fill_(value)
        else:
            self._set(value)

    def _set(self, value: Any) -> None:
        if isinstance(value, Tensor):
            return
        try:
            if isinstance(self._owner, MutableMapping):
                self._owner[self._name] = value
            elif isinstance(self._owner, MutableSequence):
                self._owner[int(self._name)] = value
            else:
                setattr(self._owner, self._name, value)
        except (AttributeError, TypeError) as error:
            raise self._not_settable(error) from error

    def _not_settable(self, reason: object) -> ValueError:
        return ValueError(
            f"`attribute={self.path!r}` can't be set ({reason}). Name what it is computed from, or pass `setter=`, a "
            "callable `(pl_module, value) -> None`."
        )


def writer(
    pl_module: LightningModule,
    attribute: str | Sequence[str],
    setter: Callable[[LightningModule, float], None] | None,
) -> tuple[Callable[[float], None], float | None]:
    """Resolve where a knob is written to.

    Args:
        pl_module: The module that keeps it.
        attribute: Its path, or several that get the same value.
        setter: Writes it instead, if given.

    Returns:
        A function that writes a value, and the value there now; ``None`` where only a setter knows.
    """
    if setter is not None:
        return lambda value: setter(pl_module, value), None
    attributes = [Attribute(pl_module, path) for path in ([attribute] if isinstance(attribute, str) else attribute)]

    def write(value: float) -> None:
        for each in attributes:
            each.write(value)

    return write, attributes[-1].read()


def _has(owner: Any, name: str) -> bool:
    if isinstance(owner, Mapping):
        return name in owner
    if isinstance(owner, Sequence):
        return name.lstrip("-").isdigit() and -len(owner) <= int(name) < len(owner)
    return hasattr(owner, name)


def _get(owner: Any, name: str, path: str) -> Any:
    while not _has(owner, name):
        inner = _unwrapped(owner)
        if inner is None:
            known = _known(owner, path[: -len(name)] if path.endswith(name) else "")
            near = difflib.get_close_matches(name, _names(owner), n=3)
            hint = f"Did you mean {' or '.join(map(repr, near))}? " if near else ""
            raise ValueError(f"`attribute={path!r}`: {type(owner).__name__} has no {name!r}. {hint}It has {known}.")
        owner = inner
    if isinstance(owner, Mapping):
        return owner[name]
    return owner[int(name)] if isinstance(owner, Sequence) else getattr(owner, name)


def _unwrapped(owner: Any) -> Any:
    """Return what a wrapper wraps, if it is one."""
    if isinstance(owner, torch.nn.Module):
        for name in ("_orig_mod", "module"):
            if isinstance(inner := owner._modules.get(name), torch.nn.Module):
                return inner
    return None


def _names(owner: Any) -> list[str]:
    if isinstance(owner, Mapping):
        return [str(key) for key in owner]
    if isinstance(owner, Sequence) and not isinstance(owner, str):
        return [str(index) for index in range(len(owner))]
    names = dict.fromkeys(vars(owner)) if hasattr(owner, "__dict__") else {}
    if isinstance(owner, torch.nn.Module):
        names.update(dict.fromkeys((*owner._buffers, *owner._parameters, *owner._modules)))
    return [name for name in names if not name.startswith("_") and name not in _OF_LIGHTNING]


def _known(owner: Any, prefix: str) -> str:
    names = [prefix + name for name in _names(owner)]
    return ", ".join(map(repr, names[:15])) + (", ..." if len(names) > 15 else "") if names else "nothing to name"
