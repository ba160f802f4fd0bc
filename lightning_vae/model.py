"""The model of a VAE: its networks, prior and likelihood, from data to latents and back."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor
from torch import distributions as td
from typing_extensions import override

from .checkpoints.class_paths import build, check_inputs, takes
from .checkpoints.exact_resume import trainer_of
from .checks import check_number, integer_from
from .conditions import Condition
from .distributed import rank_and_processes
from .likelihoods import Likelihood, default_likelihood
from .networks import MLPDecoder, MLPEncoder, Shape
from .observations import (
    Observations,
    check_data,
    check_finite,
    check_index,
    check_scale,
    check_type,
    data_of,
    has_values,
    index_and_label_of,
    without_missing,
)
from .passes import PassModule
from .posteriors import PosteriorHead, posterior_of, widen
from .priors import Prior, StandardNormal, UniformCategorical


class LatentModel(PassModule):
    """Base class of a VAE: q(z|x, c), p(z|c) and p(x|z, c), without the loss that trains them.

    Attributes:
        posterior: q(z|x) of the batch processed last, which callbacks read.
        prior_module: The prior as a module.
        z: The sample of the posterior at which the rate of the batch processed last is estimated, if it is.
        has_joint_rate: Whether the rate has no parts for the dimensions, as under a mixture.
    """

    likelihood: Likelihood
    condition: Condition | None
    head: PosteriorHead | None
    prior_module: Prior

    def _build(
        self,
        shape: Shape,
        levels: int | None,
        kinds: Sequence[str | int] | None,
        latent_dim: int,
        encoder: Any,
        decoder: Any,
        likelihood: Any,
        condition: Any,
        prior: Any,
        posterior: Any,
    ) -> None:
        """Build the parts, each from its constructor."""
        self.shape, self.levels, self.latent_dim = shape, levels, latent_dim
        self.condition = None if condition is None else build("condition", condition, of=Condition)
        condition_dim = 0 if self.condition is None else self.condition.dim
        sizes: dict[str, Any] = {"condition_dim": condition_dim} if condition_dim else {}
        self.head = None if posterior is None else build("posterior", posterior, latent_dim, of=PosteriorHead)
        columns = {} if self.head is None else {"outputs": self.head.outputs}
        make = default_likelihood if likelihood is None else likelihood
        of_table = {"kinds": kinds} if kinds is not None and takes("likelihood", make, "kinds") else {}
        built: Likelihood = build("likelihood", make, shape, levels, of=Likelihood, **of_table)
        if kinds is not None and not of_table and (len({*kinds}) > 1 or not isinstance(kinds[0], str)):
            raise ValueError(
                f"`likelihood` {type(built).__name__} takes all columns alike, but the table has the `kinds`"
                f" {', '.join(map(str, kinds))}. Use Columns, or leave columns out."
            )
        make = MLPEncoder if encoder is None else encoder
        self.encoder = build("encoder", make, built.features_shape, latent_dim, **sizes, **columns)
        make = MLPDecoder if decoder is None else decoder
        self.decoder = build("decoder", make, latent_dim, built.output_shape, **sizes)
        c = ("c",) if condition_dim else ()
        check_inputs("encoder", self.encoder, "x", *c)
        check_inputs("decoder", self.decoder, "z", *c)
        self.likelihood = built
        self._output_shape = built.output_shape
        self._has_features = type(built).features is not Likelihood.features
        classes = None if self.head is None else self.head.classes
        usual = StandardNormal if classes is None else partial(UniformCategorical, classes=classes)
        make = usual if prior is None else prior
        self.prior_module = build("prior", make, latent_dim, condition_dim, of=Prior)
        if self.prior_module.latent_dim != latent_dim:
            raise ValueError(
                f"`prior` must have the model's `latent_dim`, {latent_dim}, got one of {self.prior_module.latent_dim}."
            )
        if (given := self.prior_module.condition_dim) not in (0, condition_dim):
            has = (
                f"the model's condition c has {condition_dim} columns"
                if condition_dim
                else "the model has no condition"
            )
            raise ValueError(
                f"`prior` has a `condition_dim` of {given}, but {has}. Give its class, which the model constructs."
            )
        if self.prior_module.classes != classes:
            raise ValueError(
                f"`prior` and `posterior` must both be over groups of as many classes, or neither, got "
                f"{self.prior_module.classes or 'no'} and {classes or 'no'} classes. Leave `prior` out, or choose "
                + (f"UniformCategorical with `classes` {classes}." if classes else "CategoricalGroups as `posterior`.")
            )
        self.prior_module.connect(
            built.features_shape, self._encode_features, 0 if self.condition is None else self.condition.columns
        )
        self._has_standard_prior = type(self.prior_module) is StandardNormal
        self.has_joint_rate = self.prior_module.is_joint or (self.head is not None and self.head.is_joint)
        parts = latent_dim if self.head is None else self.head.parts
        self.rate_parts = 1 if self.has_joint_rate else parts
        self.posterior: td.Distribution | None = None
        self.z: Tensor | None = None
        self._prior: td.Distribution | None = None  # of the batch processed last, if it is not always the same
        self._is_checked = False  # whether the data that `elbo_terms` is given are
        self._note_dtype()

    @property
    def prior(self) -> td.Distribution:
        """p(z), batch shape ``(k,)`` if it is factorised; for p(z|c), that of the batch processed last."""
        prior: td.Distribution = self.prior_module(None) if self._prior is None else self._prior
        return prior

    def prior_given(self, condition: Tensor | None) -> td.Distribution:
        """Return p(z); or p(z|c) of each row of a record's ``condition``."""
        prior: td.Distribution = self.prior_module(self._embedded(condition))
        return prior

    def observe(self, batch: Any, first: int = 0) -> Observations:
        """Return a batch as the model sees it at evaluation, on the model's device.

        Args:
            batch: A tensor, a sequence that starts with one, or a mapping with the key ``"x"`` and optionally
                ``"index"``, ``"label"``, ``"condition"`` and ``"mask"``; the data in their own scale.
            first: Number of observations that this process has seen in earlier batches. It numbers the observations of
                a batch without ``"index"``, in the way ``DistributedSampler`` assigns them to several processes. The
                scale of the data is checked in the batch at 0.

        Raises:
            ValueError: If the batch holds no observations of the model's shape, or they are in another scale.
        """
        return self._observations(batch, data_of(batch, self.shape), checks=first == 0, first=first)

    def _observations(
        self, batch: Any, x: Tensor, checks: bool, first: int = 0, is_training: bool = False
    ) -> Observations:
        x, mask = without_missing(x, batch)
        if mask is not None:
            self.likelihood.check_mask()
        if checks:
            check_scale(x, self.levels, self.likelihood, mask)
        index, label = index_and_label_of(batch, len(x))
        if index is None:
            rank, processes = rank_and_processes(trainer_of(self))
            index = torch.arange(first, first + len(x), device=self.device) * processes + rank
        condition = None if self.condition is None else self.condition.of_batch(batch, len(x), checks).to(self.device)
        x, index = x.to(self.device), index.to(self.device).long()
        mask = None if mask is None else mask.to(self.device)
        scaled = self._scaled(x)
        label = label.to(self.device) if isinstance(label, Tensor) else label
        observed = self.likelihood.observe(scaled, None if is_training else index)
        return Observations(x, scaled, observed, index, label, condition, mask, is_training)

    def encode(self, x: Tensor | Observations, condition: Any = None) -> td.Distribution:
        """Return the posterior q(z|x), or q(z|x, c), with batch shape ``(B, k)``.

        Args:
            x: The result of :meth:`observe`; or data in their own scale, shape ``(B, *shape)``, which are not
                binarised: the encoder then sees the mean of their binarisations.
            condition: What the model is conditioned on, if ``x`` does not hold it; see :meth:`sample`.

        Raises:
            ValueError: If the data have another shape, type or scale, or the encoder's output has the wrong shape.
        """
        c = self._embedded(self._condition_of(x, condition))
        if isinstance(x, Observations):
            return self._encode(self._observed(x), c, x.mask)
        return self._encode(self._checked(x), c)

    def _condition_of(self, x: Tensor | Observations, condition: Any) -> Tensor | None:
        """Return the columns of the condition: those that a caller gives, else those of the record."""
        if self.condition is None:
            if condition is not None:
                raise ValueError("`condition` is given, but the model has none: construct it with `condition=`.")
            return None
        if condition is None and isinstance(x, Observations):
            return x.condition
        return self.condition.read(condition, len(x))

    def decode(self, z: Tensor, condition: Any = None) -> td.Distribution:
        """Return the likelihood p(x|z), with batch shape ``(B,)`` and event shape ``shape``, in the networks' scale.

        Args:
            z: Latents, shape ``(B, k)``; of groups of categories also ``(B, groups, classes)``.
            condition: What the model is conditioned on, for all latents or for each; see :meth:`sample`.

        Raises:
            ValueError: If the latents have another shape or type or are not finite, or the decoder's output has the
                wrong shape.
        """
        if isinstance(z, Tensor) and z.ndim == 3 and self.head is not None and self.head.classes:
            z = z.flatten(1)
        if not isinstance(z, Tensor) or z.shape[1:] != (self.latent_dim,):
            given = tuple(z.shape) if isinstance(z, Tensor) else type(z).__name__
            raise ValueError(f"`z` must have shape (B, {self.latent_dim}), got {given}.")
        check_type("The latents `z`", z)
        if has_values(z):
            check_finite("The latents `z`", z)
        return self._decode(z, self._embedded(self._condition_of(z, condition)))

    @override
    def forward(self, x: Tensor, condition: Any = None) -> Tensor:
        """Return :meth:`reconstruct`, so that ``vae(x)`` and ``torch.export`` work."""
        return self.reconstruct(x, condition)

    def reconstruct(self, x: Tensor | Observations, condition: Any = None, decoded_as: Any = None) -> Tensor:
        """Return the mean of p(x|z) at the posterior's mean, in the data's own scale, shape ``(B, *shape)``.

        For the discretised logistic it is the location, clamped to the range of the data.

        Args:
            x: As in :meth:`encode`.
            condition: As in :meth:`encode`.
            decoded_as: Another condition to decode under: what the observation would look like under it. The part that
                a dict leaves out stays the observation's own.
        """
        columns = self._condition_of(x, condition)
        own = () if columns is None else (columns,)
        z = self.encode(x, *own).mean.flatten(1)
        if decoded_as is not None and self.condition is not None:
            decoded_as = self.condition.read(decoded_as, len(z), columns)
        return self.to_data_scale(self.decode(z, *(own if decoded_as is None else (decoded_as,))).mean)

    def sample(self, n: int, condition: Any = None, density: td.Distribution | None = None) -> Tensor:
        """Draw ``n`` latents from the prior and return the means of p(x|z), as :meth:`reconstruct` does.

        For noisy draws of x: ``vae.decode(vae.prior.sample((n,))).sample()``.

        Args:
            n: Number of samples.
            condition: What a conditional model is conditioned on, for all samples or for each: a class, an integer or
                integers of shape ``(n,)``; covariates, of shape ``(covariates,)`` or ``(n, covariates)``; a dict of
                both under ``"label"`` and ``"condition"``.
            density: The density to draw the latents from in place of the prior, over vectors of ``k`` numbers, such as
                :meth:`lightning_vae.estimators.ExPostDensity.distribution`; or a batch of ``n``, one for each sample.

        Returns:
            Images or vectors in the data's own scale, shape ``(n, *shape)``.

        Raises:
            ValueError: If ``n`` is not an integer of at least 0, or a condition or the density does not fit.
        """
        check_number("n", n, "an integer of at least 0", integer_from(0))
        columns = self._condition_of(torch.empty(n, 0), condition)
        prior = self.prior_given(columns) if density is None else self._checked_density(density, n)
        is_of_each = math.prod(prior.batch_shape + prior.event_shape) != self.latent_dim
        z = torch.empty(0, self.latent_dim, device=self.device)
        if n:  # torch draws no 0 categories
            z = prior.sample(torch.Size(() if is_of_each else (n,))).flatten(1)
        return self.to_data_scale(self.decode(z, *(() if columns is None else (columns,))).mean)

    def _checked_density(self, density: Any, n: int) -> td.Distribution:
        """Return a density in the place of the prior, of the shape of one latent or of ``n``."""
        shape = tuple(density.batch_shape + density.event_shape) if isinstance(density, td.Distribution) else None
        latents: set[tuple[int, ...]] = {(self.latent_dim,)}
        if classes := self.prior_module.classes:
            latents.add((self.latent_dim // classes, classes))
        if shape not in latents | {(n, *latent) for latent in latents}:
            got = f"a {type(density).__name__}" + ("" if shape is None else f" over the shape {shape}")
            raise ValueError(
                f"`density` must be a torch.distributions.Distribution over latents of {self.latent_dim} numbers, such "
                f"as `ExPostDensity.fit(z).distribution()`, got {got}."
            )
        checked: td.Distribution = density
        return checked

    def to_data_scale(self, x: Tensor) -> Tensor:
        """Convert data from the networks' scale to their own."""
        return x if self.levels is None else x * (self.levels - 1)

    # ---- what a step computes with

    def _inputs(
        self, x: Tensor | Observations, index: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """Return what a step computes with: the data as observed, the index that fixes the noise, c, and the mask."""
        if isinstance(x, Observations):
            return self._observed(x), None if x.is_training else x.index, self._embedded(x.condition), x.mask
        scaled, c = self._checked(x), None if self.condition is None else self._embedded(None)
        if index is not None:
            check_index(index, len(x))
            index = index.long()
        return self.likelihood.observe(scaled, index), index, c, None

    def _embedded(self, columns: Tensor | None) -> Tensor | None:
        """Return the condition c, shape ``(B, dim)``; ``None`` for a model without one."""
        if self.condition is None:
            return None
        if columns is None:
            raise ValueError(
                "The model is conditional, so data alone are not enough: pass `vae.observe(batch)`, whose batch holds "
                "the condition too, or `condition=`."
            )
        c: Tensor = self.condition(columns.to(self.device))
        return c.to(self._network_dtype)

    def _step_prior(self, c: Tensor | None) -> td.Distribution:
        prior: td.Distribution = self.prior_module(c)
        if not self._has_standard_prior:
            self._prior = prior
        return prior

    def _encode(
        self, observed: Tensor, c: Tensor | None = None, mask: Tensor | None = None, features: bool = False
    ) -> td.Distribution:
        has_features = not features and (self._has_features or mask is not None)
        x = self.likelihood.features(observed, mask) if has_features else observed
        x = x.to(self._network_dtype)
        output = self.encoder(x) if c is None else self.encoder(x, c)
        if self.head is None:
            return posterior_of(output, observed.shape[0], self.latent_dim)
        posterior: td.Distribution = self.head(output)
        return posterior

    def _encode_features(self, features: Tensor, columns: Tensor | None = None) -> td.Distribution:
        """Return the posterior of the encoder's input, given the columns of the condition."""
        return self._encode(features, self._embedded(columns), features=True)

    def _decode(
        self, z: Tensor, c: Tensor | None = None, observed: Tensor | None = None, mask: Tensor | None = None
    ) -> td.Distribution:
        z = (z if z.ndim == 2 else z.flatten(1)).to(self._network_dtype)
        output = widen(self.decoder(z) if c is None else self.decoder(z, c))
        shape = (z.shape[0], *self._output_shape)  # `len(z)` would fix the batch size of an export
        if output.shape != shape:
            raise ValueError(f"`decoder` must give shape {shape}, got {tuple(output.shape)}.")
        # During training a likelihood may compute its scale from the data that it will be evaluated on.
        given = (output, observed) if mask is None else (output, observed, mask)
        likelihood: td.Distribution = self.likelihood(*given)
        return likelihood

    # ---- scales and types

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self._note_dtype()
        return self

    def _note_dtype(self) -> None:
        """Record the dtype of the networks, and that of everything else, which is never half precision."""
        # Looking it up in each step would take as long as a small layer.
        self._network_dtype = next((each.dtype for each in self.encoder.parameters()), torch.float32)
        self.working_dtype = torch.float64 if self._network_dtype == torch.float64 else torch.float32

    def _observed(self, x: Observations) -> Tensor:
        """Return the encoder's input, after checking that it is not that of a model of another shape."""
        check_data(x.observed, self.shape)
        return x.observed

    def _checked(self, x: Tensor) -> Tensor:
        """Convert data to the networks' scale, after the checks of :meth:`training_step`."""
        if not self._is_checked:
            check_data(x, self.shape)
            check_scale(x, self.levels, self.likelihood)
        return self._scaled(x)

    def _scaled(self, x: Tensor) -> Tensor:
        """Convert data to the networks' scale."""
        x = x.to(self.working_dtype)
        return x if self.levels is None else x / (self.levels - 1)


def log_prob_of(likelihood: Any, observed: Tensor, mask: Tensor | None) -> Tensor:
    """Compute log p(x|z) of the numbers that are there, in nats, shape ``(B,)``."""
    log_prob: Tensor = likelihood.log_prob(observed) if mask is None else likelihood.log_prob(observed, mask)
    return log_prob
