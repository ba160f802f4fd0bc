"""Read the latents of any LightningModule: each posterior with its prior and the sample that the module drew."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING, Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor, nn
from torch.distributions import Distribution, Normal, OneHotCategorical

from .distribution_reader import DistributionReader, names
from .distributions import Second, as_distribution, describe, standard_prior, widened
from .isolated_eval import isolated
from .kl_rates import Rates, rate_parts

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule

Place = str | Sequence[str] | Callable[[Any, Any], Any] | Distribution | None
"""The place of a distribution, see :class:`~.distribution_reader.DistributionReader`, or a fixed distribution."""
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
    """

    posterior: Distribution
    prior: Any
    z: Tensor | None = None
    known_rates: Rates | None = None

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


def _at_this_step(pl_module: LightningModule, posterior: Distribution, prior: Any, z: Tensor | None) -> Latent:
    """Keep what a prior says now: its parameters move with the optimizer's step."""
    if isinstance(prior, Normal) and prior.loc.ndim:
        loc, scale = prior.loc.detach().clone(), prior.scale.detach().clone()
        return Latent(posterior, Normal(loc, scale, validate_args=False), z)
    if prior is None or isinstance(prior, Normal):
        return Latent(posterior, prior, z)
    # A module's own `log_prob` may draw numbers, and call the encoder.
    with torch.no_grad() if isinstance(prior, Distribution) else isolated(pl_module):
        return Latent(posterior, prior, z, rate_parts(posterior, prior, z))


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
        Nats, float32, shape ``(B, parts)``.

    Raises:
        ValueError: As :func:`~.kl_rates.rate_parts` does.
    """
    return latent.rates().nats.float().flatten(1)


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
        z: Where the module's sample is, as a path such as ``"encoder:1"`` or a callable. Rates without a closed form
            are estimated there, otherwise at a sample of the reader's own. An output ``(Normal, z)`` is recognised.
        second: Meaning of a Gaussian's second parameter, or a function from it to the scale.
        chunk: Axis along which one tensor is split into the two parameters.
        who: Name of the callback, for what it says.

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
        self._second, self._chunk = second, chunk
        self._has_said = False
        self._batch: Any = None  # of this step, until it is read
        self._read: list[dict[str, Latent]] | None = None  # before the optimizer's step
        self._posteriors = {name: DistributionReader(place, second, chunk) for name, place in groups.items()}
        self._fixed: dict[str, Any] = {}
        self._priors: dict[str, DistributionReader] = {}
        self._samples: dict[str, DistributionReader] = {}
        for name in groups:
            place = prior[name] if isinstance(prior, Mapping) else prior
            if isinstance(place, Distribution) or _is_density(place):
                self._fixed[name] = as_distribution(place) if isinstance(place, Distribution) else place
            elif place is not None:
                self._priors[name] = DistributionReader(place, second, option="prior")
            where: Any = z[name] if isinstance(z, Mapping) else z
            if where is not None:
                self._samples[name] = DistributionReader(where, option="z")

    @property
    def posterior(self) -> Any:
        """The place of the posterior, as given; a dict of places if there are several groups."""
        places = {name: reader.posterior for name, reader in self._posteriors.items()}
        return places.get("", places)

    @property
    def key(self) -> Any:
        """The posterior's place for a callback's ``state_key``, the same in each process."""
        keys = {name: reader.key for name, reader in self._posteriors.items()}
        return keys.get("", keys)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_batch": None, "_read": None}  # what belongs to a step can't be copied

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
        return [*self._posteriors.values(), *self._priors.values(), *self._samples.values()]

    def _group(self, name: str, pl_module: LightningModule, batch: Any) -> list[Latent]:
        reader = self._posteriors[name]
        posteriors, seen = reader.read_with_samples(pl_module, batch)
        if not posteriors:
            return []
        priors = self._prior(name, pl_module, batch, posteriors)
        if len(priors) != len(posteriors):
            if len(priors) > 1 and not all(_are_equal(each, priors[0]) for each in priors):
                raise ValueError(
                    f"`prior={self._priors[name].key!r}`: there are {len(priors)} different priors and "
                    f"{len(posteriors)} posteriors in this step, so they don't pair up. Pass a callable `(pl_module, "
                    "batch) -> p(z)`."
                )
            priors = [priors[0]] * len(posteriors)
        samples = self._samples[name].values(pl_module, batch) if name in self._samples else seen
        if len(samples) != len(posteriors) or not all(isinstance(z, Tensor | None) for z in samples):
            raise ValueError(
                f"`z={self._samples[name].key!r}` must be one tensor for each of {len(posteriors)} posteriors, got "
                f"{describe(samples)}."
            )
        return [_at_this_step(pl_module, *row) for row in zip(posteriors, priors, samples, strict=True)]

    def _prior(self, name: str, pl_module: LightningModule, batch: Any, posteriors: list[Distribution]) -> list[Any]:
        if name in self._priors:
            if (density := _density_at(pl_module, self._priors[name])) is not None:
                self._priors[name].forget()  # it is asked, and not called as a whole
                return [density]
            values = self._priors[name].values(pl_module, batch)
            where = f"`prior={self._priors[name].key!r}`"
            return [_as_prior(value, self._second, self._chunk, where) for value in values]
        if name in self._fixed:
            return [self._fixed[name]]
        own = getattr(pl_module, "prior", None)
        own = own[name] if isinstance(own, Mapping) and name in own else own
        if own is not None:
            return [own_prior(pl_module, own, self._second)]
        priors = [standard_prior(each) for each in posteriors]
        if not self._has_said and self._who and priors[0] is not None:
            self._has_said = True
            what = "the prior N(0, I)" if isinstance(priors[0], Normal) else "a uniform prior"
            rank_zero_info(
                f"{self._who}: {type(pl_module).__name__} has no `prior`, so {what} is assumed. If it has another one, "
                "say where with `prior=`."
            )
        return priors


def prior_with_gradient(pl_module: LightningModule) -> Any:
    """Return a module's own prior as it is, for a rate that has a gradient; N(0, I) if it has none."""
    own = getattr(pl_module, "prior", None)
    if own is None:
        return Normal(0.0, 1.0)
    return as_distribution(own) if isinstance(own, Distribution) else own


def own_prior(pl_module: LightningModule, own: Any, second: Second = "log_variance") -> Any:
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
