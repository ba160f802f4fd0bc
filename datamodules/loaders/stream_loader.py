"""Batch a data set that does not fit in memory."""

from collections.abc import Iterator, Sequence

from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .batch_loader import Batch, BatchLoader
from .seeding import seeded_generator


class StreamLoader(BatchLoader):
    """Yields batches that a `DataLoader` reads, in the order of a `TensorLoader` of the same set.

    The `DataLoader` is kept inside: Lightning would replace its sampler in a distributed run, and one of its own knows
    no place to resume from.

    Args:
        dataset: Data set with a length, whose items are dicts of tensors, `"index"` among them.
        batch_size: Observations in a batch of one process.
        shuffle: Whether the order is drawn anew each epoch.
        flip: Whether each image in `"x"` is mirrored with probability one half, decided by seed, epoch and index.
        seed: Seed of the order and of the flips.
        num_workers: Number of processes that read ahead; 0 reads in the training process.
    """

    def __init__(
        self,
        dataset: Dataset[Batch],
        batch_size: int,
        shuffle: bool = False,
        flip: bool = False,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        size = len(dataset)  # type: ignore[arg-type]  # torch's Dataset declares no length
        super().__init__(size, batch_size, shuffle=shuffle, flip=flip, seed=seed)
        self.dataset = dataset
        self.num_workers = num_workers

    def _fetch(self, shares: Sequence[Tensor]) -> Iterator[Batch]:
        yield from DataLoader(
            self.dataset,
            batch_sampler=[share.tolist() for share in shares],
            num_workers=self.num_workers,
            generator=seeded_generator(self.seed, "workers"),  # else the global generator gives the workers' seeds
        )
