"""Cut a data set into batches, in an order that a resumed run continues."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ...checks import check_number, integer_from
from .seeding import seeded_generator

Batch = dict[str, Tensor]


class DataError(ValueError):
    """A fault in the data, with the name of the observation in its message.

    The command line reports it as one message at any time of a run.
    """


class BatchLoader(ABC):
    """Base of the loaders: the order of the batches, the place in it, and each process's share.

    The order of epoch `e` is a permutation drawn from `(seed, e)`. It depends neither on the number of processes nor on
    other random numbers. A shuffled loader is one endless stream, cut into passes of `len(loader)` batches. A pass
    starts where the last one stopped, after a resume as under `limit_train_batches`, and runs on into the next epoch's
    order. An unshuffled loader starts each pass at the first observation.

    Of `n` processes, each takes every n-th observation of the global batch of `n * batch_size`. No observation is
    repeated or left out, and all processes yield the same number of batches. A remainder smaller than `n` joins the
    batch before it, so a share is empty only if the whole set is smaller than `n`. That is an error in a shuffled
    loader.

    Lightning injects no sampler into loaders other than `DataLoader`. It saves and restores their `state_dict`.

    Args:
        size: Number of observations.
        batch_size: Observations in a batch of one process.
        shuffle: Whether each epoch has a different order.
        flip: Whether to mirror each image in `"x"` with probability one half, decided by seed, epoch and index.
        seed: Seed of the order and of the flips.

    Raises:
        ValueError: If `size` or `batch_size` is below 1, or `seed` is no integer.
    """

    def __init__(self, size: int, batch_size: int, shuffle: bool = False, flip: bool = False, seed: int = 0) -> None:
        check_number("size", size, "at least 1", integer_from(1), "Give the loader some observations.")
        check_number("batch_size", batch_size, "at least 1", integer_from(1))
        check_number("seed", seed, "an integer", integer_from())
        self.size = size
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.flip = flip
        self.seed = seed
        self.device = torch.device("cpu")  # where the indices are
        self._epoch = 0
        self._position = 0

    def __len__(self) -> int:
        _, processes = rank_and_world_size()
        full, rest = divmod(self.size, processes * self.batch_size)
        return max(1, full + (rest >= processes))

    @property
    def last_size(self) -> int:
        """Number of observations in the last batch: in the smallest share of it, if there are several processes."""
        _, processes = rank_and_world_size()
        return (self.size - (len(self) - 1) * processes * self.batch_size) // processes

    def __iter__(self) -> Iterator[Batch]:
        rank, processes = rank_and_world_size()
        if self.shuffle and self.size < processes:
            raise ValueError(
                f"{self.size} observations can't be trained on by {processes} processes: each needs at least one in"
                " every batch. Use fewer devices."
            )
        length = len(self)
        global_batch = processes * self.batch_size
        first = self._epoch * length + self._position // global_batch if self.shuffle else 0
        places = [divmod(number, length) for number in range(first, first + length)]
        epochs = {epoch for epoch, _ in places}
        orders = {epoch: self._order(epoch).to(self.device) for epoch in epochs}
        coins = {epoch: self._coins(epoch).to(self.device) for epoch in epochs} if self.flip else {}
        shares = []
        for epoch, number in places:
            stop = (number + 1) * global_batch if number + 1 < length else self.size
            shares.append(orders[epoch][number * global_batch : stop][rank::processes])
        for (epoch, number), batch in zip(places, self._fetch(shares), strict=True):
            # The state advances before the batch is yielded: a save during its step counts it as seen.
            last = number + 1 == length
            self._epoch, self._position = (epoch + 1, 0) if last else (epoch, (number + 1) * global_batch)
            yield _flipped(batch, coins[epoch]) if self.flip else batch

    def state_dict(self) -> dict[str, int]:
        """Return the epoch, and how many of its observations all processes together have taken."""
        return {"epoch": self._epoch, "position": self._position}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Continue at a saved place, in the same order.

        Args:
            state_dict: A loader's `state_dict()`; its batch size and number of processes may have been others.
        """
        self._epoch = state_dict["epoch"]
        self._position = state_dict["position"]

    @abstractmethod
    def _fetch(self, shares: Sequence[Tensor]) -> Iterator[Batch]:
        """Yield the batch of each share, a share being the indices `(B,)` of its observations."""

    def _order(self, epoch: int) -> Tensor:
        if not self.shuffle:
            return torch.arange(self.size)
        return torch.randperm(self.size, generator=seeded_generator(self.seed, epoch, "order"))

    def _coins(self, epoch: int) -> Tensor:
        return torch.rand(self.size, generator=seeded_generator(self.seed, epoch, "flip")) < 0.5


def _flipped(batch: Batch, coins: Tensor) -> Batch:
    mirrored = coins[batch["index"]].view(-1, 1, 1, 1)
    return batch | {"x": torch.where(mirrored, batch["x"].flip(-1), batch["x"])}


def rank_and_world_size() -> tuple[int, int]:
    """Return this process's rank and the number of processes, `(0, 1)` outside a distributed run."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1
