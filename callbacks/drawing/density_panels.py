"""How latents lie against their prior, one panel for each dimension."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .canvas import Canvas, Colour

_WIDTH, _HEIGHT, _MARGIN, _TITLE, _LEGEND = 112, 64, 5, 16, 18
_BINS, _REACH = 32, 4.0
_MEANS: Colour = (190, 210, 235)
_AGGREGATE: Colour = (31, 119, 180)
_PRIOR: Colour = (40, 40, 40)


def density_panels(
    mean: Tensor, scale: Tensor | None, titles: Sequence[str], unit: str = "prior", columns: int = 3
) -> Tensor:
    """Draw, for each latent dimension, the posterior means and the aggregate posterior against the prior.

    In each panel, from -4 to 4: a histogram of the posterior means (light blue; what lies outside is in the outermost
    bars), the density of the aggregate posterior, the mean over the observations of q(z_j|x) (blue line), and that of
    the prior N(0, 1) (black line). An active dimension has blue over black with a wide histogram; in an inactive one
    the histogram is a spike. Densities are cut at 1.5 times the prior's largest.

    Args:
        mean: Posterior means in units of the prior, shape ``(observations, dimensions)``.
        scale: The posteriors' standard deviations, of the same shape; ``None`` leaves the blue line out.
        titles: One for each dimension.
        unit: What N(0, 1) is here, for the legend.
        columns: Panels in a row.

    Returns:
        An image of shape ``(3, height, width)``, uint8.
    """
    mean = mean.detach().float().cpu().nan_to_num()
    grid = torch.linspace(-_REACH, _REACH, 81)
    prior = _normal(grid)
    rows = math.ceil(mean.shape[1] / columns)
    canvas = Canvas(_WIDTH * max(3, min(columns, mean.shape[1])), (_HEIGHT + _TITLE) * rows + _LEGEND)
    canvas.text((_MARGIN, 3), "posterior means", (110, 140, 190))
    canvas.text((_MARGIN + 95, 3), "aggregate posterior" if scale is not None else "", _AGGREGATE)
    canvas.text((_MARGIN + 215, 3), unit, _PRIOR)
    for number, title in enumerate(titles):
        left = number % columns * _WIDTH + _MARGIN
        top = number // columns * (_HEIGHT + _TITLE) + _LEGEND + _TITLE
        panel = _Panel(canvas, left, top, top + _HEIGHT - _MARGIN)
        canvas.text((left, top - _TITLE + 3), title)
        panel.bars(mean[:, number])
        if scale is not None:
            spread = scale[:, number].detach().float().cpu().clamp(min=1e-3)
            panel.curve(grid, (_normal((grid[:, None] - mean[:, number]) / spread) / spread).mean(1), _AGGREGATE)
        panel.curve(grid, prior, _PRIOR)
    return canvas.image()


class _Panel:
    """Maps values and densities to a place on the canvas."""

    def __init__(self, canvas: Canvas, left: float, top: float, bottom: float) -> None:
        self._canvas, self._left, self._top, self._bottom = canvas, left, top, bottom

    def bars(self, values: Tensor) -> None:
        counts = torch.histc(values.clamp(-_REACH, _REACH), _BINS, -_REACH, _REACH)
        density = (counts / counts.sum() * _BINS / (2 * _REACH)).repeat_interleave(2)
        edges = torch.linspace(-_REACH, _REACH, _BINS + 1).repeat_interleave(2)[1:-1]
        outline = self._points(edges, density)
        foot = self._points(torch.tensor([_REACH, -_REACH]), torch.zeros(2))
        self._canvas.area(torch.cat([outline, foot]), _MEANS)

    def curve(self, values: Tensor, density: Tensor, colour: Colour) -> None:
        self._canvas.line(self._points(values, density), colour, 1.2)

    def _points(self, values: Tensor, density: Tensor) -> Tensor:
        x = self._left + (values + _REACH) / (2 * _REACH) * (_WIDTH - 2 * _MARGIN)
        y = self._bottom - (density / 0.6).clamp(max=1) * (self._bottom - self._top)
        return torch.stack([x, y], dim=1)


def _normal(values: Tensor) -> Tensor:
    return torch.exp(-0.5 * values**2) / math.sqrt(2 * math.pi)
