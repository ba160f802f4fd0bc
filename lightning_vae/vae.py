"""The variational autoencoder: the model, and the loss it is trained on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from .checkpoints.class_paths import describe
from .checkpoints.exact_resume import trainer_of
from .checks import check_number, integer_from
from .compiling import CompiledMethod, CompileMode
from .conditions import Condition, warn_of_unread_condition
from .distributed import batch_means, mean_over_processes
from .likelihoods import Likelihood, warn_of_feedback
from .model import LatentModel, log_prob_of
from .multi_sample import checked_samples, multi_sample_bound
from .networks import Shape
from .noise import sample_by_index
from .objective import (
    ELBOTerms,
    FreeBitsAverage,
    FreeBitsPer,
    capacity_loss,
    checked_capacity_weight,
    constrained_error,
    group_rates,
    rate_parts,
    weighted_loss,
)
from .observations import (
    Observations,
    check_scale,
    data_of,
)
from .passes import wrong_terms
from .posteriors import PosteriorHead
from .priors import Prior
from .running_sums import TrainingMeans
from .terms import Step, Term
from .terms.base import build_terms, checked_names, checked_values
from .training_data import data_size, first_observations


class VAE(LatentModel):
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
    that holds the rate they are the distortion plus a price for exceeding the target, :attr:`rate_limit`; under one
    that holds an error, the rate plus a price for exceeding :attr:`error_limit`.

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
            Bernoulli for grey images, discretised logistic for colour images, Columns for tables, Gaussian with learned
            variance for other vectors.
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
        posterior: Constructor of a posterior head, called with ``latent_dim``. The encoder is then constructed with
            ``outputs=`` too, the number of columns that the head needs. ``None`` for a diagonal Gaussian, or the
            distribution that an encoder of one's own gives.
        terms: Constructors of terms to add to the loss, by name, each called without arguments. The weight of a term is
            the knob ``<name>_weight``.
        importance_samples: Number K of samples of the multi-sample bound (IWAE) to train on, which has no floor.
            ``None``, the default, trains on the ELBO.
        capacity: Rate in nats at which a ``capacity_weight`` holds the rate, 0 by default; a knob like ``beta``.
        capacity_weight: Price of each nat of rate above or below the capacity, in the place of ``beta * floored rate``;
            see :func:`lightning_vae.objective.capacity_loss`. ``None``, the default, for the loss above.
        kinds: Kinds of a table's columns, which the likelihood is constructed with if it takes them, as Columns does.
            In a config they come from the data module.

    Attributes:
        posterior: q(z|x) of the batch processed last, which callbacks read.
        prior_module: The prior as a module.
        knobs: The number that each knob is configured with, by the constructor or an assignment; ``None`` for a knob
            left at its default.
        rate_limit: The rate in nats up to which ``val/loss`` is the distortion, and the price of each nat above it; set
            by ``TargetRate``, saved in checkpoints. ``None`` if no controller has set it.
        error_limit: ``"squared_error"`` or ``"distortion"``, its limit, up to which ``val/loss`` is the rate, and the
            price of each unit above it; set by ``GECO`` and saved in the same way.
        constrained_error: That error of each observation of the batch processed last, if there is a limit.

    Raises:
        ValueError: If an option is out of range.

    References:
        Kingma and Welling, "Auto-Encoding Variational Bayes", ICLR 2014; Higgins et al., "beta-VAE", ICLR 2017.
    """

    beta: Tensor
    free_bits: Tensor
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
        posterior: Callable[[int], PosteriorHead] | None = None,
        terms: Mapping[str, Callable[[], Term]] | None = None,
        importance_samples: int | None = None,
        capacity: float | None = None,
        capacity_weight: float | None = None,
        kinds: Sequence[str | int] | None = None,
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
            "encoder": encoder, "decoder": decoder, "likelihood": likelihood, "condition": condition, "prior": prior,
            "posterior": posterior,
        }  # fmt: skip
        terms = checked_names(terms, self)
        instances = [name for name, part in parts.items() if isinstance(part, nn.Module)]
        instances += ["terms"] * any(isinstance(term, nn.Module) for term in terms.values())
        self.save_hyperparameters(ignore=instances)
        described = {name: describe(self.hparams.get(name, part)) for name, part in parts.items()}
        configured = self.hparams.get("terms") or terms
        described["terms"] = {name: describe(term) for name, term in configured.items()} or None
        # These load with `weights_only=True`, as do lists and tuples.
        self._update_hparams(described if isinstance(given, list | tuple) else {**described, "shape": shape})

        self._build(shape, levels, kinds, latent_dim, **parts)
        floor = {
            "free_bits": free_bits,
            "free_bits_per": None if free_bits_per == "dimension" else free_bits_per,
            "free_bits_average": None if free_bits_average == "batch" else free_bits_average,
        }
        self.importance_samples = checked_samples(importance_samples, self.head, terms, capacity_weight, **floor)
        if compile and (terms or self.importance_samples > 1):
            raise ValueError("`compile` compiles the ELBO only: leave it out with `terms` and `importance_samples`.")
        self.terms = build_terms(terms, self.head)
        weights: Any = {f"{name}_weight": (term.weight, 1.0) for name, term in self.terms.items()}
        try:
            group_rates(torch.zeros(1, self.rate_parts), free_bits_per)
        except ValueError as error:
            raise ValueError(str(error).replace("`per`", "`free_bits_per`")) from None
        if self.has_joint_rate and free_bits and free_bits_per != "whole":
            raise ValueError(
                f"`free_bits_per` must be 'whole' under a joint prior or posterior, whose rate has no parts for the "
                f"dimensions, got {free_bits_per!r}."
            )
        self.free_bits_per, self.free_bits_average = free_bits_per, free_bits_average
        self._compiled_loss = CompiledMethod(compile)

        knobs: dict[str, Any] = {"beta": (beta, 1.0), "free_bits": (free_bits, 0.0)}
        self.capacity_weight = checked_capacity_weight(capacity_weight, capacity, beta=beta, **floor)
        if self.capacity_weight is not None:
            self.unread_knobs, knobs["capacity"] = tuple(knobs), (capacity, 0.0)
        elif self.importance_samples > 1:
            self.unread_knobs = ("free_bits",)
        self._register_knobs(**knobs, **weights)
        self.training_means = TrainingMeans(list(self.terms))
        warn_of_feedback(float(self.beta), self.likelihood)
        self._has_terms = bool(self.terms)
        self._needs_record = self._has_terms or self.condition is not None
        self._step: Step | None = None  # of the batch processed last, for the terms
        self._checks_next = True  # the training data

    # ---- the loss

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        # Later batches are not checked: reading their values would synchronise in each step.
        checks = self._checks_next or (batch_idx == 0 and trainer_of(self) is None)
        if checks:
            self._checks_next = False
            if self.condition is None:
                warn_of_unread_condition(batch)
            if (number := self.prior_module.wants) and (trainer := trainer_of(self)) is not None:
                self.prior_module.start(*first_observations(trainer, number, self._start_of_prior))
        data = data_of(batch, self.shape)
        x: Tensor | Observations = data
        if self._needs_record or (not isinstance(batch, Tensor | list | tuple) and "mask" in batch):
            x = self._observations(batch, data, checks, is_training=True)
        elif checks:
            check_scale(data, self.levels, self.likelihood)
        self._is_checked = True
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

    def _start_of_prior(self, batch: Any) -> list[Tensor]:
        seen = self._observations(batch, data_of(batch, self.shape), checks=False, is_training=True)
        features = self.likelihood.features(seen.scaled, seen.mask)
        return [features] if seen.condition is None else [features, seen.condition]

    def _loss(self, x: Tensor | Observations) -> tuple[Tensor, Tensor, int | Tensor]:
        """Compute the loss, the terms to log, and the number of observations that they average."""
        if self.importance_samples > 1:
            return self._multi_sample_loss(x)
        terms = self._checked_terms(x, len(x))
        means = batch_means(terms, self.free_bits, self.free_bits_per, self.free_bits_average)
        if self.capacity_weight is None:
            loss = weighted_loss(means.distortion, means.floored_rate, self.beta)
        else:
            loss = capacity_loss(means.distortion, means.floored_rate, self.capacity, self.capacity_weight)
        added = self._added_terms() if self._has_terms else []
        if added:
            loss = loss + self._weighted(added)
        with torch.no_grad():
            return loss, torch.stack([means.distortion, means.rate, means.floored_rate, loss, *added]), means.size

    def _checked_terms(self, x: Tensor | Observations, size: int) -> ELBOTerms:
        """Return :meth:`elbo_terms`, which a subclass may override, after checking the shapes of its result."""
        distortion, rates = terms = self.elbo_terms(x)
        if distortion.shape != (size,) or rates.shape != (size, self.rate_parts):
            raise wrong_terms(terms, size, self.rate_parts)
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
        observed, index, c, mask = self._inputs(x, index)
        self.posterior = posterior = self._encode(observed, c, mask)
        prior = self._step_prior(c)
        z = posterior.rsample() if index is None else sample_by_index(posterior, index)
        if self.has_joint_rate:
            self.z = z  # at which the rate is estimated
        likelihood = self._decode(z, c, observed if self.training and index is None else None, mask)
        distortion = -log_prob_of(likelihood, observed, mask)
        if self.error_limit is not None:
            kind = self.error_limit[0]
            unit = self.likelihood.error_unit() if kind == "squared_error" else 1.0
            self.constrained_error = constrained_error(kind, distortion, likelihood, observed, mask, unit)
        if self._has_terms and isinstance(x, Observations):
            self._step = Step(x, posterior, prior, z, likelihood, data_size(trainer_of(self), self._loader))
        return ELBOTerms(distortion, rate_parts(posterior, prior, z))

    def _added_terms(self) -> list[Tensor]:
        """Compute the terms that are added to the loss, unweighted, of the batch whose ELBO was computed last."""
        step, self._step = self._step, None
        if step is None:
            return []
        # Numbers that a term draws are its own: the posterior's noise is the same with the term and without it.
        is_cuda = self.device.type == "cuda"
        with torch.random.fork_rng([self.device] if is_cuda else []):
            generator = torch.cuda.default_generators[self.device.index or 0] if is_cuda else torch.default_generator
            generator.manual_seed(int(torch.randint(2**62, ())))  # `torch.manual_seed` takes as long as a small layer
            values = {name: term(step) for name, term in self.terms.items()}
        return checked_values(values)

    def _multi_sample_loss(self, x: Tensor | Observations) -> tuple[Tensor, Tensor, int | Tensor]:
        """Compute the result of :meth:`_loss` for the multi-sample bound."""
        loss, terms = self._multi_sample(x)
        if terms.rate_per_dimension.shape[1] != self.rate_parts:
            raise wrong_terms(terms, len(x), self.rate_parts)
        means = batch_means(terms, 0.0)
        loss = mean_over_processes(loss[:, None])[0]
        with torch.no_grad():
            return loss, torch.stack([means.distortion, means.rate, means.rate, loss]), means.size

    def _bound(self, observations: Observations) -> Tensor | None:
        return -self._multi_sample(observations)[0] if self.importance_samples > 1 else None

    def _multi_sample(self, x: Tensor | Observations) -> tuple[Tensor, ELBOTerms]:
        """Compute the loss of the multi-sample bound, shape ``(B,)``, and the ELBO's terms of its samples."""
        observed, index, c, mask = self._inputs(x, None)
        self.posterior = posterior = self._encode(observed, c, mask)
        prior, number = self._step_prior(c), self.importance_samples
        # One row for each sample of each observation.
        rows: list[Any] = [
            None if each is None else each.repeat(number, *[1] * (each.ndim - 1)) for each in (observed, c, mask)
        ]
        is_fresh = self.training and index is None

        def log_likelihood(z: Tensor) -> Tensor:
            decoded = self._decode(z.flatten(0, 1), rows[1], rows[0] if is_fresh else None, rows[2])
            return log_prob_of(decoded, rows[0], rows[2]).view(number, -1)

        z = None if index is None else torch.stack([sample_by_index(posterior, index, draw) for draw in range(number)])
        found = multi_sample_bound(posterior, prior, log_likelihood, number, z, self.beta)
        return found.loss, ELBOTerms(-found.log_likelihood.mean(0), rate_parts(posterior, prior, found.z[0]))

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
        self.posterior = None  # callbacks have read it, and its graph holds memory
        if self._prior is not None or self.constrained_error is not None:
            self._prior = self.constrained_error = self.z = None

    @override
    def setup(self, stage: str) -> None:
        super().setup(stage)
        self._checks_next = True

    def __getstate__(self) -> dict[str, Any]:
        # The posterior of a training step has a graph, which can't be copied.
        none = dict.fromkeys(("posterior", "_prior", "z", "_step", "constrained_error"))
        return {**super().__getstate__(), **none, "_is_checked": False}
