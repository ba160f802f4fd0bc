"""Check a config for mistakes that its parser, or the Trainer, would accept silently."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
import yaml
from jsonargparse import get_loader, set_loader
from lightning.pytorch.cli import instantiate_class
from torch import nn

from ..replaced_names import advice

# Minimum values of Trainer options that the Trainer does not check, or checks only late.
_LEAST = {
    "min_epochs": 0,
    "min_steps": 0,
    "limit_train_batches": 0,
    "limit_val_batches": 0,
    "limit_test_batches": 0,
    "limit_predict_batches": 0,
    "check_val_every_n_epoch": 1,
    "num_sanity_val_steps": -1,
    "log_every_n_steps": 0,
    "accumulate_grad_batches": 1,
    "gradient_clip_val": 0,
}
_MISSING = object()
_LARGEST = {int: 2**63 - 1, float: torch.finfo(torch.float32).max}


def install() -> None:
    """Make jsonargparse check each YAML text with :func:`check_text` before it parses it."""
    load = get_loader("yaml")
    if getattr(load, "checks", False):
        return

    def checked(text: str) -> Any:
        check_text(text)
        return load(text)

    checked.checks = True  # type: ignore[attr-defined]
    set_loader("yaml", checked, (yaml.YAMLError,))


def check_text(text: str) -> None:
    """Check a YAML text for mistakes that the parser would misread.

    Args:
        text: The text.

    Raises:
        yaml.YAMLError: If it is not YAML, if a mapping has a key twice (YAML takes the last), if a ``class_path`` is
            not a name or if ``init_args`` is not a mapping.
    """
    for node in _mappings(yaml.compose(text, Loader=yaml.SafeLoader)):
        key, times = Counter(str(key.value) for key, _ in node.value).most_common(1)[0] if node.value else ("", 1)
        if times > 1:
            raise yaml.YAMLError(f"`{key}` is given {times} times in the mapping{node.start_mark}")
        for key, value in node.value:
            if key.value == "class_path" and not value.tag.endswith(":str"):
                raise yaml.YAMLError(f"`class_path` must be the name of a class{value.start_mark}")
            if key.value == "init_args" and not isinstance(value, yaml.MappingNode):
                raise yaml.YAMLError(f"`init_args` must be a mapping of options to values{value.start_mark}")


def check_empty(text: str, config: dict[str, Any]) -> None:
    """Refuse empty mappings that jsonargparse drops, or takes for a class that was never named.

    What a later input has replaced is not compared: a class by another one, or a mapping by ``None``.

    Args:
        text: The input, in YAML.
        config: The result of jsonargparse.

    Raises:
        ValueError: If an empty mapping is given for a name that is not an option, or in place of a class.
    """
    pending: list[tuple[str, Any, Any]] = [("", yaml.safe_load(text), config)]
    while pending:
        name, given, made = pending.pop()
        if given == {} and made is _MISSING:
            raise ValueError(f"`{name[1:]}` is not an option.")
        if given == {} and isinstance(made, dict) and "class_path" in made:
            raise ValueError(f"`{name[1:]}` must name a class by its `class_path`, got an empty mapping.")
        if isinstance(given, dict) and isinstance(made, dict) and _class_of(given) in ("", _class_of(made)):
            kept = ((key, item) for key, item in given.items() if item or key not in ("init_args", "dict_kwargs"))
            pending.extend((f"{name}.{key}", item, made.get(key, _MISSING)) for key, item in kept)
        elif isinstance(given, list) and isinstance(made, list):
            pending.extend((f"{name}.{n}", *both) for n, both in enumerate(zip(given, made, strict=False)))


def _class_of(mapping: dict[str, Any]) -> str:
    """Return the name of a class without its modules; empty if none is named."""
    return str(mapping.get("class_path") or "").rpartition(".")[2]


def check_values(config: dict[str, Any], subcommand: str) -> None:
    """Refuse numbers that no option can hold, and invalid options that the Trainer does not check.

    Args:
        config: The resolved config of a subcommand.
        subcommand: The subcommand.

    Raises:
        ValueError: If a number is not finite or too large, an option of the Trainer or the seed is out of range, or the
            limit of the batches would leave the subcommand nothing to do; `fit` has several limits.
    """
    trainer = config["trainer"]
    if not isinstance(trainer, dict):
        raise ValueError(f"`trainer` must be a mapping of options, got {trainer}.")
    for name, value in _leaves(config):
        if isinstance(value, int | float) and not abs(value) <= _LARGEST[float if isinstance(value, float) else int]:
            raise ValueError(f"`{name}` must be a finite number that fits its type, got {value}.")
    for name, least in _LEAST.items():
        value = trainer.get(name)
        if value is not None and value < least:
            raise ValueError(f"`trainer.{name}` must be at least {least}, got {value}.")
    limit = f"limit_{'val' if subcommand == 'validate' else subcommand}_batches"
    if subcommand != "fit" and trainer.get(limit) == 0:
        raise ValueError(f"`trainer.{limit}` is 0, so `{subcommand}` would do nothing. Set it to 1.0 for all batches.")
    interval = trainer.get("val_check_interval")
    if isinstance(interval, int | float) and interval <= 0:
        raise ValueError(f"`trainer.val_check_interval` must be above 0, got {interval}.")
    if replaced := advice(str(trainer.get("profiler"))):  # the parser accepts any text as a profiler
        raise ValueError(f"`trainer.profiler`: {replaced}")
    seed = config["seed_everything"]
    if not 0 <= seed < 2**32:
        raise ValueError(f"`seed_everything` must be from 0 to {2**32 - 1}, got {seed}.")


def check_schedule(lr_scheduler: Any) -> None:
    """Try one step of a learning rate schedule: with a length of 0, some fail only when the first epoch ends.

    Args:
        lr_scheduler: Its ``class_path`` and ``init_args``, or ``None``.

    Raises:
        ValueError: If the step divides by zero.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            instantiate_class(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0), lr_scheduler).step()
        except ArithmeticError as error:
            name = lr_scheduler["class_path"].rpartition(".")[2]
            raise ValueError(f"`lr_scheduler` {name}: its first step fails ({error}). Is a length in it 0?") from error
        except Exception:
            return  # other faults show when the run begins, and some schedules need values that only the run has


def _mappings(node: yaml.Node | None) -> Iterator[yaml.MappingNode]:
    """Yield every mapping of a document, the outer ones first."""
    if isinstance(node, yaml.MappingNode):
        yield node
        for _, value in node.value:
            yield from _mappings(value)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            yield from _mappings(value)


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values of a nested config with their dotted names, as used on the command line."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else None
    if items is None:
        yield name, value
        return
    for key, item in items:
        yield from _leaves(item, name if key == "init_args" else f"{name}.{key}".lstrip("."))
