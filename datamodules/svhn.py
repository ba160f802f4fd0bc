"""Street View House Numbers (Netzer et al., 2011)."""

import torch
from torch import Tensor
from typing_extensions import override

from .torchvision_sets import TorchVision, as_uint8


class SVHN(TorchVision):
    """SVHN's cropped digits: 73,257 training and 26,032 test colour photographs of 32 by 32 pixels, no extra set."""

    shape = (3, 32, 32)

    @override
    def _layout(self) -> str:
        return "the files train_32x32.mat and test_32x32.mat"

    @override
    def _present(self) -> bool:
        return all((self.root / f"{split}_32x32.mat").is_file() for split in ("train", "test"))

    @override
    def _download(self) -> None:
        for split in ("train", "test"):
            self._torchvision(self.root, split=split, download=True)

    @override
    def _read(self, train: bool) -> dict[str, Tensor]:
        data = self._torchvision(self.root, split="train" if train else "test")
        return {"x": as_uint8(data.data), "label": torch.from_numpy(data.labels)}
