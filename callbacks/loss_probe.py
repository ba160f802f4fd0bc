"""Evaluating a module's training loss without training it."""

from __future__ import annotations

import copy
import inspect
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

_MOST_BYTES = 2**28  # a copy of more than 256 MiB is no longer cheap


class LossProbe:
    """Evaluates the training loss of one batch on copies of a module, which itself stays as it is.

    Whatever a training step changes besides its gradients, such as buffers, counters and metrics, it changes on a copy.
    The loggers see nothing, and each evaluation begins with the same random state, which is put back afterwards.

    Args:
        trainer: The Trainer that is about to run the batch.
        pl_module: The module.
        batch: The batch, as the training step gets it.
        batch_idx: Its number.

    Raises:
        NotPossible: When called, where that can't be done cheaply and safely.
    """

    class NotPossible(Exception):  # noqa: N818 - it is an answer and no error
        """The loss can't be evaluated without side effects, or without a considerable cost."""

    def __init__(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._trainer = trainer
        self._pl_module = pl_module
        self._batch = batch
        self._batch_idx = batch_idx

    def __call__(self, prepare: Callable[[LightningModule], object]) -> float:
        """Return the loss of a copy.

        Args:
            prepare: Gets the copy before its training step.
        """
        if reason := self._obstacle():
            raise self.NotPossible(reason)
        with _random_state_put_back(self._pl_module.device):
            try:
                return self._evaluate(prepare)
            except Exception as error:
                raise self.NotPossible(f"the training step of a copy raised {error!r}") from error

    def _obstacle(self) -> str | None:
        trainer, pl_module = self._trainer, self._pl_module
        if not pl_module.automatic_optimization:
            return "its training step optimizes"
        if trainer.world_size > 1:
            return "its processes might wait for each other"
        if "dataloader_iter" in inspect.signature(pl_module.training_step).parameters:
            return "its training step fetches batches"
        if getattr(pl_module, "_compiler_ctx", None) or any("_orig_mod" in of._modules for of in pl_module.modules()):
            return "a copy would have to be compiled"
        tensors = [*pl_module.parameters(), *pl_module.buffers()]
        if sum(tensor.nelement() * tensor.element_size() for tensor in tensors) > _MOST_BYTES:
            return "a copy of it would be large"
        return None

    def _evaluate(self, prepare: Callable[[LightningModule], object]) -> float:
        twin = self._copy()
        prepare(twin)
        batch = copy.deepcopy(self._batch)
        twin.on_train_batch_start(batch, self._batch_idx)
        takes_index = "batch_idx" in inspect.signature(twin.training_step).parameters
        with self._trainer.precision_plugin.train_step_context():
            output = twin.training_step(batch, self._batch_idx) if takes_index else twin.training_step(batch)
        loss = output["loss"] if isinstance(output, dict) else output
        if not isinstance(loss, Tensor):
            raise TypeError(f"it returned {type(loss).__name__}")
        return float(loss.detach())

    def _copy(self) -> LightningModule:
        trainer = self._trainer
        shared: list[Any] = [trainer, *trainer.callbacks, *trainer.loggers]  # type: ignore[attr-defined]
        for module in self._pl_module.modules():
            shared += [value for value in vars(module).values() if isinstance(value, Dataset | DataLoader)]
        twin = copy.deepcopy(self._pl_module, {id(each): each for each in shared})
        twin.trainer = _Onlooker(trainer)  # type: ignore[assignment]
        for module in twin.modules():
            if hasattr(module, "log_dict"):
                module.log = module.log_dict = _nothing  # type: ignore[assignment]
        return twin


class _Onlooker:
    """The Trainer as a copy sees it, and its strategy: to be read, without what a copy must not touch."""

    _BARRED = ("optimizer", "_lightning_optimizers", "lr_scheduler", "fit_loop", "save_checkpoint", "backward")

    def __init__(self, of: Any) -> None:
        self._of = of

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return type(self._of)  # some modules ask which it is

    def __getattr__(self, name: str) -> Any:
        if any(barred in name for barred in self._BARRED):
            raise LossProbe.NotPossible(f"it touches `{name}` of the Trainer")
        value = getattr(self._of, name)
        if name == "strategy":
            return _Onlooker(value)
        if name == "callbacks":
            return list(value)
        if name == "loggers":
            return [_Nothing() for _ in value]
        return _Nothing() if name == "logger" and value is not None else value


class _Nothing:
    """A logger that takes everything and does nothing."""

    def __getattr__(self, name: str) -> _Nothing:
        return self

    def __call__(self, *_: Any, **__: Any) -> _Nothing:
        return self


@contextmanager
def _random_state_put_back(device: torch.device) -> Iterator[None]:
    numpy: Any = sys.modules.get("numpy")  # who has not imported it draws nothing from it
    python, array = random.getstate(), numpy and numpy.random.get_state()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(python)
            if numpy is not None:
                numpy.random.set_state(array)


def _nothing(*_: Any, **__: Any) -> None:
    pass
