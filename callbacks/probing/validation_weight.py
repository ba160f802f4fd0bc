"""The weight that a validation step uses."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..control.attribute_path import paths_to

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule

    from .loss_probe import LossProbe

_GOLDEN = 0.618034  # a weight that is hardly anything else's value


@dataclass(frozen=True)
class StaleWeight:
    """A weight in a validation that is not the one the module holds.

    Attributes:
        name: The number that the validation step logs or returns.
        value: Its value.
        meant: Its value if the training step before had used the module's weight too.
        weight: The weight in it, if it is linear in the weight.
        places: Paths at which the training step leaves a copy of its weight.
    """

    name: str
    value: float
    meant: float
    weight: float
    places: tuple[str, ...]


def stale_weight(probe: LossProbe, paths: tuple[str, ...], trained: float, target: float) -> StaleWeight | None:
    """Measure if validation uses the weight of the last training step and not the one that the module holds.

    A training step may leave a copy of its weight that validation reads. So a copy of the module takes a training step
    with the one weight, and validates with the other; this is compared with both steps at the target, and with both at
    the weight of the training step.

    Args:
        probe: Evaluates the validation of a batch.
        paths: Where the module keeps the weight.
        trained: The weight of the last training step.
        target: The weight in validation, another one.

    Returns:
        The first number of the validation step in which the weight is not the target; ``None`` if there is none.

    Raises:
        LossProbe.NotPossible: If the validation can't be evaluated, or has no numbers.
    """

    def at(trained: float, validated: float) -> dict[str, float]:
        return probe.validation({paths: trained}, {paths: validated})

    def differ(one: float, other: float, drift: float = 0.0) -> bool:
        return abs(one - other) > probe.noise((one, other), drift)

    found, meant = at(trained, target), at(target, target)
    if not meant:
        raise probe.NotPossible("its validation step neither logs nor returns a number")
    if not any(differ(found[name], meant[name]) for name in meant.keys() & found.keys()):
        return None
    again, last = at(target, target), at(trained, trained)
    for name in meant:
        if not all(name in numbers for numbers in (found, again, last)):
            continue
        moved, span = found[name] - meant[name], last[name] - meant[name]
        if span and differ(found[name], meant[name], drift=abs(again[name] - meant[name])):
            weight = target + (trained - target) * moved / span
            if not math.isclose(weight, target, rel_tol=1e-2):
                return StaleWeight(name, found[name], meant[name], weight, _copies(probe, paths, trained, target))
    return None


def _copies(probe: LossProbe, paths: tuple[str, ...], trained: float, target: float) -> tuple[str, ...]:
    """Return the paths at which a training step leaves a copy of its weight."""
    found: list[str] = []
    mark = target + _GOLDEN * (trained - target)

    def look_on(copy: LightningModule) -> None:
        found.extend(paths_to(copy, lambda _, number: math.isclose(number, mark, rel_tol=1e-3)))

    probe.validation({paths: mark}, {paths: target}, look_on)
    return tuple(found)
