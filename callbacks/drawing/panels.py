"""Panels side by side: curves, densities and dots."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool1d

from .canvas import Canvas, Colour
from .colours import colour_map

# All sizes are in pixels.
_LIGHT_GREY: Colour = (200, 200, 200)
_CURVE_WIDTH, _CURVE_HEIGHT, _CURVE_MARGIN, _CURVE_TITLE = 128, 84, 6, 14
_CURVE_POINTS = 128  # at most; longer vectors are averaged
_DENSITY_WIDTH, _DENSITY_HEIGHT, _DENSITY_MARGIN, _DENSITY_TITLE, _DENSITY_LEGEND = 112, 64, 5, 16, 18
_DENSITY_BINS, _DENSITY_REACH, _DENSITY_TOP = 32, 4.0, 0.6
DENSITY_GRID = torch.linspace(-_DENSITY_REACH, _DENSITY_REACH, 81)
"""The points of a density, in units of the prior."""
_MEANS: Colour = (190, 210, 235)
_AGGREGATE: Colour = (31, 119, 180)
_PRIOR: Colour = (40, 40, 40)
_SCATTER_SIZE, _SCATTER_MARGIN, _SCATTER_AXIS_NAME, _SCATTER_LEGEND, _SCATTER_REACH = 168, 5, 18, 20, 3.0
_UNLABELLED: Colour = (31, 119, 180)
# matplotlib's "tab20": ten colours, then a light shade of each.
_CATEGORIES = (
    (31, 119, 180), (255, 127, 14), (44, 160, 44), (214, 39, 40), (148, 103, 189),
    (140, 86, 75), (227, 119, 194), (127, 127, 127), (188, 189, 34), (23, 190, 207),
    (174, 199, 232), (255, 187, 120), (152, 223, 138), (255, 152, 150), (197, 176, 213),
    (196, 156, 148), (247, 182, 210), (199, 199, 199), (219, 219, 141), (158, 218, 229),
)  # fmt: skip


def curve_panels(
    curves: Tensor, colours: Sequence[Colour], low: float, high: float, titles: Sequence[str] = (), columns: int = 5
) -> Tensor:
    """Draw panels of curves: the entries of each vector from left to right.

    All panels share one scale. A grey line marks zero, or the edge nearest to it. The entries of a short vector are
    marked with dots.

    Args:
        curves: Vectors, shape ``(panels, curves in a panel, entries)``.
        colours: One for each curve of a panel. Later curves cover earlier ones.
        low: Value at the bottom of a panel.
        high: Value at the top of a panel.
        titles: One for each panel.
        columns: Panels in a row.

    Returns:
        An image of shape ``(3, height, width)``, uint8.
    """
    values = curves.detach().float().cpu().nan_to_num()
    values = adaptive_avg_pool1d(values, min(values.shape[2], _CURVE_POINTS))
    height = _CURVE_HEIGHT + _CURVE_TITLE
    canvas = Canvas(_CURVE_WIDTH * min(columns, len(values)), height * math.ceil(len(values) / columns))
    fractions = ((values - low) / max(high - low, 1e-12)).clamp(0, 1)
    zero = min(max(-low / max(high - low, 1e-12), 0.0), 1.0)
    entries = torch.linspace(0, 1, values.shape[2]) if values.shape[2] > 1 else torch.tensor([0.5])
    for number, vectors in enumerate(fractions):
        left = number % columns * _CURVE_WIDTH + _CURVE_MARGIN
        top = number // columns * height + _CURVE_TITLE
        panel = _Panel(left, top, left + _CURVE_WIDTH - 2 * _CURVE_MARGIN, top + _CURVE_HEIGHT - _CURVE_MARGIN)
        canvas.line(panel.points(torch.tensor([0.0, 1.0]), torch.tensor([zero, zero])), _LIGHT_GREY)
        if titles:
            canvas.text((left, top - _CURVE_TITLE + 2), titles[number])
        for vector, colour in zip(vectors, colours, strict=True):
            points = panel.points(entries, vector)
            canvas.line(points, colour, 1.3)
            if len(points) <= 16:
                canvas.dots(points, torch.tensor([colour]).expand(len(points), 3), radius=2)
    return canvas.image()


def density_panels(
    mean: Tensor, scale: Tensor | None, titles: Sequence[str], prior: Tensor | None = None, columns: int = 3
) -> Tensor:
    """Draw the posterior means and the aggregate posterior of each latent dimension against the prior.

    Each panel goes from -4 to 4. It holds a histogram of the posterior means (light blue, with outliers in the
    outermost bars), the density of the aggregate posterior, which is the mean of q(z_j|x) over the observations (blue
    line), and the density of the prior (black line). Densities are cut off at 1.5 times the maximum of N(0, 1). An
    active dimension has a wide histogram, and blue on black. In an inactive dimension the histogram is a spike.

    Args:
        mean: Posterior means in units of the prior, shape ``(observations, dimensions)``. NaN is left out.
        scale: The posteriors' standard deviations, of the same shape. ``None`` leaves out the blue line.
        titles: One for each dimension.
        prior: Density of the prior in its own units at :data:`DENSITY_GRID`, shape ``(points, dimensions)``. ``None``
            draws N(0, 1), which the legend then names.
        columns: Panels in a row.

    Returns:
        An image of shape ``(3, height, width)``, uint8.
    """
    mean = mean.detach().float().cpu()
    grid = DENSITY_GRID
    height = _DENSITY_HEIGHT + _DENSITY_TITLE
    rows = math.ceil(mean.shape[1] / columns)
    canvas = Canvas(_DENSITY_WIDTH * max(3, min(columns, mean.shape[1])), height * rows + _DENSITY_LEGEND)
    canvas.text((_DENSITY_MARGIN, 3), "posterior means", (110, 140, 190))
    canvas.text((_DENSITY_MARGIN + 95, 3), "aggregate posterior" if scale is not None else "", _AGGREGATE)
    canvas.text((_DENSITY_MARGIN + 215, 3), "N(0, 1)" if prior is None else "prior", _PRIOR)
    for number, title in enumerate(titles):
        left = number % columns * _DENSITY_WIDTH + _DENSITY_MARGIN
        top = number // columns * height + _DENSITY_LEGEND + _DENSITY_TITLE
        panel = _Panel(left, top, left + _DENSITY_WIDTH - 2 * _DENSITY_MARGIN, top + _DENSITY_HEIGHT - _DENSITY_MARGIN)
        canvas.text((left, top - _DENSITY_TITLE + 3), title)
        known = ~mean[:, number].isnan()
        values = mean[known, number].nan_to_num()
        canvas.area(_density_points(panel, *_histogram(values)), _MEANS)
        if scale is not None and len(values):
            width = scale[:, number].detach().float().cpu()[known].clamp(min=1e-3)
            aggregate = (_standard_normal((grid[:, None] - values) / width) / width).mean(1)
            canvas.line(_density_points(panel, grid, aggregate), _AGGREGATE, 1.2)
        of_prior = _standard_normal(grid) if prior is None else prior[:, number]
        canvas.line(_density_points(panel, grid, of_prior), _PRIOR, 1.2)
    return canvas.image()


def scatter_panels(points: Tensor, names: Sequence[tuple[str, str]], labels: Sequence[str] | None = None) -> Tensor:
    """Draw panels of dots from -3 to 3, with circles at 1 and 2, which are standard deviations in units of the prior.

    Up to 20 different labels each have their own colour. More labels share a colour map, from dark to light.

    Args:
        points: Shape ``(panels, observations, 2)``. Points outside are drawn at the edge, NaN is left out.
        names: The names of the two axes of each panel.
        labels: One for each observation.

    Returns:
        An image of shape ``(3, height, width)``, uint8.
    """
    points = points.detach().float().cpu()
    known = ~points.isnan().any(-1)
    points = points.nan_to_num().clamp(-_SCATTER_REACH, _SCATTER_REACH)
    colours, legend = _label_colours(labels, points.shape[1])
    places = _legend_places([name for name, _ in legend], _SCATTER_SIZE * len(points))
    top = max((down for _, down in places), default=0.0) + _SCATTER_LEGEND
    canvas = Canvas(_SCATTER_SIZE * len(points), int(top) + _SCATTER_SIZE + _SCATTER_AXIS_NAME)
    for (name, colour), (right, down) in zip(legend, places, strict=True):
        canvas.text((right, down + 4), name, colour)
    radius = 2.5 if points.shape[1] <= 300 else 1.5
    unit = (_SCATTER_SIZE - 2 * _SCATTER_MARGIN) / (2 * _SCATTER_REACH)
    centres = torch.tensor([[(number + 0.5) * _SCATTER_SIZE, top + _SCATTER_SIZE / 2] for number in range(len(points))])
    dots = centres[:, None] + points * torch.tensor([unit, -unit])
    canvas.dots(dots[known], colours.expand(len(points), -1, -1)[known], radius)
    corners = torch.tensor([[-1, -1], [1, -1], [1, 1], [-1, 1], [-1, -1]]) * (_SCATTER_SIZE / 2 - _SCATTER_MARGIN)
    for centre, (across, up) in zip(centres, names, strict=True):
        canvas.line(centre + corners, _LIGHT_GREY)
        for deviations in (1, 2):
            canvas.circle((float(centre[0]), float(centre[1])), deviations * unit, (90, 90, 90))
        canvas.text((float(centre[0]), top + _SCATTER_SIZE - 2), f"{across} right, {up} up", anchor="ma")
    return canvas.image()


class _Panel(NamedTuple):
    """A rectangle on a canvas."""

    left: float
    top: float
    right: float
    bottom: float

    def points(self, across: Tensor, up: Tensor) -> Tensor:
        """Return points, shape ``(n, 2)``, at fractions of the width and the height, each of shape ``(n,)``."""
        x = self.left + across * (self.right - self.left)
        return torch.stack([x, self.bottom - up * (self.bottom - self.top)], dim=1)


def _density_points(panel: _Panel, values: Tensor, density: Tensor) -> Tensor:
    return panel.points((values + _DENSITY_REACH) / (2 * _DENSITY_REACH), (density / _DENSITY_TOP).clamp(max=1))


def _histogram(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the corners of a histogram's outline, closed along the axis: values and densities."""
    reach, bins = _DENSITY_REACH, _DENSITY_BINS
    counts = torch.histc(values.clamp(-reach, reach), bins, -reach, reach)
    density = (counts / counts.sum().clamp(min=1) * bins / (2 * reach)).repeat_interleave(2)
    edges = torch.linspace(-reach, reach, bins + 1).repeat_interleave(2)[1:-1]
    return torch.cat([edges, torch.tensor([reach, -reach])]), torch.cat([density, torch.zeros(2)])


def _standard_normal(values: Tensor) -> Tensor:
    return torch.exp(-0.5 * values**2) / math.sqrt(2 * math.pi)


def _label_colours(labels: Sequence[str] | None, count: int) -> tuple[Tensor, list[tuple[str, Colour]]]:
    """Return the colour of each observation, shape ``(count, 3)``, and the entries of the legend."""
    if labels is None:
        return torch.tensor([_UNLABELLED]).expand(count, 3), []
    names = sorted(set(labels), key=lambda name: (len(name), name))
    position = {name: number for number, name in enumerate(names)}
    if len(names) <= len(_CATEGORIES):
        # A digit keeps its colour even if smaller digits are missing.
        own = {name: int(name) if name.isdigit() and int(name) < len(_CATEGORIES) else position[name] for name in names}
        colours = torch.tensor([_CATEGORIES[own[name]] for name in labels])
        return colours, [(name, _CATEGORIES[own[name]]) for name in names]
    try:
        values = torch.tensor([float(name) for name in labels]).nan_to_num()
    except ValueError:
        values = torch.tensor([float(position[name]) for name in labels])
    low, high = values.min(), values.max()
    # The last tenth of the colour map is too light on a white background.
    shades = colour_map((values - low) / (high - low).clamp(min=1e-12) * 0.9)
    least, most = int(values.argmin()), int(values.argmax())
    ends = [(f"{labels[least]} to", least), (labels[most], most)]
    return shades, [(name, (*shades[at].tolist(),)) for name, at in ends]


def _legend_places(names: Sequence[str], width: int) -> list[tuple[float, float]]:
    """Return the position of each name in a legend that is wrapped to a width."""
    places, right, down = [], float(_SCATTER_MARGIN), 0.0
    for name in names:
        size = 7.0 * len(name) + 8
        if right + size > width and right > _SCATTER_MARGIN:
            right, down = float(_SCATTER_MARGIN), down + 14
        places.append((right, down))
        right += size
    return places
