"""CIFAR-10."""

import torch
from torch import Tensor

from .torchvision_sets import TorchVision, as_uint8


class CIFAR10(TorchVision):
    """Loads CIFAR-10: 50,000 and 10,000 colour photographs of 32 by 32 pixels in ten classes."""

    shape = (3, 32, 32)

    def _layout(self) -> str:
        return "the folder cifar-10-batches-py (unpacked from cifar-10-python.tar.gz)"

    def _present(self) -> bool:
        return (self.root / "cifar-10-batches-py" / "test_batch").is_file()

    def _download(self) -> None:
        self._torchvision(self.root, download=True)

    def _read(self, train: bool) -> dict[str, Tensor]:
        data = self._torchvision(self.root, train=train)
        return {"x": as_uint8(data.data.transpose(0, 3, 1, 2)), "label": torch.tensor(data.targets)}
