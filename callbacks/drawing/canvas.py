"""A surface to draw on: lines, areas, dots and text, with smooth edges."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

Colour = tuple[int, int, int]

_FINER = 2  # drawn at twice the size, then averaged


class Canvas:
    """A white surface, with x to the right and y down, in pixels.

    Pillow, which TensorBoard depends on, draws the lines and the text.

    Args:
        width: Width in pixels.
        height: Height in pixels.
    """

    def __init__(self, width: int, height: int) -> None:
        from PIL import Image

        self.width, self.height = width, height
        self._surface = Image.new("RGB", (width * _FINER, height * _FINER), "white")

    def line(self, points: Tensor, colour: Colour, width: float = 1.0) -> None:
        """Draw a line through points of shape ``(n, 2)``, a dot if there is only one."""
        if len(points) == 1:
            self.dots(points, torch.tensor([colour]), radius=2 * width)
        else:
            self._pen.line(self._coordinates(points), fill=colour, width=max(1, round(width * _FINER)), joint="curve")

    def area(self, points: Tensor, colour: Colour) -> None:
        """Fill the polygon with corners of shape ``(n, 2)``."""
        self._pen.polygon(self._coordinates(points), fill=colour)

    def circle(self, centre: tuple[float, float], radius: float, colour: Colour) -> None:
        """Draw the outline of a circle."""
        box = [(place + offset) * _FINER for offset in (-radius, radius) for place in centre]
        self._pen.ellipse(box, outline=colour, width=_FINER)

    def dots(self, points: Tensor, colours: Tensor, radius: float = 1.5) -> None:
        """Draw dots at points of shape ``(n, 2)`` in colours of shape ``(n, 3)``; points outside are left out."""
        pixels = _to_tensor(self._surface)
        height, width, _ = pixels.shape
        reach = torch.arange(-int(radius * _FINER), int(radius * _FINER) + 1)
        down, right = torch.meshgrid(reach, reach, indexing="ij")
        within = down**2 + right**2 <= (radius * _FINER) ** 2
        x, y = (points.detach().cpu() * _FINER).nan_to_num(-1e6).clamp(-1e6, 1e6).round().long().unbind(1)
        x, y = x[:, None] + right[within], y[:, None] + down[within]
        inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
        each = colours.to(torch.uint8)[:, None].expand(-1, x.shape[1], -1)
        # In NumPy the later of two dots covers the earlier one; with torch's threads the order is undefined.
        pixels.view(-1, 3).numpy()[(y * width + x)[inside].numpy()] = each[inside].numpy()
        self._surface = _to_pillow(pixels)

    def text(self, place: tuple[float, float], text: str, colour: Colour = (60, 60, 60), anchor: str = "la") -> None:
        """Write text at a place; ``anchor`` is Pillow's, such as ``"la"`` (left, top) or ``"mm"`` (middle)."""
        self._pen.text((place[0] * _FINER, place[1] * _FINER), text, fill=colour, font=_font(), anchor=anchor)

    def image(self) -> Tensor:
        """Return the drawing, shape ``(3, height, width)``, uint8."""
        return _to_tensor(self._surface.reduce(_FINER)).permute(2, 0, 1)

    @property
    def _pen(self) -> Any:
        from PIL import ImageDraw

        return ImageDraw.Draw(self._surface)

    @staticmethod
    def _coordinates(points: Tensor) -> list[float]:
        bounded = points.detach().cpu().float().nan_to_num(0, 1e4, -1e4).clamp(-1e4, 1e4)
        flat: list[float] = (bounded * _FINER).flatten().tolist()
        return flat


@cache
def _font() -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(size=11 * _FINER)


def _to_tensor(surface: Any) -> Tensor:
    return torch.frombuffer(bytearray(surface.tobytes()), dtype=torch.uint8).view(surface.height, surface.width, 3)


def _to_pillow(pixels: Tensor) -> Any:
    from PIL import Image

    return Image.frombytes("RGB", (pixels.shape[1], pixels.shape[0]), pixels.contiguous().numpy().tobytes())
