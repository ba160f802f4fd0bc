"""Figures that compare models: latent spaces side by side, and rate-distortion curves."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from textwrap import wrap
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..checks import check_number, integer_from
from ..observations import Observations
from ..vae import VAE
from .chunks import decode
from .generation import prior_sample

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Projection = Literal["pca", "tsne"]

# Seven of Okabe and Ito's colours for the colour-blind ("Color Universal Design", 2008), without the yellow, which is
# faint on white, and three more that differ clearly from them, also for protanopes and deuteranopes.
COLOURS = (
    "#0072b2",
    "#e69f00",
    "#009e73",
    "#990033",
    "#56b4e9",
    "#000000",
    "#cc79a7",
    "#66ee66",
    "#4a1fb8",
    "#d55e00",
)
_COLUMNS = 4
_IMAGES = 8
_AT_ONCE = 500  # observations that are encoded at once
_NAME_WIDTH = 36  # letters above a panel
_LEGEND_WIDTH = 84  # letters under a rate-distortion figure
_BOUND = "Shannon's bound for these Gaussian data"


def compare_latents(
    models: Mapping[str, VAE] | Sequence[VAE],
    loader: Iterable[Any],
    observations: int = 2000,
    projection: Projection = "pca",
    seed: int = 0,
) -> Figure:
    """Draw the latent spaces of several models side by side, each with reconstructions and samples below it.

    Two-dimensional spaces are shown directly, larger ones by their first two principal components or by t-SNE, and
    one-dimensional ones against the observations' labels. Points are posterior means, coloured by label if the batches
    have labels. Spaces shown directly or by principal components share one scale. A conditional model's samples are
    drawn under the conditions of the first observations.

    Args:
        models: The models by name, or without names. They must accept the same data.
        loader: Batches as the models accept them, with labels of shape ``(B,)`` under ``"label"`` in a mapping or as
            the second element of a sequence. Only the first observations are read.
        observations: Number of observations shown.
        projection: ``"pca"`` or ``"tsne"``, for spaces of more than two dimensions.
        seed: Seed of the samples, of binarisation and of t-SNE.

    Returns:
        A matplotlib figure without a window.

    Raises:
        ValueError: If there are no models, fewer than two observations, an unknown projection, or data that a model
            does not accept.
        TypeError: If a model is not a VAE of this package.

    Example::

        figure = compare_latents({"beta 1": one, "beta 4": four}, datamodule.test_dataloader())
        figure.savefig("latents.png")
    """
    from matplotlib.figure import Figure

    named = dict(models) if isinstance(models, Mapping) else {str(number): each for number, each in enumerate(models)}
    if not named:
        raise ValueError("`models` must hold at least one model.")
    for name, model in named.items():
        if not isinstance(model, VAE):
            raise TypeError(f"`models`: {name!r} must be a lightning_vae.VAE, got {type(model).__name__}.")
    if projection not in ("pca", "tsne"):
        raise ValueError(f"`projection` must be 'pca' or 'tsne', got {projection!r}.")
    check_number("observations", observations, "at least 2", integer_from(2))
    check_number("seed", seed, "an integer", integer_from())
    seen, labels = _first(loader, observations, named)
    views = [_view(torch.cat(each.means), projection, seed) for each in seen]
    kinds = [] if labels is None else labels.unique().tolist()
    pictured = _are_images(seen[0].pairs[0][0])
    captions = _captions(list(named))
    reach = max((float(view.points.abs().max()) for view in views if view.shares_scale), default=1.0)

    columns = min(len(named), _COLUMNS)
    rows = math.ceil(len(named) / columns)
    room = captions[0].count("\n") * "\n" + " "
    height = 4.6 + 0.17 * len(room)
    figure = Figure(figsize=(3.4 * columns, height * rows + 0.3), layout="constrained")
    grids = figure.subfigures(rows, columns, squeeze=False, wspace=0.03, hspace=0.04)
    for panel, caption, model, of_model, view in zip(grids.flat, captions, named.values(), seen, views, strict=False):
        points, reconstructed, sampled = panel.subplots(3, 1, height_ratios=(6, 1.9, 1.9))
        if not pictured:
            sampled.sharey(reconstructed)  # show samples on the scale of the data
        panel.suptitle(caption, y=0.99, fontsize=10, in_layout=False)
        points.set_title(room, fontsize=10, pad=12)  # a placeholder of fixed height, whatever its letters
        _scatter(points, view, labels, 1.06 * max(reach, 1.0))
        original, reconstruction = (torch.cat(each) for each in zip(*of_model.pairs, strict=True))
        _show(reconstructed, model.levels, original, reconstruction)
        reconstructed.set_title("data and, below, reconstructions" if pictured else "data, reconstructions (dashed)",
                                fontsize=8, color="0.3", pad=4)  # fmt: skip
        _show(sampled, model.levels, *_samples(model, 2 * _IMAGES if pictured else _IMAGES, seed, of_model.conditions))
        sampled.set_title("samples from the prior", fontsize=8, color="0.3", pad=4)
    if 1 < len(kinds) <= len(COLOURS):
        _explain(figure, kinds)
    return figure


class CurvePoint(NamedTuple):
    """A point of a rate-distortion figure in nats, with its spreads over seeds and a note beside it."""

    rate: float
    distortion: float
    rate_spread: float = 0.0
    distortion_spread: float = 0.0
    note: str = ""


def rate_distortion(
    curves: Mapping[str, Sequence[CurvePoint]], bound: tuple[Sequence[float], Sequence[float]] | None = None
) -> Figure:
    """Draw distortions over rates.

    Args:
        curves: The lines by name; the points of each are joined in the order of their rates.
        bound: Rates and distortions of the best possible model, if they are known.

    Returns:
        A matplotlib figure.
    """
    from matplotlib.figure import Figure

    labels = ["\n".join(wrap(name, _LEGEND_WIDTH)) for name in curves]
    longest = max(map(len, [*curves, _BOUND] if bound is not None else curves), default=0)
    beside = max(1, _LEGEND_WIDTH // (longest + 8))  # entries in a row, with their lines
    lines = sum(label.count("\n") + 1 for label in labels) / beside
    figure = Figure(figsize=(6.4, 4.6 + 0.17 * lines), layout="constrained")
    axes = figure.subplots()
    if bound is not None:
        axes.plot(*bound, color="0.15", linewidth=1, zorder=1, label=_BOUND)
    for number, (label, points) in enumerate(zip(labels, curves.values(), strict=True)):
        rates, distortions, rate_spreads, distortion_spreads, notes = zip(*sorted(points), strict=True)
        axes.errorbar(
            rates,
            distortions,
            xerr=_bars(rate_spreads),
            yerr=_bars(distortion_spreads),
            color=COLOURS[number % len(COLOURS)],
            marker="osD^v"[number // len(COLOURS) % 5],
            markersize=5,
            linewidth=1.2 if bound is None else 0,
            elinewidth=1,
            capsize=2,
            label=label,
            zorder=2,
        )
        for rate, distortion, note in zip(rates, distortions, notes, strict=True):
            axes.annotate(note, (rate, distortion), textcoords="offset points", xytext=(6, 5), fontsize=8, color="0.3")
    axes.set_xlabel("rate: KL(q(z|x) || p(z)), nats per observation")
    axes.set_ylabel("distortion: -E log p(x|z), nats per observation")
    axes.margins(0.08)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.92")
    axes.set_axisbelow(True)
    spread = any(point.rate_spread or point.distortion_spread for points in curves.values() for point in points)
    title = "bars: standard deviation over seeds" if spread else None
    figure.legend(loc="outside lower center", ncols=beside, frameon=False, fontsize=8, title=title, title_fontsize=8)
    return figure


def _bars(spreads: Sequence[float]) -> list[float] | None:
    """Return the lengths of error bars; a point without a spread gets none, and not one of length zero."""
    return [spread or math.nan for spread in spreads] if any(spreads) else None


def _captions(names: Sequence[str]) -> list[str]:
    """Wrap names, and pad them to the same number of lines, so that all end at one height."""
    wrapped = [[part for line in name.splitlines() for part in wrap(line, _NAME_WIDTH)] for name in names]
    most = max(map(len, wrapped))
    return ["\n".join([""] * (most - len(lines)) + lines) for lines in wrapped]


def _explain(figure: Figure, kinds: Sequence[float]) -> None:
    """Add a legend of the label colours below the figure."""
    from matplotlib.lines import Line2D

    dots = [
        Line2D([], [], linestyle="", marker="o", markersize=5, color=colour, label=f"{kind:g}")
        for colour, kind in zip(COLOURS, kinds, strict=False)
    ]
    beside = int(figure.get_figwidth() / (0.25 + 0.08 * max(len(f"{kind:g}") for kind in kinds)))
    figure.legend(handles=dots, loc="outside lower center", ncols=beside, frameon=False, fontsize=8,
                  title="label", title_fontsize=8, handletextpad=0.1, handlelength=1, columnspacing=0.6)  # fmt: skip


class _View(NamedTuple):
    """A latent space, projected for drawing."""

    points: Tensor
    axes: tuple[str, str]
    shares_scale: bool


@dataclass
class _Seen:
    """The first observations with their posterior means and reconstructions, on the CPU.

    Attributes:
        means: Posterior means, shape ``(n, k)``.
        pairs: The first of the data, NaN where numbers are missing, and their reconstructions.
        conditions: Conditions of the observations, shape ``(n, columns)``; empty for a model without.
    """

    means: list[Tensor] = field(default_factory=list)
    pairs: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    conditions: list[Tensor] = field(default_factory=list)

    @torch.no_grad()
    def add(self, model: VAE, observations: Observations) -> None:
        """Encode observations, and reconstruct the first, as at evaluation."""
        training = model.training
        model.eval()
        shown = sum(len(x) for x, _ in self.pairs)
        if (first := observations[: max(_IMAGES - shown, 0)]).x.numel():
            x = first.x if first.mask is None else first.x.float().masked_fill(~first.mask, math.nan)
            self.pairs.append((x.cpu(), model.reconstruct(first).float().cpu()))
        for part in observations.split(_AT_ONCE):
            self.means.append(model.encode(part).mean.flatten(1).double().cpu())
            if part.condition is not None:
                self.conditions.append(part.condition.cpu())
        model.train(training)


def _first(loader: Iterable[Any], most: int, models: Mapping[str, VAE]) -> tuple[list[_Seen], Tensor | None]:
    """Encode the first observations with each model, and return their labels too if there are any."""
    seen = {name: _Seen() for name in models}
    labels: list[Tensor | None] = []
    count = 0
    for batch in loader:
        for name, model in models.items():
            try:
                observations = model.observe(batch, first=count)[: most - count]
            except ValueError as error:
                raise ValueError(f"`models`: {name.splitlines()[0]!r} does not accept these data. {error}") from None
            seen[name].add(model, observations)
        label = observations.label
        is_number = isinstance(label, Tensor) and label.shape == (len(observations),)
        labels.append(label.cpu() if is_number else None)
        count += len(observations)
        if count >= most:
            break
    if count < 2:
        raise ValueError(f"`loader` must hold at least 2 observations, got {count}.")
    known = [label for label in labels if label is not None]
    return list(seen.values()), torch.cat(known) if len(known) == len(labels) else None


def _view(means: Tensor, projection: Projection, seed: int) -> _View:
    if means.shape[1] <= 2:
        return _View(means, ("z0", "z1"), True)
    if projection == "pca" or len(means) < 3:
        centred = means - means.mean(dim=0)
        _, scales, directions = torch.linalg.svd(centred, full_matrices=False)
        shares = scales.square() / scales.square().sum().clamp(min=torch.finfo(torch.float64).tiny)
        names = [f"PC {number + 1}, {100 * float(shares[number]):.0f} % of the variance" for number in range(2)]
        return _View(centred @ directions[:2].T, (names[0], names[1]), True)
    from sklearn.manifold import TSNE

    fitted = TSNE(perplexity=min(30.0, (len(means) - 1) / 3), init="random", random_state=seed).fit_transform(means)
    return _View(torch.from_numpy(fitted), ("t-SNE 1, no unit", "t-SNE 2, no unit"), False)


@torch.no_grad()
def _samples(model: VAE, number: int, seed: int, conditions: list[Tensor]) -> list[Tensor]:
    """Decode samples of the prior; in a conditional model under the conditions of the first observations."""
    training = model.training
    model.eval()
    places = torch.arange(number, device=model.device)
    known = torch.cat(conditions).to(model.device) if conditions else None
    condition = None if known is None else known[places % len(known)]
    z = prior_sample(model, places, condition, seed)
    samples = model.to_data_scale(decode(model, z, condition).mean).float().cpu()
    model.train(training)
    return list(samples.split(_IMAGES))


def _scatter(axes: Axes, view: _View, labels: Tensor | None, reach: float) -> None:
    """Draw a latent space, each label in its own colour, with its name if there is room."""
    from matplotlib.patheffects import withStroke

    points = view.points
    kinds = [] if labels is None else labels.unique().tolist()
    flat = points.shape[1] == 1
    if flat:  # the other axis keeps the labels apart, or just the points
        spread = 0.6 * torch.rand(len(points), generator=torch.Generator().manual_seed(0)) - 0.3
        points = torch.stack([points[:, 0], spread + (0 if labels is None else labels)], dim=1)
    style: dict[str, Any] = {"s": 8, "linewidths": 0, "alpha": 0.85, "rasterized": True}
    if 1 < len(kinds) <= len(COLOURS):
        for colour, kind in zip(COLOURS, kinds, strict=False):
            axes.scatter(*points[labels == kind].T, color=colour, **style)
        centres = torch.stack([points[labels == kind].median(dim=0).values for kind in kinds])
        nearest = torch.cdist(centres, centres).fill_diagonal_(math.inf).amin(dim=1)
        apart = nearest > 0.05 * (reach if view.shares_scale else float(points.abs().max()))
        halo = [withStroke(linewidth=2.5, foreground="white")]
        for kind, (x, y), alone in zip(kinds, centres.tolist(), apart.tolist(), strict=True):
            if alone and not flat:  # overlapping names would hide the rest
                axes.text(x, y, f"{kind:g}", fontsize=8, weight="bold", ha="center", va="center", path_effects=halo)
    elif len(kinds) > 1:
        dots = axes.scatter(points[:, 0], points[:, 1], c=labels, cmap="viridis", **style)
        bar = axes.figure.colorbar(dots, ax=axes, shrink=0.8, pad=0.02)
        bar.ax.tick_params(labelsize=7, length=2)
        bar.set_label("label", fontsize=8)
    else:
        axes.scatter(*points.T, color=COLOURS[0], **style)
    axes.set_xlabel(view.axes[0], fontsize=8, labelpad=1)
    if flat:
        axes.set_ylabel("label" if kinds else "", fontsize=8, labelpad=1)
        axes.set_yticks(kinds if len(kinds) <= len(COLOURS) else [])
        axes.set_xlim(-reach, reach)
    else:
        axes.set_ylabel(view.axes[1], fontsize=8, labelpad=1)
        axes.set_aspect("equal", adjustable="box" if view.shares_scale else "datalim")
        if view.shares_scale:
            axes.set(xlim=(-reach, reach), ylim=(-reach, reach))
    axes.tick_params(labelsize=7, length=2)
    axes.spines[["top", "right"]].set_visible(False)


def _are_images(x: Tensor) -> bool:
    return x.ndim == 4 and x.shape[1] in (1, 3)


def _show(axes: Axes, levels: int | None, *rows: Tensor) -> None:
    """Draw rows of images, or vectors as lines over their coordinates, the second row's dashed."""
    if _are_images(rows[0]):
        top = 1.0 if levels is None else levels - 1.0
        gap = max(1, rows[0].shape[-1] // 16)
        framed = [pad((row.float().nan_to_num(nan=0.0) / top).clamp(0, 1), (0, gap, 0, gap), value=1.0) for row in rows]
        tiles = torch.cat([torch.cat(list(row), dim=-1) for row in framed], dim=-2)[:, :-gap, :-gap]
        picture = tiles.permute(1, 2, 0).squeeze(-1).numpy()
        axes.imshow(picture, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        axes.axis("off")
        return
    for row, style in zip(rows, ("-", "--"), strict=False):
        for vector, colour in zip(row[:4].flatten(start_dim=1), COLOURS, strict=False):
            axes.plot(vector, style, color=colour, linewidth=1)
    axes.tick_params(labelsize=7, length=2)
    axes.set_xlabel("coordinate", fontsize=7, labelpad=1)
    axes.spines[["top", "right"]].set_visible(False)
