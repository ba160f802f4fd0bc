"""TensorBoard's pages, arranged so that they tell how a run went."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from .base import Callback
from .drawing.media_logger import MediaLogger
from .drawing.run_description import HOW_TO_READ, comparable, describe_data, describe_objective

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

_CHARTS: Mapping[str, Sequence[str]] = {
    "beta": ["knobs/beta"],
    "rate": ["train/rate", "val/rate"],
    "distortion": ["train/distortion", "val/distortion"],
    "ELBO": ["train/elbo", "val/elbo"],
    "active_units": ["latent/active_units"],
    "mutual_information": ["latent/mutual_information"],
}


class Dashboard(Callback):
    """Put what tells a VAE's story together in TensorBoard, and write beside it what was trained on what.

    - Scalars: a group ``Overview``, which comes first, with a point for each validation pass: beta, rate, distortion,
      ELBO, active units and mutual information.
    - Custom scalars: the same six as charts side by side, training and validation in one.
    - Text: ``How_to_read``, what these say of a model; ``objective``, the loss with its numbers, the networks' sizes,
      and what moves the knobs; and ``data``.
    - HParams: the module's numbers, what moves its knobs (``method``) and every other option (``setup``) against what
      is measured, to compare runs; where the logger is a ``TensorBoardLogger(default_hp_metric=False)``, as one that
      has written its own can't be added to.

    Other loggers have the numbers anyway.

    Args:
        charts: The curves of each chart, where they have other names: ``{"rate": ["kl", "val_kl"]}``. They replace the
            default ones of that title; an empty list removes it. The overview shows the last curve that a run has.
        objective: Your own text about the objective, in Markdown, in place of the one that is written.
        data: Your own text about the data.

    Example::

        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[Dashboard(charts={"rate": ["train_kl", "val_kl"]})])
    """

    def __init__(
        self,
        charts: Mapping[str, Sequence[str]] | None = None,
        objective: str | None = None,
        data: str | None = None,
    ) -> None:
        self.charts = {title: list(tags) for title, tags in {**_CHARTS, **(charts or {})}.items() if tags}
        self.objective = objective
        self.data = data

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Arrange the pages."""
        board = MediaLogger(trainer)
        if board:
            step = self.step(trainer)
            board.layout(_layout(self.charts))
            board.text("How_to_read", HOW_TO_READ, step)
            board.text("objective", self.objective or describe_objective(trainer, pl_module), step)
            board.text("data", self.data or describe_data(trainer), step)
            measured = [title for title, tags in self.charts.items() if not tags[-1].startswith("knobs/")]
            board.hyperparameters(comparable(trainer, pl_module), [f"Overview/{title}" for title in measured])

    @override
    def on_validation_end(self, trainer: Trainer, *_: Any) -> None:
        """Add a point to the overview."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            board = MediaLogger(trainer)
            for title, value in _overview(self.charts, trainer.callback_metrics).items():
                board.scalar(f"Overview/{title}", value, self.step(trainer))


def _layout(charts: Mapping[str, Sequence[str]]) -> dict[str, dict[str, list[Any]]]:
    """Return what ``add_custom_scalars`` takes: its tags are regular expressions, matched from the start."""
    return {
        "Overview": {title: ["Multiline", [f"{re.escape(tag)}$" for tag in tags]] for title, tags in charts.items()}
    }


def _overview(charts: Mapping[str, Sequence[str]], metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return the last curve of each chart that has a value."""
    present = {title: [tag for tag in tags if tag in metrics] for title, tags in charts.items()}
    return {title: float(metrics[tags[-1]]) for title, tags in present.items() if tags}
