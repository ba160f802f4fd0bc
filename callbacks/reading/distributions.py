"""Convert the values that modules use as posterior and prior to distributions."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeGuard

import torch
from torch import Tensor
from torch.distributions import (
    Categorical,
    Distribution,
    Independent,
    LowRankMultivariateNormal,
    MultivariateNormal,
    Normal,
    OneHotCategorical,
)

from ..schedules import check_number

Second = Literal["log_variance", "variance", "scale", "log_scale"] | Callable[[Tensor], Tensor]
"""Meaning of a Gaussian's second parameter, or a function from it to the scale."""

TO_SCALE: dict[str, Callable[[Tensor], Tensor]] = {
    "log_variance": lambda second: (0.5 * second).exp(),
    "variance": lambda second: _positive(second).sqrt(),
    "scale": lambda second: _positive(second),
    "log_scale": torch.exp,
}
# Usual names of the fields of an object or a mapping that describes a Gaussian, such as diffusers' `latent_dist`.
_MEANS = ("mean", "loc", "mu")
_SECONDS = {
    "log_variance": ("log_variance", "logvar", "log_var", "log_covariance", "log_sigma2"),
    "scale": ("scale", "std", "stddev", "sigma"),
    "variance": ("variance", "var"),
    "log_scale": ("log_scale", "log_std", "logstd", "log_sigma"),
}
_HOLDERS = ("latent_dist", "posterior", "distribution", "dist")


def as_distribution(
    value: Any, second: Second = "log_variance", chunk: int | None = None, check: bool = False, of: str = "posterior"
) -> Distribution:
    """Convert the value that a module uses as its posterior or prior to a distribution over ``(N, ...)`` latents.

    Args:
        value: A ``Distribution`` (``Independent`` is unwrapped, and a ``Categorical`` becomes one of one-hot vectors),
            a sequence that holds exactly one, a pair of tensors ``(mean, second)``, or an object or a mapping with
            these two under usual names (``mean`` and ``logvar``, ``loc`` and ``scale``); with ``chunk``, one tensor.
        second: Meaning of the second tensor, ``"log_variance"``, ``"variance"``, ``"scale"`` or ``"log_scale"``, or a
            function that turns it into the scale. Where a field has a name, the name decides.
        chunk: Axis along which one tensor is split into halves, the mean and the second parameter.
        check: Refuse a scale or a variance that is not positive, which waits for the device. Without it such a number
            becomes NaN, and so does every rate computed from it.
        of: What the value is, for errors.

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
        value = _halves(value, second, chunk, of)
    distributions = [item for item in value if isinstance(item, Distribution)] if is_sequence(value) else []
    if len(distributions) == 1:
        [value] = distributions
    if isinstance(value, Distribution):
        return _plain(value, check, of)
    if not (is_sequence(value) or isinstance(value, Tensor)) and (named := _named_parameters(value)) is not None:
        return (
            named
            if isinstance(named, Distribution)
            else as_distribution(widened(named[0]), named[1], check=check, of=of)
        )
    if is_pair(value):
        if not _fits(value[1], value[0]):
            raise pair_error(value, second, of)
        scale = second(value[1]) if callable(second) else TO_SCALE[second](value[1])
        if check and (callable(second) or second in ("scale", "variance")):
            hint = (
                ""
                if callable(second)
                else ' If it is the log-variance, set `second="log_variance"`; if the module turns it into the scale, '
                "give that function, `second=lambda raw: softplus(raw)`."
            )
            _check_positive(scale if callable(second) else value[1], name_of(second), hint, of)
        return Normal(value[0], scale, validate_args=False)
    what = name_of(second)
    if isinstance(value, Tensor):
        hint = (
            f"If it holds the mean and then the {what} along an axis, split it along that axis: `chunk=1`. If it holds "
            f"logits of classes: `{of}=lambda pl_module, batch: OneHotCategorical(logits=...)`."
        )
    elif distributions:
        hint = f"Specify which one is the {of}: `{of}='path:index'`."
    else:
        hint = f"Pick a part of it with `{of}='path:part'`, mean and {what} with `('path:part', 'path:part')`."
    raise ValueError(
        f"The {of} must be a torch.distributions.Distribution or a pair of tensors (mean, {what}), got "
        f"{describe(value)}. {hint} Or compute it with `{of}=lambda pl_module, batch: ...`."
    )


def check_form(second: Second, chunk: int | None) -> None:
    """Check the options of :func:`as_distribution`.

    Raises:
        ValueError: If one is out of range.
    """
    if not callable(second) and second not in TO_SCALE:
        raise ValueError(
            f"`second` must be one of {', '.join(map(repr, TO_SCALE))}, or a function from the second parameter to the "
            f"scale, got {second!r}."
        )
    if chunk is not None:
        axes = "1, 2, ... or -1, -2, ... from the end (axis 0 is the observations)"
        allowed = f"the axis that holds the mean and then the second parameter: {axes}"
        check_number("chunk", chunk, allowed, lambda axis: isinstance(axis, int) and axis != 0)


def standard_prior(posterior: Distribution) -> Distribution | None:
    """Return the prior of a module that has none: N(0, I), or uniform categories; ``None`` for another posterior."""
    if isinstance(posterior, OneHotCategorical):
        return _one_hot(torch.zeros_like(posterior.logits))
    return Normal(0.0, 1.0) if isinstance(posterior, Normal | MultivariateNormal | LowRankMultivariateNormal) else None


def name_of(second: Second) -> str:
    """Return the name of a second parameter, for errors."""
    return "second parameter" if callable(second) else second


def widened(value: Any) -> Any:
    """Return a tensor in half precision, or a pair, as float32: a small rate is a difference of larger numbers."""
    if isinstance(value, Tensor):
        return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value
    return [widened(each) for each in value] if is_pair(value) else value


def is_pair(value: Any) -> TypeGuard[Sequence[Tensor]]:
    """Return whether a value is a pair of tensors."""
    return is_sequence(value) and len(value) == 2 and all(isinstance(item, Tensor) for item in value)


def pair_error(value: Any, second: Second, of: str = "posterior") -> ValueError:
    """Return the error for a pair whose shapes do not match."""
    return ValueError(
        f"The {of}'s mean and {name_of(second)} must have the same shape, got {describe(value)}, which may be "
        f"something else. Name the right parts with `{of}=('path:part', 'path:part')`."
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


def _one_hot(logits: Tensor) -> OneHotCategorical:
    return OneHotCategorical(logits=logits, validate_args=False)


def _plain(value: Distribution, check: bool, of: str) -> Distribution:
    """Return a distribution without the wrappers that hide its dimensions."""
    if isinstance(value, Independent):
        return _plain(value.base_dist, check, of)
    if isinstance(value, Categorical):
        return _one_hot(value.logits)
    if check and isinstance(value, Normal):  # it may have been made without torch's own check
        _check_positive(value.scale, "scale", "", of)
    return value


def _field(value: Any, name: str) -> Any:
    return value.get(name) if isinstance(value, Mapping) else getattr(value, name, None)


def _named_parameters(value: Any) -> tuple[Sequence[Tensor], Second] | Distribution | None:
    """Return a Gaussian's two parameters, and what the second is, from the fields of an object or a mapping."""
    for name in _MEANS:
        mean = _field(value, name)
        for second, names in _SECONDS.items():
            for each in names:
                if isinstance(mean, Tensor) and isinstance(other := _field(value, each), Tensor):
                    return (mean, other), second  # type: ignore[return-value]
    for name in _HOLDERS:
        held = _field(value, name)
        if isinstance(held, Distribution):
            return _plain(held, False, "")
        if held is not None and not isinstance(held, Tensor | str) and (named := _named_parameters(held)) is not None:
            return named
    return None


def _check_positive(values: Tensor, second: str, hint: str, of: str) -> None:
    low = float(values.detach().min()) if values.numel() else 1.0
    if low <= 0:
        raise ValueError(
            f"The {of}'s {second} must be positive, got values down to {low:.4g}."
            + (hint or " Make it so, for example with `softplus`.")
        )


def _fits(second: Tensor, mean: Tensor) -> bool:
    """Return whether a second parameter has one number per mean; all observations may share them."""
    shared = second.shape == mean.shape[1:] or (second.shape[1:] == mean.shape[1:] and len(second) == 1)
    return mean.ndim > 0 and (second.shape == mean.shape or shared or second.ndim == 0)


def _halves(value: Any, second: Second, axis: int, of: str) -> tuple[Tensor, ...]:
    """Split a tensor into the mean and the second parameter."""
    if not isinstance(value, Tensor):
        raise ValueError(
            f"`chunk={axis}` splits one tensor into mean and {name_of(second)}, got {describe(value)}. Name the tensor "
            f"with `{of}='path:part'`, or leave `chunk` out."
        )
    if axis not in (*range(1, value.ndim), *range(1 - value.ndim, 0)):
        raise ValueError(
            f"`chunk={axis}` must be an axis after the first, that of the observations, got {describe(value)}."
        )
    size = value.shape[axis]
    if size == 0 or size % 2:
        raise ValueError(
            f"`chunk={axis}` must be an axis of even size, half for the mean and half for the {name_of(second)}, got "
            f"{describe(value)}."
        )
    # (N, k, 2) is (N, k) twice, not (N, k, 1).
    return value.unbind(axis) if size == 2 and value.ndim > 2 else value.chunk(2, axis)
