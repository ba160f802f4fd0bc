"""Where a run's pictures and texts go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .png import png

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


class MediaLogger:
    """The loggers of a run that show more than numbers: TensorBoard all of it, others the pictures they take.

    True if there is one, on the process that writes. A logger without such a thing, or no logger at all, is no error.

    Args:
        trainer: Whose loggers.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._loggers = list(trainer.loggers) if trainer.is_global_zero else []
        self._experiments: list[Any] = [getattr(logger, "experiment", None) for logger in self._loggers]

    def __bool__(self) -> bool:
        return any(map(_is_board, self._experiments)) or any(hasattr(logger, "log_image") for logger in self._loggers)

    def image(self, tag: str, picture: Tensor, step: int) -> None:
        """Show an image of shape ``(3, H, W)``, uint8."""
        for logger, experiment in zip(self._loggers, self._experiments, strict=True):
            if type(experiment).__module__.startswith("torch."):
                experiment._get_file_writer().add_summary(_summary(tag, picture), step)
            elif _is_board(experiment):
                experiment.add_image(tag, picture, step)
            elif hasattr(logger, "log_image"):  # Weights & Biases
                logger.log_image(key=tag, images=[picture.permute(1, 2, 0).numpy()], step=step)

    def scalar(self, tag: str, value: float, step: int) -> None:
        """Add a point to a curve."""
        for experiment in self._with("add_scalar"):
            experiment.add_scalar(tag, value, step)

    def text(self, tag: str, markdown: str, step: int) -> None:
        """Show a text."""
        for experiment in self._with("add_text"):
            experiment.add_text(tag, markdown, step)

    def histogram(self, tag: str, values: Tensor, step: int) -> None:
        """Show how values are distributed; those that are not finite have no place in it."""
        values = values[values.isfinite()]
        for experiment in self._with("add_histogram") if len(values) else ():
            experiment.add_histogram(tag, values, step, bins=60)

    def layout(self, charts: Mapping[str, Mapping[str, Sequence[Any]]]) -> None:
        """Say which curves make a chart of the custom-scalars page."""
        for experiment in self._with("add_custom_scalars"):
            experiment.add_custom_scalars(charts)

    def embedding(self, tag: str, rows: Tensor, labels: Sequence[str] | None, images: Tensor | None, step: int) -> None:
        """Hand vectors of shape ``(n, k)`` to the projector, with labels and pictures of what they stand for."""
        for experiment in self._with("add_embedding"):
            experiment.add_embedding(rows, metadata=labels, label_img=images, global_step=step, tag=tag)

    def hyperparameters(self, values: Mapping[str, Any], metrics: Sequence[str]) -> None:
        """Fill TensorBoard's HParams page, which compares runs, unless its logger has."""
        for logger, experiment in zip(self._loggers, self._experiments, strict=True):
            if _is_board(experiment) and not getattr(logger, "_default_hp_metric", True):
                from torch.utils.tensorboard.summary import hparams

                for summary in hparams(dict(values), dict.fromkeys(metrics)):
                    experiment._get_file_writer().add_summary(summary)

    def _with(self, method: str) -> list[Any]:
        return [experiment for experiment in self._experiments if hasattr(experiment, method)]


def _summary(tag: str, picture: Tensor) -> Any:
    """Return what ``add_image`` writes; it encodes three times as long."""
    from tensorboard.compat.proto.summary_pb2 import Summary

    image = Summary.Image(
        height=picture.shape[1], width=picture.shape[2], colorspace=3, encoded_image_string=png(picture)
    )
    return Summary(value=[Summary.Value(tag=tag, image=image)])


def _is_board(experiment: Any) -> bool:
    return hasattr(experiment, "add_image")
