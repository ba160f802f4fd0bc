"""Showing observations, be they images or not."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .canvas import Colour
from .colours import colour_map
from .curve_panels import curve_panels
from .image_grid import image_grid
from .images import as_images

_INPUT: Colour = (150, 150, 150)
_OUTPUT: Colour = (214, 39, 40)
_IN_A_PANEL = 5


class Gallery:
    """Draws observations in rows: images as they are, everything else as curves.

    Args:
        low: The value drawn as black, or at the bottom of a curve's panel.
        high: The value drawn as white, or at its top.
    """

    def __init__(self, low: float, high: float) -> None:
        self.low, self.high = low, high

    def pairs(self, inputs: Tensor, outputs: Tensor) -> Tensor:
        """Draw inputs above outputs; as curves, in grey and in red over it. Both have the shape ``(n, ...)``."""
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
        # The last tenth of the colour map is too light on white.
        shades = colour_map(torch.linspace(0, 0.9, values.shape[1])).tolist()
        return curve_panels(_curves(values), [tuple(shade) for shade in shades], self.low, self.high, titles)

    def each(self, values: Tensor, columns: int) -> Tensor:
        """Draw observations ``(n, ...)`` that have no order, in rows; as curves, five in a panel."""
        images = self._images(values.view(-1, columns, *values.shape[1:]))
        if images is not None:
            return image_grid(images)
        values = values.view(-1, _IN_A_PANEL, *values.shape[1:])
        return curve_panels(_curves(values), [_OUTPUT] * _IN_A_PANEL, self.low, self.high)

    def _images(self, values: Tensor) -> Tensor | None:
        images = as_images(values.flatten(0, 1))
        if images is None:
            return None
        fraction = (images - self.low) / (self.high - self.low)
        return fraction.view(*values.shape[:2], *images.shape[1:])


def _curves(values: Tensor) -> Tensor:
    """Return rows and columns of observations as vectors; of a sequence of vectors, each entry's course in turn."""
    longest = max(range(2, values.ndim), key=lambda axis: values.shape[axis], default=-1)
    return values.movedim(longest, -1).flatten(2)
