"""Base class of the callbacks, for both Lightning packages."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

_OLDEST = {"torch": "2.6", "lightning.pytorch": "2.5", "pytorch_lightning": "2.5"}


def _is_supported(package: ModuleType) -> bool:
    """Return whether a package is new enough: an older one would fail in the middle of a run."""
    installed, oldest = (re.findall(r"\d+", text)[:2] for text in (package.__version__, _OLDEST[package.__name__]))
    return list(map(int, installed)) >= list(map(int, oldest))


if TYPE_CHECKING:
    from lightning.pytorch import Callback as _Callback
    from lightning.pytorch import LightningModule, Trainer
else:
    # `lightning.pytorch` and `pytorch_lightning` have distinct class trees, and the Trainer and LightningCLI of each
    # refuse the other's callbacks. Deriving from both satisfies both; every hook has the same signature in each.
    _bases, _found = [], [f"torch {torch.__version__}"]
    for _name in ("lightning.pytorch", "pytorch_lightning"):
        try:
            _package = importlib.import_module(_name)
        except ImportError as _error:
            _found.append(f"no {_name} ({_error})")
            continue
        _found.append(f"{_name} {_package.__version__}")
        if _is_supported(_package):
            _bases.append(_package.Callback)
    if not (_bases and _is_supported(torch)):
        raise ImportError(
            f"These callbacks need torch {_OLDEST['torch']} and lightning or pytorch_lightning "
            f"{_OLDEST['lightning.pytorch']}, or newer ones, but found {', '.join(_found)}."
        )
    _Callback = type("_Callback", tuple(dict.fromkeys(_bases)), {})


class Callback(_Callback):
    """Base of this package's callbacks: a Lightning callback that the Trainers of both Lightning packages accept.

    It also provides what Lightning does not expose publicly: the number of the step, the decision to log at it, and a
    cleanup that runs however the run ends.
    """

    def keyed_by(self, **options: Any) -> str:
        """Return a ``state_key`` that tells callbacks of this class apart by their options."""
        return self._generate_state_key(**options)

    @staticmethod
    def step(trainer: Trainer) -> int:
        """Return the number of batches that stepped before this one: the loggers' own x-axis.

        It equals ``trainer.global_step`` under automatic optimization. Under manual optimization every batch counts as
        one, while ``global_step``, and with it ``max_steps``, counts each step of each optimizer.
        """
        return int(trainer.fit_loop.epoch_loop._batches_that_stepped)

    @staticmethod
    def accumulates(trainer: Trainer) -> bool:
        """Return whether this training batch only accumulates gradients, for a later one to step.

        Meant for ``on_train_batch_end``; a module that optimizes manually is assumed to step in each batch.
        """
        return bool(trainer.fit_loop._should_accumulate()) and trainer.lightning_module.automatic_optimization

    @staticmethod
    def logs_now(trainer: Trainer) -> bool:
        """Return whether the Trainer passes the values of this training batch to the loggers.

        Meant for ``on_train_batch_end``; a batch that only accumulates gradients never logs.
        """
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        step = trainer.fit_loop.epoch_loop._batches_that_stepped + 1
        # The same decision as Lightning's, in a tenth of the time.
        logs = (every and step % every == 0) or getattr(trainer, "fast_dev_run", False)
        return bool(logs) and not Callback.accumulates(trainer)

    @staticmethod
    def log_now(
        pl_module: LightningModule, values: dict[str, Tensor | float], prog_bar: bool = False, sync: bool = False
    ) -> None:
        """Log values under the given keys: to every logger, for monitors and, with ``prog_bar``, in the progress bar.

        Meant for ``on_train_batch_end`` on logging steps, the end of an epoch, and ``on_validation_epoch_end``. At the
        end of an epoch Lightning needs ``sync`` if there are several processes.

        The values are copied to the CPU once, because Lightning reads those of the progress bar in every later step.
        """
        tensors: dict[str, Any] = {
            name: value.detach().float() if isinstance(value, Tensor) else torch.tensor(float(value))
            for name, value in values.items()
        }
        tensors = {name: value.to(pl_module.device) if sync else value.cpu() for name, value in tensors.items()}
        pl_module.log_dict(tensors, prog_bar=prog_bar, batch_size=1, rank_zero_only=False, sync_dist=sync)

    @staticmethod
    def take_up_loaders(trainer: Trainer) -> None:
        """Restore the positions of a resumed run's loaders if the loaders were made before Lightning restores them.

        Meant for ``on_train_start``. Reading ``trainer.estimated_stepping_batches`` early, as schedules do, makes the
        loaders before Lightning has read their positions from the checkpoint, and it would then forget them.
        """
        loop = trainer.fit_loop
        if loop._combined_loader is not None and loop._combined_loader_states_to_load:
            loop._combined_loader._load_state_dicts(loop._combined_loader_states_to_load)
            loop._combined_loader_states_to_load = []
            iter(loop._data_fetcher)  # type: ignore[arg-type]

    @staticmethod
    def at_end(trainer: Trainer, clean_up: Callable[[], None]) -> None:
        """Call a function when the Trainer's run ends, however it ends.

        After an exception Lightning skips every ``teardown`` hook, and a project that empties ``trainer.callbacks``
        while it fails (disent does) also skips ``on_exception``. The strategy is always torn down.
        """
        strategy = trainer.strategy
        before = vars(strategy).get("teardown")  # set by callbacks that registered earlier
        strategy.teardown = _CleanUp(strategy, before, clean_up)  # type: ignore[method-assign]

    @staticmethod
    def around_saves(trainer: Trainer, context: Callable[[], AbstractContextManager[None]]) -> None:
        """Enter a context around each save of a checkpoint, until the Trainer's run ends.

        Lightning calls no hook of a callback when it saves weights alone.
        """
        save = _SaveWithin(trainer, context)
        Callback.at_end(trainer, save.remove)
        trainer.save_checkpoint = save  # type: ignore[method-assign]


class _CleanUp:
    """A strategy's ``teardown`` that first runs a cleanup, once. It is a class so that a Trainer can be pickled."""

    def __init__(self, strategy: Any, before: Any, clean_up: Callable[[], None]) -> None:
        self._strategy = strategy
        self._before = before
        self._clean_up = clean_up

    def __call__(self) -> None:
        vars(self._strategy).pop("teardown", None)
        if self._before is not None:
            self._strategy.teardown = self._before
        try:
            self._clean_up()
        except Exception as error:  # it must not hide the error that ended the run
            rank_zero_warn(f"Cleaning up after the run failed: {error}")
        self._strategy.teardown()


class _SaveWithin:
    """A Trainer's ``save_checkpoint`` within a context. A class, so that a Trainer can be pickled."""

    def __init__(self, trainer: Any, context: Callable[[], AbstractContextManager[None]]) -> None:
        self._trainer = trainer
        self._before = vars(trainer).get("save_checkpoint")  # of callbacks that asked already
        self._save = trainer.save_checkpoint
        self._context = context

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        with self._context():
            self._save(*args, **kwargs)

    def remove(self) -> None:
        if vars(self._trainer).get("save_checkpoint") is self:
            del self._trainer.save_checkpoint
            if self._before is not None:
                self._trainer.save_checkpoint = self._before


def several_processes(trainer: Trainer) -> bool:
    """Return whether the run shares its batches among several processes."""
    return trainer.world_size > 1


def validates(trainer: Trainer) -> bool:
    """Return whether the run has validation passes. Their loaders may not be known yet."""
    every, epochs = trainer.check_val_every_n_epoch, trainer.max_epochs
    if every is not None and epochs is not None and 0 <= epochs < every:
        return False
    return trainer.enable_validation and (trainer.val_dataloaders is None or sum(trainer.num_val_batches) > 0)


def counts_optimizer_steps(trainer: Trainer) -> bool:
    """Return whether the run ends after a number of optimizer steps, of which a batch may take any number."""
    return trainer.max_steps != -1 and not trainer.lightning_module.automatic_optimization


def sum_over_processes(trainer: Trainer, values: Tensor) -> Tensor:
    """Sum a tensor over the processes of a run, in place, and return it."""
    if several_processes(trainer):
        torch.distributed.all_reduce(values)  # the strategy's own `reduce` waits at a barrier first
    return values


def mean_over_processes(trainer: Trainer, rows: Tensor) -> Tensor:
    """Average rows of shape ``(B, k)`` over the observations of all processes, shape ``(k,)``."""
    sums = sum_over_processes(trainer, torch.cat([rows.sum(0), rows.new_full((1,), len(rows))]))
    return sums[:-1] / sums[-1]


def callbacks_of(trainer: Trainer) -> list[Any]:
    """Return a Trainer's callbacks."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    return callbacks


def averages_of(trainer: Trainer) -> list[Any]:
    """Return the averaged copies of the module that weight-averaging callbacks hold."""
    kept = [each for callback in callbacks_of(trainer) for each in vars(callback).values()]
    return [each.module for each in kept if isinstance(each, AveragedModel)]


def knobs_of(pl_module: Any) -> Mapping[str, float | None]:
    """Return the knobs that a module offers: the number that each is configured with, if any."""
    knobs = getattr(pl_module, "knobs", None)  # which may be anything in a module of another project
    return knobs if isinstance(knobs, Mapping) else {}


def writes_hparams(logger: Any) -> bool:
    """Return whether a TensorBoardLogger fills the HParams page itself, as it does with ``default_hp_metric``."""
    return bool(getattr(logger, "_default_hp_metric", True))
