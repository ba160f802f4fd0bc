"""One readable message out of what a config parser has to say."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

# Lines that tell how the parser went about it, rather than what is wrong.
_NOISE = re.compile(
    r"Does not validate against|Subtypes: |Errors:$|Given value type: |Expected a <class 'NoneType'>"
    r"|Expected a path but|Not a valid subclass|Subclass types expect|a class path \(str\)|a dict with"
    r"|Problem with given class_path"
)
_LONGEST = 800
_STRUCTURE = re.compile(r"\.? Got value: (Namespace|NestedArg)\(.*")


def readable(message: str, known_names: Iterable[str] = ()) -> str:
    r"""Boil a nested parser error down to the option and what is wrong with it.

    A message that isn't one is returned as it is.

    Args:
        message: The parser's message: one line per attempt to make sense of the value, nested by indentation.
        known_names: Class names to look for a near miss in.

    Example::

        >>> print(readable('Parser key "trainer.max_epochs":\n  Errors:\n    - Expected a <class \'int\'>'))
        trainer.max_epochs: Expected a <class 'int'>
    """
    keys, faults, given = [], [], ""
    message = re.sub(r"Call to compute_fn of link .*? failed: ", "", message, flags=re.DOTALL)
    for line in message.splitlines():
        text = line.strip().removeprefix("- ")
        if key := re.search(r'Parser key "([^"]+)":?\s*(.*)', text):
            keys.append(key[1])
            text = key[2]
        if value := re.match(r"Given value: (?!Namespace|NestedArg|\[|\{)(.*)", text):
            given = f", got {value[1]}"
        elif text and not _NOISE.match(text) and not text.startswith("Given value: "):
            faults.append(_STRUCTURE.sub("", text))
    where = ".".join(dict.fromkeys(keys))
    if keys and not faults and (kind := re.search(r"Not a valid subclass of (\w+)", message)):
        faults = [f"Expected a {kind[1]}: its class path, or a mapping of `class_path` and `init_args`"]
    if not faults:
        return _shortened(message)
    what = "; ".join(dict.fromkeys(faults)) + (given if len(faults) == 1 and given[6:] not in faults[0] else "")
    return _shortened((f"{where}: " if where else "") + what) + _suggestion(what, known_names)


def _shortened(text: str) -> str:
    """Leave out what is not for reading: a file that is no config, a value of a thousand letters, a list of all."""
    text = re.sub(r"(Unexpected config)\b.*", r"\1: it must be a mapping of options to values", text, flags=re.DOTALL)
    text = re.sub(r"(\S{80})\S{120,}", r"\1...", text)
    return text if len(text) <= _LONGEST else text[:_LONGEST] + "..."


def _suggestion(what: str, known_names: Iterable[str]) -> str:
    unknown = re.search(r"import path string: ([\w.]+)", what)
    near = difflib.get_close_matches(unknown[1].rpartition(".")[2], list(known_names), n=3) if unknown else []
    return f". Did you mean {' or '.join(near)}?" if near else ""
