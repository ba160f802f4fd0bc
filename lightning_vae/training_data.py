"""The number of a run's observations, and the first ones of its training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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


def first_observations(trainer: Trainer, number: int, read: Callable[[Any], Sequence[Tensor]]) -> list[Tensor]:
    """Return the first observations of the training data, the same in each process. Training still starts with them.

    Args:
        trainer: The Trainer that is about to train.
        number: Number of observations.
        read: From a batch to tensors with a row for each of its observations.

    Returns:
        These tensors, with ``number`` rows.

    Raises:
        ValueError: If there are fewer.
    """
    loader: Any = trainer.train_dataloader
    place = loader.state_dict() if hasattr(loader, "state_dict") else None
    if place is not None and "position" in place:  # one of this package's: from the start of an epoch, without repeats
        loader.load_state_dict({**place, "position": 0})
    processes = torch.distributed.get_world_size() if several_processes() else 1
    share = -(-number // processes)
    found: list[Sequence[Tensor]] = []
    with torch.random.fork_rng(), torch.no_grad():
        for batch in loader:
            found.append(read(batch))
            if sum(len(rows) for rows, *_ in found) >= share:
                break
    if place is not None:
        loader.load_state_dict(place)
    rows = [_gathered(torch.cat(parts)[:share], share, processes)[:number] for parts in zip(*found, strict=True)]
    if (there := len(rows[0])) < number:  # in every process alike
        raise ValueError(
            f"`prior` starts from {number} observations, and there are only {there} for training. Set its `components` "
            f"to at most {there}."
        )
    return rows


def _gathered(x: Tensor, share: int, processes: int) -> Tensor:
    """Join the rows of all processes, at most ``share`` of each."""
    if processes == 1:
        return x
    padded = torch.cat([x, x.new_zeros(share - len(x), *x.shape[1:])])
    rows = [torch.empty_like(padded) for _ in range(processes)]
    counts = [torch.empty(1, dtype=torch.int64, device=x.device) for _ in range(processes)]
    torch.distributed.all_gather(rows, padded)
    torch.distributed.all_gather(counts, torch.tensor([len(x)], device=x.device))
    return torch.cat([part[: int(count)] for part, count in zip(rows, counts, strict=True)])
