"""CIFAR-10 (Krizhevsky, 2009)."""

import torch
from torch import Tensor
from typing_extensions import override

from .torchvision_sets import TorchVision, as_uint8


class CIFAR10(TorchVision):
    """CIFAR-10: 50,000 training and 10,000 test colour photographs of 32 by 32 pixels, in ten classes."""

    shape = (3, 32, 32)

    @override
    def _layout(self) -> str:
        return "the folder cifar-10-batches-py (unpacked from cifar-10-python.tar.gz)"

    @override
    def _present(self) -> bool:
        return (self.root / "cifar-10-batches-py" / "test_batch").is_file()

    @override
    def _download(self) -> None:
        self._torchvision(self.root, download=True)

    @override
    def _read(self, train: bool) -> dict[str, Tensor]:
        data = self._torchvision(self.root, train=train)
        return {"x": as_uint8(data.data.transpose(0, 3, 1, 2)), "label": torch.tensor(data.targets)}
