"""Read and write a number at a dotted path of a LightningModule."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import suppress
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule

_DEEPEST = 6  # a search for a number goes through as many objects
# Attributes that every module has and that no path refers to.
_FOREIGN = ("builtins", "torch", "lightning", "lightning_fabric", "pytorch_lightning")
_OF_LIGHTNING = ("training", "prepare_data_per_node", "allow_zero_length_dataloader_with_multiple_devices")


class AttributePath:
    """A number at a dotted path of a module: ``"beta"``, ``"model.beta"``, ``"params.kld_weight"``.

    The path may lead through submodules, plain objects, dict keys, list indices and the elements of a tensor. It must
    exist: an ``nn.Module`` accepts any new name, so a typo would otherwise go unnoticed and anneal nothing. Wrappers
    that keep the wrapped module in ``_orig_mod`` or ``module`` (``torch.compile``, DDP) are transparent. The path is
    followed each time, because a project may replace objects along it.

    A path may also lead to a method that returns the number. Writing then replaces the method, on this object and for
    good, by a function that returns the written number for any arguments.

    Args:
        pl_module: Where the path starts.
        path: The path.

    Raises:
        ValueError: If the path leads nowhere, to something other than a number, or to a number that can't be set.
    """

    def __init__(self, pl_module: LightningModule, path: str) -> None:
        self.path = path
        self._root = pl_module
        *self._parents, self._name = path.split(".")
        self._written: float | Tensor = math.nan
        self._filled: tuple[int, int] | None = None
        try:
            owner, value = self._find()
        except PathError as error:
            raise error from None
        except Exception as error:
            raise ValueError(f"`attribute={path!r}` can't be read: {error!r}.") from error
        self._check(owner, value)

    def read(self) -> float | None:
        """Return the current number; ``None`` for a method, whose arguments are not known."""
        return _number(self._find()[1])

    def write(self, value: float | Tensor) -> None:
        """Set the number: a tensor is filled in place, a method is replaced by one that returns it, a number is set.

        Writing a 0-dim tensor to a place that does not hold a tensor waits for its device.

        Raises:
            ValueError: If the place does not take this value.
        """
        try:
            owner: Any = self._root
            buffers = {} if self._parents else owner._buffers
            if self._name in buffers:  # `getattr` would check these last
                current = buffers[self._name]
            else:
                owner, current = self._find()
            if isinstance(current, Tensor):
                (current.detach() if current.requires_grad else current).fill_(value)
                self._filled = (current.data_ptr(), current._version)
            else:
                value = float(value) if isinstance(value, Tensor) else value
                if isinstance(current, _Returns):
                    current.value = value
                else:
                    _set(owner, self._name, _Returns(value) if callable(current) else value)
        except Exception as error:
            reason = str(error).removeprefix(f"`attribute={self.path!r}`: ")
            raise ValueError(f"`attribute={self.path!r}` can't be set to {float(value):g}: {reason}") from error
        self._written = value

    def overwritten(self, wait: bool = True) -> AttributePath | None:
        """Return this place if it no longer holds the written value.

        Args:
            wait: Whether reading may wait for a tensor's device. If not, a tensor with an unchanged version counts as
                unchanged, although writes to ``tensor.data``, as by weight averaging, leave no version.
        """
        current = self._find()[1]
        if isinstance(current, Tensor) and (
            current.requires_grad  # its optimizer moves it, but only after the loss
            or (not wait and (current.data_ptr(), current._version) == self._filled)
        ):
            return None
        value = _number(current)
        # Half precision keeps 8 bits, and a setter may round.
        holds = value is not None and math.isclose(value, float(self._written), rel_tol=1e-2, abs_tol=1e-7)
        return None if holds else self

    def is_count(self) -> bool:
        """Return whether the number looks like a count, such as of epochs."""
        return is_count(self._find()[1])

    def is_tensor(self) -> bool:
        """Return whether a tensor holds the number, which loading a checkpoint may overwrite."""
        return isinstance(self._find()[1], Tensor)

    def _find(self) -> tuple[Any, Any]:
        """Return the number's owner and its value."""
        return look_up(self._owner(), self._name, self.path)

    def _owner(self) -> Any:
        owner: Any = self._root
        for name in self._parents:
            owner = look_up(owner, name, self.path)[1]
        return owner

    def _check(self, owner: Any, value: Any) -> None:
        """Refuse, before the first step, anything that is not a number that can be set."""
        if isinstance(value, _Returns):
            return
        if inspect.isroutine(value):
            if self._name == "forward" or self._name.endswith("_step") or _is_lightnings(value):
                raise ValueError(f"`attribute={self.path!r}` is a method that does more than return a number.")
            return
        if not is_number(value):
            raise PathError(
                f"`attribute={self.path!r}` must lead to a number, a tensor of one element or a method that returns "
                f"one, got {type(value).__name__}.",
                f"Did you mean one of {_known(value, self.path + '.')}?" if _names(value) else "",
            )
        if isinstance(value, Tensor):
            if not value.is_floating_point():
                raise ValueError(
                    f"`attribute={self.path!r}` is a tensor of {value.dtype}, which would round the values written. "
                    "Make it a floating-point tensor."
                )
            if self._find()[1].data_ptr() != value.data_ptr():
                raise self._not_settable(owner, "it is computed each time")
            return
        try:
            _set(owner, self._name, value)
        except Exception as error:
            raise self._not_settable(owner, error) from error

    def _not_settable(self, owner: Any, reason: object) -> ValueError:
        if dataclasses.is_dataclass(owner):
            return ValueError(
                f"`attribute={self.path!r}` can't be set ({reason}). Replace the frozen dataclass as a whole with "
                "`setter=`, a callable `(pl_module, value) -> None` that uses `dataclasses.replace`."
            )
        return ValueError(
            f"`attribute={self.path!r}` can't be set ({reason}). Name its source, or pass `setter=`, a "
            "callable `(pl_module, value) -> None`."
        )


def _is_lightnings(value: Any) -> bool:
    return (getattr(value, "__module__", None) or "builtins").partition(".")[0] in _FOREIGN


class _Returns:
    """The replacement of a method. It is a class so that a module that holds one can be copied and pickled."""

    def __init__(self, value: float) -> None:
        self.value = value

    def __call__(self, *_: Any, **__: Any) -> float:
        return self.value


class PathError(ValueError):
    """A path leads to no number.

    Args:
        reason: What is wrong with it.
        advice: The names that it may have meant.
    """

    def __init__(self, reason: str, advice: str = "") -> None:
        super().__init__(f"{reason} {advice}".rstrip())
        self.reason = reason


def is_number(value: Any) -> bool:
    """Return whether a value is a number, or a tensor of one."""
    if isinstance(value, Tensor):
        return value.numel() == 1
    return isinstance(value, Real) and not isinstance(value, bool)


def _number(value: Any) -> float | None:
    if isinstance(value, _Returns):
        return value.value
    if isinstance(value, Tensor):
        return float(value.detach())
    return None if callable(value) else float(value)


def _is_indexed(owner: Any) -> bool:
    return isinstance(owner, Sequence) or (hasattr(owner, "__getitem__") and bool(getattr(owner, "shape", ())))


def _is_element(owner: Any, name: str) -> bool:
    """Return whether a name is the index of an element of a list, a tensor or an array."""
    return name.lstrip("-").isdigit() and _is_indexed(owner)


def _key(owner: Mapping[Any, Any], name: str) -> Any:
    return int(name) if name not in owner and name.lstrip("-").isdigit() else name


def look_up(owner: Any, name: str, path: str) -> tuple[Any, Any]:
    """Return the owner of a name, looking through wrappers, and the value that it has there."""
    if owner is None:
        raise PathError(f"`attribute={path!r}`: the owner of {name!r} is None when fitting starts.")
    tried = []
    while owner is not None:
        try:
            if isinstance(owner, nn.Module):
                return owner, getattr(owner, name)
            if isinstance(owner, Mapping):
                return owner, owner[_key(owner, name)]
            return owner, owner[int(name)] if _is_element(owner, name) else getattr(owner, name)
        except (AttributeError, LookupError):
            tried.append(owner)
            owner = _unwrapped(owner)
    raise _nowhere(next((each for each in tried if _near(each, name)), tried[-1]), name, path)


def _set(owner: Any, name: str, value: Any) -> None:
    if isinstance(owner, MutableMapping):
        owner[_key(owner, name)] = value
    elif _is_element(owner, name):
        owner[int(name)] = value
    else:
        setattr(owner, name, value)


def _nowhere(owner: Any, name: str, path: str) -> PathError:
    start = f"`attribute={path!r}`: {type(owner).__name__}"
    if isinstance(getter := inspect.getattr_static(type(owner), name, None), property):
        try:
            getter.__get__(owner)
        except Exception as error:
            return PathError(f"{start}.{name} can't be read when fitting starts: {error!r}.")
    near = _near(owner, name)
    hint = f"Did you mean {' or '.join(map(repr, near))}? " if near else ""
    known = _known(owner, path[: -len(name)] if path.endswith(name) else "")
    return PathError(f"{start} has no {name!r}.", f"{hint}It has {known}.")


def _unwrapped(owner: Any) -> Any:
    """Return the wrapped module of a wrapper; ``None`` for anything else."""
    if isinstance(owner, nn.Module):
        for name in ("_orig_mod", "module"):
            if isinstance(inner := owner._modules.get(name), nn.Module):
                return inner
    return None


def _names(owner: Any) -> list[str]:
    """Return the names with which a path may continue."""
    if isinstance(owner, Mapping):
        return [str(key) for key in owner]
    if isinstance(owner, str):
        return []
    if _is_indexed(owner):
        return [str(index) for index in range(len(owner))]
    names = dict.fromkeys(getattr(owner, "__dict__", ()))
    if isinstance(owner, nn.Module):
        names.update(dict.fromkeys((*owner._buffers, *owner._parameters, *owner._modules)))
    for of_project in type(owner).__mro__:
        if not _is_lightnings(of_project):
            settable = (name for name, of in vars(of_project).items() if inspect.isdatadescriptor(of))
            names.update(dict.fromkeys(settable))
    return [name for name in names if not name.startswith("_") and name not in _OF_LIGHTNING]


def _may_hold_a_weight(owner: Any, name: str) -> bool:
    """Return whether a name may lead to one weight: not if it holds a text, a flag, or a count such as of epochs."""
    values = owner if isinstance(owner, Mapping) else getattr(owner, "__dict__", {})
    value = values.get(name, math.nan)
    return value is not None and not isinstance(value, bool | str) and not is_count(value)


def is_count(value: Any) -> bool:
    """Return whether a number is more likely a count than a weight: an integer above 1."""
    return isinstance(value, Integral) and int(value) > 1


def _near(owner: Any, name: str) -> list[str]:
    """Return likely alternatives: deeper places where the name exists, and similar names."""
    names = [each for each in _names(owner) if _may_hold_a_weight(owner, each)]
    elsewhere = [path for path in _paths(owner) if path.rpartition(".")[2] == name]
    return [*elsewhere[:3], *difflib.get_close_matches(name, names, n=3)]


def _paths(owner: Any) -> Iterator[str]:
    """Yield the paths to all that a module, its submodules and the objects that they hold have."""
    for prefix, module in owner.named_modules() if isinstance(owner, nn.Module) else ():
        start = f"{prefix}." if prefix else ""
        yield from (f"{start}{name}" for name in _names(module))
        for holder, value in vars(module).items():
            if not holder.startswith("_") and not isinstance(value, Tensor | Sequence):
                yield from (f"{start}{holder}.{name}" for name in _names(value))


def paths_to(root: LightningModule, is_wanted: Callable[[str, float], object]) -> list[str]:
    """Return the paths at which a module, its submodules, objects and dicts hold a number that can be set.

    Args:
        root: The module.
        is_wanted: Called with the last part of the path and the number; whether to return the path.
    """
    found: list[str] = []
    seen: set[int] = set()

    def search(owner: Any, prefix: str) -> None:
        seen.add(id(owner))
        for name, value in _contents(owner).items():
            if is_number(value):
                if is_wanted(str(name), float(value)):
                    with suppress(ValueError):
                        found.append(AttributePath(root, f"{prefix}{name}").path)
            elif id(value) not in seen and not str(name).startswith("_") and prefix.count(".") < _DEEPEST:
                search(value, f"{prefix}{name}.")

    search(root, "")
    return found


def _contents(owner: Any) -> Mapping[Any, Any]:
    """Return what an object holds, by name, without the values that it computes."""
    if isinstance(owner, nn.Module):
        return {**vars(owner), **owner._buffers, **owner._parameters, **owner._modules}
    if isinstance(owner, Mapping) or _is_lightnings(type(owner)):
        return owner if isinstance(owner, Mapping) else {}
    return getattr(owner, "__dict__", {})


def _known(owner: Any, prefix: str) -> str:
    names = [prefix + name for name in _names(owner) if _may_hold_a_weight(owner, name)]
    return ", ".join(map(repr, names[:15])) + (", ..." if len(names) > 15 else "") if names else "nothing to name"
