"""Observations: a batch as a model sees it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

from .likelihoods import Likelihood
from .networks import Shape
from .objective import broadcasts_to

LABELS = ("label", "labels", "y", "target", "targets", "class")
"""Keys of the labels in a mapping; the same as in ``callbacks/reading/batch_fields.py``, which can't be imported."""

_FORMS = "A batch must be a tensor, a sequence that starts with one, or a mapping with the key 'x'."
_NUMBERS = {torch.bool, torch.bfloat16, torch.float16, torch.float32, torch.float64}
_NUMBERS |= {getattr(torch, f"{sign}int{bits}") for sign in ("", "u") for bits in (8, 16, 32, 64)}
_NUMBERS |= {getattr(torch, name) for name in dir(torch) if name.startswith("float8_")}


@dataclass(frozen=True, eq=False)
class Observations:
    """One batch as a model sees it, made by :meth:`lightning_vae.VAE.observe`.

    Attributes:
        x: The data in their own scale, shape ``(B, *shape)``.
        scaled: The data in the networks' scale, shape ``(B, *shape)``.
        observed: The encoder's input, on which the likelihood is also evaluated: ``scaled``, binarised for a Bernoulli.
        index: Index of each observation in its data set, int64, shape ``(B,)``. It fixes the observation's noise.
        label: Class or attributes of each observation as the batch holds them, a tensor or a sequence of length B;
            ``None`` if it has none.
        condition: What p(x|c) is conditioned on, shape ``(B, columns)``; see :class:`lightning_vae.Condition`. ``None``
            for a model without a condition.
        mask: True where a number of x is there and False where it is missing, shape ``(B, *shape)``; ``None`` if all
            are there. Missing numbers are 0 in ``x``.
        is_training: Whether binarisation and posterior sample have fresh noise, which the index does not fix.
    """

    x: Tensor
    scaled: Tensor
    observed: Tensor
    index: Tensor
    label: Any = None
    condition: Tensor | None = None
    mask: Tensor | None = None
    is_training: bool = False

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, rows: slice) -> Self:
        held = {each.name: getattr(self, each.name) for each in fields(self)}
        return type(self)(**{name: value if _is_whole(value) else value[rows] for name, value in held.items()})

    def split(self, size: int) -> Iterator[Self]:
        """Yield the observations in parts of at most ``size``."""
        for start in range(0, len(self), size):
            yield self[start : start + size]


def _is_whole(value: Any) -> bool:
    """Return whether a field of a record has no rows."""
    return value is None or isinstance(value, bool)


def data_of(batch: Any, shape: Shape) -> Tensor:
    """Return the data in a batch, in their own scale.

    Args:
        batch: A tensor, a sequence that starts with one, or a mapping with the key ``"x"``.
        shape: Shape of one observation.

    Returns:
        Shape ``(B, *shape)``.

    Raises:
        ValueError: If the batch holds no tensor of such observations.
    """
    if type(batch) is dict or isinstance(batch, Mapping):  # the check for a `Mapping` is slower
        if "x" not in batch:
            keys = ", ".join(map(repr, batch)) or "no keys"
            raise ValueError(f"`shape` is {shape}, but a batch is a mapping with {keys}. {_FORMS}")
        batch = batch["x"]
    elif _is_sequence(batch):
        batch = batch[0] if len(batch) else batch
    check_data(batch, shape)
    x: Tensor = batch
    return x


def check_data(x: Any, shape: Shape) -> None:
    """Check that data are a tensor of observations and hold numbers. This reads no value.

    Args:
        x: The data in their own scale.
        shape: Shape of one observation.

    Raises:
        ValueError: If they are not.
    """
    if isinstance(x, Tensor):
        check_type("The data", x)
    if not isinstance(x, Tensor) or x.shape[1:] != shape:
        if isinstance(x, Tensor):
            raise ValueError(f"`shape` is {shape}, but a batch holds {tuple(x.shape[1:])} per observation. {_FORMS}")
        remedy = (
            "Convert it with `torch.from_numpy`, or leave out the DataLoader's own `collate_fn`."
            if hasattr(x, "__array__")
            else _FORMS
        )
        raise ValueError(f"`shape` is {shape}, but the data in a batch are a {type(x).__name__}. {remedy}")


def check_type(what: str, tensor: Tensor) -> None:
    """Check that a tensor holds integers or floating-point numbers in the usual layout.

    Args:
        what: What the tensor is, for the error.
        tensor: The tensor.

    Raises:
        ValueError: If it is complex, quantized, sparse or nested.
    """
    usual = tensor.layout is torch.strided and not tensor.is_nested
    if not usual or tensor.dtype not in _NUMBERS:
        kind = str(tensor.dtype) if usual else f"{tensor.dtype} in the layout {tensor.layout}"
        raise ValueError(
            f"{what} must be integers or floating-point numbers in a dense tensor, got {kind}. Convert the tensor."
        )


def without_missing(x: Tensor, batch: Any) -> tuple[Tensor, Tensor | None]:
    """Replace the numbers that a batch says are missing by 0, whatever they hold.

    Args:
        x: The data, shape ``(B, *shape)``.
        batch: The batch. A mapping has the mask under ``"mask"``: True where a number is there.

    Returns:
        The data, and the mask of the same shape; ``None`` if the batch has none.

    Raises:
        ValueError: If the mask is no boolean tensor that broadcasts to the data.
    """
    mask = batch.get("mask") if isinstance(batch, Mapping) else None
    if mask is None:
        return x, None
    given = f"{mask.dtype} of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or not broadcasts_to(mask.shape, x.shape):
        raise ValueError(
            f"`mask` must be a boolean tensor of the data's shape {tuple(x.shape)}, True where a number is there, got "
            f"{given}."
        )
    mask = mask.to(x.device).expand_as(x)
    return x.masked_fill(~mask, 0), mask


def index_and_label_of(batch: Any, size: int) -> tuple[Tensor | None, Any]:
    """Return the indices and the labels in a batch, ``None`` for either that it lacks.

    A mapping has the index under ``"index"`` and the label under the first of :data:`LABELS` that it holds: a tensor or
    a sequence with one item per observation. The second item of a sequence is the label if it has one number or word
    per observation. Indices and labels of shape ``(B, 1)`` are returned as ``(B,)``.

    Raises:
        ValueError: If the index is not one integer per observation.
    """
    if isinstance(batch, Mapping):
        label = _column(next((batch[name] for name in LABELS if name in batch), None))
        return _checked_index(batch.get("index"), size), label if _has_items(label, size) else None
    second = _column(batch[1]) if _is_sequence(batch) and len(batch) > 1 else None
    return None, second if _has_items(second, size) and len(getattr(second, "shape", (size,))) == 1 else None


def check_index(index: Tensor, size: int) -> None:
    """Check that there is one index per observation.

    Raises:
        ValueError: If the indices are not integers of shape ``(size,)``.
    """
    is_number = isinstance(index, Tensor) and index.dtype != torch.bool
    is_integer = is_number and not (index.is_floating_point() or index.is_complex())
    if not is_integer or index.shape != (size,):
        held = f"{index.dtype} of shape {tuple(index.shape)}" if isinstance(index, Tensor) else type(index).__name__
        raise ValueError(f"`index` must be an integer for each observation, of shape {(size,)}, got {held}.")


def _checked_index(index: Any, size: int) -> Tensor | None:
    if index is None:
        return None
    found: Tensor = _column(index)
    check_index(found, size)
    return found


def _column(values: Any) -> Any:
    """Return a tensor or array of shape ``(B, 1)`` as ``(B,)``, anything else unchanged."""
    return values[:, 0] if getattr(values, "shape", ())[1:] == (1,) else values


def _has_items(label: Any, size: int) -> bool:
    if hasattr(label, "shape"):  # a tensor or an array
        return tuple(label.shape[:1]) == (size,)
    return _is_sequence(label) and len(label) == size


def _is_sequence(value: Any) -> bool:
    return isinstance(value, tuple | list) or (isinstance(value, Sequence) and not isinstance(value, str | bytes))


def check_scale(x: Tensor, levels: int | None, likelihood: Likelihood, mask: Tensor | None = None) -> None:
    """Check that data are in the scale that a model expects.

    This synchronises with the device. While torch traces a graph there are no values to check.

    Args:
        x: The data in their own scale.
        levels: Number of integer levels of the raw data, ``None`` for data in the networks' scale.
        likelihood: The model's.
        mask: True where a number is there; ``None`` if none is missing. Missing numbers are 0.

    Raises:
        ValueError: If they are not finite, already scaled, or outside the likelihood's range.
    """
    if not has_values(x):
        return
    if levels is None:
        warn_of_rounding("The data", x)
    low, high = check_finite("The data", x)
    if levels is not None and x.is_floating_point() and high <= 1 < levels - 1 and (low, high) != (0, 0):
        raise ValueError(
            f"`levels` is {levels}, so the data should be integers from 0 to {levels - 1}, but a batch holds fractions "
            f"from {low:g} to {high:g}, as if already scaled. Pass levels=None for data in [0, 1]."
        )
    top = 1 if levels is None else levels - 1
    if likelihood.unit_interval and not 0 <= low <= high <= top:
        raise ValueError(
            f"`likelihood` {type(likelihood).__name__} needs data from 0 to {top}, but a batch holds values from "
            f"{low:g} to {high:g}. Rescale the data, set `levels`, or use the Gaussian likelihood."
        )
    if levels is not None and not 0 <= low <= high < levels:  # noise of up to one level may have been added
        raise ValueError(
            f"`levels` is {levels}, so the data should be integers from 0 to {levels - 1}, but a batch holds values "
            f"from {low:g} to {high:g}. Pass levels=None for data that are already scaled."
        )
    likelihood.check_values(x, mask)


def check_finite(what: str, tensor: Tensor) -> tuple[float, float]:
    """Check that a tensor that is not empty is finite, and return its smallest and its largest value.

    This synchronises with the device.

    Args:
        what: What the tensor is, for the error.
        tensor: The tensor.

    Raises:
        ValueError: If a value is not finite.
    """
    values = tensor.detach()
    values = values if values.dtype == torch.float64 else values.float()  # some types have no minimum
    low, high = torch.stack(values.aminmax()).tolist()
    if not math.isfinite(low + high):
        raise ValueError(f"{what} must be finite, but a batch holds values from {low:g} to {high:g}. Fix the data.")
    return low, high


def warn_of_rounding(what: str, tensor: Tensor) -> None:
    """Warn of real numbers in half precision, to which Lightning rounds each batch under ``bf16-true``."""
    if tensor.dtype in (torch.bfloat16, torch.float16):
        digits = 3 if tensor.dtype == torch.bfloat16 else 4
        rank_zero_warn(
            f"{what} came in {str(tensor.dtype).removeprefix('torch.')}, rounded to about {digits} digits. With "
            "`precision='bf16-mixed'` they stay in float32."
        )


def has_values(tensor: Tensor) -> bool:
    """Return whether a tensor has values that can be read: it is not empty, and torch is not tracing a graph."""
    is_traced: bool = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    return not (torch.compiler.is_compiling() or is_traced or tensor.is_meta or tensor.numel() == 0)
