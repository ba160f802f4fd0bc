"""The tables of a sweep: one row per point, and means and spreads over seeds."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..checkpoints import run_folder
from ..datamodules import Gaussian as GaussianData
from ..estimators.closed_forms import shannon_distortion
from ..vae import VAE
from .plan import BETA, Point

Row = dict[str, Any]


def row(point: Point, found: Mapping[str, Any], model: VAE | None, data: object) -> Row:
    """Return the table row of a point: its options, its results, and the versions that made it.

    Args:
        point: The point.
        found: The results of ``test``.
        model: The trained model.
        data: Its data module.
    """
    configuration = point.configuration
    varied = {name: value for name, value in configuration.options.items() if name != BETA} if configuration else {}
    measured = {name: value for name, value in found.items() if not isinstance(value, list | dict)}
    versions = (run_folder.read_finished(point.run) or {}).get("versions", {})
    described: Row = {
        "point": point.folder.name,
        "config": configuration.name if configuration else str(point.trained),
        "config_hash": configuration.digest if configuration else point.folder.name.rpartition("-")[2],
        "seed": point.seed,
        **varied,
        "beta": None if model is None else round(float(model.beta), 6),
        **measured,
    }
    variance = fixed_variance(model)
    if variance is not None:
        described["variance"] = variance
        if isinstance(data, GaussianData) and "rate" in found:
            bound = shannon_distortion(data.eigenvalues, variance, max(found["rate"], 0.0))
            described["above_shannon"] = found["distortion"] - bound
    return {**described, "checkpoint": str(point.checkpoint), **versions}


def fixed_variance(model: object) -> float | None:
    """Return the variance of a Gaussian likelihood if it is fixed, else ``None``."""
    variance = getattr(getattr(model, "likelihood", None), "variance", None)
    return float(variance) if isinstance(variance, int | float) else None


def summary(rows: Sequence[Row]) -> list[Row]:
    """Compute means and standard deviations (divided by n - 1) over the seeds of each configuration.

    If a run lacks a quantity, or its value is not a number, the run is left out of that mean.

    Args:
        rows: Rows of :func:`row`.
    """
    groups: dict[str, list[Row]] = {}
    for each in rows:
        groups.setdefault(each["config_hash"], []).append(each)
    return [_summarised(group) for group in groups.values()]


def _summarised(group: Sequence[Row]) -> Row:
    names = columns(group)
    options = names[: names.index("beta") + 1]  # the options are the same for all seeds
    result: Row = {"config": group[0]["config"], "config_hash": group[0]["config_hash"], "seeds": len(group)}
    result |= {name: group[0].get(name) for name in options if name not in ("point", "seed", *result)}
    for name in names[len(options) :]:
        values = [each[name] for each in group if each.get(name) is not None]
        if name == "checkpoint" or not values:
            continue
        if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
            result[f"{name}_mean"] = statistics.fmean(values)
            result[f"{name}_std"] = statistics.stdev(values) if len(values) > 1 else None
        elif len(set(map(str, values))) == 1:
            result[name] = values[0]
    return result


def columns(rows: Sequence[Row]) -> list[str]:
    """List the columns of all rows, in order of first appearance."""
    return list(dict.fromkeys(name for each in rows for name in each))


def write(path: Path, rows: Sequence[Row]) -> None:
    """Write rows as CSV; missing values stay empty."""
    whole = path.with_name(f".{path.name}")
    with whole.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns(rows))
        writer.writeheader()
        writer.writerows(rows)
    whole.replace(path)
