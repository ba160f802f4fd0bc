"""The places that a callback writes to: one attribute, several attributes that hold one number, or a function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from .attribute_path import AttributePath

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule


class NumberPlace(Protocol):
    """Somewhere that a number is kept."""

    def read(self) -> float | None:
        """Return the number as it is now, if that can be told."""

    def write(self, value: float | Tensor) -> None:
        """Set the number."""

    def overwritten(self) -> AttributePath | None:
        """Return the attribute that no longer holds what was written to it, if there is one."""


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

    def read(self) -> float | None:
        """Return the number as it is now: where places differ the largest, at which a range ends.

        ``None`` where only a method knows.
        """
        return max((value for each in self._attributes if (value := each.read()) is not None), default=None)

    def write(self, value: float | Tensor) -> None:
        """Set the number.

        A 0-dim tensor on the module's device is waited for where a place does not hold a tensor.

        Raises:
            ValueError: If a place does not take this value.
        """
        try:
            for each in self._attributes:
                each.write(value)
        except ValueError:
            self._write_in_turn(value)

    def _write_in_turn(self, value: float | Tensor) -> None:
        """Write to whichever places accept it, until all have; those that had it already get it once more."""
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

    def overwritten(self) -> AttributePath | None:
        """Return the place that no longer holds what was written to it, if there is one."""
        return next((each for each in self._attributes if each.overwritten()), None)


class _Setter:
    """A function that writes a number, of which nothing else is known."""

    def __init__(self, pl_module: LightningModule, setter: Callable[[Any, float], None]) -> None:
        self._pl_module = pl_module
        self._setter = setter

    def read(self) -> None:
        return None

    def write(self, value: float | Tensor) -> None:
        self._setter(self._pl_module, float(value))

    def overwritten(self) -> None:
        return None
