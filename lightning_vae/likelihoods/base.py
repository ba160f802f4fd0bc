"""The base class of the likelihoods, and the distribution of independent numbers that most of them return."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Self, TypeGuard

import torch
from torch import Tensor, nn
from torch import distributions as td
from torch.nn import functional as F  # noqa: N812

from ..distributed import sum_over_processes
from ..networks import Shape
from ..objective import broadcasts_to


class Likelihood(nn.Module):
    """Base class of the likelihoods: from the decoder's output to a distribution over one observation.

    Args:
        shape: Shape of one observation.
        levels: Number of integer levels of the raw data, ``None`` for real-valued data.

    Attributes:
        output_shape: Shape of the decoder's output for one observation; a subclass that needs more than ``shape`` sets
            it in its constructor.
        features_shape: Shape of :meth:`features` for one observation, the encoder's input.
    """

    learns_scale = False
    """True if the scale adapts to the reconstruction error during training."""
    learns_each_scale = False
    """True if each number of an observation has an adapting scale of its own."""
    unit_interval = False
    """True if data in the networks' scale must lie in [0, 1]."""
    takes_mask = False
    """True if ``log_prob`` of the distribution takes a mask of missing numbers."""
    starts = False
    """True if a parameter waits for the first training batch, which sets its initial value: until then it is zero."""

    def __init__(self, shape: Shape, levels: int | None = None) -> None:
        super().__init__()
        self.shape = tuple(shape)
        self.levels = levels
        self.output_shape = self.features_shape = self.shape

    def observe(self, x: Tensor, index: Tensor | None) -> Tensor:
        """Return the observed values of data in the networks' scale: the data, unless a subclass randomises them.

        Args:
            x: Data in the networks' scale, shape ``(B, *shape)``.
            index: Index of each observation, which fixes its noise; ``None`` for fresh noise, as in training.
        """
        del index
        return x

    def features(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the encoder's input, shape ``(B, *features_shape)``: the data, with 0 for missing numbers.

        Args:
            x: Observed values, as :meth:`observe` returns them, shape ``(B, *shape)``.
            mask: True where a number is there, shape ``(B, *shape)``; ``None`` if none is missing.
        """
        return x if mask is None else x.where(mask, 0)

    def forward(self, output: Tensor, x: Tensor | None = None, mask: Tensor | None = None) -> td.Distribution:
        """Return p(x|z), with batch shape ``(B,)`` and event shape ``shape``.

        Args:
            output: The decoder's output, shape ``(B, *output_shape)``.
            x: During training, the data that it will be evaluated on, for a scale computed from the error.
            mask: True where a number of ``x`` is there; ``None`` if none is missing. A likelihood that takes no mask
                needs no such argument.

        Returns:
            A distribution in the networks' scale. If the likelihood takes a mask, so does ``log_prob(value, mask)``,
            and missing numbers count nothing.
        """
        raise NotImplementedError(f"`likelihood`: {type(self).__name__} has no `forward`. Use a class that has one.")

    def check_values(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Check that data are values that the likelihood has a density for. This synchronises with the device.

        Args:
            x: Data in their own scale, shape ``(B, *shape)``, finite where they are not missing.
            mask: As in :meth:`features`.

        Raises:
            ValueError: If they are not.
        """

    def error_unit(self) -> Tensor | float:
        """Return the unit of an observation's difference from its mean, for a constraint on the squared error.

        Returns:
            A number, or one for each number of an observation: 1, unless the distribution has another scale.

        Raises:
            ValueError: If the squared error has no meaning for these observations.
        """
        return 1.0

    def check_mask(self) -> None:
        """Check that the likelihood can leave missing numbers out.

        Raises:
            ValueError: If it can't.
        """
        if not self.takes_mask:
            raise ValueError(
                f"`likelihood` {type(self).__name__} takes no mask of missing numbers. Use a likelihood with "
                "`takes_mask = True`, or data without missing numbers."
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # Under `bf16-true`, rounding would undo each optimizer step of a learned scale.
        super()._apply(at_least_float32(fn), recurse)  # type: ignore[no-untyped-call]
        return self

    def _independent(self, distribution: td.Distribution) -> td.Distribution:
        return IndependentNumbers(distribution, len(self.shape), validate_args=False)

    def _needs(self, parameters: int) -> None:
        """Let the decoder's output hold several parameters of each number, one after the other along the first axis."""
        self.output_shape = (parameters * self.shape[0], *self.shape[1:])

    def _parameters_of(self, output: Tensor, number: int) -> tuple[Tensor, ...]:
        """Return the parameters in the decoder's output, each of shape ``(B, *shape)``."""
        parts: tuple[Tensor, ...] = output.unflatten(1, (number, self.shape[0])).unbind(1)
        return parts

    def _start_with_data(self, name: str) -> None:
        """Let the first training batch set a parameter or buffer that is zero until then."""
        self.starts, self._started = True, name
        self.register_load_state_dict_post_hook(_note_start)  # type: ignore[no-untyped-call]

    def _is_first(self, x: Tensor | None) -> TypeGuard[Tensor]:
        """Return whether these are the first training batch, which sets the initial value."""
        if x is None or not self.starts:
            return False
        _note_start(self)  # the value may have been set without loading a checkpoint
        is_first, self.starts = self.starts, False
        return is_first


class IndependentNumbers(td.Independent):  # type: ignore[type-arg]
    """Independent numbers of one observation, whose density refuses observations of another shape."""

    def log_prob(self, value: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the log-density of whole observations, in nats.

        Args:
            value: Observations, in the networks' scale. Where a number is missing it may be anything, also NaN.
            mask: Boolean, True where a number is there; ``None`` if none is missing.

        Raises:
            ValueError: If the values or the mask have another shape, or the mask is not boolean.
        """
        self._check("value", value)
        if mask is None:
            return self._log_prob(value)
        if mask.dtype != torch.bool:
            raise ValueError(f"`mask` must be boolean, True where a number is there, got {mask.dtype}.")
        self._check("mask", mask)
        # The gradient of a missing number is 0 times that of its stand-in, which must be finite.
        log_prob: Tensor = self.base_dist.log_prob(value.where(mask, 0)).where(mask, 0)
        return self._sum(log_prob)

    def _check(self, name: str, tensor: Tensor) -> None:
        event = self.event_shape
        last = tensor.shape[-len(event) :]
        if last.numel() != event.numel() or not broadcasts_to(last, event):  # only axes of size 1 may be missing
            raise ValueError(
                f"`{name}` must end with the shape {tuple(event)} of one observation, got shape {tuple(tensor.shape)}."
            )

    def _log_prob(self, value: Tensor) -> Tensor:
        return self._sum(self.base_dist.log_prob(value))

    def _sum(self, numbers: Tensor) -> Tensor:
        return numbers.flatten(-self.reinterpreted_batch_ndims).sum(-1)  # torch's sum refuses an empty batch


def soft_clamp(x: Tensor, low: float, high: float) -> Tensor:
    """Bound numbers smoothly: nearly the identity between the bounds, and with a slope everywhere."""
    bounded: Tensor = low + F.softplus(x - low) - F.softplus(x - high)
    return bounded


def global_mean(numbers: Tensor, mask: Tensor | None = None, per_dimension: bool = False) -> Tensor:
    """Compute the mean of numbers over the global batch of all processes, of those that are there.

    Args:
        numbers: One for each number of the data, shape ``(B, *shape)``.
        mask: True where a number is there; ``None`` if none is missing.
        per_dimension: Average over the observations alone. A dimension without a number gets the mean of all.

    Returns:
        A scalar, or ``shape``.
    """
    there = numbers if mask is None else numbers.where(mask, 0)
    total = there.sum(0) if per_dimension else there.sum()
    if mask is None:
        count = torch.full_like(total, numbers.numel() // max(1, total.numel()))
    else:
        mask = mask.expand_as(numbers)
        count = (mask.sum(0) if per_dimension else mask.sum()).to(total.dtype)
    total, count = sum_over_processes(torch.stack([total, count]))
    mean: Tensor = total / count
    return mean if mask is None else mean.where(count > 0, total.sum() / count.sum())


def check_integers(what: str, x: Tensor, top: float = math.inf) -> None:
    """Check that numbers are integers from 0 on. This synchronises with the device.

    Args:
        what: What needs them, for the error.
        x: The numbers.
        top: The largest integer that fits.

    Raises:
        ValueError: If one is not.
    """
    values = x.detach() if x.dtype == torch.float64 else x.detach().float()  # some types can't be rounded
    wrong = (values != values.round()) | (values < 0) | (values > top)
    if wrong.any():
        needed = "counts (0, 1, 2 and so on)" if top == math.inf else f"integers from 0 to {top:g}"
        raise ValueError(f"{what} needs {needed}, but a batch holds {values[wrong][0].item():g}. Fix the data.")


def _note_start(module: Any, _keys: object = None) -> None:
    """Note if the value is still the one before the first batch: a checkpoint may lack another."""
    module.starts = not getattr(module, module._started).any()


def at_least_float32(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Wrap the function of ``nn.Module._apply``: move tensors as ``fn`` does, but never to half precision."""

    def apply(tensor: Tensor) -> Tensor:
        applied = fn(tensor)
        if applied.dtype in (torch.bfloat16, torch.float16) and applied.dtype != tensor.dtype:
            return tensor.to(applied.device)
        return applied

    return apply
