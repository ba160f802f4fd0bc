"""Find what else sets a number of the module, and the remedy."""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ..base import callbacks_of

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

_SCHEDULE = re.compile("warm_?up|anneal|schedule")
_KL_WEIGHT = re.compile("kl|beta")  # a warm-up may also belong to another term, such as an adversarial one
_LEARNING_RATE = re.compile("lr|learning_rate|scheduler")
_END = re.compile("(^|_)(min|max)(_|$)")
_NOT_OF_PROJECTS = (__name__.rpartition(".control.")[0], "lightning.", "pytorch_lightning.", "builtins")


def remedy(pl_module: LightningModule, written: Sequence[str]) -> str:
    """Return the remedy for a conflict with a module's own schedule; empty if no such schedule is found.

    Args:
        pl_module: The module.
        written: The paths that a callback writes to.
    """
    if callable(getattr(pl_module, "remove_schedule", None)):
        return "Remove the module's own schedule with its method `remove_schedule`."
    held = [(path, vars(module)) for path, module in pl_module.named_modules()]
    values = [each for _, each in held] + [dict(getattr(pl_module, "hparams", {}))]
    own = [f"`{name}={value!r}`" for each in values for name, value in each.items() if _is_schedule(name, value)]
    ends = [f"{path}.{name}".lstrip(".") for path, each in held for name in each if _is_end(name)]
    ways = [f"switch off the module's own schedule, perhaps {' and '.join(dict.fromkeys(own))}"] if own else []
    if not {*ends} <= {*written}:  # a schedule between equal ends is constant
        ways.append(f"write the ends of its range too, {' and '.join(f'`{end}`' for end in ends)}")
    text = ", or ".join(ways)
    return f"{text[:1].upper()}{text[1:]}." if ways else ""


def suspects(trainer: Trainer, name: str) -> list[str]:
    """Return the class names of a project's callbacks whose code contains a name, as those that set it do."""
    return [type(each).__name__ for each in callbacks_of(trainer) if name in _names(each)]


def _names(callback: Any) -> Iterator[str]:
    """Yield the names and constants in the code of a callback, except for code of Lightning and of this package."""
    of_project = (each for each in type(callback).__mro__ if not each.__module__.startswith(_NOT_OF_PROJECTS))
    for value in itertools.chain(*(vars(each).values() for each in (callback, *of_project))):
        if inspect.isfunction(value):
            yield from (*value.__code__.co_names, *value.__code__.co_consts)


def _is_end(name: str) -> bool:
    return bool(_KL_WEIGHT.search(name) and _END.search(name))


def _is_schedule(name: str, value: Any) -> bool:
    return (
        bool(_SCHEDULE.search(name))
        and bool(_KL_WEIGHT.search(name))
        and not _LEARNING_RATE.search(name)
        and isinstance(value, int | float | str)
        and bool(value)
    )
