"""Read the prior of any LightningModule: p(z), or p(z|c) for the conditions of a batch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.distributions import Distribution, Normal

from .distribution_reader import DistributionReader, names
from .distributions import Second, as_distribution, describe, widened

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule

Place = str | Sequence[str] | Callable[[Any, Any], Any] | Distribution | None
"""The place of a distribution, see :class:`~.distribution_reader.DistributionReader`, or a fixed distribution."""


class PriorReader:
    """Read the priors of the batch that a LightningModule has just processed.

    Args:
        prior: Where the prior is: a path, a pair of paths or a callable, as in
            :class:`~.distribution_reader.DistributionReader`; a fixed ``Distribution``, or an object with ``log_prob``;
            ``None`` for the module's own attribute ``prior``.
        second: Meaning of a Gaussian's second parameter, or a function from it to the scale.
        chunk: Axis along which one tensor is split into the two parameters.
        group: Name of the group of latents, which is a key of the module's own ``prior`` if that is a dict.
        keeps_graph: Whether a callable is called with gradients.

    Raises:
        ValueError: If an option is none of these.
    """

    def __init__(
        self,
        prior: Place = None,
        second: Second = "log_variance",
        chunk: int | None = None,
        group: str = "",
        keeps_graph: bool = False,
    ) -> None:
        self._second, self._chunk, self._group = second, chunk, group
        self._fixed: Any = None
        self._place: DistributionReader | None = None  # of a prior that is read in each step
        if isinstance(prior, Distribution):
            self._fixed = as_distribution(prior)
        elif _is_density(prior):
            self._fixed = prior
        elif prior is not None:
            self._place = DistributionReader(prior, second, option="prior", keeps_graph=keeps_graph)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_place": copy.copy(self._place)}  # an idle one

    @property
    def readers(self) -> list[DistributionReader]:
        """The readers that listen during a step and forget afterwards."""
        return [] if self._place is None else [self._place]

    @property
    def key(self) -> Any:
        """The prior's place, for errors."""
        return None if self._place is None else self._place.key

    def read(self, pl_module: LightningModule, batch: Any) -> list[Any] | None:
        """Return the priors of the batch just processed: distributions, or objects with ``log_prob``.

        Returns:
            One for all posteriors of the step, or one for each call of the submodule; ``None`` if the module has none
            and none was given.

        Raises:
            ValueError: If a prior is not where it should be, or can't be read.
        """
        if self._place is not None:
            if (density := _density_at(pl_module, self._place)) is not None:
                self._place.forget()  # it is asked, and not called as a whole
                return [density]
            values = self._place.values(pl_module, batch)
            where = f"`prior={self._place.key!r}`"
            return [_as_prior(value, self._second, self._chunk, where) for value in values]
        if self._fixed is not None:
            return [self._fixed]
        own = getattr(pl_module, "prior", None)
        own = own[self._group] if isinstance(own, Mapping) and self._group in own else own
        return None if own is None else [_own_prior(pl_module, own, self._second)]


def one_of(priors: Sequence[Any]) -> Any:
    """Return the prior that all of several are; ``None`` if some differ."""
    return priors[0] if all(_are_equal(each, priors[0]) for each in priors) else None


def _own_prior(pl_module: LightningModule, own: Any, second: Second) -> Any:
    """Return what a module has as its attribute ``prior`` as a distribution, or as an object with ``log_prob``.

    Raises:
        ValueError: If it can't be read: a method or a submodule has to be called, and only its author knows how.
    """
    if (isinstance(own, nn.Module) or callable(own)) and not _is_density(own):
        raise ValueError(_unreadable(pl_module, own))
    return _as_prior(own, second, None, f"`{type(pl_module).__name__}.prior`")


def _as_prior(value: Any, second: Second, chunk: int | None, where: str) -> Any:
    if _is_density(value) and not isinstance(value, Distribution):
        return value
    try:
        return as_distribution(widened(value), second, chunk if isinstance(value, Tensor) else None, of="prior")
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _is_density(value: Any) -> bool:
    """Return whether a value is something with a log-density, a distribution or not."""
    return not isinstance(value, type) and callable(getattr(value, "log_prob", None))


def _density_at(pl_module: LightningModule, reader: DistributionReader) -> Any:
    """Return the object with ``log_prob`` that a reader's path leads to, if it leads to one and not to its output."""
    if len(reader.paths) != 1 or ":" in reader.paths[0]:
        return None
    try:
        found = reduce(getattr, reader.paths[0].split("."), pl_module)
    except AttributeError:
        return None
    return found if _is_density(found) and not isinstance(found, Distribution) else None


def _are_equal(one: Any, other: Any) -> bool:
    """Return whether two priors are certainly the same."""
    if one is other:
        return True
    if not (isinstance(one, Normal) and isinstance(other, Normal)) or one.batch_shape != other.batch_shape:
        return False
    return bool((one.loc == other.loc).all() and (one.scale == other.scale).all())


def _unreadable(pl_module: LightningModule, own: Any) -> str:
    kind, name = type(pl_module).__name__, "a submodule" if isinstance(own, nn.Module) else "a method"
    watched = "`prior='prior'` for its output in each step, or " if isinstance(own, nn.Module) else ""
    return (
        f"`{kind}.prior` is {name}, {describe(own)}, so it has to be said what the prior is: {watched}`prior=lambda "
        "pl_module, batch: ...` for a distribution, or another path, one of "
        f"{names(pl_module)}; for N(0, I) `prior=torch.distributions.Normal(0.0, 1.0)`."
    )
