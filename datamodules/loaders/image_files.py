"""Find and read image files."""

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".pgm", ".tif", ".tiff", ".webp"})


class ImageFiles(Dataset[dict[str, Tensor]]):
    """A data set of image files, each read on access.

    Args:
        paths: The files.
        labels: Their classes, shape `(N,)`; None without classes.
        shape: Shape `(C, H, W)` of each image as a tensor.
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


def find_images(root: Path) -> list[Path]:
    """Return the image files of a folder, or of its class folders, in the order of their paths.

    Files and folders whose names start with a dot are skipped.

    Args:
        root: The folder.

    Raises:
        FileNotFoundError: If the folder is missing or has no images.
        PermissionError: If a folder can't be read.
        ValueError: If the folder has images beside folders of images.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"There is no folder {root}. Name the folder that holds the images.")
    paths: list[Path] = []
    for folder, subfolders, names in os.walk(root, onerror=_raise_unreadable):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        found = (Path(folder, name) for name in (*names, *subfolders) if not name.startswith("."))
        paths += [path for path in found if path.suffix.lower() in SUFFIXES]
    paths.sort()
    if not paths:
        raise FileNotFoundError(f"{root} has no images. Put some there that end in one of {sorted(SUFFIXES)}.")
    if len({path.parent == root for path in paths}) == 2:
        raise ValueError(
            f"{root} has images beside folders of images. Put all of them in class folders, or all in {root} itself."
        )
    return paths


def _raise_unreadable(error: OSError) -> None:
    raise PermissionError(
        f"{error.filename} can't be read ({error.strerror}). Change its permissions, or move it away."
    )


def read_image(path: Path, shape: tuple[int, int, int]) -> Tensor:
    """Read an image as a uint8 tensor.

    The image is rotated to its EXIF orientation and converted to grey (one channel) or colour (three). It is then
    resized with an antialiasing filter until it just covers the height and the width, and cropped in the centre.

    Args:
        path: The file.
        shape: Channels (1 or 3), height and width.

    Returns:
        A tensor of shape `shape`.

    Raises:
        ValueError: If the file can't be read as an image, or has more than 8 bits per channel.
    """
    import numpy as np
    from PIL import Image, ImageOps

    channels, height, width = shape
    if not path.is_file():  # opening a pipe would block forever
        raise ValueError(f"{path} is not a regular file. Repair or remove it.")
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
