"""What all data modules have in common."""

from abc import ABC, abstractmethod
from collections.abc import Mapping

import lightning.pytorch as pl
import torch
from torch import Tensor

from .loaders.batch_loader import BatchLoader, check_batch_size
from .loaders.resident import resident
from .loaders.seeding import seeded_generator
from .loaders.tensor_loader import TensorLoader

Tensors = Mapping[str, Tensor]


class DataModule(pl.LightningDataModule, ABC):
    """Reads a data set's splits once and hands out loaders over them.

    A batch is a dict: `"x"` holds the raw observations (uint8 images `(B, C, H, W)` or float32 vectors `(B, d)`),
    `"index"` their positions in the split, the same whatever the order, batch size and number of processes, and
    `"label"` their classes where the set has any. Training and validation are parts of the training data; the test
    split is used by `test` and `predict` only, and `predict` runs through all of it in order.

    On a GPU a split that takes at most a quarter of the memory free there is copied there once, as its loader is made,
    and batches are cut there: the same ones, in the same order, with no copy for each.

    Args:
        batch_size: Observations in a batch of one process.
        seed: Seed of the training order, and of whatever else a data set leaves to chance.

    Attributes:
        shape: Shape of one observation, known before the data are read.
        levels: Number of integer levels of the raw data, None for real-valued data.

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

    def setup(self, stage: str) -> None:
        """Read the splits that a stage needs, unless they have been read.

        Args:
            stage: `"fit"` and `"validate"` read training and validation, `"test"` and `"predict"` the test split.
        """
        test = stage in ("test", "predict")
        if ("test" if test else "train") not in self._splits:
            self._splits.update(self._read_test() if test else self._read_train())

    def train_dataloader(self) -> BatchLoader:
        """Return a shuffled loader over the training split (in order under `overfit_batches`)."""
        overfit = self.trainer is not None and self.trainer.overfit_batches > 0  # type: ignore[attr-defined]
        loader = self._loader("train", shuffle=not overfit)
        # A loader made anew, by a second fit or by `reload_dataloaders_every_n_epochs`, continues with fresh orders.
        loader.load_state_dict({"epoch": self.trainer.current_epoch if self.trainer else 0, "position": 0})
        return loader

    def val_dataloader(self) -> BatchLoader:
        """Return a loader over the validation split, in order."""
        return self._loader("val")

    def test_dataloader(self) -> BatchLoader:
        """Return a loader over the test split, in order."""
        return self._loader("test")

    def predict_dataloader(self) -> BatchLoader:
        """Return a loader over the test split, in order."""
        return self._loader("test")

    def _resident(self, split: str) -> Tensors:
        return resident(self._splits[split], self.trainer.strategy.root_device) if self.trainer else self._splits[split]

    @abstractmethod
    def _read_train(self) -> dict[str, Tensors]:
        """Return the splits `"train"` and `"val"`."""

    @abstractmethod
    def _read_test(self) -> dict[str, Tensors]:
        """Return the split `"test"`."""

    def _loader(self, split: str, shuffle: bool = False) -> BatchLoader:
        return TensorLoader(self._resident(split), self.batch_size, shuffle=shuffle, seed=self.seed)


def split_indices(size: int, fraction: float, seed: int, name: str) -> tuple[Tensor, Tensor]:
    """Split positions at random, for good, in two parts that are each in order.

    Args:
        size: Number of observations.
        fraction: Share of the second part.
        seed: Seed of the split.
        name: Name of the option that holds `fraction`, for the error.

    Returns:
        The positions in the first part and those in the second.

    Raises:
        ValueError: If one of the parts would be empty.
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
        tensors: Tensors by name, with one observation per row.
        fraction: Share of the validation split.
        seed: Seed of the split.
    """
    train, val = split_indices(len(tensors["x"]), fraction, seed, name="val_fraction")
    return {
        name: {key: tensor.index_select(0, index) for key, tensor in tensors.items()}
        for name, index in (("train", train), ("val", val))
    }


def check_fraction(name: str, value: float) -> None:
    """Raise unless an option is a fraction.

    Args:
        name: Name of the option.
        value: Its value.

    Raises:
        ValueError: If the value is not between 0 and 1, both excluded.
    """
    if not 0 < value < 1:
        raise ValueError(f"`{name}` must be between 0 and 1, both excluded, got {value}.")
