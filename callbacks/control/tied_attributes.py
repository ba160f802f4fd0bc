"""Places that a callback writes to: one attribute, several attributes that hold the same number, or a function."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from .attribute_path import AttributePath

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule

_LOW, _HIGH = re.compile("min|low"), re.compile("max|high|upp")  # names of the ends of a range


class NumberPlace(Protocol):
    """A place that holds a number."""

    def read(self) -> float | None:
        """Return the current number, if it can be read."""

    def write(self, value: float | Tensor) -> None:
        """Set the number."""

    def overwritten(self, wait: bool = True) -> AttributePath | None:
        """Return the attribute that no longer holds the written value, if there is one.

        Args:
            wait: Whether reading may wait for a tensor's device, see :class:`~.attribute_path.AttributePath`.
        """

    def is_tensor(self) -> bool:
        """Return whether a tensor holds the number."""


def number_place(
    pl_module: LightningModule, paths: Sequence[str], setter: Callable[[Any, float], None] | None = None
) -> NumberPlace:
    """Find where a module keeps a number.

    Args:
        pl_module: The module.
        paths: The attributes, see :class:`~.attribute_path.AttributePath`.
        setter: Writes the number instead, if given.

    Raises:
        ValueError: As :class:`~.attribute_path.AttributePath`.
    """
    if setter is not None:
        return _Setter(pl_module, setter)
    return AttributePath(pl_module, paths[0]) if len(paths) == 1 else TiedAttributes(pl_module, paths)


class TiedAttributes:
    """A number that a LightningModule keeps in several places.

    Places that check each other, as a lower and an upper bound do, are written in whichever order is accepted.

    Args:
        pl_module: The module that keeps it.
        paths: Where, see :class:`~.attribute_path.AttributePath`.

    Raises:
        ValueError: As :class:`~.attribute_path.AttributePath`.
    """

    def __init__(self, pl_module: LightningModule, paths: Sequence[str]) -> None:
        self._attributes = [AttributePath(pl_module, path) for path in paths]

    def are_several_quantities(self) -> bool:
        """Return whether the places hold numbers that can't be one quantity.

        Zeros may differ, as a schedule starts there, and a range may have two ends and a number between them.
        """
        values = self._values()
        a_count = any(each.is_count() for each in self._attributes) and len({*values.values()}) > 1
        return a_count or not _is_one_quantity(values)

    def refuse_several_quantities(self) -> None:
        """Refuse places that the module is configured with unlike numbers.

        Raises:
            ValueError: If the places do not hold one quantity.
        """
        if self.are_several_quantities():
            values = self._values()
            found = ", ".join(f"`{path}` = {value}" for path, value in values.items())
            raise ValueError(
                f"`attribute={list(values)}` must name the places of one quantity, got {found}, which are several. "
                "Leave out the places that do not hold the weight; configure those that do with one value, a float."
            )

    def read(self) -> float | None:
        """Return the current number; if places differ, the largest, which is the end of a range.

        ``None`` if only a method knows the number.
        """
        return max(self._values().values(), default=None)

    def _values(self) -> dict[str, float]:
        return {each.path: value for each in self._attributes if (value := each.read()) is not None}

    def write(self, value: float | Tensor) -> None:
        """Set the number.

        Writing a 0-dim tensor to a place that does not hold a tensor waits for its device.

        Raises:
            ValueError: If a place does not take this value.
        """
        try:
            for each in self._attributes:
                each.write(value)
        except ValueError:
            self._write_in_turn(value)

    def _write_in_turn(self, value: float | Tensor) -> None:
        """Write to the places that accept the value, repeatedly, until all have; some are written more than once."""
        waiting = self._attributes
        while waiting:
            refused: list[tuple[AttributePath, ValueError]] = []
            for each in waiting:
                try:
                    each.write(value)
                except ValueError as error:
                    refused.append((each, error))
            if len(refused) == len(waiting):
                raise refused[0][1]
            waiting = [each for each, _ in refused]

    def overwritten(self, wait: bool = True) -> AttributePath | None:
        """Return the place that no longer holds the written value, if there is one.

        Args:
            wait: Whether reading may wait for a tensor's device, see :class:`~.attribute_path.AttributePath`.
        """
        return next((each for each in self._attributes if each.overwritten(wait)), None)

    def is_tensor(self) -> bool:
        """Return whether a tensor holds the number in any place."""
        return any(each.is_tensor() for each in self._attributes)


def _is_one_quantity(values: Mapping[str, float]) -> bool:
    numbers = [value for value in values.values() if value]
    if not numbers or math.isclose(min(numbers), max(numbers), rel_tol=1e-2):  # half precision keeps 8 bits
        return True
    last = {path: path.rpartition(".")[2] for path in values}
    lowest, highest = ([values[path] for path, name in last.items() if end.search(name)] for end in (_LOW, _HIGH))
    return bool(lowest and highest) and min(lowest) <= min(numbers) and max(highest) >= max(numbers)


class _Setter:
    """A function that writes a number; the number can't be read back."""

    def __init__(self, pl_module: LightningModule, setter: Callable[[Any, float], None]) -> None:
        self._pl_module = pl_module
        self._setter = setter

    def read(self) -> None:
        return None

    def write(self, value: float | Tensor) -> None:
        self._setter(self._pl_module, float(value))

    def overwritten(self, wait: bool = True) -> None:  # noqa: ARG002
        return None

    def is_tensor(self) -> bool:
        return False
