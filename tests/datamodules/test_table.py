import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser

from lightning_vae import Columns, Condition, Gaussian, Poisson
from lightning_vae.datamodules import DataError, DataModule, Table
from tests.datamodules.doubles import Watcher, ready, splits, trainer

# Thirty rows: a measure, a whole number, a switch, a colour, a class; with gaps in lines 5, 6 and 7.
COLOURS, SPECIES = ("red", "green", "blue"), ("gnu", "emu")
ROWS = [
    (f"{row / 4}", f"{row % 7}", "yes" if row % 3 else "no", COLOURS[row % 3], SPECIES[row % 2]) for row in range(30)
]
ROWS[3] = ("", "3", "no", "red", "emu")
ROWS[4] = ("1.0", "NA", "yes", "green", "gnu")
ROWS[5] = ("1.25", "5", " ", "NaN", "emu")
NAMES = ("size", "visits", "tame", "colour", "species")


class Part(Watcher):
    """A model with parts of this package."""

    def __init__(self, **parts: Any) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)


def saved(
    folder: Path, rows: Sequence[Sequence[str]] = ROWS, names: Sequence[str] = NAMES, name: str = "table.csv"
) -> Path:
    (folder / name).write_text("\n".join(",".join(row) for row in (names, *rows)) + "\n")
    return folder / name


def by_line(datamodule: DataModule) -> dict[int, dict[str, torch.Tensor]]:
    """Every observation of the three splits, by the line that `file_names` says."""
    found: dict[int, dict[str, torch.Tensor]] = {}
    for split, stage in zip(splits(datamodule), ("train", "val", "test"), strict=True):
        for place, index in enumerate(split["index"].tolist()):
            line = int(datamodule.file_names(stage)[index].removeprefix("table.csv:"))
            found[line] = {key: value[place] for key, value in split.items()}
    return found


def test_a_row_is_one_number_for_each_column_in_its_own_unit(tmp_path):
    table = ready(Table(saved(tmp_path), columns={"visits": "count"}, label="species"))
    assert table.shape == (4,)
    assert table.levels is None
    assert table.column_names == ("size", "visits", "tame", "colour")
    assert table.kinds == ("numeric", "count", "binary", 3)
    assert table.categories == {"tame": ["no", "yes"], "colour": ["blue", "green", "red"]}
    assert table.class_names == ("emu", "gnu")
    lines = by_line(table)
    assert sorted(lines) == list(range(2, 32))
    for line, item in lines.items():
        row = line - 2
        number = [row / 4, row % 7, bool(row % 3), (2, 1, 0)[row % 3]]
        mask = [line != 5, line != 6, line != 7, line != 7]
        assert item["mask"].tolist() == mask
        assert item["x"].tolist() == [value if there else 0 for value, there in zip(number, mask, strict=True)]
        assert int(item["label"]) == (1, 0)[row % 2]
        assert (item["x"].dtype, item["mask"].dtype, item["label"].dtype) == (torch.float32, torch.bool, torch.int64)
        assert item.keys() == {"x", "mask", "label", "index"}


def test_the_scale_is_that_of_the_training_split_without_gaps(tmp_path):
    table = ready(Table(saved(tmp_path), columns={"visits": "count"}))
    rows = [line - 2 for line, item in by_line(table).items() if int(item["index"]) >= 0]
    train = [int(name.partition(":")[2]) - 2 for name in table.file_names("train")]
    assert 20 < len(train) < len(rows) == 30
    values = torch.tensor([row / 4 for row in train if row != 3], dtype=torch.float64)
    torch.testing.assert_close(table.loc, torch.tensor([values.mean(), 0, 0, 0, 0]).float())
    torch.testing.assert_close(
        table.scale, torch.tensor([((values - values.mean()) ** 2).mean().sqrt(), 1, 1, 1, 1]).float()
    )


@pytest.mark.parametrize(
    ("cells", "given", "kind", "categories", "numbers"),
    [
        (["1.5", "-2e3", ".25"], None, "numeric", None, [1.5, -2000, 0.25]),
        (["0", "1", "1"], None, "binary", ["0", "1"], [0, 1, 1]),
        (["2", "1.0", "1"], None, "binary", ["1", "2"], [1, 0, 0]),
        (["b", "a", "b"], None, "binary", ["a", "b"], [1, 0, 1]),
        (["b", "a", "c"], None, 3, ["a", "b", "c"], [1, 0, 2]),
        (["0", "1", "2"], None, "numeric", None, [0, 1, 2]),
        (["0", "1", "2"], "count", "count", None, [0, 1, 2]),
        (["0", "1", "1"], "count", "count", None, [0, 1, 1]),
        (["0", "1", "1"], "numeric", "numeric", None, [0, 1, 1]),
        (["10", "9", "2.50"], "categorical", 3, ["2.5", "9", "10"], [2, 1, 0]),
        (["10", "9", "x"], "categorical", 3, ["10", "9", "x"], [0, 1, 2]),
        (['"1,5"', "2", "3"], "categorical", 3, ["1,5", "2", "3"], [0, 1, 2]),
        (['"1,5"', "a", "b"], None, 3, ["1,5", "a", "b"], [0, 1, 2]),
        (["b", "a", "b"], "categorical", 2, ["a", "b"], [1, 0, 1]),
    ],
)
def test_kinds_are_guessed_or_given(tmp_path, cells, given, kind, categories, numbers):
    path = saved(tmp_path, [(cell,) for cell in cells * 20], ["one"])
    table = ready(Table(path, columns={"one": given} if given else None))
    assert table.kinds == (kind,)
    assert table.categories == ({"one": categories} if categories else {})
    lines = by_line(table)
    assert [lines[line]["x"].item() for line in range(2, 5)] == numbers
    assert all(item["mask"].all() for item in lines.values())


def test_times_over_years_stay_apart_in_float32(tmp_path):
    times = [1.7e9 + 1e6 * row for row in range(30)]
    table = ready(Table(saved(tmp_path, [(str(time), *row[1:]) for time, row in zip(times, ROWS, strict=True)])))
    assert {line: item["x"][0].item() for line, item in by_line(table).items()} == pytest.approx(
        {row + 2: time for row, time in enumerate(times)}, abs=64
    )


def test_conditions_are_numbers_or_one_hot(tmp_path):
    whole = [row for row in ROWS if all(cell.strip() not in ("", "NA", "NaN") for cell in row)]
    table = ready(Table(saved(tmp_path, whole), condition=["colour", "visits", "tame"]))
    assert table.column_names == ("size", "species")
    assert table.condition_names == ("colour=blue", "colour=green", "colour=red", "visits", "tame")
    for line, item in by_line(table).items():
        _, visits, tame, colour, _ = whole[line - 2]
        hot = [float(colour == word) for word in ("blue", "green", "red")]
        assert item["condition"].tolist() == [*hot, float(visits), float(tame == "yes")]
        assert item["condition"].dtype == torch.float32


def test_columns_are_left_out_and_words_mark_a_gap(tmp_path):
    table = ready(Table(saved(tmp_path), columns={"colour": "ignored", "species": "ignored"}, missing=["NA", "3"]))
    assert table.column_names == ("size", "visits", "tame")
    assert all(bool(item["mask"][1]) == ((line - 2) % 7 != 3 and line != 6) for line, item in by_line(table).items())


def test_quotes_blank_lines_and_another_delimiter(tmp_path):
    lines = ["\ufeff a ;b", '1;"x\ny"', "", '2;"x;y"', '"3";z'] + ["4;z", '5;"x;y"', '6;"x\ny"'] * 9
    (tmp_path / "table.csv").write_text("\n".join(lines))
    table = ready(Table(tmp_path / "table.csv", delimiter=";"))
    assert table.column_names == ("a", "b")
    assert table.categories == {"b": ["x\ny", "x;y", "z"]}
    rows = by_line(table)
    assert [rows[line]["x"].tolist() for line in (2, 5, 6, 7, 8, 9, 11)] == [
        [1, 0],
        [2, 1],
        [3, 2],
        [4, 2],
        [5, 1],
        [6, 0],
        [4, 2],
    ]


@pytest.mark.parametrize("delimiter", ["\t", r"\t"])
def test_a_tab_may_be_written_as_a_shell_passes_it_on(tmp_path, delimiter):
    (tmp_path / "table.csv").write_text("a\tb\n" + "".join(f"{row}\t{row % 3}\n" for row in range(30)))
    table = ready(Table(tmp_path / "table.csv", delimiter=delimiter))
    assert table.column_names == ("a", "b")


def test_other_files_are_read_by_the_kinds_and_categories_of_the_first(tmp_path):
    path = saved(tmp_path)
    # Other order of the columns, some categories alone, and a number written in another way.
    test = saved(
        tmp_path, [("emu", "red", "", "2.0", "7.5"), ("gnu", "green", "yes", "1", "-1")], NAMES[::-1], "test.csv"
    )
    val = saved(tmp_path, ROWS[8:], NAMES, "val.csv")
    table = ready(Table(path, label="species", val_path=val, test_path=test))
    train, held, tested = splits(table)
    assert [len(split["x"]) for split in (train, held, tested)] == [30, 22, 2]
    assert tested["x"].tolist() == [[7.5, 2, 0, 2], [-1, 1, 1, 1]]
    assert tested["mask"].tolist() == [[True, True, False, True], [True] * 4]
    assert tested["label"].tolist() == [0, 1]
    assert table.file_names("predict") == ["test.csv:2", "test.csv:3"]


@pytest.mark.parametrize(
    ("trained", "new", "names"),
    [
        (("gnu", "emu"), ("yak", "ant", "emu"), ("emu", "gnu", "ant", "yak")),
        (("10", "9"), ("1", "x", "9"), ("9", "10", "1", "x")),
    ],
)
def test_classes_of_another_file_come_after_those_of_the_first(tmp_path, trained, new, names):
    path = saved(tmp_path, [(*row[:4], trained[number % 2]) for number, row in enumerate(ROWS)])
    unseen = saved(tmp_path, [("1", "1", "yes", "red", word) for word in new], NAMES, "unseen.csv")
    table = ready(Table(path, label="species", columns={"species": "categorical"}, test_path=unseen))
    assert table.class_names == names
    assert [names[label] for label in splits(table)[2]["label"].tolist()] == list(new)
    train, places = splits(table)[0], table.file_names("train")
    lines = [int(places[index].removeprefix("table.csv:")) for index in train["index"].tolist()]
    assert train["label"].tolist() == [1 - line % 2 for line in lines]  # as without the other file


def test_a_model_that_is_given_the_class_refuses_a_checkpoint_of_other_classes(tmp_path):
    path = saved(tmp_path)
    run, model = trainer(max_epochs=1, num_sanity_val_steps=0), Part(condition=Condition(classes=2))
    run.fit(model, datamodule=Table(path, label="species"))
    run.save_checkpoint(tmp_path / "saved.ckpt")
    other = saved(tmp_path, [(*row[:4], row[4].replace("gnu", "ant")) for row in ROWS], NAMES, "other.csv")
    with pytest.raises(ValueError, match=r"class 0 was 'emu' when .*, now it is 'ant': emu, gnu -> ant, emu"):
        trainer().test(model, datamodule=Table(other, label="species"), ckpt_path=tmp_path / "saved.ckpt")
    unseen = saved(tmp_path, [("1", "1", "yes", "red", "ant")], NAMES, "unseen.csv")
    data = Table(path, label="species", test_path=unseen)
    with pytest.warns(UserWarning, match="classes: emu, gnu -> emu, gnu, ant"):
        trainer().test(model, datamodule=data, ckpt_path=tmp_path / "saved.ckpt", verbose=False)


def test_a_class_that_is_held_out_remains_in_the_test_and_leaves_the_scale_alone(tmp_path):
    rows = [(f"{row % 10 + 900 * (row % 2)}", *rest) for row, (_, *rest) in enumerate(ROWS * 2)]
    options: dict[str, Any] = {"label": "species", "test_fraction": 0.3}
    table = ready(Table(saved(tmp_path, rows), held_out=["emu"], **options), "fit", "validate", "fit", "test")
    train, val, test = splits(table)
    assert set(train["label"].tolist()) == set(val["label"].tolist()) == {1}
    assert set(test["label"].tolist()) == {0, 1}
    assert 0 < table.loc[0] < 10
    assert torch.equal(test["x"], splits(ready(Table(saved(tmp_path, rows), **options)))[2]["x"])
    with pytest.raises(ValueError, match=r"`held_out` must be classes of the training data, emu, gnu, got yak\."):
        Table(tmp_path / "table.csv", held_out=["yak"], **options)
    with pytest.raises(ValueError, match="`held_out` needs data with one class for each observation"):
        Table(tmp_path / "table.csv", held_out=["emu"])


@pytest.mark.parametrize("species", [None, ""], ids=["without a column", "empty"])
def test_new_rows_need_no_label_nor_columns_that_are_ignored(tmp_path, species):
    rows = [("yes", "7.5", "x", *([] if species is None else [species]))] * 2
    names = ["tame", "size", "further", *([] if species is None else ["species"])]
    test = saved(tmp_path, rows, names, "test.csv")
    ignored: Any = dict.fromkeys(("visits", "colour"), "ignored")
    table = ready(Table(saved(tmp_path), columns=ignored, label="species", test_path=test))
    train, _, new = splits(table)
    assert "label" in train
    assert new.keys() == {"x", "mask", "index"}
    assert new["x"].tolist() == [[7.5, 1], [7.5, 1]]


def test_a_row_that_is_appended_moves_no_other(tmp_path):
    before = ready(Table(saved(tmp_path, name="a.csv")))
    after = ready(Table(saved(tmp_path, ROWS * 2, name="a.csv")))
    for stage in ("train", "val", "test"):
        assert after.file_names(stage)[: len(before.file_names(stage))] == before.file_names(stage)


def test_what_was_found_is_printed(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    path = saved(tmp_path)
    table = Table(path, columns={"visits": "count"}, label="species")
    for stage in ("fit", "validate", "test"):
        table.setup(stage)
    messages = dict.fromkeys(record.getMessage() for record in caplog.records)
    assert list(messages) == [
        "Table: 28 observations, 26 in train, 2 in val. Classes: emu (15), gnu (13).",
        f"{path} has the columns\n  numeric: size.\n  count: visits.\n  binary: tame (no, yes).\n"
        "  categorical: colour (3).\n  label: species (2).\n"
        "  Guessed, which `columns` changes: size, tame, colour.\n"
        "  Missing in 28 rows: size (1), visits (1), tame (1), colour (1).",
        "Table: 2 observations, 2 in test. Classes: gnu (2).",
    ]


class Likelihood(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("loc", torch.zeros(5))
        self.register_buffer("scale", torch.ones(5))

    def set_scale(self, loc: torch.Tensor, scale: torch.Tensor) -> None:
        self.loc.copy_(loc)
        self.scale.copy_(scale)


class Scaled(Watcher):
    def __init__(self) -> None:
        super().__init__()
        self.likelihood = Likelihood()


def test_a_fit_gives_the_likelihood_the_scale_and_the_checkpoint_keeps_it(tmp_path):
    table, model = Table(saved(tmp_path)), Scaled()
    run = trainer(max_epochs=1, num_sanity_val_steps=0)
    run.fit(model, datamodule=table)
    assert torch.equal(model.likelihood.loc, table.loc)
    assert torch.equal(model.likelihood.scale, table.scale)
    assert table.loc[0] > 3
    trainer().test(model, datamodule=Table(tmp_path / "table.csv", seed=1), verbose=False)  # without a checkpoint
    assert torch.equal(model.likelihood.loc, table.loc)
    run.save_checkpoint(tmp_path / "saved.ckpt")
    # Another split has another scale: that of the checkpoint goes on, in a fit as in a test.
    for stage in ("fit", "test"):
        other, resumed = Table(tmp_path / "table.csv", seed=1), Scaled()
        assert not torch.equal(other.loc, table.loc)
        with pytest.warns(UserWarning, match="trained on other data"):
            getattr(trainer(max_epochs=1), stage)(resumed, datamodule=other, ckpt_path=tmp_path / "saved.ckpt")
        assert torch.equal(resumed.likelihood.loc, table.loc)
        assert torch.equal(other.loc, table.loc)
        assert torch.equal(other.scale, table.scale)


def test_a_likelihood_without_a_scale_refuses_columns_far_from_order_1(tmp_path):
    rows = [(str(20 + row / 7), str(row / 7), str(row / 300)) for row in range(30)]
    table = Table(saved(tmp_path, rows, ("far", "near", "small")))
    message = (
        r"^`likelihood` Gaussian takes the columns as they are, and they are far from mean 0 and standard deviation 1:"
        r" far \(21.\d+, 1.\d+\), small \(0.0\d+, 0.0\d+\). Set `likelihood` to Columns, which standardises them, or"
        rf" standardise them in {re.escape(str(tmp_path))}/table.csv\.$"
    )
    with pytest.raises(ValueError, match=message):
        trainer(max_epochs=1).fit(Part(likelihood=Gaussian((3,))), datamodule=table)
    near = Table(tmp_path / "table.csv", columns={"far": "ignored", "small": "ignored"})
    for likelihood, data in ((Gaussian((1,)), near), (Columns((3,), kinds=table.kinds), table), (Poisson((3,)), table)):
        trainer(max_epochs=1).fit(Part(likelihood=likelihood), datamodule=data)


def test_the_number_of_covariates_is_compared(tmp_path):
    whole = [row for row in ROWS if all(cell.strip() not in ("", "NA", "NaN") for cell in row)]
    table = Table(saved(tmp_path, whole), condition=["colour", "visits"])
    message = (
        "`covariates` of the model's condition is 1, but the condition of the data has 4 numbers: colour=blue,"
        " colour=green, colour=red, visits. Set `covariates` to 4, or give the data another `condition`."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        trainer(max_epochs=1).fit(Part(condition=Condition(covariates=1)), datamodule=table)


def test_a_checkpoint_of_other_columns_is_refused(tmp_path):
    state = ready(Table(saved(tmp_path), label="species"), "fit").state_dict()
    ready(Table(tmp_path / "table.csv", label="species"), "fit").load_state_dict(state)  # warnings are errors
    others: list[tuple[list[Any], Sequence[str], dict[str, Any], str]] = [
        (
            [row[1::-1] + row[2:] for row in ROWS],
            ("visits", "size", *NAMES[2:]),
            {},
            "columns .*'size', 'visits'.* -> .*",
        ),
        (
            ROWS,
            NAMES,
            {"columns": {"visits": "count"}},
            r"kinds .*\['numeric', 'numeric', .* -> \['numeric', 'count', .*",
        ),
        (
            [[cell.replace("blue", "cyan") for cell in row] for row in ROWS],
            NAMES,
            {},
            "categories .*'blue', 'green', 'red'.* -> .*'cyan', 'green', 'red'.*",
        ),
    ]
    for rows, names, options, change in others:
        table = Table(saved(tmp_path, rows, names, "other.csv"), label="species", **options)
        message = rf"^{re.escape(str(tmp_path))}/other.csv has other {change}Give that table as `path`, and this one as"
        with pytest.raises(ValueError, match=message):
            ready(table, "fit").load_state_dict(state)
    renamed = saved(tmp_path, [[*row[:4], row[4].upper()] for row in ROWS], NAMES, "other.csv")
    with pytest.warns(UserWarning, match="classes: emu, gnu -> EMU, GNU"):
        ready(Table(renamed, label="species"), "fit").load_state_dict(state)


def test_names_on_the_command_line(tmp_path):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(DataModule, "data")
    path = saved(tmp_path)
    arguments = ["--data=Table", f"--data.path={path}", "--data.columns={visits: count, size: ignored}"]
    arguments += ["--data.label=species", "--data.missing=[NA, NaN]"]
    data = parser.instantiate_classes(parser.parse_args(arguments)).data
    assert data.kinds == ("count", "binary", 3)


# ---- errors: each before the first step


def changed(line: int, column: str, cell: str) -> list[list[str]]:
    rows = [list(row) for row in ROWS]
    rows[line - 2][NAMES.index(column)] = cell
    return rows


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (
            changed(9, "size", "big"),
            {},
            "PATH, line 9, column 'size': 'big' is no number, as most of the column are. Fix it, name it in `missing`,"
            " or say `columns` {size: categorical}.",
        ),
        *(
            (
                [(cells[row % len(cells)], *rest) for row, (_, *rest) in enumerate(ROWS)],
                {"columns": {"size": kind}} if kind else {},
                f"PATH, line 2, column 'size': {cells[0][1:-1]!r} has a comma. Write numbers with a point before the"
                " decimals, and thousands without a mark; or say `columns` {size: categorical} if they are no numbers.",
            )
            for cells, kind in [
                (['"1,5"', '"-2,25"'], None),
                (['"1.234,5"', "3"], None),
                (['"1,234.5"', '"9"', '"1,000,000"'], None),
                (['"1,5"', "2"], "numeric"),
                (['"1,500"', "2"], "count"),
            ]
        ),
        (
            changed(9, "size", "1e39"),
            {"columns": {"size": "numeric"}},
            "PATH, line 9, column 'size': '1e39' is not a finite number. Fix it, name it in `missing`, or give another"
            " kind in `columns`.",
        ),
        (
            changed(9, "size", "inf"),
            {"columns": {"size": "numeric"}},
            "PATH, line 9, column 'size': 'inf' is not a finite number. Fix it, name it in `missing`, or give another"
            " kind in `columns`.",
        ),
        (
            ROWS,
            {"columns": {"colour": "numeric"}},
            "PATH, line 2, column 'colour': 'red' is not a finite number, and 28 more rows. Fix it, name it in"
            " `missing`, or give another kind in `columns`.",
        ),
        (
            changed(9, "visits", "-1"),
            {"columns": {"visits": "count"}},
            "PATH, line 9, column 'visits': '-1' is not a count (0, 1, 2, ...). Fix it, name it in `missing`, or give"
            " another kind in `columns`.",
        ),
        (
            changed(9, "visits", "1.5"),
            {"columns": {"visits": "count"}},
            "PATH, line 9, column 'visits': '1.5' is not a count (0, 1, 2, ...). Fix it, name it in `missing`, or give"
            " another kind in `columns`.",
        ),
        (
            ROWS,
            {"columns": {"colour": "binary"}},
            "PATH: column 'colour' is said to be binary, but holds 3 different values: blue, green, red. Give another"
            " kind in `columns`, or name words that mark a missing value in `missing`.",
        ),
        (
            [(*row[:4], f"n{number}") for number, row in enumerate(ROWS)],
            {},
            "PATH: column 'species' holds 30 different words in 30 rows, such as 'n0', like a name or a text. Leave it"
            " out with `columns` {species: ignored}, or say `columns` {species: categorical}.",
        ),
        (
            [(*row[:4], "emu") for row in ROWS],
            {},
            "PATH: column 'species' holds only 'emu', so there is nothing to learn. Leave it out with `columns`"
            " {species: ignored}.",
        ),
        (
            [(*row[:4], "NA") for row in ROWS],
            {},
            "PATH: column 'species' holds no value, so there is nothing to learn. Leave it out with `columns` {species:"
            " ignored}.",
        ),
        (
            [("7" if number else "8", *row[1:]) for number, row in enumerate(ROWS)],
            {"columns": {"size": "numeric"}, "seed": 1},
            "PATH: column 'size' has only the value 7 in the training split, so it has no scale. Leave it out with"
            " `columns` {size: ignored}, or give another kind.",
        ),
        (
            [(str(1.7e9 + row), *rest) for row, (_, *rest) in enumerate(ROWS)],
            {"columns": {"size": "numeric"}},
            "PATH: column 'size' has numbers from 1700000000 to 1700000029, which float32 would round by up to 29, too"
            " much for a standard deviation of 8.66. Subtract an offset, such as the smallest.",
        ),
        (
            [(str(2**27 + row), *rest) for row, (_, *rest) in enumerate(ROWS)],
            {"columns": {"size": "count"}},
            "PATH: column 'size' has numbers from 134217728 to 134217757, which float32 would round by up to 8, too"
            " much for a standard deviation of 8.66. Subtract an offset, such as the smallest.",
        ),
        (
            [(str(2**27 + row), *rest) for row, (_, *rest) in enumerate(ROWS)],
            {"condition": ["size"]},
            "PATH: column 'size' has numbers from 134217728 to 134217757, which float32 would round by up to 8, too"
            " much for a standard deviation of 8.66. Subtract an offset, such as the smallest.",
        ),
        (
            ROWS,
            {"label": "colour"},
            "PATH: `label` 'colour' must have a value in each row, but 1 have none, in line 7. Remove these rows, or"
            " choose another column.",
        ),
        (
            ROWS,
            {"condition": ["size"]},
            "PATH: `condition` 'size' must have a value in each row, but 1 have none, in line 5. Remove these rows, or"
            " choose another column.",
        ),
        (
            ROWS,
            {"label": "size"},
            "`label` 'size' has 29 different values in 30 rows. Numbers that are no classes are a `condition`. If they"
            " are classes, say `columns` {size: categorical}.",
        ),
        (
            ROWS,
            {"label": "size", "columns": {"size": "numeric"}},
            "`label` must be a binary or categorical column, got 'size', which `columns` calls numeric. Numbers that"
            " are no classes are a `condition`.",
        ),
        (
            ROWS,
            {"columns": {"weight": "numeric"}},
            "`columns` names 'weight', which PATH does not have. It has size, visits, tame, colour, species.",
        ),
        (
            ROWS,
            {"label": "weight"},
            "`label` names 'weight', which PATH does not have. It has size, visits, tame, colour, species.",
        ),
        (
            ROWS,
            {"condition": ["weight"]},
            "`condition` names 'weight', which PATH does not have. It has size, visits, tame, colour, species.",
        ),
        (
            ROWS,
            {"columns": {"size": "real"}},
            "`columns` must give 'size' one of numeric, count, binary, categorical, ignored, got 'real'.",
        ),
        (
            ROWS,
            {"label": "species", "condition": ["species"]},
            "'species' can be only one of `label`, a `condition`, or ignored. Name it once.",
        ),
        (
            ROWS,
            {"condition": ["tame"], "columns": {"tame": "ignored"}},
            "'tame' can be only one of `label`, a `condition`, or ignored. Name it once.",
        ),
        (ROWS, {"condition": "tame"}, "`condition` must be a list of words, got 'tame'. Write it as [tame]."),
        (ROWS, {"missing": "NA"}, "`missing` must be a list of words, got 'NA'. Write it as [NA]."),
        (ROWS, {"delimiter": ", "}, "`delimiter` must be one character, got ', '."),
        (
            ROWS,
            {"columns": dict.fromkeys(NAMES, "ignored")},
            "PATH has no column left for the data. Leave some in.",
        ),
        (ROWS, {"val_fraction": 1}, "`val_fraction` must be between 0 and 1, both excluded, got 1."),
        (
            ROWS[:8],
            {},
            "test and val would have none of the 8 rows of PATH, with `test_fraction` 0.1, `val_fraction` 0.1. A hash"
            " of each row's number decides, so a small set may miss a split: choose other fractions or another `seed`,"
            " add rows, or give `val_path` and `test_path`.",
        ),
        ([], {}, "PATH has no row below the columns' names. Add rows, or name another file."),
    ],
)
def test_a_table_that_does_not_fit(tmp_path, rows, options, message):
    path = saved(tmp_path, rows)
    with pytest.raises(ValueError, match=f"^{re.escape(message.replace('PATH', str(path)))}$"):
        Table(path, **options)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "PATH has no first line with the columns' names. Add one."),
        ("a,b,a\n1,2,3\n", "PATH, line 1: 2 columns have the name 'a'. Rename them."),
        (
            ",a\n1,2\n",
            "PATH, line 1: column 1 has no name. Name it; a column of row numbers can be ignored by its name.",
        ),
        ("1,2\n3,4\n", "PATH, line 1, must have the columns' names, got nothing but numbers. Add such a line."),
        (
            "a;b\n1;2\n",
            "PATH, line 1: with the `delimiter` ',' there is one column, 'a;b'. Set `delimiter` to ';'.",
        ),
        (
            'a,b\n1,2\n"3\n",4\n5\n',
            "PATH, line 5: a row must have the 2 cells that the first line names, got 1. Fix it, or quote cells that"
            " hold ','.",
        ),
        (
            "a,b\n1,2,3\n",
            "PATH, line 2: a row must have the 2 cells that the first line names, got 3. Fix it, or quote cells that"
            " hold ','.",
        ),
        (
            "a,b\n1,x\n2,\0\n",
            "PATH, line 3, has a NUL character, as a file in UTF-16 or a damaged one does. Save it as CSV in UTF-8.",
        ),
        ('a,b\n1,"2\n', "PATH, line 2, can't be read as CSV: unexpected end of data. Fix it."),
    ],
)
def test_a_file_that_is_no_table(tmp_path, text, message):
    path = tmp_path / "table.csv"
    path.write_text(text)
    with pytest.raises(DataError, match=f"^{re.escape(message.replace('PATH', str(path)))}$"):
        Table(path)


def test_a_file_that_is_no_text(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"^There is no file .*nowhere.csv. Name a CSV file whose first line has"
    ):
        Table(tmp_path / "nowhere.csv")
    (tmp_path / "table.csv").write_bytes("a,b\nMünchen,1\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"table.csv is not text in UTF-8 \(.*\). Save it as CSV in UTF-8."):
        Table(tmp_path / "table.csv")


def test_other_files_must_fit_the_first(tmp_path):
    path = saved(tmp_path)
    with pytest.raises(ValueError, match=r"^`val_path` and `path` are the same file, .*, so a model would be judged"):
        Table(path, val_path=path)
    renamed = saved(tmp_path, ROWS, ("length", *NAMES[1:]), "renamed.csv")
    message = (
        f"`test_path` must have the columns of `path` that are used, in any order, but {renamed} lacks size, and has"
        " length more. Rename or add them."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Table(path, test_path=renamed)
    unlabelled = saved(tmp_path, [row[:4] for row in ROWS], NAMES[:4], "unlabelled.csv")
    with pytest.raises(ValueError, match=r"^`val_path` must have the columns .* lacks species\. Rename or add them\.$"):
        Table(path, label="species", val_path=unlabelled)
    partly = saved(tmp_path, changed(9, "species", ""), NAMES, "partly.csv")
    with pytest.raises(DataError, match="`label` 'species' must have a value in each row, but 1 have none, in line 9"):
        Table(path, label="species", test_path=partly)
    unseen = saved(tmp_path, [("1", "1", "yes", "pink", "emu")], NAMES, "unseen.csv")
    message = (
        f"{unseen}, line 2, column 'colour': 'pink' is not one of blue, green, red. Fix it, name it in `missing`, or"
    )
    with pytest.raises(DataError, match=f"^{re.escape(message)}"):
        Table(path, test_path=unseen)
