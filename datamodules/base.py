"""Base class of the data modules, and functions to split a data set."""

import hashlib
import os
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from typing_extensions import override

from ..checks import check_number, integer_from
from .loaders.batch_loader import BatchLoader, rank_and_world_size
from .loaders.seeding import seeded_generator
from .loaders.tensor_loader import TensorLoader, place_on_device

Tensors = Mapping[str, Tensor]


class DataModule(pl.LightningDataModule, ABC):
    """Base of the data modules: reads each split once and makes loaders over it.

    A batch is a dict. `"x"` holds the raw observations, uint8 images `(B, C, H, W)` or float32 vectors `(B, d)`.
    `"index"` holds their positions in the split, `(B,)`, which do not depend on the order, the batch size or the number
    of processes. `"label"` holds their classes, `(B,)`, if the data set has any, and `"condition"` numbers that the
    model is given beside them, float32 `(B, columns)`. `"mask"`, bool of the shape of `"x"`, is False where a value is
    missing, if any may be.

    Training and validation are parts of the training data. Only `test` and `predict` use the test split; `predict` goes
    through all of it in order. Classes that are held out are missing from training and validation, and remain in the
    test split, to be found there as anomalies. The split of the other observations is the same with and without them.

    A checkpoint holds a fingerprint of the splits, and the options that training depends on. A run that uses it over
    other data, or continues it with other options, warns.

    On a GPU, a split that takes at most a quarter of the free memory is copied there once, when its loader is made. Its
    batches are then cut on the GPU: the same batches in the same order, without a copy per batch.

    Args:
        batch_size: Observations in a batch of one process.
        seed: Seed of the training order and of the data set's other random choices.
        held_out: Classes to leave out of training and validation: by name if the classes have names, else by number.

    Attributes:
        shape: Shape of one observation, known before the data are read.
        levels: Number of integer levels of the raw data; None for real-valued data.
        class_names: Name of each class, by label; empty if the classes have no names.

    Raises:
        ValueError: If `batch_size` is below 1, `seed` is no integer, or `held_out` is no list of classes.
    """

    shape: tuple[int, ...]
    levels: int | None
    class_names: Sequence[str] = ()

    def __init__(self, batch_size: int = 128, seed: int = 0, held_out: Sequence[int | str] = ()) -> None:
        check_number("batch_size", batch_size, "at least 1", integer_from(1))
        check_number("seed", seed, "an integer", integer_from())
        check_number("held_out", held_out, "a list of classes, such as [3]", _are_classes)
        super().__init__()
        self.batch_size = batch_size
        self.seed = seed
        self.held_out = tuple(map(str, held_out))
        self._splits: dict[str, Tensors] = {}
        self._identities: dict[str, dict[str, Any]] = {}  # of each split
        self._has_saved = False

    @override
    def setup(self, stage: str) -> None:
        """Read the splits that a stage needs, once, and print what they hold. `"fit"` gives the model their scale.

        Args:
            stage: `"fit"` and `"validate"` read training and validation, `"test"` and `"predict"` the test split.

        Raises:
            FileNotFoundError: If a file is missing.
            DataError: If a file is damaged or can't be used.
            ValueError: If a class to hold out is unknown, nothing is left without it, or the model does not fit the
                data.
        """
        self._load(stage)
        if stage == "fit":  # later the scale comes from the checkpoint
            self.set_scales(getattr(self.trainer, "lightning_module", None))

    def _load(self, stage: str) -> None:
        """Read the splits that a stage needs, once, and print what they hold."""
        test = stage in ("test", "predict")
        if ("test" if test else "train") not in self._splits:
            found = self._read_test() if test else self._hold_out(self._read_train())
            self._splits.update(found)
            self._report(found)

    def set_scales(self, model: Any) -> None:
        """Give a model the scale of the training data, if it standardises them. Here there is none to give.

        Args:
            model: The model, or ``None`` without one.

        Raises:
            ValueError: If the model does not fit the data.
        """

    def file_names(self, stage: str) -> Sequence[str]:  # noqa: ARG002  # for data sets of files
        """Return the file of each observation of a stage, by index; empty if the observations have no files.

        Args:
            stage: `"test"` or `"predict"`.
        """
        return ()

    @override
    def state_dict(self) -> dict[str, Any]:
        self._has_saved = True
        fingerprint = self._fingerprint()
        return {"fingerprint": fingerprint, "training": self._training_options()} if fingerprint else {}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Warn if the data are not those of the checkpoint, or a run continues with other options of the data.

        Args:
            state_dict: `state_dict()` of the run that saved the checkpoint.

        Raises:
            ValueError: If a class that the model is given has another number.
        """
        fingerprint = self._fingerprint()
        condition: Any = getattr(getattr(self.trainer, "lightning_module", None), "condition", None)
        if getattr(condition, "classes", None):
            _check_numbers(state_dict.get("fingerprint", {}).get("classes", ()), fingerprint.get("classes", ()))
        changes = _changes(state_dict.get("fingerprint", {}), fingerprint)
        is_resumed = self.trainer is None or self.trainer.state.fn == TrainerFn.FITTING
        options = []
        if is_resumed and not self._has_saved:  # otherwise a tuner restores what it saved at the start of this run
            options = _changes(state_dict.get("training", {}), self._training_options())
        if changes:
            differences = "; ".join(dict.fromkeys(changes + options))  # a seed may be both
            rank_zero_warn(
                f"{type(self).__name__}: the checkpoint was trained on other data: {differences}."
                " Results can't be compared with earlier ones, and after another split a test may contain observations"
                " that were trained on. If you did not mean that, use the data and the options of that run."
            )
        elif options:
            rank_zero_warn(
                f"{type(self).__name__}: the run continues with other options of the data than it was saved with:"
                f" {'; '.join(options)}."
            )

    @override
    def train_dataloader(self) -> BatchLoader:
        """Return a shuffled loader over the training split; in order under `overfit_batches`."""
        overfit = self.trainer is not None and self.trainer.overfit_batches > 0  # type: ignore[attr-defined]
        loader = self._loader("train", shuffle=not overfit)
        # A second fit and `reload_dataloaders_every_n_epochs` make a new loader, which must not repeat the first order.
        loader.load_state_dict({"epoch": self.trainer.current_epoch if self.trainer else 0, "position": 0})
        return loader

    @override
    def val_dataloader(self) -> BatchLoader:
        return self._loader("val")

    @override
    def test_dataloader(self) -> BatchLoader:
        return self._loader("test")

    @override
    def predict_dataloader(self) -> BatchLoader:
        return self._loader("test")

    @abstractmethod
    def _read_train(self) -> dict[str, Tensors]:
        """Return the splits `"train"` and `"val"`."""

    @abstractmethod
    def _read_test(self) -> dict[str, Tensors]:
        """Return the split `"test"`."""

    def _hold_out(self, found: dict[str, Tensors]) -> dict[str, Tensors]:
        """Return training and validation without the classes that are held out, and print what was left out."""
        if not self.held_out:
            return found
        if not all("label" in tensors and tensors["label"].ndim == 1 for tensors in found.values()):
            raise ValueError("`held_out` needs data with one class for each observation. Leave it out, or add labels.")
        labels = torch.cat([tensors["label"] for tensors in found.values()])
        named = {name: number for number, name in enumerate(self.class_names)}
        numbers = named or {str(number): number for number in labels.unique().tolist()}
        check_held_out(self.held_out, numbers)
        held_out = torch.tensor([numbers[name] for name in self.held_out])
        kept: dict[str, Tensors] = {}
        for split, tensors in found.items():
            is_kept = ~torch.isin(tensors["label"], held_out)
            kept[split] = {name: tensor[is_kept] for name, tensor in tensors.items()}
        check_left({split: len(tensors["x"]) for split, tensors in kept.items()}, self.held_out)
        counts = class_counts(labels[torch.isin(labels, held_out)], self.class_names)
        rank_zero_info(f"{type(self).__name__}: held out of training and validation. {counts}")
        return kept

    def _report(self, found: Mapping[str, Tensors]) -> None:
        """Print how many observations each split has, and how many each class."""
        labels = [tensors["label"] for tensors in found.values() if "label" in tensors]
        text = f"{type(self).__name__}: {sizes({name: len(tensors['x']) for name, tensors in found.items()})}."
        rank_zero_info(text + (f" {class_counts(torch.cat(labels), self.class_names)}" if labels else ""))

    def _fingerprint(self) -> dict[str, Any]:
        """Return what identifies the data: of each known split, the number of observations and a checksum.

        Where there are training data, the test split is read too, so that a test of the checkpoint can compare it.
        """
        for name, tensors in self._splits.items():
            if name not in self._identities:
                self._identities[name] = _identity(tensors)
        if "train" in self._splits and "test" not in self._identities:
            self._identities["test"] = {}
            with suppress(Exception):  # a run saves whatever its test split may be
                self._identities["test"] = _identity(self._read_test()["test"])
        return {name: identity for name, identity in self._identities.items() if identity}

    def _training_options(self) -> dict[str, Any]:
        """Return the options that a training depends on, besides the data, by their names in a message."""
        _, processes = rank_and_world_size()
        return {
            "batch size over all processes": processes * self.batch_size,
            "seed": self.seed,
            "held out": shortened(self.held_out) or "none",
        }

    def _loader(self, split: str, shuffle: bool = False) -> BatchLoader:
        return TensorLoader(self._tensors(split), self.batch_size, shuffle=shuffle, seed=self.seed)

    def _tensors(self, split: str) -> Tensors:
        tensors = self._splits[split]
        return place_on_device(tensors, self.trainer.strategy.root_device) if self.trainer else tensors


def split_indices(size: int, fraction: float, seed: int, name: str) -> tuple[Tensor, Tensor]:
    """Split the positions `0, ..., size - 1` at random into two parts.

    Args:
        size: Number of observations.
        fraction: Share of the second part.
        seed: Seed of the split.
        name: Name of the option that holds `fraction`, for the error.

    Returns:
        The positions of the first part and of the second, each in ascending order.

    Raises:
        ValueError: If a part would be empty.
    """
    count = round(size * fraction)
    if not 0 < count < size:
        raise ValueError(
            f"`{name}` must leave observations on both sides, got {fraction} of {size}, which is {count}."
            " Choose another fraction or add data."
        )
    order = torch.randperm(size, generator=seeded_generator(seed, "split"))
    return order[count:].sort().values, order[:count].sort().values


def split_of_name(name: str, fractions: Mapping[str, float], seed: int) -> str:
    """Return the split of an observation, which depends on nothing but its name, the fractions and the seed.

    So an observation that is added or removed moves no other, and the sizes of the splits are approximate.

    Args:
        name: What identifies the observation, such as the path of its file.
        fractions: By split, its share of what the splits before it have left. The rest is `"train"`.
        seed: Seed of the split.
    """
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    position = int.from_bytes(digest[:8], "big") / 2**64  # uniform in [0, 1)
    for split, fraction in fractions.items():
        if position < fraction:
            return split
        position = (position - fraction) / (1 - fraction)
    return "train"


def check_apart(path: str | Path, val_path: str | Path | None, test_path: str | Path | None) -> dict[str, Path]:
    """Return the path of each split that has a file of its own, and check that no two are the same file.

    Args:
        path: The file of the training split, and of each split without a file.
        val_path: The file of the validation split.
        test_path: The file of the test split.

    Raises:
        ValueError: If two paths lead to the same file.
    """
    options = {"train": path, "val": val_path, "test": test_path}
    paths = {split: Path(each).expanduser() for split, each in options.items() if each is not None}
    splits: dict[str, str] = {}
    for split, each in paths.items():
        before = splits.setdefault(os.path.realpath(each), split)
        if before != split:
            other = "path" if before == "train" else f"{before}_path"
            raise ValueError(
                f"`{split}_path` and `{other}` are the same file, {each}, so a model would be judged on rows that it"
                f" was trained on. Leave out `{split}_path`, or name another file."
            )
    return paths


def split_rows(size: int, fractions: Mapping[str, float], seed: int, path: str | Path) -> dict[str, Tensor]:
    """Split the rows of a file by a hash of their numbers, so that a row that is appended moves no other.

    Args:
        size: Number of rows.
        fractions: By split, its share of what the splits before it have left. The rest is `"train"`.
        seed: Seed of the split.
        path: The file, for the error.

    Returns:
        By split, the numbers of its rows in ascending order.

    Raises:
        ValueError: If a split would be empty.
    """
    rows: dict[str, list[int]] = {name: [] for name in ("train", *fractions)}
    for row in range(size):
        rows[split_of_name(str(row), fractions, seed)].append(row)
    if empty := [name for name, numbers in rows.items() if not numbers]:
        options = ", ".join(f"`{name}_fraction` {fraction}" for name, fraction in fractions.items())
        raise ValueError(
            f"{' and '.join(empty)} would have none of the {size} rows of {path}"
            + (
                f", with {options}. A hash of each row's number decides, so a small set may miss a split: choose other"
                " fractions or another `seed`, add rows, or give `val_path` and `test_path`."
                if fractions
                else ". Add rows."
            )
        )
    return {name: torch.tensor(numbers) for name, numbers in rows.items()}


def split_tensors(tensors: Tensors, fraction: float, seed: int) -> dict[str, Tensors]:
    """Split a training set into `"train"` and `"val"`.

    Args:
        tensors: Tensors by name, one observation a row.
        fraction: Share of the validation split.
        seed: Seed of the split.
    """
    train, val = split_indices(len(tensors["x"]), fraction, seed, name="val_fraction")
    return {
        name: {key: tensor.index_select(0, index) for key, tensor in tensors.items()}
        for name, index in (("train", train), ("val", val))
    }


def check_held_out(held_out: Sequence[str], classes: Iterable[str]) -> None:
    """Raise a ValueError if one of the classes to hold out is not among the classes of the training data."""
    known = list(classes)
    if unknown := [name for name in held_out if name not in known]:
        raise ValueError(
            f"`held_out` must be classes of the training data, {shortened(known) or 'which has none'}, got"
            f" {shortened(unknown)}."
        )


def check_left(observations: Mapping[str, int], held_out: Sequence[str]) -> None:
    """Raise a ValueError if a split has no observations without the classes that are held out."""
    if empty := [name for name, count in observations.items() if not count]:
        raise ValueError(
            f"`held_out` must leave observations in train and val, but without {shortened(held_out)} there are none in"
            f" {' and '.join(empty)}. Hold out fewer classes, or add data."
        )


def sizes(observations: Mapping[str, int]) -> str:
    """Return the number of observations in each split, as text."""
    return f"{sum(observations.values())} observations, " + ", ".join(
        f"{count} in {name}" for name, count in observations.items()
    )


def class_counts(labels: Tensor, names: Sequence[str]) -> str:
    """Return the number of observations in each class, as text.

    Args:
        labels: The class of each observation, `(N,)`.
        names: Name of each class, by label; empty for classes without names.
    """
    values, counts = labels.unique(return_counts=True)
    pairs = zip(values.tolist(), counts.tolist(), strict=True)
    return f"Classes: {shortened(f'{names[value] if names else value} ({count})' for value, count in pairs)}."


def shortened(items: Iterable[str]) -> str:
    """Join the first ten items, and say how many follow."""
    known = list(items)
    return ", ".join(known[:10]) + (f" and {len(known) - 10} more" if len(known) > 10 else "")


def _identity(tensors: Tensors) -> dict[str, Any]:
    checksum = 0
    for name in sorted(tensors):
        checksum = zlib.crc32(tensors[name].contiguous().numpy().data, checksum)
    return {"observations": len(tensors["x"]), "checksum": f"{checksum:08x}"}


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Describe the differences between the entries that two records share."""
    return [_change(name, before[name], now[name]) for name in before if name in now and before[name] != now[name]]


def _check_numbers(before: Sequence[str], now: Sequence[str]) -> None:
    """Raise a ValueError if a number stands for another class than before; one side may have more classes."""
    for number, (name, other) in enumerate(zip(before, now, strict=False)):
        if name != other:
            raise ValueError(
                f"The model is given the class, and class {number} was {name!r} when the checkpoint was trained, now"
                f" it is {other!r}: {shortened(before)} -> {shortened(now)}. Give the data of that run as the training"
                " data, and new observations as the test data: then the classes have the same numbers."
            )


def _change(name: str, before: Any, now: Any) -> str:
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        counts = before.get("observations"), now.get("observations")
        same = counts[0] == counts[1]
        return f"{name} has other observations" if same else f"{name} has {counts[1]} observations, had {counts[0]}"
    if isinstance(before, list) and isinstance(now, list):
        before, now = shortened(map(str, before)), shortened(map(str, now))
    return f"{name}: {before} -> {now}"


def _are_classes(held_out: Sequence[int | str]) -> bool:
    return all(isinstance(each, str) or integer_from()(each) for each in held_out)


def check_fraction(name: str, value: float) -> None:
    """Raise a ValueError unless the option `name` lies between 0 and 1, both excluded."""
    check_number(name, value, "between 0 and 1, both excluded", lambda share: 0 < share < 1)
