"""Images side by side in one picture."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

from .canvas import Canvas

_CELL = 32  # pixels that a side of an image is enlarged to, about
_LARGEST = 96  # and at most
_LINE = 13  # pixels that a label takes


def image_grid(images: Tensor, labels: Sequence[str] = ()) -> Tensor:
    """Draw rows of images as one picture.

    Small images are enlarged pixel by pixel, large ones averaged down to 96 pixels a side. Rows with labels are high
    enough for them.

    Args:
        images: Values from 0 to 1 (others are clamped, NaN is 0), shape ``(rows, columns, C, H, W)`` with C 1 or 3.
        labels: What is written to the left of each row.

    Returns:
        An image of shape ``(3, height, width)``, uint8.
    """
    rows, columns, channels, *size = images.shape
    cells = images.detach().float().cpu().nan_to_num().clamp(0, 1).reshape(-1, channels, *size)
    cells = _resized(cells)
    room = max(0, _LINE - 2 - cells.shape[2]) if labels else 0
    cells = pad(cells, (1, 1, 1 + room // 2, 1 + room - room // 2), value=1.0).expand(-1, 3, -1, -1)
    height, width = cells.shape[2:]
    grid = cells.view(rows, columns, 3, height, width).permute(2, 0, 3, 1, 4).reshape(3, rows * height, columns * width)
    picture = (grid * 255).round().to(torch.uint8)
    return torch.cat([_column(labels, height), picture], dim=2) if labels else picture


def _resized(cells: Tensor) -> Tensor:
    longest = max(cells.shape[2:])
    if longest <= _LARGEST:
        factor = max(1, min(round(_CELL / math.sqrt(cells.shape[2] * cells.shape[3])), _LARGEST // longest))
        return cells.repeat_interleave(factor, dim=2).repeat_interleave(factor, dim=3)
    size = [max(1, round(side * _LARGEST / longest)) for side in cells.shape[2:]]
    return interpolate(cells, size, mode="area")


def _column(labels: Sequence[str], height: int) -> Tensor:
    canvas = Canvas(10 + 6 * max(map(len, labels)), height * len(labels))
    for row, label in enumerate(labels):
        canvas.text((canvas.width - 5, (row + 0.5) * height), label, anchor="rm")
    return canvas.image()
