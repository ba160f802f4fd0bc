"""The scale of the data: given to a model that standardises, checked for one that does not."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .batch_loader import DataError

_MOST_ROUNDING = 0.01  # standard deviations that float32 may take from a number
_LARGEST_MEAN, _SCALES = 10.0, (0.1, 10.0)  # what networks train on as it is


def takes_raw_numbers(model: Any, shape: Sequence[int]) -> bool:
    """Return whether a model's networks get real-valued data in their own scale, whatever it is.

    Args:
        model: A model with a `likelihood`, or anything else, which is not known to.
        shape: Shape of one observation.
    """
    likelihood: Any = getattr(model, "likelihood", None)
    if not hasattr(likelihood, "features") or hasattr(likelihood, "set_scale"):
        return False
    probe = torch.zeros(1, *shape, device=getattr(model, "device", None))
    return likelihood.features(probe) is probe


def is_far_from_one(loc: Tensor, scale: Tensor) -> Tensor:
    """Return where means and standard deviations are far from order 1, in the shape of both."""
    return (loc.abs() > _LARGEST_MEAN) | (scale < _SCALES[0]) | (scale > _SCALES[1])


def set_condition_scale(model: Any, names: Sequence[str], numbers: Tensor, is_code: Tensor) -> None:
    """Give the model's condition the means and standard deviations of its covariates, if it takes them.

    Args:
        model: A model whose `condition` may have `set_scale`, or anything else.
        names: Name of each covariate.
        numbers: The covariates of the training split, shape `(N, covariates)`.
        is_code: Which of them are codes of categories, and stay as they are, shape `(covariates,)`.

    Raises:
        ValueError: If the model's condition has another number of covariates.
    """
    condition: Any = getattr(model, "condition", None)
    if not hasattr(condition, "set_scale"):
        return
    wanted = getattr(condition, "covariates", len(names))
    if wanted != len(names):
        raise ValueError(
            f"`covariates` of the model's condition is {wanted}, but the condition of the data has {len(names)}"
            f" numbers: {', '.join(names)}. Set `covariates` to {len(names)}, or give the data another `condition`."
        )
    numbers = numbers.double()
    scale = numbers.std(0, correction=0)
    condition.set_scale(numbers.mean(0).where(~is_code, 0), scale.where(~is_code & (scale > 0), 1))


def check_rounding(what: str, numbers: Tensor) -> None:
    """Check that numbers stay apart in float32.

    Args:
        what: What holds them, for the error.
        numbers: float64 of shape `(N,)`, NaN where a value is missing.

    Raises:
        DataError: If rounding moves a number by more than a hundredth of their standard deviation.
    """
    values = numbers[numbers.isfinite()]
    if not len(values) or values.min() == values.max():
        return
    scale, moved = float(values.std(correction=0)), float((values.float().double() - values).abs().max())
    if moved > _MOST_ROUNDING * scale:
        raise DataError(
            f"{what} has numbers from {float(values.min()):.12g} to {float(values.max()):.12g}, which float32 would"
            f" round by up to {moved:.3g}, too much for a standard deviation of {scale:.3g}. Subtract an offset, such"
            " as the smallest."
        )
