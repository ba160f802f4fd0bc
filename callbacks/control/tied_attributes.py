"""What a callback writes to: several attributes that are one number, or a function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .attribute_path import AttributePath

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule


class TiedAttributes:
    """A number of a LightningModule, which may be kept in several places.

    Places that check each other, as a lower and an upper bound do, are written in whichever order is accepted.

    Args:
        pl_module: The module that keeps it.
        paths: Where, see :class:`~.attribute_path.AttributePath`.
        setter: Writes it instead, if given.

    Raises:
        ValueError: As :class:`~.attribute_path.AttributePath`.
    """

    def __init__(
        self,
        pl_module: LightningModule,
        paths: Sequence[str],
        setter: Callable[[Any, float], None] | None = None,
    ) -> None:
        self._attributes = [] if setter else [AttributePath(pl_module, path) for path in paths]
        self._setter = setter
        self._pl_module = pl_module
        if len(self._attributes) == 1:
            self.write = self._attributes[0].write  # type: ignore[method-assign]  # a step's call less

    def read(self) -> float | None:
        """Return the number as it is now: where places differ the largest, at which a range ends.

        ``None`` where only a setter knows, or a method.
        """
        return max((value for each in self._attributes if (value := each.read()) is not None), default=None)

    def write(self, value: float | Tensor) -> None:
        """Set the number.

        A 0-dim tensor on the module's device is waited for where a place does not hold a tensor, or for the setter.

        Raises:
            ValueError: If a place does not take this value.
        """
        if self._setter is not None:
            self._setter(self._pl_module, float(value) if isinstance(value, Tensor) else value)
        try:
            for each in self._attributes:
                each.write(value)
        except ValueError:
            self._write_in_turn(value)

    def _write_in_turn(self, value: float | Tensor) -> None:
        """Write, again and again, to whichever places accept it; those that had it already get it once more."""
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
        return next((each for each in self._attributes if not each.holds()), None)
