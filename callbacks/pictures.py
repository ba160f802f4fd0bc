"""Pictures of what a VAE decodes, while it trains."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor
from torch.distributions import Distribution
from typing_extensions import override

from .base import Callback
from .drawing.draw_schedule import DrawSchedule
from .drawing.evenly_spaced_rows import evenly_spaced_rows
from .drawing.gallery import Gallery
from .drawing.images import as_images
from .drawing.media_logger import MediaLogger
from .drawing.traversals import expanded, interpolations, traversals
from .reading.batch_fields import OBSERVATIONS, batch_part
from .reading.distributions import as_distribution, read_prior
from .reading.isolated_eval import isolated_eval
from .reading.module_call import ModuleCall
from .reading.posterior_summary import PosteriorSummary

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

_COLUMNS = 10
_SAMPLES = _COLUMNS * 5
_PATHS = 5  # interpolations
_TRAVERSED = 12  # dimensions at most
_MEASURED = 256  # observations that the rates are taken from
# Their parameters are spread over the processes, so that one alone can't run them.
_SHARDED = ("FSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy")


class Pictures(Callback):
    """Show what a VAE reconstructs, samples and has learned in its latents, always for the same inputs.

    At some validation passes, the first and the last among them, TensorBoard and other loggers that take pictures get

    - ``images/reconstructions``: ten observations and below them their reconstructions,
    - ``images/samples``: decoded draws from the prior, of the same noise each time,
    - ``images/interpolations``: from one observation to another, decoded along the line between their posterior means,
    - ``images/traversals``: a row for each active latent dimension, in order of rate, at most 12: the first observation
      decoded with that dimension moved from -2.5 to 2.5 standard deviations of the prior.

    The ten are spread over the validation data, chosen in the first pass and saved with the checkpoint. What is no
    image is drawn as curves. Means are shown throughout: of the posterior, and of p(x|z) where ``decode`` gives a
    distribution. Training is not disturbed: no random number is taken, modes are restored, and only the first process
    draws. Where a strategy shards the parameters there are no pictures, as one process can't run the model.

    Args:
        encode: What gives q(z|x) or its mean: ``None`` for the module's own ``encode``, the path of another method or
            submodule (``"model.encoder"``) or of a part of what it returns (``"model.encode:0"``), or a callable
            ``(pl_module, x)``. A pair of tensors is a mean and what ``second`` says; one tensor a mean.
        decode: What gives observations, or a distribution over them, from latents, in the same forms.
        reconstruct: What gives reconstructions from observations, in the same forms, if they are not ``decode`` of the
            posterior mean.
        second: What stands beside the mean: ``"log_variance"``, ``"variance"``, ``"scale"`` or ``"log_scale"``.
        chunk: Where ``encode`` gives one tensor that holds both: the axis along which it is split.
        x: Where the observations are in a batch: a key, an index or a callable; in the usual places if not given.
        value_range: The values drawn as black and white, ``(0, 1)``, say, or as the bottom and top of curves. By
            default (0, 1) or (-1, 1) if images lie within, else what they span; for curves what the inputs span, and a
            quarter of it as room above and below. Integers are divided by the module's ``levels`` - 1, or by 255,
            before.
        times: How often in a run to draw. TensorBoard shows ten of a tag.

    Raises:
        ValueError: If an option is out of its range; when fitting starts, if a path leads nowhere.

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
    ) -> None:
        if value_range is not None and not value_range[0] < value_range[1]:
            raise ValueError(f"`value_range` must be a smaller and a larger number, got {value_range}.")
        self.second = second
        self.chunk = chunk
        self.x = x
        self.value_range = value_range
        self._encode = ModuleCall("encode", "encode" if encode is None else encode)
        self._decode = ModuleCall("decode", "decode" if decode is None else decode)
        self._reconstruct = None if reconstruct is None else ModuleCall("reconstruct", reconstruct)
        self._moments = DrawSchedule(times)
        self._draws = False
        self._inputs: Tensor | None = None
        self._chosen: list[Tensor] = []
        self._measured: list[Tensor] = []

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Start anew, before a checkpoint brings what was chosen for the run that goes on."""
        if stage == "fit":
            self._moments.passes, self._inputs = 0, None

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See that everything named is there."""
        for call in (self._encode, self._decode, self._reconstruct):
            if call is not None:
                call.check(pl_module)
        self.at_end(trainer, self._forget)

    @override
    def on_train_start(self, trainer: Trainer, *_: Any) -> None:
        """Say if nobody would see the pictures."""
        if _is_sharded(trainer):
            rank_zero_info("Pictures: one process can't run a model whose parameters are sharded; none are drawn.")
        elif trainer.is_global_zero and not MediaLogger(trainer):
            rank_zero_info("Pictures: no logger of this run takes pictures; none are drawn.")

    @override
    def on_validation_epoch_start(self, trainer: Trainer, *_: Any) -> None:
        """Begin a pass."""
        self._forget()
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._draws = self._moments.next(trainer) and bool(MediaLogger(trainer)) and not _is_sharded(trainer)

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
        """Keep some of the first loader's observations."""
        if self._draws and dataloader_idx == 0:
            self._keep(self._observations(batch), batch_idx, trainer.num_val_batches[0])

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw."""
        if self._draws and self._inputs is None and self._chosen:
            self._inputs = torch.stack(self._chosen)
        if self._draws and self._inputs is not None and self._measured:
            board = MediaLogger(trainer)
            pictures = self._pictures(trainer, pl_module, self._inputs, self._measured)
            for tag, picture in pictures.items():
                board.image(tag, picture, self.step(trainer))
        self._forget()

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return how many passes there were, and the inputs that are shown."""
        inputs = torch.empty(0) if self._inputs is None else self._inputs.cpu()
        return {"passes": self._moments.passes, "inputs": inputs}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore them."""
        self._moments.passes = state_dict["passes"]
        self._inputs = state_dict["inputs"] if len(state_dict["inputs"]) else None

    def _forget(self) -> None:
        self._draws, self._chosen, self._measured = False, [], []

    def _observations(self, batch: Any) -> Tensor:
        x = batch_part(batch, self.x, OBSERVATIONS, 0)
        if not isinstance(x, Tensor):
            raise ValueError(
                f"Pictures: no observations were found in a batch, which is a {type(batch).__name__}. Say where they "
                "are with `x=`, a key, an index or a callable."
            )
        return x

    def _keep(self, x: Tensor, batch_idx: int, batches: float) -> None:
        if self._measured and x.shape[1:] != self._measured[0].shape[1:]:
            return  # sequences of many lengths: those of the first batch's
        if self._inputs is None:
            self._chosen += [x[row].clone() for row in evenly_spaced_rows(_COLUMNS, len(x), batch_idx, batches)]
        missing = _MEASURED - sum(map(len, self._measured))
        if missing > 0 and len(x):
            self._measured.append(x[:missing])

    def _pictures(
        self, trainer: Trainer, pl_module: LightningModule, inputs: Tensor, measured: list[Tensor]
    ) -> dict[str, Tensor]:
        inputs = inputs.to(pl_module.device)
        shown = _shown(inputs, pl_module)
        prior = read_prior(pl_module)
        with isolated_eval(trainer, pl_module):
            codes = PosteriorSummary.joined(
                [PosteriorSummary.of(self._posterior(pl_module, x), prior) for x in measured]
            )
            posterior = self._posterior(pl_module, inputs)
            mean = posterior if isinstance(posterior, Tensor) else posterior.mean
            numbers = (codes.active or codes.order[:1])[:_TRAVERSED]
            latents = {
                "samples": expanded(prior, (_SAMPLES, *mean.shape[1:])).sample().to(mean)[:, None],
                "interpolations": interpolations(mean, _PATHS, _COLUMNS - 2),
                "traversals": traversals(mean[0], numbers, prior, _COLUMNS),
                "reconstructions": mean[:, None],
            }
            decoded = self._decoded(pl_module, latents, shown.shape[1:], chunk=max(map(len, measured)))
            if self._reconstruct is not None:
                outputs = _values("reconstruct", self._reconstruct(pl_module, inputs), shown.shape[1:])
                decoded["reconstructions"] = outputs[:, None]
        gallery = Gallery(*(self.value_range or _span(shown)))
        pictures = {
            "images/reconstructions": gallery.pairs(shown, decoded["reconstructions"].squeeze(1)),
            "images/samples": gallery.each(decoded["samples"].squeeze(1), _COLUMNS),
            "images/traversals": gallery.rows(
                decoded["traversals"], [codes.title(number).removesuffix(" nats") for number in numbers]
            ),
        }
        if len(between := decoded["interpolations"]):
            first, last = shown[: len(between), None], shown[len(shown) // 2 :][: len(between), None]
            pictures["images/interpolations"] = gallery.rows(torch.cat([first, between, last], dim=1))
        return pictures

    def _posterior(self, pl_module: LightningModule, x: Tensor) -> Distribution | Tensor:
        value = self._encode(pl_module, x)
        if isinstance(value, Tensor) and self.chunk is None:
            return value
        try:
            return as_distribution(value, self.second, self.chunk)
        except ValueError as error:
            raise ValueError(f"Pictures, of what `encode` gives: {error}".replace("`posterior=", "`encode=")) from None

    def _decoded(
        self, pl_module: LightningModule, latents: dict[str, Tensor], shape: Sequence[int], chunk: int
    ) -> dict[str, Tensor]:
        """Decode latents ``(rows, columns, ...)``, a batch at a time; give them the shape of the observations."""
        sizes = [part.shape[:2] for part in latents.values()]
        together = torch.cat([part.flatten(0, 1) for part in latents.values()])
        values = [_values("decode", self._decode(pl_module, part), shape) for part in together.split(chunk)]
        parts = torch.cat(values).split([math.prod(size) for size in sizes])
        return {name: part.unflatten(0, size) for name, part, size in zip(latents, parts, sizes, strict=True)}


def _is_sharded(trainer: Trainer) -> bool:
    return any(cls.__name__ in _SHARDED for cls in type(trainer.strategy).__mro__)


def _values(option: str, output: Any, shape: Sequence[int]) -> Tensor:
    """Return the observations in what a decoder gives: a distribution's means, or the first of several tensors."""
    first = output[0] if isinstance(output, tuple | list) and output else output
    values = first.mean if isinstance(first, Distribution) else first
    if not isinstance(values, Tensor) or values.ndim == 0 or values.shape[1:].numel() != math.prod(shape):
        what = f"shape {tuple(values.shape[1:])}" if isinstance(values, Tensor) else f"a {type(values).__name__}"
        raise ValueError(
            f"Pictures: `{option}` gave {what} for each observation, which has shape {tuple(shape)}. Name what gives "
            f"observations, or pick a part of it: `{option}='path:part'`."
        )
    return values.float().cpu().reshape(-1, *shape)


def _shown(inputs: Tensor, pl_module: LightningModule) -> Tensor:
    """Return the inputs in the scale that decoders give: integers are divided by the largest there can be."""
    levels = getattr(pl_module, "levels", None)
    values = inputs.float().cpu()
    if inputs.is_floating_point():  # a foreign module's `levels` may be anything
        return values
    return values / (levels - 1) if isinstance(levels, int) else values / 255 if inputs.dtype == torch.uint8 else values


def _span(values: Tensor) -> tuple[float, float]:
    """Return the values to draw as black and white, or between which curves have room."""
    low, high = float(values.min()), float(values.max())
    if as_images(values) is None:
        room = max((high - low) / 4, 1e-6)
        return low - room, high + room
    if low >= -1 and high <= 1:
        return (0.0 if low >= 0 else -1.0), 1.0
    return low, max(high, low + 1e-6)
