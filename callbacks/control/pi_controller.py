"""A PI controller of the logarithm of a weight, as pure functions of 0-dim tensors.

The linear VAE shows why the logarithm is right: with ``n`` active dimensions its rate falls by ``n / 2`` nats per unit
of ``log(weight)`` at any weight, but by ``n / (2 weight)`` nats per unit of the weight itself. An active dimension
carries about a nat, so the error relative to the target responds to the logarithm with a gain between 1/2 and 1, for
any target and any number of latent dimensions. Its squared error is proportional to the weight where all dimensions are
active, so there the gain is 1. One pair of gains therefore serves them all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import Tensor


class ControllerState(NamedTuple):
    """State of a controller, as 0-dim float32 tensors on one device.

    Attributes:
        average: The moving average of the measurements; NaN before the first.
        integral: The sum of the errors, in units of the output.
        output: Logarithm of the weight of the next step.
        steps_at_bound: Number of consecutive steps with the output at a bound and the target missed; negative at the
            lower bound.
    """

    average: Tensor
    integral: Tensor
    output: Tensor
    steps_at_bound: Tensor

    @classmethod
    def start(cls, output: float, device: torch.device | str) -> Self:
        """Return the state before the first measurement."""
        values = (float("nan"), output, output, 0.0)
        return cls(*(torch.tensor(value, dtype=torch.float32, device=device) for value in values))


@dataclass(frozen=True)
class PIController:
    """Raise the output if a measured number is above its target, and lower it if the number is below.

    Args:
        lower: Smallest output.
        upper: Largest output.
        proportional: Gain of the error.
        integral: Gain of its sum, per step.
        smoothing: Weight of the previous average: 0.95 averages over about 20 steps.
        tolerance: Relative error up to which the target counts as met.
    """

    lower: float
    upper: float
    proportional: float
    integral: float
    smoothing: float
    tolerance: float

    def __call__(self, state: ControllerState, measured: Tensor, target: float, scale: float) -> ControllerState:
        """Return the state after a measurement, without waiting for the device.

        Args:
            state: The previous state.
            measured: The number measured in this step; one that is not finite is skipped.
            target: Its target.
            scale: The unit of errors.
        """
        average = exponential_average(state.average, measured, self.smoothing)
        error = relative_error(average, target, scale)
        integral = integrate(state.integral, error, self.lower, self.upper, self.proportional, self.integral)
        output = (self.proportional * error + integral).clamp(self.lower, self.upper)
        # A float32 sum of the two may miss a bound by its rounding.
        high = (output >= self.upper - 1e-4) & (error > self.tolerance)
        low = (output <= self.lower + 1e-4) & (error < -self.tolerance)
        steps = state.steps_at_bound
        steps = torch.where(high, steps.clamp(min=0) + 1, torch.where(low, steps.clamp(max=0) - 1, 0.0))
        return ControllerState(average, integral, output, steps)


def exponential_average(previous: Tensor, value: Tensor, smoothing: float) -> Tensor:
    """Return the moving average after another value; a non-finite value leaves it unchanged.

    Args:
        previous: The previous average, NaN before the first value.
        value: The value.
        smoothing: Weight of the previous average, from 0 to below 1.
    """
    average = torch.where(previous.isnan(), value, torch.lerp(value, previous, smoothing))
    return torch.where(value.isfinite(), average, previous)


def relative_error(measured: Tensor, target: float, scale: float) -> Tensor:
    """Return the excess of a number over its target, in units of a scale, clamped to -1 and 1.

    With the clamp, only the gains determine the largest move of the output, even for an untrained model's numbers, and
    nothing can overflow.

    Args:
        measured: The number; NaN has no error.
        target: Its target.
        scale: The unit.
    """
    return ((measured - target) / scale).nan_to_num(0.0).clamp(-1.0, 1.0)


def integrate(integral: Tensor, error: Tensor, lower: float, upper: float, proportional: float, gain: float) -> Tensor:
    """Add ``gain * error`` to the integral, as far as the output stays within its bounds.

    At a bound the integral stops instead of winding up, so the output leaves the bound with the first error of the
    other sign. (ControlVAE's published image and text code tests ``W < 0 and W >= 1``, which is never true.)

    Args:
        integral: The previous integral.
        error: The error of this step.
        lower: Smallest output, ``proportional * error + integral``.
        upper: Largest output.
        proportional: Gain of the error in the output.
        gain: Gain of the error in the integral.
    """
    above = (upper - proportional * error - integral).clamp(min=0.0)
    below = (lower - proportional * error - integral).clamp(max=0.0)
    return integral + torch.clamp(gain * error, below, above)
