"""A folder of your own images."""

import math
from pathlib import Path

import torch
from typing_extensions import override

from .base import DataModule, Tensors, check_fraction, split_indices
from .loaders.batch_loader import BatchLoader
from .loaders.image_files import ImageFiles, find_images
from .loaders.stream_loader import StreamLoader
from .loaders.tensor_loader import TensorLoader


class Images(DataModule):
    """A folder of images of any size, flat or with one sub-folder for each class.

    Images are resized until they just cover `size`, then cropped in the centre. Files come in the order of their paths.
    With class folders, the label of an image is the number of its class folder in alphabetical order. Without
    `test_root`, a part of the images is kept for the test and then a part of the rest for validation.

    Images within `memory_budget` are read once and kept in memory as uint8. More images than that are read from their
    files during training, in the same order and with the same flips.

    Args:
        root: Folder of images, or of class folders of images.
        size: Height and width of each image as a tensor, or one number for both.
        channels: 1 for grey, 3 for colour.
        flip: Whether to mirror each training image left to right with probability one half.
        test_root: Folder of the test images, laid out like `root`. Without it they are a part of `root`.
        val_fraction: Share kept for validation, of the images that are not for the test.
        test_fraction: Share kept for the test, if there is no `test_root`.
        memory_budget: Memory in GiB that the images of all splits may take as tensors.
        num_workers: Processes that read ahead for each loader, if the images exceed the memory budget; 0 for none.
        batch_size: Observations in a batch of one process.
        seed: Seed of the splits, the training order and the flips.

    Raises:
        ValueError: If an option is out of range.
    """

    levels = 256

    def __init__(
        self,
        root: str | Path,
        size: int | tuple[int, int],
        channels: int = 3,
        flip: bool = False,
        test_root: str | Path | None = None,
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        memory_budget: float = 2.0,
        num_workers: int = 2,
        batch_size: int = 128,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, seed=seed)
        sides = (size, size) if isinstance(size, int) else tuple(size)
        if len(sides) != 2 or min(sides) < 1:
            raise ValueError(f"`size` must be at least 1, got {size}: one number, or height and width.")
        if channels not in (1, 3):
            raise ValueError(f"`channels` must be 1 (grey) or 3 (colour), got {channels}.")
        if not memory_budget >= 0:
            raise ValueError(f"`memory_budget` must be at least 0 GiB, got {memory_budget}.")
        if num_workers < 0:
            raise ValueError(f"`num_workers` must be at least 0, got {num_workers}.")
        check_fraction("val_fraction", val_fraction)
        check_fraction("test_fraction", test_fraction)
        self.root = Path(root)
        self.test_root = Path(test_root) if test_root is not None else None
        self.flip = flip
        self.val_fraction = val_fraction
        self.test_fraction = test_fraction
        self.memory_budget = memory_budget
        self.num_workers = num_workers
        self.shape: tuple[int, int, int] = (channels, *sides)
        self._files: dict[str, ImageFiles] = {}

    @override
    def setup(self, stage: str) -> None:
        """Find the images; read those of a stage if all splits fit in memory.

        Args:
            stage: `"fit"` and `"validate"` read training and validation, `"test"` and `"predict"` the test split.

        Raises:
            FileNotFoundError: If a folder is missing or holds no images.
            ValueError: If a folder has another layout, or an image can't be read.
        """
        if not self._files:
            self._files = self._find()
        if self._fits_in_memory():
            super().setup(stage)

    @override
    def _read_train(self) -> dict[str, Tensors]:
        return {split: self._files[split].tensors() for split in ("train", "val")}

    @override
    def _read_test(self) -> dict[str, Tensors]:
        return {"test": self._files["test"].tensors()}

    @override
    def _loader(self, split: str, shuffle: bool = False) -> BatchLoader:
        flip = self.flip and split == "train"
        if self._fits_in_memory():
            return TensorLoader(self._tensors(split), self.batch_size, shuffle=shuffle, flip=flip, seed=self.seed)
        return StreamLoader(
            self._files[split],
            self.batch_size,
            shuffle=shuffle,
            flip=flip,
            seed=self.seed,
            num_workers=self.num_workers,
        )

    def _fits_in_memory(self) -> bool:
        size = sum(len(files) for files in self._files.values()) * math.prod(self.shape)
        return size <= self.memory_budget * 2**30

    def _find(self) -> dict[str, ImageFiles]:
        paths = find_images(self.root)
        classes = sorted(_classes(self.root, paths))
        if self.test_root is None:
            rest, test = split_indices(len(paths), self.test_fraction, self.seed, name="test_fraction")
            test_files = self._image_files(self.root, [paths[index] for index in test], classes)
            paths = [paths[index] for index in rest]
        else:
            test_files = self._test_files(self.test_root, classes)
        train, val = split_indices(len(paths), self.val_fraction, self.seed, name="val_fraction")
        return {
            "train": self._image_files(self.root, [paths[index] for index in train], classes),
            "val": self._image_files(self.root, [paths[index] for index in val], classes),
            "test": test_files,
        }

    def _test_files(self, root: Path, classes: list[str]) -> ImageFiles:
        paths = find_images(root)
        found = _classes(root, paths)
        if not found.issubset(classes) or bool(found) != bool(classes):
            raise ValueError(
                f"`test_root` must be laid out like `root`, with the class folders {classes or 'none'}, got"
                f" {sorted(found) or 'none'} in {root}. Move or rename the images."
            )
        return self._image_files(root, paths, classes)

    def _image_files(self, root: Path, paths: list[Path], classes: list[str]) -> ImageFiles:
        labels = torch.tensor([classes.index(_class(root, path)) for path in paths]) if classes else None
        return ImageFiles(paths, labels, self.shape)


def _class(root: Path, path: Path) -> str:
    return path.relative_to(root).parts[0]


def _classes(root: Path, paths: list[Path]) -> set[str]:
    return {_class(root, path) for path in paths if path.parent != root}
