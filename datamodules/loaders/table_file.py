"""Read a CSV file, and turn its columns into numbers."""

import csv
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from .batch_loader import DataError

Kind = Literal["numeric", "count", "binary", "categorical", "ignored"]

_LARGEST = torch.finfo(torch.float32).max
_WITH_COMMA = re.compile(r"[+-]?[\d.]*\d,[\d.,]*\d")  # 1,5 or 1.234,5 or 1,234.5


@dataclass(frozen=True)
class TableFile:
    """The cells of a CSV file.

    Attributes:
        path: The file.
        columns: The cells of each column by its name, without spaces around them; empty where a value is missing.
        lines: The line of each row in the file, from 1.
    """

    path: Path
    columns: dict[str, list[str]]
    lines: list[int]

    def __len__(self) -> int:
        return len(self.lines)

    def place(self, row: int, column: str) -> str:
        """Return where a cell is, for an error."""
        return f"{self.path}, line {self.lines[row]}, column {column!r}"


def read_table(path: Path, delimiter: str = ",", missing: Collection[str] = ()) -> TableFile:
    """Read a CSV file in UTF-8 whose first line has the names of the columns. Blank lines are passed over.

    Args:
        path: The file.
        delimiter: The character between two cells.
        missing: Words that mark a missing value, besides an empty cell.

    Raises:
        FileNotFoundError: If there is no such file.
        DataError: If it is no such table; the message has the line.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}. Name a CSV file whose first line has the columns' names.")
    rows, lines = [], []
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(_checked(path, file), delimiter=delimiter, strict=True)
            names = [name.strip() for name in next(reader, [])]
            _check_names(path, names, delimiter)
            last = reader.line_num
            for row in reader:
                line, last = last + 1, reader.line_num  # a quoted cell may hold several lines
                if row and len(row) != len(names):
                    raise DataError(
                        f"{path}, line {line}: a row must have the {len(names)} cells that the first line names, got"
                        f" {len(row)}. Fix it, or quote cells that hold {delimiter!r}."
                    )
                if row:
                    rows.append(row)
                    lines.append(line)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not text in UTF-8 ({error}). Save it as CSV in UTF-8.") from error
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}, can't be read as CSV: {error}. Fix it.") from error
    absent = {"", *missing}
    cells = [
        ["" if (word := cell.strip()) in absent else word for cell in column] for column in zip(*rows, strict=True)
    ]
    return TableFile(path, dict(zip(names, cells or [[] for _ in names], strict=True)), lines)


def _checked(path: Path, lines: Iterable[str]) -> Iterator[str]:
    for number, line in enumerate(lines, start=1):
        if "\0" in line:  # valid in UTF-8, and the reader would take it for a word
            raise DataError(
                f"{path}, line {number}, has a NUL character, as a file in UTF-16 or a damaged one does. Save it as CSV"
                " in UTF-8."
            )
        yield line


def _check_names(path: Path, names: Sequence[str], delimiter: str) -> None:
    if not names:
        raise DataError(f"{path} has no first line with the columns' names. Add one.")
    if "" in names:
        raise DataError(
            f"{path}, line 1: column {names.index('') + 1} has no name. Name it; a column of row numbers can be ignored"
            " by its name."
        )
    if twice := next((name for name in names if names.count(name) > 1), ""):
        raise DataError(f"{path}, line 1: {names.count(twice)} columns have the name {twice!r}. Rename them.")
    if all(_number(name) is not None for name in names):
        raise DataError(f"{path}, line 1, must have the columns' names, got nothing but numbers. Add such a line.")
    if len(names) == 1 and (other := next((each for each in ";\t|," if each in names[0]), "")):
        raise DataError(
            f"{path}, line 1: with the `delimiter` {delimiter!r} there is one column, {names[0]!r}. Set `delimiter` to"
            f" {other!r}."
        )


@dataclass(frozen=True)
class Column:
    """The kind of a column, and the way from its cells to numbers.

    Attributes:
        name: Its name.
        kind: `"numeric"`, `"count"` (whole numbers from 0), `"binary"` (two words or numbers) or `"categorical"`.
        categories: The words of a binary or categorical column in order, each one's number being its place. Whole
            numbers are written without a point.
    """

    name: str
    kind: Kind
    categories: tuple[str, ...] = ()

    def numbers(self, file: TableFile) -> Tensor:
        """Return the numbers of a file's column, NaN where a value is missing.

        Args:
            file: The table.

        Returns:
            float64 of shape `(rows,)`.

        Raises:
            DataError: If a cell is not of this kind; the message has the line.
        """
        convert, allowed = self._conversion()
        values, faults = [], []
        for row, cell in enumerate(file.columns[self.name]):
            value = convert(cell) if cell else math.nan
            if value is None:
                faults.append(row)
            else:
                values.append(value)
        if faults:
            more = f", and {len(faults) - 1} more rows" if len(faults) > 1 else ""
            raise DataError(
                f"{file.place(faults[0], self.name)}: {file.columns[self.name][faults[0]]!r} is not {allowed}{more}."
                f" Fix it, name it in `missing`, or give another kind in `columns`."
            )
        return torch.tensor(values, dtype=torch.float64)

    def _conversion(self) -> tuple[Callable[[str], float | None], str]:
        """Return the function from a cell to its number, None for another kind of cell, and what it takes."""
        if self.kind == "numeric":
            return _number, "a finite number"
        if self.kind == "count":
            return _count, "a count (0, 1, 2, ...)"
        places = {word: float(place) for place, word in enumerate(self.categories)}
        return lambda cell: places.get(cell, places.get(canonical(cell))), f"one of {_listed(self.categories)}"


def make_column(file: TableFile, name: str, kind: Kind | None = None) -> Column:
    """Return the kind of a column, guessed from its cells unless it is given.

    Two different values make it binary, numbers numeric, and words categorical. Counts are never guessed.

    Args:
        file: The table that decides about the kind and the categories.
        name: The name of the column.
        kind: Its kind; None to guess it.

    Raises:
        DataError: If the cells are not of this kind, or leave a guess in doubt.
    """
    cells = [cell for cell in file.columns[name] if cell]
    words = dict.fromkeys(cells)
    numbers = {word: number for word in words if (number := _number(word)) is not None}
    is_numeric = len(numbers) == len(words)
    distinct = len(set(numbers.values())) if is_numeric else len(words)
    ignore = f"Leave it out with `columns` {{{name}: ignored}}"
    if distinct < 2:
        held = f"only {cells[0]!r}" if cells else "no value"
        raise DataError(f"{file.path}: column {name!r} holds {held}, so there is nothing to learn. {ignore}.")
    is_guess = kind is None
    commas = [word for word in words if _WITH_COMMA.fullmatch(word)]
    if commas and kind in (None, "numeric", "count") and len(commas) + len(numbers) == len(words):
        row = file.columns[name].index(commas[0])
        raise DataError(
            f"{file.place(row, name)}: {commas[0]!r} has a comma. Write numbers with a point before the decimals, and"
            f" thousands without a mark; or say `columns` {{{name}: categorical}} if they are no numbers."
        )
    if kind is None:
        kind = "binary" if distinct == 2 else "numeric" if is_numeric else "categorical"
    if kind in ("numeric", "count"):
        return Column(name, kind)
    categories = categories_of(cells)
    if kind == "binary" and distinct != 2:
        raise DataError(
            f"{file.path}: column {name!r} is said to be binary, but holds {distinct} different values:"
            f" {_listed(categories)}. Give another kind in `columns`, or name words that mark a missing value in"
            " `missing`."
        )
    if is_guess and kind == "categorical" and 2 * sum(cell in numbers for cell in cells) >= len(cells):
        row = next(row for row, cell in enumerate(file.columns[name]) if cell and cell not in numbers)
        raise DataError(
            f"{file.place(row, name)}: {file.columns[name][row]!r} is no number, as most of the column are. Fix it,"
            f" name it in `missing`, or say `columns` {{{name}: categorical}}."
        )
    if is_guess and kind == "categorical" and distinct > max(10, len(file) / 5):
        raise DataError(
            f"{file.path}: column {name!r} holds {distinct} different words in {len(file)} rows, such as"
            f" {categories[0]!r}, like a name or a text. {ignore}, or say `columns` {{{name}: categorical}}."
        )
    return Column(name, kind, categories)


def categories_of(cells: Sequence[str]) -> tuple[str, ...]:
    """Return the different words in order: by value and written alike if all are numbers.

    Args:
        cells: The cells of a column; empty ones are passed over.
    """
    words = {cell: _number(cell) for cell in cells if cell}
    if None in words.values():
        return tuple(sorted(words))
    return tuple(dict.fromkeys(map(canonical, sorted(words, key=words.__getitem__))))  # type: ignore[arg-type]


def _number(word: str) -> float | None:
    """Return a finite number that fits float32; None for anything else."""
    try:
        value = float(word)
    except ValueError:
        return None
    return value if abs(value) <= _LARGEST and "_" not in word else None


def _count(word: str) -> float | None:
    value = _number(word)
    return value if value is not None and value >= 0 and value.is_integer() else None


def canonical(word: str) -> str:
    """Return one way to write a number, so that 1, 1.0 and 01 are one category; any other word as it is."""
    value = _number(word)
    if value is None:
        return word
    return str(int(value)) if value.is_integer() else repr(value)


def _listed(words: Sequence[str]) -> str:
    return ", ".join(words[:10]) + (f" and {len(words) - 10} more" if len(words) > 10 else "")
