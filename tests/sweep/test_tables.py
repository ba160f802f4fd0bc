"""Means and spreads over seeds."""

from lightning_vae.sweep.tables import summary


def test_the_spread_of_one_seed_is_unknown():
    (row,) = summary([{"point": "a", "config": "c", "config_hash": "h", "seed": 0, "beta": 1, "rate": 2.0}])
    assert row == {"config": "c", "config_hash": "h", "seeds": 1, "beta": 1, "rate_mean": 2.0, "rate_std": None}
