"""A table from its CSV file to the model: the kinds of its columns, its scale, and new rows in its own units."""

import csv
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from lightning_vae import VAE, Columns, Gaussian
from lightning_vae.main import main

ROWS = [(f"{20 + row / 4}", f"{row % 7}", "yes" if row % 3 else "", "rgb"[row % 3]) for row in range(60)]
KINDS = ("numeric", "count", "binary", 3)
SHORT = ["--data=Table", "--data.path=table.csv", "--data.columns={visits: count, colour: categorical, tame: binary}",
         "--trainer.max_epochs=1", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false",
         "--trainer.enable_model_summary=false", "--model.latent_dim=2"]  # fmt: skip


@pytest.fixture(autouse=True)
def _in_a_folder_with_a_table(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    write("table.csv", [("19", "1", "no", "r"), *ROWS])


def write(
    name: str, rows: list[tuple[str, ...]], names: tuple[str, ...] = ("size", "visits", "tame", "colour")
) -> None:
    with open(name, "w", newline="") as file:
        csv.writer(file).writerows([names, *rows])


@pytest.mark.parametrize("likelihood", [[], ["--model.likelihood=Columns"]], ids=["default", "named"])
def test_a_table_gives_the_model_its_kinds_and_scale(likelihood):
    main(["fit", *SHORT, *likelihood])
    [checkpoint] = Path("lightning_logs").rglob("*.ckpt")
    vae = VAE.load_from_checkpoint(checkpoint, weights_only=True)
    assert isinstance(vae.likelihood, Columns)
    assert vae.likelihood.kinds == KINDS
    assert 20 < vae.likelihood.loc[0] < 35
    assert vae.likelihood.loc[1:].tolist() == [0, 0, 0]
    sampled = vae.sample(50)
    assert 0 < sampled[:, 0].min() < sampled[:, 0].max() < 100  # in the table's own units
    # New rows are read by the columns and categories of the table, in any order.
    write("new.csv", [("b", "", "2", "yes"), ("r", "30", "", "no")], ("colour", "size", "visits", "tame"))
    with pytest.warns(UserWarning, match="trained on other data: test has 2 observations, had"):
        main(["predict", *SHORT, *likelihood, "--data.test_path=new.csv", f"--ckpt_path={checkpoint}"])
    [table] = Path().rglob("latents.csv")
    with table.open(newline="") as file:
        assert [row["file"] for row in csv.DictReader(file)] == ["new.csv:2", "new.csv:3"]


def test_a_likelihood_that_takes_all_columns_alike_is_refused_or_fits(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["fit", *SHORT, "--model.likelihood=Gaussian"])
    assert exit_.value.code == 2
    assert (
        "`likelihood` Gaussian takes all columns alike, but the table has the `kinds` numeric, count, binary, 3. Use"
        in (capsys.readouterr().err)
    )
    assert isinstance(VAE(shape=(2,), latent_dim=2, kinds=["numeric"] * 2, likelihood=Gaussian).likelihood, Gaussian)


def test_kinds_are_given_to_the_model_or_to_its_likelihood():
    assert VAE(shape=(2,), kinds=[2, "count"]).likelihood.kinds == (2, "count")
    assert VAE(shape=(2,), likelihood=partial(Columns, kinds=[3, 4])).likelihood.kinds == (3, 4)
    with pytest.raises(ValueError, match=r"`kinds` must be the kind of each of the 3 columns, .*, got \['count'\]"):
        VAE(shape=(3,), kinds=["count"])
    assert torch.equal(VAE(shape=(2,), kinds=["count"] * 2).likelihood.scale, torch.ones(2))
