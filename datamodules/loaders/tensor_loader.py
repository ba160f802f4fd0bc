"""Batches of tensors in memory."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor
from typing_extensions import override

from .batch_loader import Batch, BatchLoader

_FREE_SHARE = 0.25  # of the memory free when a loader is made: optimizer and activations come later


class TensorLoader(BatchLoader):
    """Batches of equally long tensors, cut with one `index_select` per tensor.

    Order, resuming and the share of each process are `BatchLoader`'s. A batch is a copy, so changing it in place does
    not change the data. Its entry `"index"` holds the positions of its observations in the tensors.

    Args:
        tensors: Tensors by name, one observation a row. Batches are made on the tensors' device.
        batch_size: Observations in a batch of one process.
        shuffle: Whether each epoch has a different order.
        flip: Whether to mirror each image in `"x"` with probability one half, decided by seed, epoch and index.
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
            raise ValueError(f"`tensors` must hold one or more tensors of equal length, got lengths {lengths}.")
        super().__init__(next(iter(lengths.values())), batch_size, shuffle=shuffle, flip=flip, seed=seed)
        self.tensors = dict(tensors)
        self.device = next(iter(tensors.values())).device
        if "x" in tensors:
            _check_finite(tensors["x"])

    @override
    def _fetch(self, shares: Sequence[Tensor]) -> Iterator[Batch]:
        for index in shares:
            batch = {name: torch.index_select(tensor, 0, index) for name, tensor in self.tensors.items()}
            yield batch | {"index": index}


def place_on_device(tensors: Mapping[str, Tensor], device: torch.device) -> Mapping[str, Tensor]:
    """Copy tensors to a GPU (CUDA or ROCm) if they take at most a quarter of its free memory; else return them as is.

    Args:
        tensors: Tensors by name.
        device: The device that the batches are for.
    """
    if device.type != "cuda":
        return tensors
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if size > _FREE_SHARE * torch.cuda.mem_get_info(device)[0]:
        return tensors
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def _check_finite(x: Tensor) -> None:
    if not (x.is_floating_point() and x.numel()) or torch.stack(torch.aminmax(x)).isfinite().all():
        return
    places = (~x.flatten(1).isfinite()).any(dim=1).nonzero().flatten() if x.dim() > 1 else (~x.isfinite()).nonzero()
    raise ValueError(
        f"The data ('x') must be finite, got NaN or infinity in {len(places)} of {len(x)} observations, first in number"
        f" {int(places[0])}. Remove or fix them."
    )
