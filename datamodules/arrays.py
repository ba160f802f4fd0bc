"""Arrays in NumPy's files."""

import math
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from typing_extensions import override

from ..checks import check_number, integer_from
from .base import (
    DataModule,
    Tensors,
    check_apart,
    class_counts,
    shortened,
    sizes,
    split_rows,
)
from .file_data import FileDataModule
from .loaders.array_files import ArrayFile, ArrayRows, Form, find_arrays
from .loaders.batch_loader import DataError
from .loaders.model_scale import check_rounding, is_far_from_one, set_condition_scale, takes_raw_numbers

_CHANNELS = (1, 3)  # numbers of channels that tell which axis has them
_SAMPLED = 1000  # rows that tell the scale of the data
_CHUNK = 2**22  # numbers that are checked at once


class Arrays(FileDataModule):
    """Arrays in a `.npy` file, an `.npz` archive or a folder of `.npy` files: images, vectors or series.

    The first axis is that of the observations. Integers from 0 to 255 (uint8) have 256 `levels` and booleans 2, which
    the models scale to [0, 1]; `levels` says another number. All other numbers are float32, in their own scale.

    Images are `(C, H, W)`. Of arrays with four axes, the channels are on the second or on the last axis, whichever is 1
    or 3 long; if both or neither are, `layout` must say it. Arrays of uint8 or booleans with three axes are grey
    images, unless an axis is 1 or 3 long. Vectors `(N, d)` and series of floats `(N, steps, values)` stay as they are.

    An archive or a folder holds several arrays by name: the data, and if there are any a `label` (integers or words,
    one an observation) and a `condition` (one or more numbers an observation). `fit` gives the model the mean and the
    standard deviation of each number of the condition over the training split; 0 and 1 for those that are only 0 or 1.
    Files are never unpickled.

    The split of a row depends only on its number, the seed and the fractions. So a row that is appended moves no
    other, and the sizes of the splits are approximate. `val_path` and `test_path` give splits as files of their own.

    Before the first step all values are checked, and rows with NaN, infinity or a number outside the levels are named.
    Arrays within `memory_budget` are kept in memory. Larger ones are mapped: each batch reads its rows from the file.

    Args:
        path: A `.npy` file, an `.npz` file, or a folder of `.npy` files. `~` is the home folder.
        layout: `"channels_first"`, `"channels_last"`, or `"grey"` for images without an axis of channels. By default it
            is recognised where only one is possible.
        levels: Number of integer levels of the data. By default 256 for uint8, 2 for booleans, and none otherwise.
        x: Name of the data in the archive or folder. By default `x`, or the only array.
        label: Name of the labels. By default `label` if there is such an array.
        condition: Name of the conditions. By default `condition` if there is such an array.
        missing: Whether NaN marks a missing value. A batch then has a `"mask"`, True where a value is there.
        val_path: The validation data, with arrays of the same names. By default a part of `path`.
        test_path: The test data, with arrays of the same names. By default a part of `path`.
        val_fraction: Approximate share kept for validation, of the rows that are not for the test.
        test_fraction: Approximate share kept for the test.
        memory_budget: Memory in GiB that the data of all splits may take as tensors.
        num_workers: Processes that read ahead for each loader, if the data exceed the memory budget; 0 for none.
        batch_size: Observations in a batch of one process.
        seed: Seed of the splits and the training order.
        held_out: Classes to leave out of training and validation, such as `[3]`, or by name if the labels are words.

    Raises:
        FileNotFoundError: If a file is missing.
        DataError: If a file is damaged, or would have to be unpickled.
        ValueError: If an option is out of range, or an array is not what it is said to be.
    """

    _files: Mapping[str, ArrayRows]

    def __init__(
        self,
        path: str | Path,
        layout: Literal["channels_first", "channels_last", "grey"] | None = None,
        levels: int | None = None,
        x: str | None = None,
        label: str | None = None,
        condition: str | None = None,
        missing: bool = False,
        val_path: str | Path | None = None,
        test_path: str | Path | None = None,
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        memory_budget: float = 2.0,
        num_workers: int = 2,
        batch_size: int = 128,
        seed: int = 0,
        held_out: Sequence[int | str] = (),
    ) -> None:
        super().__init__(val_fraction, test_fraction, memory_budget, num_workers, batch_size, seed, held_out)
        if levels is not None:
            check_number("levels", levels, "at least 2", integer_from(2))
        if layout not in (None, "channels_first", "channels_last", "grey"):
            raise ValueError(f'`layout` must be "channels_first", "channels_last" or "grey", got {layout!r}.')
        self._paths = check_apart(path, val_path, test_path)
        self.path = self._paths["train"]
        self.missing = missing
        self._found = {split: find_arrays(path) for split, path in self._paths.items()}
        first = self._found["train"]
        self._keys = {"x": _key_of_data(first, x)}
        for name, key in (("label", label), ("condition", condition)):
            if key is not None or (name in first and name not in self._keys.values()):
                self._keys[name] = _checked_key(name, key or name, first)
        data = first[self._keys["x"]]
        self.levels = {"u1": 256, "b1": 2}.get(data.dtype.str[1:]) if levels is None else levels
        self._form = _form(data, layout, self.levels, missing)
        self.shape = self._form.shape(data.shape[1:])

    @override
    def set_scales(self, model: Any) -> None:
        """Set the scale of the model's condition. Warn if the model takes real numbers far from order 1 as they are.

        Args:
            model: The model.

        Raises:
            ValueError: If the condition has another number of covariates.
        """
        if self.levels is None and takes_raw_numbers(model, self.shape):
            self._check_scale()
        condition: Any = getattr(model, "condition", None)
        if "condition" in self._keys and getattr(condition, "covariates", None):
            numbers = self._files["train"].others["condition"]
            names = [f"{self._keys['condition']}[{column}]" for column in range(numbers.shape[1])]
            set_condition_scale(model, names, numbers, ((numbers == 0) | (numbers == 1)).all(0))

    def _check_scale(self) -> None:
        found = self._splits.get("train") or self._files["train"].some(_SAMPLED)
        step = max(1, len(found["x"]) // _SAMPLED)
        x = found["x"][::step]
        numbers = x[found["mask"][::step]] if self.missing else x
        if len(numbers) and is_far_from_one(numbers.mean(), numbers.std(correction=0)):
            rank_zero_warn(
                f"{type(self).__name__}: the networks take the numbers of {self._keys['x']} as they are, and they are"
                f" far from mean 0 and standard deviation 1: {numbers.mean():.4g} and {numbers.std(correction=0):.4g}."
                " Training may fail. Standardise them before you save them."
            )

    @override
    def _size(self) -> int:
        numbers = sum(math.prod(found[self._keys["x"]].shape) for found in self._found.values())
        return numbers * (self._form.dtype.itemsize + self.missing)

    def _excess(self) -> str:
        return f"The data take {self._size() / 2**30:.3g} GiB, more than `memory_budget` ({self.memory_budget})"

    @override
    def _find(self) -> dict[str, ArrayRows]:
        data = {split: self._checked(found, split) for split, found in self._found.items()}
        others = {split: self._others(found) for split, found in self._found.items()}
        if "condition" in self._keys:
            file = self._found["train"][self._keys["condition"]]
            for place, column in enumerate(np.atleast_2d(file.open().T)):
                check_rounding(f"`condition`: column {place} of {file}", torch.from_numpy(column.astype(np.float64)))
        self._number_labels(others)
        checksums, missing = {}, 0
        for split, file in data.items():
            checksums[split], count = _inspect(file, self._form, self.levels)
            missing += count
        fractions = {"test": self.test_fraction, "val": self.val_fraction}
        fractions = {split: share for split, share in fractions.items() if split not in data}
        numbers = {split: torch.arange(len(file)) for split, file in data.items()}
        numbers |= split_rows(len(data["train"]), fractions, self.seed, data["train"].path)
        homes = {split: split if split in data else "train" for split in ("train", "val", "test")}
        tensors: dict[str, Tensors] = {
            split: {"x": numbers[split]} | {name: values[numbers[split]] for name, values in others[home].items()}
            for split, home in homes.items()
        }
        tensors |= DataModule._hold_out(self, {split: tensors[split] for split in ("train", "val")})
        rows = {}
        for split, home in homes.items():
            chosen, rest = tensors[split]["x"], {name: each for name, each in tensors[split].items() if name != "x"}
            rows[split] = ArrayRows(data[home], self._form, chosen, rest)
            checksum = checksums[home]
            for tensor in (chosen, *rest.values()):
                checksum = zlib.crc32(tensor.numpy().data, checksum)
            self._identity[split] = {"observations": len(chosen), "checksum": f"{checksum:08x}"}
        self._identity |= {"classes": list(self.class_names), "shape": list(self.shape), "levels": self.levels}
        self._say(rows, missing)
        return rows

    def _say(self, rows: Mapping[str, ArrayRows], missing: int) -> None:
        """Print what the data are, how they are split and what is missing or not used."""
        file = rows["train"].file
        layout = f", {self._form.layout.replace('_', ' ')}" if len(file.shape) > 2 else ""
        kind = f"{self.levels} levels" if self.levels else "real numbers"
        lines = [
            f"{type(self).__name__}: {self.path} has {sizes({split: len(each) for split, each in rows.items()})}.",
            f"Data: {self._keys['x']}, {file.dtype} of shape {file.shape}{layout}, as {self.shape} with {kind}.",
        ]
        if derived := [split for split in ("val", "test") if split not in self._paths]:
            chosen = " and ".join(derived)
            lines.append(f"A hash of each row's number has chosen {chosen}, so the shares are approximate.")
        if "label" in self._keys:
            labels = torch.cat([each.others["label"] for each in rows.values()])
            lines.append(class_counts(labels, self.class_names))
        if "condition" in self._keys:
            columns = rows["train"].others["condition"].shape[1]
            lines.append(f"Condition: {self._keys['condition']}, numbers an observation: {columns}.")
        if self.missing:
            total = sum(len(each) for each in rows.values()) * math.prod(self.shape)
            lines.append(f"Missing: {missing} of {total} values.")
        if unused := [name for name in self._found["train"] if name not in self._keys.values()]:
            lines.append(f"Not used: {shortened(unused)}.")
        if not self._fits_in_memory():
            lines.append(f"{self._excess()}, so rows are read from the file during the run.")
        rank_zero_info("\n  ".join(lines))

    def _checked(self, found: Mapping[str, ArrayFile], split: str) -> ArrayFile:
        """Return the data of a file, which must fit those of `path`."""
        first, file = self._found["train"][self._keys["x"]], found[_checked_key("x", self._keys["x"], found)]
        if file.shape[1:] != first.shape[1:] or file.dtype.kind != first.dtype.kind:
            raise ValueError(
                f"`{split}_path` must hold {first.dtype} of shape {first.shape[1:]} an observation, as `path` does, got"
                f" {file.dtype} of shape {file.shape[1:]} in {file}. Save both alike."
            )
        if not len(file):
            raise ValueError(f"{file} has no observations. Name another file.")
        if file.offset is None and not self._fits_in_memory():
            raise ValueError(
                f"{file} is compressed, so its rows can't be read one by one. {self._excess()}. Save it with"
                " `numpy.savez`, or as .npy files in a folder, or raise the budget."
            )
        return file

    def _others(self, found: Mapping[str, ArrayFile]) -> dict[str, Any]:
        """Return the labels, as NumPy has them, and the conditions of a file."""
        others: dict[str, Any] = {}
        for name in ("label", "condition"):
            if name in self._keys:
                file = found[_checked_key(name, self._keys[name], found)]
                if len(file) != len(found[self._keys["x"]]):
                    raise ValueError(
                        f"`{name}` must have a row for each of the {len(found[self._keys['x']])} observations, got"
                        f" shape {file.shape} in {file}."
                    )
                first = self._found["train"][self._keys[name]]
                if name == "condition" and _width(file) != _width(first):
                    raise ValueError(
                        f"`condition` must have the {_width(first)} numbers an observation that {first} has, got"
                        f" {_width(file)} in {file}. Save both alike."
                    )
                others[name] = _labels(file) if name == "label" else _conditions(file)
        return others

    def _number_labels(self, others: Mapping[str, dict[str, Any]]) -> None:
        """Turn labels into tensors; words into numbers, those of `path` in alphabetical order and then the others."""
        if "label" not in self._keys:
            return
        every = [each["label"] for each in others.values()]
        if len({label.dtype.kind == "U" for label in every}) > 1:
            raise ValueError("`label` must hold words in all files, or integers in all. Save the labels alike.")
        if every[0].dtype.kind == "U":
            first, rest = others["train"]["label"], np.concatenate(every)
            self.class_names = [*np.unique(first).tolist(), *np.setdiff1d(rest, first).tolist()]
            places = {word: place for place, word in enumerate(self.class_names)}
            for each in others.values():
                each["label"] = np.array([places[word] for word in each["label"].tolist()])
        for each in others.values():
            each["label"] = torch.from_numpy(each["label"].astype(np.int64))


def _key_of_data(found: Mapping[str, ArrayFile], key: str | None) -> str:
    if key is None and "x" not in found and len(found) > 1:
        raise ValueError(f"`x` must name the data among {shortened(found)}, because none is called x.")
    return _checked_key("x", key or ("x" if "x" in found else next(iter(found))), found)


def _checked_key(name: str, key: str, found: Mapping[str, ArrayFile]) -> str:
    if key not in found:
        path = next(iter(found.values())).path
        raise ValueError(f"`{name}` is {key!r}, which {path} does not have. It has {shortened(sorted(found))}.")
    return key


def _form(file: ArrayFile, layout: str | None, levels: int | None, missing: bool) -> Form:
    if len(file.shape) < 2 or 0 in file.shape[1:]:
        raise ValueError(
            f"{file} must have the observations on its first axis and their values on others, got shape {file.shape}."
            " Reshape it: one number an observation is `(N, 1)`."
        )
    if file.dtype.kind not in "buif":
        raise ValueError(f"{file} must hold integers, floats or booleans, got {file.dtype}. Convert it.")
    if missing and file.dtype.kind != "f":
        raise ValueError(
            f"`missing` takes NaN for a missing value, and {file} holds {file.dtype}, which has no NaN. Save floats, or"
            " leave out `missing`."
        )
    if layout == "grey" and len(file.shape) != 3:
        raise ValueError(
            f'`layout` "grey" is for images without an axis of channels, (N, height, width), got shape {file.shape} in'
            f' {file}. Give "channels_first" or "channels_last".'
        )
    dtype = torch.float32
    if file.dtype.kind != "f" and levels is not None:
        dtype = torch.uint8 if levels <= 256 else torch.int32
    return Form(layout or _layout(file), dtype, missing)


def _layout(file: ArrayFile) -> str:
    """Return where the channels are, if only one place is possible."""
    axes, inner = len(file.shape) - 1, file.shape[1:]
    if axes == 1 or (axes == 2 and file.dtype.kind == "f"):
        return "channels_first"
    if axes == 2 and file.dtype.str[1:] in ("u1", "b1") and not any(side in _CHANNELS for side in inner):
        return "grey"
    if axes == 3 and (inner[0] in _CHANNELS) != (inner[-1] in _CHANNELS):
        return "channels_first" if inner[0] in _CHANNELS else "channels_last"
    raise ValueError(
        f'`layout` must be given for {file.dtype} of shape {file.shape}: "channels_first" (the array as it is),'
        ' "channels_last", or "grey" for images without an axis of channels.'
    )


def _inspect(file: ArrayFile, form: Form, levels: int | None) -> tuple[int, int]:
    """Check all values of an array, a part at a time.

    Returns:
        A checksum of the values, and how many are missing.

    Raises:
        DataError: If values are not finite or outside the levels, with the rows' numbers.
    """
    array, step = file.open(), max(1, _CHUNK // math.prod(file.shape[1:]))
    checksum, missing, faults = 0, 0, []
    for start in range(0, len(file), step):
        rows = array[start : start + step]
        checksum = zlib.crc32(np.ascontiguousarray(rows).data, checksum)
        tensors = form(rows)
        x = tensors["x"].flatten(1)
        fits = x.isfinite().all(dim=1)
        if levels is not None:
            fits &= _is_level(rows, levels)
        faults += (~fits).nonzero().flatten().add(start).tolist()
        missing += int((~tensors["mask"]).sum()) if form.missing else 0
    if faults:
        has_nan = file.dtype.kind == "f" and not form.missing and np.isnan(array[faults[0]]).any()
        allowed = "finite numbers" if levels is None else f"integers from 0 to {levels - 1}"
        remedy = "Set `missing` if NaN marks a missing value, or r" if has_nan else "R"
        raise DataError(
            f"{file} must hold {allowed}, but {len(faults)} of {len(file)} rows {'have NaN' if has_nan else 'do not'}:"
            f" {shortened(map(str, faults))}. {remedy}emove or fix these rows"
            f"{'' if levels is None else ', or set `levels`'}."
        )
    return checksum, missing


def _is_level(rows: np.ndarray[Any, Any], levels: int) -> Tensor:
    """Return which rows hold nothing but integers from 0 to `levels - 1`, apart from NaN."""
    raw = rows.reshape(len(rows), -1)  # as in the file, because a conversion to uint8 would wrap
    fits = np.isnan(raw) | ((raw >= 0) & (raw < levels) & (raw == np.floor(raw)))
    return torch.from_numpy(fits.all(axis=1))


def _labels(file: ArrayFile) -> np.ndarray[Any, Any]:
    label = file.open()
    if label.shape != (len(file),) and label.shape != (len(file), 1):
        raise ValueError(f"`label` must have one class an observation, got shape {file.shape} in {file}.")
    label = label.reshape(len(file))
    if label.dtype.kind == "S":
        label = np.char.decode(label, "utf-8", "replace")
    if label.dtype.kind == "f" and (np.abs(label) < 2**63).all() and (label == np.floor(label)).all():
        label = label.astype(np.int64)
    if label.dtype.kind == "u" and label.max(initial=0) > np.iinfo(np.int64).max:
        raise ValueError(f"`label` must fit int64, got {label.max()} in {file}. Number the classes from 0.")
    if label.dtype.kind not in "buiU":
        raise ValueError(
            f"`label` must hold integers or words, got {label.dtype} in {file}. Numbers that are no classes are a"
            " `condition`."
        )
    return label


def _width(file: ArrayFile) -> int:
    return math.prod(file.shape[1:])


def _conditions(file: ArrayFile) -> Tensor:
    values = file.open()
    if values.dtype.kind not in "buif" or values.ndim not in (1, 2):
        raise ValueError(
            f"`condition` must hold one or more numbers an observation, got {values.dtype} of shape {file.shape} in"
            f" {file}."
        )
    condition = torch.from_numpy(np.array(values, dtype=np.float32)).reshape(len(file), -1)
    faults = (~condition.isfinite().all(dim=1)).nonzero().flatten().tolist()
    if faults:
        raise DataError(
            f"`condition` must hold finite numbers, but {len(faults)} rows of {file} don't: row"
            f" {shortened(map(str, faults))}. Remove or fix these rows."
        )
    return condition
