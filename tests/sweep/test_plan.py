"""What a sweep consists of."""

from lightning_vae.sweep.plan import grid


def test_grid_without_options_is_one_point():
    assert list(grid({})) == [{}]


def test_the_last_options_values_change_fastest():
    assert list(grid({"a": [1, 2], "b": [3, 4]})) == [{"a": a, "b": b} for a in (1, 2) for b in (3, 4)]
