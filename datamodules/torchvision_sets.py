"""Base class of the data sets that torchvision downloads."""

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from .base import DataModule, Tensors, check_fraction, split_tensors


class TorchVision(DataModule):
    """A data set that torchvision can download; files already on disk are used as they are.

    The images are kept in memory as uint8 tensors. The largest set takes 225 MB.

    Args:
        root: Folder of the data, in torchvision's layout. `~` is the home folder.
        download: Whether to download missing data. One process does.
        batch_size: Observations in a batch of one process.
        val_fraction: Share of the official training split kept for validation.
        seed: Seed of the training order and of the validation split.
        held_out: Labels to leave out of training and validation, such as `[3]`.

    Raises:
        ValueError: If an option is out of range.
    """

    levels = 256

    def __init__(
        self,
        root: str | Path = "data",
        download: bool = True,
        batch_size: int = 128,
        val_fraction: float = 0.1,
        seed: int = 0,
        held_out: Sequence[int | str] = (),
    ) -> None:
        super().__init__(batch_size=batch_size, seed=seed, held_out=held_out)
        check_fraction("val_fraction", val_fraction)
        self.root = Path(root).expanduser()
        self.download = download
        self.val_fraction = val_fraction

    @override
    def prepare_data(self) -> None:
        """Download the data if they are missing.

        Raises:
            FileNotFoundError: If the data are missing and `download` is off or fails.
        """
        if self._present():
            return
        name = type(self).__name__
        remedy = f"Put {self._layout()} there by hand, or set `root` to the folder that has it."
        if not self.download:
            raise FileNotFoundError(
                f"{name} was not found in `root` ({self.root}), and `download` is off. {remedy} Or set `download` to"
                " true."
            )
        try:
            self._download()
        except (OSError, RuntimeError) as error:
            raise FileNotFoundError(
                f"{name} was not found in `root` ({self.root}), and its download failed ({error}). {remedy}"
            ) from error

    @override
    def _read_train(self) -> dict[str, Tensors]:
        return split_tensors(self._read(train=True), self.val_fraction, self.seed)

    @override
    def _read_test(self) -> dict[str, Tensors]:
        return {"test": self._read(train=False)}

    @property
    def _torchvision(self) -> Any:
        """The class of the same name in torchvision."""
        import torchvision

        return getattr(torchvision.datasets, type(self).__name__)

    @abstractmethod
    def _layout(self) -> str:
        """Describe, in words, the files that belong in `root`."""

    @abstractmethod
    def _present(self) -> bool:
        """Return whether the files are there, without reading them."""

    @abstractmethod
    def _download(self) -> None:
        """Download both splits into `root`."""

    @abstractmethod
    def _read(self, train: bool) -> dict[str, Tensor]:
        """Read the official training or test split."""


def as_uint8(images: Any) -> Tensor:
    """Return a uint8 NumPy array `(N, C, H, W)` as a contiguous tensor."""
    return torch.from_numpy(images).contiguous()
