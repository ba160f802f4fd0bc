"""Write the posterior means and the scores of ``predict`` to a file, batch by batch."""

from __future__ import annotations

import csv
import gzip
import heapq
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from ..vae import VAE
from .measure import check_sizes
from .scores import score


class LatentsWriter(Callback):
    """Write the scores and the posterior means of ``predict`` as CSV, a row for each observation.

    The columns are ``index``; ``label``, if there are labels; ``elbo``, ``rate`` and ``distortion``, in nats, with
    ``importance_samples`` also ``nll`` and ``effective_sample_size``, see :func:`lightning_vae.score`; and the means
    ``z0``, ``z1``, ... A data module with ``file_names(stage)`` or ``class_names`` also gives the columns ``file`` and
    ``class``: the entries at ``index`` and at ``label``. A module that is no VAE of this package, or whose own
    ``predict_step`` is not the VAE's, has no scores.

    Each batch is written immediately, so memory does not grow with the data. Each process writes its own part. At the
    end the first process merges the parts in the order of ``index`` and drops observations that a sampler has
    duplicated. The file appears under its name when it is complete.

    It is not a ``BasePredictionWriter``: with one, Lightning asks every loader for the indices of its batches, and
    warns about each that is not a ``torch.utils.data.DataLoader``.

    Args:
        path: File to write; a name that ends in ``.gz`` is compressed. ``None`` is ``latents.csv`` in the run folder.
        importance_samples: Number K of samples for each observation, for the log-likelihood. ``None`` leaves it out.

    Raises:
        ValueError: If ``importance_samples`` is not an integer of at least 1.
        MisconfigurationException: If there are several loaders, if the module's ``predict_step`` does not return a
            mapping with ``"mean"`` and ``"index"``, if ``importance_samples`` are asked of a module that has no scores,
            or if the first process can't see the others' parts.
    """

    def __init__(self, path: str | None = None, importance_samples: int | None = None) -> None:
        if importance_samples is not None:
            check_sizes(importance_samples=importance_samples)
        self.path = path
        self.importance_samples = importance_samples
        self._target = Path()
        self._count = 0  # observations so far
        self._file: IO[str] | None = None
        self._has_header = False

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        folder = trainer.log_dir or trainer.default_root_dir  # broadcasts: every process must call it
        self._target = Path(self.path) if self.path else Path(folder) / "latents.csv"
        if len(trainer.num_predict_batches) > 1:
            raise MisconfigurationException("`predict` writes the latents of one loader, but there are several.")
        if self.importance_samples is not None and not _has_scores(pl_module):
            raise MisconfigurationException(
                f"`importance_samples` needs a lightning_vae.VAE with its own `predict_step`, got "
                f"{type(pl_module).__name__}. Leave it out."
            )
        self._count = 0
        self._target.parent.mkdir(parents=True, exist_ok=True)
        part = self._part(trainer.global_rank)
        part.unlink(missing_ok=True)  # an interrupted earlier run may have left it
        self._file, self._has_header = open_table(part, "w"), False

    @override
    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: Any, **__: Any
    ) -> None:
        if not (isinstance(outputs, Mapping) and {"mean", "index"} <= outputs.keys()):
            raise MisconfigurationException(
                f"`predict_step` of {type(pl_module).__name__} must return a mapping with 'mean', 'index' and "
                "optionally 'label' for its latents to be written."
            )
        assert self._file is not None
        columns = {name: outputs[name] for name in ("index", "label") if name in outputs}
        columns |= _names(trainer, columns)
        if isinstance(pl_module, VAE) and _has_scores(pl_module):
            observations = pl_module.observe(batch, first=self._count)  # numbered as `predict_step` numbers them
            self._count += len(observations)
            columns |= score(pl_module, observations, self.importance_samples)
        columns["z"] = outputs["mean"].flatten(start_dim=1)
        writer = csv.writer(self._file)
        if not self._has_header:
            writer.writerow(_header(columns))
            self._has_header = True
        writer.writerows(_rows(columns))

    @override
    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._close()
        trainer.strategy.barrier()
        if not trainer.is_global_zero:
            return
        parts = [self._part(rank) for rank in range(trainer.world_size)]
        if missing := [part.name for part in parts if not part.exists()]:
            raise MisconfigurationException(
                f"The latents stay in parts: {', '.join(missing)} can't be seen from the first process. Write to a "
                "folder that all machines share."
            )
        if len(parts) == 1:
            os.replace(parts[0], self._target)
        else:
            _merge(parts, self._target)
        print(f"\nLatents:    {os.path.relpath(self._target)}")

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._file is not None:  # half a table is of no use to a later run
            self._close()
            self._part(trainer.global_rank).unlink()

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _part(self, rank: int) -> Path:
        # Keep the suffix last: it determines the compression.
        return self._target.with_name(f".part{rank}-{self._target.name}")


def _has_scores(module: LightningModule) -> bool:
    return getattr(module.predict_step, "__func__", None) is VAE.predict_step


def _names(trainer: Trainer, columns: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return the file and the class of each row, if the data module names them."""
    data = getattr(trainer, "datamodule", None)
    files, classes = getattr(data, "file_names", None), getattr(data, "class_names", None)
    sources = {"file": ("index", files("predict") if callable(files) else None), "class": ("label", classes)}
    return {
        name: [table[number] for number in columns[key].tolist()]
        for name, (key, table) in sources.items()
        if table and isinstance(columns.get(key), Tensor)
    }


def _header(columns: Mapping[str, Any]) -> list[str]:
    names: list[str] = []
    for name, values in columns.items():
        wide = isinstance(values, Tensor) and values.ndim > 1
        names += [f"{name}{number}" for number in range(values.shape[1:].numel())] if wide else [name]
    return names


def _rows(columns: Mapping[str, Any]) -> Iterator[list[Any]]:
    """Yield one row per observation; nine digits represent a float32 exactly, seventeen a float64."""
    parts = []
    for values in columns.values():
        if not isinstance(values, Tensor):
            parts.append([[value] for value in values])
            continue
        table = values.detach().cpu()
        table = table.flatten(start_dim=1) if table.ndim > 1 else table[:, None]
        digits = 17 if table.element_size() > 4 else 9
        floating = table.is_floating_point()
        parts.append([[f"{value:.{digits}g}" for value in row] if floating else row for row in table.tolist()])
    return ([cell for cells in row for cell in cells] for row in zip(*parts, strict=True))


def open_table(path: Path, mode: str) -> IO[str]:
    """Open a CSV file for reading (``"r"``) or writing (``"w"``); one whose name ends in ``.gz`` is compressed."""
    opener: Any = gzip.open if path.suffix == ".gz" else open
    file: IO[str] = opener(path, f"{mode}t", newline="", encoding="utf-8")
    return file


def _merge(parts: Iterable[Path], target: Path) -> None:
    """Merge files that are each sorted by the first column, without holding them in memory."""
    whole = target.with_name(f".whole-{target.name}")
    with ExitStack() as stack:
        readers = [csv.reader(stack.enter_context(open_table(part, "r"))) for part in parts]
        writer = csv.writer(stack.enter_context(open_table(whole, "w")))
        # A process without observations has not written a header either.
        header = [names for reader in readers if (names := next(reader, None))]
        writer.writerows(header[:1])
        before = None
        for row in heapq.merge(*readers, key=lambda row: natural_order(row[0])):
            if row[0] != before:
                writer.writerow(row)
            before = row[0]
    os.replace(whole, target)
    for part in parts:
        part.unlink()


def natural_order(text: str) -> tuple[int, int, str]:
    """Return a key that sorts numbers by value, and then names alphabetically."""
    return (0, int(text), "") if re.fullmatch(r"-?\d+", text) else (1, 0, text)
