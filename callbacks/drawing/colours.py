"""Numbers as colours."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

# Ten equally spaced colours of matplotlib's viridis (Smith, van der Walt and Firing, 2015; CC0).
_VIRIDIS = (
    (68, 1, 84),
    (72, 40, 120),
    (62, 73, 137),
    (49, 104, 142),
    (38, 130, 142),
    (31, 158, 137),
    (53, 183, 121),
    (110, 206, 88),
    (181, 222, 43),
    (253, 231, 37),
)
_MAX_CELLS = 512  # per side
_PIXELS = 256  # approximate side of an image with fewer cells; the time to encode grows with its square


def heat_map(values: Tensor) -> Tensor:
    """Draw a matrix of values over time as an image.

    Time runs to the right and dimensions run down, in their own order, so a dimension has the same row in every
    picture. Dark violet is 0 or less, yellow is the largest value in the matrix. Cells are enlarged to about 256 pixels
    per side, along time at most eightfold. Beyond 512 cells per side, neighbours are averaged.

    Args:
        values: Values of shape ``(time, dimensions)``.

    Returns:
        An image of shape ``(3, height, width)``, uint8.
    """
    cells = values.detach().float().cpu().nan_to_num().clamp(min=0).T
    cells = cells / cells.max().clamp(min=torch.finfo(cells.dtype).tiny)
    height, width = (min(size, _MAX_CELLS) for size in cells.shape)
    cells = adaptive_avg_pool2d(cells[None], (height, width))[0]
    image = colour_map(cells).permute(2, 0, 1)
    down, right = max(_PIXELS // height, 1), min(max(_PIXELS // width, 1), 8)
    return image.repeat_interleave(down, dim=1).repeat_interleave(right, dim=2)


def colour_map(fraction: Tensor) -> Tensor:
    """Return the viridis colours of fractions ``(...)``, from dark violet at 0 to yellow at 1: ``(..., 3)``, uint8."""
    anchors = torch.tensor(_VIRIDIS, dtype=torch.float32)
    position = fraction * (len(anchors) - 1)
    left = position.long().clamp(max=len(anchors) - 2)
    colour = torch.lerp(anchors[left], anchors[left + 1], (position - left).unsqueeze(-1))
    return colour.round().to(torch.uint8)
