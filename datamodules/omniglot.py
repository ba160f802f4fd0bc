"""Omniglot (Lake et al., 2015)."""

from pathlib import Path

import torch
from torch import Tensor
from typing_extensions import override

from .base import Tensors
from .loaders.image_files import read_image
from .torchvision_sets import TorchVision


class Omniglot(TorchVision):
    """Omniglot: handwritten characters of 50 alphabets, 20 drawings of each.

    As usual in work on VAEs, the drawings are white on black and reduced from 105 by 105 to 28 by 28 pixels, here with
    an antialiasing filter. The 19,280 drawings of the *background* alphabets are for training and validation, the
    13,180 of the *evaluation* alphabets for the test. These are the official parts, which share no alphabet. They are
    not the 24,345 and 8,070 drawings of Burda et al. (2015, arXiv:1509.00519), so log-likelihoods can't be compared
    with theirs. A label is the number of a character within its part, so no character can be held out.
    """

    shape = (1, 28, 28)

    @override
    def _hold_out(self, found: dict[str, Tensors]) -> dict[str, Tensors]:
        if self.held_out:
            raise ValueError("`held_out` must be left out: all of Omniglot's test characters are missing in training.")
        return found

    @override
    def _layout(self) -> str:
        return "the folder omniglot-py with images_background and images_evaluation (unpacked from the .zip files)"

    @override
    def _present(self) -> bool:
        return all(self._folder(train).is_dir() for train in (True, False))

    @override
    def _download(self) -> None:
        for background in (True, False):
            self._torchvision(self.root, background=background, download=True)

    @override
    def _read(self, train: bool) -> dict[str, Tensor]:
        paths = sorted(self._folder(train).glob("*/*/*.png"))
        characters = {folder: label for label, folder in enumerate(sorted({path.parent for path in paths}))}
        return {
            "x": 255 - torch.stack([read_image(path, self.shape) for path in paths]),
            "label": torch.tensor([characters[path.parent] for path in paths]),
        }

    def _folder(self, train: bool) -> Path:
        return self.root / "omniglot-py" / ("images_background" if train else "images_evaluation")
