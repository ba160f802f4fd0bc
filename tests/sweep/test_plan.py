"""What a sweep consists of."""

from types import SimpleNamespace

import torch

from lightning_vae import VAE, Columns, Condition
from lightning_vae.datamodules import Table
from lightning_vae.sweep.plan import grid, rehearse


def test_grid_without_options_is_one_point():
    assert list(grid({})) == [{}]


def test_the_last_options_values_change_fastest():
    assert list(grid({"a": [1, 2], "b": [3, 4]})) == [{"a": a, "b": b} for a in (1, 2) for b in (3, 4)]


def rehearsed(model, data):
    rehearse(SimpleNamespace(model=model, datamodule=data, trainer=SimpleNamespace(limit_test_batches=1.0)))


def test_data_in_large_units_are_rehearsed_with_their_scale(tmp_path):
    torch.manual_seed(0)
    path = tmp_path / "table.csv"
    path.write_text("mass,year\n" + "".join(f"{1e12 * (1 + (row % 7))},{1e9 + 1e6 * row}\n" for row in range(100)))
    table = Table(path, condition=["year"])
    model = VAE((1,), latent_dim=1, kinds=table.kinds, likelihood=Columns, condition=Condition(covariates=1))
    rehearsed(model, table)
    assert torch.equal(model.likelihood.loc, table.loc)
    assert 1e9 < model.condition.loc < 1.1e9
