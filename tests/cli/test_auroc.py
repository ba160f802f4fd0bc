"""From a table of `predict` to an AUROC, with one command."""

import gzip
import sys

import pytest

from lightning_vae.main import main

ROWS = """\
index,label,elbo,rate,distortion,nll,effective_sample_size,z0
0,3,-250.5,7,243.5,249,12,0.1
1,7,-210.25,6,204.25,209,11,0.2
2,3,-230,4,226,229,9,0.3
3,10,-240,5,235,239,8,0.4
"""


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py"])


def table(tmp_path, text=ROWS, name="scores.csv"):
    (tmp_path / name).write_text(text)
    return name


def test_the_auroc_of_each_score_is_printed_with_its_sign(tmp_path, capsys):
    main(["auroc", table(tmp_path), "--outlier_class", "3"])
    assert capsys.readouterr().out == (
        "scores.csv: 2 observations of class 3 among 2 of class 7, 10.\n"
        "\n"
        "score       AUROC\n"
        "-ELBO       0.7500\n"  # of the four pairs one is in the wrong order: -230 is above -240
        "rate        0.5000\n"
        "distortion  0.7500\n"
        "NLL         0.7500\n"
        "\n"
        "Higher counts as more anomalous, for each score as it is named. 0.5 is chance.\n"
    )


def test_several_classes_may_be_outliers_and_a_table_compressed(tmp_path, capsys):
    with gzip.open("scores.csv.gz", "wt") as file:
        file.write(ROWS)
    main(["auroc", "--outlier_class=3", "--outlier_class", "10", "scores.csv.gz"])
    said = capsys.readouterr().out
    assert "3 observations of class 3, 10 among 1 of class 7." in said
    assert "-ELBO       1.0000\n" in said
    assert "rate        0.3333\n" in said


def test_classes_with_names_go_by_them(tmp_path, capsys):
    names = {"3": "cat", "7": "a dog", "10": "3"}
    lines = [line.split(",") for line in ROWS.splitlines()]
    text = "\n".join(",".join([*line[:2], names.get(line[1], "class"), *line[2:]]) for line in lines)
    main(["auroc", table(tmp_path, text), "--outlier_class", "a dog"])
    assert "1 observations of class a dog among 3 of class 3, cat." in capsys.readouterr().out


def test_scores_without_a_likelihood_are_enough(tmp_path, capsys):
    main(["auroc", table(tmp_path, "index,label,elbo\n0,a,-1\n1,b,-2\n"), "--outlier_class", "b"])
    said = capsys.readouterr().out
    assert "-ELBO       1.0000\n" in said
    assert "NLL" not in said


@pytest.mark.parametrize(
    ("text", "outlier", "message"),
    [
        (ROWS.replace("label", "id"), "3", "scores.csv has no column `label` or `class`, without which no AUROC"),
        (ROWS, "4", "`--outlier_class` must be a class of scores.csv, 3, 7, 10, got '4'."),
        ("index,label,elbo\n0,3,-1\n1,3,-2\n", "3", "all 2 of scores.csv are of class 3. Predict on a split that has"),
        ("index,label,z0\n0,3,1\n", "3", "must have a column for one of the scores elbo, rate, distortion, nll, got "),
        ("index,label,elbo\n", "3", "scores.csv has no rows."),
        ("", "3", "must have a column for one of the scores elbo, rate, distortion, nll, got none."),
        (ROWS.replace("-230", "nan"), "3", "scores.csv, line 4: `elbo` must be a number, got 'nan'."),
        (ROWS.replace(",226,", ",,"), "3", "scores.csv, line 4: `distortion` must be a number, got ''."),
        ("index,label,elbo\n0,3\n", "3", "scores.csv, line 2: `elbo` must be a number, got None."),
    ],
)
def test_what_has_no_auroc_ends_in_one_message(tmp_path, capsys, text, outlier, message):
    with pytest.raises(SystemExit) as ended:
        main(["auroc", table(tmp_path, text), "--outlier_class", outlier])
    said = capsys.readouterr()
    assert ended.value.code == 2
    assert message in said.err
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1
    assert said.out == ""


@pytest.mark.parametrize("name", ["nowhere.csv", ".", "broken.csv.gz", "picture.csv"])
def test_a_file_that_can_not_be_read_ends_in_one_message(tmp_path, capsys, name):
    (tmp_path / "broken.csv.gz").write_bytes(b"not compressed")
    (tmp_path / "picture.csv").write_bytes(bytes(range(128, 256)))
    with pytest.raises(SystemExit):
        main(["auroc", name, "--outlier_class", "3"])
    said = capsys.readouterr().err
    assert said.startswith(f"error: {name} ")
    assert said.count("\n") == 1


@pytest.mark.parametrize("arguments", [[], ["scores.csv"], ["scores.csv", "--outlier", "3"]])
def test_a_command_line_that_lacks_something_ends_in_one_message(tmp_path, capsys, arguments):
    table(tmp_path)
    with pytest.raises(SystemExit):
        main(["auroc", *arguments])
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert "All options: train.py auroc --help" in said


def test_a_command_line_without_a_table_says_what_it_needs(capsys):
    with pytest.raises(SystemExit):
        main(["auroc", "--outlier_class", "3"])
    assert capsys.readouterr().err.startswith("error: `auroc` needs the table that `predict` has written")
