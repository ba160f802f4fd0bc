"""Checks of the numbers that options are given, for the model and the data modules; the callbacks have their own."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any


def check_number(name: str, value: Any, allowed: str, fits: Callable[[Any], bool], remedy: str = "") -> None:
    """Check the number that an option is given, or several. A boolean is none, nor is a text.

    Args:
        name: Name of the option.
        value: The number, or a sequence of numbers.
        allowed: Description of the numbers that fit.
        fits: Returns whether a number fits.
        remedy: A sentence for the error.

    Raises:
        ValueError: If it does not fit.
    """
    numbers = value if isinstance(value, Sequence) else [value]
    with suppress(TypeError, ValueError):  # of a comparison with something else
        if not isinstance(value, str) and not any(map(_is_boolean, numbers)) and fits(value):
            return
    raise ValueError(f"`{name}` must be {allowed}, got {value!r}. {remedy}".rstrip())


def at_least(least: float) -> Callable[[float], bool]:
    """Return a function that returns whether a number is finite and at least this one."""
    return lambda value: least <= value < math.inf


def is_positive(value: float) -> bool:
    """Return whether a number is finite and above 0."""
    return 0 < value < math.inf


def integer_from(least: float = -math.inf) -> Callable[[Any], bool]:
    """Return a function that returns whether a number is an integer, and at least this one."""
    return lambda value: operator.index(value) >= least


def _is_boolean(value: Any) -> bool:
    """Return whether a value is a boolean, also one of NumPy or torch."""
    return isinstance(value, bool) or "bool" in str(getattr(value, "dtype", ""))
