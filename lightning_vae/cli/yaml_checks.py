"""Read the text of a config, and refuse what would be taken for something else or never end."""

from __future__ import annotations

from collections import Counter
from typing import Any

import yaml
from jsonargparse import get_loader, set_loader

_MOST_VALUES = 100_000


def guard() -> None:
    """Let jsonargparse read YAML by way of :func:`check`, once and for all."""
    load = get_loader("yaml")
    if getattr(load, "guarded", False):
        return

    def guarded(text: str) -> Any:
        check(text)
        return load(text)

    guarded.guarded = True  # type: ignore[attr-defined]
    set_loader("yaml", guarded, (yaml.YAMLError,))


def check(text: str) -> None:
    """Look through a text in YAML before anything is made of it.

    Args:
        text: The text.

    Raises:
        yaml.YAMLError: If a key is given twice in a mapping, of which YAML's reader would take the last; if a
            `class_path` is no name or `init_args` no mapping; if aliases refer to themselves or stand for a mass of
            values; or if it is no YAML.
    """
    try:
        pending = [yaml.compose(text, Loader=yaml.SafeLoader)]
    except RecursionError as error:
        raise yaml.YAMLError("it is nested too deeply") from error
    seen = 0
    while pending:
        node = pending.pop()
        seen += 1
        if seen > _MOST_VALUES:
            raise yaml.YAMLError(f"its aliases refer to themselves or stand for more than {_MOST_VALUES} values")
        if isinstance(node, yaml.MappingNode):
            key, times = Counter(str(key.value) for key, _ in node.value).most_common(1)[0] if node.value else ("", 1)
            if times > 1:
                raise yaml.YAMLError(f"`{key}` is given {times} times in the mapping{node.start_mark}")
            for key, value in node.value:
                if key.value == "class_path" and not value.tag.endswith(":str"):
                    raise yaml.YAMLError(f"`class_path` must be the name of a class{value.start_mark}")
                if key.value == "init_args" and not isinstance(value, yaml.MappingNode):
                    raise yaml.YAMLError(f"`init_args` must be a mapping of options to values{value.start_mark}")
                pending.append(value)
        elif isinstance(node, yaml.SequenceNode):
            pending.extend(node.value)


def check_empty(text: str, config: dict[str, Any]) -> None:
    """Refuse empty mappings that jsonargparse drops, or takes for a class that nobody has named.

    Args:
        text: What was given, in YAML.
        config: What was made of it.

    Raises:
        ValueError: If an empty mapping stands under a name that is no option, or in the place of a class.
    """
    pending: list[tuple[str, Any, Any]] = [("", yaml.safe_load(text), config)]
    while pending:
        name, given, made = pending.pop()
        if given == {} and made is None:
            raise ValueError(f"`{name[1:]}` is no option.")
        if given == {} and isinstance(made, dict) and "class_path" in made:
            raise ValueError(f"`{name[1:]}` must name a class by its `class_path`, got an empty mapping.")
        if isinstance(given, dict) and isinstance(made, dict):
            kept = ((key, item) for key, item in given.items() if item or key not in ("init_args", "dict_kwargs"))
            pending.extend((f"{name}.{key}", item, made.get(key)) for key, item in kept)
        elif isinstance(given, list) and isinstance(made, list):
            pending.extend((f"{name}.{n}", *both) for n, both in enumerate(zip(given, made, strict=False)))
