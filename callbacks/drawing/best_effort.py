"""Turn errors of callbacks that only show something into warnings."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lightning_utilities.core.rank_zero import rank_zero_warn


class BestEffort:
    """Turn an error into a warning, so that a callback that only shows something never ends a run.

    For each thing that can't be shown, only the first error is reported.

    Args:
        title: Name of the callback, for the warning.

    Example::

        >>> attempt = BestEffort("Pictures")
        >>> with attempt("images/samples"):
        ...     raise ValueError("the prior can't be sampled")
    """

    def __init__(self, title: str) -> None:
        self._title = title
        self._failed: set[str] = set()

    @property
    def has_failed(self) -> bool:
        """Return whether anything could not be shown."""
        return bool(self._failed)

    @contextmanager
    def __call__(self, what: str) -> Iterator[None]:
        """Try to show something; ``what`` names it in the warning."""
        try:
            yield
        except Exception as error:
            if what not in self._failed:
                self._failed.add(what)
                reason = f"{type(error).__name__}: {error}"
                rank_zero_warn(f"{self._title}: {what} can't be shown ({reason}). Training continues without it.")
