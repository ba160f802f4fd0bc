"""Scikit-learn's handwritten digits, which need no download."""

from collections.abc import Sequence

import torch
from torch import Tensor
from typing_extensions import override

from .base import DataModule, Tensors, check_fraction, split_tensors


class Digits(DataModule):
    """Scikit-learn's 1797 handwritten digits: images of 8 by 8 pixels with values from 0 to 16, and labels.

    There is no official test split. Here it is the last 297 images in file order; the validation split is a seeded part
    of the 1500 before them.

    Args:
        batch_size: Observations in a batch of one process.
        val_fraction: Share of the first 1500 images kept for validation.
        seed: Seed of the training order and of the validation split.
        held_out: Digits to leave out of training and validation, such as `[3]`.

    Raises:
        ValueError: If an option is out of range.
    """

    shape = (1, 8, 8)
    levels = 17

    def __init__(
        self,
        batch_size: int = 128,
        val_fraction: float = 0.1,
        seed: int = 0,
        held_out: Sequence[int | str] = (),
    ) -> None:
        super().__init__(batch_size=batch_size, seed=seed, held_out=held_out)
        check_fraction("val_fraction", val_fraction)
        self.val_fraction = val_fraction

    @override
    def _read_train(self) -> dict[str, Tensors]:
        return split_tensors({name: tensor[:1500] for name, tensor in _read().items()}, self.val_fraction, self.seed)

    @override
    def _read_test(self) -> dict[str, Tensors]:
        return {"test": {name: tensor[1500:] for name, tensor in _read().items()}}


def _read() -> dict[str, Tensor]:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return {
        "x": torch.from_numpy(images).to(torch.uint8).view(-1, 1, 8, 8),
        "label": torch.from_numpy(labels).to(torch.int64),
    }
