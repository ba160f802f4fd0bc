"""Pictures of a VAE's decoder outputs during training."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor
from torch.distributions import Distribution, Normal
from typing_extensions import override

from .base import Callback, validates
from .drawing.best_effort import BestEffort
from .drawing.draw_schedule import DrawSchedule
from .drawing.gallery import Gallery
from .drawing.images import as_images
from .drawing.media_logger import MediaLogger
from .drawing.traversals import interpolations, prior_samples, traversals
from .metrics.observation_subset import evenly_spaced_rows
from .metrics.posterior_summary import PosteriorSummary
from .reading.batch_fields import OBSERVATIONS, batch_part
from .reading.distributions import as_distribution, check_form, describe, is_sequence
from .reading.isolated_eval import isolated_eval
from .reading.module_call import ModuleCall
from .reading.prior_reader import Place, PriorReader
from .schedules import check_number

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

_COLUMNS = 10  # also the number of observations shown
_SAMPLES = _COLUMNS * 5
_INTERPOLATIONS = 5
_MAX_TRAVERSALS = 12
_COUNTERFACTUALS = 5
_RANKED_BY = 256  # observations that rank the latent dimensions
# One process alone can't run a model whose parameters these strategies shard.
_SHARDING = ("FSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy")


class Pictures(Callback):
    """Show a VAE's reconstructions, samples and latent traversals, always of the same inputs.

    At some validation passes, the first and the last among them, TensorBoard and other loggers of pictures get

    - ``images/reconstructions``: ten observations, with their reconstructions below,
    - ``images/samples``: decoded draws from the prior, with the same noise each time,
    - ``images/interpolations``: decoded points on the line between the posterior means of two observations,
    - ``images/traversals``: a row for each active latent dimension, in order of rate, at most 12: the first observation
      decoded with that dimension moved from -2.5 to 2.5 standard deviations of the prior.

    A module whose ``condition`` has a method ``of_batch(batch, size)``, such as a conditional ``lightning_vae.VAE``, is
    called with what it returns: ``encode(x, c)``, ``decode(z, c)``. Each column of samples then has the condition of
    one observation, interpolations and traversals that of the first in their row, and

    - ``images/counterfactuals`` shows five observations, each decoded under the conditions of all ten.

    Under a prior p(z|c), which the validation step computes, each column of samples has the prior of one observation,
    and the traversals are in units of the first observation's. From a prior with only a log-density there are no
    samples, which is said once.

    The ten observations are spread evenly over the validation data. They are chosen in the first pass and saved with
    the checkpoint; under a condition they are chosen in each pass, the same ones unless the loader shuffles.
    Observations that are not images are drawn as curves. All pictures show means: of the posterior, and of p(x|z) where
    ``decode`` returns a distribution.

    Training is not affected: the global random state, the modules' modes and buffers are restored. Only the first
    process draws. Nothing is drawn in a run without validation, nor under a strategy that shards the parameters,
    because one process can't run the model. The sanity check tries all of it. The first error, there or later, gives a
    warning; then nothing more is drawn, and training continues.

    Args:
        encode: Returns q(z|x) or its mean. ``None`` is the module's own ``encode``. Otherwise the path of another
            method or submodule (``"model.encoder"``), or of a part of its output (``"model.encode:0"``), or a callable
            ``(pl_module, x)``. A pair of tensors is the mean and the parameter named by ``second``; a single tensor is
            the mean.
        decode: Returns observations, or a distribution over them, for latents; given in the same forms.
        reconstruct: Returns reconstructions of observations, given in the same forms, if they are not ``decode`` of the
            posterior mean.
        second: Meaning of the second parameter: ``"log_variance"``, ``"variance"``, ``"scale"`` or ``"log_scale"``.
        chunk: The axis along which to split the output of ``encode``, if one tensor holds both parameters.
        x: Location of the observations in a batch: a key, an index or a callable. By default the usual places.
        value_range: The values drawn as black and white, such as ``(0, 1)``, or at the bottom and the top of curves. By
            default (0, 1) or (-1, 1) for images within these limits, else the range of the inputs; curves get a quarter
            of it as margin at both ends. Integers are first divided by the module's ``levels`` - 1, or by 255.
        times: Number of times to draw in a run. TensorBoard shows ten pictures per tag.
        prior: Where the prior is, as in :class:`CollapseDetector`: a path, a pair of paths, a callable ``(pl_module,
            batch)`` or a fixed distribution; ``None`` is the module's own ``prior``, or N(0, I) if it has none.

    Raises:
        ValueError: If an option is out of range; when fitting starts, if a path leads nowhere.

    Example::

        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[Pictures(encode="model.encoder", decode="model.decoder")])
    """

    def __init__(
        self,
        encode: str | Callable[[LightningModule, Tensor], Any] | None = None,
        decode: str | Callable[[LightningModule, Tensor], Any] | None = None,
        reconstruct: str | Callable[[LightningModule, Tensor], Any] | None = None,
        second: Literal["log_variance", "variance", "scale", "log_scale"] = "log_variance",
        chunk: int | None = None,
        x: int | str | Callable[[Any], Tensor] | None = None,
        value_range: tuple[float, float] | None = None,
        times: int = 10,
        prior: Place = None,
    ) -> None:
        if value_range is not None:
            allowed = "a smaller and a larger number"
            check_number("value_range", value_range, allowed, lambda pair: pair[0] < pair[1])
        check_form(second, chunk)
        self.second = second
        self.chunk = chunk
        self.x = x
        self.value_range = value_range
        self._encode = ModuleCall("encode", "encode" if encode is None else encode)
        self._decode = ModuleCall("decode", "decode" if decode is None else decode)
        self._reconstruct = None if reconstruct is None else ModuleCall("reconstruct", reconstruct)
        self._prior = PriorReader(prior, second, chunk)
        self._draw_schedule = DrawSchedule(times)
        self._attempt = BestEffort("Pictures")
        self._draws = False
        self._has_said = False
        self._inputs: Tensor | None = None  # shown in every pass
        self._chosen: list[_Rows] = []  # collected in a pass, to be shown
        self._ranking: list[_Rows] = []  # batches that rank the latent dimensions

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":  # before a checkpoint restores the state of a run to resume
            self._draw_schedule.passes, self._inputs, self._has_said = 0, None, False
            self._attempt = BestEffort("Pictures")

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for call in (self._encode, self._decode, self._reconstruct):
            if call is not None:
                call.check(pl_module)
        for reader in self._prior.readers:
            reader.listen(pl_module)  # raises if a path leads nowhere
        self.at_end(trainer, self._detach)
        self._detach()

    @override
    def on_train_start(self, trainer: Trainer, *_: Any) -> None:
        with self._attempt("the loggers"):
            if _is_sharded(trainer):
                rank_zero_info("Pictures: one process can't run a model whose parameters are sharded; none are drawn.")
            elif not validates(trainer):
                rank_zero_info("Pictures: this run has no validation, where they are drawn; none are drawn.")
            elif trainer.is_global_zero and not MediaLogger(trainer):
                rank_zero_info("Pictures: no logger of this run takes pictures; none are drawn.")

    @override
    def on_validation_epoch_start(self, trainer: Trainer, *_: Any) -> None:
        self._end_pass()
        is_due = self._draw_schedule.start_pass(trainer) and not _is_sharded(trainer) and not self._attempt.has_failed
        with self._attempt("the loggers"):
            self._draws = is_due and bool(MediaLogger(trainer))

    @override
    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self._draws and dataloader_idx == 0:
            with self._attempt("the prior"):
                for reader in self._prior.readers:
                    reader.listen(pl_module)

    @override
    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        _outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._draws and dataloader_idx == 0:
            with self._attempt("the observations"):
                self._collect(pl_module, batch, batch_idx, trainer.num_val_batches[0])

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        with self._attempt("the model's output"):
            if self._draws and self._chosen and self._ranking:
                inputs, pictures = self._pictures(pl_module)
                if not trainer.sanity_checking:  # which has not seen all the data
                    self._inputs = inputs
                    for tag, picture in pictures.items():
                        MediaLogger(trainer).image(tag, picture, self.step(trainer))
        self._end_pass()

    @override
    def on_save_checkpoint(self, *_: Any) -> None:
        for reader in self._prior.readers:
            reader.unhook()  # a module saved as an object would contain the hooks

    @override
    def state_dict(self) -> dict[str, Any]:
        inputs = torch.empty(0) if self._inputs is None else self._inputs.cpu()
        return {"passes": self._draw_schedule.passes, "inputs": inputs}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._draw_schedule.passes = state_dict["passes"]
        self._inputs = state_dict["inputs"] if len(state_dict["inputs"]) else None

    def _end_pass(self) -> None:
        self._draws, self._chosen, self._ranking = False, [], []
        for reader in self._prior.readers:
            reader.forget()

    def _detach(self) -> None:
        self._end_pass()
        for reader in self._prior.readers:
            reader.detach()

    def _observations(self, batch: Any) -> Tensor:
        x = batch_part(batch, self.x, OBSERVATIONS, 0)
        if not isinstance(x, Tensor):
            raise ValueError(
                f"no observations were found in a batch, which is a {type(batch).__name__}. Give their location with "
                "`x=`, a key, an index or a callable."
            )
        return x

    def _collect(self, pl_module: LightningModule, batch: Any, batch_idx: int, batches: float) -> None:
        x = self._observations(batch)
        if self._ranking and x.shape[1:] != self._ranking[0].x.shape[1:]:
            return  # of sequences of different lengths, keep only those as long as the first batch's
        numbers = evenly_spaced_rows(_COLUMNS, len(x), batch_idx, batches)
        missing = _RANKED_BY - sum(len(rows.x) for rows in self._ranking)
        if not len(x) or not (numbers or missing > 0):
            return
        priors = self._prior.read(pl_module, batch)
        prior = Normal(0.0, 1.0) if priors is None else priors[0]  # of several views the first
        c = _condition(pl_module, batch, len(x))
        if numbers:
            own = None if c is None else c[numbers]
            self._chosen.append(_Rows(x[numbers].clone(), prior, len(x), numbers, own))
        if missing > 0:
            self._ranking.append(_Rows(x, prior, len(x), list(range(min(missing, len(x)))), c))

    def _pictures(self, pl_module: LightningModule) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the observations that are shown, and the pictures by tag, each of shape ``(3, H, W)``, uint8."""
        with isolated_eval(pl_module):
            first = self._chosen[0]
            is_conditional = first.has_prior_of_each(_mean(self._posterior(pl_module, first.x, first.c)).ndim)
            c = None if first.c is None else torch.cat([rows.c for rows in self._chosen])  # type: ignore[misc]
            if self._inputs is None or is_conditional or c is not None:
                inputs = torch.cat([rows.x for rows in self._chosen])
            else:
                inputs = self._inputs.to(pl_module.device)
            shown = _shown(inputs, pl_module)
            # Priors of each observation are not cut: then whole batches rank the dimensions.
            ranking = [rows if is_conditional else rows.first(len(rows.numbers)) for rows in self._ranking]
            codes = PosteriorSummary.joined(
                [PosteriorSummary.of(self._posterior(pl_module, rows.x, rows.c), rows.prior) for rows in ranking]
            )
            mean = _mean(self._posterior(pl_module, inputs, c))
            dimensions = (codes.active or codes.order[:1])[:_MAX_TRAVERSALS]
            unit = _of_one(first.prior, first.numbers[0] if is_conditional else None)
            latents = {
                "interpolations": interpolations(mean, _INTERPOLATIONS, _COLUMNS - 2),
                "traversals": traversals(mean[0], dimensions, unit, _COLUMNS),
                "reconstructions": mean[:, None],
            }
            if (samples := self._samples(mean, is_conditional)) is not None:
                latents["samples"] = samples
            given = None
            if c is not None:
                latents["counterfactuals"] = mean[:_COUNTERFACTUALS, None].expand(-1, len(c), *mean.shape[1:])
                given = _conditions(c, latents)
            chunk = max(len(rows.x) for rows in ranking)
            decoded = self._decoded(pl_module, latents, given, shown.shape[1:], chunk)
            if self._reconstruct is not None:
                outputs = _means("reconstruct", self._reconstruct(pl_module, inputs), shown.shape[1:])
                decoded["reconstructions"] = outputs[:, None]
        gallery = Gallery(*(self.value_range or _limits(shown)))
        titles = [codes.title(dimension).removesuffix(" nats") for dimension in dimensions]
        pictures = {
            "images/reconstructions": gallery.pairs(shown, decoded["reconstructions"].squeeze(1)),
            "images/traversals": gallery.rows(decoded["traversals"], titles),
        }
        if c is not None:
            originals = shown[:_COUNTERFACTUALS, None]
            pictures["images/counterfactuals"] = gallery.rows(torch.cat([originals, decoded["counterfactuals"]], dim=1))
        if samples is not None:
            pictures["images/samples"] = gallery.each(decoded["samples"].flatten(0, 1), samples.shape[1])
        if len(between := decoded["interpolations"]):
            left, right = shown[: len(between), None], shown[len(shown) // 2 :][: len(between), None]
            pictures["images/interpolations"] = gallery.rows(torch.cat([left, between, right], dim=1))
        return inputs, pictures

    def _samples(self, mean: Tensor, is_conditional: bool) -> Tensor | None:
        """Draw latents ``(rows, columns, ...)`` from the prior, or from the priors of the observations that are shown.

        ``None``, which is said once, if the prior can't be sampled.
        """
        try:
            if is_conditional:
                each = [rows.prior.sample((_SAMPLES // _COLUMNS,))[:, rows.numbers] for rows in self._chosen]
                drawn = torch.cat(each, dim=1)
            else:
                drawn = prior_samples(self._chosen[0].prior, (_SAMPLES, *mean.shape[1:]))
                drawn = drawn.unflatten(0, (-1, _COLUMNS))
        except (NotImplementedError, AttributeError):
            if not self._has_said:
                self._has_said = True
                rank_zero_info(
                    f"Pictures: the prior, {describe(self._chosen[0].prior)}, can't be sampled, so there are no "
                    "`images/samples`. If it is a torch.distributions.Distribution elsewhere, say where with `prior=`."
                )
            return None
        if drawn.shape[2:] != mean.shape[1:]:
            raise ValueError(
                f"A sample of the prior has shape {tuple(drawn.shape[2:])}, and the latents {tuple(mean.shape[1:])}."
            )
        return drawn.to(mean)

    def _posterior(self, pl_module: LightningModule, x: Tensor, c: Tensor | None = None) -> Distribution | Tensor:
        value = self._encode(pl_module, x) if c is None else self._encode(pl_module, x, c)
        if isinstance(value, Tensor) and self.chunk is None:
            return value
        try:
            return as_distribution(value, self.second, self.chunk, check=True)
        except ValueError as error:
            raise ValueError(f"the output of `encode`: {error}".replace("`posterior=", "`encode=")) from None

    def _decoded(
        self,
        pl_module: LightningModule,
        latents: dict[str, Tensor],
        conditions: dict[str, Tensor] | None,
        shape: Sequence[int],
        chunk: int,
    ) -> dict[str, Tensor]:
        """Decode latents ``(rows, columns, ...)`` in batches of ``chunk`` to ``(rows, columns, *shape)``."""
        sizes = [part.shape[:2] for part in latents.values()]
        given = [torch.cat([part.flatten(0, 1) for part in latents.values()]).split(chunk)]
        if conditions is not None:
            given.append(torch.cat([conditions[name].flatten(0, 1) for name in latents]).split(chunk))
        values = [_means("decode", self._decode(pl_module, *parts), shape) for parts in zip(*given, strict=True)]
        parts = torch.cat(values).split([math.prod(size) for size in sizes])
        return {name: part.unflatten(0, size) for name, part, size in zip(latents, parts, sizes, strict=True)}


class _Rows(NamedTuple):
    """Some observations of a batch, and the batch's prior."""

    x: Tensor
    prior: Any  # a distribution, or an object with `log_prob`
    size: int  # of the batch
    numbers: Sequence[int]  # of the observations
    c: Tensor | None = None  # what the model is conditioned on, in rows

    def first(self, number: int) -> _Rows:
        """Return the first observations."""
        return self._replace(x=self.x[:number], c=None if self.c is None else self.c[:number])

    def has_prior_of_each(self, axes: int) -> bool:
        """Return whether each observation has a prior of its own, p(z|c), over latents of so many axes."""
        if not isinstance(self.prior, Distribution):
            return False
        shape = tuple(self.prior.batch_shape + self.prior.event_shape)
        return len(shape) == axes and shape[:1] == (self.size,)


def _mean(posterior: Distribution | Tensor) -> Tensor:
    return posterior if isinstance(posterior, Tensor) else posterior.mean


def _of_one(prior: Any, row: int | None) -> Distribution:
    """Return a prior with the moments of one row, if there are several; N(0, 1) if they are not known."""
    if row is None or not isinstance(prior, Distribution):
        return prior if isinstance(prior, Distribution) else Normal(0.0, 1.0)
    try:
        return Normal(prior.mean[row], prior.stddev[row], validate_args=False)
    except NotImplementedError:
        return Normal(0.0, 1.0)


def _condition(pl_module: LightningModule, batch: Any, size: int) -> Tensor | None:
    """Return what a conditional module reads of a batch as its condition, in rows; ``None`` for any other module."""
    of_batch = getattr(getattr(pl_module, "condition", None), "of_batch", None)
    if of_batch is None:
        return None
    c: Tensor = of_batch(batch, size).to(pl_module.device)
    return c


def _conditions(c: Tensor, latents: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the condition of each latent of each picture: a row has one, or each column that of an observation."""
    by_row = {"reconstructions": c[:, None], "interpolations": c[:, None], "traversals": c[:1, None]}
    conditions = {}
    for name, values in latents.items():
        rows, columns = values.shape[:2]
        own = by_row[name][:rows] if name in by_row else c[None, torch.arange(columns) % len(c)]
        conditions[name] = own.expand(rows, columns, -1)
    return conditions


def _is_sharded(trainer: Trainer) -> bool:
    return any(cls.__name__ in _SHARDING for cls in type(trainer.strategy).__mro__)


def _means(option: str, output: Any, shape: Sequence[int]) -> Tensor:
    """Return a decoder's output as observations ``(n, *shape)``: a distribution's mean, or the first of several."""
    first = output[0] if is_sequence(output) and output else output
    values = first.mean if isinstance(first, Distribution) else first
    if not isinstance(values, Tensor) or values.ndim == 0 or values.shape[1:].numel() != math.prod(shape):
        what = f"shape {tuple(values.shape[1:])}" if isinstance(values, Tensor) else f"a {type(values).__name__}"
        raise ValueError(
            f"`{option}` gave {what} for each observation, which has shape {tuple(shape)}. Name a method or submodule "
            f"that gives observations, or pick a part of its output: `{option}='path:part'`."
        )
    return values.float().cpu().reshape(-1, *shape)


def _shown(inputs: Tensor, pl_module: LightningModule) -> Tensor:
    """Return the inputs on the scale of the decoder's outputs: integers are divided by the largest possible value."""
    levels = getattr(pl_module, "levels", None)
    values = inputs.float().cpu()
    if inputs.is_floating_point():  # `levels` may mean something else in a foreign module
        return values
    return values / (levels - 1) if isinstance(levels, int) else values / 255 if inputs.dtype == torch.uint8 else values


def _limits(values: Tensor) -> tuple[float, float]:
    """Return the values to draw as black and white, or at the bottom and the top of curves."""
    low, high = float(values.min()), float(values.max())
    if as_images(values) is None:
        margin = max((high - low) / 4, 1e-6)
        return low - margin, high + margin
    if low >= -1 and high <= 1:
        return (0.0 if low >= 0 else -1.0), 1.0
    return low, max(high, low + 1e-6)
