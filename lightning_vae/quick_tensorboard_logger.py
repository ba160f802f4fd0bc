"""TensorBoard's curves for less."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from tensorboard.compat.proto.summary_pb2 import Summary
from typing_extensions import override


class QuickTensorBoardLogger(TensorBoardLogger):
    """Writes what is logged at a step as one event, and does not wait until it is written.

    The curves are those of Lightning's ``TensorBoardLogger``, and so are the options. That one makes an event of each
    value (as this one does where there is a ``prefix``), and flushes at each logging step, which waits for the thread
    that writes them. Here they are in the file as soon as that thread has come to it, where files are local and
    TensorFlow is not installed; else after ``flush_secs``, 120 if not given. So ``save`` does not flush, and a process
    that is killed may lose the last few values: :class:`FlushLoggers` flushes before each checkpoint, and
    ``logger.experiment.flush()`` does at any time.

    Example::

        Trainer(logger=QuickTensorBoardLogger("logs", default_hp_metric=False), callbacks=[FlushLoggers()])
    """

    _has_saved = False

    @override
    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Write the values as one event."""
        try:
            values = [Summary.Value(tag=tag, simple_value=float(value)) for tag, value in metrics.items()]
        except (TypeError, ValueError):  # several curves under one name, or something to complain of
            values = []
        if self._prefix or not values:
            super().log_metrics(metrics, step)
        else:
            self.experiment._get_file_writer().add_summary(Summary(value=values), step)

    @override
    @rank_zero_only
    def save(self) -> None:
        """Write what describes the run, once; Lightning asks for it whenever something is logged."""
        if not self._has_saved:
            super().save()
            self._has_saved = True
