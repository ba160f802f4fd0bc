import pytest
import torch

from lightning_vae.callbacks.drawing.images import as_images, image_grid, thumbnails


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((5, 1, 8, 8), (5, 1, 8, 8)),
        ((5, 3, 9, 13), (5, 3, 9, 13)),
        ((5, 9, 13, 3), (5, 3, 9, 13)),
        ((5, 4, 8, 8), (5, 3, 8, 8)),
        ((5, 2, 8, 8), (5, 1, 8, 8)),
        ((5, 11, 8, 8), (5, 1, 8, 8)),
        ((5, 8, 8), (5, 1, 8, 8)),
        ((5, 1, 6, 8, 9), (5, 1, 8, 9)),
        ((5, 6, 3, 8, 9), (5, 3, 8, 9)),
        ((5, 6, 8, 9, 3), (5, 3, 8, 9)),
        ((5, 30, 5), None),
        ((5, 300), None),
        ((5, 1, 300), None),
        ((5, 7, 30), None),
        ((5, 1, 1, 300), None),
        ((5, 3, 3, 300), None),
    ],
)
def test_what_is_an_image(shape, expected):
    images = as_images(torch.rand(shape))
    assert (images if images is None else tuple(images.shape)) == expected


def test_a_grid_keeps_pixels_rows_and_columns():
    images = torch.zeros(2, 3, 1, 16, 16)
    images[1, 2, 0, 4, 7] = 1.0
    images[0, 1] = 2.0
    images[0, 2] = float("nan")
    grid = image_grid(images)
    assert grid.shape == (3, 2 * 34, 3 * 34)
    assert grid.dtype == torch.uint8
    assert (grid[:, 34 + 1 + 8 : 34 + 1 + 10, 68 + 1 + 14 : 68 + 1 + 16] == 255).all()
    assert (grid[:, 34 + 1 + 10 : 67, 68 + 1 : 101] == 0).all()
    assert (grid[:, :34, 34:68] == 255).all()
    assert (grid[:, 1:33, 69:101] == 0).all()
    labelled = image_grid(images, ["first", "second"])
    assert labelled[:, :, -102:].equal(grid)
    assert (labelled[:, :34, :-102] < 120).any()


@pytest.mark.parametrize(
    ("size", "cell"),
    [((8, 8), (34, 34)), ((28, 28), (30, 30)), ((7, 31), (16, 64)), ((4, 90), (6, 92)), ((300, 200), (98, 66))],
)
def test_images_are_brought_to_a_size_one_can_see(size, cell):
    assert image_grid(torch.rand(1, 1, 3, *size)).shape[1:] == cell


def test_a_label_has_room_beside_a_flat_image():
    images = torch.zeros(2, 1, 1, 4, 90)
    assert image_grid(images).shape[1] == 2 * 6
    assert image_grid(images, ["input", "output"]).shape[1] == 2 * 13


@pytest.mark.parametrize(
    ("shape", "expected"), [((5, 1, 8, 8), (5, 3, 8, 8)), ((5, 100, 60, 3), (5, 3, 32, 32)), ((5, 7), None)]
)
def test_thumbnails_are_small_and_coloured(shape, expected):
    images = thumbnails(torch.randn(shape) * 9)
    assert (images if images is None else tuple(images.shape)) == expected
    if images is not None:
        assert (images.min(), images.max()) == (0, 1)
