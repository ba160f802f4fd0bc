"""Find and read image files."""

import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from .batch_loader import DataError
from .file_split import FileSplit

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".pgm", ".tif", ".tiff", ".webp"})

_PNG = b"\x89PNG\r\n\x1a\n"
_TRANSPARENT = ("LA", "La", "PA", "RGBA", "RGBa")
_BETWEEN = {"La": "LA", "LAB": "RGB"}  # modes that Pillow converts to grey only by way of another


class ImageFiles(FileSplit):
    """A data set of image files, each read on access.

    Args:
        paths: The files.
        names: Their names in messages and tables.
        labels: Their classes, shape `(N,)`; None without classes.
        shape: Shape `(C, H, W)` of each image as a tensor.
        background: Colour `(red, green, blue)` behind transparent pixels.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        names: Sequence[str],
        labels: Tensor | None,
        shape: tuple[int, int, int],
        background: tuple[int, int, int],
    ) -> None:
        self.paths = paths
        self._names = names
        self.labels = labels
        self.shape = shape
        self.background = background

    @property
    @override
    def names(self) -> Sequence[str]:
        return self._names

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        item = {"x": read_image(self.paths[index], self.shape, self.background), "index": torch.tensor(index)}
        return item if self.labels is None else item | {"label": self.labels[index]}

    def tensors(self) -> dict[str, Tensor]:
        """Read all images into memory.

        Raises:
            DataError: If a file can't be read.
        """
        x = torch.empty(len(self), *self.shape, dtype=torch.uint8)
        for index, path in enumerate(self.paths):
            x[index] = read_image(path, self.shape, self.background)
        return {"x": x} if self.labels is None else {"x": x, "label": self.labels}


@dataclass(frozen=True)
class ImageFacts:
    """Facts about an image file.

    Attributes:
        fault: Why it can't be read; empty if it can.
        is_transparent: Whether it has an alpha channel or a transparent colour.
        has_pages: Whether further pages or frames follow the first.
    """

    fault: str = ""
    is_transparent: bool = False
    has_pages: bool = False


def find_images(root: Path) -> tuple[list[Path], dict[str, list[str]]]:
    """Find the image files of a folder and of the folders below it, and what else is there.

    Links to files and folders are followed. What starts with a dot is passed over.

    Args:
        root: The folder.

    Returns:
        The images, in the order of their paths; and the entries that were passed over, by the reason.

    Raises:
        FileNotFoundError: If the folder is missing or has no images.
        PermissionError: If a folder can't be read.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"There is no folder {root}. Name the folder that holds the images.")
    passed_over: defaultdict[str, list[str]] = defaultdict(list)
    paths = sorted(_walk(root, (), passed_over))
    if not paths:
        counts = ", ".join(f"{len(names)} {reason}" for reason, names in passed_over.items())
        rest = f" Passed over: {counts}." if passed_over else ""
        raise FileNotFoundError(f"{root} has no images. Put some there that end in one of {sorted(SUFFIXES)}.{rest}")
    return paths, passed_over


def _walk(folder: Path, parents: tuple[str, ...], passed_over: Mapping[str, list[str]]) -> Iterator[Path]:
    real = os.path.realpath(folder)
    if real in parents:
        passed_over["links in a circle"].append(str(folder))
        return
    found = False
    try:
        entries = list(os.scandir(folder))
    except OSError as error:
        raise PermissionError(
            f"{folder} can't be read ({error.strerror}). Change its permissions, or move it away."
        ) from error
    for entry in entries:
        path = folder / entry.name
        suffix = path.suffix.lower()
        if entry.name.startswith("."):
            passed_over["hidden"].append(str(path))
        elif path.is_dir():
            found = True
            yield from _walk(path, (*parents, real), passed_over)
        elif entry.is_symlink() and not path.exists():
            passed_over["links that lead nowhere"].append(str(path))
        elif suffix in SUFFIXES:
            found = True
            yield path
        else:
            passed_over[f"ending in {suffix}" if suffix else "without a suffix"].append(str(path))
    if not found:
        passed_over["folders without images"].append(str(folder))


def inspect_image(path: Path) -> ImageFacts:
    """Decode an image file.

    Args:
        path: The file.
    """
    try:
        with _opened(path) as image:
            pages = False
            with suppress(Exception):  # a fault in a page that is not used
                pages = bool(getattr(image, "is_animated", False))
            return ImageFacts(is_transparent=_is_transparent(image), has_pages=pages)
    except _UnreadableImageError as error:
        return ImageFacts(fault=str(error))


def read_image(path: Path, shape: tuple[int, int, int], background: tuple[int, int, int] = (255, 255, 255)) -> Tensor:
    """Read an image as a uint8 tensor.

    The image is rotated to its EXIF orientation, put on the background where it is transparent, and converted to grey
    (one channel) or colour (three). It is then resized with an antialiasing filter until it just covers the height and
    the width, and cropped in the centre. Of several pages the first is read.

    Args:
        path: The file.
        shape: Channels (1 or 3), height and width.
        background: Colour `(red, green, blue)` behind transparent pixels.

    Returns:
        A tensor of shape `shape`.

    Raises:
        DataError: If the file can't be read as an image, or has more than 8 bits per channel.
    """
    import numpy as np
    from PIL import Image, ImageOps

    channels, height, width = shape
    try:
        with _opened(path) as file:
            image: Any = _upright(file)
    except _UnreadableImageError as error:
        raise DataError(f"{path} {error}. Repair or remove it.") from error
    if image.mode in _BETWEEN:
        image = image.convert(_BETWEEN[image.mode])
    if _is_transparent(image):
        canvas = Image.new("RGBA", image.size, (*background, 255))
        image = Image.alpha_composite(canvas, image.convert("RGBA"))
    image = image.convert("L" if channels == 1 else "RGB")
    image = ImageOps.fit(image, (width, height), method=Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).view(height, width, channels).permute(2, 0, 1)


class _UnreadableImageError(Exception):
    """Says what is wrong with a file; the file's name goes before it."""


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Decode an image with at most 8 bits per channel, without its metadata if they can't be parsed."""
    from PIL import UnidentifiedImageError

    if not path.is_file():  # opening a pipe would block forever
        raise _UnreadableImageError("is not a regular file" if path.exists() else "is not there")
    try:
        try:
            image = _decoded(path)
        except Exception as error:
            try:
                image = _decoded(BytesIO(_without_metadata(path.read_bytes())))
            except Exception:  # the metadata were not the reason
                raise error from None
    except UnidentifiedImageError as error:  # its message is the path
        raise _UnreadableImageError("can't be read as an image (no known format)") from error
    except Exception as error:  # Pillow's readers raise errors of any type on damaged files
        reason = str(error) or type(error).__name__
        raise _UnreadableImageError(f"can't be read as an image ({reason})") from error
    with image:
        if image.mode.startswith(("I", "F")):
            raise _UnreadableImageError(f"has more than 8 bits per channel (mode {image.mode})")
        yield image


def _decoded(source: Path | BytesIO) -> Any:
    from PIL import Image

    image = Image.open(source)
    try:
        image.load()
    except BaseException:
        image.close()
        raise
    return image


def _without_metadata(data: bytes) -> bytes:
    """Return a PNG or JPEG file with only the parts that determine its pixels; other data as they are."""
    if data.startswith(_PNG):
        kept, place = [_PNG], len(_PNG)
        while place < len(data):
            stop = place + 12 + int.from_bytes(data[place : place + 4], "big")
            name = data[place + 4 : place + 8]
            if name[:1].isupper() or name == b"tRNS":  # a capital marks what a reader must understand
                kept.append(data[place:stop])
            place = stop
        return b"".join(kept)
    if data.startswith(b"\xff\xd8"):
        kept, place = [data[:2]], 2
        while data[place : place + 1] == b"\xff" and data[place + 1 : place + 2] != b"\xda":  # the pixels start
            stop = place + 2 + int.from_bytes(data[place + 2 : place + 4], "big")
            segment = data[place:stop]
            # Of applications' segments only Adobe's matters: it tells how the colours are coded.
            if not (0xE0 <= segment[1] <= 0xEF or segment[1] == 0xFE) or (
                segment[4:9] == b"Adobe" and len(segment) >= 16
            ):
                kept.append(segment)
            place = stop
        return b"".join([*kept, data[place:]])
    return data


def _upright(image: Any) -> Any:
    """Return a copy in the orientation that the metadata say; as it is if they can't be parsed."""
    from PIL import ExifTags, Image

    turns = Image.Transpose
    methods = {
        2: turns.FLIP_LEFT_RIGHT,
        3: turns.ROTATE_180,
        4: turns.FLIP_TOP_BOTTOM,
        5: turns.TRANSPOSE,
        6: turns.ROTATE_270,
        7: turns.TRANSVERSE,
        8: turns.ROTATE_90,
    }
    method = None
    with suppress(Exception):
        method = methods.get(image.getexif().get(ExifTags.Base.Orientation))
    return image.copy() if method is None else image.transpose(method)


def _is_transparent(image: Any) -> bool:
    """Return whether an image has an alpha channel or a transparent colour."""
    # Pillow's own `has_transparency_data` decodes the pixels of an image with a palette.
    palette = getattr(image, "palette", None)
    has_colours = palette is not None and palette.mode.endswith("A")
    return has_colours or image.mode in _TRANSPARENT or "transparency" in image.info
