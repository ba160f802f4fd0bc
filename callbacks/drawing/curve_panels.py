"""Vectors drawn as curves, in panels side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool1d

from .canvas import Canvas, Colour

_WIDTH, _HEIGHT, _MARGIN, _TITLE = 128, 84, 6, 14
_AXIS: Colour = (200, 200, 200)
_POINTS = 128  # of a curve at most; of longer vectors neighbours are averaged


def curve_panels(
    curves: Tensor, colours: Sequence[Colour], low: float, high: float, titles: Sequence[str] = (), columns: int = 5
) -> Tensor:
    """Draw panels of curves: the entries of a vector from left to right.

    All panels have the same scale, and a line at zero or at the edge that is nearest to it. A short vector's entries
    are marked with dots.

    Args:
        curves: Shape ``(panels, curves in a panel, entries)``.
        colours: One for each curve of a panel; later ones are drawn over earlier ones.
        low: Value at the bottom of a panel.
        high: Value at its top.
        titles: One for each panel.
        columns: Panels in a row.

    Returns:
        An image of shape ``(3, height, width)``, uint8.
    """
    values = curves.detach().float().cpu().nan_to_num()
    values = adaptive_avg_pool1d(values, min(values.shape[2], _POINTS))
    canvas = Canvas(_WIDTH * min(columns, len(values)), (_HEIGHT + _TITLE) * math.ceil(len(values) / columns))
    fraction = ((values - low) / max(high - low, 1e-12)).clamp(0, 1)
    entries = torch.linspace(0, 1, values.shape[2]) if values.shape[2] > 1 else torch.tensor([0.5])
    for number, panel in enumerate(fraction):
        left = number % columns * _WIDTH + _MARGIN
        top = number // columns * (_HEIGHT + _TITLE) + _TITLE
        right, bottom = left + _WIDTH - 2 * _MARGIN, top + _HEIGHT - _MARGIN
        axis = bottom - min(max(-low / max(high - low, 1e-12), 0.0), 1.0) * (bottom - top)
        canvas.line(torch.tensor([[left, axis], [right, axis]]), _AXIS)
        if titles:
            canvas.text((left, top - _TITLE + 2), titles[number])
        for curve, colour in zip(panel, colours, strict=True):
            points = torch.stack([left + entries * (right - left), bottom - curve * (bottom - top)], dim=1)
            canvas.line(points, colour, 1.3)
            if len(points) <= 16:
                canvas.dots(points, torch.tensor([colour]).expand(len(points), 3), radius=2)
    return canvas.image()
