"""Anneal the weight of the KL term."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from .scheduled_knob import ScheduledKnob
from .schedules import Schedule


class KLAnnealing(ScheduledKnob):
    """Move the weight of the KL term along a schedule: the cure of a collapse that happens early in training.

    A schedule whose ``stop`` is left out ends at the value the module is configured with, so one config serves every
    ``beta``. Validation, checkpoints and the module after fitting have that value. Logged as ``knobs/beta``, or the
    path's last part.

    Args:
        schedule: Weight per step: ``Linear``, ``Sigmoid``, ``Cosine``, ``Cyclical``, ``Staged``, ``Constant``, ``Join``
            or any callable of the step.
        attribute: Where the module keeps the weight: a dotted path through submodules, objects, dict keys and list
            indices (``"beta"``, ``"model.kld_weight"``, ``"params.beta"``), or several that get the same value.
        setter: Writes the weight instead, ``(pl_module, value) -> None``; the schedule then needs a ``stop``.
        name: Logged as ``knobs/<name>``; the path's last part if not given.

    Raises:
        ValueError: If there is no path, or, when fitting starts, if it leads nowhere or a length can't be turned into
            steps.
        lightning.pytorch.utilities.exceptions.MisconfigurationException: When fitting starts, if the schedule ends
            elsewhere than the module is configured to, if two callbacks move one number, or if a monitor watches
            ``train/loss``, which moves.

    References:
        Bowman et al., "Generating Sentences from a Continuous Space", CoNLL 2016; Fu et al., "Cyclical Annealing
        Schedule", NAACL 2019.

    Example::

        >>> from lightning_vae.callbacks import Linear
        >>> KLAnnealing(Linear(fraction=0.3)).state_key
        "KLAnnealing{'attribute': 'beta', 'name': 'beta'}"
    """

    def __init__(
        self,
        schedule: Schedule | Callable[[int], float],
        attribute: str | Sequence[str] = "beta",
        setter: Callable[[Any, float], None] | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(schedule, attribute, setter, name)
