"""The parts of a model that concern its runs: logging, added callbacks, and saving only finite numbers."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback
from torch import Tensor
from typing_extensions import override

from .checkpoints.exact_resume import step_of, trainer_of
from .checkpoints.flush_loggers import is_logging_step
from .checkpoints.guards import check_finite, missing_companions, warn_of_missing_companions
from .knobs import KnobModule
from .running_sums import TrainingMeans


class RunModule(KnobModule):
    """Base class of a module with knobs whose runs are logged, guarded and resumed exactly.

    Its ``training_step`` passes the terms of the loss to :meth:`_record`.

    Attributes:
        training_means: The means of the loss's terms while training.
    """

    def __init__(self) -> None:
        super().__init__()
        self.training_means = TrainingMeans()
        self._adds_companions = False

    def _record(self, terms: Tensor, count: int | Tensor) -> None:
        """Add a batch to the training means, and log them where Lightning logs.

        Args:
            terms: Means of distortion, rate, floored rate, loss, and the added terms.
            count: Number of observations.
        """
        trainer = trainer_of(self)
        if trainer is None:  # a custom training loop
            self.training_means.add(terms, count, 0)
            return
        if not self._adds_companions:  # here, because a subclass may override any hook
            self._adds_companions = True
            warn_of_missing_companions(trainer)
        step = step_of(trainer)
        self.training_means.add(terms, count, step)
        if is_logging_step(trainer, step):
            self._log_training()

    def _log_training(self) -> None:
        self.training_means.check_finite(self.trainer.accumulate_grad_batches)
        # On the CPU, because Lightning reads the progress bar's values in every step from now on.
        values = self.training_means.since_last_logged()
        values |= {f"knobs/{name}": getattr(self, name).cpu() for name in self.knobs}
        shown = {name: values.pop(name) for name in ("train/elbo", "train/rate", "knobs/beta")}
        self.log_dict(shown, prog_bar=True, batch_size=1)
        self.log_dict(values, batch_size=1)

    @override
    def configure_callbacks(self) -> list[Callback]:
        """Return the callbacks that every run needs: ``ExactResume`` and ``Guards``.

        An override must return ``[*super().configure_callbacks(), ...]``.
        """
        self._adds_companions = True
        return missing_companions(self.trainer)

    @override
    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "fit":
            self.training_means.reset()

    @override
    def on_train_epoch_end(self) -> None:
        """Pass on the epoch's means, after checking that they are finite: a short run has no logging step.

        Raises:
            FloatingPointError: If a term of the loss is not finite.
        """
        self.training_means.check_finite(self.trainer.accumulate_grad_batches)
        # For callbacks that monitor the epoch's means; the loggers already have the curve.
        has_ended = self.trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        self.trainer.callback_metrics.update(self.training_means.epoch(has_ended))

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the knobs, after checking that all numbers are finite.

        Raises:
            FloatingPointError: If a term of the loss or a parameter is not finite.
        """
        self.training_means.check_finite(self.trainer.accumulate_grad_batches)
        check_finite(self, self.trainer)
        super().on_save_checkpoint(checkpoint)
