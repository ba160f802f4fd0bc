"""Read image files."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".pgm", ".tif", ".tiff", ".webp"})


class ImageFiles(Dataset[dict[str, Tensor]]):
    """Reads image files, each when it is asked for.

    Args:
        paths: The files.
        labels: Their classes, None where there are none.
        shape: Shape `(C, H, W)` that every image gets.
    """

    def __init__(self, paths: Sequence[Path], labels: Tensor | None, shape: tuple[int, int, int]) -> None:
        self.paths = paths
        self.labels = labels
        self.shape = shape

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        item = {"x": read_image(self.paths[index], self.shape), "index": torch.tensor(index)}
        return item if self.labels is None else item | {"label": self.labels[index]}

    def tensors(self) -> dict[str, Tensor]:
        """Read all images into memory."""
        x = torch.empty(len(self), *self.shape, dtype=torch.uint8)
        for index, path in enumerate(self.paths):
            x[index] = read_image(path, self.shape)
        return {"x": x} if self.labels is None else {"x": x, "label": self.labels}


def read_image(path: Path, shape: tuple[int, int, int]) -> Tensor:
    """Read an image as a uint8 tensor of a given shape.

    The image is turned as its EXIF orientation says, made grey (one channel) or colour (three), resized with an
    antialiasing filter until it just covers the height and the width, and cropped in the centre.

    Args:
        path: The file.
        shape: Channels (1 or 3), height and width.

    Raises:
        ValueError: If the file is no image that can be read, or has more than 8 bits per channel.
    """
    import numpy as np
    from PIL import Image, ImageOps

    channels, height, width = shape
    if not path.is_file():  # a pipe would be waited for
        raise ValueError(f"{path} is no file. Repair or remove it.")
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} can't be read as an image ({error}). Repair or remove it.") from error
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"{path} has more than 8 bits per channel (mode {image.mode}). Convert it to 8 bits.")
    if image.has_transparency_data:
        image = image.convert("RGBA")  # a palette's transparency can't be dropped in one step
    image = image.convert("L" if channels == 1 else "RGB")
    image = ImageOps.fit(image, (width, height), method=Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).view(height, width, channels).permute(2, 0, 1)
