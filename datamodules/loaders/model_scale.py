"""The scale of the data, as the networks will see it."""

from torch import Tensor

from .batch_loader import DataError

_MOST_ROUNDING = 0.01  # standard deviations that float32 may take from a number


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
