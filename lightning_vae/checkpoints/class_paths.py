"""Describe a model's parts in a form that a checkpoint can hold, and build them from it."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

import torch
from lightning.fabric.utilities.cloud_io import get_filesystem
from torch import nn

_REASONS = {
    "condition_dim": "the size of the model's condition c, which the network is called with as its second input",
    "outputs": "the number of columns that the encoder must return for the model's `posterior`",
}
"""Why the model passes an option to the constructor of a network."""


def describe(part: Any) -> Any:
    """Describe a part so that :func:`build` can make it from a checkpoint loaded with ``weights_only=True``.

    Args:
        part: A class, a ``functools.partial`` of one with plain keyword arguments, a description, or ``None``. Nothing
            else (an ``nn.Module``, a function) can be described.

    Returns:
        ``{"class_path": ..., "init_args": {...}}``, or ``{"instance_of": ...}`` for what can't be described.
    """
    if part is None or isinstance(part, Mapping):
        return part
    constructor, arguments = (part.func, part.keywords) if isinstance(part, partial) and not part.args else (part, {})
    if isinstance(constructor, type) and "<locals>" not in constructor.__qualname__ and _is_plain(arguments):
        return {"class_path": _path(constructor), "init_args": dict(arguments)}
    return {"instance_of": _path(part if callable(part) and not isinstance(part, nn.Module | partial) else type(part))}


def build(name: str, part: Any, *args: Any, of: type[nn.Module] = nn.Module, **options: Any) -> Any:
    """Build a part of the model.

    Args:
        name: Name of the model's argument, for messages.
        part: What was given for it: an ``nn.Module``, or a class, callable or description to call with the arguments.
        *args: Positional arguments of the constructor.
        of: The class that it must derive from.
        **options: Keyword arguments of the constructor.

    Raises:
        ValueError: If the part can't be built from its description, or building fails.
        TypeError: If the result is of another class.
    """
    if isinstance(part, Mapping):
        part = partial(_constructor(name, part), **part.get("init_args", {}))
    try:
        built = part if isinstance(part, nn.Module) or not callable(part) else part(*args, **options)
    except (TypeError, RuntimeError) as error:  # other arguments, or numbers that don't fit
        given = ", ".join([*map(str, args), *(f"{option}={value}" for option, value in options.items())])
        lacks = [option for option in options if option in _REASONS and not takes(name, part, option)]
        if lacks and "unexpected keyword argument" in str(error):
            reasons = "; ".join(f"`{option}`, {_REASONS[option]}" for option in lacks)
            raise ValueError(
                f"`{name}`: the constructor of {_name(part)} must take {reasons}. It was called with {given}."
            ) from error
        raise ValueError(f"`{name}`: {_name(part)} can't be built with {given}: {error}") from error
    if not isinstance(built, of):
        wanted = "an nn.Module" if of is nn.Module else f"a lightning_vae.{of.__name__}"
        raise TypeError(
            f"`{name}` must be {wanted}, or a class or callable that makes one, got {type(built).__name__}."
        )
    return built


def check_inputs(name: str, network: nn.Module, *inputs: str) -> None:
    """Check that a network can be called with the model's inputs, which are only named here.

    Args:
        name: Name of the model's argument, for messages.
        network: The network.
        *inputs: Names of what it is called with.

    Raises:
        ValueError: If its ``forward`` takes other arguments.
    """
    try:
        signature = inspect.signature(network.forward)
    except (TypeError, ValueError):  # a compiled one
        return
    try:
        signature.bind(*inputs)
    except TypeError:
        of = ", where c is that of the model's `condition`," if "c" in inputs else " in a model without a `condition`,"
        raise ValueError(
            f"`{name}`: {_name(network)} is called with ({', '.join(inputs)}){of} but its `forward` takes {signature}."
        ) from None


def takes(name: str, part: Any, option: str) -> bool:
    """Return whether a constructor has a parameter of this name.

    Args:
        name: Name of the model's argument, for messages.
        part: What was given for it, as for :func:`build`.
        option: Name of the parameter.

    Raises:
        ValueError: If its description names no network.
    """
    constructor = _constructor(name, part) if isinstance(part, Mapping) else part
    if isinstance(part, partial):  # that of a config's parser has the class among its arguments
        constructor = next((each for each in (part.func, *part.args) if isinstance(each, type)), part)
    is_constructor = callable(constructor) and not isinstance(constructor, nn.Module)
    return is_constructor and option in inspect.signature(constructor).parameters


def check_checkpoint(source: Any, replaced: Collection[str] = ()) -> None:
    """Check that the hyperparameters in a checkpoint name only networks.

    Args:
        source: A path, a URL or an open file.
        replaced: Names of the hyperparameters that are not taken from the checkpoint.

    Raises:
        ValueError: If a ``class_path`` does not name a subclass of ``torch.nn.Module``.
    """
    if hasattr(source, "seek"):
        place = source.tell()
        checkpoint = torch.load(source, map_location="cpu", weights_only=True)
        source.seek(place)
    else:
        with get_filesystem(source).open(str(source), "rb") as file:
            checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    for name, value in checkpoint.get("hyper_parameters", {}).items():
        if name not in replaced:
            check_descriptions(name, value)


def check_descriptions(name: str, value: Any) -> None:
    """Refuse hyperparameters that name anything but networks, at any depth.

    Config parsers call whatever a ``class_path`` names, even a function such as ``os.system``.

    Args:
        name: Name of the value, for messages.
        value: The value.

    Raises:
        ValueError: If a ``class_path`` does not name a subclass of ``torch.nn.Module``.
    """
    if isinstance(value, Mapping):
        if "class_path" in value:
            _constructor(name, value)
        for key, item in value.items():
            check_descriptions(f"{name}.{key}", item)
    elif isinstance(value, list | tuple):
        for item in value:
            check_descriptions(name, item)


def _constructor(name: str, description: Mapping[str, Any]) -> type[nn.Module]:
    remedy = f"Pass one to load its weights into: `VAE.load_from_checkpoint(path, {name.rpartition('.')[2]}=...)`."
    if "instance_of" in description:
        raise ValueError(
            f"`{name}` was given as an instance of {description['instance_of']}, which a checkpoint can't rebuild. "
            + remedy
        )
    path = str(description.get("class_path"))
    module, _, attribute = path.rpartition(".")
    try:
        constructor = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"`{name}` names the class {path!r}, which can't be imported: {error}. {remedy}") from error
    # A checkpoint may come from an untrusted source: only networks that it names are called.
    if not (isinstance(constructor, type) and issubclass(constructor, nn.Module)):
        raise ValueError(f"`{name}` must name a subclass of torch.nn.Module, got {path!r}. {remedy}")
    return constructor


def _name(part: Any) -> str:
    part = part.func if isinstance(part, partial) else part
    return str(getattr(part, "__qualname__", type(part).__name__))


def _path(constructor: Any) -> str:
    return f"{constructor.__module__}.{constructor.__qualname__}"


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(_is_plain(item) for item in value.values())
    if isinstance(value, list | tuple):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, bool | int | float | str)
