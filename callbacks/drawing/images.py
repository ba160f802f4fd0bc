"""Recognise images among observations, and arrange them side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

from .canvas import Canvas

# All sizes are in pixels.
_CHANNELS = (1, 3, 4)
_MIN_SIDE = 4  # narrower arrays are vectors with extra axes
_MIN_SIDE_WITHOUT_CHANNELS = 8  # narrower arrays are sequences of vectors
_CELL_SIDE = 32  # approximate; small images are enlarged to it
_MAX_CELL_SIDE = 96
_LINE_HEIGHT = 13  # of a label
_THUMBNAIL_SIDE = 32  # at most


def as_images(values: Tensor) -> Tensor | None:
    """Return observations as grey or colour images, or ``None`` if they are not images.

    Images have the shape ``(N, C, H, W)``, ``(N, H, W, C)`` with one, three or four channels, or ``(N, H, W)`` with at
    least 8 pixels per side. Of a volume or a clip, ``(N, C, D, H, W)``, ``(N, D, C, H, W)`` or ``(N, D, H, W, C)``, the
    middle slice is used. A fourth channel is dropped. Any other number of channels is averaged to grey.

    Args:
        values: Observations, one for each entry of the first axis.

    Returns:
        Images of shape ``(N, 1, H, W)`` or ``(N, 3, H, W)``, or ``None``.
    """
    if values.ndim == 5:
        slices_first = values.shape[1] not in _CHANNELS and not {values.shape[2], values.shape[4]}.isdisjoint(_CHANNELS)
        axis = 1 if slices_first else 2
        values = values.select(axis, values.shape[axis] // 2)
    if values.ndim == 3:
        if min(values.shape[1:]) < _MIN_SIDE_WITHOUT_CHANNELS:
            return None
        values = values.unsqueeze(1)
    if values.ndim != 4:
        return None
    if values.shape[-1] in _CHANNELS and values.shape[1] not in _CHANNELS:
        values = values.movedim(-1, 1)
    if min(values.shape[2:]) < _MIN_SIDE:
        return None
    channels = values.shape[1]
    if channels == 4:
        return values[:, :3]
    return values if channels in (1, 3) else values.mean(1, keepdim=True)


def image_grid(images: Tensor, labels: Sequence[str] = ()) -> Tensor:
    """Draw rows of images as one picture.

    Small images are enlarged pixel by pixel; large ones are averaged down to 96 pixels per side.

    Args:
        images: Values from 0 to 1, shape ``(rows, columns, C, H, W)`` with C 1 or 3. Other values are clamped, and NaN
            is 0.
        labels: One for each row, written on its left.

    Returns:
        An image of shape ``(3, height, width)``, uint8.
    """
    rows, columns, channels, *size = images.shape
    cells = images.detach().float().cpu().nan_to_num().clamp(0, 1).reshape(-1, channels, *size)
    cells = _resized(cells)
    room = max(0, _LINE_HEIGHT - 2 - cells.shape[2]) if labels else 0
    cells = pad(cells, (1, 1, 1 + room // 2, 1 + room - room // 2), value=1.0).expand(-1, 3, -1, -1)
    height, width = cells.shape[2:]
    grid = cells.view(rows, columns, 3, height, width).permute(2, 0, 3, 1, 4).reshape(3, rows * height, columns * width)
    picture = (grid * 255).round().to(torch.uint8)
    return torch.cat([_label_column(labels, height), picture], dim=2) if labels else picture


def _resized(cells: Tensor) -> Tensor:
    longest = max(cells.shape[2:])
    if longest <= _MAX_CELL_SIDE:
        factor = round(_CELL_SIDE / math.sqrt(cells.shape[2] * cells.shape[3]))
        factor = max(1, min(factor, _MAX_CELL_SIDE // longest))
        return cells.repeat_interleave(factor, dim=2).repeat_interleave(factor, dim=3)
    size = [max(1, round(side * _MAX_CELL_SIDE / longest)) for side in cells.shape[2:]]
    return interpolate(cells, size, mode="area")


def _label_column(labels: Sequence[str], height: int) -> Tensor:
    canvas = Canvas(10 + 6 * max(map(len, labels)), height * len(labels))
    for row, label in enumerate(labels):
        canvas.text((canvas.width - 5, (row + 0.5) * height), label, anchor="rm")
    return canvas.image()


def thumbnails(values: Tensor) -> Tensor | None:
    """Return observations as colour images of at most 32 pixels per side; ``None`` if they are not images.

    Args:
        values: Observations, one for each entry of the first axis.

    Returns:
        Square images of shape ``(N, 3, S, S)``, scaled together to values from 0 to 1, or ``None``.
    """
    images = as_images(values.float().cpu())
    if images is None:
        return None
    side = min(_THUMBNAIL_SIDE, max(images.shape[2:]))
    small = interpolate(images, (side, side), mode="area")
    low, high = small.min(), small.max()
    return ((small - low) / (high - low).clamp(min=1e-12)).expand(-1, 3, -1, -1)
