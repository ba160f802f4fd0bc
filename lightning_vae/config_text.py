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
        yaml.YAMLError: If a key is given twice in a mapping, of which YAML's reader would take the last; if aliases
            refer to themselves or stand for a mass of values; or if it is no YAML.
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
            pending.extend(value for _, value in node.value)
        elif isinstance(node, yaml.SequenceNode):
            pending.extend(node.value)
