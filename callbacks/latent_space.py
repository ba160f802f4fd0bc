"""Pictures of where a VAE's posteriors lie, while it trains."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution, Normal
from torch.nn.functional import interpolate
from typing_extensions import override

from .base import Callback
from .drawing.density_panels import density_panels
from .drawing.draw_schedule import DrawSchedule
from .drawing.images import as_images
from .drawing.media_logger import MediaLogger
from .drawing.scatter_panels import scatter_panels
from .reading.batch_fields import LABELS, OBSERVATIONS, batch_part
from .reading.distribution_reader import DistributionReader
from .reading.distributions import read_prior
from .reading.posterior_summary import PosteriorSummary

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

_SHOWN = 12  # dimensions at most
_SCATTERED = 4  # of them, in pairs
_THUMBNAIL = 32  # pixels


class LatentSpace(Callback):
    """Show how the posteriors lie against the prior and where the labels are, without a forward pass of its own.

    At some validation passes, the first and the last among them, TensorBoard and other loggers that take pictures get

    - ``latent/against_prior``: for each active dimension, in order of rate, at most 12, a histogram of the posterior
      means and the density of the aggregate posterior, against the prior's,
    - ``latent/by_label``: the posterior means in the planes of the four active dimensions with the highest rate,
      coloured by label, with the prior's circles of one and two standard deviations,

    and TensorBoard histograms of all ``latent/posterior_mean`` and ``latent/posterior_scale``, and when training ends
    the posterior means for its projector, as ``latent``, with labels and small images of the observations.

    Only the first process's share of the validation data is drawn.

    Args:
        posterior: Where the posterior is: ``None`` for the module's own attribute ``posterior``, the path of a
            submodule that outputs it, a pair of paths, or a callable, as :class:`DistributionReader` takes it.
        second: What stands beside the mean: ``"log_variance"``, ``"variance"``, ``"scale"`` or ``"log_scale"``.
        chunk: Where the posterior is one tensor: the axis along which it is split.
        label: Where the labels are in a batch: a key, an index or a callable; in the usual places if not given.
        observations: Number of validation observations that are shown, the first ones.
        times: How often in a run to draw. TensorBoard shows ten of a tag.

    Raises:
        ValueError: If an option is out of its range, or the posterior is not found where it should be.

    Example::

        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[LatentSpace(posterior=("model.fc_mu", "model.fc_var"))])
    """

    def __init__(
        self,
        posterior: str | tuple[str, str] | Callable[[LightningModule, Any], Any] | None = None,
        second: Literal["log_variance", "variance", "scale", "log_scale"] = "log_variance",
        chunk: int | None = None,
        label: int | str | Callable[[Any], Any] | None = None,
        observations: int = 1000,
        times: int = 10,
    ) -> None:
        if observations < 2:
            raise ValueError(f"`observations` must be at least 2, got {observations}.")
        self.posterior = posterior
        self.label = label
        self.observations = observations
        self._reader = DistributionReader(posterior, second, chunk)
        self._moments = DrawSchedule(times)
        self._draws = False
        self._rows: list[_Rows] = []
        self._latest: _Rows | None = None

    @cached_property  # Lightning asks for it at every hook of every step
    @override
    def state_key(self) -> str:
        """Key of the saved state: those of different posteriors stand side by side."""
        return self._generate_state_key(posterior=getattr(self.posterior, "__qualname__", self.posterior))

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Count anew, before a checkpoint brings the number of passes of the run that goes on."""
        if stage == "fit":
            self._moments.passes = 0

    @override
    def on_fit_start(self, trainer: Trainer, *_: Any) -> None:
        """See that nothing of this run outlives it."""
        self.at_end(trainer, self._discard)

    @override
    def on_validation_epoch_start(self, trainer: Trainer, *_: Any) -> None:
        """Begin a pass."""
        self._rows = []
        counts = trainer.state.fn == "fit" and not trainer.sanity_checking
        self._draws = counts and self._moments.next(trainer) and bool(MediaLogger(trainer))

    @override
    def on_validation_batch_start(self, _trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Begin a step."""
        if self._wants_more:
            self._reader.listen(pl_module)

    @override
    def on_validation_batch_end(
        self, _trainer: Trainer, pl_module: LightningModule, _outputs: Any, batch: Any, *_: Any
    ) -> None:
        """Keep the batch's posterior means, scales, labels and observations, as many as are still wanted."""
        if self._wants_more and not (self.posterior is None and getattr(pl_module, "posterior", self) is None):
            posterior = self._reader.read(pl_module, batch)[0]  # of several, the first view's
            self._rows.append(_Rows.of(PosteriorSummary.of(posterior, read_prior(pl_module)), batch, self.label))

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw."""
        self._reader.forget()
        if self._draws and self._kept > 1:
            self._latest = _Rows.joined(self._rows, self.observations)
            self._draw(MediaLogger(trainer), self._latest, read_prior(pl_module), self.step(trainer))
        self._rows, self._draws = [], False

    @override
    def on_train_end(self, trainer: Trainer, *_: Any) -> None:
        """Hand the latest posterior means to the projector."""
        if self._latest is not None:
            rows, self._latest = self._latest, None
            images = None if rows.x is None else _thumbnails(rows.x)
            MediaLogger(trainer).embedding("latent", rows.codes.mean, rows.labels, images, self.step(trainer))

    @override
    def on_save_checkpoint(self, *_: Any) -> None:
        """Leave no hook in what is saved."""
        self._reader.unhook()

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return how many passes there were."""
        return {"passes": self._moments.passes}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore it."""
        self._moments.passes = state_dict["passes"]

    @property
    def _kept(self) -> int:
        return sum(len(rows.codes.mean) for rows in self._rows)

    @property
    def _wants_more(self) -> bool:
        return self._draws and self._kept < self.observations

    def _discard(self) -> None:
        self._reader.detach()
        self._rows, self._latest, self._draws = [], None, False

    @staticmethod
    def _draw(board: MediaLogger, rows: _Rows, prior: Distribution, step: int) -> None:
        codes = rows.codes
        mean, scale = _in_units(codes, prior)
        numbers = (codes.active or codes.order[:1])[:_SHOWN]
        titles = [codes.title(number) for number in numbers]
        shown = None if scale is None else scale[:, numbers]
        unit = "prior" if isinstance(prior, Normal) else "N(0, 1)"
        board.image("latent/against_prior", density_panels(mean[:, numbers], shown, titles, unit), step)
        planes = _planes(numbers[:_SCATTERED], mean.shape[1])
        names = [(f"z{across}", f"z{up}") for across, up in planes]
        points = torch.stack([mean[:, plane] for plane in planes])
        board.image("latent/by_label", scatter_panels(points, names, rows.labels), step)
        board.histogram("latent/posterior_mean", codes.mean, step)
        if codes.scale is not None:
            board.histogram("latent/posterior_scale", codes.scale, step)


class _Rows(NamedTuple):
    """Some observations: their posteriors, their labels and themselves."""

    codes: PosteriorSummary
    labels: list[str] | None
    x: Tensor | None

    @classmethod
    def of(cls, codes: PosteriorSummary, batch: Any, label: int | str | Callable[[Any], Any] | None) -> _Rows:
        count = len(codes.mean)
        labels = _names(batch_part(batch, label, LABELS, 1), count)
        x = batch_part(batch, None, OBSERVATIONS, 0)
        return cls(codes, labels, x if isinstance(x, Tensor) and len(x) == count else None)

    @classmethod
    def joined(cls, parts: Sequence[_Rows], count: int) -> _Rows:
        """Put several together, and return the first of their rows."""
        codes = PosteriorSummary.joined([part.codes for part in parts]).first(count)
        labels, x = [part.labels for part in parts], [part.x for part in parts]
        shapes = {None if each is None else each.shape[1:] for each in x}  # several loaders, say, have several
        return cls(
            codes,
            None if None in labels else [name for part in labels for name in part or ()][:count],
            torch.cat(x)[:count] if len(shapes) == 1 and None not in shapes else None,  # type: ignore[arg-type]
        )


def _names(labels: Any, count: int) -> list[str] | None:
    """Return labels as words; ``None`` for what is no label for each observation."""
    if isinstance(labels, Tensor):
        labels = labels.flatten().tolist() if labels.numel() == count else None
    if not isinstance(labels, list | tuple) or len(labels) != count:
        return None
    return [f"{label:g}" if isinstance(label, float) else str(label) for label in labels]


def _in_units(codes: PosteriorSummary, prior: Distribution) -> tuple[Tensor, Tensor | None]:
    """Return means and scales in units of the prior's, where it is Gaussian."""
    if not isinstance(prior, Normal):
        return codes.mean, codes.scale
    centre, unit = (each.detach().float().cpu().flatten() for each in (prior.loc, prior.scale))
    return (codes.mean - centre) / unit, None if codes.scale is None else codes.scale / unit


def _planes(numbers: list[int], dimensions: int) -> list[list[int]]:
    """Pair dimensions; one that is left over goes with the next of all, or with itself."""
    if len(numbers) % 2:
        numbers = [*numbers, next((number for number in range(dimensions) if number not in numbers), numbers[-1])]
    return [numbers[place : place + 2] for place in range(0, len(numbers), 2)]


def _thumbnails(x: Tensor) -> Tensor | None:
    """Return small colour images with values from 0 to 1; ``None`` for what is no image."""
    images = as_images(x.float().cpu())
    if images is None:
        return None
    size = min(_THUMBNAIL, max(images.shape[2:]))
    small = interpolate(images, (size, size), mode="area")
    low, high = small.min(), small.max()
    return ((small - low) / (high - low).clamp(min=1e-12)).expand(-1, 3, -1, -1)
