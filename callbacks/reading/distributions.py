"""Convert the values that modules use as posterior and prior to distributions."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, Normal

from ..schedules import check_number

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule

TO_SCALE: dict[str, Callable[[Tensor], Tensor]] = {
    "log_variance": lambda second: (0.5 * second).exp(),
    "variance": lambda second: _positive(second).sqrt(),
    "scale": lambda second: _positive(second),
    "log_scale": torch.exp,
}


def as_distribution(
    value: Any, second: str = "log_variance", chunk: int | None = None, check: bool = False
) -> Distribution:
    """Convert the value that a module uses as its posterior to a distribution over ``(N, ...)`` latents.

    Args:
        value: A ``Distribution`` (``Independent`` is unwrapped), a sequence that holds exactly one, or a pair of
            tensors ``(mean, second)``; with ``chunk``, one tensor.
        second: Meaning of the second tensor: ``"log_variance"``, ``"variance"``, ``"scale"`` or ``"log_scale"``.
        chunk: Axis along which one tensor is split into halves, the mean and the second parameter.
        check: Refuse a scale or a variance that is not positive, which waits for the device. Without it such a number
            becomes NaN, and so does every rate computed from it.

    Returns:
        The distribution; a ``Normal`` for a pair and for a tensor that was split.

    Raises:
        ValueError: If the value is none of these; with ``check``, if a scale or a variance is not positive.

    Example::

        >>> as_distribution((torch.zeros(1, 2), torch.zeros(1, 2))).scale
        tensor([[1., 1.]])
        >>> as_distribution(torch.zeros(1, 4, 8, 8), chunk=1).mean.shape
        torch.Size([1, 2, 8, 8])
    """
    if chunk is not None:
        value = _halves(value, second, chunk)
    distributions = [item for item in value if isinstance(item, Distribution)] if is_sequence(value) else []
    if len(distributions) == 1:
        [value] = distributions
    if isinstance(value, Distribution):
        if isinstance(value, Independent):
            return as_distribution(value.base_dist, check=check)
        if check and isinstance(value, Normal):  # it may have been made without torch's own check
            _check_positive(value.scale, "scale", "")
        return value
    if is_pair(value):
        if not _fits(value[1], value[0]):
            raise pair_error(value, second)
        if check and second in ("scale", "variance"):
            _check_positive(value[1], second, ' If it is the log-variance, set `second="log_variance"`.')
        return Normal(value[0], TO_SCALE[second](value[1]), validate_args=False)
    if isinstance(value, Tensor):
        hint = f"If it holds the mean and then the {second} along an axis, split it along that axis: `chunk=1`."
    elif distributions:
        hint = "Specify which one is the posterior: `posterior='path:index'`."
    else:
        hint = f"Pick a part of it with `posterior='path:part'`, mean and {second} with `('path:part', 'path:part')`."
    raise ValueError(
        f"The posterior must be a torch.distributions.Distribution or a pair of tensors (mean, {second}), got "
        f"{describe(value)}. {hint} Or compute it with `posterior=lambda pl_module, batch: ...`."
    )


def check_form(second: str, chunk: int | None) -> None:
    """Check the options of :func:`as_distribution`.

    Raises:
        ValueError: If one is out of range.
    """
    if second not in TO_SCALE:
        raise ValueError(f"`second` must be one of {', '.join(map(repr, TO_SCALE))}, got {second!r}.")
    if chunk is not None:
        axes = "1, 2, ... or -1, -2, ... from the end (axis 0 is the observations)"
        allowed = f"the axis that holds the mean and then the second parameter: {axes}"
        check_number("chunk", chunk, allowed, lambda axis: isinstance(axis, int) and axis != 0)


def widened(value: Any) -> Any:
    """Return a tensor in half precision, or a pair, as float32: a small rate is a difference of larger numbers."""
    if isinstance(value, Tensor):
        return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value
    return [widened(each) for each in value] if is_pair(value) else value


def read_prior(pl_module: LightningModule) -> Distribution:
    """Return a module's attribute ``prior`` if it is a distribution, else N(0, I)."""
    prior = getattr(pl_module, "prior", None)
    return as_distribution(prior) if isinstance(prior, Distribution) else Normal(0.0, 1.0)


def is_pair(value: Any) -> TypeGuard[Sequence[Tensor]]:
    """Return whether a value is a pair of tensors."""
    return is_sequence(value) and len(value) == 2 and all(isinstance(item, Tensor) for item in value)


def pair_error(value: Any, second: str) -> ValueError:
    """Return the error for a pair whose shapes do not match."""
    return ValueError(
        f"The posterior's mean and {second} must have the same shape, got {describe(value)}, which may be something "
        "else. Name the right parts with `posterior=('path:part', 'path:part')`."
    )


def is_sequence(value: Any) -> TypeGuard[Sequence[Any]]:
    """Return whether a value is a tuple, a list or another sequence of things, such as Hydra's; a text is not."""
    return isinstance(value, tuple | list) or (isinstance(value, Sequence) and not isinstance(value, str | bytes))


def is_several(value: Any) -> TypeGuard[Sequence[Any]]:
    """Return whether a value holds several posteriors. A pair of tensors, or a distribution and a tensor, is one."""
    return (
        is_sequence(value)
        and len(value) > 0
        and all(isinstance(item, Distribution) or is_sequence(item) for item in value)
    )


def describe(value: Any) -> str:
    """Describe a value in a few words, for an error."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return f"a {type(value).__name__} with the keys {', '.join(map(repr, value))}"
    if is_sequence(value):
        return f"a {type(value).__name__} of {len(value)} ({', '.join(map(describe, value))})"
    fields = [name for name in getattr(value, "__dict__", ()) if not name.startswith("_")]
    if fields and not isinstance(value, Distribution | torch.nn.Module):
        return f"a {type(value).__name__} with the fields {', '.join(map(repr, fields))}"
    return f"a {type(value).__name__}"


def _positive(values: Tensor) -> Tensor:
    """Return values with NaN in the place of each that is not positive."""
    return torch.where(values > 0, values, math.nan)


def _check_positive(values: Tensor, second: str, hint: str) -> None:
    low = float(values.detach().min()) if values.numel() else 1.0
    if low <= 0:
        raise ValueError(
            f"The posterior's {second} must be positive, got values down to {low:.4g}."
            + (hint or " Make it so, for example with `softplus`.")
        )


def _fits(second: Tensor, mean: Tensor) -> bool:
    """Return whether a second parameter has one number per mean; all observations may share them."""
    shared = second.shape == mean.shape[1:] or (second.shape[1:] == mean.shape[1:] and len(second) == 1)
    return mean.ndim > 0 and (second.shape == mean.shape or shared or second.ndim == 0)


def _halves(value: Any, second: str, axis: int) -> tuple[Tensor, ...]:
    """Split a tensor into the mean and the second parameter."""
    if not isinstance(value, Tensor):
        raise ValueError(
            f"`chunk={axis}` splits one tensor into mean and {second}, got {describe(value)}. Name the tensor with "
            "`posterior='path:part'`, or leave `chunk` out."
        )
    if axis not in (*range(1, value.ndim), *range(1 - value.ndim, 0)):
        raise ValueError(
            f"`chunk={axis}` must be an axis after the first, that of the observations, got {describe(value)}."
        )
    size = value.shape[axis]
    if size == 0 or size % 2:
        raise ValueError(
            f"`chunk={axis}` must be an axis of even size, half for the mean and half for the {second}, got "
            f"{describe(value)}."
        )
    # (N, k, 2) is (N, k) twice, not (N, k, 1).
    return value.unbind(axis) if size == 2 and value.ndim > 2 else value.chunk(2, axis)
