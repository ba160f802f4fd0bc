"""Batch tensors that lie in memory by indexing."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from .batch_loader import Batch, BatchLoader


class TensorLoader(BatchLoader):
    """Yields batches of equally long tensors, one `index_select` a tensor and batch.

    Order, resume, and sharing between processes are `BatchLoader`'s. Each batch is a copy, so that changing it in place
    leaves the set alone, and has an entry `"index"` with the observations' positions in the tensors.

    Args:
        tensors: Tensors by name, with one observation per row. Where they lie, the batches are made: a set on a GPU
            has nothing left to be copied there.
        batch_size: Observations in a batch of one process.
        shuffle: Whether the order is drawn anew each epoch.
        flip: Whether each image in `"x"` is mirrored with probability one half, decided by seed, epoch and index.
        seed: Seed of the order and of the flips.

    Raises:
        ValueError: If the tensors differ in length or are empty, `"x"` holds a NaN or an infinity, or `batch_size` is
            below 1.

    Example::

        >>> loader = TensorLoader({"x": torch.tensor([[0.0], [0.1], [0.2]])}, batch_size=2)
        >>> [batch["index"].tolist() for batch in loader]
        [[0, 1], [2]]
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        batch_size: int,
        shuffle: bool = False,
        flip: bool = False,
        seed: int = 0,
    ) -> None:
        lengths = {name: len(tensor) for name, tensor in tensors.items()}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"`tensors` must be equally long and at least one, got lengths {lengths}.")
        super().__init__(next(iter(lengths.values())), batch_size, shuffle=shuffle, flip=flip, seed=seed)
        self.tensors = dict(tensors)
        self.device = next(iter(tensors.values())).device
        if "x" in tensors:
            _check_finite(tensors["x"])

    def _fetch(self, shares: Sequence[Tensor]) -> Iterator[Batch]:
        for index in shares:
            batch = {name: torch.index_select(tensor, 0, index) for name, tensor in self.tensors.items()}
            yield batch | {"index": index}


def _check_finite(x: Tensor) -> None:
    if not (x.is_floating_point() and x.numel()) or torch.stack(torch.aminmax(x)).isfinite().all():
        return
    places = (~x.flatten(1).isfinite()).any(dim=1).nonzero().flatten() if x.dim() > 1 else (~x.isfinite()).nonzero()
    raise ValueError(
        f"The data ('x') must be finite, got NaN or infinity in {len(places)} of {len(x)} observations, first in number"
        f" {int(places[0])}. Remove or mend them."
    )
