"""Batches of a data set that does not fit in memory."""

from collections.abc import Iterator, Sequence

from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from typing_extensions import override

from ...checks import check_number, integer_from
from .batch_loader import Batch, BatchLoader, DataError
from .seeding import seeded_generator


class StreamLoader(BatchLoader):
    """Batches read by a `DataLoader`, in the order of a `TensorLoader` over the same data.

    The `DataLoader` is hidden from Lightning, which would replace its sampler in a distributed run. On its own it could
    not resume within an epoch.

    Args:
        dataset: Data set with a length, whose items are dicts of tensors, `"index"` among them.
        batch_size: Observations in a batch of one process.
        shuffle: Whether each epoch has a different order.
        flip: Whether to mirror each image in `"x"` with probability one half, decided by seed, epoch and index.
        seed: Seed of the order and of the flips.
        num_workers: Number of processes that read ahead; with 0 the training process reads.

    Raises:
        ValueError: If an option is out of range.
        DataError: If the data set raises it for an item.
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
        check_number("num_workers", num_workers, "at least 0", integer_from(0))
        self.dataset = dataset
        self.num_workers = num_workers

    @override
    def _fetch(self, shares: Sequence[Tensor]) -> Iterator[Batch]:
        loader = DataLoader(
            self.dataset,
            batch_sampler=[share.tolist() for share in shares],
            num_workers=self.num_workers,
            generator=seeded_generator(self.seed, "workers"),  # otherwise the global one seeds the workers
        )
        try:
            yield from loader
        except DataError as error:  # a worker puts its traceback before the message
            raise DataError(str(error).rpartition(f"{DataError.__name__}: ")[2].strip()) from None
