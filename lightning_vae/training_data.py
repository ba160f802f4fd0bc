"""The number of a run's observations, and the first ones of its training."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.trainer.states import RunningStage
from torch import Tensor

from .distributed import several_processes

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


def data_size(trainer: Trainer | None, number: int = 0) -> int | None:
    """Return the number of observations in the data that a Trainer is passing through, those of all processes.

    Args:
        trainer: The Trainer.
        number: Number of the loader, of several in a validation or a test.

    Returns:
        The number; ``None`` if it is not known.
    """
    loader: Any = None
    if trainer is not None:
        stage = trainer.state.stage
        is_test, is_training = stage == RunningStage.TESTING, stage == RunningStage.TRAINING
        loader = trainer.test_dataloaders if is_test else trainer.val_dataloaders
        loader = trainer.train_dataloader if is_training else loader
    loader = loader[number] if isinstance(loader, list | tuple) else loader
    if isinstance(size := getattr(loader, "size", None), int):  # one of this package's
        return size
    try:
        return len(loader.dataset)
    except (AttributeError, TypeError):
        return None


def first_observations(trainer: Trainer, number: int, scaled: Callable[[Any], Tensor]) -> Tensor:
    """Return the first observations of the training data, the same in each process. Training still starts with them.

    Args:
        trainer: The Trainer that is about to train.
        number: Number of observations.
        scaled: From a batch to its observations in the networks' scale.

    Raises:
        ValueError: If there are fewer.
    """
    loader: Any = trainer.train_dataloader
    place = loader.state_dict() if hasattr(loader, "state_dict") else None
    found: list[Tensor] = []
    count = 0
    with torch.random.fork_rng(), torch.no_grad():
        for batch in loader:
            found.append(scaled(batch))
            count += len(found[-1])
            if count >= number:
                break
    if place is not None:
        loader.load_state_dict(place)
    if count < number:
        raise ValueError(f"`prior` starts from {number} observations, and there are only {count} for training.")
    x = torch.cat(found)[:number].contiguous()
    if several_processes():
        torch.distributed.broadcast(x, 0)
    return x
