"""Finding out who else moves a number that a callback moves."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule

_ASSIGNS = ("__setattr__", "__setitem__", "__set__", "fill_", "update")
_OF_A_SCHEDULE = re.compile("warm_?up|anneal|schedule")
_OF_THE_LEARNING_RATE = re.compile("lr|learning_rate|scheduler")
# What ends the conflict in projects that have a schedule of their own, told by what their modules have.
_REMEDIES = {
    ("min_kl_weight", "max_kl_weight", "n_epochs_kl_warmup", "n_steps_kl_warmup"): (
        "scvi-tools computes its weight anew in each step: write both bounds with "
        '`attribute=["min_kl_weight", "max_kl_weight"]`, or switch its own warm-up off with '
        '`plan_kwargs={"n_epochs_kl_warmup": None, "n_steps_kl_warmup": None}` and write `attribute="max_kl_weight"`.'
    ),
    ("register_schedule", "remove_schedule"): (
        "Remove disent's own schedule, `framework.remove_schedule(...)` with the field's name, or this callback."
    ),
}


class Witness:
    """Looks on while a training batch runs, to see which function changes a number.

    It looks after every call and return in the meantime, which is slow: it is meant for one batch, once it is known
    that somebody does. A profiler that is already there is left alone, and then nobody is seen.

    Args:
        holds: Whether the number is still as it was written.

    Attributes:
        seen: The function that changed it and its file, if seen.
    """

    def __init__(self, holds: Callable[[], bool]) -> None:
        self._holds = holds
        self.seen: str | None = None

    def watch(self) -> None:
        """Look on until :meth:`rest`, or until it was seen."""
        if sys.getprofile() is None:
            sys.setprofile(self._look)

    def rest(self) -> None:
        """Look no more."""
        if sys.getprofile() == self._look:
            sys.setprofile(None)

    def _look(self, frame: FrameType, event: str, _: Any) -> None:
        try:
            if self.seen is not None or self._holds():
                return
        except Exception:  # amid a change there may be nothing to read
            return
        sys.setprofile(None)
        # A call is seen before its first line has run, so whoever called it did it.
        culprit = frame.f_back if event == "call" else frame
        while culprit is not None and culprit.f_code.co_name in _ASSIGNS:
            culprit = culprit.f_back
        if culprit is not None:
            code = culprit.f_code
            self.seen = f"`{code.co_qualname}` ({'/'.join(code.co_filename.split('/')[-2:])})"


def remedy(pl_module: LightningModule) -> str:
    """Say what ends a conflict with a schedule that a module has of its own."""
    for names, line in _REMEDIES.items():
        if all(hasattr(pl_module, name) for name in names):
            return line
    places = [vars(module) for module in pl_module.modules()] + [dict(getattr(pl_module, "hparams", {}))]
    own = [f"`{name}={value!r}`" for place in places for name, value in place.items() if _is_own_schedule(name, value)]
    own = list(dict.fromkeys(own))
    return f"Switch off what the module does itself, which {' and '.join(own)} may stand for." if own else ""


def _is_own_schedule(name: str, value: Any) -> bool:
    return (
        bool(_OF_A_SCHEDULE.search(name))
        and not _OF_THE_LEARNING_RATE.search(name)
        and isinstance(value, int | float | str)
        and bool(value)
    )
