"""MNIST and the data sets that share its file format."""

import gzip
import struct
from pathlib import Path

import torch
from torch import Tensor

from .torchvision_sets import TorchVision


class MNIST(TorchVision):
    """Loads MNIST: 60,000 and 10,000 handwritten digits of 28 by 28 grey pixels.

    The four IDX files lie in `root` itself or in torchvision's `<root>/<class name>/raw`, packed (`.gz`) or not. So
    `FashionMNIST` also reads Debian's package dataset-fashion-mnist: `root="/usr/share/datasets/fashion-mnist"`.
    """

    shape = (1, 28, 28)

    def _layout(self) -> str:
        return (
            f"the four files train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte and"
            f" t10k-labels-idx1-ubyte (with or without .gz), also in {type(self).__name__}/raw below it,"
        )

    def _present(self) -> bool:
        return all(self._find(part, kind) for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1"))

    def _download(self) -> None:
        self._torchvision(self.root, download=True)

    def _read(self, train: bool) -> dict[str, Tensor]:
        part = "train" if train else "t10k"
        images, labels = (self._find(part, kind) for kind in ("images-idx3", "labels-idx1"))
        if images is None or labels is None:
            raise FileNotFoundError(
                f"{type(self).__name__} was not found in `root` ({self.root}). Put {self._layout()} there."
            )
        return {"x": read_idx(images).unsqueeze(1), "label": read_idx(labels).to(torch.int64)}

    def _find(self, part: str, kind: str) -> Path | None:
        folders = (self.root / type(self).__name__ / "raw", self.root)
        paths = [folder / f"{part}-{kind}-ubyte{suffix}" for folder in folders for suffix in ("", ".gz")]
        return next((path for path in paths if path.is_file()), None)


class FashionMNIST(MNIST):
    """Loads Fashion-MNIST: 60,000 and 10,000 articles of clothing of 28 by 28 grey pixels, from files as `MNIST`'s."""


class KMNIST(MNIST):
    """Loads Kuzushiji-MNIST: 60,000 and 10,000 cursive characters of 28 by 28 grey pixels, from files as `MNIST`'s."""


def read_idx(path: Path) -> Tensor:
    """Read a file of unsigned bytes in the IDX format, packed with gzip or not.

    Args:
        path: The file, packed if its name ends in `.gz`.

    Raises:
        ValueError: If it is no such file, or is cut off.
    """
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        try:
            data = bytearray(file.read())
        except (EOFError, OSError) as error:
            raise ValueError(f"{path} can't be unpacked ({error}). Download it again.") from error
    dimensions = data[3] if data[:3] == b"\0\0\x08" else 0
    header = 4 + 4 * dimensions
    shape = struct.unpack(f">{dimensions}I", data[4:header]) if len(data) >= header else ()
    if not dimensions or len(data) != header + torch.Size(shape).numel():
        raise ValueError(f"{path} is no complete IDX file of unsigned bytes. Download it again.")
    return torch.frombuffer(data, dtype=torch.uint8, offset=header).view(shape)
