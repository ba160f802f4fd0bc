"""MNIST and the data sets that share its file format."""

import gzip
import math
import struct
import zlib
from pathlib import Path

import torch
from torch import Tensor
from typing_extensions import override

from .torchvision_sets import TorchVision


class MNIST(TorchVision):
    """MNIST: 60,000 training and 10,000 test images of handwritten digits, 28 by 28 grey pixels.

    The four IDX files are read from `root` or from torchvision's `<root>/<class name>/raw`, compressed (`.gz`) or not.
    So `FashionMNIST` also reads Debian's package dataset-fashion-mnist: `root="/usr/share/datasets/fashion-mnist"`.
    """

    shape = (1, 28, 28)

    @override
    def _layout(self) -> str:
        return (
            f"the four files train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte and"
            f" t10k-labels-idx1-ubyte (with or without .gz), also in {type(self).__name__}/raw below it,"
        )

    @override
    def _present(self) -> bool:
        return all(self._find(part, kind) for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1"))

    @override
    def _download(self) -> None:
        self._torchvision(self.root, download=True)

    @override
    def _read(self, train: bool) -> dict[str, Tensor]:
        part = "train" if train else "t10k"
        images, labels = (self._find(part, kind) for kind in ("images-idx3", "labels-idx1"))
        if images is None or labels is None:
            raise FileNotFoundError(
                f"{type(self).__name__} was not found in `root` ({self.root}). Put {self._layout()} there."
            )
        x, label = read_idx(images).unsqueeze(1), read_idx(labels).to(torch.int64)
        if x.shape[1:] != self.shape or label.shape != (len(x),):
            raise ValueError(
                f"{images} and {labels} must hold images of 28 by 28 and a label for each, got shapes"
                f" {(len(x), *x.shape[2:])} and {tuple(label.shape)}. Download them again."
            )
        return {"x": x, "label": label}

    def _find(self, part: str, kind: str) -> Path | None:
        folders = (self.root / type(self).__name__ / "raw", self.root)
        paths = [folder / f"{part}-{kind}-ubyte{suffix}" for folder in folders for suffix in ("", ".gz")]
        return next((path for path in paths if path.is_file()), None)


class FashionMNIST(MNIST):
    """Fashion-MNIST: 60,000 training and 10,000 test images of clothing; files and sizes as for `MNIST`."""


class KMNIST(MNIST):
    """Kuzushiji-MNIST: 60,000 training and 10,000 test images of cursive Japanese; files and sizes as for `MNIST`."""


def read_idx(path: Path) -> Tensor:
    """Read an IDX file of unsigned bytes, compressed with gzip if its name ends in `.gz`.

    Args:
        path: The file.

    Returns:
        A uint8 tensor of the shape in the file's header.

    Raises:
        ValueError: If the file has another format, or its size differs from its header's.
    """
    compressed = path.suffix == ".gz"
    most = path.stat().st_size * (1032 if compressed else 1)  # deflate's limit
    with gzip.open(path) if compressed else path.open("rb") as file:
        try:
            start = file.read(4)
            sizes = file.read(4 * start[3]) if start[:3] == b"\0\0\x08" and len(start) == 4 else b""
            shape = struct.unpack(f">{len(sizes) // 4}I", sizes) if len(sizes) % 4 == 0 else ()
            size = math.prod(shape)
            # A damaged header must not fill the memory: at most one byte more than it announces is read.
            data = bytearray(file.read(size + 1)) if shape and 0 < size <= most else bytearray()
        except (EOFError, OSError, zlib.error) as error:
            raise ValueError(f"{path} can't be unpacked ({error}). Download it again.") from error
    if not shape or not size or len(data) != size:
        raise ValueError(f"{path} is not a complete IDX file of unsigned bytes. Download it again.")
    return torch.frombuffer(data, dtype=torch.uint8).view(shape)
