"""Base class of a split whose observations are in files."""

from abc import abstractmethod
from collections.abc import Sequence

from torch import Tensor
from torch.utils.data import Dataset


class FileSplit(Dataset[dict[str, Tensor]]):
    """Observations in files, each read on access, or all at once."""

    @property
    @abstractmethod
    def names(self) -> Sequence[str]:
        """Name of each observation, for messages and tables."""

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of observations."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Read all observations into memory.

        Raises:
            DataError: If a file is damaged.
        """
