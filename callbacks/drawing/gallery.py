"""Observations in rows, as images or as curves."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .canvas import Colour
from .colours import colour_map
from .images import as_images, image_grid
from .panels import curve_panels

_INPUT: Colour = (150, 150, 150)
_OUTPUT: Colour = (214, 39, 40)
_CURVES_IN_A_PANEL = 5


class Gallery:
    """Draw observations in rows: images as images, everything else as curves.

    Args:
        low: The value drawn as black, or at the bottom of a panel.
        high: The value drawn as white, or at the top of a panel.
    """

    def __init__(self, low: float, high: float) -> None:
        self.low, self.high = low, high

    def pairs(self, inputs: Tensor, outputs: Tensor) -> Tensor:
        """Draw inputs above outputs, each ``(n, ...)``; as curves, the output in red over the input in grey."""
        both = torch.stack([inputs, outputs])
        images = self._images(both)
        if images is not None:
            return image_grid(images, ["input", "output"])
        titles = ["input grey, output red", *[""] * (len(inputs) - 1)]
        return curve_panels(_curves(both).transpose(0, 1), [_INPUT, _OUTPUT], self.low, self.high, titles)

    def rows(self, values: Tensor, titles: Sequence[str] = ()) -> Tensor:
        """Draw rows ``(rows, columns, ...)`` that change from left to right; as curves, a panel each, dark to light."""
        images = self._images(values)
        if images is not None:
            return image_grid(images, titles)
        # The last tenth of the colour map is too light on a white background.
        shades = colour_map(torch.linspace(0, 0.9, values.shape[1])).tolist()
        return curve_panels(_curves(values), [tuple(shade) for shade in shades], self.low, self.high, titles)

    def each(self, values: Tensor, columns: int) -> Tensor:
        """Draw unordered observations ``(n, ...)`` in rows; as curves, five in a panel."""
        images = self._images(values.view(-1, columns, *values.shape[1:]))
        if images is not None:
            return image_grid(images)
        values = values.view(-1, _CURVES_IN_A_PANEL, *values.shape[1:])
        return curve_panels(_curves(values), [_OUTPUT] * _CURVES_IN_A_PANEL, self.low, self.high)

    def _images(self, values: Tensor) -> Tensor | None:
        images = as_images(values.flatten(0, 1))
        if images is None:
            return None
        fraction = (images - self.low) / (self.high - self.low)
        return fraction.view(*values.shape[:2], *images.shape[1:])


def _curves(values: Tensor) -> Tensor:
    """Return ``(rows, columns, ...)`` as vectors ``(rows, columns, n)``, a sequence entry by entry."""
    longest = max(range(2, values.ndim), key=lambda axis: values.shape[axis], default=-1)
    return values.movedim(longest, -1).flatten(2)
