"""The report of a sweep: tables, figures, and TensorBoard's pages."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from ..datamodules import Gaussian as GaussianData
from ..estimators.closed_forms import shannon_distortion
from ..evaluation import figures
from ..vae import VAE
from . import plan, tables
from .plan import BETA, Point
from .tables import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PRINTED = ("elbo", "rate", "distortion", "nll", "active_units", "above_shannon")
_PLAIN = int | float | str | bool  # types that TensorBoard accepts for an option
_SHOWN = 16  # latent spaces in a picture


def report(points: Sequence[Point], base: Path, projection: figures.Projection) -> None:
    """Write the tables and figures of the evaluated points, and print the means and where everything is.

    Args:
        points: The evaluated points.
        base: The sweep's folder.
        projection: How latent spaces of more than two dimensions are shown.
    """
    rows: list[Row] = []
    spaces: dict[str, _Spaces] = {}  # by data set
    data_of: dict[str, tuple[str, LightningDataModule]] = {}  # by configuration
    several = len({point.configuration.name for point in points if point.configuration}) > 1
    for point in points:
        group = point.configuration.digest if point.configuration else point.folder.name
        first = group not in data_of
        if first:
            data_of[group] = plan.data_of(point.run / "config.yaml")
        identity, data = data_of[group]
        assert point.checkpoint is not None
        model = VAE.load_from_checkpoint(point.checkpoint, map_location="cpu", weights_only=True)
        rows.append(tables.row(point, point.found(), model, data))
        if first:  # one seed of each configuration is shown
            spaces.setdefault(identity, _Spaces(data, {})).models[_caption(point, rows[-1], several)] = model

    means = tables.summary(rows)
    tables.write(base / "results.csv", rows)
    tables.write(base / "summary.csv", means)
    bound = _bound(rows, [each.data for each in spaces.values()])
    drawn = {"rate_distortion": figures.rate_distortion(_curves(points, means), bound)}
    for number, each in enumerate(spaces.values()):
        name = "latents" if len(spaces) == 1 else f"latents_{number}"
        try:
            drawn[name] = _draw_latents(each, projection)
        except Exception as error:  # the tables are worth more than a picture
            print(f"{name}.png can't be drawn: {type(error).__name__}: {error}")
    for name, figure in drawn.items():
        figure.savefig(base / f"{name}.png", dpi=150)
    _to_tensorboard(rows, drawn, base)
    lines = {
        "Tables": f"{base}/results.csv, {base}/summary.csv",
        "Figures": ", ".join(f"{base}/{name}.png" for name in drawn),
        "Compare": f"tensorboard --logdir {base}/comparison",
        "Curves": f"tensorboard --logdir {base}",
    }
    print(f"\n{_table(means)}\n\n" + "\n".join(f"{name + ':':<12}{text}" for name, text in lines.items()))


class _Spaces(NamedTuple):
    """Models of one data set, by their captions."""

    data: LightningDataModule
    models: dict[str, VAE]


def _draw_latents(spaces: _Spaces, projection: figures.Projection) -> Figure:
    some = dict(_evenly_spaced(list(spaces.models.items()), _SHOWN))
    if len(some) < len(spaces.models):
        print(f"Of {len(spaces.models)} latent spaces {len(some)} are shown.")
    return figures.compare_latents(
        some, plan.transferred(plan.test_loader(spaces.data), spaces.data), projection=projection
    )


def _caption(point: Point, row: Row, several: bool) -> str:
    """Return a caption for a latent space, with its options and measurements."""
    if point.configuration is None:
        name = os.path.relpath(point.run)
    else:
        varied = [f"{option} {value}" for option, value in point.configuration.varied.items()]
        name = ", ".join(([point.configuration.name] if several or not varied else []) + varied)
    measured = f"rate {row['rate']:.3g} nats" if "rate" in row else ""
    if row.get("active_units") is not None:
        measured += f", {row['active_units']:.0f} active"
    return f"{name}\n{measured}"


def _evenly_spaced(items: Sequence[Any], number: int) -> list[Any]:
    """Pick a number of items, evenly from the first to the last."""
    if len(items) <= number:
        return list(items)
    return [items[round(place * (len(items) - 1) / (number - 1))] for place in range(number)]


def _curves(points: Sequence[Point], means: Sequence[Row]) -> dict[str, list[figures.CurvePoint]]:
    """Group the points that differ only in beta, in nats."""
    configurations = {point.configuration.digest: point.configuration for point in points if point.configuration}
    curves: dict[str, list[figures.CurvePoint]] = {}
    for row in means:
        if "rate_mean" not in row or "distortion_mean" not in row:
            continue
        configuration = configurations.get(row["config_hash"])
        name, note = row["config"], ""
        if configuration is not None:
            options = dict(configuration.options)
            note = f"\u03b2 {options.pop(BETA):g}" if BETA in options else ""
            name = replace(configuration, options=options).label
        point = figures.CurvePoint(
            rate=row["rate_mean"],
            distortion=row["distortion_mean"],
            rate_spread=row["rate_std"] or 0.0,
            distortion_spread=row["distortion_std"] or 0.0,
            note=note,
        )
        curves.setdefault(name, []).append(point)
    return curves


def _bound(rows: Sequence[Row], sources: Iterable[LightningDataModule]) -> tuple[list[float], list[float]] | None:
    """Compute Shannon's curve if there is one: for Gaussian data and a single fixed variance."""
    spectra = {data.eigenvalues if isinstance(data, GaussianData) else None for data in sources}
    variances = {row.get("variance") for row in rows}
    (spectrum, *other_data), (variance, *other_variances) = spectra, variances
    if spectrum is None or variance is None or other_data or other_variances:
        return None
    rates = torch.linspace(0, 1.05 * max(row["rate"] for row in rows), 200).tolist()
    return rates, [shannon_distortion(spectrum, variance, rate) for rate in rates]


def _to_tensorboard(rows: Sequence[Row], figures: Mapping[str, Figure], base: Path) -> None:
    """Write the figures, and each point's options and results under HParams, replacing an earlier report."""
    folder = base / "comparison"
    shutil.rmtree(folder, ignore_errors=True)
    with SummaryWriter(str(folder)) as writer:
        for name, figure in figures.items():
            writer.add_figure(f"sweep/{name}", figure)
    for row in rows:
        names = list(row)
        options = {name: row[name] for name in names[1 : names.index("beta") + 1] if row[name] is not None}
        options = {name: value if isinstance(value, _PLAIN) else str(value) for name, value in options.items()}
        results = {f"sweep/{name}": row[name] for name in names[names.index("beta") + 1 :]}
        metrics = {name: float(value) for name, value in results.items() if isinstance(value, int | float)}
        with SummaryWriter(str(folder / row["point"])) as writer:
            for part in hparams(options, metrics):
                writer.file_writer.add_summary(part)
            for name, value in metrics.items():
                writer.add_scalar(name, value)


def _table(means: Sequence[Row]) -> str:
    """Format the means for the terminal, each with its spread."""
    names = tables.columns(means)
    varied = [name for name in names[: names.index("beta") + 1] if name != "config_hash"]
    measured = [name for name in _PRINTED if any(f"{name}_mean" in row for row in means)]
    lines = [[*varied, *measured]]
    for row in means:
        cells = [str(row.get(name, "")) for name in varied]
        for name in measured:
            mean, spread = row.get(f"{name}_mean"), row.get(f"{name}_std")
            cells.append("" if mean is None else f"{mean:.4g}" + ("" if spread is None else f" \u00b1 {spread:.2g}"))
        lines.append(cells)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)
