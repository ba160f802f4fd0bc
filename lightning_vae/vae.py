"""The LightningModule: it owns the knobs and the formula; callbacks turn the knobs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any, Self

import torch
from lightning.fabric.utilities.cloud_io import _load
from lightning.pytorch import LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch import distributions as td

from .checkpoints.changed_options import configured, length, say_what_changed
from .checkpoints.class_paths import build, check_descriptions, describe
from .checkpoints.exact_resume import end_first_epoch, finish_batch, say_what_is_lost, seed_batch, unfinished_batch
from .checkpoints.finite import parameter_not_finite
from .checkpoints.monitors import check_monitors
from .compiling import CompileMode, check_mode, compiled
from .distributed import mean_and_count, rank_and_processes, several_processes
from .likelihoods import Likelihood, default_likelihood
from .networks import MLPDecoder, MLPEncoder, Shape
from .noise import sample_by_index
from .objective import (
    ELBOTerms,
    FreeBitsAverage,
    FreeBitsPer,
    free_bits,
    group_rates,
    kl_per_dimension,
    limited_rate_loss,
    weighted_loss,
)
from .observations import Observations, check_scale, data_of, index_and_label_of
from .running_sums import RunningSums

_KNOBS = {"beta": 1.0, "free_bits": 0.0}
_TERMS = ("distortion", "rate", "floored_rate", "loss")


class VAE(LightningModule):
    r"""Train a variational autoencoder on the ELBO, with a weight on its rate and a floor under it.

    .. math::
        \text{loss} = \text{distortion} + \beta \cdot \text{floored rate}

    in nats per observation, summed over the event and the latent dimensions, mean over the batch. The two knobs
    ``beta`` and ``free_bits`` are 0-dim float32 buffers: assigning a number fills them in place, and outside of a fit
    configures the module as the constructor does. A callback that moves a knob does so in training batches alone:
    validation, checkpoints and the finished module hold its target.

    Logged, always unweighted and in nats per observation: ``train/``, ``val/`` and ``test/`` with ``elbo``, ``rate``,
    ``distortion``, ``floored_rate`` and ``loss``. ``train/loss`` is what is minimised at the moment; ``val/loss`` and
    ``test/loss`` are the loss at the knobs' targets, so that they can select models under any schedule; under a
    controller that holds the rate they are the distortion and a price for exceeding the target, :attr:`rate_limit`.

    A batch is a tensor, a sequence that starts with one, or a mapping with the key ``"x"`` and maybe ``"index"``, the
    observation's number in its data set.

    Args:
        shape: Shape of one observation: ``(channels, height, width)`` for images, ``(d,)`` for vectors. In a config the
            data module gives it.
        levels: Number of integer levels of the raw data, 256 for 8-bit images: the networks then see ``x / (levels -
            1)``. ``None`` for data that are in the networks' scale already. In a config the data module gives it.
        latent_dim: Number of latent dimensions k.
        encoder: Constructor of the network of q(z|x), called with ``(shape, latent_dim)``: a class such as
            ``ConvEncoder``, a ``functools.partial`` of one, or a finished ``nn.Module``. It returns the mean and the
            log-variance, each ``(B, k)`` (a pair, or one tensor of ``2k`` columns), or a factorised
            ``torch.distributions.Distribution`` of batch shape ``(B, k)``.
        decoder: Constructor of the network of p(x|z), called with ``(latent_dim, shape)``.
        likelihood: Constructor of the likelihood, called with ``(shape, levels)``. By default it goes by the data: grey
            images Bernoulli, colour images discretised logistic, vectors Gaussian with learned variance.
        beta: Weight of the rate; 1, the default, trains on the negative ELBO.
        free_bits: Floor of the rate in nats, 0 for none, the default; see :func:`lightning_vae.free_bits`.
        free_bits_per: What each floor is under: ``"dimension"``, ``"whole"``, or a number of consecutive dimensions.
        free_bits_average: Whether the floor acts on the mean over the ``"batch"`` or on each ``"sample"``. The batch is
            that of all processes; of accumulated batches each has a floor of its own.
        compile: Whether ``torch.compile`` makes one graph of the loss while training, or in which of its modes: with
            ``"reduce-overhead"`` a GPU replays CUDA graphs. Evaluation is not compiled. The noise is drawn by other
            means than without, so the numbers are others.

    Attributes:
        posterior: q(z|x) of the batch processed last, which callbacks read.
        prior: p(z), standard normal, batch shape ``(k,)``.
        knobs: The number that each knob is configured with, by the constructor or an assignment; ``None`` for one that
            was left at its default, which a callback's schedule may end elsewhere than at.
        rate_limit: The rate in nats up to which ``val/loss`` is the distortion, and the price of each nat above it; set
            by ``TargetRate``, saved in checkpoints. ``None`` where no controller has set it.

    Raises:
        ValueError: On an option out of its range.

    References:
        Kingma and Welling, "Auto-Encoding Variational Bayes", ICLR 2014; Higgins et al., "beta-VAE", ICLR 2017.
    """

    beta: Tensor
    free_bits: Tensor
    _prior_parameters: Tensor
    likelihood: Likelihood
    # The knobs are the same in every process because the callbacks that turn them are: nothing to broadcast.
    _ddp_params_and_buffers_to_ignore = tuple(_KNOBS)

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
    ) -> None:
        super().__init__()
        given, shape = shape, tuple(shape) if isinstance(shape, list | tuple) else ()
        if not shape or any(not isinstance(size, int) or size < 1 for size in shape):
            raise ValueError(f"`shape` must be the shape of one observation, such as (1, 28, 28) or (6,), got {given}.")
        if levels is not None and levels < 2:
            raise ValueError(f"`levels` must be at least 2, or None for real-valued data, got {levels}.")
        if latent_dim < 1:
            raise ValueError(f"`latent_dim` must be at least 1, got {latent_dim}.")
        given_knobs = {"beta": beta, "free_bits": free_bits}
        knobs = {name: None if value is None else _checked_knob(name, value) for name, value in given_knobs.items()}
        group_rates(torch.zeros(1, latent_dim), free_bits_per)  # raises on a value that does not fit
        if free_bits_average not in ("batch", "sample"):
            raise ValueError(f"`free_bits_average` must be 'batch' or 'sample', got {free_bits_average!r}.")
        check_mode(compile)

        self._save_hyperparameters(encoder=encoder, decoder=decoder, likelihood=likelihood)
        self.shape, self.levels, self.latent_dim = shape, levels, latent_dim
        self.encoder = build("encoder", MLPEncoder if encoder is None else encoder, shape, latent_dim)
        self.decoder = build("decoder", MLPDecoder if decoder is None else decoder, latent_dim, shape)
        built = build("likelihood", default_likelihood if likelihood is None else likelihood, shape, levels)
        if not isinstance(built, Likelihood):
            raise TypeError(f"`likelihood` must derive from lightning_vae.Likelihood, got {type(built).__name__}.")
        self.likelihood = built
        self.free_bits_per, self.free_bits_average = free_bits_per, free_bits_average
        self._compile_mode = compile
        self._compiled: Callable[[Tensor], tuple[Tensor, Tensor, int | Tensor]] | None = None

        self.knobs = knobs
        self.rate_limit: tuple[float, float] | None = None
        for name, value in knobs.items():
            knob = torch.tensor(_KNOBS[name] if value is None else value, dtype=torch.float32)
            self.register_buffer(name, knob, persistent=False)
        self.register_buffer("_prior_parameters", torch.tensor([0.0, 1.0]), persistent=False)
        self.posterior: td.Distribution | None = None
        self._network_dtype = _dtype(self.encoder)  # looking each time takes as long as a small layer
        self._train_sums = RunningSums(len(_TERMS))
        self._evaluation_sums: dict[int, RunningSums] = {}
        self._position = 0
        self._seed = self._step = 0
        self._configured_optimizers: list[list[dict[str, Any]]] = []
        self._unfinished: dict[str, Any] | None = None
        self._warn_of_feedback()

    # ---- the model

    @property
    def prior(self) -> td.Normal:
        """p(z), standard normal with batch shape ``(k,)``."""
        loc, scale = self._prior_parameters.unbind()
        return td.Normal(loc.expand(self.latent_dim), scale.expand(self.latent_dim), validate_args=False)

    def observe(self, batch: Any, first: int = 0) -> Observations:
        """Return what the model observes of a batch at evaluation, on the model's device.

        Args:
            batch: A tensor, a sequence that starts with one, or a mapping with the key ``"x"`` and maybe ``"index"``
                and ``"label"``, in the data's own scale.
            first: How many observations this process has seen in the batches before. It numbers those of a batch
                without ``"index"``, as ``DistributedSampler`` deals them to several processes. The batch at 0 is
                checked for its scale.

        Raises:
            ValueError: If the batch holds no observations of the model's shape, or they are in another scale.
        """
        x = data_of(batch, self.shape)
        if first == 0:
            check_scale(x, self.levels, self.likelihood)
        index, label = index_and_label_of(batch, len(x))
        if index is None:
            rank, processes = rank_and_processes()
            index = torch.arange(first, first + len(x), device=self.device) * processes + rank
        x, index = x.to(self.device), index.to(self.device).long()
        scaled = self._to_network_scale(x)
        label = label.to(self.device) if isinstance(label, Tensor) else label
        return Observations(x, scaled, self.likelihood.observe(scaled, index), index, label)

    def encode(self, x: Tensor | Observations) -> td.Distribution:
        """Return the posterior q(z|x), with batch shape ``(B, k)``.

        Args:
            x: What :meth:`observe` returns; or data in their own scale, shape ``(B, *shape)``, which are not binarised:
                the encoder then sees the mean of their binarisations.
        """
        return self._encode(x.observed if isinstance(x, Observations) else self._to_network_scale(x))

    def decode(self, z: Tensor) -> td.Distribution:
        """Return the likelihood p(x|z), with batch shape ``(B,)`` and event shape ``shape``, in the networks' scale.

        Args:
            z: Latents, shape ``(B, k)``.
        """
        return self._decode(z)

    def reconstruct(self, x: Tensor | Observations) -> Tensor:
        """Return the mean of p(x|z) at the posterior's mean, in the data's own scale, shape ``(B, *shape)``.

        Of the discretised logistic it is the location, held inside the range of the data.

        Args:
            x: As in :meth:`encode`.
        """
        return self._to_data_scale(self.decode(self.encode(x).mean).mean)

    def sample(self, n: int) -> Tensor:
        """Draw ``n`` latents from the prior and return the means of p(x|z), as :meth:`reconstruct` does.

        For noisy draws of x: ``vae.decode(vae.prior.sample((n,))).sample()``.

        Args:
            n: How many.

        Returns:
            Images or vectors in the data's own scale, shape ``(n, *shape)``.
        """
        return self._to_data_scale(self.decode(self.prior.sample(torch.Size((n,)))).mean)

    def elbo_terms(self, x: Tensor | Observations, index: Tensor | None = None) -> ELBOTerms:
        """Compute the ELBO's terms with one posterior sample per observation.

        Args:
            x: What :meth:`observe` returns; or data in their own scale, shape ``(B, *shape)``.
            index: Each observation's number in its data set, int64, shape ``(B,)``: it fixes the binarisation and the
                sample, as at evaluation. ``None`` draws both afresh, as in training. Observations bring their own.

        Returns:
            The terms in nats, one row per observation, float32 (float64 where the networks are).

        Raises:
            ValueError: If a network's output has another shape than it should.
        """
        if isinstance(x, Observations):
            observed, index = x.observed, x.index
        else:
            observed = self.likelihood.observe(self._to_network_scale(x), index)
        self.posterior = posterior = self._encode(observed)
        z = posterior.rsample() if index is None else sample_by_index(posterior, index)
        likelihood = self._decode(z, observed if self.training and index is None else None)
        return ELBOTerms(-likelihood.log_prob(observed), kl_per_dimension(posterior, self.prior, z))

    # ---- training

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Make the batch's noise its own, whatever has drawn random numbers before: a resumed run draws the same."""
        del batch
        trainer: Any = self._trainer
        step = trainer.fit_loop.epoch_loop._batches_that_stepped
        seed_batch(self.device, self._seed, step, batch_idx, trainer.global_rank)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss at the knobs as they are now."""
        if self._trainer is not None:  # else it is somebody's own loop
            self._step = self._trainer.fit_loop.epoch_loop._batches_that_stepped
        x = data_of(batch, self.shape)
        if batch_idx == 0 and self._step == 0:
            check_scale(x, self.levels, self.likelihood)
        loss, values, count = self._compiled_loss(x) if self._compile_mode else self._loss(x)
        self._train_sums.add(values * count, count)
        self._log_training()
        return loss

    def _loss(self, x: Tensor) -> tuple[Tensor, Tensor, int | Tensor]:
        """Compute the loss, the terms to log, and the number of observations that they are the mean of."""
        terms = self.elbo_terms(x)
        floored = free_bits(terms.rate_per_dimension, self.free_bits, self.free_bits_per, self.free_bits_average)
        distortion, rates = terms.distortion.mean(), terms.rate_per_dimension
        count: int | Tensor = len(x)
        if several_processes():
            distortion, rates, floored, count = self._over_processes(terms, floored)
        loss = weighted_loss(distortion, floored, self.beta)
        with torch.no_grad():
            return loss, torch.stack([distortion, rates.sum() / len(rates), floored, loss]), count

    def _compiled_loss(self, x: Tensor) -> tuple[Tensor, Tensor, int | Tensor]:
        if self.likelihood.starts:
            devices = [self.device] if self.device.type == "cuda" else []
            with torch.no_grad(), torch.random.fork_rng(devices):  # what is done once is no part of the graph
                self._loss(x)
        self.posterior = None  # validation leaves one, and another kind of value here would be another graph
        if self._compiled is None:
            self._compiled = compiled(self._loss, self._compile_mode)
        return self._compiled(x)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what is compiled: a copy compiles its own."""
        return {**super().__getstate__(), "_compiled": None}

    def _over_processes(self, terms: ELBOTerms, floored: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Average the terms over the global batch, the rates to a single row; decide the floor on it; count it."""
        columns = (terms.distortion[:, None], floored.expand(len(terms.distortion), 1), terms.rate_per_dimension)
        means, count = mean_and_count(torch.cat(columns, dim=1))
        distortion, floored, rates = means[0], means[1], means[None, 2:]
        if self.free_bits_average == "batch":
            floored = free_bits(rates, self.free_bits, self.free_bits_per)
        return distortion, rates, floored, count

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Let go of the posterior: callbacks have read it, and its graph need not live on."""
        del outputs, batch, batch_idx
        self.posterior = None

    def on_train_epoch_end(self) -> None:
        """Offer the epoch's means to callbacks that monitor them; the loggers have the curve already."""
        has_ended = self.trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        self.trainer.callback_metrics.update(_named("train", _mean(self._train_sums.epoch(has_ended))))
        if self._unfinished is not None:
            end_first_epoch(self.trainer)
            self._unfinished = None

    def _log_training(self) -> None:
        """Log the knobs, and the mean of the training terms since they were last logged, on logging steps alone."""
        trainer: Any = self._trainer
        if trainer is None:
            return  # somebody's own loop
        every = trainer.log_every_n_steps
        logs_now = trainer.fast_dev_run or (every and (self._step + 1) % every == 0)
        if logs_now and not trainer.fit_loop._should_accumulate():
            self._refuse_not_finite()
            # Copied from the device once: Lightning reads what is for the bar in every step from now on.
            means = _named("train", _mean(self._train_sums.flush()).cpu())
            shown = {name: means.pop(name) for name in ("train/elbo", "train/rate")}
            self.log_dict({**shown, "knobs/beta": self.beta.cpu()}, prog_bar=True, batch_size=1)
            self.log_dict({**means, "knobs/free_bits": self.free_bits.cpu()}, batch_size=1)

    def _refuse_not_finite(self) -> None:
        if found := self._train_sums.first_not_finite():
            term, batches = found
            first = self._step - batches // self.trainer.accumulate_grad_batches
            raise FloatingPointError(
                f"`train/{_TERMS[term]}` is not a finite number since step {first}, so training ends at step "
                f"{self._step}; nothing was saved since. A run that goes on from the last checkpoint comes here again "
                "unless something is changed: `gradient_clip_val` for one; or begin anew with a lower learning rate."
            )

    def configure_optimizers(self) -> Any:
        """Use Adam with a learning rate of 1e-3; a config's ``optimizer`` and ``lr_scheduler`` take its place.

        Its fused form, one operation for all parameters, is the faster one on a CPU too.
        """
        return torch.optim.Adam(self.parameters(), lr=1e-3, fused=True)

    @wraps(LightningModule.optimizer_zero_grad, assigned=())  # it does the same: Lightning need not warn of another
    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:  # type: ignore[override]
        """Let go of the gradients, without what torch's own does around that, which takes several times as long."""
        if getattr(optimizer.zero_grad, "__func__", None) is not torch.optim.Optimizer.zero_grad:
            super().optimizer_zero_grad(epoch, batch_idx, optimizer)
            return
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    # ---- evaluation

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add the batch to the pass."""
        self._evaluation_step(batch, batch_idx, dataloader_idx)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add the batch to the pass."""
        self._evaluation_step(batch, batch_idx, dataloader_idx)

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """Return the posterior means and what identifies the observations.

        Returns:
            ``"mean"``, shape ``(B, k)``; ``"index"``, ``(B,)``, from the batch or counted; and ``"label"`` where the
            batch has it.
        """
        del dataloader_idx
        observations = self._observe_next(batch, batch_idx)
        empty = observations.observed.new_empty(0, self.latent_dim)
        mean = self.encode(observations).mean if len(observations) else empty
        result = {"mean": mean, "index": observations.index}
        return result if observations.label is None else {**result, "label": observations.label}

    def on_validation_epoch_start(self) -> None:
        """Start a pass."""
        self._start_pass()

    def on_test_epoch_start(self) -> None:
        """Start a pass."""
        self._start_pass()

    def on_validation_epoch_end(self) -> None:
        """Log the pass."""
        self._log_evaluation("val")

    def on_test_epoch_end(self) -> None:
        """Log the pass."""
        self._log_evaluation("test")

    def _observe_next(self, batch: Any, batch_idx: int) -> Observations:
        """Observe a batch of a pass, whose observations are numbered in the order they come."""
        first = self._position if batch_idx else 0
        observations = self.observe(batch, first)
        self._position = first + len(observations)
        return observations

    def _start_pass(self) -> None:
        loaders = len(self.trainer.num_test_batches if self.trainer.testing else self.trainer.num_val_batches)
        self._evaluation_sums = {number: RunningSums(self.latent_dim + 2) for number in range(loaders)}

    def _evaluation_step(self, batch: Any, batch_idx: int, dataloader_idx: int) -> None:
        observations = self._observe_next(batch, batch_idx)
        if not len(observations):  # this process's share of a last batch may be empty
            self.posterior = None
            return
        terms = self.elbo_terms(observations)
        # The floor on each sample is a sum over observations; the floor on a mean waits for the whole pass.
        floored = self._floored_rate(terms.rate_per_dimension) * len(observations)
        sums = torch.cat([terms.rate_per_dimension.sum(0), terms.distortion.sum()[None], floored[None]])
        self._evaluation_sums[dataloader_idx].add(sums, len(observations))

    def _log_evaluation(self, prefix: str) -> None:
        for number, sums in self._evaluation_sums.items():
            means = self._mean_over_processes(sums.flush())
            rate_per_dimension, distortion, floored = means[:-2], means[-2], means[-1]
            if self.free_bits_average == "batch":
                floored = self._floored_rate(rate_per_dimension[None])
            rate = rate_per_dimension.sum()
            if self.rate_limit is None:
                loss = weighted_loss(distortion, floored, self.beta)
            else:
                loss = limited_rate_loss(distortion, rate, *self.rate_limit)
            values = _named(prefix, torch.stack([distortion, rate, floored, loss]))
            if len(self._evaluation_sums) > 1:  # named as Lightning does
                values = {f"{name}/dataloader_idx_{number}": value for name, value in values.items()}
            sync = self.trainer.world_size > 1
            self.log_dict(values, batch_size=1, sync_dist=sync, add_dataloader_idx=False)

    def _floored_rate(self, rates: Tensor) -> Tensor:
        return free_bits(rates, self.free_bits, self.free_bits_per, self.free_bits_average)

    def _mean_over_processes(self, sums: Tensor) -> Tensor:
        """Divide sums, whose last entry is the count, by it, over all processes."""
        if self.trainer.world_size > 1:
            # Of one type in every process, also in one whose share was empty.
            sums = self.trainer.strategy.reduce(sums.to(self.device, self._working_dtype), reduce_op="sum")
        return _mean(sums)

    # ---- one run and the next

    def setup(self, stage: str) -> None:
        """Start anew, before a checkpoint brings the training sums and the limit of the run that goes on."""
        if stage == "fit":
            self._train_sums.reset()
            self.rate_limit = None
            for name, value in self.knobs.items():
                if value is not None:  # else it goes on from where it is
                    self._fill(name, value)
            self._seed = self.trainer.strategy.broadcast(int(torch.randint(2**31, ())))
            self._unfinished = None

    def on_fit_start(self) -> None:
        """Refuse monitors that would select a wrong model, and say what has changed since the run was saved."""
        trainer: Any = self.trainer
        self._configured_optimizers = configured(trainer.optimizers)  # before a checkpoint brings its own
        # Knobs apart, of which loading the checkpoint has told.
        say_what_changed(trainer, {name: value for name, value in self.hparams.items() if name not in self.knobs})
        if trainer.gradient_clip_val:
            for optimizer in trainer.optimizers:
                # Lightning doesn't clip under mixed precision where an optimizer unscales by itself, as fused ones do
                # unless told not to.
                optimizer._step_supports_amp_scaling = False
        check_monitors(trainer)
        if self.knobs["beta"] is None:  # else the constructor has
            self._warn_of_feedback()

    def on_train_start(self) -> None:
        """Do what the run that is resumed left undone."""
        if self._unfinished is not None:
            finish_batch(self.trainer, self._unfinished)
            say_what_is_lost(self.trainer)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save what a callback may have chosen, and what resuming exactly takes; nothing that is not finite.

        Raises:
            FloatingPointError: If a term of the loss or a parameter is not a finite number.
        """
        self._refuse_not_finite()
        found = parameter_not_finite(self)
        if self.trainer.strategy.reduce_boolean_decision(found is not None, all=False):
            raise FloatingPointError(
                f"The parameter `{found or 'of another process'}` holds values that are not finite numbers, so nothing "
                "is saved; the checkpoints saved before are as they were."
            )
        variant = {name: getattr(self, name) for name in ("free_bits_per", "free_bits_average")}
        checkpoint["lightning_vae"] = {
            "knobs": dict(self.knobs),
            "knob_values": {name: float(getattr(self, name)) for name in self.knobs},
            "chosen": {name: value for name, value in variant.items() if value != self.hparams[name]},
            "train_sums": self._train_sums.state(),
            "rate_limit": self.rate_limit,
            "seed": self._seed,
            "length": length(self.trainer),
            "optimizers": self._configured_optimizers,
            "unfinished": unfinished_batch(self.trainer, checkpoint),
        }

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Self:
        """Load a model as Lightning does, after a look at what its checkpoint names.

        Args:
            checkpoint_path: A path, a URL or a file.
            *args: What Lightning's takes.
            **kwargs: What Lightning's takes, and replacements of constructor arguments.

        Raises:
            ValueError: If the checkpoint names something to be built that is no network.
        """
        if kwargs.get("weights_only") is not False:
            place = checkpoint_path.tell() if hasattr(checkpoint_path, "seek") else None
            saved = _load(checkpoint_path, map_location="cpu", weights_only=True).get("hyper_parameters", {})
            if place is not None:
                checkpoint_path.seek(place)
            for name, value in saved.items():
                if name not in kwargs:
                    check_descriptions(name, value)
        model = super().load_from_checkpoint(checkpoint_path, *args, **kwargs)
        for name in model.knobs:
            if kwargs.get(name) is not None:  # it wins over what a controller has found, too
                setattr(model, name, kwargs[name])
        return model

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore what callbacks set: knobs left at their defaults or moved by a controller, the floor's variant."""
        saved = checkpoint.get("lightning_vae", {})
        self.rate_limit = saved.get("rate_limit")
        self._seed, self._unfinished = saved.get("seed", self._seed), saved.get("unfinished")
        for name, value in saved.get("knob_values", {}).items():
            self._load_knob(name, value, saved["knobs"][name])
        for name, value in saved.get("chosen", {}).items():
            setattr(self, name, value)
        if self._is_fitting and "train_sums" in saved:
            self._train_sums.load(saved["train_sums"])

    def _load_knob(self, name: str, value: float, saved: float | None) -> None:
        """Take a knob from a checkpoint, unless the module is configured with another number.

        Args:
            name: The knob.
            value: What it was when the checkpoint was saved.
            saved: What the module that was saved was configured with.
        """
        own = self.knobs[name]
        if self._is_fitting:
            steered = name == "beta" and self.rate_limit is not None  # what a controller has found goes on
            keeps = own is not None and not steered
            if keeps and float(getattr(self, name)) != value:
                rank_zero_warn(
                    f"The checkpoint was saved with `{name}={value:g}`; the module is configured with `{name}={own:g}`,"
                    " which the run goes on with."
                )
        else:
            keeps = self._trainer is None and own not in (None, saved)  # an argument that replaces the checkpoint's
        if not keeps:
            self._fill(name, value)

    def __setattr__(self, name: str, value: Any) -> None:
        """Fill a knob that is given a value; outside of a fit, that is to configure it."""
        own = self.__dict__
        if name in own and (value is None or type(value) in (str, int)):
            # Neither a tensor nor a module, nor in the place of one. Lightning notes the hook it is in here, almost
            # fifty times a step, and nn.Module takes four times as long.
            own[name] = value
        elif name in _KNOBS and name in own.get("_buffers", {}):
            if not self._is_fitting:
                self.knobs[name] = _checked_knob(name, float(value))
                self.save_hyperparameters({name: self.knobs[name]})
            self._fill(name, value)
        else:
            super().__setattr__(name, value)

    @property
    def _is_fitting(self) -> bool:
        trainer = self._trainer
        return trainer is not None and trainer.state.fn == TrainerFn.FITTING and not trainer.state.stopped

    def buffers(self, recurse: bool = True) -> Iterator[Tensor]:
        """Leave out the knobs: weight averaging goes through these, and a knob is no weight to be averaged."""
        knobs = {id(self._buffers.get(name)) for name in _KNOBS}
        return (each for each in super().buffers(recurse) if id(each) not in knobs)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Give a copy knobs of its own: spawned processes share the memory of what Lightning does not copy."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        for name in _KNOBS:
            self._buffers[name] = getattr(self, name).clone()

    @torch.no_grad()
    def _fill(self, name: str, value: float | Tensor) -> None:
        self._buffers[name].fill_(value)  # type: ignore[union-attr]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        knobs = {name: self._buffers[name] for name in _KNOBS if name in self._buffers}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, knob in knobs.items():
            moved = self._buffers[name]
            if knob is not None and moved is not None and moved.dtype != torch.float32:
                self._buffers[name] = knob.to(moved.device)
        self._network_dtype = _dtype(self.encoder)
        self._prior_parameters = self._prior_parameters.to(self._working_dtype)
        return self

    # ---- helpers

    def _encode(self, x: Tensor) -> td.Distribution:
        output = self.encoder(x.to(self._network_dtype))
        if isinstance(output, td.Distribution):
            posterior = _widened(output)
        else:
            mean, log_variance = output if isinstance(output, tuple | list) else output.chunk(2, dim=-1)
            posterior = td.Normal(_widen(mean), (0.5 * _widen(log_variance)).exp(), validate_args=False)
        if posterior.batch_shape != (len(x), self.latent_dim) or posterior.event_shape:
            raise ValueError(
                f"`encoder` must give a mean and a log-variance of shape {(len(x), self.latent_dim)} each, or a "
                f"distribution of that batch shape and no event shape, got {tuple(posterior.batch_shape)} and event "
                f"shape {tuple(posterior.event_shape)}."
            )
        return posterior

    def _decode(self, z: Tensor, x: Tensor | None = None) -> td.Distribution:
        output = _widen(self.decoder(z.to(self._network_dtype)))
        if output.shape != (len(z), *self.shape):
            raise ValueError(f"`decoder` must give shape {(len(z), *self.shape)}, got {tuple(output.shape)}.")
        distribution: td.Distribution = self.likelihood(output, x)
        return distribution

    @property
    def _working_dtype(self) -> torch.dtype:
        """Of what is computed outside the networks: float32 where they are in half precision."""
        return torch.float64 if self._network_dtype == torch.float64 else torch.float32

    def _to_network_scale(self, x: Tensor) -> Tensor:
        x = x.to(self._working_dtype)
        return x if self.levels is None else x / (self.levels - 1)

    def _to_data_scale(self, x: Tensor) -> Tensor:
        return x if self.levels is None else x * (self.levels - 1)

    def _observations(self, batch: Any, check: bool) -> Tensor:  # until `evaluation` goes through `observe`
        x = data_of(batch, self.shape)
        if check:
            check_scale(x, self.levels, self.likelihood)
        return x

    def _save_hyperparameters(self, **parts: Any) -> None:
        """Save the constructor's arguments, with the networks in a form that loads with ``weights_only=True``."""
        self.save_hyperparameters(ignore=[name for name, part in parts.items() if isinstance(part, nn.Module)])
        described = {name: describe(self.hparams.get(name, part)) for name, part in parts.items()}
        self.save_hyperparameters({**self.hparams, **described})

    def _warn_of_feedback(self) -> None:
        beta = float(self.beta)
        if beta != 1 and self.likelihood.learns_scale:
            rank_zero_warn(
                f"`beta` is {beta:g} with a likelihood whose scale adapts: the two feed back. A larger beta worsens "
                "the reconstruction, which widens the scale, which weakens the reconstruction again, until all "
                "has collapsed. Fix the variance (train once at beta 1 and take its variance), or keep beta at 1."
            )


def _checked_knob(name: str, value: float) -> float:
    if not 0 <= value <= torch.finfo(torch.float32).max:
        raise ValueError(f"`{name}` must be a finite number of at least 0, got {value}.")
    return float(value)


def _dtype(network: nn.Module) -> torch.dtype:
    return next((parameter.dtype for parameter in network.parameters()), torch.float32)


def _mean(sums: Tensor) -> Tensor:
    """Divide sums by the count that follows them."""
    return sums[:-1] / sums[-1]


def _named(prefix: str, means: Tensor) -> dict[str, Tensor]:
    values = {f"{prefix}/{name}": mean for name, mean in zip(_TERMS, means, strict=True)}
    values[f"{prefix}/elbo"] = -(values[f"{prefix}/distortion"] + values[f"{prefix}/rate"])
    return values


def _widen(tensor: Tensor) -> Tensor:
    """Leave half precision, for what a likelihood or a rate is computed from."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def _widened(distribution: td.Distribution) -> td.Distribution:
    """Make a distribution again with parameters that are not in half precision."""
    parameters: dict[str, Any] = {
        name: value for name, value in vars(distribution).items() if name in distribution.arg_constraints
    }
    if all(_widen(value) is value for value in parameters.values()):
        return distribution
    make: Any = type(distribution)
    widened: td.Distribution = make(**{name: _widen(value) for name, value in parameters.items()}, validate_args=False)
    return widened
