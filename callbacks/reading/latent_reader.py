"""Read the latents of any LightningModule: each posterior with its prior and the sample that the module drew."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor
from torch.distributions import Distribution, Normal, OneHotCategorical

from .batch_fields import batch_part
from .distribution_reader import DistributionReader
from .distributions import Second, describe, standard_prior
from .isolated_eval import isolated
from .kl_rates import Rates, rate_parts
from .padding import mask_like
from .prior_reader import Place, PriorReader, one_of

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule

_T = TypeVar("_T")
Places = Place | Mapping[str, Place]
"""One place, or one for each named group of latents."""


@dataclass(frozen=True)
class Latent:
    """One group of latents of a batch.

    Attributes:
        posterior: q(z|x), with the observations along its first axis.
        prior: p(z) or p(z|c): a distribution, or an object with ``log_prob``; ``None`` if it is not known.
        z: The module's own sample of the posterior, if it can be seen.
        known_rates: The rates at the weights of the step, where a learned prior can't be asked later.
        mask: True where a position of the latents is real; ``None`` if there is no padding. See
            :func:`~.padding.mask_like`.
    """

    posterior: Distribution
    prior: Any
    z: Tensor | None = None
    known_rates: Rates | None = None
    mask: Tensor | None = None

    def rates(self) -> Rates:
        """Compute the rates; see :func:`~.kl_rates.rate_parts`.

        Raises:
            ValueError: If the prior is not known.
        """
        if self.known_rates is not None:
            return self.known_rates
        if self.prior is None:
            raise ValueError(
                f"The rate of a {type(self.posterior).__name__} needs a prior, and the module offers none. Pass "
                "`prior=`, a Distribution or where it is."
            )
        return rate_parts(self.posterior, self.prior, self.z)


def is_joint(latent: Latent) -> bool:
    """Return whether the rate of a group of latents has no parts for its dimensions, or for its groups of classes."""
    if isinstance(latent.posterior, OneHotCategorical):
        return False
    return latent.rates().nats.shape != latent.posterior.batch_shape


@torch.no_grad()
def measured_rates(latent: Latent) -> Tensor:
    """Measure the rates of a batch, for a callback that watches training without changing it.

    Args:
        latent: A group of latents.

    Returns:
        Nats, float32, shape ``(B, parts)``; 0 where a position is padding.

    Raises:
        ValueError: As :func:`~.kl_rates.rate_parts` does; or if there is a mask and no rate for each position.
    """
    rates = latent.rates().nats.float().flatten(1)
    mask = real_parts(latent)
    return rates if mask is None else rates.where(mask, 0.0)


def real_parts(latent: Latent) -> Tensor | None:
    """Return which parts of the rates are not padding, of shape ``(B, parts)``; ``None`` if all are real.

    Raises:
        ValueError: If there is a mask and no rate for each position.
    """
    if latent.mask is None:
        return None
    if is_joint(latent):
        raise ValueError("`mask` needs a rate for each position, and this prior or posterior is joint.")
    return mask_like(latent.mask, latent.rates().nats).flatten(1)


class LatentReader:
    """Read the posteriors of the batch that a LightningModule has just processed, each with its prior.

    Everything that needs a rate reads it here.

    Args:
        posterior: Where the posterior is: ``None`` for the module's own attribute, a path, a pair of paths or a
            callable; see :class:`~.distribution_reader.DistributionReader`. Or one of these for each named group of
            latents, of a hierarchy or of several encoders: their rates add up.
        prior: Where the prior is, in the same forms and for the same groups; or a fixed ``Distribution``, or an object
            with ``log_prob``. ``None`` is the module's own attribute ``prior``. Without one, N(0, I) is assumed, or
            uniform categories, and that is said.
        z: Where the module's sample is, as a path such as ``"encoder:1"`` or a callable; by default the module's own
            attribute ``z`` beside its ``posterior``, if it has one. Rates without a closed form
            are estimated there, otherwise at a sample of the reader's own. An output ``(Normal, z)`` is recognised.
        second: Meaning of a Gaussian's second parameter, or a function from it to the scale.
        chunk: Axis along which one tensor is split into the two parameters.
        who: Name of the callback, for what it says.
        mask: Where a batch has a mask of the latents' positions, True where one is real: a key, an index or a
            callable. ``None`` if there is no padding.
        keeps_graph: Whether to read distributions as the loss has them, with their gradients. Then calls without a
            gradient do not count beside one that has it, and a callable is called with gradients.

    Raises:
        ValueError: If an option is none of these, or the groups of one option are not those of the posterior.
    """

    def __init__(
        self,
        posterior: Places = None,
        prior: Places = None,
        z: Places = None,
        second: Second = "log_variance",
        chunk: int | None = None,
        who: str = "",
        mask: int | str | Callable[[Any], Any] | None = None,
        keeps_graph: bool = False,
    ) -> None:
        groups: Mapping[str, Any] = posterior if isinstance(posterior, Mapping) else {"": posterior}
        for option, given in (("prior", prior), ("z", z)):
            if isinstance(given, Mapping) and set(given) != set(groups):
                raise ValueError(
                    f"`{option}` must have the groups of `posterior`, {', '.join(map(repr, groups))}, got "
                    f"{', '.join(map(repr, given))}."
                )
            if not isinstance(given, Mapping) and given is not None and len(groups) > 1 and option == "z":
                raise ValueError(f"`z` must name the sample of each group of `posterior`, got {given!r}.")
        self._who = who
        self._mask, self._keeps_graph = mask, keeps_graph
        self._has_said = False
        self._batch: Any = None  # of this step, until it is read
        self._read: list[dict[str, Latent]] | None = None  # before the optimizer's step
        self._posteriors = {name: DistributionReader(place, second, chunk) for name, place in groups.items()}
        priors: Mapping[str, Any] = prior if isinstance(prior, Mapping) else dict.fromkeys(groups, prior)
        samples: Mapping[str, Any] = z if isinstance(z, Mapping) else dict.fromkeys(groups, z)
        self._priors = {
            name: PriorReader(place, second, chunk, name, keeps_graph=keeps_graph) for name, place in priors.items()
        }
        self._samples = {
            name: DistributionReader(place, option="z") for name, place in samples.items() if place is not None
        }

    @property
    def posterior(self) -> Any:
        """The place of the posterior, as given; a dict of places if there are several groups."""
        places = {name: reader.posterior for name, reader in self._posteriors.items()}
        return places.get("", places)

    @property
    def posteriors(self) -> dict[str, DistributionReader]:
        """The reader of each group's posterior."""
        return dict(self._posteriors)

    @property
    def key(self) -> Any:
        """The posterior's place for a callback's ``state_key``, the same in each process."""
        keys = {name: reader.key for name, reader in self._posteriors.items()}
        return keys.get("", keys)

    def __getstate__(self) -> dict[str, Any]:
        # The copies are idle: the hooks stay with the module, and a step's outputs can't be copied.
        readers = {name: dict(getattr(self, name)) for name in ("_posteriors", "_priors", "_samples")}
        idle = {name: {key: copy.copy(each) for key, each in of.items()} for name, of in readers.items()}
        return {**vars(self), **idle, "_batch": None, "_read": None}

    def idle(self) -> LatentReader:
        """Return a reader that listens to nothing yet and says nothing, for a copy of the module."""
        twin = copy.copy(self)
        twin._who = ""
        return twin

    def second_of(self, paths: Sequence[str]) -> Second | None:
        """Return what is taken for the second parameter in the outputs of these submodules; ``None`` if unread."""
        wanted = {path.partition(":")[0] for path in paths}
        for reader in self._posteriors.values():
            if wanted == {path.partition(":")[0] for path in reader.paths}:
                return reader.second
        return None

    def listen(self, pl_module: LightningModule, batch: Any = None) -> None:
        """Keep the outputs of the named submodules from now on, at the start of a step."""
        self._batch, self._read = batch, None
        for reader in self._readers:
            reader.listen(pl_module, batch)

    def capture(self, pl_module: LightningModule) -> None:
        """Read now, while the module has the weights of the step, which a learned prior and callables depend on.

        Meant for ``on_before_optimizer_step``. Only the first of several calls in a step counts.
        """
        if self._read is None and self._batch is not None:
            self._read = self._views(pl_module, self._batch)
            self._batch = None

    def forget(self) -> None:
        """Keep nothing until the next :meth:`listen`."""
        self._batch = self._read = None
        for reader in self._readers:
            reader.forget()

    def unhook(self) -> None:
        """Remove every hook until the next :meth:`listen`."""
        for reader in self._readers:
            reader.unhook()

    def detach(self) -> None:
        """Remove every hook and forget the outputs."""
        self._has_said, self._batch, self._read = False, None, None
        for reader in self._readers:
            reader.detach()

    def can_read(self, pl_module: LightningModule) -> bool:
        """Return whether a place is named, or the module has a posterior that is no method or submodule."""
        own = getattr(pl_module, "posterior", None)
        return self.posterior is not None or not (own is None or callable(own))

    def offers_none(self, pl_module: LightningModule) -> bool:
        """Return whether the module's own posterior is read and it has none for this batch, as for an empty share."""
        return self.posterior is None and getattr(pl_module, "posterior", self) is None

    def read(self, pl_module: LightningModule, batch: Any) -> list[dict[str, Latent]]:
        """Return the latents of the batch just processed, by group, one for each call or view.

        Raises:
            ValueError: If a distribution is not where it should be, or can't be read.
        """
        views, self._read, self._batch = self._read, None, None
        return self._views(pl_module, batch) if views is None else views

    def _views(self, pl_module: LightningModule, batch: Any) -> list[dict[str, Latent]]:
        columns = {name: self._group(name, pl_module, batch) for name in self._posteriors}
        counts = {name: len(latents) for name, latents in columns.items()}
        if len(set(counts.values())) > 1:
            raise ValueError(
                "`posterior`: the groups have different numbers of posteriors in this step, "
                + ", ".join(f"{name!r} {count}" for name, count in counts.items())
                + "."
            )
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    @property
    def _readers(self) -> list[DistributionReader]:
        priors = [reader for prior in self._priors.values() for reader in prior.readers]
        return [*self._posteriors.values(), *priors, *self._samples.values()]

    def _group(self, name: str, pl_module: LightningModule, batch: Any) -> list[Latent]:
        reader = self._posteriors[name]
        posteriors, seen = reader.read_with_samples(pl_module, batch)
        if not posteriors:
            return []
        # Before the prior is asked in an extra pass, which may call the same submodules.
        if name in self._samples:
            seen = self._samples[name].values(pl_module, batch)
        elif reader.posterior is None:
            seen = _own_samples(pl_module, posteriors, seen)
        if self._keeps_graph:
            rows = _with_gradient(list(zip(posteriors, seen, strict=True)), lambda row: row[0])
            posteriors, seen = [row[0] for row in rows], [row[1] for row in rows]
        priors = self._prior(name, pl_module, batch, posteriors)
        if len(posteriors) > 1 and len(priors) == 1 and not isinstance(priors[0], Distribution):
            others = reader.of_others(partial(_ask, pl_module, priors[0], posteriors[0]))
            numbers = [n for n in range(len(posteriors)) if n not in others] or range(len(posteriors))
            if len(seen) == len(posteriors):  # otherwise they come from elsewhere
                seen = [seen[n] for n in numbers]
            posteriors = [posteriors[n] for n in numbers]
        if len(seen) != len(posteriors) or not all(isinstance(z, Tensor | None) for z in seen):
            raise ValueError(
                f"`z={self._samples[name].key!r}` must be one tensor for each of {len(posteriors)} posteriors, got "
                f"{describe(seen)}."
            )
        if len(priors) != len(posteriors):
            if (shared := one_of(priors)) is None:
                raise ValueError(
                    f"`prior={self._priors[name].key!r}`: there are {len(priors)} different priors and "
                    f"{len(posteriors)} posteriors in this step, so they don't pair up. Pass a callable `(pl_module, "
                    "batch) -> p(z)`."
                )
            priors = [shared] * len(posteriors)
        mask = None if self._mask is None else batch_part(batch, self._mask, (), 0)
        return [self._latent(pl_module, *row, mask) for row in zip(posteriors, priors, seen, strict=True)]

    def _prior(self, name: str, pl_module: LightningModule, batch: Any, posteriors: list[Distribution]) -> list[Any]:
        priors = self._priors[name].read(pl_module, batch)
        if priors is not None:
            return _with_gradient(priors, lambda prior: prior) if self._keeps_graph else priors
        priors = [standard_prior(each) for each in posteriors]
        if not self._has_said and self._who and priors[0] is not None:
            self._has_said = True
            what = "the prior N(0, I)" if isinstance(priors[0], Normal) else "a uniform prior"
            rank_zero_info(
                f"{self._who}: {type(pl_module).__name__} has no `prior`, so {what} is assumed. If it has another one, "
                "say where with `prior=`."
            )
        return priors

    def _latent(
        self, pl_module: LightningModule, posterior: Distribution, prior: Any, z: Tensor | None, mask: Any
    ) -> Latent:
        """Pair a posterior with what its prior says now: the parameters of a prior move with the optimizer's step."""
        latent = Latent(posterior, prior, z, mask=mask)
        if self._keeps_graph or prior is None:
            return latent
        if isinstance(prior, Normal):
            if not prior.loc.ndim:
                return latent
            loc, scale = prior.loc.detach().clone(), prior.scale.detach().clone()
            return replace(latent, prior=Normal(loc, scale, validate_args=False))
        # A module's own `log_prob` may draw numbers, and call the encoder.
        with torch.no_grad() if isinstance(prior, Distribution) else isolated(pl_module):
            return replace(latent, known_rates=rate_parts(posterior, prior, z))


def _ask(pl_module: LightningModule, prior: Any, posterior: Distribution) -> None:
    """Evaluate a module's own log-density in an extra pass."""
    with isolated(pl_module):
        prior.log_prob(posterior.sample())


def has_gradient(distribution: Any) -> bool:
    """Return whether a parameter of a distribution has a gradient."""
    return any(isinstance(each, Tensor) and each.requires_grad for each in vars(distribution).values())


def _with_gradient(values: Sequence[_T], distribution_of: Callable[[_T], Any]) -> list[_T]:
    """Leave out the calls without a gradient, to log or show something; all count if none has one."""
    return [each for each in values if has_gradient(distribution_of(each))] or list(values)


def _own_samples(pl_module: LightningModule, posteriors: list[Distribution], samples: list[Any]) -> list[Any]:
    """Return the sample that a module keeps as its attribute ``z``, if it is one of its own posterior."""
    z = getattr(pl_module, "z", None)
    if not isinstance(z, Tensor) or len(posteriors) != 1 or samples != [None]:
        return samples
    return [z] if z.shape == posteriors[0].batch_shape + posteriors[0].event_shape else samples
