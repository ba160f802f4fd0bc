"""The variational autoencoder: the model, and the loss it is trained on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch import distributions as td
from typing_extensions import override

from .checkpoints.class_paths import build, describe
from .checkpoints.exact_resume import trainer_of
from .checks import check_number, integer_from
from .compiling import CompiledMethod, CompileMode
from .conditions import Condition
from .distributed import batch_means, rank_and_processes
from .likelihoods import Likelihood, default_likelihood, warn_of_feedback
from .networks import MLPDecoder, MLPEncoder, Shape
from .noise import sample_by_index
from .objective import (
    ELBOTerms,
    FreeBitsAverage,
    FreeBitsPer,
    group_rates,
    rate_parts,
    weighted_loss,
)
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
from .posteriors import posterior_of, widen
from .priors import Prior, StandardNormal


class VAE(PassModule):
    r"""Train a variational autoencoder on the ELBO, with a weight on its rate and a floor under it.

    .. math::
        \text{loss} = \text{distortion} + \beta \cdot \text{floored rate}

    in nats per observation, summed over the event and the latent dimensions, averaged over the batch. The two knobs
    ``beta`` and ``free_bits`` are 0-dim float32 buffers: assigning a number fills them in place, and outside a fit
    configures the module as the constructor does. A callback moves a knob only during training batches: validation,
    checkpoints and the finished module hold its target.

    Logged in nats per observation: ``train/``, ``val/`` and ``test/`` with ``elbo``, ``rate``, ``distortion`` and
    ``floored_rate``, always unweighted, and ``loss``. ``train/loss`` is the loss being minimised. ``val/loss`` and
    ``test/loss`` are the loss at the knobs' targets, so they can select models under any schedule. Under a controller
    that holds the rate they are the distortion plus a price for exceeding the target, :attr:`rate_limit`.

    A batch is a tensor, a sequence that starts with one, or a mapping with the key ``"x"`` and optionally ``"index"``,
    the observation's index in its data set; ``"mask"``, True where a number of x is there; ``"label"``; and
    ``"condition"``.

    A subclass that changes the loss overrides :meth:`elbo_terms`; the networks and the likelihood are arguments. An
    override of :meth:`encode` or :meth:`decode` changes what callbacks and evaluation see, not what is trained.

    Args:
        shape: Shape of one observation: ``(channels, height, width)`` for images, ``(d,)`` for vectors. In a config it
            comes from the data module.
        levels: Number of integer levels of the raw data, 256 for 8-bit images: the networks then see ``x / (levels -
            1)``. ``None`` for data already in the networks' scale. In a config it comes from the data module.
        latent_dim: Number of latent dimensions k.
        encoder: Constructor of the network of q(z|x), called with ``(shape, latent_dim)``: a class such as
            ``ConvEncoder``, a ``functools.partial`` of one, or a finished ``nn.Module``. It returns the mean and the
            log-variance, each ``(B, k)`` (a pair, or one tensor of ``2k`` columns), or a factorised
            ``torch.distributions.Distribution`` of batch shape ``(B, k)``.
        decoder: Constructor of the network of p(x|z), called with ``(latent_dim, shape)``.
        likelihood: Constructor of the likelihood, called with ``(shape, levels)``. The default depends on the data:
            Bernoulli for grey images, discretised logistic for colour images, Gaussian with learned variance for
            vectors.
        beta: Weight of the rate; 1, the default, trains on the negative ELBO.
        free_bits: Floor of the rate in nats, 0 for none, the default; see :func:`lightning_vae.free_bits`.
        free_bits_per: Dimensions that share a floor: ``"dimension"``, ``"whole"``, or a number of consecutive ones.
        free_bits_average: ``"batch"`` floors the mean over the batch, ``"sample"`` each observation's rate. The batch
            is that of all processes. Each accumulated batch has its own floor.
        compile: Compile the training loss to one graph with ``torch.compile``: ``True``, or one of its modes. With
            ``"reduce-overhead"`` a GPU replays CUDA graphs. Evaluation is not compiled. A compiled loss draws different
            noise.
        condition: Constructor of the condition c of p(x|c), called without arguments, such as ``partial(Condition,
            classes=10)``. The networks are then constructed with ``condition_dim=`` too, and called with ``(x, c)`` and
            ``(z, c)``.
        prior: Constructor of the prior, called with ``(latent_dim, condition_dim)``; N(0, I) by default.

    Attributes:
        posterior: q(z|x) of the batch processed last, which callbacks read.
        prior_module: The prior as a module.
        knobs: The number that each knob is configured with, by the constructor or an assignment; ``None`` for a knob
            left at its default.
        rate_limit: The rate in nats up to which ``val/loss`` is the distortion, and the price of each nat above it; set
            by ``TargetRate``, saved in checkpoints. ``None`` if no controller has set it.

    Raises:
        ValueError: If an option is out of range.

    References:
        Kingma and Welling, "Auto-Encoding Variational Bayes", ICLR 2014; Higgins et al., "beta-VAE", ICLR 2017.
    """

    beta: Tensor
    free_bits: Tensor
    likelihood: Likelihood
    condition: Condition | None
    prior_module: Prior
    chosen_options = ("free_bits_per", "free_bits_average")

    def __init__(
        self,
        shape: Shape,
        levels: int | None = None,
        latent_dim: int = 16,
        encoder: Callable[[Shape, int], nn.Module] | None = None,
        decoder: Callable[[int, Shape], nn.Module] | None = None,
        likelihood: Callable[[Shape, int | None], Likelihood] | None = None,
        beta: float | None = None,
        free_bits: float | None = None,
        free_bits_per: FreeBitsPer = "dimension",
        free_bits_average: FreeBitsAverage = "batch",
        compile: CompileMode = False,  # noqa: A002
        condition: Callable[[], Condition] | None = None,
        prior: Callable[[int, int], Prior] | None = None,
    ) -> None:
        super().__init__()
        given, shape = shape, tuple(shape) if isinstance(shape, Sequence) else ()
        allowed = "the shape of one observation, such as (1, 28, 28) or (6,)"
        check_number("shape", given, allowed, lambda _: bool(shape) and all(map(integer_from(1), shape)))
        if levels is not None:
            check_number("levels", levels, "an integer of at least 2, or None for real-valued data", integer_from(2))
        check_number("latent_dim", latent_dim, "an integer of at least 1", integer_from(1))
        if free_bits_average not in ("batch", "sample"):
            raise ValueError(f"`free_bits_average` must be 'batch' or 'sample', got {free_bits_average!r}.")

        parts = {
            "encoder": encoder, "decoder": decoder, "likelihood": likelihood, "condition": condition, "prior": prior
        }  # fmt: skip
        self.save_hyperparameters(ignore=[name for name, part in parts.items() if isinstance(part, nn.Module)])
        described = {name: describe(self.hparams.get(name, part)) for name, part in parts.items()}
        # These load with `weights_only=True`, as do lists and tuples.
        self._update_hparams(described if isinstance(given, list | tuple) else {**described, "shape": shape})

        self.shape, self.levels, self.latent_dim = shape, levels, latent_dim
        self.condition = None if condition is None else build("condition", condition, of=Condition)
        condition_dim = 0 if self.condition is None else self.condition.dim
        sizes: dict[str, Any] = {"condition_dim": condition_dim} if condition_dim else {}
        self.encoder = build("encoder", MLPEncoder if encoder is None else encoder, shape, latent_dim, **sizes)
        self.decoder = build("decoder", MLPDecoder if decoder is None else decoder, latent_dim, shape, **sizes)
        make = default_likelihood if likelihood is None else likelihood
        self.likelihood = build("likelihood", make, shape, levels, of=Likelihood)
        make_prior = StandardNormal if prior is None else prior
        self.prior_module = build("prior", make_prior, latent_dim, condition_dim, of=Prior)
        self.rate_parts = 1 if self.prior_module.is_joint else latent_dim
        group_rates(torch.zeros(1, self.rate_parts), free_bits_per)  # raises on a value that does not fit
        self.free_bits_per, self.free_bits_average = free_bits_per, free_bits_average
        self._compiled_loss = CompiledMethod(compile)

        self._register_knobs(beta=(beta, 1.0), free_bits=(free_bits, 0.0))
        warn_of_feedback(float(self.beta), self.likelihood)
        self.posterior: td.Distribution | None = None
        self._prior: td.Distribution | None = None  # of the batch processed last, if it is not always the same
        self._checks_next, self._is_checked = True, False  # the training data; those that `elbo_terms` is given
        self._note_dtype()

    # ---- the loss

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        # Later batches are not checked: reading their values would synchronise in each step.
        checks = self._checks_next or (batch_idx == 0 and trainer_of(self) is None)
        x = self._training_data(batch, checks)
        self._checks_next, self._is_checked = False, True
        try:
            loss, terms, count = self._graph_loss(x) if self._compiled_loss.mode else self._loss(x)
        except ValueError as error:
            if "Expected more than 1 value per channel" not in str(error):
                raise
            raise ValueError(
                f"Batch {batch_idx} holds one observation, which a batch normalisation can't train on. Set "
                "`drop_last=True` in the DataLoader, or another `batch_size`."
            ) from error
        finally:
            self._is_checked = False
        self._record(terms, count)
        return loss

    def _training_data(self, batch: Any, checks: bool) -> Tensor | Observations:
        """Return a batch's data; as a record with fresh noise if the model or the batch has more than data."""
        x = data_of(batch, self.shape)
        if self.condition is None and not (isinstance(batch, Mapping) and "mask" in batch):
            if checks:
                check_scale(x, self.levels, self.likelihood)
            return x
        return self._observations(batch, x, checks, is_training=True)

    def _loss(self, x: Tensor | Observations) -> tuple[Tensor, Tensor, int | Tensor]:
        """Compute the loss, the terms to log, and the number of observations that they average."""
        terms = self._checked_terms(x, len(x))
        means = batch_means(terms, self.free_bits, self.free_bits_per, self.free_bits_average)
        loss = weighted_loss(means.distortion, means.floored_rate, self.beta)
        with torch.no_grad():
            return loss, torch.stack([means.distortion, means.rate, means.floored_rate, loss]), means.size

    def _checked_terms(self, x: Tensor | Observations, size: int) -> ELBOTerms:
        """Return :meth:`elbo_terms`, which a subclass may override, after checking the shapes of its result."""
        terms = self.elbo_terms(x)
        distortion, rates = terms
        if distortion.shape != (size,) or rates.shape[:-1] != (size,):
            raise ValueError(
                f"`elbo_terms` must return a distortion of shape {(size,)} and rates of shape "
                f"{(size, self.latent_dim)}, one row per observation, got {tuple(distortion.shape)} and "
                f"{tuple(rates.shape)}."
            )
        return terms

    def elbo_terms(self, x: Tensor | Observations, index: Tensor | None = None) -> ELBOTerms:
        """Compute the ELBO's terms with one posterior sample per observation.

        Args:
            x: The result of :meth:`observe`; or data in their own scale, shape ``(B, *shape)``.
            index: Each observation's index in its data set, int64, shape ``(B,)``: it fixes the binarisation and the
                sample, as at evaluation. ``None`` draws both with fresh noise, as in training. ``Observations`` carry
                their own.

        Returns:
            The terms in nats, one row per observation, float32 (float64 where the networks are).

        Raises:
            ValueError: If the data or the index have another shape or type, or the data are in another scale. Checking
                the scale waits for the device, except in ``training_step``, which checks the first batch of a fit.
        """
        if isinstance(x, Observations):
            observed, index, c, mask = self._observed(x), x.index, self._embedded(x.condition), x.mask
            index = None if x.is_training else index
        else:
            scaled, c, mask = self._checked(x), self._embedded(None), None
            if index is not None:
                check_index(index, len(x))
                index = index.long()
            observed = self.likelihood.observe(scaled, index)
        self.posterior = posterior = self._encode(observed, c)
        z = posterior.rsample() if index is None else sample_by_index(posterior, index)
        likelihood = self._decode(z, c, observed if self.training and index is None else None)
        log_prob: Any = likelihood.log_prob
        distortion = -(log_prob(observed) if mask is None else log_prob(observed, mask))
        return ELBOTerms(distortion, rate_parts(posterior, self._step_prior(c), z))

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
        if type(self.prior_module) is not StandardNormal:
            self._prior = prior
        return prior

    def _encode(self, observed: Tensor, c: Tensor | None = None) -> td.Distribution:
        x = observed.to(self._network_dtype)
        output = self.encoder(x) if c is None else self.encoder(x, c)
        return posterior_of(output, observed.shape[0], self.latent_dim)

    def _decode(self, z: Tensor, c: Tensor | None = None, observed: Tensor | None = None) -> td.Distribution:
        z = z.to(self._network_dtype)
        output = widen(self.decoder(z) if c is None else self.decoder(z, c))
        if output.shape != (z.shape[0], *self.shape):  # `len(z)` would fix the batch size of an export
            raise ValueError(f"`decoder` must give shape {(z.shape[0], *self.shape)}, got {tuple(output.shape)}.")
        # During training a likelihood may compute its scale from the data that it will be evaluated on.
        likelihood: td.Distribution = self.likelihood(output, observed)
        return likelihood

    def _graph_loss(self, x: Tensor | Observations) -> tuple[Tensor, Tensor, int | Tensor]:
        """Compute the result of :meth:`_loss` as one graph."""
        if self.likelihood.starts:  # this happens once, outside the graph
            devices = [self.device] if self.device.type == "cuda" else []
            with torch.no_grad(), torch.random.fork_rng(devices):
                self._loss(x)
        self.posterior = None  # a validation's posterior has another type, which would need another graph
        result: tuple[Tensor, Tensor, int | Tensor] = self._compiled_loss(self._loss, x)
        return result

    @override
    def configure_optimizers(self) -> Any:
        """Use Adam with a learning rate of 1e-3, unless a config has an ``optimizer``.

        The fused implementation, one operation for all parameters, is faster on a CPU too.
        """
        return torch.optim.Adam(self.parameters(), lr=1e-3, fused=True)

    @override
    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.posterior = self._prior = None  # callbacks have read them, and their graphs hold memory

    # ---- the model

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
        if checks:
            check_scale(x, self.levels, self.likelihood)
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
        return self._encode(self._observed(x) if isinstance(x, Observations) else self._checked(x), c)

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
            z: Latents, shape ``(B, k)``.
            condition: What the model is conditioned on, for all latents or for each; see :meth:`sample`.

        Raises:
            ValueError: If the latents have another shape or type or are not finite, or the decoder's output has the
                wrong shape.
        """
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
            decoded_as: Another condition to decode under: what the observation would look like under it.
        """
        columns = self._condition_of(x, condition)
        own = () if columns is None else (columns,)
        z = self.encode(x, *own).mean
        return self.to_data_scale(self.decode(z, *(own if decoded_as is None else (decoded_as,))).mean)

    def sample(self, n: int, condition: Any = None) -> Tensor:
        """Draw ``n`` latents from the prior and return the means of p(x|z), as :meth:`reconstruct` does.

        For noisy draws of x: ``vae.decode(vae.prior.sample((n,))).sample()``.

        Args:
            n: Number of samples.
            condition: What a conditional model is conditioned on, for all samples or for each: a class, an integer or
                integers of shape ``(n,)``; covariates, of shape ``(covariates,)`` or ``(n, covariates)``; a dict of
                both under ``"label"`` and ``"condition"``.

        Returns:
            Images or vectors in the data's own scale, shape ``(n, *shape)``.

        Raises:
            ValueError: If ``n`` is not an integer of at least 0.
        """
        check_number("n", n, "an integer of at least 0", integer_from(0))
        columns = self._condition_of(torch.empty(n, 0), condition)
        prior = self.prior_given(columns)
        z = prior.sample(torch.Size(() if prior.batch_shape[:-1] == (n,) else (n,)))
        return self.to_data_scale(self.decode(z, *(() if columns is None else (columns,))).mean)

    def to_data_scale(self, x: Tensor) -> Tensor:
        """Convert data from the networks' scale to their own."""
        return x if self.levels is None else x * (self.levels - 1)

    # ---- copies, scales and types

    @override
    def setup(self, stage: str) -> None:
        super().setup(stage)
        self._checks_next = True

    def __getstate__(self) -> dict[str, Any]:
        # The posterior of a training step has a graph, which can't be copied.
        return {**super().__getstate__(), "posterior": None, "_prior": None, "_is_checked": False}

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
