"""Base class of the data modules, and functions to split a data set."""

from abc import ABC, abstractmethod
from collections.abc import Mapping

import lightning.pytorch as pl
import torch
from torch import Tensor
from typing_extensions import override

from .loaders.batch_loader import BatchLoader, check_batch_size
from .loaders.seeding import seeded_generator
from .loaders.tensor_loader import TensorLoader, place_on_device

Tensors = Mapping[str, Tensor]


class DataModule(pl.LightningDataModule, ABC):
    """Base of the data modules: reads each split once and makes loaders over it.

    A batch is a dict. `"x"` holds the raw observations, uint8 images `(B, C, H, W)` or float32 vectors `(B, d)`.
    `"index"` holds their positions in the split, `(B,)`, which do not depend on the order, the batch size or the number
    of processes. `"label"` holds their classes, `(B,)`, if the data set has any.

    Training and validation are parts of the training data. Only `test` and `predict` use the test split; `predict` goes
    through all of it in order.

    On a GPU, a split that takes at most a quarter of the free memory is copied there once, when its loader is made. Its
    batches are then cut on the GPU: the same batches in the same order, without a copy per batch.

    Args:
        batch_size: Observations in a batch of one process.
        seed: Seed of the training order and of the data set's other random choices.

    Attributes:
        shape: Shape of one observation, known before the data are read.
        levels: Number of integer levels of the raw data; None for real-valued data.

    Raises:
        ValueError: If `batch_size` is below 1.
    """

    shape: tuple[int, ...]
    levels: int | None

    def __init__(self, batch_size: int = 128, seed: int = 0) -> None:
        check_batch_size(batch_size)
        super().__init__()
        self.batch_size = batch_size
        self.seed = seed
        self._splits: dict[str, Tensors] = {}

    @override
    def setup(self, stage: str) -> None:
        """Read the splits that a stage needs, once.

        Args:
            stage: `"fit"` and `"validate"` read training and validation, `"test"` and `"predict"` the test split.
        """
        test = stage in ("test", "predict")
        if ("test" if test else "train") not in self._splits:
            self._splits.update(self._read_test() if test else self._read_train())

    @override
    def train_dataloader(self) -> BatchLoader:
        """Return a shuffled loader over the training split; in order under `overfit_batches`."""
        overfit = self.trainer is not None and self.trainer.overfit_batches > 0  # type: ignore[attr-defined]
        loader = self._loader("train", shuffle=not overfit)
        # A second fit and `reload_dataloaders_every_n_epochs` make a new loader, which must not repeat the first order.
        loader.load_state_dict({"epoch": self.trainer.current_epoch if self.trainer else 0, "position": 0})
        return loader

    @override
    def val_dataloader(self) -> BatchLoader:
        return self._loader("val")

    @override
    def test_dataloader(self) -> BatchLoader:
        return self._loader("test")

    @override
    def predict_dataloader(self) -> BatchLoader:
        return self._loader("test")

    @abstractmethod
    def _read_train(self) -> dict[str, Tensors]:
        """Return the splits `"train"` and `"val"`."""

    @abstractmethod
    def _read_test(self) -> dict[str, Tensors]:
        """Return the split `"test"`."""

    def _loader(self, split: str, shuffle: bool = False) -> BatchLoader:
        return TensorLoader(self._tensors(split), self.batch_size, shuffle=shuffle, seed=self.seed)

    def _tensors(self, split: str) -> Tensors:
        tensors = self._splits[split]
        return place_on_device(tensors, self.trainer.strategy.root_device) if self.trainer else tensors


def split_indices(size: int, fraction: float, seed: int, name: str) -> tuple[Tensor, Tensor]:
    """Split the positions `0, ..., size - 1` at random into two parts.

    Args:
        size: Number of observations.
        fraction: Share of the second part.
        seed: Seed of the split.
        name: Name of the option that holds `fraction`, for the error.

    Returns:
        The positions of the first part and of the second, each in ascending order.

    Raises:
        ValueError: If a part would be empty.
    """
    count = round(size * fraction)
    if not 0 < count < size:
        raise ValueError(
            f"`{name}` must leave observations on both sides, got {fraction} of {size}, which is {count}."
            " Choose another fraction or add data."
        )
    order = torch.randperm(size, generator=seeded_generator(seed, "split"))
    return order[count:].sort().values, order[:count].sort().values


def split_tensors(tensors: Tensors, fraction: float, seed: int) -> dict[str, Tensors]:
    """Split a training set into `"train"` and `"val"`.

    Args:
        tensors: Tensors by name, one observation a row.
        fraction: Share of the validation split.
        seed: Seed of the split.
    """
    train, val = split_indices(len(tensors["x"]), fraction, seed, name="val_fraction")
    return {
        name: {key: tensor.index_select(0, index) for key, tensor in tensors.items()}
        for name, index in (("train", train), ("val", val))
    }


def check_fraction(name: str, value: float) -> None:
    """Raise a ValueError unless the option `name` lies between 0 and 1, both excluded."""
    if not 0 < value < 1:
        raise ValueError(f"`{name}` must be between 0 and 1, both excluded, got {value}.")
