"""Pictures of a VAE's posteriors during training."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor
from typing_extensions import override

from .base import Callback, validates
from .drawing.best_effort import BestEffort
from .drawing.draw_schedule import DrawSchedule
from .drawing.images import thumbnails
from .drawing.media_logger import MediaLogger
from .drawing.panels import DENSITY_GRID, density_panels, scatter_panels
from .metrics.observation_subset import evenly_spaced_rows
from .metrics.posterior_summary import PosteriorSummary
from .metrics.prior_units import marginal_densities
from .reading.batch_fields import LABELS, OBSERVATIONS, batch_part
from .reading.distributions import Second, is_sequence
from .reading.latent_reader import Latent, LatentReader, Places
from .schedules import at_least, check_number

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

_MAX_DENSITIES = 12  # dimensions
_MAX_SCATTERED = 4  # dimensions, in pairs


class LatentSpace(Callback):
    """Show the posteriors against the prior and by label, without a forward pass of its own.

    At some validation passes, the first and the last among them, TensorBoard and other loggers of pictures get

    - ``latent/against_prior``: for each active dimension, in order of rate, at most 12, a histogram of the posterior
      means and the density of the aggregate posterior, against the density of the prior, in units of the prior: its
      mean and standard deviation in this dimension,
    - ``latent/by_label``: the posterior means in the planes of the four active dimensions with the highest rate,
      coloured by label, in the same units, with circles at one and two standard deviations of the prior.

    TensorBoard also gets histograms of all ``latent/posterior_mean`` and ``latent/posterior_scale``. When training
    ends, its projector gets the posterior means as ``latent``, with labels and thumbnails of the observations.

    Only the validation data of the first process are drawn, and nothing in a run without validation. The sanity check
    tries all of it. The first error, there or later, gives a warning; then nothing more is drawn, and training
    continues.

    Args:
        posterior: Where the posterior is: ``None`` for the module's own attribute ``posterior``, the path of a
            submodule that outputs it, a pair of paths, a callable, or a dict of them for several groups of latents. See
            :class:`DistributionReader`. Of more than 256 dimensions a fixed random choice is drawn.
        prior: Where the prior is, in the same forms; ``None`` is the module's own attribute ``prior``.
        second: Meaning of the second parameter: ``"log_variance"``, ``"variance"``, ``"scale"`` or ``"log_scale"``, or
            a function that turns it into the scale.
        chunk: The axis along which to split the posterior, if one tensor holds both parameters.
        label: Location of the labels in a batch: a key, an index or a callable. By default the usual places.
        observations: Number of validation observations to show, spread evenly over the data; the first ones if the
            loader has no length.
        times: Number of times to draw in a run. TensorBoard shows ten pictures per tag.
        mask: Where the batch has a mask of the latents' positions, True where one is real: a key, an index or a
            callable. Padding is then left out.

    Raises:
        ValueError: If an option is out of range; when fitting starts, if a path leads nowhere.

    Example::

        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[LatentSpace(posterior=("model.fc_mu", "model.fc_var"))])
    """

    def __init__(
        self,
        posterior: Places = None,
        prior: Places = None,
        second: Second = "log_variance",
        chunk: int | None = None,
        label: int | str | Callable[[Any], Any] | None = None,
        observations: int = 1000,
        times: int = 10,
        mask: int | str | Callable[[Any], Any] | None = None,
    ) -> None:
        check_number("observations", observations, "at least 2", at_least(2))
        self.posterior = posterior
        self.label = label
        self.observations = observations
        self._reader = LatentReader(posterior, prior, None, second, chunk, mask=mask)
        self._prior: Tensor | None = None  # the densities of its dimensions
        self._draw_schedule = DrawSchedule(times)
        self._attempt = BestEffort("LatentSpace")
        self._draws = False
        self._rows: list[_Rows] = []
        self._latest: _Rows | None = None

    @cached_property  # Lightning reads it at every hook of every step
    @override
    def state_key(self) -> str:
        return self.keyed_by(posterior=self._reader.key)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":  # before a checkpoint restores the state of a run to resume
            self._draw_schedule.passes = 0
            self._attempt = BestEffort("LatentSpace")

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._reader.listen(pl_module)  # raises if a path leads nowhere
        self._reader.detach()
        self.at_end(trainer, self._discard)

    @override
    def on_train_start(self, trainer: Trainer, *_: Any) -> None:
        with self._attempt("the loggers"):
            if not validates(trainer):
                rank_zero_info("LatentSpace: this run has no validation, where the latents are drawn; none are drawn.")
            elif trainer.is_global_zero and not MediaLogger(trainer):
                rank_zero_info("LatentSpace: no logger of this run takes pictures; none are drawn.")

    @override
    def on_validation_epoch_start(self, trainer: Trainer, *_: Any) -> None:
        self._rows, self._draws = [], False
        is_due = self._draw_schedule.start_pass(trainer) and not self._attempt.has_failed
        with self._attempt("the loggers"):
            self._draws = is_due and bool(MediaLogger(trainer))

    @override
    def on_validation_batch_start(self, _trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if self._wants_more:
            with self._attempt("the posterior"):
                self._reader.listen(pl_module)

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
        if self._wants_more:
            with self._attempt("the posterior"):
                if self._reader.offers_none(pl_module):
                    return  # this process's share of the batch was empty
                first_view = self._reader.read(pl_module, batch)[0].values()
                codes = PosteriorSummary.beside(
                    PosteriorSummary.of(each.posterior, each.prior, each.z, each.mask) for each in first_view
                )
                if self._rows and codes.mean.shape[1] != self._rows[0].codes.mean.shape[1]:
                    return  # of sequences of different lengths, keep only those as long as the first batch's
                if not self._rows:
                    self._prior = _densities(first_view, codes)
                rows = _Rows.of(codes, batch, self.label)
                batches = trainer.num_val_batches
                place, total = sum(batches[:dataloader_idx]) + batch_idx, sum(batches)
                if math.isfinite(total):
                    rows = rows.chosen(evenly_spaced_rows(self.observations, len(rows.codes.mean), place, total))
                self._rows.append(rows)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._reader.forget()
        if self._draws and self._count > 1:
            with self._attempt("the latent space"):
                rows = _Rows.joined(self._rows, self.observations)
                pictures = _pictures(rows.codes, rows.labels, self._prior)
                if not trainer.sanity_checking:
                    self._latest = rows
                    self._show(MediaLogger(trainer), pictures, rows.codes, self.step(trainer))
        self._rows, self._draws = [], False

    @override
    def on_train_end(self, trainer: Trainer, *_: Any) -> None:
        if self._latest is not None and not self._attempt.has_failed:
            rows, self._latest = self._latest, None
            with self._attempt("the projector"):
                images = None if rows.x is None else thumbnails(rows.x)
                means = rows.codes.mean.nan_to_num()  # the projector takes no padding
                MediaLogger(trainer).embedding("latent", means, rows.labels, images, self.step(trainer))

    @override
    def on_save_checkpoint(self, *_: Any) -> None:
        self._reader.unhook()  # a module saved as an object would contain the hooks

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"passes": self._draw_schedule.passes}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._draw_schedule.passes = state_dict["passes"]

    @property
    def _count(self) -> int:
        return sum(len(rows.codes.mean) for rows in self._rows)

    @property
    def _wants_more(self) -> bool:
        return self._draws and self._count < self.observations

    def _discard(self) -> None:
        self._reader.detach()
        self._rows, self._latest, self._draws = [], None, False

    @staticmethod
    def _show(logger: MediaLogger, pictures: dict[str, Tensor], codes: PosteriorSummary, step: int) -> None:
        for tag, picture in pictures.items():
            logger.image(tag, picture, step)
        logger.histogram("latent/posterior_mean", codes.mean, step)
        if codes.scale is not None:
            logger.histogram("latent/posterior_scale", codes.scale, step)


class _Rows(NamedTuple):
    """The posteriors and labels of some observations, and the observations."""

    codes: PosteriorSummary
    labels: list[str] | None
    x: Tensor | None

    @classmethod
    def of(cls, codes: PosteriorSummary, batch: Any, label: int | str | Callable[[Any], Any] | None) -> _Rows:
        count = len(codes.mean)
        labels = _names(batch_part(batch, label, LABELS, 1), count)
        x = batch_part(batch, None, OBSERVATIONS, 0)
        return cls(codes, labels, x if isinstance(x, Tensor) and len(x) == count else None)

    def chosen(self, numbers: Sequence[int]) -> _Rows:
        """Return some rows only."""
        labels = None if self.labels is None else [self.labels[number] for number in numbers]
        return _Rows(self.codes.rows(numbers), labels, None if self.x is None else self.x[list(numbers)])

    @classmethod
    def joined(cls, parts: Sequence[_Rows], count: int) -> _Rows:
        """Concatenate several, and return the first ``count`` rows."""
        codes = PosteriorSummary.joined([part.codes for part in parts])
        codes = codes.rows(range(min(count, len(codes.mean))))
        labels, x = [part.labels for part in parts], [part.x for part in parts]
        shapes = {None if each is None else each.shape[1:] for each in x}  # the shapes may differ between loaders
        return cls(
            codes,
            None if None in labels else [name for part in labels for name in part or ()][:count],
            torch.cat(x)[:count] if len(shapes) == 1 and None not in shapes else None,  # type: ignore[arg-type]
        )


def _densities(latents: Iterable[Latent], codes: PosteriorSummary) -> Tensor | None:
    """Return the prior's density in each dimension of a summary, ``None`` unless all are known."""
    found = [marginal_densities(each.prior, each.posterior.mean, DENSITY_GRID) for each in latents]
    if any(each is None for each in found):
        return None
    densities = torch.cat(found, dim=1)  # type: ignore[arg-type]
    return densities if codes.numbers is None else densities[:, list(codes.numbers)]


def _pictures(codes: PosteriorSummary, labels: list[str] | None, prior: Tensor | None) -> dict[str, Tensor]:
    """Return the pictures by tag, each of shape ``(3, H, W)``, uint8."""
    mean, scale = codes.in_units_of_prior
    dimensions = (codes.active or codes.order[:1])[:_MAX_DENSITIES]
    titles = [codes.title(dimension) for dimension in dimensions]
    scales = None if scale is None else scale[:, dimensions]
    planes = _planes(dimensions[:_MAX_SCATTERED], mean.shape[1])
    names = [(codes.name(across), codes.name(up)) for across, up in planes]
    points = torch.stack([mean[:, plane] for plane in planes])
    of_prior = None if prior is None else prior[:, dimensions]
    return {
        "latent/against_prior": density_panels(mean[:, dimensions], scales, titles, of_prior),
        "latent/by_label": scatter_panels(points, names, labels),
    }


def _names(labels: Any, count: int) -> list[str] | None:
    """Return labels as words; ``None`` unless there is one for each of ``count`` observations."""
    if isinstance(labels, Tensor):
        labels = labels.flatten().tolist() if labels.numel() == count else None
    if not is_sequence(labels) or len(labels) != count:
        return None
    return [f"{label:g}" if isinstance(label, float) else str(label) for label in labels]


def _planes(dimensions: list[int], total: int) -> list[list[int]]:
    """Pair dimensions. An odd one is paired with the first dimension not listed, or else with itself."""
    if len(dimensions) % 2:
        others = (dimension for dimension in range(total) if dimension not in dimensions)
        dimensions = [*dimensions, next(others, dimensions[-1])]
    return [dimensions[place : place + 2] for place in range(0, len(dimensions), 2)]
