"""``auroc``: how well the scores in a table of ``predict`` tell the observations of a class from the others."""

from __future__ import annotations

import csv
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from ..estimators.outliers import auroc as area
from ..evaluation.latents_writer import natural_order, open_table
from .errors import exit_with
from .vae_cli import Parser, expand_home

_SIGNS = {"elbo": -1, "rate": 1, "distortion": 1, "nll": 1}
_SHOWN = {"elbo": "-ELBO", "nll": "NLL"}
_CLASSES = ("class", "label")  # the name of a class comes before its number
_DESCRIPTION = (
    "Read the table that `predict` has written, and print for each score how well it tells the observations of a class "
    "that the model has not seen in training (`--data.held_out`) from the others: the area under the ROC curve."
)


def auroc(arguments: Sequence[str]) -> None:
    """Print the AUROC of each score in a table.

    Args:
        arguments: The command line after ``auroc``.
    """
    parser = Parser(prog=f"{Path(sys.argv[0]).name} auroc", description=_DESCRIPTION)
    parser.add_argument(
        "table", type=str | None, nargs="?", help="The CSV file, such as logs/digits/version_1/latents.csv."
    )
    parser.add_argument("--outlier_class", type=str, action="append", required=True, metavar="CLASS",
        help="The class to find: by name if the classes have names, else by number. Repeatable.")  # fmt: skip
    options = expand_home(parser.parse_args(list(arguments)))
    if options.table is None:
        exit_with("`auroc` needs the table that `predict` has written, such as logs/digits/version_1/latents.csv.")
    try:
        classes, scores = read(Path(options.table))
        print(compare(options.table, classes, scores, options.outlier_class))
    except ValueError as error:
        exit_with(error)


def read(path: Path) -> tuple[list[str], dict[str, torch.Tensor]]:
    """Read a table of ``predict``.

    Args:
        path: The file; one whose name ends in ``.gz`` is decompressed.

    Returns:
        The class of each observation, and each score, float64, of shape ``(N,)``.

    Raises:
        ValueError: If the file can't be read, has no classes, no scores or no rows, or a score is not a number.
    """
    try:
        with open_table(path, "r") as file:
            rows = csv.DictReader(file)
            columns = rows.fieldnames or ()
            kind = next((name for name in _CLASSES if name in columns), None)
            names = [name for name in _SIGNS if name in columns]
            if not names:
                raise ValueError(
                    f"{path} must have a column for one of the scores {', '.join(_SIGNS)}, got {_listed(columns)}. "
                    "Write it with `predict`."
                )
            if kind is None:
                raise ValueError(
                    f"{path} has no column `label` or `class`, without which no AUROC can be computed. Write it from "
                    "data with labels."
                )
            classes: list[str] = []
            values: list[list[float]] = []
            for row in rows:
                classes.append(row[kind] or "")
                values.append([_number(row[name], name, f"{path}, line {rows.line_num}") for name in names])
    except OSError as error:
        raise ValueError(f"{path} can't be read: {error.strerror or error}.") from None
    except (UnicodeDecodeError, csv.Error, EOFError) as error:
        raise ValueError(f"{path} is not a table of `predict`: {error}.") from None
    if not values:
        raise ValueError(f"{path} has no rows.")
    return classes, dict(zip(names, torch.tensor(values, dtype=torch.float64).unbind(1), strict=True))


def compare(name: str, classes: Sequence[str], scores: dict[str, torch.Tensor], outlier_classes: Sequence[str]) -> str:
    """Return a table of the AUROC of each score, as text.

    Args:
        name: Name of the table that they come from.
        classes: The class of each observation.
        scores: Each score of the observations, of shape ``(N,)``.
        outlier_classes: The classes to find.

    Raises:
        ValueError: If a class has no observations, or all observations are outliers.
    """
    known = sorted(set(classes), key=natural_order)
    if unknown := [each for each in outlier_classes if each not in known]:
        raise ValueError(
            f"`--outlier_class` must be a class of {name}, {_listed(known)}, got {', '.join(map(repr, unknown))}."
        )
    is_outlier = torch.tensor([each in outlier_classes for each in classes])
    count, others = int(is_outlier.sum()), [each for each in known if each not in outlier_classes]
    if not others:
        raise ValueError(
            f"`--outlier_class` must leave other observations to compare with, but all {count} of {name} are of class "
            f"{_listed(outlier_classes)}. Predict on a split that has other classes too."
        )
    lines = [
        f"{name}: {count} observations of class {_listed(outlier_classes)} among {len(classes) - count} of class "
        f"{_listed(others)}.",
        "",
        f"{'score':<12}AUROC",
    ]
    for score, sign in _SIGNS.items():
        if score in scores:
            lines.append(f"{_SHOWN.get(score, score):<12}{float(area(sign * scores[score], is_outlier)):.4f}")
    return "\n".join([*lines, "", "Higher counts as more anomalous, for each score as it is named. 0.5 is chance."])


def _number(text: str | None, name: str, place: str) -> float:
    try:
        value = float(text or "")
    except ValueError:
        value = float("nan")
    if value != value:  # NaN alone differs from itself
        raise ValueError(f"{place}: `{name}` must be a number, got {text!r}.")
    return value


def _listed(items: Sequence[str]) -> str:
    return ", ".join(items[:20]) + (f" and {len(items) - 20} more" if len(items) > 20 else "") or "none"
