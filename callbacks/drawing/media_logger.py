"""The loggers of a run, for pictures and texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..base import writes_hparams

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


class MediaLogger:
    """The loggers of a run that show more than numbers: all media go to TensorBoard, pictures also to Weights & Biases.

    It is truthy if there is such a logger and this is the process that writes. Loggers without the methods needed here
    are skipped.

    Args:
        trainer: The Trainer of the run.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._loggers = list(trainer.loggers) if trainer.is_global_zero else []
        self._experiments: list[Any] = [getattr(logger, "experiment", None) for logger in self._loggers]

    def __bool__(self) -> bool:
        pairs = zip(self._loggers, self._experiments, strict=True)
        return any(hasattr(experiment, "add_image") or hasattr(logger, "log_image") for logger, experiment in pairs)

    def image(self, tag: str, picture: Tensor, step: int) -> None:
        """Show an image of shape ``(3, H, W)``, uint8."""
        for logger, experiment in zip(self._loggers, self._experiments, strict=True):
            if hasattr(experiment, "add_image"):
                experiment.add_image(tag, picture, step)
            elif hasattr(logger, "log_image"):
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
        """Show a histogram of the finite values of a tensor of any shape."""
        values = values[values.isfinite()]
        for experiment in self._with("add_histogram") if len(values) else ():
            experiment.add_histogram(tag, values, step, bins=60)

    def layout(self, charts: Mapping[str, Mapping[str, Sequence[Any]]]) -> None:
        """Arrange curves in the charts of TensorBoard's custom-scalars page, as ``add_custom_scalars`` takes them."""
        for experiment in self._with("add_custom_scalars"):
            experiment.add_custom_scalars(charts)

    def embedding(self, tag: str, rows: Tensor, labels: Sequence[str] | None, images: Tensor | None, step: int) -> None:
        """Send vectors to TensorBoard's projector.

        Args:
            tag: Name of the embedding.
            rows: Vectors of shape ``(n, k)``.
            labels: One for each vector.
            images: One for each vector, shape ``(n, 3, H, W)``, values from 0 to 1.
            step: The step.
        """
        for experiment in self._with("add_embedding"):
            experiment.add_embedding(rows, metadata=labels, label_img=images, global_step=step, tag=tag)

    def hyperparameters(self, values: Mapping[str, Any], metrics: Sequence[str]) -> None:
        """Fill TensorBoard's HParams page, which compares runs, unless the logger has filled it.

        Args:
            values: The run's hyperparameters.
            metrics: Tags of the curves to compare.
        """
        for logger, experiment in zip(self._loggers, self._experiments, strict=True):
            if hasattr(experiment, "add_image") and not writes_hparams(logger):
                from torch.utils.tensorboard.summary import hparams

                # `add_hparams` would write to a separate run.
                for summary in hparams(dict(values), dict.fromkeys(metrics)):
                    experiment._get_file_writer().add_summary(summary)

    def _with(self, method: str) -> list[Any]:
        return [experiment for experiment in self._experiments if hasattr(experiment, method)]
