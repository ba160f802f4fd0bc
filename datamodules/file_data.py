"""Base class of the data modules over files of one's own, which may exceed the memory."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from typing_extensions import override

from ..checks import check_number, integer_from
from .base import DataModule, Tensors, check_fraction
from .loaders.batch_loader import BatchLoader
from .loaders.file_split import FileSplit
from .loaders.stream_loader import StreamLoader
from .loaders.tensor_loader import TensorLoader


class FileDataModule(DataModule):
    """Base of the data modules over files of one's own.

    Before the first step the files are checked and split, which prints what they hold. If all splits fit in memory they
    are kept there. Otherwise the observations of each batch are read from the files.

    Args:
        val_fraction: Approximate share kept for validation, of what is not for the test.
        test_fraction: Approximate share kept for the test.
        memory_budget: Memory in GiB that all splits may take as tensors.
        num_workers: Processes that read ahead for each loader, if the data exceed the memory budget; 0 for none.
        batch_size: Observations in a batch of one process.
        seed: Seed of the splits and the training order.
        held_out: Classes to leave out of training and validation.

    Raises:
        ValueError: If an option is out of range.
    """

    flip = False

    def __init__(
        self,
        val_fraction: float,
        test_fraction: float,
        memory_budget: float,
        num_workers: int,
        batch_size: int,
        seed: int,
        held_out: Sequence[int | str],
    ) -> None:
        super().__init__(batch_size=batch_size, seed=seed, held_out=held_out)
        check_number("memory_budget", memory_budget, "at least 0 GiB", lambda gib: gib >= 0)
        check_number("num_workers", num_workers, "at least 0", integer_from(0))
        check_fraction("val_fraction", val_fraction)
        check_fraction("test_fraction", test_fraction)
        self.val_fraction = val_fraction
        self.test_fraction = test_fraction
        self.memory_budget = memory_budget
        self.num_workers = num_workers
        self._files: Mapping[str, FileSplit] = {}
        self._identity: dict[str, Any] = {}  # set with the files

    @override
    def _load(self, stage: str) -> None:
        if not self._files:
            self._files = self._find()
        if self._fits_in_memory():
            super()._load(stage)

    @override
    def file_names(self, stage: str) -> Sequence[str]:
        return self._files["test" if stage == "predict" else stage].names

    @abstractmethod
    def _find(self) -> Mapping[str, FileSplit]:
        """Check the files, hold classes out, split the rest, print what was found, and set `_identity`."""

    @abstractmethod
    def _size(self) -> int:
        """Return the bytes that all splits take as tensors."""

    def _fits_in_memory(self) -> bool:
        return self._size() <= self.memory_budget * 2**30

    @override
    def _hold_out(self, found: dict[str, Tensors]) -> dict[str, Tensors]:
        return found  # `_find` has done it

    @override
    def _report(self, found: Any) -> None:
        """Leave it to `_find`, which knows the files."""

    @override
    def _fingerprint(self) -> dict[str, Any]:
        return self._identity

    @override
    def _read_train(self) -> dict[str, Tensors]:
        return {split: self._files[split].tensors() for split in ("train", "val")}

    @override
    def _read_test(self) -> dict[str, Tensors]:
        return {"test": self._files["test"].tensors()}

    @override
    def _loader(self, split: str, shuffle: bool = False) -> BatchLoader:
        order: dict[str, Any] = {"shuffle": shuffle, "seed": self.seed, "flip": self.flip and split == "train"}
        if self._fits_in_memory():
            return TensorLoader(self._tensors(split), self.batch_size, **order)
        return StreamLoader(self._files[split], self.batch_size, num_workers=self.num_workers, **order)
