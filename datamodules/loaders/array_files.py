"""Read NumPy's files without unpickling, in memory or row by row from the disk."""

import math
import struct
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from .batch_loader import DataError
from .file_split import FileSplit

_READERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
_DAMAGE = (ValueError, EOFError, OSError, zipfile.BadZipFile, zlib.error, struct.error, KeyError, NotImplementedError)


@dataclass(frozen=True)
class ArrayFile:
    """An array in a `.npy` file or in an `.npz` archive, known by its header.

    Attributes:
        path: The file.
        key: Its name in the archive; empty for a `.npy` file.
        shape: Its shape, observations first.
        dtype: Its type in the file.
        is_fortran: Whether its first axis is the fastest.
        offset: First byte of its values in the file; None if they are compressed.
    """

    path: Path
    key: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    is_fortran: bool
    offset: int | None

    def __str__(self) -> str:
        return f"{self.path}[{self.key!r}]" if self.key else str(self.path)

    def __len__(self) -> int:
        return self.shape[0] if self.shape else 0

    def open(self) -> np.ndarray[Any, Any]:
        """Map the array into memory, so that only rows that are used are read; decompress it if it is compressed.

        Raises:
            DataError: If it is damaged.
        """
        try:
            if self.offset is None:
                with np.load(self.path, allow_pickle=False) as archive:
                    values: np.ndarray[Any, Any] = archive[self.key]
                return values
            order: Any = "F" if self.is_fortran else "C"
            return np.memmap(self.path, self.dtype, "r", self.offset, self.shape, order)
        except _DAMAGE as error:
            raise DataError(f"{self} can't be read ({error}). Write it again.") from error


def find_arrays(path: Path) -> dict[str, ArrayFile]:
    """Find the arrays of a `.npy` file, of an `.npz` archive, or of a folder of `.npy` files, and read their headers.

    Args:
        path: The file or the folder.

    Returns:
        The arrays by name: the keys of the archive, the files' names without the suffix, or `"x"` for a lone file.

    Raises:
        FileNotFoundError: If there is no such file or folder, or the folder has no `.npy` file.
        DataError: If a file is damaged, is not NumPy's, or would have to be unpickled.
    """
    if path.is_dir():
        files = sorted(path.glob("*.npy"))
        if not files:
            raise FileNotFoundError(f"The folder {path} has no .npy file. Put arrays there, or name a file.")
        return {file.stem: _npy(file) for file in files}
    if not path.exists():
        raise FileNotFoundError(f"There is no file {path}. Name a .npy file, an .npz file or a folder of .npy files.")
    if path.suffix == ".npz":
        return _npz(path)
    if path.suffix != ".npy":
        raise DataError(f"{path} must end in .npy or .npz, or be a folder of .npy files. Save it with NumPy.")
    return {"x": _npy(path)}


def _npy(path: Path) -> ArrayFile:
    with path.open("rb") as file:
        return _array(file, path, "", path.stat().st_size, 0)


def _npz(path: Path) -> dict[str, ArrayFile]:
    arrays = {}
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            for member in archive.infolist():
                start = None
                if member.compress_type == zipfile.ZIP_STORED:  # its values are in the file as they are
                    file.seek(member.header_offset + 26)
                    start = file.tell() + 4 + sum(struct.unpack("<HH", file.read(4)))
                key = member.filename.removesuffix(".npy")
                with archive.open(member) as content:
                    arrays[key] = _array(content, path, key, member.file_size, start)
    except DataError:
        raise
    except _DAMAGE as error:
        raise DataError(f"{path} is not a complete .npz file ({error}). Write it again.") from error
    if not arrays:
        raise DataError(f"{path} holds no array. Write it again.")
    return arrays


def _array(file: IO[bytes], path: Path, key: str, size: int, start: int | None) -> ArrayFile:
    """Read the header of an array.

    Args:
        file: The array alone, from its start.
        path: The file that holds it.
        key: Its name in the archive.
        size: Bytes of header and values.
        start: Place of the header in the file; None if it is compressed.
    """
    name = f"{path}[{key!r}]" if key else str(path)
    try:
        version = np.lib.format.read_magic(file)
        if version not in _READERS:
            raise ValueError(f"format {version[0]}.{version[1]}, of arrays with named fields")
        shape, is_fortran, dtype = _READERS[version](file)
    except _DAMAGE as error:
        raise DataError(f"{name} is not an array of NumPy ({error}). Save it with `numpy.save`.") from error
    if dtype.hasobject:
        raise DataError(
            f"{name} holds Python objects, which are never unpickled, because that would run code from the file. Save"
            " an array of numbers."
        )
    header = file.tell()
    needed = header + math.prod(shape) * dtype.itemsize
    if size < needed:
        raise DataError(f"{name} is incomplete: it has {size} bytes and needs {needed}. Write it again.")
    return ArrayFile(path, key, shape, dtype, is_fortran, None if start is None else start + header)


@dataclass(frozen=True)
class Form:
    """The way from rows of an array to observations.

    Attributes:
        layout: Where the channels are: `"channels_first"`, `"channels_last"`, or `"grey"` if there are none.
        dtype: Type of the observations.
        missing: Whether NaN marks a missing value.
    """

    layout: str
    dtype: torch.dtype
    missing: bool

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of an observation, from that of a row."""
        if self.layout == "grey":
            return (1, *shape)
        return (shape[-1], *shape[:-1]) if self.layout == "channels_last" else shape

    def __call__(self, rows: np.ndarray[Any, Any]) -> dict[str, Tensor]:
        """Convert rows `(B, ...)` to `"x"`, `(B, *shape)`, and `"mask"`, True where a value is there, if asked."""
        if self.layout == "grey":
            rows = rows[:, None]
        elif self.layout == "channels_last":
            rows = np.moveaxis(rows, -1, 1)
        with np.errstate(over="ignore", invalid="ignore"):  # what becomes infinite is reported
            kind = str(self.dtype).removeprefix("torch.")
            x = torch.from_numpy(np.array(rows, dtype=kind, order="C"))
        if not self.missing:
            return {"x": x}
        mask = ~x.isnan()
        return {"x": torch.where(mask, x, 0), "mask": mask}


class ArrayRows(FileSplit):
    """A data set of rows of an array, each read from the file on access.

    Args:
        file: The array.
        form: The way from a row to an observation.
        rows: The rows' numbers, shape `(N,)`.
        others: What else belongs to the rows, such as labels, one observation a row.
    """

    def __init__(self, file: ArrayFile, form: Form, rows: Tensor, others: Mapping[str, Tensor]) -> None:
        self.file = file
        self.form = form
        self.rows = rows
        self.others = dict(others)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = int(self.rows[index])
        item = self.form(self._array[row : row + 1]) | {
            name: tensor[index : index + 1] for name, tensor in self.others.items()
        }
        return {name: tensor[0] for name, tensor in item.items()} | {"index": torch.tensor(index)}

    @override
    def __getstate__(self) -> dict[str, Any]:
        # A copy in another process opens the file itself: pickling would read all of it.
        return {name: value for name, value in vars(self).items() if name != "_array"}

    @cached_property
    def names(self) -> list[str]:
        """The file and the number of each row, for messages and tables."""
        return [f"{self.file.path.name}[{row}]" for row in self.rows.tolist()]

    def tensors(self) -> dict[str, Tensor]:
        """Read all rows into memory.

        Raises:
            DataError: If the file is damaged.
        """
        return self.form(self.file.open()[self.rows.numpy()]) | self.others

    def some(self, count: int) -> dict[str, Tensor]:
        """Read at least this many rows from all parts of the file, or all if there are fewer."""
        return self.form(self.file.open()[self.rows[:: max(1, len(self) // count)].numpy()])

    @cached_property
    def _array(self) -> np.ndarray[Any, Any]:
        return self.file.open()
