"""Parts of a model named in a form that a checkpoint can hold: ``{"class_path": ..., "init_args": {...}}``."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import nn


def describe(part: Any) -> Any:
    """Describe a part, so that :func:`build` can make it again from a checkpoint loaded with ``weights_only=True``.

    Args:
        part: A class, a ``functools.partial`` of one with plain keyword arguments, a description already, or ``None``;
            anything else (an ``nn.Module``, a function) can't be described.

    Returns:
        ``{"class_path": ..., "init_args": {...}}``, or ``{"instance_of": ...}`` for what can't be described.
    """
    if part is None or isinstance(part, Mapping):
        return part
    constructor, arguments = (part.func, part.keywords) if isinstance(part, partial) and not part.args else (part, {})
    if isinstance(constructor, type) and "<locals>" not in constructor.__qualname__ and _is_plain(arguments):
        return {"class_path": _path(constructor), "init_args": dict(arguments)}
    return {"instance_of": _path(part if callable(part) and not isinstance(part, nn.Module | partial) else type(part))}


def build(name: str, part: Any, *args: Any) -> nn.Module:
    """Make a part of the model.

    Args:
        name: Name of the model's argument, for messages.
        part: What was given for it: an ``nn.Module``, or a class, callable or description to call with ``args``.
        args: What every such constructor takes.

    Raises:
        ValueError: If the part is the description of something that can't be made again.
        TypeError: If it is something else altogether.
    """
    if isinstance(part, Mapping):
        part = partial(_constructor(name, part), **part.get("init_args", {}))
    try:
        built = part if isinstance(part, nn.Module) or not callable(part) else part(*args)
    except (TypeError, RuntimeError) as error:  # not made for such arguments, or for numbers such as these
        made_of = ", ".join(map(str, args))
        raise ValueError(f"`{name}` can't be made of {made_of} by {_name(part)}: {error}") from error
    if not isinstance(built, nn.Module):
        raise TypeError(
            f"`{name}` must be an nn.Module, or a class or callable that makes one, got {type(built).__name__}."
        )
    return built


def check_descriptions(name: str, value: Any) -> None:
    """Refuse hyper-parameters in a checkpoint that name anything but networks, at whatever depth.

    Config parsers call whatever a ``class_path`` names, a function such as ``os.system`` too.

    Args:
        name: Name of the value, for messages.
        value: The value.

    Raises:
        ValueError: If a ``class_path`` names no subclass of ``torch.nn.Module``.
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
            f"`{name}` was given as an instance of {description['instance_of']}, which a checkpoint can't make again. "
            + remedy
        )
    path = str(description.get("class_path"))
    module, _, attribute = path.rpartition(".")
    try:
        constructor = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"`{name}` names the class {path!r}, which can't be imported: {error}. {remedy}") from error
    # A checkpoint is data: what it names is called only if it is a network.
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
