"""A table with columns of different kinds, in a CSV file."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from typing_extensions import override

from .base import DataModule, Tensors, check_apart, check_fraction, shortened, split_rows
from .loaders.batch_loader import DataError
from .loaders.model_scale import check_rounding, is_far_from_one, set_condition_scale, takes_raw_numbers
from .loaders.table_file import Column, Kind, TableFile, canonical, categories_of, make_column, read_table


class Table(DataModule):
    """A table in a CSV file, whose columns have kinds of their own and may miss values.

    The file is in UTF-8, and its first line has the names of the columns. A column is

    - `numeric`: real numbers,
    - `count`: whole numbers from 0,
    - `binary`: two different words or numbers, or
    - `categorical`: words, or numbers that stand for something.

    Two different values make a column binary, other numbers numeric, and other words categorical; `fit` prints what was
    found. `columns` says it otherwise. Counts are never guessed. Categories are in alphabetical order, or by value if
    all are numbers. Kinds and categories come from the whole file `path`, and the other files must keep to them, in any
    order of the columns. Only `label` may have further classes there, whose numbers follow those of `path`.

    A batch holds `"x"`, float32 of shape `(B, columns)`: one number for each column in the table's own unit, for a
    category its place in `categories`. `"mask"`, bool of the same shape, is False where a value is missing, which is 0
    in `"x"`.

    The split of a row depends only on its number, the seed and the fractions. So a row that is appended moves no other,
    and the sizes of the splits are approximate. `val_path` and `test_path` give splits as files of their own.

    A checkpoint holds columns, kinds and categories. A run that uses it over a `path` with others is refused. New rows
    are read as `test_path`, beside the table of the training as `path`. They need only the columns that are used, and
    no label.

    Args:
        path: The CSV file. `~` is the home folder.
        columns: Kinds of columns by their names; `ignored` leaves a column out. The others are guessed.
        label: Name of a column with classes. It is no part of the data.
        condition: Names of columns that the model is given as a condition: a number, or a one-hot code of categories.
            They are no part of the data, and none of their values may be missing.
        missing: Words that mark a missing value. An empty cell always does.
        delimiter: The character between two cells. A tab may be written as in Python.
        val_path: A CSV file with the validation data. By default they are a part of `path`.
        test_path: A CSV file with the test data. By default they are a part of `path`.
        val_fraction: Approximate share kept for validation, of the rows that are not for the test.
        test_fraction: Approximate share kept for the test.
        batch_size: Observations in a batch of one process.
        seed: Seed of the splits and the training order.
        held_out: Classes of `label` to leave out of training and validation.

    Attributes:
        column_names: Names of the columns of `"x"`.
        kinds: For each of them `"numeric"`, `"count"`, `"binary"`, or the number of its categories.
        categories: Categories of each binary or categorical column, by its name.
        condition_names: Name of each number of `"condition"`; a category's has the form `column=category`.
        loc: Mean of each column of `"x"` over the values in the training split; 0 where it is not numeric. Shape
            `(columns,)`.
        scale: Standard deviation of each column over the same values; 1 where it is not numeric. Shape `(columns,)`.

    Raises:
        FileNotFoundError: If a file is missing.
        DataError: If a file is no table, or a column is not of its kind; the message has line and column.
        ValueError: If an option is out of range, or a split is empty.
    """

    levels = None

    def __init__(
        self,
        path: str | Path,
        columns: dict[str, Kind] | None = None,
        label: str | None = None,
        condition: Sequence[str] = (),
        missing: Sequence[str] = ("NA", "N/A", "NaN", "nan", "null"),
        delimiter: str = ",",
        val_path: str | Path | None = None,
        test_path: str | Path | None = None,
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        batch_size: int = 128,
        seed: int = 0,
        held_out: Sequence[int | str] = (),
    ) -> None:
        super().__init__(batch_size=batch_size, seed=seed, held_out=held_out)
        check_fraction("val_fraction", val_fraction)
        check_fraction("test_fraction", test_fraction)
        delimiter = "\t" if delimiter == r"\t" else delimiter  # as a shell passes it on
        if len(delimiter) != 1:
            raise ValueError(f"`delimiter` must be one character, got {delimiter!r}.")
        for name, words in (("condition", condition), ("missing", missing)):
            if isinstance(words, str):
                raise ValueError(f"`{name}` must be a list of words, got {words!r}. Write it as [{words}].")
        paths = check_apart(path, val_path, test_path)
        self.path = paths["train"]
        self.label = label
        self.condition = tuple(condition)
        self.val_fraction = val_fraction
        self.test_fraction = test_fraction
        files = {split: read_table(each, delimiter, missing) for split, each in paths.items()}
        kinds = dict(columns or {})
        _check_given(files["train"], kinds, label, self.condition)
        names = [name for name in files["train"].columns if kinds.get(name) != "ignored"]
        _check_files(files, names, label)
        self._guessed = [name for name in names if name not in kinds and name != label]
        found = {name: make_column(files["train"], name, kinds.get(name)) for name in names if name != label}
        self._label = _label(list(files.values()), label, kinds.get(label)) if label is not None else None
        self._condition = [found.pop(name) for name in self.condition]
        self._columns = list(found.values())
        if not self._columns:
            raise ValueError(f"{self.path} has no column left for the data. Leave some in.")
        self.shape = (len(self._columns),)
        self.column_names = tuple(found)
        self.kinds: tuple[str | int, ...] = tuple(_offered(column) for column in self._columns)
        self.categories = {column.name: list(column.categories) for column in self._columns if column.categories}
        self.condition_names = tuple(name for column in self._condition for name in _names(column))
        self.class_names = self._label.categories if self._label else ()
        self._data, self._places = self._split(files)
        self._data |= super()._hold_out({split: self._data[split] for split in ("train", "val")})
        self.loc, self.scale = self._moments()

    @override
    def set_scales(self, model: Any) -> None:
        """Set the scale of the model's likelihood and condition.

        Args:
            model: The model.

        Raises:
            ValueError: If a column is far from order 1 and the likelihood takes it as it is, or the model is given
                another number of covariates.
        """
        likelihood: Any = getattr(model, "likelihood", None)
        if hasattr(likelihood, "set_scale"):
            likelihood.set_scale(self.loc, self.scale)
        elif takes_raw_numbers(model, self.shape):
            self._check_scale(likelihood)
        if self.condition_names:
            is_code = torch.tensor(["=" in name for name in self.condition_names])
            set_condition_scale(model, self.condition_names, self._data["train"]["condition"], is_code)

    def _check_scale(self, likelihood: Any) -> None:
        far = is_far_from_one(self.loc, self.scale).nonzero().flatten().tolist()
        if far:
            columns = shortened(
                f"{self.column_names[place]} ({self.loc[place]:.4g}, {self.scale[place]:.4g})" for place in far
            )
            raise ValueError(
                f"`likelihood` {type(likelihood).__name__} takes the columns as they are, and they are far from mean 0"
                f" and standard deviation 1: {columns}. Set `likelihood` to Columns, which standardises them, or"
                f" standardise them in {self.path}."
            )

    @override
    def file_names(self, stage: str) -> Sequence[str]:
        return self._places["test" if stage == "predict" else stage]

    @override
    def state_dict(self) -> dict[str, Any]:
        moments = {"loc": self.loc.tolist(), "scale": self.scale.tolist()}
        return super().state_dict() | {"table": self._schema() | moments}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuse a checkpoint of other columns, and take the moments of its training split.

        Args:
            state_dict: `state_dict()` of the run that saved the checkpoint.

        Raises:
            ValueError: If columns, kinds, categories or conditions are others.
        """
        saved = state_dict.get("table", {})
        for name, now in self._schema().items():
            before = saved.get(name, now)
            if before != now:
                raise ValueError(
                    f"{self.path} has other {name} than the table that the checkpoint was trained on: {before} ->"
                    f" {now}. Give that table as `path`, and this one as `test_path`: then its columns are found by"
                    " their names, and its categories have the same numbers."
                )
        if saved:
            self.loc, self.scale = torch.tensor(saved["loc"]), torch.tensor(saved["scale"])
        super().load_state_dict(state_dict)

    @override
    def _read_train(self) -> dict[str, Tensors]:
        return {split: self._data[split] for split in ("train", "val")}

    @override
    def _read_test(self) -> dict[str, Tensors]:
        return {"test": self._data["test"]}

    @override
    def _hold_out(self, found: dict[str, Tensors]) -> dict[str, Tensors]:
        """Return them as they are: the classes were left out before the scale was measured."""
        return found

    @override
    def _report(self, found: Mapping[str, Tensors]) -> None:
        super()._report(found)
        if "train" not in found:  # said when the model was trained
            return
        groups = {kind: [column for column in self._columns if column.kind == kind] for kind in get_args(Kind)}
        groups |= {"label": [self._label] if self._label else [], "condition": self._condition}
        lines = [f"{self.path} has the columns"]
        lines += [f"{name}: {shortened(map(_text, columns))}." for name, columns in groups.items() if columns]
        if self._guessed:
            lines.append(f"Guessed, which `columns` changes: {shortened(self._guessed)}.")
        mask = torch.cat([tensors["mask"] for tensors in found.values()])
        missing = {name: int(count) for name, count in zip(self.column_names, (~mask).sum(dim=0), strict=True) if count}
        if missing:
            lines.append(f"Missing in {len(mask)} rows: {shortened(f'{name} ({n})' for name, n in missing.items())}.")
        rank_zero_info("\n  ".join(lines))

    @override
    def _fingerprint(self) -> dict[str, Any]:
        return super()._fingerprint() | {"classes": list(self.class_names)}

    def _split(self, files: Mapping[str, TableFile]) -> tuple[dict[str, Tensors], dict[str, list[str]]]:
        """Return the tensors of each split, and the file and line of each of its rows."""
        fractions = {"test": self.test_fraction, "val": self.val_fraction}
        fractions = {split: share for split, share in fractions.items() if split not in files}
        rows = {split: torch.arange(len(file)) for split, file in files.items()}
        rows |= split_rows(len(rows["train"]), fractions, self.seed, self.path)
        for column in (*self._columns, *self._condition):
            check_rounding(f"{self.path}: column {column.name!r}", column.numbers(files["train"]))
        every = {split: self._tensors_of(file, needs_label=split != "test") for split, file in files.items()}
        data: dict[str, Tensors] = {}
        places = {}
        for split, numbers in rows.items():
            home = split if split in files else "train"
            data[split] = {name: tensor[numbers] for name, tensor in every[home].items()}
            places[split] = [f"{files[home].path.name}:{files[home].lines[row]}" for row in numbers.tolist()]
        return data, places

    def _tensors_of(self, file: TableFile, needs_label: bool) -> dict[str, Tensor]:
        numbers = torch.stack([column.numbers(file) for column in self._columns], dim=1)
        mask = ~numbers.isnan()
        tensors = {"x": torch.where(mask, numbers, 0).float(), "mask": mask}
        if self._label and (needs_label or any(file.columns.get(self._label.name, ()))):
            tensors["label"] = _complete(file, self._label, "label").long()
        if self._condition:
            codes = [_code(column, _complete(file, column, "condition")) for column in self._condition]
            tensors["condition"] = torch.cat(codes, dim=1).float()
        return tensors

    def _moments(self) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of the numeric columns over the training split."""
        x, mask = (self._data["train"][name] for name in ("x", "mask"))
        loc, scale = torch.zeros(self.shape), torch.ones(self.shape)
        for place, column in enumerate(self._columns):
            if column.kind != "numeric":
                continue
            values = x[:, place][mask[:, place]].double()
            if not len(values) or values.min() == values.max():
                held = f"only the value {float(values[0]):g}" if len(values) else "no value"
                raise DataError(
                    f"{self.path}: column {column.name!r} has {held} in the training split, so it has no scale."
                    f" Leave it out with `columns` {{{column.name}: ignored}}, or give another kind."
                )
            loc[place], scale[place] = values.mean(), values.std(correction=0)
        return loc, scale

    def _schema(self) -> dict[str, Any]:
        """Return what a model trained on the table depends on, by its name in a message."""
        return {
            "columns": list(self.column_names),
            "kinds": list(self.kinds),
            "categories": self.categories,
            "condition": list(self.condition_names),
        }


def _check_files(files: Mapping[str, TableFile], used: Sequence[str], label: str | None) -> None:
    """Check that all files have rows and the columns that are used; new rows may lack the label."""
    for split, file in files.items():
        if not len(file):
            raise ValueError(f"{file.path} has no row below the columns' names. Add rows, or name another file.")
        needed = [name for name in used if name != label or split != "test"]
        if lacks := [name for name in needed if name not in file.columns]:
            more = [name for name in file.columns if name not in files["train"].columns]
            raise ValueError(
                f"`{split}_path` must have the columns of `path` that are used, in any order, but {file.path} lacks"
                f" {shortened(lacks)}{f', and has {shortened(more)} more' if more else ''}. Rename or add them."
            )


def _check_given(file: TableFile, columns: Mapping[str, str], label: str | None, condition: Sequence[str]) -> None:
    """Check that options name columns, each for one purpose, and kinds that there are."""
    options = [("columns", name) for name in columns]
    options += [("label", label)] if label is not None else []
    options += [("condition", name) for name in condition]
    for option, name in options:
        if name not in file.columns:
            raise ValueError(
                f"`{option}` names {name!r}, which {file.path} does not have. It has {shortened(file.columns)}."
            )
    for name, kind in columns.items():
        if kind not in get_args(Kind):
            raise ValueError(f"`columns` must give {name!r} one of {', '.join(get_args(Kind))}, got {kind!r}.")
    apart = [name for option, name in options if option != "columns"]
    if twice := next((name for name in apart if apart.count(name) > 1 or columns.get(name) == "ignored"), None):
        raise ValueError(f"{twice!r} can be only one of `label`, a `condition`, or ignored. Name it once.")
    if label is not None and columns.get(label, "categorical") not in ("binary", "categorical"):
        raise ValueError(
            f"`label` must be a binary or categorical column, got {label!r}, which `columns` calls {columns[label]}."
            " Numbers that are no classes are a `condition`."
        )


def _label(files: Sequence[TableFile], name: str, kind: Kind | None) -> Column:
    """Return the column of the label: the classes of the first file in order, then those of the others alone."""
    first, *others = [file.columns.get(name, []) for file in files]
    cells = sum(others, first)
    column = make_column(TableFile(files[0].path, {name: cells}, []), name, kind or "categorical")
    if kind is None and len(column.categories) > max(10, len(cells) / 5):
        raise DataError(
            f"`label` {name!r} has {len(column.categories)} different values in {len(cells)} rows. Numbers that are no"
            f" classes are a `condition`. If they are classes, say `columns` {{{name}: categorical}}."
        )
    trained = categories_of(first)
    more = [word for word in column.categories if word not in trained and canonical(word) not in trained]
    return Column(name, column.kind, (*trained, *more))


def _offered(column: Column) -> str | int:
    return len(column.categories) if column.kind == "categorical" else column.kind


def _names(column: Column) -> list[str]:
    return [f"{column.name}={word}" for word in column.categories] if column.kind == "categorical" else [column.name]


def _text(column: Column) -> str:
    if column.kind == "binary":
        return f"{column.name} ({', '.join(column.categories)})"
    return f"{column.name} ({len(column.categories)})" if column.categories else column.name


def _complete(file: TableFile, column: Column, option: str) -> Tensor:
    """Return the numbers of a column in which none may be missing."""
    numbers = column.numbers(file)
    absent = numbers.isnan().nonzero().flatten().tolist()
    if absent:
        lines = shortened(str(file.lines[row]) for row in absent)
        raise DataError(
            f"{file.path}: `{option}` {column.name!r} must have a value in each row, but {len(absent)} have none, in"
            f" line {lines}. Remove these rows, or choose another column."
        )
    return numbers


def _code(column: Column, numbers: Tensor) -> Tensor:
    """Return the numbers as columns: as they are, or one-hot if they are categories."""
    return F.one_hot(numbers.long(), len(column.categories)) if column.kind == "categorical" else numbers[:, None]
