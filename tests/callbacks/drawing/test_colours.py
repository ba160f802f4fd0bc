import pytest
import torch

from lightning_vae.callbacks.drawing.colours import heat_map

DARK, BRIGHT = (68, 1, 84), (253, 231, 37)


def pixel(image, row, column):
    return tuple(image[:, row, column].tolist())


def test_time_goes_right_and_dimensions_go_down():
    values = torch.zeros(4, 2)
    values[3, 1] = 5.0  # last moment, second dimension
    image = heat_map(values)
    assert image.dtype == torch.uint8
    assert image.shape == (3, 256, 32)
    assert pixel(image, 255, 31) == pixel(image, 128, 24) == BRIGHT
    assert pixel(image, 127, 31) == pixel(image, 255, 23) == pixel(image, 0, 0) == DARK


@pytest.mark.parametrize("shape", [(1, 1), (1, 64), (512, 512), (5000, 3), (7, 4096), (513, 513), (300, 200)])
def test_the_size_is_bounded(shape):
    _, height, width = heat_map(torch.rand(shape)).shape
    assert 128 < height <= 512
    assert width <= 512


def test_long_histories_are_averaged():
    values = torch.zeros(1024, 1)
    values[512:] = 1.0
    image = heat_map(values)
    assert (pixel(image, 0, 0), pixel(image, 0, 511)) == (DARK, BRIGHT)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
def test_nothing_is_dark(value):
    assert pixel(heat_map(torch.full((2, 2), value)), 0, 0) == DARK


def test_the_colours_are_those_of_viridis():
    matplotlib = pytest.importorskip("matplotlib", reason="not in the base install")

    image = heat_map(torch.linspace(0, 1, 64)[:, None])
    expected = torch.tensor(matplotlib.colormaps["viridis"](torch.linspace(0, 1, 64).numpy()))[:, :3] * 255
    assert (image[:, 0, ::4].T - expected).abs().max() < 20
