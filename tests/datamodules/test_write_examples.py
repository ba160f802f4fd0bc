import csv
import re
from pathlib import Path

import numpy as np
import pytest
from sklearn import datasets

from lightning_vae.datamodules import Arrays, Table
from lightning_vae.datamodules.write_examples import main, write_examples
from tests.datamodules.doubles import ready, whole

TABLES = {"iris": 3, "wine": 3, "breast_cancer": 2, "diabetes": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("examples") / "data"
    write_examples(folder)
    return folder


def test_the_digits_are_scikit_learns(folder):
    data = ready(Arrays(folder / "digits.npz", levels=17))
    assert data.shape == (1, 8, 8)
    train = whole(data.train_dataloader())
    images, labels = datasets.load_digits(return_X_y=True)
    for index, x, label in zip(*(train[name][:50] for name in ("index", "x", "label")), strict=True):
        row = int(re.search(r"\[(\d+)\]", data.file_names("train")[index])[1])
        assert np.array_equal(x.flatten().numpy(), images[row])
        assert int(label) == labels[row]


@pytest.mark.parametrize("name", TABLES)
def test_a_table_is_scikit_learns_with_gaps(folder, name):
    with (folder / f"{name}.csv").open(newline="") as file:
        _, *rows = csv.reader(file)
    found = datasets.load_diabetes(scaled=False) if name == "diabetes" else getattr(datasets, f"load_{name}")()
    gaps = 0
    for row, numbers, target in zip(rows, found.data, found.target, strict=True):
        for cell, number in zip(row[:-1], numbers, strict=True):
            gaps += not cell
            assert not cell or float(cell) == number
        assert (float(row[-1]) if name == "diabetes" else row[-1]) == (
            target if name == "diabetes" else found.target_names[target]
        )
    assert gaps / found.data.size == pytest.approx(0.05, abs=0.015)


def test_the_tables_are_read_as_they_are(folder):
    for name, classes in TABLES.items():
        table = Table(folder / f"{name}.csv")
        assert len(table.categories.get(table.column_names[-1], [])) == classes
        assert set(table.kinds[:-1]) <= {"numeric", "binary"}
    diabetes = Table(folder / "diabetes.csv", columns={"age": "count", "progression": "count"})
    assert diabetes.kinds == ("count", "binary", *["numeric"] * 8, "count")


def test_each_call_writes_the_same(folder, tmp_path):
    written = write_examples(tmp_path)
    assert [path.name for path in written] == ["digits.npz", *(f"{name}.csv" for name in TABLES)]
    assert all(path.read_bytes() == (folder / path.name).read_bytes() for path in written)


def test_the_command_names_the_files_and_replaces_none(tmp_path, capsys):
    main([str(tmp_path / "new" / "data")])
    assert capsys.readouterr().out.split() == [
        str(tmp_path / "new" / "data" / name) for name in ("digits.npz", *(f"{name}.csv" for name in TABLES))
    ]
    for path in (tmp_path / "new" / "data").glob("*.csv"):
        path.unlink()
    with pytest.raises(SystemExit) as exit_:
        main([str(tmp_path / "new" / "data")])
    assert exit_.value.code == 2
    message = f"error: {tmp_path}/new/data/digits.npz would be overwritten. Name another folder.\n"
    assert capsys.readouterr().err == message
    assert not list(Path(tmp_path, "new", "data").glob("*.csv"))
