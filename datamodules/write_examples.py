"""Write example files for `Arrays` and `Table`, from data that scikit-learn brings.

python -m lightning_vae.datamodules.write_examples examples
"""

import argparse
import csv
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn import datasets

from .loaders.seeding import seeded_generator

_MISSING = 0.05  # share of the cells, except in the last column


def write_examples(folder: str | Path) -> list[Path]:
    """Write scikit-learn's digits as an `.npz` archive, and four of its tables as CSV files.

    In each table, one cell in twenty is empty: the same in each call. Its last column is complete.

    Args:
        folder: Where to write them. It is made if it does not exist.

    Returns:
        The files: `digits.npz`, `iris.csv`, `wine.csv`, `breast_cancer.csv` and `diabetes.csv`.

    Raises:
        FileExistsError: If one of them is there already.
    """
    folder = Path(folder).expanduser()
    tables = _tables()
    digits, *files = paths = [folder / "digits.npz", *(folder / f"{name}.csv" for name in tables)]
    if existing := [str(path) for path in paths if path.exists()]:
        raise FileExistsError(f"{', '.join(existing)} would be overwritten. Name another folder.")
    folder.mkdir(parents=True, exist_ok=True)
    images, labels = datasets.load_digits(return_X_y=True)
    np.savez(digits, x=images.astype(np.uint8).reshape(-1, 8, 8), label=labels)
    for path, (names, rows) in zip(files, tables.values(), strict=True):
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(names)
            writer.writerows(_with_gaps(rows, path.stem))
    return paths


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        arguments: Arguments in place of the process's own.
    """
    parser = argparse.ArgumentParser(
        prog="python -m lightning_vae.datamodules.write_examples",
        description="Write example files for the data modules Arrays and Table, from data that scikit-learn brings.",
    )
    parser.add_argument("folder", help="where to write them, such as `examples`")
    folder = parser.parse_args(arguments).folder
    try:
        paths = write_examples(folder)
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    print("\n".join(map(str, paths)))


def _tables() -> dict[str, tuple[list[str], list[list[Any]]]]:
    """Return the columns' names and the rows of each table."""
    targets = {"iris": "species", "wine": "cultivar", "breast_cancer": "diagnosis", "diabetes": "progression"}
    tables = {}
    for name, target in targets.items():
        options = {"scaled": False} if name == "diabetes" else {}
        found = getattr(datasets, f"load_{name}")(**options)
        last = found.target if name == "diabetes" else found.target_names[found.target]
        names = [_name(column) for column in found.feature_names]
        rows = [
            [*map(_text, row), end if isinstance(end, str) else _text(end)]
            for row, end in zip(found.data, last, strict=True)
        ]
        tables[name] = ([*names, target], rows)
    return tables


def _with_gaps(rows: Sequence[Sequence[Any]], key: str) -> list[list[Any]]:
    gaps = torch.rand(len(rows), len(rows[0]), generator=seeded_generator("gaps", key)) < _MISSING
    gaps[:, -1] = False
    return [
        ["" if gap else cell for cell, gap in zip(row, there, strict=True)]
        for row, there in zip(rows, gaps.tolist(), strict=True)
    ]


def _name(column: str) -> str:
    return column.removesuffix(" (cm)").replace("/", "_").replace(" ", "_")


def _text(number: float) -> str:
    return f"{number:.10g}"


if __name__ == "__main__":
    main()
