"""Latents as dots in the plane, coloured by their labels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .canvas import Canvas, Colour
from .colours import colour_map

_SIZE, _MARGIN, _AXIS_NAME, _LEGEND, _REACH = 168, 5, 18, 20, 3.0
_FRAME: Colour = (200, 200, 200)
_PLAIN: Colour = (31, 119, 180)
# matplotlib's "tab20": ten colours, then a light one of each.
_COLOURS = (
    (31, 119, 180), (255, 127, 14), (44, 160, 44), (214, 39, 40), (148, 103, 189),
    (140, 86, 75), (227, 119, 194), (127, 127, 127), (188, 189, 34), (23, 190, 207),
    (174, 199, 232), (255, 187, 120), (152, 223, 138), (255, 152, 150), (197, 176, 213),
    (196, 156, 148), (247, 182, 210), (199, 199, 199), (219, 219, 141), (158, 218, 229),
)  # fmt: skip


def scatter_panels(points: Tensor, names: Sequence[tuple[str, str]], labels: Sequence[str] | None = None) -> Tensor:
    """Draw panels of dots from -3 to 3, with the prior N(0, I) as circles of one and two standard deviations.

    Up to 20 different labels have a colour each; more of them go through a colour map, from dark to light.

    Args:
        points: Shape ``(panels, observations, 2)``; what lies outside is drawn at the edge.
        names: For each panel what its two axes are.
        labels: One for each observation.

    Returns:
        An image of shape ``(3, height, width)``, uint8.
    """
    points = points.detach().float().cpu().nan_to_num().clamp(-_REACH, _REACH)
    colours, legend = _coloured(labels, points.shape[1])
    places = _places([name for name, _ in legend], _SIZE * len(points))
    top = max((down for _, down in places), default=0.0) + _LEGEND
    canvas = Canvas(_SIZE * len(points), int(top) + _SIZE + _AXIS_NAME)
    for (name, colour), (right, down) in zip(legend, places, strict=True):
        canvas.text((right, down + 4), name, colour)
    radius = 2.5 if points.shape[1] <= 300 else 1.5
    unit = (_SIZE - 2 * _MARGIN) / (2 * _REACH)
    centres = torch.tensor([[(number + 0.5) * _SIZE, top + _SIZE / 2] for number in range(len(points))])
    dots = centres[:, None] + points * torch.tensor([unit, -unit])
    canvas.dots(dots.flatten(0, 1), colours.repeat(len(points), 1), radius)
    for centre, (across, up) in zip(centres, names, strict=True):
        corners = torch.tensor([[-1, -1], [1, -1], [1, 1], [-1, 1], [-1, -1]]) * (_SIZE / 2 - _MARGIN)
        canvas.line(centre + corners, _FRAME)
        for deviations in (1, 2):
            canvas.circle((float(centre[0]), float(centre[1])), deviations * unit, (90, 90, 90))
        canvas.text((float(centre[0]), top + _SIZE - 2), f"{across} right, {up} up", anchor="ma")
    return canvas.image()


def _coloured(labels: Sequence[str] | None, count: int) -> tuple[Tensor, list[tuple[str, Colour]]]:
    """Return the colour of each observation, and the legend."""
    if labels is None:
        return torch.tensor([_PLAIN]).expand(count, 3), []
    names = sorted(set(labels), key=lambda name: (len(name), name))
    number = {name: position for position, name in enumerate(names)}
    if len(names) <= len(_COLOURS):
        # A number keeps its colour whether or not the smaller ones are there.
        own = {name: int(name) if name.isdigit() and int(name) < len(_COLOURS) else number[name] for name in names}
        return torch.tensor([_COLOURS[own[name]] for name in labels]), [(name, _COLOURS[own[name]]) for name in names]
    try:
        values = torch.tensor([float(name) for name in labels]).nan_to_num()
    except ValueError:
        values = torch.tensor([float(number[name]) for name in labels])
    low, high = values.min(), values.max()
    # The last tenth of the colour map is too light on white.
    shades = colour_map((values - low) / (high - low).clamp(min=1e-12) * 0.9)
    least, most = int(values.argmin()), int(values.argmax())
    ends = [(f"{labels[least]} to", least), (labels[most], most)]
    return shades, [(name, (*shades[at].tolist(),)) for name, at in ends]


def _places(names: Sequence[str], width: int) -> list[tuple[float, float]]:
    """Return where to write each name of a legend, line by line."""
    places, right, down = [], float(_MARGIN), 0.0
    for name in names:
        size = 7.0 * len(name) + 8
        if right + size > width and right > _MARGIN:
            right, down = float(_MARGIN), down + 14
        places.append((right, down))
        right += size
    return places
